"""Sparse kernels for the CPU in plain PyTorch. Each function's definition is its twin in `reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cosae.kernels import reference
from cosae.kernels.terms import Entries, ScoreTerms

NAME = "cpu"

select_batch_topk = reference.select_batch_topk
select_topk = reference.select_topk
select_above = reference.select_above


class _EntryDot(torch.autograd.Function):
    """⟨z_b, w_i⟩ at chosen entries; backward touches those entries only."""

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, rows_FD: Tensor, token_E: Tensor, feature_E: Tensor) -> Tensor:
        ctx.save_for_backward(z_BD, rows_FD, token_E, feature_E)
        return (z_BD[token_E] * rows_FD[feature_E]).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z_BD, rows_FD, token_E, feature_E = ctx.saved_tensors
        grad_E = grads[0][:, None]
        grad_z = torch.zeros_like(z_BD).index_add_(0, token_E, grad_E * rows_FD[feature_E])
        grad_rows = torch.zeros_like(rows_FD).index_add_(0, feature_E, grad_E * z_BD[token_E])
        return grad_z, grad_rows, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value_E: Tensor, decoder_FD: Tensor, token_E: Tensor, feature_E: Tensor, n_tokens: int
    ) -> Tensor:
        ctx.save_for_backward(value_E, decoder_FD, token_E, feature_E)
        out = decoder_FD.new_zeros(n_tokens, decoder_FD.shape[1])
        return out.index_add_(0, token_E, value_E[:, None] * decoder_FD[feature_E])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value_E, decoder_FD, token_E, feature_E = ctx.saved_tensors
        grad_ED = grads[0][token_E]
        grad_value = (grad_ED * decoder_FD[feature_E]).sum(-1)
        grad_rows = torch.zeros_like(decoder_FD).index_add_(0, feature_E, value_E[:, None] * grad_ED)
        return grad_value, grad_rows, None, None, None


def entry_content(terms: ScoreTerms, entries: Entries) -> Tensor:
    """(E,) content of the chosen entries, differentiable in z, rows, exponent and log_gain."""
    dot_E = _EntryDot.apply(terms.z_BD, terms.rows_FD, entries.token_E, entries.feature_E)
    return terms.scaled(dot_E, entries.token_E, entries.feature_E)  # type: ignore[arg-type]


def decode(value_E: Tensor, entries: Entries, decoder_FD: Tensor, n_tokens: int) -> Tensor:
    """(B, D) Σ_i f_i d_i per token, differentiable in values and decoder rows."""
    return _Decode.apply(value_E, decoder_FD, entries.token_E, entries.feature_E, n_tokens)  # type: ignore[return-value]
