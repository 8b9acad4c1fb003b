"""SAEs that exist already, of any format that cosae.interop reads, and the data of their site to measure them on.

What was not asked for is taken from each SAE's own file; SAEs of one site share a dataset, so that they are measured on
the same tokens.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cosae.activations.perturbation import Perturbation
from cosae.activations.sample import Sample
from cosae.errors import CosaeError
from cosae.interop.read import read_sae
from cosae.io.values import from_plain
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Dataset, DataUse
from cosae.run.dataset.open import open_dataset
from cosae.run.folder import ARMS, RECIPE
from cosae.run.requests import EvalRequest, Place, Reading
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.text.mixture import parse_corpus

TOKENS = 32_768


@dataclass
class Datasets:
    """Datasets by what they are of: SAEs of one site share theirs, and its sample."""

    request: EvalRequest
    tokens: int = TOKENS
    opened: dict[str, tuple[Dataset, Sample]] = field(default_factory=dict)

    def of(self, sae: SAE, path: Path) -> tuple[Dataset, Sample]:
        """The dataset of an SAE, and its held-out sample. Raises CosaeError where the widths differ."""
        request = self.request
        if request.activations is not None:
            config = DataConfig(activations=request.activations, held_out_frac=0.0)
        elif request.store is not None:
            config = DataConfig(store=request.store, store_site=request.store_site)
        else:
            config = data_of(sae, path, request)
        key = repr(config)
        if key not in self.opened:
            perturbation = Perturbation() if request.inject is None else Perturbation.parse(request.inject)
            both = dict.fromkeys(("train", "held_out"), perturbation)
            known: dict[str, Any] = {"seed": request.seed, "device": request.device, "held_out_tokens": self.tokens}
            dataset = open_dataset(config, DataUse(**known, perturbations=both))
            self.opened[key] = dataset, dataset.sample("held_out", self.tokens, request.rule)
        width = self.opened[key][1].activations.x_ND.shape[1]
        if width != sae.d_in:
            what = f"{path} reads activations of width {sae.d_in}; those given have width {width}"
            raise CosaeError(f"{what}: name the model and site, or the file, that it was trained on.")
        return self.opened[key]


def data_of(sae: SAE, path: Path, request: EvalRequest | Reading | Place) -> DataConfig:
    """The data an SAE was trained on, as far as its file says, with what was asked for in its place.

    Raises CosaeError where neither says where its activations come from.
    """
    known = sae.metadata
    recorded = known.get("recipe", {}).get("data") if isinstance(known.get("recipe"), dict) else None
    data = from_plain(DataConfig, recorded, "recipe.data") if isinstance(recorded, dict) else DataConfig()
    if request.model is not None and (data.store, data.activations, data.world) != (None, None, None):
        data = DataConfig()
    if data.store is not None:
        raise CosaeError(f"{path} was trained on the store {data.store}: name it with --store FOLDER.")
    if data.activations is not None:
        raise CosaeError(f"{path} was trained on the file {data.activations}: name it with --activations FILE.")
    if data.world is not None:
        return data
    model = request.model or known.get("model")
    site = request.site or known.get("site") or known.get("hook_name") or known.get("hf_hook_name")
    if model is None:
        raise CosaeError(f"{path} does not say which model it reads: give --model and --site, or --activations FILE.")
    if site is None:
        raise CosaeError(f"{path} does not say which site it reads: give --site, for instance resid_post.3.")
    changes: dict[str, Any] = {"model": model, "site": site}
    changes |= {name: getattr(request, name, None) for name in ("corpus", "context")}
    return replace(data, **{k: v for k, v in changes.items() if v is not None})


def read_with_model(path: Path, place: Place) -> tuple[SAE, DataConfig]:
    """An SAE, and the model, site and text it is shown on. Raises CosaeError where no language model is known."""
    sae = read_sae(path, format=place.format, device=place.device)
    try:
        return sae, data_of(sae, path, place)
    except CosaeError as error:
        if "--activations" not in str(error):
            raise
        hint = "name its language model with --model and --site"
        raise CosaeError(f"{path} was not trained on a language model, or does not say on which: {hint}.") from None


def check_recorded(data: DataConfig, place: Place, path: Path, *, corpus: bool = True) -> None:
    """Raises CosaeError where the SAE's file, not the user, names a model or text of this machine.

    A file may come from a stranger: it may name what is packaged and what the hub has, and no folder or file here.
    """
    if place.model is None and data.model != "embedded" and not _of_the_hub(data.model):
        raise CosaeError(f"{path} names the model {data.model!r}, which is none of the hub: name it with --model.")
    if corpus and getattr(place, "corpus", None) is None:
        for source in parse_corpus(data.corpus):
            if source.spec != "pylib" and not _of_the_hub(source.spec.removeprefix("hf:").partition(":")[0]):
                what = f"{path} names the text {source.spec!r}, a place on this machine"
                raise CosaeError(f"{what}: if you want it read, name it with --corpus.")


def _of_the_hub(name: str) -> bool:
    """Whether a name is of a repository, and of nothing that lies here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)) and not Path(name).exists()


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
