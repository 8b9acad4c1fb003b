"""Plain data that rooms hand each other: codes in compressed rows, slices, bare activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosae.errors import CosaeError
from cosae.types import Activations, Codes, NormStats, Sequences


@st.composite
def dense_codes(draw: st.DrawFn) -> torch.Tensor:
    """Dense codes of 0 to 3 leading dimensions, some tokens without codes, some values negative."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    full = torch.randn((*shape, draw(st.integers(1, 6))), generator=generator)
    return full * (torch.rand(full.shape, generator=generator) < draw(st.floats(0, 1)))


@settings(max_examples=60)
@given(dense_codes())
def test_dense_and_sparse_are_inverse(dense: torch.Tensor) -> None:
    codes = Codes.from_dense(dense)
    assert torch.equal(codes.to_dense(), dense)
    assert codes.shape == tuple(dense.shape[:-1])
    assert codes.d_sae == dense.shape[-1]
    assert codes.count_B.tolist() == (dense != 0).reshape(-1, dense.shape[-1]).sum(-1).tolist()
    assert codes.n_tokens == dense[..., 0].numel()
    assert codes.l0 == int((dense != 0).sum()) / max(codes.n_tokens, 1)
    assert bool((codes.token_E * codes.d_sae + codes.feature_E).diff().gt(0).all())


def test_compressed_rows() -> None:
    codes = Codes.from_dense(torch.tensor([[0.0, 2.0, -1.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0]]))
    assert codes.offset_B1.tolist() == [0, 2, 2, 3]
    assert codes.feature_E.tolist() == [1, 2, 0]
    assert codes.token_E.tolist() == [0, 0, 2]
    assert codes.l0 == 1.0
    assert codes.with_values(torch.ones(3)).to_dense().tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert codes.value_E.tolist() == [2.0, -1.0, 5.0], "with_values leaves the original"


def test_gradients_reach_the_values() -> None:
    codes = Codes.from_dense(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    value_E = codes.value_E.clone().requires_grad_()
    (codes.with_values(value_E).to_dense() * torch.tensor([[1.0, 10.0], [100.0, 1000.0]])).sum().backward()
    assert value_E.grad is not None
    assert value_E.grad.tolist() == [10.0, 100.0]


def test_taken_slices_by_anything() -> None:
    norm_stats = NormStats(torch.arange(4.0), torch.arange(4.0) + 10, torch.arange(4.0) + 20)
    for rows in (slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False])):
        part = norm_stats[rows]
        assert [part.scale_B.tolist(), part.shift_B.tolist(), part.r_B.tolist()] == [[1, 2], [11, 12], [21, 22]]


def test_bare_activations() -> None:
    x_ND = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16)
    bare = Activations.bare(x_ND)
    assert bare.norm_N.tolist() == [5.0, 0.0]
    assert bare.norm_N.dtype == torch.float32
    assert bare.token_N.tolist() == bare.position_N.tolist() == bare.doc_N.tolist() == bare.index_N.tolist() == [-1, -1]
    assert not bare.special_N.any()
    assert len(bare) == 2
    both = Activations.cat([bare, bare[:1]])
    assert both.norm_N.tolist() == [5.0, 0.0, 5.0]
    assert both[torch.tensor([False, True, True])].norm_N.tolist() == [0.0, 5.0]


def test_sequences_slice_and_keep_names() -> None:
    ids_ST = torch.arange(6).reshape(3, 2)
    mask_ST = torch.ones(3, 2, dtype=torch.bool)
    whole = Sequences(ids_ST, ids_ST.int(), ids_ST.int(), mask_ST, ~mask_ST, ("a", "b"))
    part = whole[torch.tensor([2, 0])]
    assert len(whole) == 3
    assert part.ids_ST.tolist() == [[4, 5], [0, 1]]
    assert part.doc_ST.tolist() == [[4, 5], [0, 1]]
    assert part.doc_names == ("a", "b")


def test_the_users_mistake_is_a_value_error() -> None:
    assert issubclass(CosaeError, ValueError)
    with pytest.raises(AttributeError):
        Codes.from_dense(torch.zeros(1, 2)).d_sae = 3  # type: ignore[misc]


def test_codes_are_cut_by_token() -> None:
    dense = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0], [0.0, 5.0, 0.0]])
    codes = Codes.from_dense(dense)
    assert torch.equal(codes[1:3].to_dense(), dense[1:3])
    assert torch.equal(codes[:].to_dense(), dense)
    assert codes[4:].n_tokens == 0
    with pytest.raises(CosaeError, match="plain slice"):
        codes[::2]


def test_codes_of_chosen_tokens_and_as_a_sparse_matrix() -> None:
    dense = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 0.0, -4.0], [0.0, 5.0, 0.0]])
    codes = Codes.from_dense(dense, NormStats(torch.arange(4.0), torch.arange(4.0), torch.arange(4.0)))
    keep = torch.tensor([True, True, False, True])
    for mask in (keep, keep.numpy()):
        kept = codes.take(mask)
        assert (kept.shape, torch.equal(kept.to_dense(), dense[keep])) == ((3,), True)
        assert kept.norm_stats is not None
        assert kept.norm_stats.r_B.tolist() == [0, 1, 3]
    with pytest.raises(CosaeError, match="4 tokens"):
        codes.take(keep[1:])
    matrix = codes.to_scipy()
    assert (matrix.dtype, matrix.toarray().tolist()) == (np.float64, dense.tolist())
    assert codes.to_scipy(np.float32).dtype == np.float32


def test_parts_of_codes_are_put_together() -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, -3.0]], requires_grad=True)
    whole = Codes.from_dense(dense)
    again = Codes.cat([whole[:1], whole[1:1], whole[1:]])
    assert again.shape == (3,)
    assert not again.value_E.requires_grad
    assert torch.equal(again.to_dense(), dense.detach())
