"""What the claims read beside a run's own evaluation: measured once from its saved SAEs, kept beside them.

    python -m studies.measured natural injected ...      (no name: all sets that are trained)

For every arm: the counterfactual norm test, firings by norm quartile, concepts by three selection rules with sinks in
and out, the standard SAE read without its norm; for the set's first seed the features shared between arms and, as the
yardstick, between seeds of one arm; what a shift of the norms at deployment does; score swaps. extra.json in the run.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import cosae
from cosae.activations import perturbation as perturbations
from cosae.activations.filter import Filter
from cosae.activations.perturbation import Perturbation
from cosae.activations.sample import SINKS, Sample, SinkRule
from cosae.evaluate.encoded import Autoencoder, encode_all, encode_sample
from cosae.evaluate.matching.match import match
from cosae.evaluate.norms.counterfactual import at_median
from cosae.evaluate.norms.driven import firing_norms, norm_driven
from cosae.evaluate.norms.read_time import remove_norm
from cosae.evaluate.probing.ranking import EVERY_RULE, columns_of, rank_quality, select
from cosae.evaluate.reconstruction import summarise
from cosae.io.values import from_plain
from cosae.recipe import Recipe
from cosae.run.dataset.base import Dataset, DataUse
from cosae.run.dataset.open import open_dataset
from cosae.run.folder import read_json, write_json
from cosae.sae.model import SAE
from cosae.sae.swap import swap_score
from cosae.text.concepts.table import CONCEPTS
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
        self._opened: dict[str, Dataset] = {}

    def of(self, recipe: Recipe, split: Literal["train", "held_out"], fitted: Filter) -> Sample:
        """The sample of a split with the recipe's perturbation on it, sinks as the run's evaluation tells them."""
        key = json.dumps([repr(recipe.data), recipe.training.seed, repr(recipe.evaluation)])
        if key not in self._opened:
            self._opened.clear()  # one at a time: a sample is a few hundred MB
            self._opened[key] = open_dataset(recipe.data, DataUse.of(recipe))
        data, use = copy.copy(self._opened[key]), DataUse.of(recipe)
        data.use = use
        tokens = recipe.evaluation.probe_tokens if split == "train" else use.held_out_tokens
        return data.sample(split, tokens, SinkRule(fitted.policy.factor, fitted.median_norm))


def saes_of(folder: Path) -> dict[str, SAE]:
    """The trained SAEs of a run, in the order of its arms."""
    arms = read_json(folder / "run.json")["arms"]
    return {name: cosae.load(folder / "arms" / name) for name in arms}


def reconstruction_of(sae: Autoencoder, activations: Activations) -> dict[str, Any]:
    """Reconstruction of all these tokens."""
    return summarise(encode_sample(sae, Sample.of(activations)), "sinks_in")


class Probe:
    """Concepts of a train and a held-out sample, ready for any codes."""

    def __init__(self, train: Sample, held_out: Sample, sinks: str) -> None:
        self.sides = (train, held_out)
        self.keep = [one.labelled_N & one.keep(sinks).numpy() for one in self.sides]
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
            score = columns_of(held_out)[:, chosen.latent_C].toarray() * chosen.sign_C
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
    held_out, train = samples.of(recipe, "held_out", fitted), samples.of(recipe, "train", fitted)
    found: dict[str, Any] = {"arms": {arm: {} for arm in saes}}
    readers: dict[str, Autoencoder] = dict(saes)
    calm = train.activations[~train.sink_N][:16_384]
    readers[READ_TIME] = remove_norm(saes["standard"], calm, keep_firings=False)
    codes = {arm: (encode_all(r, train.activations), encode_all(r, held_out.activations)) for arm, r in readers.items()}
    for sinks in {"natural": ("sinks_out",), "sinks": SINKS}.get(name, ()):
        probe = Probe(train, held_out, sinks)
        found[f"probing_{sinks}"] = {arm: probe(both) for arm, both in codes.items()}
    few = held_out[torch.arange(len(held_out)) < NORM_TOKENS]
    for arm, sae in saes.items():
        encoded = encode_sample(sae, few)
        test = norm_driven(encoded, at_median(encoded), seed=seed, n_resamples=500)
        norms = firing_norms(encode_sample(sae, held_out))
        for sinks in SINKS:
            test[sinks] = {k: v for k, v in (test[sinks] or {}).items() if k != "per_feature"}
            norms[sinks] = {k: v for k, v in (norms[sinks] or {}).items() if k != "per_feature"}
        found["arms"][arm] = {"norm_driven": test, "firing_norms": norms}
    if name == "natural":
        found["shift"] = _shifts(saes, readers[READ_TIME], held_out, train, codes)
        found["matching"] = _matchings(name, seed, {arm: both[1] for arm, both in codes.items()}, saes, held_out)
    if name in ("natural", "injected"):
        found["swap"] = _swaps(saes, held_out, train, fitted, codes)
    return found


def _shifts(
    saes: Mapping[str, SAE],
    reader: Autoencoder,
    held_out: Sample,
    train: Sample,
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
        probe = Probe(train, replace(held_out, activations=shifted), "sinks_in")
        row = {}
        for arm, sae in tested.items():
            numbers = reconstruction_of(sae, shifted)
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
    held_out: Sample,
) -> dict[str, Any]:
    """Shared features of each pair of arms, and of each arm with itself trained from another seed."""
    rows = ~held_out.sink_N
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
    codes: Mapping[str, tuple[cosae.Codes, cosae.Codes]],
) -> dict[str, Any]:
    """Each score read by the other: as the paper did (nothing refitted) and refitted to L0 and size."""
    kept = train.activations.x_ND[fitted.keep(train.activations)][:32_768].float()
    probe = Probe(train, held_out, "sinks_out")
    calm = held_out.activations[~held_out.sink_N]
    found = {}
    for arm, score in SWAPS:
        readings: dict[str, SAE] = {
            "own score": saes[arm],
            "swapped, nothing refitted": swap_score(saes[arm], score, refit=False),
            "swapped, refitted": swap_score(saes[arm], score, sample=kept),
        }
        row = {}
        for reading, sae in readings.items():
            numbers = reconstruction_of(sae, calm)
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
    for asked in sys.argv[1:] or [n for n in RUNSETS if not n.startswith(("world", "real"))]:
        for one in SEEDS:
            if finished(folder_of(asked, one)):
                extra(asked, one, shared)
