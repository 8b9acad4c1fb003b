"""Where a gain in probing comes from: features that only one SAE has, or shared ones that are sharper (paper §6)?

Every question of every labelled set is a concept. A feature's quality is its held-out AUROC, turned the way its
training texts say; it is chosen on training texts, by the paper's protocol (every token pooled, the largest raw mean
difference) or with position 0 left out and by AUROC. Shared: the pairs of `measured._sharing`, on held-out tokens of
Wikipedia. The yardstick is the standard SAE of another seed. `cosae.evaluate.matching.discovery` does the sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.activations.sinks import FACTOR, sink_mask
from cosae.evaluate.encoded import encode_all
from cosae.evaluate.matching.discovery import discovery_separability
from cosae.evaluate.matching.match import Pairs
from cosae.evaluate.probing.pooling import pool
from cosae.evaluate.probing.ranking import Rule, auroc_of_latents, qualities_of_latents
from cosae.sae.model import SAE
from cosae.types import Codes
from studies.real_model import texts
from studies.real_model.design import labelled_sets

WAYS: dict[str, tuple[str, Rule]] = {"paper": ("in", "mean_difference"), "masked_auroc": ("out", "auroc")}
Quality = NDArray[np.float64]
Qualities = Mapping[str, tuple[Quality, Quality]]
"""Way → (features, questions) on training and on test texts."""


def decompose(saes: Mapping[str, SAE], pairs: Mapping[tuple[str, str], Pairs], block: int, median: float) -> Any:
    """Gaps of the second SAE over the first, for every pair and way; per question, to be averaged over seeds."""
    known = {name: _qualities(sae, block, median) for name, sae in saes.items()}
    found: dict[str, Any] = {}
    for (a, b), shared in pairs.items():
        for way in WAYS:
            one = discovery_separability(*known[a][way], *known[b][way], shared, n_resamples=200)
            keep = {key: one[key] for key in ("concepts", "matched", "gap_random")}
            scores = {name: np.asarray(score_C).round(5).tolist() for name, score_C in one["per_concept"].items()}
            found.setdefault(f"{a} / {b}", {})[way] = {**keep, **scores}
    return found


def _qualities(sae: SAE, block: int, median: float) -> Qualities:
    columns: dict[str, list[tuple[Quality, Quality]]] = {way: [] for way in WAYS}
    for one in labelled_sets():
        at = texts.read(one, block)
        sink_N = sink_mask(at.activations, median, FACTOR).numpy()
        codes, n_texts = encode_all(sae, at.activations), int(at.text_N.max()) + 1
        for way, (pooling, rule) in WAYS.items():
            keep_N = np.ones_like(sink_N) if pooling == "in" else ~sink_N
            pooled = pool(codes, at.text_N, n_texts, keep_N, "mean")
            columns[way] += [_of_question(pooled, split, rule) for split in at.splits.values()]
    return {way: _stacked(one) for way, one in columns.items()}


def _stacked(columns: list[tuple[Quality, Quality]]) -> tuple[Quality, Quality]:
    train, held = zip(*columns, strict=True)
    return np.stack(train, 1), np.stack(held, 1)


def _of_question(codes: Codes, split: Any, rule: Rule) -> tuple[Quality, Quality]:
    """(F,) what the rule chooses by, 0.5 and more, and the held-out AUROC turned the same way."""
    train_F = qualities_of_latents(_rows(codes, split.train_R), split.train_label[:, None], (rule,))[rule][:, 0]
    held_F = auroc_of_latents(_rows(codes, split.test_R), split.test_label[:, None])[:, 0]
    from_chance_F = train_F - 0.5 if rule == "auroc" else train_F
    return 0.5 + np.abs(from_chance_F), 0.5 + np.sign(from_chance_F) * (held_F - 0.5)


def _rows(codes: Codes, row_R: NDArray[np.int64]) -> Codes:
    keep_N = np.zeros(codes.n_tokens, dtype=bool)
    keep_N[row_R] = True
    return codes.take(keep_N)
