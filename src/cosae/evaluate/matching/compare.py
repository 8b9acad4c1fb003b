"""Two arms, feature by feature: which features both have, and where a gap in probing comes from.

Further SAEs of the first arm, other seeds of it, show what two SAEs of one kind share: the second arm is held against
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cosae.errors import CosaeError
from cosae.evaluate.context import SIDES, Context
from cosae.evaluate.matching import match as matching
from cosae.evaluate.matching.discovery import discovery_separability
from cosae.evaluate.matching.similarity import SIMILARITIES, Similarity
from cosae.evaluate.probing.ranking import auroc_of_latents
from cosae.sae.model import SAE

Qualities = tuple[NDArray[np.float64], NDArray[np.float64]]


def compare_features(context: Context) -> dict[str, Any]:
    """The share of A's features that B has, by every way of pairing, beside what another seed of A has of them."""
    names = _two(context, "matching")
    (first, *others), (second, *_) = ([context.encoded(sae) for sae in context.arms[name]] for name in names)
    found: dict[str, Any] = {"a": names[0], "b": names[1]}
    for by in SIMILARITIES:
        for method in ("hungarian", "mutual"):
            if method == "hungarian" and max(first.sae.d_sae, second.sae.d_sae) > matching.HUNGARIAN_MAX:
                continue
            one = matching.match_saes(first, second, by=by, method=method)
            found[f"{by}/{method}"] = {"pair": one.numbers()}
            if others:
                floors = [matching.match_saes(first, other, by=by, method=method) for other in others]
                found[f"{by}/{method}"] |= {
                    "yardsticks": [floor.numbers() for floor in floors],
                    "against_yardstick": matching.against_yardstick(one, floors, context.seed),
                }
    return found


def compare_discovery(context: Context) -> dict[str, Any]:
    """The gap in probing of B over A on all features and on shared ones: A's first SAE against every SAE of B.

    Features are chosen on training files and scored on held-out ones, sinks out. Returns {"a", "b", "concepts", "by":
    {"correlation" | "cosine": {"pairs": […], "yardsticks": […]}}}, each an answer of `discovery_separability` with the
    matching's numbers; for two SAEs that share no feature {"none": why} and the matching's numbers. Raises CosaeError
    for another number of arms, a corpus without known concepts, and no concept frequent enough.
    """
    names = _two(context, "discovery")
    if not context.data.has_concepts:
        raise CosaeError(
            "discovery needs token-level concepts, which are known for the corpus pylib alone: give --corpus pylib."
        )
    samples = [context.sample(side) for side in SIDES]
    keep = [sample.labelled_N & sample.keep("sinks_out").numpy() for sample in samples]
    labels = [sample.labels_NC[kept_N] for sample, kept_N in zip(samples, keep, strict=True)]
    least = context.least_positives
    often_C = np.all([(one.sum(0) >= least) & ((~one).sum(0) >= least) for one in labels], axis=0)
    if not often_C.any():
        raise CosaeError(
            f"no concept has {least} tokens with it and {least} without, on both sides: ask for more --tokens."
        )

    def qualities(sae: SAE) -> Qualities:
        train_FC, held_FC = (
            auroc_of_latents(context.encoded(sae, side).codes.take(kept_N), label_NC[:, often_C])
            for side, kept_N, label_NC in zip(SIDES, keep, labels, strict=True)
        )
        return train_FC, held_FC

    (first, *others), listed = (context.arms[name] for name in names)
    known = {id(sae): qualities(sae) for sae in (first, *others, *listed)}
    found: dict[str, Any] = {"a": names[0], "b": names[1], "concepts": int(often_C.sum()), "by": {}}
    for by in SIMILARITIES:
        found["by"][by] = {
            kind: [_decompose(context, first, sae, known, by) for sae in saes]
            for kind, saes in (("pairs", listed), ("yardsticks", others))
        }
    return found


def _two(context: Context, measurement: str) -> list[str]:
    names = list(context.arms)
    if len(names) != 2:
        raise CosaeError(
            f"{measurement} takes two arms, the first with another seed of it to hold the second against: cosae eval "
            f"{measurement} A=run0/arms/standard,run1/arms/standard B=run0/arms/cosine. Got {len(names)} instead."
        )
    return names


def _decompose(context: Context, a: SAE, b: SAE, known: Mapping[int, Qualities], by: Similarity) -> dict[str, Any]:
    method: matching.Method = "hungarian" if max(a.d_sae, b.d_sae) <= matching.HUNGARIAN_MAX else "mutual"
    labelled_N = torch.from_numpy(context.sample().labelled_N)
    found = matching.match_saes(context.encoded(a), context.encoded(b), keep_N=labelled_N, by=by, method=method)
    if not len(found.pairs.shared()):
        what = "these two SAEs share no feature by this measure: a gap on shared ones is not defined"
        return {"none": what, "method": method, "matching": found.numbers()}
    gap = discovery_separability(*known[id(a)], *known[id(b)], found.pairs.shared(), seed=context.seed)
    gap["per_concept"] = {name: score_C.tolist() for name, score_C in gap["per_concept"].items()}
    return {**gap, "method": method, "matching": found.numbers()}
