"""Pairs of features that were counted → neighbours within an SAE, and matches in the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cosae.browse.collect.building import Building
from cosae.browse.collect.cofiring import SHOWN
from cosae.browse.collect.state import SAEState
from cosae.browse.store.pairs import MIN_FIRINGS

Array = NDArray[Any]
Columns = dict[str, Array]


def neighbours(building: Building, number: int) -> Columns:
    """By decoder cosine, and by Jaccard over the pass, both numbers of each."""
    state = building.states[number]
    sums = building.pairs.sums[number, number]
    fired_F, n = state.numbers.of["pair_firings"], state.sae.d_sae
    union_P = fired_F[sums.i_P] + fired_F[sums.j_P] - sums.sum_P
    jaccard_P = np.divide(sums.sum_P, union_P, out=np.zeros(len(union_P)), where=union_P > 0)
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
        correlation_P = _correlation(a, b, sums.i_P, sums.j_P, sums.sum_P, building.pair_tokens)
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


def pairings(building: Building, matches: list[Columns]) -> Iterator[dict[str, Any]]:
    """How many features of every two SAEs match."""
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
