"""Matching: a known permutation is recovered, correlations are exact, shares are read against a yardstick."""

from __future__ import annotations

import copy
import os
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch

import cosae
from cosae.errors import CosaeError
from cosae.evaluate.matching import match as module
from cosae.evaluate.matching import similarity
from cosae.evaluate.matching.match import against_yardstick, match
from cosae.io.signals import stop_on_signals
from cosae.sae.calibrate import calibrate
from cosae.types import Activations, Codes
from tests.support.passes import match_saes


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


def test_a_signal_does_not_wait_for_the_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a minute at thousands of features, in C, where no handler runs: so not in the thread of the handlers."""
    within, ended = [], threading.Event()

    def long(*_: object, **__: object) -> None:
        within.append(threading.current_thread())
        os.kill(os.getpid(), signal.SIGTERM)
        ended.wait(60)

    monkeypatch.setattr(module, "linear_sum_assignment", long)
    codes, began = Codes.from_dense(sparse_codes()), time.monotonic()
    with pytest.raises(KeyboardInterrupt), stop_on_signals(at_once=KeyboardInterrupt()):
        match(codes, codes, rows(), rows(), method="hungarian")
    ended.set()
    assert within != [threading.main_thread()]
    assert time.monotonic() - began < 10


def test_a_share_is_read_against_same_score_pairs() -> None:
    dense, decoder = sparse_codes(f=200), rows(200)
    half = dense.clone()
    half[:, :100] = sparse_codes(f=100, seed=8)
    whole = match(Codes.from_dense(dense), Codes.from_dense(dense), decoder, decoder)
    partly = match(Codes.from_dense(dense), Codes.from_dense(half), decoder, decoder)
    found = against_yardstick(partly, [whole, whole])
    assert found["ratio"] == pytest.approx(0.5)
    assert 0.4 < found["low"] < 0.5 < found["high"] < 0.6
    assert found["difference"] == pytest.approx(-0.5)
    assert found["paired"]
    same = against_yardstick(partly, [partly])
    # the same features are drawn for both, so nothing is left to chance
    assert (same["ratio"], same["low"], same["high"], same["difference_high"]) == (1.0, 1.0, 1.0, 0.0)
    with pytest.raises(CosaeError, match="at least one same-score pair"):
        against_yardstick(partly, [])
    with pytest.raises(CosaeError, match="in the same way"):
        against_yardstick(
            partly, [match(Codes.from_dense(dense), Codes.from_dense(dense), decoder, decoder, method="mutual")]
        )


def test_a_yardstick_of_other_features_is_resampled_on_its_own() -> None:
    """Half of 200 features shared, against a pair of other SAEs that shares 3/4: resamples are drawn apart."""
    dense, decoder = sparse_codes(f=200), rows(200)
    half, quarter = dense.clone(), dense.clone()
    half[:, :100] = sparse_codes(f=100, seed=8)
    quarter[:, :50] = sparse_codes(f=50, seed=9)
    fewer = dense.clone()
    fewer[10:, 199] = 0
    fewer[:, 199].clamp_(max=0)
    partly = match(Codes.from_dense(dense), Codes.from_dense(half), decoder, decoder)
    yardstick = match(Codes.from_dense(fewer), Codes.from_dense(quarter), decoder, decoder)
    found = against_yardstick(partly, [yardstick])
    assert not found["paired"]
    assert found["yardstick_frac"] == pytest.approx(149 / 199)
    # two independent binomials: the standard deviation of the difference is known
    sd = (0.25 / 200 + 149 / 199 * 50 / 199 / 199) ** 0.5
    assert found["difference_high"] - found["difference_low"] == pytest.approx(2 * 1.96 * sd, rel=0.1)


@pytest.mark.parametrize("method", ["hungarian", "mutual"])
def test_pairs_can_be_made_by_the_decoder_alone(method: str) -> None:
    """Codes say nothing (independent), decoder rows are a permutation: found, but not shared."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    codes_a, codes_b = Codes.from_dense(sparse_codes()), Codes.from_dense(sparse_codes(seed=7))
    found = match(codes_a, codes_b, rows(), 7 * rows()[order], by="cosine", method=method)
    assert order[found.pairs.b].tolist() == list(range(12))
    assert found.pairs.cosine == pytest.approx(np.ones(12), rel=1e-6)
    assert (found.numbers()["by"], found.numbers()["shared_frac"]) == ("cosine", 0.0)
    with pytest.raises(CosaeError, match="correlation or cosine"):
        match(codes_a, codes_b, rows(), rows(), by="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["correlation", "cosine"])
def test_chunks_change_nothing(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = sparse_codes(f=30, seed=1), sparse_codes(f=40, seed=1, rate=0.3)
    codes = Codes.from_dense(a), Codes.from_dense(b), rows(30), rows(40, seed=3)
    whole = match(*codes, by=by, method="mutual")
    monkeypatch.setattr(similarity, "CHUNK_ELEMENTS", 1)
    pieces = match(*codes, by=by, method="mutual")
    assert whole.pairs.a.tolist() == pieces.pairs.a.tolist()
    assert whole.pairs.b.tolist() == pieces.pairs.b.tolist()
    assert pieces.numbers() == whole.numbers()
    cosine = torch.nn.functional.cosine_similarity(rows(30)[:, None], rows(40, seed=3)[None], dim=-1).double().numpy()
    value = cosine if by == "cosine" else np.corrcoef(a.double().numpy().T, b.double().numpy().T)[:30, 30:]
    mutual = [(i, int(value[i].argmax())) for i in range(30) if value[:, value[i].argmax()].argmax() == i]
    assert list(zip(whole.pairs.a.tolist(), whole.pairs.b.tolist(), strict=True)) == mutual


def test_a_code_that_is_the_same_everywhere_has_no_correlation() -> None:
    dense = sparse_codes()
    dense[:, 3] = 0.1
    found = match(Codes.from_dense(dense), Codes.from_dense(dense), rows(), rows())
    assert 3 not in found.alive_a
    assert np.isfinite(found.pairs.correlation).all()


def test_a_small_change_on_a_large_code_is_still_correlated() -> None:
    """Codes far from 0 on every token: means are taken out without losing the digits that differ."""
    generator = torch.Generator().manual_seed(0)
    wave = torch.rand(500, generator=generator)
    dense = torch.stack([1000 + wave, 1000 + torch.rand(500, generator=generator)], 1)
    found = match(Codes.from_dense(dense), Codes.from_dense(dense.flip(1)), torch.eye(2), torch.eye(2).flip(0))
    assert found.pairs.b.tolist() == [1, 0]
    assert found.pairs.correlation == pytest.approx([1.0, 1.0], abs=1e-6)


def saes_and_activations() -> tuple[cosae.SAE, cosae.SAE, torch.Tensor, Activations]:
    """An SAE, the same with its features in another order, the order, and activations with two sinks."""
    x_ND = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    sae = cosae.SAE.build(8, 24, score="cosine_per_feature", k=4, seed=1, sample=x_ND)
    calibrate(sae, x_ND)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    other = copy.deepcopy(sae)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name != "centre_D":
                parameter.copy_(parameter[order])
    x_ND = torch.cat([x_ND, 1000 * torch.ones(2, 8), torch.zeros(5, 8)])
    return sae, other, order, Activations.bare(x_ND)


def test_an_sae_and_its_reordered_twin_are_the_same_and_neither_changes() -> None:
    sae, other, order, activations = saes_and_activations()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sink_N = activations.norm_N > 100
    found = match_saes(sae, other, activations, sink_N, min_firings=3)
    assert found.tokens == 600  # neither the sinks nor the padding
    assert len(found.pairs) > 10
    assert order[found.pairs.b].tolist() == found.pairs.a.tolist()
    assert found.numbers()["shared_frac"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    with_sinks = match_saes(sae, other, activations, min_firings=3)
    assert with_sinks.tokens == 602


def test_sinks_left_in_make_strangers_correlate() -> None:
    """Two unrelated sets of features that all fire hard on one sink of 300 tokens: the paper's rule matches them."""
    a, b = sparse_codes(300, rate=0.1), sparse_codes(300, seed=8, rate=0.1)
    sinks_a, sinks_b = a.clone(), b.clone()
    sinks_a[0], sinks_b[0] = 500.0, 500.0
    decoder = torch.ones(12, 4)
    clean = match(Codes.from_dense(a), Codes.from_dense(b), decoder, decoder).numbers()
    fooled = match(Codes.from_dense(sinks_a), Codes.from_dense(sinks_b), decoder, decoder).numbers()
    assert (clean["paper_frac_a"], fooled["paper_frac_a"]) == (0.0, 1.0)
    assert fooled["paper_partners_b"] <= 12


def test_what_saes_cannot_be_matched_on_is_refused() -> None:
    sae, other, _, activations = saes_and_activations()
    with pytest.raises(CosaeError, match="each of 607 activations"):
        match_saes(sae, other, activations, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(CosaeError, match="at least one token"):
        match_saes(sae, other, activations, torch.ones(607, dtype=torch.bool))
    fresh = cosae.SAE.build(8, 24, selector="batch_topk", k=4, seed=1)
    with pytest.raises(CosaeError, match="inference threshold"):
        match_saes(sae, fresh, activations)


def test_too_many_features_for_the_assignment_are_refused_and_mutual_takes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = Codes.from_dense(sparse_codes())
    monkeypatch.setattr(module, "HUNGARIAN_MAX", 11)
    with pytest.raises(CosaeError, match="method='mutual'"):
        match(codes, codes, rows(), rows())
    assert len(match(codes, codes, rows(), rows(), method="mutual").pairs) == 12


@pytest.mark.slow
def test_sixteen_thousand_features_a_side_stay_within_memory() -> None:
    """16 384 × 16 384: a permutation is found; the whole matrix would take 2 GB, a chunk takes 32 MB."""
    n, f, k = 4000, 16_384, 32
    generator = torch.Generator().manual_seed(0)
    feature_NK = torch.rand(n, f, generator=generator).topk(k, dim=1).indices.sort(dim=1).values
    offset = torch.arange(n + 1) * k
    value_E = torch.rand(n * k, generator=generator)
    codes = Codes(offset, feature_NK.flatten(), value_E, f, (n,))
    order = torch.randperm(f, generator=generator)
    place_F = order.argsort()
    moved_NK, within = place_F[feature_NK].sort(dim=1)
    other = Codes(offset, moved_NK.flatten(), value_E.view(n, k).gather(1, within).flatten(), f, (n,))
    decoder = torch.randn(f, 16, generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = match(codes, other, decoder, decoder[order], method="mutual", min_firings=3)
    assert order[found.pairs.b].tolist() == found.pairs.a.tolist()
    assert len(found.pairs) == len(found.alive_a) > 10_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kilobytes
