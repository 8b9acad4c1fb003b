"""Selection by search equals the dense definition: the same entries, whatever the scores look like."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosae.kernels import Entries, ScoreTerms, choose, reference
from cosae.kernels.cpu import native
from cosae.kernels.select import search
from tests.support.score_worlds import FAMILY, make_terms

CPU, REFERENCE = choose("cpu", "cpu"), choose("reference", "cpu")


@pytest.fixture(
    params=[(loops, name) for loops in ("compiled", "plain") for name in ("fp32", "bf16", "int8")], ids="-".join
)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path of the search, forced: all are exact (if slow) on any processor."""
    loops, name = request.param
    monkeypatch.setenv("COSAE_SCREEN", name)
    monkeypatch.setattr(search, "DENSE_SHARE", 1)
    if loops == "plain":
        monkeypatch.setattr(native, "AVAILABLE", False)
    elif not native.AVAILABLE:
        pytest.skip("numba is not installed")


pytestmark = pytest.mark.usefixtures("_path")


def assert_same(found: Entries, wanted: Entries) -> None:
    assert found.token_E.dtype == found.feature_E.dtype == torch.int64
    assert torch.equal(found.token_E, wanted.token_E)
    assert torch.equal(found.feature_E, wanted.feature_E)


def check_batch(terms: ScoreTerms, n_keep: int, hint: float | None = None) -> None:
    found, smallest = CPU.select_batch_topk(terms, n_keep, hint)
    wanted, wanted_smallest = REFERENCE.select_batch_topk(terms, n_keep)
    assert_same(found, wanted)
    largest = float(reference.scores(terms)[terms.live_B].abs().max())
    assert abs(smallest - wanted_smallest) <= 1e-6 * largest


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("n_keep", [1, 40, 300])
def test_batch_topk_on_random_scores(kind: str, n_keep: int) -> None:
    check_batch(make_terms(kind, seed=n_keep), n_keep)


@pytest.mark.parametrize("hint", [None, float("nan"), float("inf"), 0.0, -1.0, 1e-9, 1e9, 2.0])
@pytest.mark.parametrize("kind", ["inner", "cosine_per_feature"])
def test_any_hint_gives_the_same_entries(kind: str, hint: float | None) -> None:
    check_batch(make_terms(kind, seed=11), 70, hint)


def test_carried_hint() -> None:
    """A hint from one batch serves the next."""
    _, hint = CPU.select_batch_topk(make_terms("cosine", seed=1), 70)
    check_batch(make_terms("cosine", seed=2), 70, hint)


@pytest.mark.parametrize("n_keep", [1, 7, 20, 100])
def test_ties_go_to_the_smaller_flat_index(n_keep: int) -> None:
    draw = torch.Generator().manual_seed(0)
    z_BD = torch.randint(-1, 2, (24, 8), generator=draw).float()
    rows_FD = torch.randint(-1, 2, (40, 8), generator=draw).float()
    terms = replace(
        make_terms("inner"), z_BD=z_BD, rows_FD=rows_FD, bias_F=None, live_B=torch.ones(24, dtype=torch.bool)
    )
    check_batch(terms, n_keep)


def test_twin_rows_tie() -> None:
    terms = make_terms("cosine", seed=3)
    check_batch(replace(terms, rows_FD=terms.rows_FD[:1].expand(53, -1).contiguous(), bias_F=None), 90)


@pytest.mark.parametrize("kind", FAMILY)
def test_all_scores_negative(kind: str) -> None:
    terms = replace(make_terms(kind), bias_F=torch.full((53,), -1e4))
    found, smallest = CPU.select_batch_topk(terms, 50)
    assert len(found) == 0
    assert smallest == 0.0


@pytest.mark.parametrize("kind", ["inner", "cosine", "cosine_per_feature"])
def test_fewer_positive_scores_than_wanted(kind: str) -> None:
    terms = make_terms(kind, seed=5, bias=None)
    shift = REFERENCE.select_batch_topk(terms, 25)[1] * 1.0001
    check_batch(replace(terms, bias_F=torch.full((53,), -shift)), 400)


@pytest.mark.parametrize("sizes", [(1, 19, 53), (37, 19, 1), (1, 1, 1), (64, 33, 32), (5, 130, 300)])
@pytest.mark.parametrize("kind", ["inner", "cosine_per_feature"])
def test_odd_shapes(kind: str, sizes: tuple[int, int, int]) -> None:
    n_tokens, width, n_features = sizes
    terms = make_terms(kind, n_tokens, width, n_features, seed=6)
    check_batch(terms, max(1, n_tokens * n_features // 9))
    check_batch(terms, n_tokens * n_features)


@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1e9, 1e17])
@pytest.mark.parametrize("kind", ["inner", "inner_unit"])
def test_huge_and_tiny_norms(kind: str, scale: float) -> None:
    terms = make_terms(kind, seed=7, bias=None)
    check_batch(replace(terms, z_BD=terms.z_BD * scale), 70)


@pytest.mark.parametrize("kind", FAMILY)
def test_norms_over_many_orders(kind: str) -> None:
    check_batch(make_terms(kind, seed=8, spread=4.0), 70)


@pytest.mark.parametrize("kind", FAMILY)
def test_dead_and_zero_rows(kind: str) -> None:
    terms = make_terms(kind, seed=9)
    z_BD, live_B = terms.z_BD.clone(), terms.live_B.clone()
    z_BD[3], z_BD[4], live_B[4], live_B[5] = 0.0, 0.0, False, False
    bias_F = terms.bias_F + 3.0 * (torch.arange(53) == 7)
    rows_FD = terms.rows_FD.clone()
    rows_FD[11] = 0.0
    check_batch(replace(terms, z_BD=z_BD, live_B=live_B, bias_F=bias_F, rows_FD=rows_FD), 90)


@pytest.mark.parametrize("bias", [30.0, 1e4])
@pytest.mark.parametrize("kind", FAMILY)
def test_large_biases(kind: str, bias: float) -> None:
    """Whole columns are kept and others never: at the cut the order is that of scores whose bias dwarfs them."""
    check_batch(make_terms(kind, seed=10, bias=bias), 95)


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_above_one_threshold_and_one_per_feature(kind: str, share: float) -> None:
    terms = make_terms(kind, seed=12)
    threshold = torch.tensor(REFERENCE.select_batch_topk(terms, int(share * 900))[1] * 1.0001)
    assert_same(CPU.select_above(terms, threshold), REFERENCE.select_above(terms, threshold))
    each_F = threshold * torch.linspace(-0.5, 2.0, 53)
    assert_same(CPU.select_above(terms, each_F), REFERENCE.select_above(terms, each_F))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("k", [1, 6, 53, 60])
def test_topk(kind: str, k: int, absolute: bool) -> None:
    terms = make_terms(kind, seed=13)
    terms = replace(terms, live_B=torch.arange(37) != 5)
    assert_same(CPU.select_topk(terms, k, absolute), REFERENCE.select_topk(terms, k, absolute))


def test_same_bits_for_any_number_of_threads() -> None:
    terms = make_terms("cosine", 300, 64, 4000, seed=14)
    threads = torch.get_num_threads()
    answers = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            entries, smallest = CPU.select_batch_topk(terms, 3000)
            content_E = CPU.entry_content(terms, entries)
            rows_FD = terms.rows_FD.clone().requires_grad_()
            CPU.decode(content_E, entries, rows_FD, 300).square().sum().backward()
            answers.append((entries.feature_E, content_E, rows_FD.grad, smallest))
    finally:
        torch.set_num_threads(threads)
    for answer in answers[1:]:
        assert torch.equal(answer[0], answers[0][0])
        assert answer[3] == answers[0][3]
        if native.AVAILABLE:
            assert torch.equal(answer[1], answers[0][1])
            assert torch.equal(answer[2], answers[0][2])
