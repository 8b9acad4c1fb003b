"""What a pass has found → the files of a store."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cosae.browse.collect import numbers as counts
from cosae.browse.collect.building import NORM_EDGES, Building
from cosae.browse.collect.cofiring import SHOWN
from cosae.browse.collect.examples import choose
from cosae.browse.collect.state import SAEState, joined
from cosae.browse.store.format import (
    BINS_OCTAVE,
    CODE_ROWS,
    CODES,
    GROUP_FEATURES,
    REAL,
    SHOWN_BINS,
    TEXTS,
    write_rows,
)
from cosae.browse.store.pairs import MIN_FIRINGS
from cosae.browse.store.writer import ExampleWriter, finish, write_features, write_vocabulary
from cosae.errors import CosaeError
from cosae.evaluate.probing.ranking import auroc_of_latents
from cosae.io.progress import Progress
from cosae.types import Codes

Array = NDArray[Any]
Columns = dict[str, Array]
LOGITS, TOP_TOKENS, LOGIT_ROWS = 10, 6, 256
LEAST_LABELLED = 10
"""Tokens of the sample with a concept, and without it, that its AUROC needs."""


def write_store(folder: Path, building: Building, progress: Progress) -> None:
    """All files of a store, into a folder that is put in place afterwards."""
    used: set[int] = set()
    described = []
    matches = matched(building)
    for number, state in enumerate(building.states):
        place = folder / f"sae{number}"
        place.mkdir()
        columns = _numbers(state)
        columns |= _of_weights(state)
        columns |= _logits(building, state, progress)
        columns |= _neighbours(building, number)
        columns |= matches[number]
        columns |= _aurocs(building, state)
        columns |= _codes(place, state)
        with progress.phase(f"writing examples: {state.name}", state.sae.d_sae, "features"):
            columns["top_tokens"] = _examples(place, building, number, used, progress)
        for name in ("promoted_id", "suppressed_id"):
            used.update(np.unique(columns.get(name, np.zeros(0, np.int64))).tolist())
        write_features(place, columns)
        described.append(_describe(building, number, columns))
    _texts(folder, building, used)
    spelled = {token: building.source.spell(token) or "" for token in sorted(used) if token >= 0}
    write_vocabulary(folder, spelled)
    finish(folder, _record(building, described, matches))


def _numbers(state: SAEState) -> Columns:
    of, numbers = state.numbers.of, state.numbers
    fired_F = of["firings"].astype(np.float64)
    union_F = fired_F + of["appeared"]
    mean_norm = numbers.norm_sum / max(numbers.tokens, 1)
    histogram = numbers.histogram()
    found: Columns = {name: of[name] for name in ("firings", "pair_firings", "vanished", "appeared", "negatives")}
    found["largest"] = np.where(fired_F > 0, of["largest"].astype(np.float64), np.nan)
    found["mean"] = _over(of["size"], fired_F)
    found["norm_driven"] = _over((of["vanished"] + of["appeared"]).astype(np.float64), union_F)
    found["firing_norm"] = _over(of["norm"], fired_F * mean_norm)
    found["quantiles"], found["quartiles"] = numbers.quantiles(histogram), of["quartiles"]
    merged = counts.BINS_OCTAVE // BINS_OCTAVE
    found["histogram"] = histogram.reshape(numbers.n, SHOWN_BINS, merged).sum(2)
    found["histogram"][:, 0] += of["below"]
    found["histogram_top"] = np.where(fired_F > 0, of["top"], 0)
    return found


def _over(value_F: Array, unit_F: Array) -> Array:
    found: Array = np.divide(value_F, unit_F, out=np.full(len(unit_F), np.nan), where=unit_F > 0)
    return found


def _of_weights(state: SAEState) -> Columns:
    sae, n = state.sae, state.sae.d_sae

    def spread(value: torch.Tensor | None) -> Array:
        if value is None:
            return np.full(n, np.nan)
        return value.detach().double().cpu().expand(n).numpy().copy()

    fixed = sae.cfg.selector in ("topk", "abs_topk")
    return {
        "exponent": spread(sae.scale_a),
        "value_exponent": spread(sae.value_exponent),
        "log_gain": spread(sae.scale_b),
        "bias": spread(sae.b_enc),
        "threshold": spread(None if fixed else sae.threshold),
        "decoder_norm": sae.W_dec.detach().double().norm(dim=1).cpu().numpy(),
        "encoder_norm": sae.score.rows_FD.detach().double().norm(dim=1).cpu().numpy(),
    }


def _logits(building: Building, state: SAEState, progress: Progress) -> Columns:
    """The tokens that each direction raises and lowers most; no columns where that is not known."""
    logits = building.source.logits(state.sae.W_dec.detach())
    if logits is None:
        return {}
    n = state.sae.d_sae
    found: Columns = {}
    with progress.phase(f"logits: {state.name}", n, "features"):
        for first in range(0, n, LOGIT_ROWS):
            logit_FV = logits(slice(first, first + LOGIT_ROWS))
            for name, largest in (("promoted", True), ("suppressed", False)):
                top = logit_FV.topk(min(LOGITS, logit_FV.shape[1]), largest=largest)
                for part, value in (("id", top.indices), ("value", top.values)):
                    column = value.cpu().numpy()
                    found.setdefault(f"{name}_{part}", np.zeros((n, column.shape[1]), column.dtype))
                    found[f"{name}_{part}"][first : first + LOGIT_ROWS] = column
            progress.advance(len(logit_FV))
    return found


def _neighbours(building: Building, number: int) -> Columns:
    """By decoder cosine, and by Jaccard over the pass, both numbers of each."""
    state = building.states[number]
    sums = building.pairs.sums[number, number]
    fired_F, n = state.numbers.of["pair_firings"], state.sae.d_sae
    union_P = fired_F[sums.i_P] + fired_F[sums.j_P] - sums.both_P
    jaccard_P = np.divide(sums.both_P, union_P, out=np.zeros(len(union_P)), where=union_P > 0)
    key_P = sums.i_P * n + sums.j_P  # ascending
    near_id, near_cosine = building.pairs.near[number]
    at = np.minimum(np.searchsorted(key_P, np.arange(n)[:, None] * n + near_id), max(len(key_P) - 1, 0))
    near_jaccard = np.where(near_id >= 0, jaccard_P[at] if len(jaccard_P) else np.nan, np.nan)
    found: Columns = {"by_cosine_id": near_id, "by_cosine_cosine": near_cosine, "by_cosine_jaccard": near_jaccard}
    order = np.lexsort((sums.j_P, -jaccard_P, sums.i_P))
    order = order[jaccard_P[order] > 0]
    rank = np.arange(len(order)) - np.searchsorted(sums.i_P[order], sums.i_P[order])
    order, rank = order[rank < SHOWN], rank[rank < SHOWN]
    unit_FD = torch.nn.functional.normalize(state.sae.W_dec.detach().float().cpu(), dim=1).numpy()
    parts = [order[first : first + 4096] for first in range(0, len(order), 4096)]
    cosine = [(unit_FD[sums.i_P[part]] * unit_FD[sums.j_P[part]]).sum(1) for part in parts]
    columns = {"id": sums.j_P[order], "jaccard": jaccard_P[order], "cosine": np.concatenate([np.zeros(0), *cosine])}
    for name, value in columns.items():
        column = np.full((n, SHOWN), -1, np.int64) if name == "id" else np.full((n, SHOWN), np.nan)
        column[sums.i_P[order], rank] = value
        found[f"by_cofiring_{name}"] = column
    return found


def matched(building: Building) -> list[Columns]:
    """For each SAE (F, others): its mutual best by correlation in each other SAE; −1 and NaN where there is none."""
    states = building.states
    found = [
        {
            "match_id": np.full((one.sae.d_sae, len(states) - 1), -1, np.int64),
            "match_correlation": np.full((one.sae.d_sae, len(states) - 1), np.nan),
            "match_cosine": np.full((one.sae.d_sae, len(states) - 1), np.nan),
        }
        for one in states
    ]
    for (i, j), sums in building.pairs.sums.items():
        if i == j:
            continue
        a, b = states[i], states[j]
        correlation_P = _correlation(a, b, sums.i_P, sums.j_P, sums.product_P, building.pair_tokens)
        best_a, best_b = (_best(feature_P, correlation_P) for feature_P in (sums.i_P, sums.j_P))
        both = np.intersect1d(best_a, best_b)
        unit = [torch.nn.functional.normalize(one.sae.W_dec.detach().double().cpu(), dim=1) for one in (a, b)]
        cosine = (unit[0][sums.i_P[both]] * unit[1][sums.j_P[both]]).sum(1).numpy()
        for own, other, own_P, other_P in ((i, j, sums.i_P, sums.j_P), (j, i, sums.j_P, sums.i_P)):
            column = other - (other > own)
            found[own]["match_id"][own_P[both], column] = other_P[both]
            found[own]["match_correlation"][own_P[both], column] = correlation_P[both]
            found[own]["match_cosine"][own_P[both], column] = cosine
    return found


def _correlation(a: SAEState, b: SAEState, i_P: Array, j_P: Array, product_P: Array, n: int) -> Array:
    """(P,) −inf where one of the two fires on too few tokens, or never varies (cosae.evaluate.matching)."""
    sides = []
    for one, feature_P in ((a, i_P), (b, j_P)):
        of = one.numbers.of
        about_F = np.maximum(of["pair_square"] - of["pair_sum"] ** 2 / max(n, 1), 0.0)
        alive_F = (of["pair_firings"] >= MIN_FIRINGS) & (about_F > 1e-12 * of["pair_square"])
        sides.append((of["pair_sum"][feature_P], about_F[feature_P], alive_F[feature_P]))
    (sum_a, about_a, alive_a), (sum_b, about_b, alive_b) = sides
    size = np.sqrt(about_a * about_b)
    found = np.divide(product_P - sum_a * sum_b / max(n, 1), size, out=np.zeros(len(size)), where=size > 0)
    return np.where(alive_a & alive_b, np.clip(found, -1, 1), -np.inf)


def _best(feature_P: Array, value_P: Array) -> Array:
    """Number of the best pair of each feature, where it has one that counts; the first of equals."""
    order = np.lexsort((np.arange(len(value_P)), -value_P, feature_P))
    first = order[np.append(True, feature_P[order][1:] != feature_P[order][:-1])] if len(order) else order
    best: Array = first[np.isfinite(value_P[first])]
    return best


def _aurocs(building: Building, state: SAEState) -> Columns:
    """(F, C) AUROC of every feature for every concept on the sample; 0.5 for one that never fires there."""
    if building.labels is None:
        return {}
    labels_NC, labelled_N = building.labels
    codes = joined(state.sample, state.sae.d_sae)[labelled_N]
    labels_NC = labels_NC[labelled_N]
    often_C = (labels_NC.sum(0) >= LEAST_LABELLED) & ((~labels_NC).sum(0) >= LEAST_LABELLED)
    found = np.full((state.sae.d_sae, labels_NC.shape[1]), np.nan, np.float32)
    if often_C.any():
        parts = (torch.from_numpy(np.asarray(one)) for one in (codes.indptr, codes.indices, codes.data))
        offset, feature, value = parts
        sample = Codes(offset.long(), feature.long(), value, state.sae.d_sae, (codes.shape[0],))
        found[:, often_C] = auroc_of_latents(sample, np.ascontiguousarray(labels_NC[:, often_C]))
    best = np.where(np.isfinite(found).any(1), np.nan_to_num(found, nan=-1).argmax(1), -1)
    value_F = np.where(best >= 0, np.take_along_axis(found, np.maximum(best, 0)[:, None], 1)[:, 0], np.nan)
    alive_F = state.numbers.of["firings"] > 0
    return {
        "aurocs": found,
        "best_auroc": np.where(alive_F, value_F, np.nan),
        "best_concept": np.where(alive_F, best, -1),
    }


def _codes(place: Path, state: SAEState) -> Columns:
    """Codes of the sample by feature, and where each feature's begin."""
    by_feature = joined(state.sample, state.sae.d_sae).tocsc()
    by_feature.sort_indices()
    columns = {"token": by_feature.indices.astype(np.int32), "value": by_feature.data.astype(np.float32)}
    write_rows(place / CODES, columns, CODE_ROWS)
    return {
        "code_first": by_feature.indptr[:-1].astype(np.int64),
        "code_count": np.diff(by_feature.indptr).astype(np.int64),
    }


def _texts(folder: Path, building: Building, used: set[int]) -> None:
    """The sample's tokens: id, sequence, flags."""
    n = sum(map(len, building.sample_pair))
    tokens = building.tokens
    ids = np.asarray(tokens.open("id")[:n])
    sequence = np.searchsorted(np.asarray(tokens.open("start")), np.arange(n), side="right") - 1
    pair = np.concatenate(building.sample_pair)
    used.update(np.unique(ids).tolist())
    write_rows(folder / TEXTS, {"id": ids, "sequence": sequence, "pair": pair}, CODE_ROWS)


def _examples(place: Path, building: Building, number: int, used: set[int], progress: Progress) -> Array:
    """Write the examples; returns (F, 6) ids of the distinct tokens of the largest, −1 where there are fewer."""
    state, tokens = building.states[number], building.tokens
    n, width = state.sae.d_sae, building.options.window
    ids, documents, starts = (tokens.open(name) for name in ("id", "document", "start"))
    r, flags, names = tokens.open(f"r{number}"), tokens.open(f"flags{number}"), tokens.documents()
    starts = np.asarray(starts)
    ends = np.append(starts[1:], tokens.count)
    top_tokens = np.full((n, TOP_TOKENS), -1, np.int64)

    def sequence_of(place_n: Array) -> Array:
        found: Array = np.searchsorted(starts, place_n, side="right") - 1
        return found

    with ExampleWriter(place) as writer:
        for first in range(0, n, GROUP_FEATURES):
            features = range(first, min(first + GROUP_FEATURES, n))
            chosen = choose(state.examples, features, sequence_of)
            slots = state.windows.take(slice(features.start, features.stop))
            at = (chosen.feature_n - first, chosen.slot_n)
            if (slots["place"][at] != chosen.place_n).any():
                raise CosaeError(f"{building.work} is damaged: remove it, and build the store again.")
            sequence = sequence_of(chosen.place_n)
            begin = np.maximum(np.minimum(chosen.place_n - int(width * 0.75), ends[sequence] - width), starts[sequence])
            token_nW = begin[:, None] + np.arange(width)
            real_nW = token_nW < np.minimum(begin + width, ends[sequence])[:, None]
            token_nW = np.minimum(token_nW, tokens.count - 1)
            id_nW = np.where(real_nW, ids[token_nW], -1)
            used.update(np.unique(id_nW).tolist())
            writer.add(
                {
                    "feature": chosen.feature_n,
                    "group": chosen.group_n,
                    "interval": chosen.interval_n,
                    "at": (chosen.place_n - begin).astype(np.int16),
                    "sequence": sequence,
                    "position": (chosen.place_n - starts[sequence]).astype(np.int32),
                    "document": np.array([names.get(int(d), "") for d in documents[chosen.place_n]], dtype=object),
                    "ids": id_nW.astype(np.int32),
                    "value": np.where(real_nW, slots["value"][at], 0).astype(np.float32),
                    "r": np.where(real_nW, r[token_nW], 0).astype(np.float32),
                    "kappa": np.where(real_nW, slots["kappa"][at], 0).astype(np.int16),
                    "flags": np.where(real_nW, flags[token_nW] | REAL, 0).astype(np.uint8),
                }
            )
            for feature in features:
                mine = (chosen.feature_n == feature) & (chosen.group_n == 0)
                distinct = list(dict.fromkeys(ids[chosen.place_n[mine]].tolist()))[:TOP_TOKENS]
                top_tokens[feature, : len(distinct)] = distinct
            progress.advance(len(features))
    return top_tokens


def _describe(building: Building, number: int, columns: Columns) -> dict[str, Any]:
    assert building.probe is not None
    state = building.states[number]
    sae, of, numbers, listed = state.sae, state.numbers.of, state.numbers, building.saes[state.name]
    firings = int(of["firings"].sum())
    changed, union = int((of["vanished"] + of["appeared"]).sum()), int((of["firings"] + of["appeared"]).sum())
    tokens = max(numbers.tokens, 1)
    return {
        "name": state.name,
        "folder": f"sae{number}",
        "path": listed.path,
        "sha256": listed.sha256,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "score": sae.cfg.score,
        "selector": sae.cfg.selector,
        "frame": sae.cfg.frame,
        "k": sae.k,
        "signed": state.examples.negative is not None,
        "exponent": float(sae.scale_a.detach().double().mean()),
        "tokens": numbers.tokens,
        "l0": firings / tokens,
        "dead": int((of["firings"] == 0).sum()),
        "median_r": building.probe.median_r[state.name],
        "norm_driven": changed / union if union else None,
        "quartile_share": (of["quartiles"].sum(0) / firings).tolist() if firings else None,
        "quartile_null": (numbers.quartile_tokens / tokens).tolist(),
        "logits": "promoted_id" in columns,
        "evaluation": dict(listed.evaluation),
        "explained": 0,
    }


def _record(building: Building, saes: list[dict[str, Any]], matches: list[Columns]) -> dict[str, Any]:
    probe, source, tokens = building.probe, building.source, building.tokens
    assert probe is not None
    some = np.flatnonzero(building.norm_counts[0])
    bins = slice(int(some[0]), int(some[-1]) + 1)
    read = {
        "model": source.model,
        "site": source.site,
        "corpus": source.corpus,
        "tokens": tokens.count,
        "left_out": building.left_out,
        "sequences": tokens.sequences,
        "documents": len(tokens.documents()),
        "context": source.context,
        "window": building.options.window,
        "seed": building.options.seed,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": building.options.commit,
    }
    norms = {
        "tokens": probe.tokens,
        "median": probe.median,
        "factor": probe.factor,
        "quantiles": list(probe.quantiles),
        "cuts": list(probe.cuts),
        "sinks": building.sinks,
        "edges": NORM_EDGES[bins.start : bins.stop + 1].tolist(),
        "counts": building.norm_counts[0][bins].tolist(),
        "sink_counts": building.norm_counts[1][bins].tolist(),
    }
    return {
        "identity": building.identity,
        "read": read,
        "norms": norms,
        "saes": saes,
        "pairings": list(_pairings(building, matches)),
        "concepts": [list(one) for one in source.concepts] if building.labels is not None else [],
        "labelled": 0 if building.labels is None else int(building.labels[1].sum()),
        "pair_tokens": building.pair_tokens,
    }


def _pairings(building: Building, matches: list[Columns]) -> Any:
    states = building.states
    alive = [int((one.numbers.of["pair_firings"] >= MIN_FIRINGS).sum()) for one in states]
    for i, a in enumerate(states):
        for j, b in enumerate(states[i + 1 :], i + 1):
            found: Mapping[str, Array] = {name: value[:, j - 1] for name, value in matches[i].items()}
            shared = (found["match_correlation"] >= 0.7) & (found["match_cosine"] > 0.7)
            pairs = int((found["match_id"] >= 0).sum())
            yield {
                "a": a.name, "b": b.name, "alive_a": alive[i], "alive_b": alive[j],
                "pairs": pairs, "shared": int(shared.sum()),
            }  # fmt: skip
