"""Decoder: prefixes as sums by hand, restored lengths, and the frames that put things back."""

from __future__ import annotations

import pytest
import torch

from cosae import SAE

D, F = 7, 20


@torch.no_grad()
def make_sae(**named: object) -> SAE:
    sae = SAE.build(D, F, "inner", "topk", 6, 2, **named)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(1)
    sae.decoder.rows_FD.mul_(torch.rand(F, 1, generator=draw) + 0.5)
    sae.centre_D.copy_(torch.randn(D, generator=draw))
    return sae


def test_each_prefix_is_the_sum_over_its_features() -> None:
    sae = make_sae(prefixes=(1, 5, 12))
    x_BD = torch.randn(9, D, generator=torch.Generator().manual_seed(2))
    output = sae.train_forward(x_BD)
    entries, value_E = output.selection.entries, output.selection.value_E
    assert len(output.recon) == 4
    for prefix, found_BD in zip((1, 5, 12, F), output.recon, strict=True):
        wanted_BD = torch.zeros(9, D)
        for token, feature, value in zip(entries.token_E, entries.feature_E, value_E.detach(), strict=True):
            if feature < prefix:
                wanted_BD[token] += value * sae.W_dec[feature].detach()
        torch.testing.assert_close(found_BD.detach(), wanted_BD, rtol=1e-5, atol=1e-6)


def test_decode_gives_the_last_prefix() -> None:
    x_BD = torch.randn(9, D, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(make_sae(prefixes=(3, 9))(x_BD), make_sae()(x_BD), rtol=1e-5, atol=1e-6)


def test_early_prefixes_learn_from_every_later_one() -> None:
    """Feature 0 is in all prefixes, the last feature in one: rows get as many gradients."""
    sae = make_sae(prefixes=(4, 10))
    x_BD = torch.randn(30, D, generator=torch.Generator().manual_seed(3))
    output = sae.train_forward(x_BD)
    grads = [torch.autograd.grad(r.sum(), sae.decoder.rows_FD, retain_graph=True)[0] for r in output.recon]
    for prefix, grad_FD in zip((4, 10, F), grads, strict=True):
        assert not grad_FD[prefix:].any()
        assert bool(grad_FD[:prefix].any())
    assert torch.equal(grads[0][:4], grads[2][:4])


def test_norm_restoring_ignores_row_lengths_and_code_scale() -> None:
    """u · r / |u| keeps directions only: rows of other lengths and codes times a factor reconstruct the same."""
    sae, other = make_sae(norm_restoring=True), make_sae(norm_restoring=True)
    with torch.no_grad():
        other.decoder.rows_FD.mul_(torch.rand(F, 1, generator=torch.Generator().manual_seed(9)) + 0.1)
    x_BD = torch.randn(9, D, generator=torch.Generator().manual_seed(2))
    codes = sae.encode(x_BD)
    torch.testing.assert_close(other.decode(codes), sae.decode(codes), rtol=1e-5, atol=1e-5)
    scaled = codes.with_values(codes.value_E * 3)
    torch.testing.assert_close(sae.decode(scaled), sae.decode(codes), rtol=1e-5, atol=1e-5)
    lengths = (sae(x_BD) - sae.b_dec).norm(dim=-1)
    torch.testing.assert_close(lengths, (x_BD - sae.b_dec).norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_norm_restoring_gradient_is_tangential() -> None:
    """|ẑ| is fixed, so ∂ẑ/∂codes has no part along ẑ; a token without codes passes nothing and no NaN."""
    sae = make_sae(norm_restoring=True)
    codes = sae.encode(torch.randn(9, D, generator=torch.Generator().manual_seed(2)))
    value_E = codes.value_E.detach().clone().requires_grad_()
    recon_BD = sae.decode(codes.with_values(value_E)) - sae.b_dec
    (grad_E,) = torch.autograd.grad(recon_BD.square().sum(), value_E, retain_graph=True)
    assert float(grad_E.abs().max()) < 1e-4 * float(recon_BD.detach().square().sum())
    none = sae.decode(codes.with_values(value_E * 0))
    assert torch.equal(none, sae.b_dec.expand(9, -1))
    (grad_E,) = torch.autograd.grad(none.sum(), value_E)
    assert not grad_E.any()


def window_sae(kernel: str, dtype: torch.dtype) -> SAE:
    """Two features along the axes, JumpReLU with θ = 1 and a window of (0.5, 1.5)."""
    sae = SAE.build(2, 2, "inner", "jumprelu", 1, 0, norm_restoring=True, bandwidth=1.0, kernel=kernel, dtype=dtype)
    with torch.no_grad():
        for parameter in (sae.score.rows_FD, sae.decoder.rows_FD):
            parameter.copy_(torch.tensor([[1.0, 0.1], [0.2, 1.0]]))
        sae.selector.log_threshold_F.zero_()
    return sae


def gradients(sae: SAE, x_BD: torch.Tensor) -> dict[str, torch.Tensor]:
    sae.zero_grad()
    torch.stack([error_B.sum() for error_B in sae.train_forward(x_BD).error]).sum().backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_whose_entries_are_worth_nothing_passes_no_gradient_through_the_division(
    kernel: str, dtype: torch.dtype
) -> None:
    """Its only entries lie in θ's window below θ, so u = 0: it teaches θ and the rows nothing, instead of 1e8 times r;
    only its own length reaches the centre. A token with codes beside it learns as it would alone."""
    sae = window_sae(kernel, dtype)
    x_BD = torch.tensor([[2.0, 0.9], [0.1, 0.8]], dtype=dtype)
    output = sae.train_forward(x_BD)
    assert output.selection.entries.token_E[output.selection.value_E == 0].tolist() == [1]
    assert not output.recon[-1][1].any()
    both, first = gradients(sae, x_BD), gradients(sae, x_BD[:1])
    exact = gradients(window_sae("reference", torch.float64), x_BD[:1].double())
    assert float(both["selector.log_threshold_F"].abs().max()) > 0.01
    for name in ("selector.log_threshold_F", "score.rows_FD", "decoder.rows_FD"):
        torch.testing.assert_close(both[name], first[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(first[name].double(), exact[name], rtol=1e-5, atol=1e-6)
    assert max(float(grad.abs().max()) for grad in both.values()) < 100


def test_norm_restoring_leaves_a_shared_exponent_only_what_passes_through_the_biases() -> None:
    """ẑ does not change with |u|, and r^a exp(b) is a factor of |u|: without biases ∂L/∂a = ∂L/∂b = 0 whatever the
    tokens (docs/sae.md); of an exponent for each feature something is left."""
    x_BD = torch.randn(50, D, generator=torch.Generator().manual_seed(4)).double()
    x_BD = x_BD * torch.linspace(-2, 2, 50).exp()[:, None].double()
    found = {}
    for score in ("cosine", "cosine_per_feature"):
        sae = SAE.build(
            D, F, score, "batch_topk", 6, 2, norm_restoring=True, kernel="reference", dtype=torch.float64, sample=x_BD
        )
        for bias in (0.0, 0.3):
            with torch.no_grad():
                sae.score.bias_F.copy_(bias * torch.linspace(-1, 1, F))
            found[score, bias] = float(gradients(sae, x_BD)["score.exponent"].abs().max())
    assert found["cosine", 0.0] < 1e-12 * found["cosine_per_feature", 0.0]
    assert found["cosine", 0.3] > 1e-3


@pytest.mark.parametrize("frame", ["unit", "layer_norm"])
def test_frames_forget_scale_and_put_it_back(frame: str) -> None:
    """x̂(αx) = α x̂(x): around c in unit, with any shift as well in layer_norm. Codes do not move."""
    sae = make_sae(frame=frame)
    x_BD = torch.randn(9, D, generator=torch.Generator().manual_seed(2)) + 0.3
    c_D = sae.b_dec.detach()
    scaled_BD = c_D + 5 * (x_BD - c_D) if frame == "unit" else 5 * x_BD + 2
    torch.testing.assert_close(sae.encode(scaled_BD).to_dense(), sae.encode(x_BD).to_dense(), rtol=1e-4, atol=1e-4)
    wanted_BD = c_D + 5 * (sae(x_BD) - c_D) if frame == "unit" else 5 * sae(x_BD) + 2
    torch.testing.assert_close(sae(scaled_BD), wanted_BD, rtol=1e-4, atol=1e-3)
