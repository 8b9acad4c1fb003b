"""SAEs that exist already, of any format that cosae.interop reads, and the data of their site to measure them on.

What was not asked for is taken from each SAE's own file; SAEs of one site share a dataset, so that they are measured on
the same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cosae.activations.perturbation import Perturbation
from cosae.activations.sample import Sample
from cosae.errors import CosaeError
from cosae.interop.read import read_sae
from cosae.io.progress import SILENT, Progress
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Dataset, DataUse
from cosae.run.dataset.open import open_dataset
from cosae.run.folder import ARMS, RECIPE
from cosae.run.recorded import data_of
from cosae.run.requests import EvalRequest, Place
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE

TOKENS = 32_768


@dataclass
class Datasets:
    """Datasets by what they are of: SAEs of one site share theirs, and its sample."""

    request: EvalRequest
    tokens: int = TOKENS
    progress: Progress = SILENT
    calibration_tokens: int = 1
    opened: dict[str, tuple[Dataset, Sample]] = field(default_factory=dict)
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def of(self, sae: SAE, path: Path) -> tuple[Dataset, Sample]:
        """The dataset of an SAE, and its held-out sample. Raises CosaeError where the widths differ."""
        request = self.request
        if request.target is not None and sae.target is None:
            raise CosaeError(f"target has no say in {path}, which reconstructs what it reads: drop --target.")
        if request.activations is not None:
            config = DataConfig(activations=request.activations, target=request.target, held_out_frac=0.0)
        elif request.store is not None:
            target = request.target or (sae.metadata.get("target") if sae.target is not None else None)
            config = DataConfig(store=request.store, store_site=request.store_site, target=target)
        else:
            config = data_of(sae, path, request)
        key = repr(config)
        if key not in self.opened:
            if (config.activations, config.store, config.world) == (None, None, None):
                corpus = config.corpus if isinstance(config.corpus, str) else ", ".join(config.corpus)
                self.progress.note(f"text: {corpus}, read by the model {config.model}")
            perturbation = Perturbation() if request.inject is None else Perturbation.parse(request.inject)
            both = dict.fromkeys(("train", "held_out"), perturbation)
            known: dict[str, Any] = {"seed": request.seed, "device": request.device, "held_out_tokens": self.tokens}
            known["calibration_tokens"] = self.calibration_tokens
            dataset = self._open.enter_context(open_dataset(config, DataUse(**known, perturbations=both)))
            dataset.progress = self.progress
            self.opened[key] = dataset, dataset.sample("held_out", self.tokens, request.rule)
        width = self.opened[key][1].activations.x_ND.shape[1]
        if width != sae.d_in:
            what = f"{path} reads activations of width {sae.d_in}; those given have width {width}"
            raise CosaeError(f"{what}: name the model and site, or the file, that it was trained on.")
        return self.opened[key]


def read_with_model(path: Path, place: Place) -> tuple[SAE, DataConfig]:
    """An SAE, and the model, site and text it is shown on. Raises CosaeError where no language model is known, or may
    not be taken from the SAE's file."""
    sae = read_sae(path, format=place.format, device=place.device)
    try:
        return sae, data_of(sae, path, place)
    except CosaeError as error:
        if not any(option in str(error) for option in ("--activations", "--store")):
            raise
        hint = "name its language model with --model and --site"
        raise CosaeError(f"{path} was not trained on a language model, or does not say on which: {hint}.") from None


def saes_in(path: Path) -> dict[str, Path]:
    """Name → folder of the SAEs of a run, or of a folder of runs; nothing for a path that is neither.

    Raises CosaeError for a run none of whose SAEs is finished.
    """
    found = {sae.name: sae for sae in sorted(path.glob(f"{ARMS}/[!.]*"))}
    if not found and (path / RECIPE).is_file():
        raise CosaeError(f"{path} is a run without finished SAEs: let it finish, or go on with cosae resume {path}.")
    return found or {f"{sae.parents[1].name}/{sae.name}": sae for sae in sorted(path.glob(f"*/{ARMS}/[!.]*"))}


def every_sae(paths: Sequence[Path]) -> list[Path]:
    """The paths, with the SAEs of a run in the place of its folder."""
    return [sae for path in paths for sae in (saes_in(path).values() or [path])]


def choose_sae(path: Path, name: str | None = None) -> Path:
    """The folder of one SAE: `path` itself, or one in a run's folder or in a folder of runs, by its name.

    Raises CosaeError where there are several and none is named, and where none has that name.
    """
    found = saes_in(path)
    if not found:
        if name is not None:
            raise CosaeError(f"{path} is no run with finished SAEs, of which {name!r} could be one: drop --sae.")
        return path
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    listed = ", ".join(found)
    if name is None:
        raise CosaeError(f"{path} holds several SAEs: choose one with --sae NAME, of {listed}.")
    if name not in found:
        raise CosaeError(f"{path} holds no SAE {name!r}: choose from {listed}.")
    return found[name]


def describe(dataset: Dataset, sample: Sample, request: EvalRequest) -> dict[str, Any]:
    """Where a sample comes from, in plain values."""
    config = dataset.config
    counts = {"documents": len(sample.documents), "tokens": len(sample)}
    injected = {} if request.inject is None else {"inject": request.inject}
    if config.activations is not None:
        sha256 = dataset.describe().get("sha256")
        return {"activations": config.activations, "sha256": sha256, "tokens": len(sample), **injected}
    site = getattr(dataset.site, "name", None)
    origin = {"store": config.store} if config.store is not None else {"corpus": config.corpus}
    return {"model": dataset.model_name, "site": site, **origin, **counts, **injected}


def names_of(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    parts = [Path(p).absolute().parts for p in paths]
    for length in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-2:])} ({i + 1})" for i, p in enumerate(parts)]


def calibrated(sae: SAE, sample: Sample) -> tuple[SAE, str | None]:
    """The SAE itself, or, where its file holds no inference threshold, a copy with one and a warning that says so."""
    if sae.calibrated:
        return sae, None
    sae = copy.deepcopy(sae)
    every_second_N = ~sample.sink_N
    every_second_N[1::2] = False
    found = calibrate(sae, sample.activations.x_ND[every_second_N].float())
    return sae, (
        f"the file holds no inference threshold; for this measurement one was set so that {found.l0:.1f} features fire "
        f"per token (its k is {sae.k}) on every second token, sinks left out"
    )
