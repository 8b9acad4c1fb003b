"""The screen's margin, attacked: inputs chosen so that rounding to bf16 hides an entry, if anything can."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosae.kernels import ScoreTerms, reference
from cosae.kernels.cpu import native
from cosae.kernels.select import screen, search, survivors
from cosae.kernels.select.pick import FORMATS, PRODUCTS
from cosae.kernels.terms import R_MIN, ROW_MIN
from tests.support.score_worlds import FAMILY, aligned, in_double, make_terms

U_BF16 = 2.0**-8


def bound(terms: ScoreTerms, threshold_F: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, F) in token order: whether the screen keeps an entry, and whether its float64 score is above threshold."""
    tokens = screen.prepare_tokens(terms, dtype)
    norm_F = screen.row_norms(terms.rows_FD)
    rows = screen.prepare_rows(terms.rows_FD, norm_F, dtype, tokens.stretch)
    base, slope = screen.lines(terms, tokens, threshold_F, norm_F)
    product = (rows.factor_RD.to(PRODUCTS[dtype]) @ tokens.factor_BD.T.to(PRODUCTS[dtype])).float()
    top = product + product.abs() * U_BF16 if dtype == torch.bfloat16 else product
    which = torch.repeat_interleave(tokens.edge_N1.diff())
    loss_F = torch.zeros_like(norm_F) if rows.loss_R is None else rows.loss_R
    bounds = (tokens.unit, tokens.delta, tokens.margin)
    unit_B, delta_B, margin_B = (x[which] if tokens.level else x for x in bounds)
    limit = (base.T[:, which] - loss_F[:, None]) * unit_B + slope.T[:, which] * delta_B - margin_B
    kept = ~(top <= rows.scale_R[:, None] * limit)
    in_order = torch.empty_like(kept)
    in_order[:, tokens.position_B] = kept
    exact = reference.scores(in_double(terms))
    return in_order.T, exact > threshold_F.double()


@settings(max_examples=60)
@given(
    kind=st.sampled_from(FAMILY),
    seed=st.integers(0, 10_000),
    width=st.sampled_from([1, 2, 7, 64, 300]),
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    bias=st.sampled_from([None, 0.1, 100.0]),
    rank=st.floats(0.0, 1.0),
    dtype=st.sampled_from(list(FORMATS.values())),
)
def test_nothing_above_the_threshold_is_lost(
    kind: str, seed: int, width: int, spread: float, bias: float | None, rank: float, dtype: torch.dtype
) -> None:
    """Thresholds set just below some entry's score, positive or negative, on random inputs of any scale."""
    terms = make_terms(kind, 23, width, 31, seed, bias, spread)
    exact = reference.scores(in_double(terms)).reshape(-1).sort().values
    cut = float(exact[int(rank * (len(exact) - 1))])
    threshold_F = torch.full((31,), cut - 1e-6 * abs(cut))
    kept, wanted = bound(terms, threshold_F, dtype)
    assert not bool((wanted & ~kept).any())


@pytest.mark.parametrize("side", [1.0, -1.0])
@pytest.mark.parametrize("width", [4, 64, 512])
def test_rounding_boundaries_cannot_hide_an_entry(width: int, side: float) -> None:
    """Both factors round the same way in every coordinate: the product's error is as large as it gets."""
    z_BD, signs = aligned(16, width, 1, side), aligned(16, width, 2, side)
    rows_FD = z_BD.sign() * signs.abs()
    terms = replace(make_terms("inner_unit", 16, width, 16, bias=None), z_BD=z_BD, rows_FD=rows_FD)
    for i in range(16):
        exact = float(reference.scores(in_double(terms))[i, i])
        kept, _ = bound(terms, torch.full((16,), exact * (1 - 1e-6)), torch.bfloat16)
        assert bool(kept[i, i])


def test_margin_is_needed_and_tight() -> None:
    """Without the margin entries are lost (so the test above can fail); with it, it stays within 2 units of bf16."""
    z_BD = aligned(16, 64, 1, 1.0)
    rows_FD = z_BD.sign() * aligned(16, 64, 2, 1.0).abs()
    unit_z, error_B, _ = screen.rounded(z_BD, 1.0 / screen.norms(z_BD, R_MIN), torch.bfloat16)
    unit_w, error_F, _ = screen.rounded(rows_FD, 1.0 / screen.norms(rows_FD, ROW_MIN), torch.bfloat16)
    exact = (
        torch.nn.functional.normalize(z_BD.double(), dim=-1) @ torch.nn.functional.normalize(rows_FD.double(), dim=-1).T
    )
    lost = exact - unit_z.double() @ unit_w.double().T
    allowed = error_B[:, None] + 1.01 * error_F
    assert bool((lost.abs() <= allowed + 1e-6).all())
    assert float(lost.abs().max()) > 0.1 * float(allowed.max())
    assert float(allowed.max()) < 2.1 * U_BF16


def outlying(seed: int, width: int, kind: str) -> tuple[Tensor, Tensor]:
    """Tokens and rows that int8 steps suit badly: zero rows, denormals, outlier dimensions, one coordinate alone, norms
    from 1e-30 to 1e15, ties."""
    draw = torch.Generator().manual_seed(seed)
    z_BD, rows_FD = (torch.randn(n, width, generator=draw) for n in (19, 23))
    if kind == "outlier dimension":
        z_BD[:, seed % width] *= 200.0
        rows_FD[:, (seed + 1) % width] *= 50.0
    elif kind == "zero and denormal":
        z_BD[::3], rows_FD[::4] = 0.0, 0.0
        z_BD[1::3] *= 1e-39
        rows_FD[1::4] *= 1e-39
    elif kind == "any norm":
        z_BD *= torch.logspace(-12, 15, 19)[:, None]
        rows_FD *= torch.logspace(-15, 15, 23)[:, None]
    elif kind == "one coordinate":
        z_BD = torch.eye(width)[torch.arange(19) % width] * torch.linspace(0.1, 9, 19)[:, None]
    elif kind == "ties":
        z_BD, rows_FD = z_BD.sign(), rows_FD.sign()
    elif kind == "half steps":  # every coordinate lies between two steps
        z_BD, rows_FD = ((x * 30).round().clamp(-126, 126) + 0.5 for x in (z_BD, rows_FD))
        z_BD[:, 0], rows_FD[:, 0] = 127.0, 127.0
    return z_BD, rows_FD


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    width=st.sampled_from([1, 2, 7, 64, 300]),
    kind=st.sampled_from(
        ["outlier dimension", "zero and denormal", "any norm", "one coordinate", "ties", "half steps"]
    ),
    score=st.sampled_from(["inner", "inner_unit", "cosine_per_feature"]),
    loops=st.booleans(),
    rank=st.floats(0.0, 1.0),
)
def test_int8_errors_stay_within_their_bound_on_inputs_that_suit_it_badly(
    seed: int, width: int, kind: str, score: str, loops: bool, rank: float
) -> None:
    """The measured lengths bound what a product of whole steps misses, and no entry above its threshold is lost."""
    z_BD, rows_FD = outlying(seed, width, kind)
    terms = replace(make_terms(score, 19, width, 23, seed, None), z_BD=z_BD, rows_FD=rows_FD)
    with pytest.MonkeyPatch.context() as patch:
        if not loops:
            patch.setattr(native, "AVAILABLE", False)
        by_B, norm_F = 1.0 / screen.norms(z_BD, R_MIN), screen.norms(rows_FD, ROW_MIN)
        short_z, error_B, step_B = screen.rounded(z_BD, by_B, torch.int8)
        short_w, error_F, step_F = screen.rounded(rows_FD, torch.ones(23), torch.int8)
        exact_BF = (z_BD.double() * by_B[:, None].double()) @ (rows_FD.double() / norm_F[:, None].double()).T
        steps_BF = step_B[:, None].double() * step_F.double() / norm_F.double()
        missed_BF = (short_z.double() @ short_w.double().T) * steps_BF - exact_BF
        allowed_BF = error_B[:, None] + 1.01 * (1 + error_B[:, None]) * error_F / norm_F
        assert bool((missed_BF.abs() <= allowed_BF + 1e-6).all())
        score_BF = reference.scores(in_double(terms))
        cut = float(score_BF.flatten().sort().values[int(rank * (score_BF.numel() - 1))])
        kept, wanted = bound(terms, torch.full((23,), cut - 1e-6 * abs(cut)), torch.int8)
        assert not bool((wanted & ~kept).any())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_rows_are_rounded_alike_by_both_paths(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.AVAILABLE:
        pytest.skip("numba is not installed")
    draw = torch.Generator().manual_seed(0)
    x_RD, by_R, place_R = (
        scale * torch.randn(9, 33, generator=draw),
        torch.rand(9, generator=draw),
        torch.arange(8, -1, -1),
    )
    x_RD[3] = 0.0
    compiled = (screen.norms(x_RD, R_MIN), *screen.rounded(x_RD, by_R, torch.bfloat16, place_R))
    monkeypatch.setattr(native, "AVAILABLE", False)
    plain = (screen.norms(x_RD, R_MIN), *screen.rounded(x_RD, by_R, torch.bfloat16, place_R))
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-6, atol=0)
    assert torch.equal(compiled[1], plain[1])
    assert torch.equal(compiled[1], (x_RD[place_R] * by_R[:, None]).bfloat16())
    torch.testing.assert_close(compiled[2], plain[2], rtol=1e-2, atol=0)


@pytest.mark.parametrize("scale", [1e-33, 1.0, 1e15])
def test_rows_go_to_the_same_steps_by_both_paths(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to one step where a coordinate lies between two."""
    if not native.AVAILABLE:
        pytest.skip("numba is not installed")
    draw = torch.Generator().manual_seed(0)
    x_RD, place_R = scale * torch.randn(9, 33, generator=draw), torch.arange(8, -1, -1)
    x_RD[3] = 0.0
    compiled = screen.rounded(x_RD, torch.ones(9), torch.int8, place_R)
    monkeypatch.setattr(native, "AVAILABLE", False)
    plain = screen.rounded(x_RD, torch.ones(9), torch.int8, place_R)
    assert int((compiled[0].int() - plain[0].int()).abs().max()) <= 1
    assert int(compiled[0].abs().max()) == (127 if scale > screen.STEP_MIN else 0)
    assert torch.equal(compiled[2], plain[2])
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", FORMATS.values())
@pytest.mark.parametrize("norm", [1e18, 3e18])
def test_rows_of_any_length_are_screened(norm: float, dtype: torch.dtype) -> None:
    """Rows longer than RAW_MAX are normalised first; their chunk loses nothing either."""
    terms = make_terms("cosine", 23, 16, 31, seed=5, bias=None)
    terms = replace(terms, rows_FD=terms.rows_FD * torch.where(torch.arange(31) == 4, norm, 1.0)[:, None])
    assert bool(screen.prepare_rows(terms.rows_FD, screen.row_norms(terms.rows_FD), dtype).scale_R.max() < 1e4)
    exact_BF = reference.scores(in_double(terms))
    kept, wanted = bound(terms, (0.9 * exact_BF.amax(0)).float(), dtype)
    assert bool(wanted.any())
    assert not bool((wanted & ~kept).any())


@pytest.mark.parametrize("dtype", FORMATS.values())
@pytest.mark.parametrize("kind", ["inner", "cosine"])
def test_one_giant_token_does_not_blunt_the_screen(kind: str, dtype: torch.dtype) -> None:
    """A sink has a bin of its own: what passes of the other tokens stays near what is above the threshold."""
    terms = make_terms(kind, 256, 128, 512, seed=1, bias=None, spread=0.3)
    terms.z_BD[17] *= 300.0
    exact_BF = reference.scores(in_double(terms))
    threshold = float(exact_BF.flatten().sort().values[-2048])
    kept, wanted = bound(terms, torch.full((512,), threshold), dtype)
    assert not bool((wanted & ~kept).any())
    assert int(kept.sum()) < 1.6 * int(wanted.sum())


def test_search_passes_few_more_than_wanted() -> None:
    """The point of the screen: with a carried hint at most 1.6 times the wanted entries are ever stored."""
    terms = make_terms("cosine", 256, 128, 2048, seed=0, bias=None)
    _, hint = search.select_batch_topk(terms, 8 * 256)
    answer = survivors.survivors(terms, torch.full((2048,), search.HINT_SHARE * hint), 8 * 256 * 2)
    assert answer is not None
    assert 8 * 256 <= len(answer) < 1.6 * 8 * 256


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"log_gain": torch.tensor(90.0)}, "scale"),
        ({"log_gain": torch.tensor(math.nan)}, "scale"),
        ({"z_BD": torch.zeros(0, 19), "live_B": torch.zeros(0, dtype=torch.bool)}, "nothing"),
    ],
)
def test_what_is_not_served_is_said(change: dict[str, Tensor], reason: str) -> None:
    message = screen.unserved(replace(make_terms("cosine"), **change))
    assert message is not None
    assert reason in message


@settings(max_examples=60)
@given(
    kind=st.sampled_from(FAMILY),
    seed=st.integers(0, 10_000),
    width=st.sampled_from([3, 16, 130]),
    side=st.sampled_from([1.0, -1.0]),
    bias=st.sampled_from([None, 1.0, 1e3]),
    rank=st.floats(0.0, 1.0),
    loops=st.booleans(),
    name=st.sampled_from(["bf16", "int8"]),
)
def test_the_search_itself_loses_nothing(
    kind: str, seed: int, width: int, side: float, bias: float | None, rank: float, loops: bool, name: str
) -> None:
    """The whole path, both ways of it, on coordinates next to rounding boundaries; a threshold per feature, each
    just below one of its own scores."""
    z_BD, rows_FD = aligned(19, width, seed, side), aligned(23, width, seed + 1, side)
    rows_FD[:19] = z_BD.sign() * rows_FD[:19].abs()
    terms = replace(make_terms(kind, 19, width, 23, seed, bias), z_BD=z_BD, rows_FD=rows_FD)
    exact_BF = reference.scores(in_double(terms))
    cut_F = exact_BF.sort(dim=0).values[int(rank * 18)]
    threshold_F = (cut_F - 4e-6 * (cut_F.abs() + exact_BF.abs().amax(0))).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSAE_SCREEN", name)
        if not loops:
            patch.setattr(native, "AVAILABLE", False)
        found = survivors.survivors(terms, threshold_F, 19 * 23 * 2)
    assert found is not None
    kept_BF = torch.zeros(19, 23, dtype=torch.bool)
    kept_BF[found.token_S, torch.repeat_interleave(found.count_F)] = True
    wanted_BF = exact_BF > threshold_F.double() + 2e-6 * (threshold_F.abs() + exact_BF.abs().amax(0))
    assert bool(wanted_BF.any())
    assert not bool((wanted_BF & ~kept_BF).any())
