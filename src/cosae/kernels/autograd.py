"""Content, lookup and decoding of chosen entries, with backward passes over active entries only.

The formulas stand here once; a path brings its own sums over entries (`Sums`). Each function's definition is its twin
in `reference`. Backward passes, with δ = ∂L/∂content_e,
content = ⟨z_b, w_i⟩·σ_e, σ_e = exp(log_gain_i + (a_i − 1) ln r_b)·|w_i|^{u−1} (paper §1 "Gradients"):

    ∂L/∂w_i = Σ_e δσ z_b − [u = 0] (Σ_e δ·content)/|w_i|² · w_i      the radial part is a sum, not a pass
    ∂L/∂z_b = Σ_e δσ w_i + (Σ_e δ·content·(a_i − 1))/r_b² · z_b
    ∂L/∂log_gain_i = Σ_e δ·content          ∂L/∂a_i = Σ_e δ·content·ln r_b

and of values v_e = r_b^{p_i} · s_e, with δ = ∂L/∂v_e:

    ∂L/∂s_e = δ r_b^{p_i}     ∂L/∂p_i = Σ_e δ v_e ln r_b     ∂L/∂z_b = (Σ_e δ v_e p_i)/r_b² · z_b
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosae.kernels.deterministic import total
from cosae.kernels.terms import R_MIN, ROW_MIN, Entries, ScoreTerms


class Sums(Protocol):
    """Sums over active entries; `sums` says what each function means."""

    def entry_dots(self, x_BD: Tensor, rows_FD: Tensor, entries: Entries) -> Tensor: ...
    def token_sums(self, value_E: Tensor, rows_FD: Tensor, entries: Entries, n_tokens: int) -> Tensor: ...
    def feature_sums(
        self, value_E: Tensor, x_BD: Tensor, entries: Entries, rows_FD: Tensor, pull_F: Tensor | None = None,
        total: bool = False,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def feature_sums_and_dots(
        self, value_E: Tensor, x_BD: Tensor, entries: Entries, rows_FD: Tensor
    ) -> tuple[Tensor, Tensor]: ...
    def squared_errors(self, x_BD: Tensor, y_BD: Tensor) -> Tensor: ...
    def scaled_gaps(self, x_BD: Tensor, y_BD: Tensor, scale_B: Tensor) -> Tensor: ...
    def entries_by_feature_sum(self, value_E: Tensor, entries: Entries, n_features: int) -> Tensor: ...
    def entries_by_token_sum(self, value_E: Tensor, entries: Entries, n_tokens: int) -> Tensor: ...


def apply(function: Any, *inputs: Any) -> Tensor:
    """function.apply, which torch leaves untyped."""
    out: Tensor = function.apply(*inputs)
    return out


def _summed_to(sums: Sums, shape: torch.Size, value_E: Tensor, entries: Entries, n_features: int) -> Tensor:
    """Gradient of a () or (F,) parameter that entry e sees through its feature."""
    if len(shape) == 0:
        return total(value_E)
    return sums.entries_by_feature_sum(value_E, entries, n_features).reshape(shape)


class Content(torch.autograd.Function):
    """Content of chosen entries; the formulas are the module's."""

    @staticmethod
    def forward(
        ctx: Any,
        z_BD: Tensor,
        rows_FD: Tensor,
        exponent: Tensor,
        log_gain: Tensor,
        terms: ScoreTerms,
        entries: Entries,
        sums: Sums,
    ) -> Tensor:
        known = entries.products if entries.products is not None and entries.products.of(terms) else None
        dot_E = sums.entry_dots(z_BD, rows_FD, entries) if known is None else known.dot_E
        ctx.entries, ctx.sums, ctx.plain, ctx.row_power = entries, sums, terms.plain, terms.row_power
        ctx.centre_only = terms.centre_only
        if terms.plain:
            ctx.save_for_backward(z_BD, rows_FD)
            return dot_E.clone()
        log_r_B = terms.log_r_B if known is None else known.log_r_B
        row_norm_F = rows_FD.new_empty(0)
        if terms.row_power == 0:
            row_norm_F = terms.row_norm_F if known is None else known.norm_F
        if exponent.dim() == 0 and log_gain.dim() == 0:
            scale_E = (log_gain + (exponent - 1.0) * log_r_B).exp()[entries.token_E]
        else:
            power_E = _at_feature(exponent - 1.0, entries) * log_r_B[entries.token_E]
            scale_E = (power_E + _at_feature(log_gain, entries)).exp()
        content_E = dot_E * scale_E
        if terms.row_power == 0:
            norm_E = row_norm_F[entries.feature_E]
            content_E = content_E / norm_E
            if any(ctx.needs_input_grad):
                scale_E = scale_E / norm_E
        ctx.save_for_backward(z_BD, rows_FD, exponent, log_gain, log_r_B, row_norm_F, scale_E, content_E)
        return content_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        entries: Entries = ctx.entries
        sums: Sums = ctx.sums
        need_z, need_rows, need_exponent, need_gain, *_ = ctx.needs_input_grad
        grad_E = grads[0].contiguous()
        if ctx.plain:
            z_BD, rows_FD = ctx.saved_tensors
            grad_z, grad_rows = _grad_z_and_rows(ctx, grad_E, z_BD, rows_FD, None, None)
            return grad_z, grad_rows, None, None, None, None, None
        z_BD, rows_FD, exponent, log_gain, log_r_B, row_norm_F, scale_E, content_E = ctx.saved_tensors
        n_tokens, n_features = z_BD.shape[0], rows_FD.shape[0]
        dot_grad_E, tangent_E = grad_E * scale_E, grad_E * content_E
        grad_exponent = grad_gain = pull_F = pull_B = None
        if need_rows and ctx.row_power == 0:
            pull_F = -sums.entries_by_feature_sum(tangent_E, entries, n_features) / row_norm_F.square()
            pull_F = torch.where(row_norm_F > ROW_MIN, pull_F, 0.0)
        if exponent.dim() == 0 and log_gain.dim() == 0:
            tangent_B = sums.entries_by_token_sum(tangent_E, entries, n_tokens)
            power_B = tangent_B * (exponent - 1.0)
            grad_exponent, grad_gain = total(tangent_B * log_r_B), total(tangent_B)
        else:
            power_E = tangent_E * _at_feature(exponent - 1.0, entries)
            power_B = sums.entries_by_token_sum(power_E, entries, n_tokens)
            slope_E = tangent_E * log_r_B[entries.token_E]
            if need_exponent:
                grad_exponent = _summed_to(sums, exponent.shape, slope_E, entries, n_features)
            if need_gain:
                grad_gain = _summed_to(sums, log_gain.shape, tangent_E, entries, n_features)
        if need_z:
            pull_B = _radial(power_B, log_r_B)
        grad_z, grad_rows = _grad_z_and_rows(ctx, dot_grad_E, z_BD, rows_FD, pull_B, pull_F)
        return grad_z, grad_rows, grad_exponent, grad_gain, None, None, None


def _radial(power_B: Tensor, log_r_B: Tensor) -> Tensor:
    """(B,) what z is multiplied by to be the gradient of z of a factor r^p, power = Σ_e ∂L/∂(ln factor) · p; 0 where r
    is clamped."""
    clamp = torch.tensor(R_MIN, dtype=log_r_B.dtype).log()
    return torch.where(log_r_B > clamp, power_B * (-2.0 * log_r_B).exp(), 0.0)


class Values(torch.autograd.Function):
    """r^p · s of chosen entries; the formulas are the module's."""

    @staticmethod
    def forward(
        ctx: Any, score_E: Tensor, z_BD: Tensor, power: Tensor, terms: ScoreTerms, entries: Entries, sums: Sums
    ) -> Tensor:
        products = entries.products
        log_r_B = terms.log_r_B if products is None or not products.of(terms) else products.log_r_B
        if power.dim() == 0:
            factor_E = (power * log_r_B).exp()[entries.token_E]
        else:
            factor_E = (power[entries.feature_E] * log_r_B[entries.token_E]).exp()
        value_E = score_E * factor_E
        ctx.entries, ctx.sums, ctx.centre_only, ctx.n_features = entries, sums, terms.centre_only, terms.n_features
        ctx.save_for_backward(z_BD, power, log_r_B, factor_E, value_E)
        return value_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        entries: Entries = ctx.entries
        sums: Sums = ctx.sums
        z_BD, power, log_r_B, factor_E, value_E = ctx.saved_tensors
        need_score, need_z, need_power, *_ = ctx.needs_input_grad
        grad_score = grads[0] * factor_E if need_score else None
        grad_z = grad_power = None
        tangent_E, n_tokens = grads[0] * value_E, len(z_BD)
        if power.dim() == 0:
            tangent_B = sums.entries_by_token_sum(tangent_E, entries, n_tokens)
            power_B, grad_power = tangent_B * power, total(tangent_B * log_r_B)
        else:
            power_B = sums.entries_by_token_sum(tangent_E * power[entries.feature_E], entries, n_tokens)
            if need_power:
                slope_E = tangent_E * log_r_B[entries.token_E]
                grad_power = _summed_to(sums, power.shape, slope_E, entries, ctx.n_features)
        if need_z:
            pull_B = _radial(power_B, log_r_B)
            grad_z = _alike(pull_B @ z_BD, n_tokens) if ctx.centre_only else pull_B[:, None] * z_BD
        return grad_score, grad_z, grad_power, None, None, None


def _at_feature(parameter: Tensor, entries: Entries) -> Tensor:
    return parameter if parameter.dim() == 0 else parameter[entries.feature_E]


def _grad_z_and_rows(
    ctx: Any, value_E: Tensor, z_BD: Tensor, rows_FD: Tensor, pull_B: Tensor | None, pull_F: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (B, D) of z and (F, D) of rows, those that are wanted; value is ∂L/∂⟨z, w⟩, pulls are radial parts.

    With `centre_only` every row of the first is the mean row: a sum over entries that comes along with the second.
    """
    need_z, need_rows, *_ = ctx.needs_input_grad
    sums: Sums = ctx.sums
    if need_z and ctx.centre_only:
        grad_rows = None
        if need_rows:
            grad_rows, total_D = sums.feature_sums(value_E, z_BD, ctx.entries, rows_FD, pull_F, total=True)
        else:
            total_D = sums.entries_by_feature_sum(value_E, ctx.entries, rows_FD.shape[0]) @ rows_FD
        if pull_B is not None:
            total_D = total_D + pull_B @ z_BD
        return _alike(total_D, len(z_BD)), grad_rows
    grad_rows = sums.feature_sums(value_E, z_BD, ctx.entries, rows_FD, pull_F)[0] if need_rows else None
    if not need_z:
        return None, grad_rows
    grad_z = sums.token_sums(value_E, rows_FD, ctx.entries, len(z_BD))
    return grad_z if pull_B is None else grad_z.addcmul_(pull_B[:, None], z_BD), grad_rows


def _alike(total_D: Tensor, n_rows: int) -> Tensor:
    """(n_rows, D) rows that are all alike and sum to total."""
    return (total_D / max(1, n_rows)).expand(n_rows, -1)


class AtFeature(torch.autograd.Function):
    """parameter[feature] with a sum per feature behind it (autograd's own backward sorts all entries)."""

    @staticmethod
    def forward(ctx: Any, parameter_F: Tensor, entries: Entries, sums: Sums) -> Tensor:
        ctx.entries, ctx.sums, ctx.n_features = entries, sums, parameter_F.shape[0]
        return parameter_F[entries.feature_E]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.sums.entries_by_feature_sum(grads[0], ctx.entries, ctx.n_features), None, None


class Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_E: Tensor, decoder_FD: Tensor, entries: Entries, n_tokens: int, sums: Sums) -> Tensor:
        ctx.entries, ctx.sums = entries, sums
        ctx.save_for_backward(value_E, decoder_FD)
        return sums.token_sums(value_E, decoder_FD, entries, n_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value_E, decoder_FD = ctx.saved_tensors
        grad_BD, entries, sums = grads[0].contiguous(), ctx.entries, ctx.sums
        need_value, need_rows, *_ = ctx.needs_input_grad
        if need_value and need_rows:
            grad_rows, grad_value = sums.feature_sums_and_dots(value_E, grad_BD, entries, decoder_FD)
            return grad_value, grad_rows, None, None, None
        grad_value_E = sums.entry_dots(grad_BD, decoder_FD, entries) if need_value else None
        grad_rows_FD = sums.feature_sums(value_E, grad_BD, entries, decoder_FD)[0] if need_rows else None
        return grad_value_E, grad_rows_FD, None, None, None


class SquaredErrors(torch.autograd.Function):
    """|z_b − ẑ_b|²; backward makes one (B, D) matrix, ẑ's gradient, whose negative is z's."""

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, recon_BD: Tensor, centre_only: bool, sums: Sums) -> Tensor:
        ctx.centre_only, ctx.sums = centre_only, sums
        ctx.save_for_backward(z_BD, recon_BD)
        return sums.squared_errors(z_BD, recon_BD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z_BD, recon_BD = ctx.saved_tensors
        need_z, need_recon, *_ = ctx.needs_input_grad
        grad_recon = ctx.sums.scaled_gaps(z_BD, recon_BD, -2.0 * grads[0])
        grad_z = None
        if need_z:
            grad_z = _alike(-grad_recon.sum(0), len(z_BD)) if ctx.centre_only else -grad_recon
        return grad_z, grad_recon if need_recon else None, None, None
