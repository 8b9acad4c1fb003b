"""What the claims read beside a run's own evaluation: measured once from its saved SAEs, kept beside them.

    python -m studies.measured natural injected ...      (no name: all sets that are trained)

For every arm: the counterfactual norm test, firings by norm quartile, concepts by three selection rules with sinks in
and out, the standard SAE read without its norm; for the set's first seed the features shared between arms and, as the
yardstick, between seeds of one arm; what a shift of the norms at deployment does; score swaps. extra.json in the run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cosae
from cosae.activations import perturbation as perturbations
from cosae.activations.filter import Filter
from cosae.activations.perturbation import Perturbation
from cosae.activations.sinks import sink_mask
from cosae.evaluate.encoding import encode_all
from cosae.evaluate.matching import match
from cosae.evaluate.norms.driven import firing_norms, norm_driven
from cosae.evaluate.norms.read_time import remove_norm
from cosae.evaluate.probing.ranking import EVERY_RULE, latent_columns, rank_quality, select
from cosae.evaluate.reconstruct import Autoencoder
from cosae.evaluate.reconstruction import measure
from cosae.io.values import from_plain
from cosae.recipe import Recipe
from cosae.run.dataset.dataset import ModelData, Sample
from cosae.run.folder import read_json, write_json
from cosae.sae.model import SAE
from cosae.sae.swap import swap_score
from cosae.text.concepts.labels import CONCEPTS
from cosae.types import Activations
from studies.runsets import RUNSETS, SEEDS, finished, folder_of

EXTRA = "extra.json"
NORM_TOKENS = 8_192
"""Tokens of the counterfactual test, which looks at every score of every token."""
SHIFTS = (0.25, 0.5, 1.0)
"""Log-normal σ of the norms met at deployment only."""
READ_TIME = "standard, read without its norm"
MATCHED = ("standard", "standard_unit_frame", "cosine", "cosine_fast")
SHIFTED = (
    "standard",
    "standard_unit_frame",
    "standard_noise",
    "cosine",
    "cosine_fast",
    "cosine_per_feature",
    "cosine_noise",
)
ARMS = SHIFTED
"""The arms that claims ask about; other arms of a run have its own evaluation only."""
SWAPS = (("standard", "cosine"), ("cosine", "inner"))


class Samples:
    """Held-out and training samples of one data configuration, captured once for all seeds and sets that share it."""

    def __init__(self) -> None:
        self._opened: dict[str, ModelData] = {}

    def of(self, recipe: Recipe, split: str) -> Sample:
        """The sample of a split with the recipe's perturbation on it."""
        key = json.dumps([repr(recipe.data), recipe.training.seed, repr(recipe.evaluation)])
        if key not in self._opened:
            self._opened.clear()  # one at a time: a sample is a few hundred MB
            few = recipe.changed({"training.steps": 1, "training.batch_tokens": 1, "training.buffer_tokens": 2})
            self._opened[key] = ModelData(few.changed({"filter.window_tokens": 1}))
        opened = self._opened[key]
        opened._recipe = replace(opened._recipe, perturbation=recipe.perturbation)
        tokens = recipe.evaluation.probe_tokens if split == "train" else recipe.evaluation.held_out_tokens
        return opened.sample(split, tokens)  # type: ignore[arg-type]


def saes_of(folder: Path) -> dict[str, SAE]:
    """The trained SAEs of a run, in the order of its arms."""
    arms = read_json(folder / "run.json")["arms"]
    return {name: cosae.load(folder / "arms" / name) for name in arms}


def sinks_of(activations: Activations, fitted: Filter) -> torch.Tensor:
    """(N,) bool: the tokens the run's evaluation calls sinks."""
    return sink_mask(activations, fitted.median_norm, fitted.policy.factor)


class Probe:
    """Concepts of a train and a held-out sample, ready for any codes."""

    def __init__(self, train: Sample, held_out: Sample, fitted: Filter, sinks_in: bool) -> None:
        self.sides = (train, held_out)
        self.keep = []
        for sample in self.sides:
            keep_N = np.asarray(sample.labelled_N).copy()
            if not sinks_in:
                keep_N &= ~sinks_of(sample.activations, fitted).numpy()
            self.keep.append(keep_N)
        counts = [s.labels_NC[k].sum(axis=0) for s, k in zip(self.sides, self.keep, strict=True)]
        enough_C = np.minimum(*counts) >= 200
        contextual_C = np.array([concept.group == "contextual" for concept in CONCEPTS])
        self.concept_c = np.flatnonzero(enough_C & contextual_C)
        self.label_c = [s.labels_NC[k][:, self.concept_c] for s, k in zip(self.sides, self.keep, strict=True)]

    def __call__(self, codes: tuple[cosae.Codes, cosae.Codes]) -> dict[str, dict[str, float]]:
        """Held-out AUROC of the single latent chosen by each rule, by concept name."""
        train, held_out = (c.take(k) for c, k in zip(codes, self.keep, strict=True))
        found = {}
        for rule in EVERY_RULE:
            chosen = select(train, self.label_c[0], rule)
            score = latent_columns(held_out, chosen.latent_C) * chosen.sign_C
            auroc_c = rank_quality(score, self.label_c[1])[0]
            found[rule] = {CONCEPTS[c].name: float(a) for c, a in zip(self.concept_c, auroc_c, strict=True)}
        return found


@torch.no_grad()
def measure_run(name: str, seed: int, samples: Samples) -> dict[str, Any]:
    """Everything extra about one run; reads its SAEs, changes none."""
    folder = folder_of(name, seed)
    recipe = Recipe.read(folder / "recipe.json")
    fitted = from_plain(Filter, read_json(folder / "run.json")["filter"], "the filter")
    saes = {arm: sae for arm, sae in saes_of(folder).items() if arm in ARMS}
    held_out, train = samples.of(recipe, "held_out"), samples.of(recipe, "train")
    sink_N = sinks_of(held_out.activations, fitted)
    found: dict[str, Any] = {"arms": {arm: {} for arm in saes}}
    readers: dict[str, Autoencoder] = dict(saes)
    calm = train.activations[~sinks_of(train.activations, fitted)][:16_384]
    readers[READ_TIME] = remove_norm(saes["standard"], calm, keep_firings=False)
    codes = {arm: (encode_all(r, train.activations), encode_all(r, held_out.activations)) for arm, r in readers.items()}
    wanted = {"natural": {"sinks_out": False}, "sinks": {"sinks_out": False, "sinks_in": True}}.get(name, {})
    for which, sinks_in in wanted.items():
        probe = Probe(train, held_out, fitted, sinks_in)
        found[f"probing_{which}"] = {arm: probe(both) for arm, both in codes.items()}
    few = held_out.activations[:NORM_TOKENS]
    for arm, sae in saes.items():
        test = norm_driven(sae, few, sink_N[:NORM_TOKENS], seed=seed, n_resamples=500)
        norms = firing_norms(sae, held_out.activations, sink_N)
        for which in ("sinks_in", "sinks_out"):
            test[which] = {k: v for k, v in (test[which] or {}).items() if k != "per_feature"}
            norms[which] = {k: v for k, v in (norms[which] or {}).items() if k != "per_feature"}
        found["arms"][arm] = {"norm_driven": test, "firing_norms": norms}
    if name == "natural":
        found["shift"] = _shifts(saes, readers[READ_TIME], held_out, train, fitted, codes)
        found["matching"] = _matchings(
            name, seed, {arm: both[1] for arm, both in codes.items()}, saes, ~sink_N, held_out
        )
    if name in ("natural", "injected"):
        found["swap"] = _swaps(saes, held_out, train, fitted, sink_N, codes)
    return found


def _shifts(
    saes: Mapping[str, SAE],
    reader: Autoencoder,
    held_out: Sample,
    train: Sample,
    fitted: Filter,
    codes: Mapping[str, tuple[cosae.Codes, cosae.Codes]],
) -> dict[str, Any]:
    """Norms that vary at deployment only: thresholds and probing latents were chosen without it."""
    tested: dict[str, Autoencoder] = {arm: saes[arm] for arm in SHIFTED}
    tested[READ_TIME] = reader
    found: dict[str, Any] = {}
    for sigma in SHIFTS:
        shifted = perturbations.apply(
            held_out.activations, Perturbation(kind="log_normal", sigma=sigma, seed=1), 0, "held_out"
        )
        probe = Probe(train, replace(held_out, activations=shifted), fitted, sinks_in=True)
        row = {}
        for arm, sae in tested.items():
            numbers = measure(sae, shifted)
            aurocs = probe((codes[arm][0], encode_all(sae, shifted)))["auroc"]
            keys = ("fve", "median_token_fve", "l0")
            row[arm] = {**{key: numbers[key] for key in keys}, "auroc": float(np.mean(list(aurocs.values())))}
        found[str(sigma)] = row
    return found


def _matchings(
    name: str,
    seed: int,
    held_out_codes: Mapping[str, cosae.Codes],
    saes: Mapping[str, SAE],
    keep_N: torch.Tensor,
    held_out: Sample,
) -> dict[str, Any]:
    """Shared features of each pair of arms, and of each arm with itself trained from another seed."""
    rows = keep_N.numpy()
    kept = {arm: held_out_codes[arm].take(rows) for arm in MATCHED}
    found = {}
    for i, first in enumerate(MATCHED):
        for second in MATCHED[i + 1 :]:
            pair = match(kept[first], kept[second], saes[first].W_dec, saes[second].W_dec)
            found[f"{first} / {second}"] = pair.numbers()
    other_seed = SEEDS[(SEEDS.index(seed) + 1) % len(SEEDS)]
    if finished(folder_of(name, other_seed)):
        others = saes_of(folder_of(name, other_seed))
        for arm in MATCHED:
            theirs = encode_all(others[arm], held_out.activations).take(rows)
            found[f"{arm} / other seed"] = match(kept[arm], theirs, saes[arm].W_dec, others[arm].W_dec).numbers()
    return found


def _swaps(
    saes: Mapping[str, SAE],
    held_out: Sample,
    train: Sample,
    fitted: Filter,
    sink_N: torch.Tensor,
    codes: Mapping[str, tuple[cosae.Codes, cosae.Codes]],
) -> dict[str, Any]:
    """Each score read by the other: as the paper did (nothing refitted) and refitted to L0 and size."""
    kept = train.activations.x_ND[fitted.keep(train.activations)][:32_768].float()
    probe = Probe(train, held_out, fitted, sinks_in=False)
    calm = held_out.activations[~sink_N]
    found = {}
    for arm, score in SWAPS:
        readings: dict[str, SAE] = {
            "own score": saes[arm],
            "swapped, nothing refitted": swap_score(saes[arm], score, refit=False),
            "swapped, refitted": swap_score(saes[arm], score, sample=kept),
        }
        row = {}
        for reading, sae in readings.items():
            numbers = measure(sae, calm)
            both = (encode_all(sae, train.activations), encode_all(sae, held_out.activations))
            aurocs = probe(both)
            keys = ("fve", "median_token_fve", "l0", "dead_frac")
            row[reading] = {
                **{key: numbers[key] for key in keys},
                **{rule: float(np.mean(list(values.values()))) for rule, values in aurocs.items()},
            }
        found[f"{arm} → {score}"] = row
    return found


def extra(name: str, seed: int, samples: Samples | None = None) -> dict[str, Any]:
    """extra.json of one run, measured where it is not there yet."""
    path = folder_of(name, seed) / EXTRA
    if not path.exists():
        print(f"measuring {name}, seed {seed}", file=sys.stderr, flush=True)
        write_json(path, measure_run(name, seed, samples or Samples()))
    return read_json(path)


if __name__ == "__main__":
    shared = Samples()
    for asked in sys.argv[1:] or [n for n in RUNSETS if not n.startswith("world")]:
        for one in SEEDS:
            if finished(folder_of(asked, one)):
                extra(asked, one, shared)
