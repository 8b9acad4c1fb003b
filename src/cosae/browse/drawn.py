"""A few features of an SAE with their largest examples, from codes that are there already: no model runs.

For a run's report. Features are drawn at random among those that fire often enough to show, so that they say what an
SAE's features are like, and not what its best ones are like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cosae.evaluate.encoded import EncodedPass
from cosae.sae.model import SAE

FEATURES, EXAMPLES = 8, 3
LEAST_FIRINGS = 10
BEFORE, AFTER = 10, 5
"""Tokens around an example's own."""

Around = Callable[[int, int, int, int], tuple[tuple[int, ...], tuple[int, ...]]]
"""Document, index of a token in it, and how many: ids of the tokens before it and after it."""
Spell = Callable[[int], str | None]


def drawn_features(encoded: EncodedPass[SAE], around: Around, spell: Spell, seed: int = 0) -> list[dict[str, Any]]:
    """FEATURES features as plain values, those that fire most first: how often each fires, its largest value, examples.

    Tokens without sinks. Fewer where fewer fire LEAST_FIRINGS times; of a document the largest example only.
    """
    keep_N = encoded.keep["sinks_out"]
    on_E = (encoded.codes.value_E != 0) & keep_N[encoded.codes.token_E]
    token_E, feature_E = encoded.codes.token_E[on_E].numpy(), encoded.codes.feature_E[on_E].numpy()
    value_E = encoded.codes.value_E[on_E].double().numpy()
    count_F = np.bincount(feature_E, minlength=encoded.sae.d_sae)
    often_f = np.flatnonzero(count_F >= LEAST_FIRINGS)
    chosen = np.random.default_rng([seed, 16]).permutation(often_f)[:FEATURES]
    activations = encoded.sample.activations
    doc_N, index_N, id_N = (one.cpu().numpy() for one in (activations.doc_N, activations.index_N, activations.token_N))
    found = []
    for feature in sorted(chosen.tolist(), key=lambda one: (-count_F[one], one)):
        mine = np.flatnonzero(feature_E == feature)
        order = mine[np.argsort(-np.abs(value_E[mine]), kind="stable")]
        first = np.sort(np.unique(doc_N[token_E[order]], return_index=True)[1])[:EXAMPLES]
        examples = []
        for entry in order[first].tolist():
            token = token_E[entry]
            ids = around(int(doc_N[token]), int(index_N[token]), BEFORE, AFTER)
            before, after = ("".join(spell(one) or "" for one in part) for part in ids)
            shown = {"before": before, "token": spell(int(id_N[token])), "after": after}
            examples.append({"value": float(value_E[entry]), **shown})
        density = float(count_F[feature] / max(int(keep_N.sum()), 1))
        largest = float(abs(value_E[order[0]]))
        found.append({"feature": feature, "density": density, "largest": largest, "examples": examples})
    return found
