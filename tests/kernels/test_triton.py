"""The Triton path against the dense definition: the same entries, sums and gradients, from poisoned memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosae.errors import CosaeError
from cosae.kernels import Entries, Kernel, ScoreTerms, StepCache, choose, reference
from cosae.kernels.select import search
from tests.support.score_worlds import FAMILY, aligned, in_double, make_terms, on

REFERENCE = choose("reference", "cpu")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, or absurd integers: what a kernel leaves unwritten shows."""
    monkeypatch.setattr(search, "DENSE_SHARE", 1)

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **options: Any) -> Tensor:
            made = make(*args, **options)
            return made.fill_(math.nan if made.is_floating_point() else torch.iinfo(made.dtype).max // 2)

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def terms_of(kind: str, device: torch.device, *sizes: int, **options: Any) -> ScoreTerms:
    return on(make_terms(kind, *(sizes or (21, 19, 35)), **options), device)


def assert_same(found: Entries, wanted: Entries) -> None:
    assert found.token_E.dtype == found.feature_E.dtype == torch.int64
    assert torch.equal(found.token_E, wanted.token_E)
    assert torch.equal(found.feature_E, wanted.feature_E)


def check_batch(path: Kernel, terms: ScoreTerms, n_keep: int, hint: float | None = None) -> None:
    found, smallest = path.select_batch_topk(terms, n_keep, hint)
    wanted, wanted_smallest = REFERENCE.select_batch_topk(terms, n_keep)
    assert_same(found, wanted)
    largest = float(reference.scores(terms)[terms.live_B].abs().max())
    assert abs(smallest - wanted_smallest) <= 1e-6 * largest


@pytest.mark.parametrize("kind", FAMILY)
def test_batch_topk_above_and_topk(kind: str, device: torch.device, triton_path: Kernel) -> None:
    terms = terms_of(kind, device, seed=1)
    check_batch(triton_path, terms, 60)
    cut = REFERENCE.select_batch_topk(terms, 60)[1] * 1.0001
    for threshold in (torch.tensor(cut), torch.linspace(-0.5, 2.0, 35) * cut):
        threshold = threshold.to(device)
        assert_same(triton_path.select_above(terms, threshold), REFERENCE.select_above(terms, threshold))
    for absolute in (False, True):
        assert_same(triton_path.select_topk(terms, 5, absolute), REFERENCE.select_topk(terms, 5, absolute))


@pytest.mark.parametrize("sizes", [(1, 19, 35), (21, 19, 1), (1, 1, 1), (33, 32, 64), (5, 67, 40)])
def test_odd_shapes(sizes: tuple[int, int, int], device: torch.device, triton_path: Kernel) -> None:
    terms = terms_of("cosine_per_feature", device, *sizes, seed=6)
    check_batch(triton_path, terms, max(1, sizes[0] * sizes[2] // 9))
    check_batch(triton_path, terms, sizes[0] * sizes[2])
    k = sizes[2]
    assert_same(triton_path.select_topk(terms, k), REFERENCE.select_topk(terms, k))


@pytest.mark.parametrize("hint", [None, math.nan, math.inf, 0.0, 1e-9, 1e9, 2.0])
def test_any_hint_gives_the_same_entries(hint: float | None, device: torch.device, triton_path: Kernel) -> None:
    """Among them hints that let far more through than there is room for, and none."""
    check_batch(triton_path, terms_of("cosine", device, seed=11), 40, hint)


@pytest.mark.parametrize("n_keep", [1, 7, 60])
def test_ties_go_to_the_smaller_flat_index(n_keep: int, device: torch.device, triton_path: Kernel) -> None:
    draw = torch.Generator().manual_seed(0)
    z_BD = torch.randint(-1, 2, (24, 8), generator=draw).float()
    rows_FD = torch.randint(-1, 2, (40, 8), generator=draw).float()
    live_B = torch.ones(24, dtype=torch.bool)
    terms = on(replace(make_terms("inner"), z_BD=z_BD, rows_FD=rows_FD, bias_F=None, live_B=live_B), device)
    check_batch(triton_path, terms, n_keep)
    assert_same(triton_path.select_topk(terms, 3), REFERENCE.select_topk(terms, 3))


def test_all_negative_and_fewer_positive_than_wanted(device: torch.device, triton_path: Kernel) -> None:
    terms = terms_of("cosine", device, seed=5)
    below = replace(terms, bias_F=torch.full((35,), -1e4, device=device))
    found, smallest = triton_path.select_batch_topk(below, 50)
    assert (len(found), smallest) == (0, 0.0)
    shift = REFERENCE.select_batch_topk(terms, 25)[1] * 1.0001
    few = replace(terms, bias_F=torch.full((35,), -shift, device=device))
    check_batch(triton_path, few, 400)


@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1e9, 1e17])
@pytest.mark.parametrize("kind", ["inner", "inner_unit"])
def test_huge_and_tiny_norms(kind: str, scale: float, device: torch.device, triton_path: Kernel) -> None:
    terms = terms_of(kind, device, seed=7, bias=None)
    terms = replace(terms, z_BD=terms.z_BD * scale)
    check_batch(triton_path, terms, 70)
    assert_same(triton_path.select_topk(terms, 4), REFERENCE.select_topk(terms, 4))


@pytest.mark.parametrize("kind", ["inner", "cosine", "cosine_per_feature", "length_power"])
def test_dead_tokens_zero_rows_and_large_biases(kind: str, device: torch.device, triton_path: Kernel) -> None:
    terms = make_terms(kind, 21, 19, 35, seed=9, spread=4.0)
    z_BD, live_B, rows_FD = terms.z_BD.clone(), terms.live_B.clone(), terms.rows_FD.clone()
    z_BD[3], z_BD[4], live_B[4], live_B[5], rows_FD[11] = 0.0, 0.0, False, False, 0.0
    bias_F = terms.bias_F + 3.0 * (torch.arange(35) == 7)
    terms = on(replace(terms, z_BD=z_BD, live_B=live_B, bias_F=bias_F, rows_FD=rows_FD), device)
    check_batch(triton_path, terms, 90)
    check_batch(triton_path, replace(terms, bias_F=1e4 * terms.bias_F), 95)


def test_not_served_is_the_definition(device: torch.device, triton_path: Kernel) -> None:
    terms = replace(terms_of("cosine", device), log_gain=torch.tensor(90.0, device=device))
    assert_same(triton_path.select_batch_topk(terms, 9)[0], REFERENCE.select_batch_topk(terms, 9)[0])


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(FAMILY),
    seed=st.integers(0, 10_000),
    width=st.sampled_from([1, 7, 40]),
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    bias=st.sampled_from([None, 0.1, 100.0]),
    rank=st.floats(0.0, 1.0),
    floor=st.booleans(),
)
def test_nothing_above_the_threshold_is_lost(
    device: torch.device, triton_path: Kernel, kind: str, seed: int, width: int, spread: float, bias: float | None,
    rank: float, floor: bool,
) -> None:  # fmt: skip
    """Thresholds just below some entry's float64 score, as the feature's or the token's own."""
    terms = on(make_terms(kind, 13, width, 17, seed, bias, spread), device)
    exact = reference.scores(in_double(terms))
    ordered = exact.reshape(-1).sort().values
    cut = float(ordered[int(rank * (len(ordered) - 1))])
    cut -= 1e-6 * abs(cut)
    assert kept_pairs(terms, cut, floor) >= set((exact > cut).reshape(-1).nonzero()[:, 0].tolist())


def kept_pairs(terms: ScoreTerms, cut: float, floor: bool) -> set[int]:
    """Flat indices (token · F + feature) that the screen alone lets through at a threshold of `cut`."""
    from cosae.kernels.triton import survivors as triton_survivors

    seen: list[Tensor] = []
    append = triton_survivors._append

    def spy(*args: Any) -> Tensor | None:
        key = append(*args)
        seen.append(key)
        return key

    triton_survivors._append = spy
    try:
        cut_F = torch.full_like(terms.rows_FD[:, 0], -math.inf if floor else cut)
        floor_B = torch.full_like(terms.z_BD[:, 0], cut) if floor else None
        triton_survivors.survivors(terms, cut_F, terms.n_tokens * terms.n_features, floor_B)
    finally:
        triton_survivors._append = append
    feature, token = seen[0] // terms.n_tokens, seen[0] % terms.n_tokens
    flat = token * terms.n_features + feature
    assert len(flat.unique()) == len(flat)
    return set(flat.tolist())


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_rounding_boundaries_cannot_hide_an_entry(side: float, device: torch.device, triton_path: Kernel) -> None:
    """Both factors round the same way in every coordinate; without the margin the diagonal is lost."""
    z_BD, signs = aligned(8, 96, 1, side), aligned(8, 96, 2, side)
    terms = replace(
        make_terms("inner_unit", 8, 96, 8, bias=None), z_BD=z_BD, rows_FD=z_BD.sign() * signs.abs()
    )  # fmt: skip
    terms = on(terms, device)
    exact = reference.scores(in_double(terms))
    for i in range(0, 8, 3):
        assert 9 * i in kept_pairs(terms, float(exact[i, i]) * (1 - 1e-6), floor=False)


def test_the_screen_is_tight(device: torch.device, triton_path: Kernel) -> None:
    """The point of it: few pass beyond those above the threshold."""
    terms = terms_of("cosine", device, 64, 96, 64, bias=None)
    _, cut = REFERENCE.select_batch_topk(terms, 64)
    assert 64 <= len(kept_pairs(terms, cut * (1 - 1e-6), floor=False)) < 1.2 * 64


def test_overflow_is_seen(device: torch.device, triton_path: Kernel) -> None:
    from cosae.kernels.triton import survivors as triton_survivors

    terms = terms_of("cosine", device)
    zero_F = torch.zeros(35, device=device)
    n_positive = int((reference.scores(terms) > 0).sum())
    assert triton_survivors.survivors(terms, zero_F, n_positive // 2) is None
    answer = triton_survivors.survivors(terms, zero_F, 21 * 35)
    assert answer is not None
    assert len(answer) == n_positive


@pytest.mark.parametrize("width", [1, 19, 1100])
def test_sums(width: int, device: torch.device, triton_path: Kernel) -> None:
    """Each sum against its plain twin, with features and tokens that have no entry, and more than one column tile."""
    from cosae.kernels.cpu import sums
    from cosae.kernels.triton import sums as triton_sums

    draw = torch.Generator().manual_seed(0)
    mask = torch.rand(9, 11, generator=draw) < 0.4
    mask[4], mask[:, 6], mask[:, 2] = False, False, True
    token_E, feature_E = (index.to(device) for index in mask.nonzero(as_tuple=True))
    x_BD, rows_FD = (torch.randn(n, width, generator=draw).to(device) for n in (9, 11))
    value_E, pull_F = torch.randn(len(token_E), generator=draw).to(device), torch.randn(11, generator=draw).to(device)
    for name, arguments in {
        "entry_dots": (x_BD, rows_FD),
        "token_sums": (value_E, rows_FD),
        "feature_sums": (value_E, x_BD, rows_FD),
        "pulled": (value_E, x_BD, rows_FD, pull_F),
        "feature_sums_and_dots": (value_E, x_BD, rows_FD),
        "entries_by_feature_sum": (value_E,),
        "entries_by_token_sum": (value_E,),
    }.items():
        answers = []
        for module in (triton_sums, sums):
            call: list[Any] = list(arguments)
            call.insert(2, Entries(token_E, feature_E))
            if name == "entries_by_feature_sum":
                call.append(11)
            elif name in ("token_sums", "entries_by_token_sum"):
                call.append(9)
            answer = getattr(module, "feature_sums" if name == "pulled" else name)(*call)
            answers.append(answer if isinstance(answer, tuple) else (answer,))
        for found, wanted in zip(*answers, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * max(1.0, width**0.5), msg=name)


def gradients(kernel: Kernel, terms: ScoreTerms, decoder_FD: Tensor, entries: Entries) -> dict[str, Tensor]:
    """Gradients of a smooth loss of the reconstruction, every parameter a leaf."""
    leaves = {
        name: getattr(terms, name).clone().requires_grad_() for name in ("z_BD", "rows_FD", "exponent", "log_gain")
    }
    assert terms.bias_F is not None
    bias_F, decoder_FD = terms.bias_F.clone().requires_grad_(), decoder_FD.clone().requires_grad_()
    terms = replace(terms, bias_F=bias_F, **leaves)
    value_E = kernel.entry_content(terms, entries) + kernel.at_feature(bias_F, entries)
    out_BD = kernel.decode(value_E, entries, decoder_FD, terms.n_tokens)
    torch.autograd.backward(out_BD.sin().sum() + value_E.square().sum())
    leaves |= {"bias": bias_F, "decoder": decoder_FD}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.long
@pytest.mark.parametrize("kind", FAMILY)
def test_gradients_match_dense_float64(kind: str, device: torch.device, triton_path: Kernel) -> None:
    terms = terms_of(kind, device, 17, 19, 15, seed=3)
    decoder_FD = torch.randn(15, 19, generator=torch.Generator().manual_seed(4)).to(device)
    entries, _ = triton_path.select_batch_topk(terms, 60)
    wanted = gradients(REFERENCE, in_double(terms), decoder_FD.double(), entries)
    found = gradients(triton_path, terms, decoder_FD, entries)
    for name in set(wanted) - ({"exponent", "log_gain"} if terms.plain else set()):
        error = (found[name].double() - wanted[name]).norm() / wanted[name].norm()
        assert float(error) < 1e-4, name


def test_no_entries(device: torch.device, triton_path: Kernel) -> None:
    terms = replace(terms_of("cosine", device, 5, 7, 6), bias_F=torch.full((6,), -100.0, device=device))
    entries, _ = triton_path.select_batch_topk(terms, 9)
    found = gradients(triton_path, terms, torch.ones(6, 7, device=device), entries)
    assert all(float(grad.abs().sum()) == 0.0 for grad in found.values())


@pytest.mark.long
def test_the_same_bits_twice(device: torch.device, triton_path: Kernel) -> None:
    """The order in which pairs are appended is not repeatable on a GPU; what is made of them is."""
    terms = terms_of("cosine_per_feature", device, 12, 9, 14, seed=2)
    answers = []
    for _ in range(2):
        entries, smallest = triton_path.select_batch_topk(terms, 40)
        grads = gradients(triton_path, terms, terms.rows_FD, entries)
        answers.append((smallest, entries.token_E, entries.feature_E, *grads.values()))
    for one, other in zip(*answers, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_prepared_rows_are_for_the_same_state_only(device: torch.device, triton_path: Kernel) -> None:
    from cosae.kernels.triton import rows as triton_rows

    weight = torch.nn.Parameter(torch.randn(6, 5, device=device))
    rows = triton_rows.unit_rows(weight.detach(), 1e-12, torch.bfloat16)
    cache = StepCache()
    cache.leave_rows(weight, rows)
    assert triton_rows.prepared(cache, weight.detach(), torch.bfloat16) is rows
    assert triton_rows.prepared(cache, weight.detach(), torch.float32) is None
    assert triton_rows.prepared(cache, weight.detach()[:3], torch.bfloat16) is None
    with torch.no_grad():
        weight.mul_(2.0)
    assert triton_rows.prepared(cache, weight.detach(), torch.bfloat16) is None
    assert triton_rows.left(cache, weight, torch.bfloat16) is rows
    assert triton_rows.left(cache, weight, torch.float32) is not rows


def test_where_it_cannot_run_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(CosaeError, match=r"triton .*not on a CUDA device"):
        choose("triton", "cpu")
    with pytest.raises(CosaeError, match="float32 and the SAE is float64"):
        choose("triton", "cuda", torch.float64)
