"""SAEs that exist already, of any format that cosae.interop reads, and the data of their site to measure them on.

What was not asked for is taken from each SAE's own file; SAEs of one site share a dataset, so that they are measured on
the same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cosae.activations.perturbation import Perturbation
from cosae.activations.sample import Sample
from cosae.errors import CosaeError
from cosae.io.values import from_plain
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Dataset, DataUse
from cosae.run.dataset.open import open_dataset
from cosae.run.requests import EvalRequest, Reading
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE

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


def data_of(sae: SAE, path: Path, request: EvalRequest | Reading) -> DataConfig:
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
    changes: dict[str, Any] = {"model": model, "site": site, "corpus": request.corpus, "context": request.context}
    return replace(data, **{k: v for k, v in changes.items() if v is not None})


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
