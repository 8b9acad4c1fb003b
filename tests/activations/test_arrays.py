from __future__ import annotations

import hashlib
import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cosae.activations.arrays import ArraySource, TensorSource
from cosae.errors import CosaeError
from cosae.io.generators import epoch_order

N, D = 1000, 5


def rows(n: int = N, d: int = D, dtype: torch.dtype = torch.float32) -> Tensor:
    """Row i is i, i + .25, i + .5 ...: exact in every dtype up to the row number it can hold."""
    return (torch.arange(n, dtype=torch.float64)[:, None] + torch.arange(d) / 4).to(dtype)


def write(path: Path, x: Tensor, shape: str = "list") -> Path:
    """The tensor in the format of the path's ending."""
    if path.suffix == ".safetensors":
        save_file({"x": x.contiguous()}, path)
    elif path.suffix == ".npy":
        np.save(path, x.numpy())
    elif shape == "list":
        flat = pa.array(x.flatten().numpy())
        table = pa.table({"x": pa.FixedSizeListArray.from_arrays(flat, x.shape[1])})
        pq.write_table(table, path, row_group_size=300)
    elif shape == "ragged":
        pq.write_table(pa.table({"x": pa.array(list(x.numpy()))}), path)
    else:
        pq.write_table(pa.table({f"c{i}": x[:, i].numpy() for i in range(x.shape[1])}), path)
    return path


FORMATS = [
    (".safetensors", ""),
    (".npy", ""),
    (".parquet", "list"),
    (".parquet", "ragged"),
    (".parquet", "wide"),
]


def everything(source: ArraySource) -> Tensor:
    """All rows, train and held-out, by row number."""
    train = [c.x_ND for c in itertools.islice(source.chunks(), source.chunks_per_epoch)]
    x = torch.cat([*train, source.held_out().x_ND])
    return x[x[:, 0].float().argsort()]


@pytest.mark.parametrize(("suffix", "shape"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_every_format_and_dtype_gives_the_same_rows(
    tmp_path: Path, suffix: str, shape: str, dtype: torch.dtype
) -> None:
    source = ArraySource(write(tmp_path / f"a{suffix}", rows(200, dtype=dtype), shape), chunk_tokens=64)
    x = everything(source)
    assert x.dtype == (torch.float16 if dtype == torch.float16 else torch.float32)
    assert source.d_in == D
    assert torch.equal(x, rows(200).to(x.dtype))
    metadata = source.describe()
    assert metadata["file_dtype"] == str(dtype).removeprefix("torch.")
    assert metadata["cast"] == ("float64 values were cast to float32" if dtype == torch.float64 else "")


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    source = ArraySource(write(tmp_path / "a.safetensors", rows(60, dtype=torch.bfloat16)))
    assert torch.equal(everything(source), rows(60, dtype=torch.bfloat16))
    chunk = next(source.chunks())
    assert torch.equal(chunk.norm_N, chunk.x_ND.float().norm(dim=-1))
    assert set(chunk.token_N.tolist()) == {-1}
    assert not chunk.special_N.any()


@pytest.mark.parametrize("order", [">f4", "<f4"])
def test_npy_of_either_byte_order_and_layout_is_mapped_not_read(tmp_path: Path, order: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.asfortranarray(rows(100).numpy().astype(order)))
    source = ArraySource(path)
    assert isinstance(source._array, np.memmap)
    assert torch.equal(everything(source), rows(100))


def test_an_epoch_has_every_train_row_once_and_orders_differ(tmp_path: Path) -> None:
    source = ArraySource(write(tmp_path / "a.npy", rows()), chunk_tokens=256, seed=3)
    n_train = source.describe()["n_tokens"]
    chunks, epochs = source.chunks(), []
    for _ in range(2):
        sizes = [256, 256, 256, n_train - 768]
        parts = [next(chunks) for _ in sizes]
        assert [len(p) for p in parts] == sizes
        epochs.append(torch.cat([p.x_ND[:, 0] for p in parts]).long())
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert (epochs[0].diff() != 1).float().mean() > 0.9  # neighbours are apart
    held_out = source.held_out().x_ND[:, 0].long()
    assert torch.equal(torch.cat([epochs[0], held_out]).sort().values, torch.arange(N))


def test_restarts_are_exact(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy", rows())
    straight = [c.x_ND for c in itertools.islice(ArraySource(path, chunk_tokens=400).chunks(), 7)]
    for start in range(7):
        assert torch.equal(next(ArraySource(path, chunk_tokens=400).chunks(start)).x_ND, straight[start])


def test_held_out_rows_are_whole_blocks_chosen_by_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy", rows())
    source = ArraySource(path, held_out_frac=0.1)
    metadata = source.describe()
    assert (metadata["block_rows"], metadata["n_held_out"], metadata["n_tokens"]) == (10, 100, 900)
    held_out = source.held_out().x_ND[:, 0].long()
    assert torch.equal(held_out.view(10, 10) - held_out.view(10, 10)[:, :1], torch.arange(10).expand(10, 10))
    assert (held_out.view(10, 10)[:, 0] % 10 == 0).all()
    assert held_out.diff().max() > 10  # not one stretch
    assert torch.equal(ArraySource(path).held_out().x_ND[:, 0].long(), held_out)
    assert not torch.equal(ArraySource(path, seed=1).held_out().x_ND[:, 0].long(), held_out)
    everything = ArraySource(path, held_out_frac=0)
    assert len(everything.held_out()) == 0
    assert everything.held_out().x_ND.shape == (0, D)
    assert everything.describe()["n_tokens"] == N


def test_a_file_describes_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", rows(50, dtype=torch.float64))
    metadata = ArraySource(path, seed=4).describe()
    assert metadata["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (metadata["n_rows"], metadata["d_in"], metadata["key"], metadata["seed"]) == (50, D, "x", 4)
    assert metadata["split"] == "seeded permutation of blocks of 1 consecutive rows"
    assert {type(value) for value in metadata.values()} <= {str, int, float}


def test_keys_choose_among_several(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": rows(20), "b": rows(20, 3)}, path)
    assert ArraySource(path, key="b").d_in == 3
    with pytest.raises(CosaeError, match=r"2 tensors .*by its key"):
        ArraySource(path)
    with pytest.raises(CosaeError, match=r"no tensor 'c'.* a \(20, 5\)"):
        ArraySource(path, key="c")
    path = tmp_path / "a.parquet"
    vectors = list(rows(20).numpy())
    pq.write_table(pa.table({"id": list(range(20)), "x": vectors, "y": [v[:2] for v in vectors]}), path)
    assert ArraySource(path, key="y").d_in == 2
    with pytest.raises(CosaeError, match="has 2 list columns"):
        ArraySource(path)
    with pytest.raises(CosaeError, match="has no list column 'id'"):
        ArraySource(path, key="id")
    pq.write_table(pa.table({"id": list(range(20)), "x": vectors}), path)
    assert ArraySource(path).describe()["key"] == "x"
    with pytest.raises(CosaeError, match="without a key"):
        ArraySource(write(tmp_path / "a.npy", rows(20)), key="x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("suffix", "shape"), FORMATS)
def test_the_first_value_that_is_not_finite_is_named(
    tmp_path: Path, suffix: str, shape: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cosae.activations.arrays.SCAN_ELEMENTS", 64)
    x = rows(100)
    x[97, 0] = x[71, 3] = x[71, 4] = value
    with pytest.raises(CosaeError, match=rf"Got {value} at row 71, column 3 \(counted from 0\)"):
        ArraySource(write(tmp_path / f"a{suffix}", x, shape))


def test_float64_beyond_float32_is_refused(tmp_path: Path) -> None:
    x = rows(20, dtype=torch.float64)
    x[3, 2] = 1e300
    with pytest.raises(CosaeError, match=r"float32 must .* inf at row 3, column 2"):
        ArraySource(write(tmp_path / "a.npy", x))


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".parquet"])
@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99])
def test_cut_files_are_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    path = write(tmp_path / f"a{suffix}", rows())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with pytest.raises(CosaeError, match=r"damaged.*write it again") as e:
        ArraySource(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".parquet"])
def test_foreign_and_missing_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    with pytest.raises(CosaeError, match="does not exist; check the path"):
        ArraySource(path)
    path.write_bytes(b"something else altogether " * 100)
    with pytest.raises(CosaeError, match="is damaged, cut short or no"):
        ArraySource(path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(np.zeros((3, 4))))
    for name in ("a.npy", "b.npy"):
        with pytest.raises(CosaeError, match=r"holds Python objects, pickled.* save an array"):
            ArraySource(tmp_path / name)
    (tmp_path / "c.npy").write_bytes(bytes(100))
    with pytest.raises(CosaeError, match=r"damaged.*NumPy"):
        ArraySource(tmp_path / "c.npy")


@pytest.mark.parametrize("name", ["a.pt", "a.csv", "a", "a.npz"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CosaeError, match=r"\.safetensors, \.npy, \.parquet.* Got"):
        ArraySource(tmp_path / name)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(4, 3, 2, 1), r"N × d.* \(4, 3, 2, 1\)"),
        (torch.zeros(4), r"N × d.* \(4,\)"),
        (torch.zeros(0, 3), r"not empty. Got shape \(0, 3\)"),
        (torch.zeros(3, 0), r"not empty. Got shape \(3, 0\)"),
        (torch.zeros(4, 3, dtype=torch.int32), r"int32 .*as float32"),
        (torch.zeros(4, 3, dtype=torch.bool), r"bool .*as float32"),
        (torch.zeros(4, 3, dtype=torch.complex64), r"complex64 .*as float32"),
    ],
)
def test_wrong_ranks_sizes_and_dtypes_are_refused(tmp_path: Path, suffix: str, x: Tensor, match: str) -> None:
    with pytest.raises(CosaeError, match=match):
        ArraySource(write(tmp_path / f"a{suffix}", x))


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"x": [[1.0, 2.0], [3.0]]}, "one length.* 1 to 2"),
        ({"x": [[1.0, 2.0], None]}, r"-1 to 2 .*missing"),
        ({"x": [[1.0, 2.0], [3.0, None]]}, "'x' .*missing values"),
        ({"x": [[1, 2], [3, 4]]}, "holds int64 values; save them as"),
        ({"x": [["a"], ["b"]]}, "holds string values; save them as"),
        ({"a": [1.0, 2.0], "b": [1.0, None]}, "Column 'b' of '.*' has missing values"),
        ({"a": [1.0, 2.0], "id": [1, 2]}, "column 'id' is int64; drop or convert it"),
        ({"a": [1.0, 2.0], "name": ["x", "y"]}, "'name' is string"),
        ({"a": pa.array([], pa.float32())}, r"not empty. Got shape \(0, 1\)"),
        ({"x": pa.array([], pa.list_(pa.float32(), 3))}, "not empty"),
    ],
)
def test_unclear_tables_are_refused(tmp_path: Path, columns: dict[str, Any], match: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(CosaeError, match=match):
        ArraySource(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1. Got 0"),
        ({"held_out_frac": 1.0}, "held_out_frac .*Got 1.0"),
        ({"held_out_frac": -0.1}, "held_out_frac .*Got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(CosaeError, match=match):
        ArraySource(write(tmp_path / "a.npy", rows(20)), **options)


def test_one_row_cannot_be_split_but_two_can(tmp_path: Path) -> None:
    with pytest.raises(CosaeError, match="has a single row"):
        ArraySource(write(tmp_path / "a.npy", rows(1)))
    assert len(ArraySource(tmp_path / "a.npy", held_out_frac=0).held_out()) == 0
    two = ArraySource(write(tmp_path / "b.npy", rows(2)), held_out_frac=0.9)
    assert (two.describe()["n_tokens"], two.describe()["n_held_out"]) == (1, 1)


def test_orders_are_permutations_of_their_own_for_each_seed_and_epoch() -> None:
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)
    state = torch.random.get_rng_state()
    assert torch.equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("positions", "kept"), [("all", [0, 1, 2, 3, 4]), ("cls", [0]), ("patches", [1, 2, 3, 4])])
def test_rows_of_three_dimensions_keep_their_sequence_and_place(
    tmp_path: Path, positions: str, kept: list[int]
) -> None:
    x_NTD = np.random.default_rng(0).normal(size=(60, 5, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x_NTD)
    for source in (
        ArraySource(tmp_path / "x.npy", positions=positions, chunk_tokens=7),
        TensorSource(torch.from_numpy(x_NTD), positions=positions, chunk_tokens=7),
    ):
        held_out, chunk = source.held_out(), next(source.chunks(3))
        for rows in (held_out, chunk):
            assert {*rows.position_N.tolist()} <= {*kept}
            assert np.array_equal(rows.x_ND.numpy(), x_NTD[rows.doc_N.numpy(), rows.position_N.numpy()])
        assert source.n_rows == 60 * len(kept)
        whole = [held_out.doc_N.tolist().count(doc) for doc in {*held_out.doc_N.tolist()}]
        assert whole == [len(kept)] * 6  # a tenth of the sequences, each with all its places
    with pytest.raises(CosaeError, match=r"places of arrays \(N, T, d\)"):
        TensorSource(torch.from_numpy(x_NTD[:, 0]), positions="cls")
