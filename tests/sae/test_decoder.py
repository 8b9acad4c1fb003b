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
    assert bool(grad_E.isfinite().all())


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
