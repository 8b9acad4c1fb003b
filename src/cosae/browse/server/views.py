"""What a store says, as plain values for the pages: floats with seven digits, tokens spelled, None where there is none.

The server sends them as JSON, the static form writes them into files; both are read by the same scripts.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from cosae.browse.store.reader import FeatureStore
from cosae.browse.store.records import NUMBERS, Example, Feature, Row, SAEComparison, SAEInfo
from cosae.sae.score import SCORES

LONGEST = 200
"""Characters of a token that a page gets; its length is said where there are more."""
PAIRS = 500
"""Pairs and features of a comparison that a page lists."""


def plain(value: Any) -> Any:
    """The value for JSON: floats to seven digits, NaN and infinities as None."""
    if isinstance(value, float | np.floating):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return [plain(one) for one in value.tolist()]
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def about(store: FeatureStore) -> dict[str, Any]:
    """The overview: the pass, norms, SAEs, how they pair, concepts."""
    found = store.overview()
    seen = asdict(found) | {"saes": [_sae(info) for info in found.saes]}
    return dict(plain(seen | {"numbers": NUMBERS}))


def _sae(info: SAEInfo) -> dict[str, Any]:
    row_power = SCORES[info.score].row_power if info.score in SCORES else 0
    return asdict(info) | {"row_power": row_power}


def row(store: FeatureStore, found: Row) -> dict[str, Any]:
    """A row of the table, its tokens spelled."""
    return dict(plain(asdict(found) | {"tokens": texts(store, found.tokens)}))


def texts(store: FeatureStore, ids: Iterable[int]) -> list[str]:
    """The spellings of token ids, long ones cut."""
    spelled = (store.spell(int(one)) for one in ids)
    return [text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)" for text in spelled]


def feature(store: FeatureStore, found: Feature) -> dict[str, Any]:
    """Everything of one feature."""
    shallow = {name: getattr(found, name) for name in _PLAIN_FIELDS}
    lists = {name: [asdict(one) for one in getattr(found, name)] for name in ("by_cosine", "by_cofiring", "matches")}
    for one in (*lists["by_cosine"], *lists["by_cofiring"]):
        one["tokens"] = _top_tokens(store, found.sae, one["id"])
    for one in lists["matches"]:
        one["tokens"] = [] if one["id"] is None else _top_tokens(store, one["sae"], one["id"])
    logits = {name: [(store.spell(token), logit) for token, logit in getattr(found, name)] for name in _LOGITS}
    shown = {
        "row": row(store, found.row),
        "explanation": None if found.explanation is None else asdict(found.explanation),
        "examples": [_example(store, one) for one in found.examples],
    }
    return dict(plain(shallow | lists | logits)) | shown | {"explanation": plain(shown["explanation"])}


_LOGITS = ("promoted", "suppressed")
_PLAIN_FIELDS = (
    "sae", "quantiles", "edges", "counts", "negative", "quartile_share", "vanished", "appeared", "aurocs", "exponent",
    "value_exponent", "log_gain", "bias", "threshold", "decoder_norm", "encoder_norm",
)  # fmt: skip


def _top_tokens(store: FeatureStore, sae: str, id: int) -> list[str]:
    return texts(store, store.row(sae, id).tokens)


def _example(store: FeatureStore, one: Example) -> dict[str, Any]:
    picture = store.picture(one.sequence)
    return {
        "group": one.group,
        "picture": None if picture is None else f"data:image/png;base64,{base64.b64encode(picture).decode()}",
        "at": one.at,
        "text": texts(store, one.ids_W),
        "value": plain(one.value_W),
        "norm": plain(one.r_W),
        "cosine": plain(one.kappa_W),
        "sink": [int(at) for at in np.flatnonzero(one.sink_W)],
        "left_out": [int(at) for at in np.flatnonzero(~one.counted_W)],
        "interval": one.interval,
        "document": one.document,
        "sequence": one.sequence,
        "first": one.position - one.at,
    }


def sae_comparison(store: FeatureStore, found: SAEComparison) -> dict[str, Any]:
    """Two SAEs: the first pairs and features of their own with their tokens, and every concept."""
    shared = [(*one, _top_tokens(store, found.a.name, one[0])) for one in found.shared[:PAIRS]]
    own = {
        side: [(id, _top_tokens(store, name, id)) for id in ids[:PAIRS]]
        for side, name, ids in (("own_a", found.a.name, found.own_a), ("own_b", found.b.name, found.own_b))
    }
    totals = {"n_shared": len(found.shared), "n_own_a": len(found.own_a), "n_own_b": len(found.own_b)}
    named = {"a": found.a.name, "b": found.b.name, "shared": shared, "concepts": found.concepts}
    return dict(plain(named | own | totals))
