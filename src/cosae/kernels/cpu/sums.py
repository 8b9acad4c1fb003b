"""Sums over active entries: four shapes of one sparse product. Enter: values and rows; leave: fp32 (or float64).

Each function's first lines are its meaning in PyTorch; the compiled loop of the same name serves fp32 on the CPU
where numba is installed. No function here knows autograd.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from cosae.kernels.cache import Workspace
from cosae.kernels.cpu import native
from cosae.kernels.terms import Entries, Groups, ScoreTerms

GATHER = 1 << 21
"""Numbers gathered at a time by the plain dot products: 8 MB of fp32."""
NEAR = 3 << 20
"""Numbers of the rows that `token_sums` reads at a time for all tokens: 12 MB of fp32, less than a last-level cache."""


def compiled(*tensors: Tensor) -> bool:
    """Whether the compiled loops serve these tensors."""
    return native.serves() and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def token_offsets(entries: Entries, n_tokens: int) -> Tensor:
    """(B + 1,) int64: entries of token t are offset[t] : offset[t + 1]."""
    if entries.groups is not None:
        return entries.groups.offset_B1
    count_B = torch.bincount(entries.token_E, minlength=n_tokens)
    return torch.cat([count_B.new_zeros(1), count_B.cumsum(0)])


def by_feature(entries: Entries, n_features: int) -> tuple[Tensor, Tensor]:
    """`order_E` and `offset_F1` of `Groups`: known, or found now."""
    if entries.groups is not None:
        return entries.groups.order_E, entries.groups.offset_F1
    feature_E = entries.feature_E
    if native.serves() and feature_E.device.type == "cpu":
        order_E, offset_F1 = torch.empty_like(feature_E), feature_E.new_empty(n_features + 1)
        native.loops("search").group_by_feature(feature_E.numpy(), offset_F1.numpy(), order_E.numpy())
        return order_E, offset_F1
    count_F = torch.bincount(feature_E, minlength=n_features)
    return feature_E.argsort(stable=True), torch.cat([count_F.new_zeros(1), count_F.cumsum(0)])


def grouped(entries: Entries, terms: ScoreTerms) -> Entries:
    """The same entries of these terms with their groups, as a part of the terms' step."""
    groups = Groups(token_offsets(entries, terms.n_tokens), *by_feature(entries, terms.n_features))
    return replace(entries, groups=groups, cache=terms.cache)


def _spare_like(rows_FD: Tensor, entries: Entries) -> Tensor:
    """Uninitialised memory for a gradient of these rows: a spare of the step's where it has one."""
    workspace = Workspace() if entries.cache is None else entries.cache.workspace
    return workspace.spare_like(rows_FD)


def entry_dots(x_BD: Tensor, rows_FD: Tensor, entries: Entries) -> Tensor:
    """(E,) ⟨x_token, rows_feature⟩."""
    dot_E = x_BD.new_empty(len(entries))
    order_E, offset_F1 = by_feature(entries, rows_FD.shape[0])
    if compiled(x_BD, rows_FD):
        arrays = (x_BD, rows_FD, entries.token_E, order_E, offset_F1, dot_E)
        _run("entry_dots", len(entries) * x_BD.shape[1], *arrays)
        return dot_E
    dot_E[order_E] = sampled_dots(x_BD, rows_FD, entries.token_E[order_E], offset_F1)
    return dot_E


def sampled_dots(x_BD: Tensor, rows_FD: Tensor, token_S: Tensor, offset_F1: Tensor) -> Tensor:
    """(S,) ⟨x_token, rows_feature⟩ of pairs feature by feature, in PyTorch; each pair may come once.

    On the CPU torch's product at the places of a sparse matrix: no row is copied, and every dot is summed in an order
    that depends on the width alone.
    """
    if x_BD.device.type == "cpu" and x_BD.dtype == rows_FD.dtype and _sampled_products_serve():
        place = torch.sparse_csr_tensor(
            offset_F1, token_S, x_BD.new_zeros(len(token_S)), (len(rows_FD), len(x_BD)), check_invariants=False
        )
        dot_S: Tensor = torch.sparse.sampled_addmm(place, rows_FD.detach(), x_BD.detach().T, beta=0.0).values()
        return dot_S
    dot_S = x_BD.new_empty(len(token_S))
    feature_S = torch.repeat_interleave(offset_F1.diff(), output_size=len(token_S))
    step = max(1, GATHER // max(1, x_BD.shape[1]))
    for first in range(0, len(token_S), step):
        part = slice(first, first + step)
        dot_S[part] = (x_BD[token_S[part]] * rows_FD[feature_S[part]]).sum(-1)
    return dot_S


@lru_cache(maxsize=1)
def _sampled_products_serve() -> bool:
    """Whether torch multiplies at the places of a sparse matrix here; that it calls this new is not passed on."""
    one = torch.ones(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            place = torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), (1, 1))
            return bool(torch.sparse.sampled_addmm(place, one, one, beta=0.0).values()[0] == 1)
        except (RuntimeError, NotImplementedError):
            return False


def token_sums(value_E: Tensor, rows_FD: Tensor, entries: Entries, n_tokens: int) -> Tensor:
    """(B, D) Σ over a token's entries of value · rows_feature."""
    offset_B1 = token_offsets(entries, n_tokens)
    if compiled(value_E, rows_FD):
        out_BD = rows_FD.new_empty(n_tokens, rows_FD.shape[1])
        arrays = (value_E, rows_FD, entries.feature_E, offset_B1, torch.arange(len(entries)))
        _run("token_sums", len(entries) * rows_FD.shape[1], *arrays, max(1, NEAR // rows_FD.shape[1]), out_BD)
        return out_BD
    return embedding_bag(
        entries.feature_E, rows_FD, offset_B1[:-1], mode="sum", per_sample_weights=value_E.to(rows_FD.dtype)
    )


def feature_sums(
    value_E: Tensor, x_BD: Tensor, entries: Entries, rows_FD: Tensor, pull_F: Tensor | None = None, total: bool = False
) -> tuple[Tensor, Tensor]:
    """(F, D) Σ over a feature's entries of value · x_token, plus pull_i · rows_i.

    With `total` also (D,) Σ over all entries of value · rows_feature, else 0.
    """
    order_E, offset_F1 = by_feature(entries, rows_FD.shape[0])
    n_features, width = rows_FD.shape
    if compiled(value_E, x_BD, rows_FD):
        out_FD = _spare_like(rows_FD, entries)
        pull_F = rows_FD.new_zeros(n_features) if pull_F is None else pull_F
        square_F = torch.empty(n_features, dtype=torch.float64)
        total_KD = rows_FD.new_empty(-(-n_features // native.loops("sums").TOTAL_ROWS) if total else 0, width)
        arrays = (value_E, x_BD, entries.token_E, order_E, offset_F1, pull_F, rows_FD, out_FD, square_F, total_KD)
        _run("feature_sums", len(entries) * width, *arrays)
        if entries.cache is not None:
            entries.cache.leave_measured(out_FD, rows_FD, None, square_F)
        return out_FD, total_KD.sum(0)
    out_FD = embedding_bag(
        entries.token_E[order_E], x_BD, offset_F1[:-1], mode="sum", per_sample_weights=value_E[order_E]
    )
    total_D = entries_by_feature_sum(value_E, entries, n_features) @ rows_FD if total else rows_FD.new_zeros(width)
    return out_FD if pull_F is None else out_FD.addcmul_(pull_F[:, None], rows_FD), total_D


def feature_sums_and_dots(value_E: Tensor, x_BD: Tensor, entries: Entries, rows_FD: Tensor) -> tuple[Tensor, Tensor]:
    """`feature_sums` and `entry_dots` of the same x: (F, D) and (E,)."""
    if not compiled(value_E, x_BD, rows_FD):
        return feature_sums(value_E, x_BD, entries, rows_FD)[0], entry_dots(x_BD, rows_FD, entries)
    order_E, offset_F1 = by_feature(entries, rows_FD.shape[0])
    out_FD = _spare_like(rows_FD, entries)
    dot_E = x_BD.new_empty(len(entries))
    along_F, square_F = rows_FD.new_empty(len(rows_FD)), torch.empty(len(rows_FD), dtype=torch.float64)
    arrays = (value_E, x_BD, entries.token_E, order_E, offset_F1, rows_FD, out_FD, dot_E, along_F, square_F)
    _run("feature_sums_and_dots", 2 * len(entries) * x_BD.shape[1], *arrays)
    if entries.cache is not None:
        entries.cache.leave_measured(out_FD, rows_FD, along_F, square_F)
    return out_FD, dot_E


def squared_errors(x_BD: Tensor, y_BD: Tensor) -> Tensor:
    """(B,) |x − y|²."""
    if not compiled(x_BD, y_BD):
        return (x_BD - y_BD).square_().sum(-1)
    error_B = x_BD.new_empty(len(x_BD))
    _run("squared_errors", x_BD.numel(), x_BD, y_BD, error_B)
    return error_B


def scaled_gaps(x_BD: Tensor, y_BD: Tensor, scale_B: Tensor) -> Tensor:
    """(B, D) scale_b · (x_b − y_b)."""
    if not compiled(x_BD, y_BD, scale_B):
        return (x_BD - y_BD).mul_(scale_B[:, None])
    out_BD = torch.empty(x_BD.shape)
    _run("scaled_gaps", x_BD.numel(), x_BD, y_BD, scale_B, out_BD)
    return out_BD


def entries_by_feature_sum(value_E: Tensor, entries: Entries, n_features: int) -> Tensor:
    """(F,) Σ over a feature's entries of value."""
    if compiled(value_E):
        return _segment_sums(value_E, *by_feature(entries, n_features))
    return torch.bincount(entries.feature_E, weights=value_E, minlength=n_features).to(value_E.dtype)


def entries_by_token_sum(value_E: Tensor, entries: Entries, n_tokens: int) -> Tensor:
    """(B,) Σ over a token's entries of value."""
    if compiled(value_E):
        return _segment_sums(value_E, torch.arange(len(entries)), token_offsets(entries, n_tokens))
    return torch.bincount(entries.token_E, weights=value_E, minlength=n_tokens).to(value_E.dtype)


def _segment_sums(value_E: Tensor, order_E: Tensor, offset_S1: Tensor) -> Tensor:
    out_S = torch.empty(len(offset_S1) - 1)
    _run("segment_sums", 8 * len(value_E), value_E, order_E, offset_S1, out_S)
    return out_S


def _run(name: str, work: int, *arguments: Tensor | int) -> None:
    """The compiled loop `name` over contiguous views of tensors (already contiguous where written to)."""
    arrays = [x.detach().contiguous().numpy() if isinstance(x, Tensor) else x for x in arguments]
    pieces = 2 if name.startswith("feature_sums") else 1  # token_sums' parts share what is in the cache: one a thread
    native.run_parts(getattr(native.loops("sums"), name), native.parts_for(work, pieces), *arrays)
