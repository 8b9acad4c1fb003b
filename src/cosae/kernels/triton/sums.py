"""Sums over active entries by Triton; each function's meaning is its twin in `sums`. fp32, deterministic.

No output is shared between programs and none is added to atomically, so a sum is a function of its numbers and shapes
alone. A feature's entries are summed by one program per column tile: a feature that fires for every token of a large
batch is the longest wait of a launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cosae.kernels.cpu.sums import by_feature, token_offsets
from cosae.kernels.cpu.sums import scaled_gaps as scaled_gaps  # one or two passes over (B, D): torch's own do
from cosae.kernels.cpu.sums import squared_errors as squared_errors
from cosae.kernels.terms import Entries
from cosae.kernels.triton import loops as triton_loops

TILE = 1024
"""Columns of one tile where rows are gathered: 4 kB of fp32."""
PARALLEL_ENTRIES = 4
"""Rows gathered at a time by one program."""
SEGMENT = 128
"""Entries read at a time where only values are summed."""


def width_block(width: int, most: int = TILE) -> int:
    """Columns a program handles at a time: the next power of two, at least 16, at most `most`."""
    return min(most, max(16, 1 << (width - 1).bit_length()))


def rows_block(device: torch.device, on_gpu: int = 1) -> int:
    """Rows or entries a program handles side by side; in the interpreter a program costs far more than its work."""
    return on_gpu if device.type == "cuda" else 64


def entry_dots(x_BD: Tensor, rows_FD: Tensor, entries: Entries) -> Tensor:
    """(E,) ⟨x_token, rows_feature⟩."""
    return dots(x_BD, rows_FD, entries.token_E, entries.feature_E)


def dots(x_BD: Tensor, rows_FD: Tensor, token_E: Tensor, feature_E: Tensor) -> Tensor:
    """(E,) ⟨x_token, rows_feature⟩ of pairs in any order; pairs of one feature side by side read its row once."""
    x_BD, rows_FD = x_BD.detach().contiguous(), rows_FD.detach().contiguous()
    n_entries, width = len(token_E), x_BD.shape[1]
    dot_E = torch.empty(n_entries, dtype=torch.float32, device=x_BD.device)
    if n_entries:
        block = rows_block(x_BD.device, PARALLEL_ENTRIES)
        sizes = {"BLOCK_E": block, "BLOCK_D": width_block(width)}
        triton_loops.entry_dots[(-(-n_entries // block),)](
            x_BD, rows_FD, token_E, feature_E, dot_E, n_entries, width, **sizes
        )
    return dot_E


def _row_sums(
    source: Tensor, row_E: Tensor, offset: Tensor, *, order_E: Tensor | None = None, value_E: Tensor | None = None,
    pull: Tensor | None = None, base: Tensor | None = None, dot: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loop `row_sums` over every row and column tile: out (rows, D) and dots (E,), empty where not asked for."""
    source = source.detach().contiguous()
    n_rows, width, n_entries = len(offset) - 1, source.shape[1], len(row_E)
    block = width_block(width)
    n_tiles = -(-width // block)
    none = source.new_empty(0)
    out = source.new_empty(n_rows, width) if value_E is not None else none
    partial = source.new_empty(n_tiles, n_entries) if dot else none
    base = none if base is None else base.detach().contiguous()
    value = none if value_E is None else value_E.detach().contiguous()
    flags: dict[str, Any] = {
        "ORDERED": order_E is not None, "SUM": value_E is not None, "PULL": pull is not None, "DOT": dot,
        "BLOCK_E": PARALLEL_ENTRIES, "BLOCK_D": block,
    }  # fmt: skip
    order = row_E if order_E is None else order_E
    pull = none if pull is None else pull.contiguous()
    if n_rows:
        triton_loops.row_sums[(n_rows, n_tiles)](
            value, source, row_E, order, offset, pull, base, out, partial, n_entries, width, **flags
        )
    if not dot:
        return out, none
    return out, partial[0] if n_tiles == 1 else partial.sum(0)


def token_sums(value_E: Tensor, rows_FD: Tensor, entries: Entries, n_tokens: int) -> Tensor:
    """(B, D) Σ over a token's entries of value · rows_feature."""
    offset_B1 = token_offsets(entries, n_tokens)
    return _row_sums(rows_FD, entries.feature_E, offset_B1, value_E=value_E)[0]


def feature_sums(
    value_E: Tensor, x_BD: Tensor, entries: Entries, rows_FD: Tensor, pull_F: Tensor | None = None, total: bool = False
) -> tuple[Tensor, Tensor]:
    """(F, D) Σ over a feature's entries of value · x_token, plus pull_i · rows_i; the total as a vector by the rows."""
    n_features, width = rows_FD.shape
    order_E, offset_F1 = by_feature(entries, n_features)
    total_D = entries_by_feature_sum(value_E, entries, n_features) @ rows_FD if total else rows_FD.new_zeros(width)
    out_FD, _ = _row_sums(
        x_BD, entries.token_E, offset_F1, order_E=order_E, value_E=value_E, pull=pull_F, base=rows_FD
    )  # fmt: skip
    return out_FD, total_D


def feature_sums_and_dots(value_E: Tensor, x_BD: Tensor, entries: Entries, rows_FD: Tensor) -> tuple[Tensor, Tensor]:
    """`feature_sums` and `entry_dots` of the same x in one read of it: (F, D) and (E,)."""
    order_E, offset_F1 = by_feature(entries, rows_FD.shape[0])
    return _row_sums(x_BD, entries.token_E, offset_F1, order_E=order_E, value_E=value_E, base=rows_FD, dot=True)


def _segment_sums(value_E: Tensor, offset: Tensor, order_E: Tensor | None) -> Tensor:
    value_E = value_E.detach().contiguous()
    out = value_E.new_empty(len(offset) - 1)
    order = offset if order_E is None else order_E
    if len(out):
        triton_loops.segment_sums[(len(out),)](
            value_E, order, offset, out, ORDERED=order_E is not None, BLOCK_E=SEGMENT, num_warps=1
        )
    return out


def entries_by_feature_sum(value_E: Tensor, entries: Entries, n_features: int) -> Tensor:
    """(F,) Σ over a feature's entries of value."""
    order_E, offset_F1 = by_feature(entries, n_features)
    return _segment_sums(value_E, offset_F1, order_E)


def entries_by_token_sum(value_E: Tensor, entries: Entries, n_tokens: int) -> Tensor:
    """(B,) Σ over a token's entries of value."""
    return _segment_sums(value_E, token_offsets(entries, n_tokens), None)
