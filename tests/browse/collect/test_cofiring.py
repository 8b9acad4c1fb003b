"""Candidates and sums of pairs against dense products, compiled and plain."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cosae.browse.collect import cofiring
from cosae.kernels.cpu import native


def codes(n_features: int, seed: int) -> tuple[np.ndarray, sparse.csc_array]:
    draw = np.random.default_rng(seed)
    dense_NF = (draw.random((300, n_features)) < 0.1) * draw.normal(1, 1, (300, n_features))
    dense_NF[:, 3] = 0  # a dead one
    return dense_NF, sparse.csc_array(dense_NF.astype(np.float32))


@pytest.fixture(params=["compiled", "plain"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(native, "serves", lambda: False)
    elif not native.serves():
        pytest.skip("numba is not installed")
    return str(request.param)


def test_sums_of_pairs(how: str) -> None:
    (a_NF, a), (b_NG, b) = codes(40, 0), codes(30, 1)
    draw = np.random.default_rng(2)
    pairs = cofiring.unique_pairs([(draw.integers(0, 40, 500), draw.integers(-1, 30, 500))])
    assert (np.diff(pairs[0] * 30 + pairs[1]) > 0).all()
    assert pairs[1].min() == 0
    sums = cofiring.PairSums(*pairs)
    for _ in range(2):
        sums.add(a, b)
    assert np.allclose(sums.sum_P, 2 * (a_NF.T @ b_NG)[pairs], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cells", [2**24, 200])
def test_the_best_by_correlation_and_by_jaccard(how: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cofiring, "PANEL_CELLS", cells)
    (a_NF, a), (b_NG, b) = codes(40, 0), codes(30, 1)
    with np.errstate(invalid="ignore"):
        correlation_FG = np.nan_to_num(np.corrcoef(a_NF.T, b_NG.T)[:40, 40:])
    for found, expected in zip(cofiring.best_by_correlation(a, b, 5), (correlation_FG, correlation_FG.T), strict=True):
        order = np.argsort(-expected, 1)[:, :5]
        assert (found == np.where(np.take_along_axis(expected, order, 1) > 0, order, -1)).all()
    fires_NF = (a_NF != 0).astype(float)
    both_FF = fires_NF.T @ fires_NF
    size_F = fires_NF.sum(0)
    jaccard_FF = both_FF / np.maximum(size_F[:, None] + size_F - both_FF, 1)
    np.fill_diagonal(jaccard_FF, 0)
    ones = sparse.csc_array(fires_NF.astype(np.float32))
    found = cofiring.best_by_jaccard(ones, 6)
    got = np.where(found >= 0, np.take_along_axis(jaccard_FF, found, 1), 0)
    assert np.allclose(got, -np.sort(-jaccard_FF, 1)[:, :6])  # equal ones may come in any order
    assert (found[3] == -1).all()
