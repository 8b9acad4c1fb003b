"""Discovery versus separability on the exact token-level concepts of the embedded corpus, with a same-score yardstick.

SAEs of two arms → AUROC of every feature for every concept, training and held-out files → the gap of B over A on
all features and on shared ones, by evaluate.discovery; the same for A and another seed of A, where there is one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cosae.activations.sinks import sink_mask
from cosae.errors import CosaeError
from cosae.evaluate.encoding import encode_all
from cosae.evaluate.matching import match as matching
from cosae.evaluate.matching.discovery import discovery_separability
from cosae.evaluate.matching.similarity import Similarity
from cosae.evaluate.probing.ranking import auroc_of_latents
from cosae.run.dataset.dataset import Data, Sample
from cosae.sae.model import SAE

Qualities = tuple[NDArray[np.float64], NDArray[np.float64]]


def measure_discovery(
    arms: Mapping[str, Sequence[SAE]], data: Data | None, n_tokens: int, median: float, sink_factor: float, seed: int
) -> dict[str, Any]:
    """The gap of the second arm over the first, decomposed: A's first SAE against every SAE of B.

    arms  two, of calibrated SAEs of one site; further SAEs of the first are other seeds of it, the yardstick
    data  where the concepts are known: features are chosen on its training files and scored on held-out ones, on
          tokens that are no sinks (at least sink_factor × median long, position 0, special ids)

    Returns {"a", "b", "concepts", "by": {"correlation" | "cosine": {"pairs": […], "yardsticks": […]}}}, each an
    answer of `discovery_separability` with the matching's numbers. Raises CosaeError for another number of arms, a
    corpus without known concepts, no concept frequent enough, and two SAEs that share no feature.
    """
    names = list(arms)
    if len(names) != 2:
        raise CosaeError(
            "discovery takes two arms, the first with another seed of it as the yardstick: cosae eval discovery "
            f"A=run0/arms/standard,run1/arms/standard B=run1/arms/cosine. Got {len(names)} instead."
        )
    if data is None or not data.has_concepts:
        raise CosaeError(
            "discovery needs token-level concepts, which are known for the corpus pylib alone: drop --corpus."
        )
    sides = [_without_sinks(data.sample(split, n_tokens), median, sink_factor) for split in ("train", "held_out")]
    least = min(200, max(10, n_tokens // 500))
    often_C = np.all([(s.labels_NC.sum(0) >= least) & ((~s.labels_NC).sum(0) >= least) for s in sides], axis=0)
    if not often_C.any():
        raise CosaeError(
            f"no concept has {least} tokens with it and {least} without, on both sides: ask for more --tokens."
        )
    (first, *others), listed = (arms[name] for name in names)
    qualities = {id(sae): _qualities(sae, sides, often_C) for sae in (first, *others, *listed)}
    found: dict[str, Any] = {"a": names[0], "b": names[1], "concepts": int(often_C.sum()), "by": {}}
    for by in ("correlation", "cosine"):
        found["by"][by] = {
            kind: [_decompose(first, sae, sides[1], qualities, by, seed) for sae in saes]
            for kind, saes in (("pairs", listed), ("yardsticks", others))
        }
    return found


def _without_sinks(sample: Sample, median: float, factor: float) -> Sample:
    keep_N = sample.labelled_N & ~sink_mask(sample.activations, median, factor).cpu().numpy()
    kept = sample.activations[torch.from_numpy(keep_N)]
    return replace(sample, activations=kept, labels_NC=sample.labels_NC[keep_N], labelled_N=sample.labelled_N[keep_N])


def _qualities(sae: SAE, sides: Sequence[Sample], often_C: NDArray[np.bool_]) -> Qualities:
    train_FC, held_FC = (auroc_of_latents(encode_all(sae, one.activations), one.labels_NC[:, often_C]) for one in sides)
    return train_FC, held_FC


def _decompose(
    a: SAE, b: SAE, held_out: Sample, qualities: Mapping[int, Qualities], by: Similarity, seed: int
) -> dict[str, Any]:
    method: matching.Method = "hungarian" if max(a.d_sae, b.d_sae) <= matching.HUNGARIAN_MAX else "mutual"
    found = matching.match_saes(a, b, held_out.activations, by=by, method=method)
    gap = discovery_separability(*qualities[id(a)], *qualities[id(b)], found.pairs.shared(), seed=seed)
    gap["per_concept"] = {name: score_C.tolist() for name, score_C in gap["per_concept"].items()}
    return {**gap, "method": method, "matching": found.numbers()}
