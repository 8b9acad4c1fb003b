"""Synthetic feature stores: everything a page can show, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cosae.browse.store.explained import write_explanations
from cosae.browse.store.format import COUNTED, EXPLANATIONS, GROUP_FEATURES, KAPPA_ONE, REAL, SINK
from cosae.browse.store.records import Explanation, Score
from cosae.browse.store.writer import ExampleWriter, finish, write_features, write_vocabulary
from cosae.io.staged import staged

HOSTILE = ("<script>alert(1)</script>", "\"'&<>", "\u202egnp\u202c", "a\0b", "\n", " ", "x" * 10_000, "\u200f")
"""Tokens 0, 1, 2 … of the vocabulary: what a tokenizer may spell and no page may obey."""
CONCEPTS = (("number", "a number"), ("comma", "a comma"), ("keyword_def", "the keyword def"))
MODEL = "stand-in/judge"


def write_store(
    folder: Path,
    n_features: int = 64,
    saes: Sequence[str] = ("standard", "cosine"),
    *,
    window: int = 24,
    words: int = 300,
    top: int = 8,
    labels: bool = True,
    signed: bool = False,
    explained: int = 4,
    seed: int = 0,
    sha256: str = "0" * 64,
) -> Path:
    """A store of `saes`, of n_features each; feature 0 of each is dead, feature i of one matches feature i of the next
    but for every third. Features 1 … `explained` have explanations, the first of them hostile."""
    rng = np.random.default_rng(seed)
    vocabulary = dict(enumerate((*HOSTILE, *(f" word{i}" for i in range(words)))))
    with staged(folder) as place:
        described = []
        for number, name in enumerate(saes):
            columns = _features(rng, n_features, len(saes) - 1, len(vocabulary), labels, signed)
            write_features(place / f"sae{number}", columns)
            with ExampleWriter(place / f"sae{number}") as examples:
                for first in range(0, n_features, GROUP_FEATURES):
                    examples.add(_examples(rng, columns, first, window, top, len(vocabulary), signed))
            told = {i: _explanation(i) for i in range(1, min(explained, n_features - 1) + 1)}
            write_explanations(place / f"sae{number}" / EXPLANATIONS, told)
            described.append(_describe(name, number, columns, signed) | {"sha256": sha256})
        write_vocabulary(place, vocabulary)
        finish(place, _record(described, n_features, window, labels, seed))
    return folder


def _features(rng: Any, n: int, others: int, vocabulary: int, labels: bool, signed: bool) -> dict[str, np.ndarray]:
    firings = np.maximum(1, (10 ** rng.uniform(0, 4, n)).astype(np.int64))
    firings[0] = 0
    alive = firings > 0
    largest = np.where(alive, rng.uniform(1, 20, n), np.nan)
    quantiles = np.sort(rng.uniform(0.05, 1, (n, 5)), 1) * largest[:, None]
    quartiles = (rng.dirichlet(np.ones(4), n) * firings[:, None]).astype(np.int64)
    quartiles[:, 3] = firings - quartiles[:, :3].sum(1)
    histogram = np.zeros((n, 64), np.int64)
    histogram[alive, 63] = firings[alive]
    match = np.repeat(np.where((np.arange(n) % 3 == 0), -1, np.arange(n))[:, None], others, 1)
    found = {
        "firings": firings,
        "pair_firings": firings,
        "largest": largest,
        "mean": largest / 3,
        "norm_driven": np.where(alive, rng.uniform(0, 1, n), np.nan),
        "firing_norm": np.where(alive, rng.uniform(0.5, 2, n), np.nan),
        "vanished": firings // 5,
        "appeared": firings // 7,
        "negatives": firings // 2 if signed else np.zeros(n, np.int64),
        "quantiles": quantiles,
        "quartiles": quartiles,
        "histogram": histogram,
        "histogram_top": np.floor(16 * np.log2(np.where(alive, largest, 1))).astype(np.int64),
        "exponent": np.full(n, 0.5),
        "value_exponent": np.full(n, 0.25),
        "log_gain": np.zeros(n),
        "bias": np.full(n, np.nan),
        "threshold": np.full(n, 0.3),
        "decoder_norm": np.ones(n),
        "encoder_norm": rng.uniform(0.5, 2, n),
        "top_tokens": np.where(alive[:, None], rng.integers(0, vocabulary, (n, 6)), -1),
        "promoted_id": rng.integers(0, vocabulary, (n, 10)),
        "promoted_value": -np.sort(-rng.normal(2, 1, (n, 10)), 1),
        "suppressed_id": rng.integers(0, vocabulary, (n, 10)),
        "suppressed_value": np.sort(rng.normal(-2, 1, (n, 10)), 1),
        "code_first": np.zeros(n, np.int64),
        "code_count": np.zeros(n, np.int64),
        "match_id": match,
        "match_correlation": np.where(match >= 0, rng.uniform(0.5, 1, match.shape), np.nan),
        "match_cosine": np.where(match >= 0, rng.uniform(0.5, 1, match.shape), np.nan),
    }
    for kind in ("by_cosine", "by_cofiring"):
        ids = (np.arange(n)[:, None] + np.arange(1, 9)) % n
        found |= {f"{kind}_id": ids, f"{kind}_cosine": -np.sort(-rng.uniform(-1, 1, ids.shape), 1)}
        found[f"{kind}_jaccard"] = np.where(rng.uniform(size=ids.shape) < 0.5, rng.uniform(0, 1, ids.shape), np.nan)
    if labels:
        found["aurocs"] = np.where(alive[:, None], rng.uniform(0.3, 1, (n, len(CONCEPTS))), 0.5).astype(np.float32)
        found["best_auroc"], found["best_concept"] = found["aurocs"].max(1), found["aurocs"].argmax(1)
    return found


def _examples(
    rng: Any, columns: dict[str, np.ndarray], first: int, window: int, top: int, vocabulary: int, signed: bool
) -> dict[str, np.ndarray]:
    stop = min(first + GROUP_FEATURES, len(columns["firings"]))
    plan = [(0, -1)] * top + [(1, i) for i in (4, 3, 2, 1, 0) for _ in range(3)] + [(2, -1)] * 5
    plan += [(3, -1)] * 4 if signed else []
    alive = [f for f in range(first, stop) if columns["firings"][f]]
    n = len(alive) * len(plan)
    feature = np.repeat(np.array(alive, dtype=np.int64), len(plan))
    group, interval = (np.tile(np.array([one[i] for one in plan], dtype=np.int8), len(alive)) for i in (0, 1))
    largest = columns["largest"][feature]
    at = rng.integers(0, window, n)
    part = np.where(group == 0, np.tile(np.linspace(1, 0.8, len(plan)), len(alive)), rng.uniform(0.05, 1, n))
    part = np.where(group == 1, (interval + 0.5) / 5, part) * np.where(group == 3, -1, 1)
    value = np.where(rng.uniform(size=(n, window)) < 0.15, rng.uniform(0, 0.7, (n, window)), 0) * largest[:, None]
    value[np.arange(n), at] = part * largest
    flags = np.full((n, window), REAL | COUNTED, np.uint8)
    sequence = rng.integers(0, 50, n)
    flags[sequence % 5 == 0, 0] = REAL | SINK
    ids = rng.integers(0, vocabulary, (n, window)).astype(np.int32)
    tokens = columns["top_tokens"][feature]
    ids[np.arange(n), at] = tokens[np.arange(n), np.arange(n) % 6]
    return {
        "feature": feature,
        "group": group,
        "interval": interval,
        "at": at.astype(np.int16),
        "sequence": sequence,
        "position": (at + sequence % 7).astype(np.int32),
        "document": np.array([f"<b>doc {i % 9}</b>" for i in sequence], dtype=object).reshape(n),
        "ids": ids,
        "value": value.astype(np.float32),
        "r": rng.lognormal(3, 0.4, (n, window)).astype(np.float32),
        "kappa": (rng.uniform(-0.3, 1, (n, window)) * KAPPA_ONE).astype(np.int16),
        "flags": flags,
    }


def _describe(name: str, number: int, columns: dict[str, np.ndarray], signed: bool) -> dict[str, Any]:
    return {
        "name": name,
        "folder": f"sae{number}",
        "path": None,
        "d_in": 16,
        "d_sae": len(columns["firings"]),
        "score": "cosine" if number else "inner",
        "selector": "abs_topk" if signed else "batch_topk",
        "frame": "raw",
        "k": 8,
        "signed": signed,
        "exponent": 0.5,
        "tokens": 20_000,
        "l0": float(columns["firings"].sum() / 20_000),
        "dead": int((columns["firings"] == 0).sum()),
        "median_r": 20.0,
        "norm_driven": 0.2,
        "quartile_share": [0.1, 0.2, 0.3, 0.4],
        "quartile_null": [0.25, 0.25, 0.25, 0.25],
        "logits": True,
        "evaluation": {"fve": 0.8, "l0": 8.0},
        "explained": 0,
    }


def _record(saes: list[dict[str, Any]], n: int, window: int, labels: bool, seed: int) -> dict[str, Any]:
    pairs = n - -(-n // 3)
    counts = [1, 20, 2000, 15_000, 2900, 79]
    return {
        "read": {
            "model": "<i>model</i>/tiny",
            "site": "resid_post.1",
            "corpus": "made up",
            "tokens": 20_500,
            "left_out": 500,
            "sequences": 50,
            "documents": 9,
            "context": 64,
            "window": window,
            "seed": seed,
            "written_at": "2026-01-01T00:00:00+00:00",
            "commit": None,
        },
        "norms": {
            "tokens": 8192,
            "median": 20.0,
            "factor": 10.0,
            "quantiles": [1.0, 5.0, 9.0, 15.0, 20.0, 26.0, 40.0, 60.0, 900.0],
            "cuts": [15.0, 20.0, 26.0],
            "sinks": 79,
            "edges": np.linspace(0, 3, 7).tolist(),
            "counts": counts,
            "sink_counts": [0, 0, 0, 0, 0, 79],
        },
        "saes": saes,
        "pairings": [
            {"a": a["name"], "b": b["name"], "alive_a": n - 1, "alive_b": n - 1, "pairs": pairs, "shared": pairs // 2}
            for i, a in enumerate(saes)
            for b in saes[i + 1 :]
        ],
        "concepts": [list(one) for one in CONCEPTS] if labels else [],
        "labelled": 5000 if labels else 0,
        "pair_tokens": 19_000,
    }


def _explanation(i: int) -> Explanation:
    score = Score(0.5 + 0.05 * (i % 8), 0.4, 0.98, 20, i % 3)
    text = "<img src=x onerror=alert(1)>" if i == 1 else f"words that begin with {i}"
    return Explanation(text, MODEL, score, score if i % 2 else None, {"shuffled": Score(0.5, 0.3, 0.7, 20, 0)})
