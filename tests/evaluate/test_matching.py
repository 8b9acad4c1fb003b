"""Matching: a known permutation is recovered, correlations are exact, and shares are read against a yardstick."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from cosae.evaluate.matching import Pairs, against_yardstick, discovery_separability, match
from cosae.types import Codes, CosaeError


def sparse_codes(n: int = 400, f: int = 12, seed: int = 0, rate: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, f, generator=generator) * (torch.rand(n, f, generator=generator) < rate)


def rows(f: int = 12, d: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(f, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["hungarian", "mutual"])
def test_a_known_permutation_is_recovered(method: str) -> None:
    dense, decoder = sparse_codes(), rows()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    noisy = dense[:, order] * 3 + 0.01 * sparse_codes(seed=9)
    found = match(Codes.from_dense(dense), Codes.from_dense(noisy), decoder, 7 * decoder[order], method=method)
    assert found.pairs.a.tolist() == list(range(12))
    assert order[found.pairs.b].tolist() == list(range(12))
    assert len(found.pairs.shared()) == 12
    numbers = found.numbers()
    assert (numbers["shared_frac"], numbers["paper_frac_a"], numbers["paper_frac_b"]) == (1.0, 1.0, 1.0)
    assert numbers["mean_cosine"] == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("method", ["hungarian", "mutual"])
def test_correlations_are_pearson_s(method: str) -> None:
    a, b = sparse_codes(seed=1), sparse_codes(seed=1) + 0.5 * sparse_codes(seed=2)
    found = match(Codes.from_dense(a), Codes.from_dense(b), rows(), rows(seed=3), method=method)
    expected = np.corrcoef(a.double().numpy().T, b.double().numpy().T)[:12, 12:]
    assert found.pairs.correlation == pytest.approx(expected[found.pairs.a, found.pairs.b], abs=1e-6)
    if method == "hungarian":
        assert found.pairs.correlation.sum() >= np.trace(expected) - 1e-6


def test_the_paper_s_rule_lets_many_share_one_and_is_not_symmetric() -> None:
    """Three copies in A of one feature of B: all three are 'matched', one of B's two is."""
    base = sparse_codes(f=2)
    a = torch.cat([base[:, :1]] * 3, dim=1)
    decoder_b = torch.eye(2, 5)
    found = match(Codes.from_dense(a), Codes.from_dense(base), decoder_b[[0, 0, 0]], decoder_b)
    numbers = found.numbers()
    assert (numbers["paper_frac_a"], numbers["paper_frac_b"]) == (1.0, 0.5)
    assert len(found.pairs.shared()) == 1
    assert numbers["shared_frac"] == 0.5


def test_the_decoder_must_agree_too() -> None:
    dense = sparse_codes()
    found = match(Codes.from_dense(dense), Codes.from_dense(dense), rows(), -rows())
    assert len(found.pairs) == 12
    assert len(found.pairs.shared()) == 0


def test_rare_features_are_left_out() -> None:
    dense = sparse_codes()
    dense[:, 5] = 0
    dense[:9, 5] = 1
    found = match(Codes.from_dense(dense), Codes.from_dense(dense), rows(), rows())
    assert 5 not in found.alive_a
    assert len(found.pairs) == 11


def test_nothing_alive_pairs_nothing() -> None:
    silent = Codes.from_dense(torch.zeros(400, 12))
    for method in ("hungarian", "mutual"):
        found = match(silent, Codes.from_dense(sparse_codes()), rows(), rows(), method=method)  # type: ignore[arg-type]
        assert (len(found.pairs), found.numbers()["shared_frac"]) == (0, 0.0)


def test_what_does_not_fit_is_refused() -> None:
    codes = Codes.from_dense(sparse_codes())
    with pytest.raises(CosaeError, match="the same tokens"):
        match(codes, Codes.from_dense(sparse_codes(n=10)), rows(), rows())
    with pytest.raises(CosaeError, match="one width"):
        match(codes, codes, rows(), rows(d=3))
    with pytest.raises(CosaeError, match="hungarian or mutual"):
        match(codes, codes, rows(), rows(), method="greedy")  # type: ignore[arg-type]


def test_a_thousand_features_take_seconds() -> None:
    a, b = sparse_codes(3000, 1000, rate=0.02), sparse_codes(3000, 1000, seed=5, rate=0.02)
    began = time.perf_counter()
    match(Codes.from_dense(a), Codes.from_dense(b), rows(1000), rows(1000))
    assert time.perf_counter() - began < 20


def test_a_share_is_read_against_same_score_pairs() -> None:
    dense, decoder = sparse_codes(f=200), rows(200)
    half = dense.clone()
    half[:, :100] = sparse_codes(f=100, seed=8)
    whole = match(Codes.from_dense(dense), Codes.from_dense(dense), decoder, decoder)
    partly = match(Codes.from_dense(dense), Codes.from_dense(half), decoder, decoder)
    found = against_yardstick(partly, [whole, whole])
    assert found["ratio"] == pytest.approx(0.5)
    assert 0.4 < found["low"] < 0.5 < found["high"] < 0.6
    same = against_yardstick(partly, [partly])
    assert same["ratio"] == 1.0
    assert same["low"] < 1.0 < same["high"]
    with pytest.raises(CosaeError, match="at least one same-score pair"):
        against_yardstick(partly, [])


def test_discovery_and_separability_have_their_closed_forms() -> None:
    """B's gain of 0.2 comes wholly from a feature A has not; then wholly from a matched one."""
    concepts = 30
    a = np.full((3, concepts), 0.6)
    b = np.full((3, concepts), 0.6)
    b[2] = 0.8
    pairs = Pairs(np.array([0, 1]), np.array([0, 1]), np.ones(2), np.ones(2))
    new = discovery_separability(a, a, b, b, pairs)
    assert new["gap_full"]["mean"] == pytest.approx(0.2)
    assert (new["gap_matched"]["mean"], new["discovery_frac"]) == (0.0, 1.0)
    shared = Pairs(np.array([0, 2]), np.array([0, 2]), np.ones(2), np.ones(2))
    sharper = discovery_separability(a, a, b, b, shared)
    assert sharper["separability_frac"] == pytest.approx(1.0)
    equal = discovery_separability(a, a, a, a, shared)
    assert (equal["separability_frac"], equal["discovery_frac"]) == (None, None)


def test_features_are_chosen_in_training_and_scored_held_out() -> None:
    train, held = np.array([[0.9, 0.5], [0.8, 0.6]]), np.array([[0.5, 0.9], [0.95, 0.7]])
    other = np.full((2, 2), 0.5)
    pairs = Pairs(np.array([0]), np.array([0]), np.ones(1), np.ones(1))
    found = discovery_separability(other, other, train, held, pairs)
    assert found["gap_full"]["mean"] == pytest.approx((0.0 + 0.2) / 2)
