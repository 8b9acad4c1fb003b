"""SAEs that exist already, of any format that cosae.interop reads, and activations of their site to ask them on.

In: paths, and what the user wants to ask them on. Out: SAEs by name, and one sample per (model, site) or file, which
SAEs of one site share. What was not asked for is taken from the SAE's own file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cosae.activations import perturbation as perturbations
from cosae.activations.arrays import ArraySource
from cosae.activations.perturbation import Perturbation
from cosae.errors import CosaeError
from cosae.recipe import DataConfig, Recipe, from_plain
from cosae.run.dataset.dataset import Data, ModelData
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.types import Activations


@dataclass(frozen=True)
class EvalRequest:
    """What to ask SAEs on. Fields left None are taken from each SAE's own facts, then from DataConfig's defaults."""

    tokens: int = 32_768
    model: str | None = None
    site: str | None = None
    corpus: str | None = None
    activations: str | None = None
    """A file of N × d vectors instead of a model on a corpus."""
    store: str | None = None
    """A folder of stored activations (cosae.activations.store.reader) instead of a model."""
    store_site: str | None = None
    """Which of the stores in that folder, where it holds several."""
    context: int | None = None
    inject: str | None = None
    """Norm perturbation put on the activations first, such as log_normal:sigma=0.5: what if norms varied so?"""
    sink_factor: float = 10.0
    """Tokens of at least this multiple of the median norm are sinks, beside position 0 and special ids."""
    format: str = "auto"
    """Format of the SAE files; auto looks at them."""
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 64:
            raise CosaeError(f"a measurement needs at least 64 tokens to say anything. Got {self.tokens} instead.")
        if not self.sink_factor > 1:
            raise CosaeError(f"sink_factor must be above 1 (a multiple of the median). Got {self.sink_factor} instead.")
        if self.inject is not None:
            Perturbation.parse(self.inject)
        if (self.activations or self.store) and (self.model or self.site or self.corpus):
            raise CosaeError("activations are taken from a file or store, or from a model, not from both: drop one.")
        if self.activations and self.store:
            raise CosaeError("activations are taken from a file or from a store, not from both: drop one.")


@dataclass(frozen=True)
class Sampled:
    """Activations to ask SAEs on, where they come from in plain values, and how to spell a token id."""

    activations: Activations
    source: dict[str, Any]
    spell: Callable[[int], str] | None = None
    data: Data | None = None
    """What more can be drawn from: a model or a store."""


@dataclass
class Samples:
    """Samples by what they are of: SAEs of one site share theirs, so that they are audited on the same tokens."""

    request: EvalRequest
    made: dict[tuple[Any, ...], Sampled] = field(default_factory=dict)

    def of(self, sae: SAE, path: Path) -> Sampled:
        if self.request.activations is not None:
            key: tuple[Any, ...] = ("file", self.request.activations)
            if key not in self.made:
                self.made[key] = self._injected(_from_file(self.request))
        elif self.request.store is not None:
            key = ("store", self.request.store, self.request.store_site)
            if key not in self.made:
                self.made[key] = self._injected(_from_store(self.request))
        else:
            data = data_of(sae, path, self.request)
            key = ("model", repr(data))
            if key not in self.made:
                self.made[key] = self._injected(_from_model(data, self.request))
        found = self.made[key]
        width = found.activations.x_ND.shape[1]
        if width != sae.d_in:
            raise CosaeError(
                f"{path} reads activations of width {sae.d_in}; those given have width {width}: "
                "name the model and site, or the file, that it was trained on."
            )
        return found

    def _injected(self, found: Sampled) -> Sampled:
        if self.request.inject is None:
            return found
        x = perturbations.apply(found.activations, Perturbation.parse(self.request.inject), 0, "held_out")
        return replace(found, activations=x, source={**found.source, "inject": self.request.inject})


def data_of(sae: SAE, path: Path, request: EvalRequest) -> DataConfig:
    """The data an SAE was trained on, as far as its file says, with what was asked for in its place."""
    known = sae.metadata
    recorded = known.get("recipe", {}).get("data") if isinstance(known.get("recipe"), dict) else None
    data = from_plain(DataConfig, recorded, "recipe.data") if isinstance(recorded, dict) else DataConfig()
    if data.world is not None or data.activations is not None or data.store is not None:
        if request.model is None:
            what, how = (
                (f"the store {data.store}", "name it with --store FOLDER")
                if data.store is not None
                else ("a synthetic world", "give its activations with --activations FILE")
                if data.world is not None
                else (f"the file {data.activations}", "give its activations with --activations FILE")
            )
            raise CosaeError(f"{path} was trained on {what}: {how}.")
        data = DataConfig()
    model = request.model or known.get("model")
    site = request.site or known.get("site") or known.get("hook_name") or known.get("hf_hook_name")
    if model is None:
        raise CosaeError(
            f"{path} does not say which model it was trained on: give --model and --site, or --activations FILE."
        )
    if site is None:
        raise CosaeError(f"{path} does not say which site it reads: give --site, for instance resid_post.3.")
    changes: dict[str, Any] = {"model": model, "site": site, "corpus": request.corpus, "context": request.context}
    return replace(data, **{k: v for k, v in changes.items() if v is not None})


def _recipe_of(data: DataConfig, request: EvalRequest) -> Recipe:
    """A recipe that trains nothing and measures the tokens wanted."""
    return Recipe(data=data, device=request.device).changed(
        {
            "training.steps": 1,
            "training.batch_tokens": 1,
            "training.buffer_tokens": 2,
            "filter.window_tokens": 1,
            "evaluation.held_out_tokens": request.tokens,
            "evaluation.calibration_tokens": 1,
        }
    )


def _from_store(request: EvalRequest) -> Sampled:
    from cosae.run.dataset.store import StoreData

    opened = StoreData(_recipe_of(DataConfig(store=request.store, store_site=request.store_site), request))
    sample = opened.sample("held_out", request.tokens)
    source = {"store": request.store, "model": opened.model_name, "site": getattr(opened.site, "name", opened.site)}
    counts = {"documents": len(sample.documents), "tokens": len(sample.activations)}
    return Sampled(sample.activations, {**source, **counts}, data=opened)


def _from_model(data: DataConfig, request: EvalRequest) -> Sampled:
    opened = ModelData(_recipe_of(data, request))
    sample = opened.sample("held_out", request.tokens)
    tokenizer = opened.tokenizer
    return Sampled(
        sample.activations,
        {
            "model": data.model,
            "site": opened.site.name,
            "corpus": data.corpus,
            "documents": len(sample.documents),
            "tokens": len(sample.activations),
        },
        lambda token: str(tokenizer.decode([token])),
        opened,
    )


def _from_file(request: EvalRequest) -> Sampled:
    assert request.activations is not None
    source = ArraySource(request.activations, chunk_tokens=request.tokens, seed=request.seed, held_out_frac=0.0)
    activations = next(source.chunks())
    return Sampled(
        activations, {"activations": request.activations, "sha256": source.sha256, "tokens": len(activations)}
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    parts = [Path(p).absolute().parts for p in paths]
    for length in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-2:])} ({i + 1})" for i, p in enumerate(parts)]


def calibrated(sae: SAE, activations: Activations, sink_N: torch.Tensor) -> tuple[SAE, str | None]:
    """The SAE itself, or, where its file holds no inference threshold, a copy with one and a warning that says so."""
    if sae.calibrated:
        return sae, None
    sae = copy.deepcopy(sae)
    first = torch.arange(len(activations)) % 2 == 0
    calibration = calibrate(sae, activations.x_ND[first & ~sink_N.cpu()].float())
    return sae, (
        f"the file holds no inference threshold; for this measurement one was set so that {calibration.l0:.1f} "
        f"features fire per token (its k is {sae.k}) on every second token, sinks left out"
    )
