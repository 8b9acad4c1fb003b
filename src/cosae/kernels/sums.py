"""Sums over active entries: four shapes of one sparse product. Enter: values and rows; leave: fp32 (or float64).

Each function's first lines are its meaning in PyTorch; the compiled loop of the same name serves fp32 on the CPU
where numba is installed. No function here knows autograd.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from cosae.kernels import native
from cosae.kernels.memory import spare_like
from cosae.kernels.terms import Entries

GATHER = 1 << 21
"""Numbers gathered at a time by the plain dot products: 8 MB of fp32."""


def compiled(*tensors: Tensor) -> bool:
    """Whether the compiled loops serve these tensors."""
    return native.serves() and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def token_offsets(entries: Entries, n_tokens: int) -> Tensor:
    """(B + 1,) int64: entries of token t are offset[t] : offset[t + 1]."""
    if "offset_B1" not in entries.memo or len(entries.memo["offset_B1"]) != n_tokens + 1:
        count_B = torch.bincount(entries.token_E, minlength=n_tokens)
        entries.memo["offset_B1"] = torch.cat([count_B.new_zeros(1), count_B.cumsum(0)])
    return cast(Tensor, entries.memo["offset_B1"])


def by_feature(entries: Entries, n_features: int) -> tuple[Tensor, Tensor]:
    """Entry positions feature by feature (E,), and where each feature's begin (F + 1,); both int64, made once."""
    if "by_feature" not in entries.memo or len(entries.memo["by_feature"][1]) != n_features + 1:
        feature_E = entries.feature_E
        if native.serves() and feature_E.device.type == "cpu":
            order_E, offset_F1 = torch.empty_like(feature_E), feature_E.new_empty(n_features + 1)
            native.loops().group_by_feature(feature_E.numpy(), offset_F1.numpy(), order_E.numpy())
        else:
            order_E = feature_E.argsort(stable=True)
            count_F = torch.bincount(feature_E, minlength=n_features)
            offset_F1 = torch.cat([count_F.new_zeros(1), count_F.cumsum(0)])
        entries.memo["by_feature"] = (order_E, offset_F1)
    return cast(tuple[Tensor, Tensor], entries.memo["by_feature"])


def entry_dots(x_BD: Tensor, rows_FD: Tensor, entries: Entries) -> Tensor:
    """(E,) ⟨x_token, rows_feature⟩."""
    dot_E = x_BD.new_empty(len(entries))
    if compiled(x_BD, rows_FD):
        order_E, offset_F1 = by_feature(entries, rows_FD.shape[0])
        arrays = (x_BD, rows_FD, entries.token_E, order_E, offset_F1, dot_E)
        _run("entry_dots", len(entries) * x_BD.shape[1], *arrays)
        return dot_E
    step = max(1, GATHER // max(1, x_BD.shape[1]))
    for first in range(0, len(entries), step):
        part = slice(first, first + step)
        dot_E[part] = (x_BD[entries.token_E[part]] * rows_FD[entries.feature_E[part]]).sum(-1)
    return dot_E


def token_sums(value_E: Tensor, rows_FD: Tensor, entries: Entries, n_tokens: int) -> Tensor:
    """(B, D) Σ over a token's entries of value · rows_feature."""
    offset_B1 = token_offsets(entries, n_tokens)
    if compiled(value_E, rows_FD):
        out_BD = rows_FD.new_empty(n_tokens, rows_FD.shape[1])
        arrays = (value_E, rows_FD, entries.feature_E, offset_B1, torch.arange(len(entries)), out_BD)
        _run("token_sums", len(entries) * rows_FD.shape[1], *arrays)
        return out_BD
    return embedding_bag(
        entries.feature_E, rows_FD, offset_B1[:-1], mode="sum", per_sample_weights=value_E.to(rows_FD.dtype)
    )


def feature_sums(
    value_E: Tensor, x_BD: Tensor, entries: Entries, rows_FD: Tensor, pull_F: Tensor | None = None
) -> Tensor:
    """(F, D) Σ over a feature's entries of value · x_token, plus pull_i · rows_i."""
    order_E, offset_F1 = by_feature(entries, rows_FD.shape[0])
    if compiled(value_E, x_BD, rows_FD):
        out_FD = spare_like(rows_FD)
        pull_F = rows_FD.new_zeros(rows_FD.shape[0]) if pull_F is None else pull_F
        arrays = (value_E, x_BD, entries.token_E, order_E, offset_F1, pull_F, rows_FD, out_FD)
        _run("feature_sums", len(entries) * x_BD.shape[1], *arrays)
        return out_FD
    out_FD = embedding_bag(
        entries.token_E[order_E], x_BD, offset_F1[:-1], mode="sum", per_sample_weights=value_E[order_E]
    )
    return out_FD if pull_F is None else out_FD.addcmul_(pull_F[:, None], rows_FD)


def feature_sums_and_dots(value_E: Tensor, x_BD: Tensor, entries: Entries, rows_FD: Tensor) -> tuple[Tensor, Tensor]:
    """`feature_sums` and `entry_dots` of the same x: (F, D) and (E,)."""
    if not compiled(value_E, x_BD, rows_FD):
        return feature_sums(value_E, x_BD, entries, rows_FD), entry_dots(x_BD, rows_FD, entries)
    order_E, offset_F1 = by_feature(entries, rows_FD.shape[0])
    out_FD = spare_like(rows_FD)
    dot_E = x_BD.new_empty(len(entries))
    arrays = (value_E, x_BD, entries.token_E, order_E, offset_F1, rows_FD, out_FD, dot_E)
    _run("feature_sums_and_dots", 2 * len(entries) * x_BD.shape[1], *arrays)
    return out_FD, dot_E


def entries_by_feature_sum(value_E: Tensor, entries: Entries, n_features: int) -> Tensor:
    """(F,) Σ over a feature's entries of value."""
    return torch.bincount(entries.feature_E, weights=value_E, minlength=n_features).to(value_E.dtype)


def entries_by_token_sum(value_E: Tensor, entries: Entries, n_tokens: int) -> Tensor:
    """(B,) Σ over a token's entries of value."""
    return torch.bincount(entries.token_E, weights=value_E, minlength=n_tokens).to(value_E.dtype)


def _run(name: str, work: int, *tensors: Tensor) -> None:
    """The compiled loop `name` over contiguous views of tensors (already contiguous where written to)."""
    arrays = [tensor.detach().contiguous().numpy() for tensor in tensors]
    native.run_parts(getattr(native.loops(), name), native.parts_for(work), *arrays)
