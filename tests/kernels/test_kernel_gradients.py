"""Every gradient of the sparse path against float64 dense autograd of the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosae.kernels import Entries, Kernel, ScoreTerms, choose
from cosae.kernels.cpu import native, sums
from cosae.sae.model import SAE
from tests.support.score_worlds import FAMILY, make_terms

CPU, REFERENCE = choose("cpu", "cpu"), choose("reference", "cpu")


@pytest.fixture(params=["compiled", "plain"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(native, "AVAILABLE", False)
    elif not native.AVAILABLE:
        pytest.skip("numba is not installed")


def gradients(kernel: Kernel, terms: ScoreTerms, decoder_FD: Tensor, n_keep: int) -> dict[str, Tensor]:
    """Gradients of a smooth loss of the reconstruction, every parameter a leaf; entries from the fp64 definition."""
    names = ("z_BD", "rows_FD", "exponent", "log_gain")
    leaves = {name: getattr(terms, name).clone().requires_grad_() for name in names}
    bias_F = terms.bias_F.clone().requires_grad_()
    decoder_FD = decoder_FD.clone().requires_grad_()
    terms = replace(terms, bias_F=bias_F, **leaves)
    entries, _ = kernel.select_batch_topk(terms, n_keep)
    value_E = kernel.entry_content(terms, entries) + kernel.at_feature(bias_F, entries)
    out_BD = kernel.decode(value_E, entries, decoder_FD, terms.n_tokens)
    (out_BD.sin().sum() + value_E.square().sum()).backward()
    leaves |= {"bias": bias_F, "decoder": decoder_FD}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_match_dense_float64(kind: str, dtype: torch.dtype) -> None:
    terms = make_terms(kind, seed=3, dtype=torch.float64)
    decoder_FD = torch.randn(53, 19, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wanted = gradients(REFERENCE, terms, decoder_FD, 90)
    found = gradients(CPU, make_terms(kind, seed=3, dtype=dtype), decoder_FD.to(dtype), 90)
    names = set(wanted) - ({"exponent", "log_gain"} if terms.plain else set())
    assert names <= set(found)
    for name in names:
        assert found[name].dtype == dtype
        assert relative_error(found[name], wanted[name]) < (1e-4 if dtype == torch.float32 else 1e-10), name


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("owner", ["shared", "feature"])
@pytest.mark.parametrize("centre_only", [False, True])
def test_values_and_their_gradients_match_dense_float64(owner: str, centre_only: bool) -> None:
    """r^δ · s, with what flows to z through r; one row's z is below the clamp of r."""
    draw = torch.Generator().manual_seed(11)
    power = 0.2 + torch.rand(() if owner == "shared" else (53,), generator=draw, dtype=torch.float64)
    answers = []
    for kernel, dtype in ((REFERENCE, torch.float64), (CPU, torch.float32), (CPU, torch.float64)):
        terms = make_terms("cosine_per_feature", seed=12, dtype=torch.float64)
        terms.z_BD[4] *= 1e-12
        terms = replace(make_terms("cosine_per_feature", seed=12, dtype=dtype), z_BD=terms.z_BD.to(dtype))
        entries, _ = kernel.select_batch_topk(terms, 200)
        score_E = kernel.entry_content(terms, entries).detach()
        leaves = [x.to(dtype).clone().requires_grad_() for x in (score_E, terms.z_BD, power)]
        terms = replace(terms, z_BD=leaves[1], value_exponent=leaves[2], centre_only=centre_only)
        value_E = kernel.entry_values(terms, entries, leaves[0])
        (value_E.square() * torch.linspace(1, 2, len(value_E), dtype=dtype)).sum().backward()
        grads = [leaf.grad for leaf in leaves]
        if centre_only:
            grads[1] = grads[1].sum(0)
        answers.append((value_E.detach(), *grads))
    for found, tolerance in zip(answers[1:], (1e-4, 1e-12), strict=True):
        for one, wanted in zip(found, answers[0], strict=True):
            assert float(wanted.norm()) > 0
            assert relative_error(one, wanted) < tolerance
    plain = replace(terms, value_exponent=None)
    assert CPU.entry_values(plain, entries, score_E) is REFERENCE.entry_values(plain, entries, score_E) is score_E


@pytest.mark.parametrize("owner", ["shared", "feature"])
def test_values_pass_gradcheck(owner: str) -> None:
    """Against finite differences in float64, the frame's z being x − c."""
    draw = torch.Generator().manual_seed(13)
    terms = make_terms("cosine", n_tokens=5, width=4, n_features=7, seed=14, dtype=torch.float64)
    entries, _ = CPU.select_batch_topk(terms, 12)
    power = torch.rand(() if owner == "shared" else (7,), generator=draw, dtype=torch.float64) + 0.2

    def values(x_BD: Tensor, rows_FD: Tensor, power: Tensor) -> Tensor:
        mine = replace(terms, z_BD=x_BD, rows_FD=rows_FD, value_exponent=power)
        return CPU.entry_values(mine, entries, CPU.entry_content(mine, entries))

    leaves = [x.clone().requires_grad_() for x in (terms.z_BD, terms.rows_FD, power)]
    assert torch.autograd.gradcheck(values, leaves)


def test_row_gradient_has_its_radial_part() -> None:
    """Where rows count by direction only, the gradient is orthogonal to the row: breaking the pull term shows here."""
    terms = make_terms("cosine", seed=5)
    grad_FD = gradients(CPU, terms, torch.randn(53, 19, generator=torch.Generator().manual_seed(6)), 200)["rows_FD"]
    along_F = (grad_FD * terms.rows_FD).sum(-1) / terms.rows_FD.norm(dim=-1)
    assert float(along_F.abs().max()) < 1e-4 * float(grad_FD.norm(dim=-1).max())


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("kind", ["inner", "cosine", "cosine_per_feature"])
def test_centre_only_keeps_the_column_sum(kind: str) -> None:
    terms = make_terms(kind, seed=7)
    decoder_FD = torch.randn(53, 19, generator=torch.Generator().manual_seed(8))
    full = gradients(CPU, terms, decoder_FD, 90)["z_BD"].sum(0)
    short = gradients(CPU, replace(terms, centre_only=True), decoder_FD, 90)["z_BD"].sum(0)
    assert relative_error(short, full.double()) < 1e-5


@pytest.mark.usefixtures("loops")
def test_no_entries_give_zero_gradients() -> None:
    terms = replace(make_terms("cosine", bias=0.0), bias_F=torch.full((53,), -100.0))
    found = gradients(CPU, terms, torch.ones(53, 19), 90)
    assert all(float(grad.abs().sum()) == 0.0 for grad in found.values())


def test_remembered_products_are_dropped_when_rows_change() -> None:
    """Selection leaves its products with the entries; an edit in place of the rows must not be served from them."""
    terms = make_terms("cosine", seed=9)
    entries, _ = CPU.select_batch_topk(terms, 60)
    with torch.no_grad():
        terms.rows_FD.neg_()
    found, wanted = CPU.entry_content(terms, entries), REFERENCE.entry_content(terms, entries)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert float(found.max()) < 0


def test_remembered_products_are_dropped_for_another_batch() -> None:
    """A new batch may be given the memory of the old one; entries kept from the old must be computed anew."""
    rows_FD = make_terms("cosine", seed=9).rows_FD
    kept = []
    for seed in range(30):
        terms = replace(make_terms("cosine", seed=seed), rows_FD=rows_FD)
        for entries in kept:
            found, wanted = CPU.entry_content(terms, entries), REFERENCE.entry_content(terms, entries)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        kept.append(CPU.select_batch_topk(terms, 60)[0])


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squared_errors_match_autograd(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(6)
    z_BD, recon_BD = (torch.randn(23, 17, generator=draw, dtype=torch.float64) for _ in range(2))
    weight_B = torch.randn(23, generator=draw, dtype=torch.float64)
    answers = []
    for kernel, kind in ((REFERENCE, torch.float64), (CPU, dtype)):
        leaves = [x.to(kind).clone().requires_grad_() for x in (z_BD, recon_BD)]
        error_B = kernel.squared_errors(*leaves)
        (error_B * weight_B.to(kind)).sum().backward()
        answers.append((error_B.detach(), *(leaf.grad for leaf in leaves)))
    for wanted, found in zip(*answers, strict=True):
        assert relative_error(found, wanted) < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("score", ["inner", "cosine", "cosine_per_feature"])
def test_the_centre_learns_from_sums_alone(score: str) -> None:
    """With x fixed the centre's gradient is made of column sums; it equals float64 dense autograd's."""
    x_BD = torch.randn(64, 16, generator=torch.Generator().manual_seed(7)) + 1.0
    found = {}
    for kernel, dtype in (("reference", torch.float64), ("cpu", torch.float32)):
        sae = SAE.build(d_in=16, d_sae=200, score=score, k=4, seed=0, sample=x_BD, kernel=kernel).to(dtype)
        output = sae.train_forward(x_BD.to(dtype))
        (output.error[0] * torch.linspace(0.5, 2.0, 64, dtype=dtype)).sum().backward()
        found[kernel] = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    assert any("centre" in name for name in found["cpu"])
    for name, wanted in found["reference"].items():
        assert relative_error(found["cpu"][name], wanted) < 1e-4, name


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.layout == torch.strided:
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.itemsize)
        return out


@pytest.mark.parametrize("width", [21, 64])
def test_plain_dots_copy_no_rows(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without numba each entry's dot is taken where its rows lie; equal rows get equal dots, wherever that is."""
    monkeypatch.setattr(native, "AVAILABLE", False)
    draw = torch.Generator().manual_seed(0)
    x_BD, rows_FD = torch.randn(40, width, generator=draw), torch.randn(50, width, generator=draw)
    rows_FD[::2], x_BD[::3] = rows_FD[0].clone(), x_BD[0].clone()
    token_E, feature_E = (torch.rand(40, 50, generator=draw) < 0.7).nonzero(as_tuple=True)
    entries = Entries(token_E, feature_E)
    sums.entry_dots(x_BD, rows_FD, entries)
    with Largest() as seen:
        dot_E = sums.entry_dots(x_BD, rows_FD, entries)
    assert seen.numbers <= max(len(entries), x_BD.numel(), rows_FD.numel())
    exact_E = (x_BD.double() @ rows_FD.double().T)[token_E, feature_E]
    torch.testing.assert_close(dot_E.double(), exact_E, rtol=1e-5, atol=1e-5)
    twins = dot_E[(token_E % 3 == 0) & (feature_E % 2 == 0)]
    assert len(twins) > 100
    assert len(twins.unique()) == 1
    monkeypatch.setattr(sums, "_sampled_products_serve", lambda: False)
    torch.testing.assert_close(sums.entry_dots(x_BD, rows_FD, entries), dot_E, rtol=1e-5, atol=1e-5)
