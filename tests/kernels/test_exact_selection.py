"""Hard batches × every selection × every score × every path: the entries and values are the dense fp32 definition's.

Where two scores agree to float32 rounding a dense product, which sums in another order, may rank them the other way
round: entries may differ only where their float64 score is that close to what decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cosae.kernels import Entries, Kernel, ScoreTerms, choose, reference
from cosae.kernels.cpu import native
from cosae.kernels.select import search
from tests.support.score_worlds import FAMILY, make_terms

B, D, F = 29, 21, 47
CPU, REFERENCE = choose("cpu", "cpu"), choose("reference", "cpu")


@pytest.fixture(
    params=[(loops, name) for loops in ("compiled", "plain") for name in ("fp32", "bf16", "int8")], ids="-".join
)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are exact, if slow, on any processor: forced here."""
    loops, name = request.param
    monkeypatch.setenv("COSAE_SCREEN", name)
    monkeypatch.setattr(search, "DENSE_SHARE", 1)
    if loops == "plain":
        monkeypatch.setattr(native, "AVAILABLE", False)
    elif not native.AVAILABLE:
        pytest.skip("numba is not installed")


def _whole(terms: ScoreTerms) -> ScoreTerms:
    """Whole numbers from −1 to 1: most scores are equal to many others, to the bit."""
    draw = torch.Generator().manual_seed(1)
    z_BD, rows_FD = (torch.randint(-1, 2, (n, D), generator=draw).float() for n in (B, F))
    return replace(terms, z_BD=z_BD, rows_FD=rows_FD, bias_F=None)


def _with_zeros(terms: ScoreTerms) -> ScoreTerms:
    z_BD, rows_FD, live_B = terms.z_BD.clone(), terms.rows_FD.clone(), terms.live_B.clone()
    z_BD[3], z_BD[4], rows_FD[11] = 0.0, 0.0, 0.0
    live_B[4] = live_B[5] = False
    return replace(terms, z_BD=z_BD, rows_FD=rows_FD, live_B=live_B)


def _mixed_norms(terms: ScoreTerms) -> ScoreTerms:
    """Tokens of length 1e-4 to 1e4, rows of 1e-3 to 1e3."""
    token_B1, row_F1 = torch.logspace(-4, 4, B)[:, None], torch.logspace(-3, 3, F)[:, None]
    return replace(terms, z_BD=terms.z_BD * token_B1, rows_FD=terms.rows_FD * row_F1)


WORLDS: dict[str, Callable[[str], ScoreTerms]] = {
    "random": lambda kind: make_terms(kind, B, D, F, seed=20),
    "ties": lambda kind: _whole(make_terms(kind, B, D, F)),
    "twin rows": lambda kind: (t := make_terms(kind, B, D, F)) and replace(t, rows_FD=t.rows_FD[:1].repeat(F, 1)),
    "all negative": lambda kind: replace(make_terms(kind, B, D, F), bias_F=torch.full((F,), -1e4)),
    "few positive": lambda kind: replace(make_terms(kind, B, D, F, seed=21), bias_F=torch.full((F,), -3.0)),
    "one token": lambda kind: make_terms(kind, 1, D, F, seed=22),
    "one feature": lambda kind: make_terms(kind, B, D, 1, seed=23),
    "one of each": lambda kind: make_terms(kind, 1, 1, 1, seed=25),
    "huge norms": lambda kind: (t := make_terms(kind, B, D, F, seed=24)) and replace(t, z_BD=t.z_BD * 1e12),
    "tiny norms": lambda kind: (t := make_terms(kind, B, D, F, seed=24)) and replace(t, z_BD=t.z_BD * 1e-6),
    "mixed norms": lambda kind: _mixed_norms(make_terms(kind, B, D, F, seed=26)),
    "zero rows": lambda kind: _with_zeros(make_terms(kind, B, D, F, seed=27)),
    "large biases": lambda kind: make_terms(kind, B, D, F, seed=28, bias=1e4),
}


def exact(terms: ScoreTerms) -> Tensor:
    """(B, F) float64 scores, −inf where a token is not live."""
    wide = {name: getattr(terms, name).double() for name in ("z_BD", "rows_FD", "exponent", "log_gain")}
    return reference.scores(replace(terms, bias_F=None if terms.bias_F is None else terms.bias_F.double(), **wide))


def rounding(terms: ScoreTerms) -> Tensor:
    """(B, F) how far fp32 may be from the exact score: its length is that of |z||w| scaled, and of the bias."""
    along = torch.linalg.vector_norm(terms.z_BD, dim=-1)[:, None] * torch.linalg.vector_norm(terms.rows_FD, dim=-1)
    if not terms.plain:
        along = along * (terms.log_gain + (terms.exponent - 1.0) * terms.log_r_B[:, None]).exp()
        along = along / terms.row_norm_F if terms.row_power == 0 else along
    return 4e-6 * (along + (0.0 if terms.bias_F is None else terms.bias_F.abs()))


def check(terms: ScoreTerms, select: Callable[[Kernel], Entries], cut_BF: Tensor) -> None:
    """Same entries but at the cut (B, F); values of all agree with the definition's."""
    found, wanted = select(CPU), select(REFERENCE)
    for entries in (found, wanted):
        flat = entries.token_E * terms.n_features + entries.feature_E
        assert bool((flat.diff() > 0).all())
    masks = []
    for entries in (found, wanted):
        mask = torch.zeros(terms.n_tokens, terms.n_features, dtype=torch.bool)
        mask[entries.token_E, entries.feature_E] = True
        masks.append(mask)
    odd = masks[0] ^ masks[1]
    close = (exact(terms) - cut_BF).abs() <= 2 * rounding(terms)
    assert not bool((odd & ~close).any())
    assert abs(len(found) - len(wanted)) <= int((close & odd).sum())
    content_E, dense_BF = CPU.entry_content(terms, found), reference.content(terms)[found.token_E, found.feature_E]
    assert bool(((content_E - dense_BF).abs() <= 2 * rounding(terms)[found.token_E, found.feature_E]).all())


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("world", WORLDS)
def test_every_selection(world: str, kind: str) -> None:
    terms = WORLDS[world](kind)
    n, f = terms.n_tokens, terms.n_features
    score_BF = exact(terms)
    for n_keep in {1, max(1, n * f // 20), n * f}:
        smallest = REFERENCE.select_batch_topk(terms, n_keep)[1]
        cut_BF = torch.full((n, f), smallest, dtype=torch.float64)
        check(terms, lambda kernel, k=n_keep: kernel.select_batch_topk(terms, k)[0], cut_BF)
    for absolute in (False, True):
        for k in {1, min(4, f), f}:
            rank_BF = score_BF.abs() if absolute else score_BF.clamp_min(0.0)
            kth_B1 = torch.where(terms.live_B[:, None], rank_BF, 0.0).topk(k, dim=1).values[:, -1:]
            cut_BF = kth_B1 * score_BF.sign() if absolute else kth_B1.expand(n, f)
            check(terms, lambda kernel, k=k, absolute=absolute: kernel.select_topk(terms, k, absolute), cut_BF)
    middle = float(REFERENCE.select_batch_topk(terms, max(1, n * f // 10))[1])
    for threshold in (torch.tensor(0.0), torch.tensor(middle), middle * torch.linspace(-0.5, 2.0, f)):
        cut_BF = threshold.double().expand(n, f)
        check(terms, lambda kernel, t=threshold: kernel.select_above(terms, t), cut_BF)


@pytest.mark.usefixtures("_path")
def test_ties_between_whole_numbers_are_broken_as_stated() -> None:
    """Products of whole numbers are exact in any order: here the sets are equal, not only close."""
    terms = WORLDS["ties"]("inner")
    for select in (
        lambda kernel: kernel.select_batch_topk(terms, 100)[0],
        lambda kernel: kernel.select_topk(terms, 5),
        lambda kernel: kernel.select_topk(terms, 5, True),
        lambda kernel: kernel.select_above(terms, torch.tensor(3.0)),
    ):
        found, wanted = select(CPU), select(REFERENCE)
        assert torch.equal(found.token_E, wanted.token_E)
        assert torch.equal(found.feature_E, wanted.feature_E)


def test_a_carried_hint_is_a_low_mark() -> None:
    """It falls at once, rises slowly, and never lies far below the newest; without a past it is the newest."""
    assert search.carried(None, 2.0) == 2.0
    assert search.carried(2.0, None) is None
    assert search.carried(float("nan"), 2.0) == 2.0
    assert search.carried(2.0, 1.9) == 1.9
    assert search.carried(1.9, 2.0) == pytest.approx(1.9 * search.HINT_RISE)
    assert search.carried(1.0, 2.0) == pytest.approx(search.HINT_FALL * 2.0)
    assert search.carried(2.0, 0.0) == 0.0
