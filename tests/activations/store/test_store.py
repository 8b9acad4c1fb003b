"""Activations on disk: what goes in comes out, every order is repeatable, and nothing damaged is ever handed out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cosae.activations.filter import FilterPolicy, fit, norm_summary
from cosae.activations.store.format import restore_rows, round_rows, store_dtype
from cosae.activations.store.reader import Store, find_stores, open_store
from cosae.activations.store.shards import ShardRows
from cosae.activations.store.source import V01, Mixing, StoreSource, mixing_of
from cosae.activations.store.statistics import noise_warning
from cosae.activations.stream import ActivationStream, Source
from cosae.errors import CosaeError
from cosae.types import Activations
from tests.support.small_stores import fingerprint, rows, write_store

IDS = ("token_N", "doc_N", "position_N", "index_N", "special_N", "norm_N")


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def everything(store: Store, side: str = "train") -> Activations:
    return store.take(side, torch.arange(store.n_rows(side)))


def test_dtype_names() -> None:
    assert [store_dtype(name) for name in ("fp32", "bf16", "float16", "int8")] == [
        "float32",
        "bfloat16",
        "float16",
        "int8",
    ]
    with pytest.raises(CosaeError, match=r"one of float32, .*int8"):
        store_dtype("int4")


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    st.integers(1, 4).flatmap(lambda d: st.lists(st.lists(floats, min_size=d, max_size=d), min_size=1, max_size=8)),
)
def test_rounding_stays_within_its_stated_bounds(values: list[list[float]]) -> None:
    x_ND = torch.tensor(values, dtype=torch.float32)
    exact = x_ND.double()
    largest_N1 = exact.abs().amax(1, keepdim=True)
    # below the smallest normal number a scale cannot be finer
    bound = torch.maximum(largest_N1 / 254, torch.tensor(torch.finfo(torch.float32).tiny / 2)) * (1 + 1e-5)
    stored, scale = round_rows(x_ND, "int8")
    back = restore_rows(stored, scale).double()
    assert bool(back.isfinite().all())
    assert bool(((back - exact).abs() <= bound).all())
    inside = x_ND.abs() < 3e38  # what rounds up past the largest bfloat16 is infinity
    for dtype, share, least in (("bfloat16", 2**-8, 1e-40), ("float16", 2**-11, 2**-25), ("float32", 0.0, 0.0)):
        ok = inside if dtype != "float16" else x_ND.abs() < 65504
        back = restore_rows(*round_rows(x_ND, dtype)).double()
        assert bool(((back - exact).abs() <= share * exact.abs() + least)[ok].all())


@settings(max_examples=12)
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8"]),
    shard_tokens=st.integers(7, 40),
    concepts=st.sampled_from([0, 1, 8, 9]),
    seed=st.integers(0, 5),
)
def test_any_store_gives_back_what_went_in(
    n: int, d: int, dtype: str, shard_tokens: int, concepts: int, seed: int
) -> None:
    given_rows = rows(n, d, seed, labels=concepts)
    with TemporaryDirectory() as temporary:
        names = [f"concept {i}" for i in range(concepts)] or None
        held_out = rows(3, d, 99, 0, labels=concepts)
        folder = write_store(
            Path(temporary) / "s", given_rows, held_out, dtype=dtype, shard_tokens=shard_tokens, concepts=names
        )
        store = Store(folder)
        back = everything(store)
        assert [store.n_rows(side) for side in ("train", "held_out")] == [n, 3]
        assert store.shard_rows("train") == [shard_tokens] * (n // shard_tokens) + [n % shard_tokens] * (
            n % shard_tokens > 0
        )
        for name in IDS:
            assert torch.equal(getattr(back, name), getattr(given_rows.activations, name)), name
        wanted = restore_rows(*round_rows(given_rows.activations.x_ND, dtype))
        assert back.x_ND.dtype == wanted.dtype
        assert torch.equal(back.x_ND, wanted)
        some = torch.arange(0, n, 2)
        assert torch.equal(store.take("train", some).index_N, given_rows.activations.index_N[some])
        if concepts:
            assert given_rows.labels_NL is not None
            labels, labelled = store.labels("train", some)
            bits = np.unpackbits(given_rows.labels_NL.numpy(), axis=1, bitorder="little", count=concepts).astype(bool)
            assert np.array_equal(labels, bits[::2])
            assert np.array_equal(labelled, given_rows.labelled_N.numpy()[::2])
        source = StoreSource(store, seed=seed, chunk_tokens=256)
        epoch = Activations.cat(list(islice(source.chunks(), source.chunks_per_epoch)))
        assert sorted(epoch.index_N.tolist()) == sorted(given_rows.activations.index_N.tolist())
        assert list(store.faults()) == []
        del store, source


def test_rows_that_come_from_nowhere_can_be_stored(tmp_path: Path) -> None:
    bare = Activations.bare(torch.randn(20, 3))
    back = everything(Store(write_store(tmp_path / "s", ShardRows(bare))))
    assert torch.equal(back.x_ND, bare.x_ND)
    assert bool((back.token_N == -1).all())


def test_shards_are_safetensors_that_anybody_can_read(tmp_path: Path) -> None:
    given_rows = rows(20, 6)
    write_store(tmp_path / "s", given_rows, dtype="int8")
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == ["index.json", "train-00000.safetensors", "train-00001.safetensors"]
    found = load_file(tmp_path / "s" / names[1])
    back = found["x"].float() * found["scale"][:, None]
    x_ND = given_rows.activations.x_ND[:16]
    assert bool(((back - x_ND).abs() <= x_ND.abs().amax(1, keepdim=True) / 254 * 1.0001).all())
    assert torch.equal(found["document"], given_rows.activations.doc_N[:16])


def test_statistics_are_those_of_the_rows_as_stored(tmp_path: Path) -> None:
    given_rows = rows(101, 5, seed=3)
    given_rows.activations.x_ND[::7] *= 30
    norm_N = given_rows.activations.x_ND.norm(dim=-1)
    given_rows = ShardRows(Activations(**{**vars(given_rows.activations), "norm_N": norm_N}))
    store = Store(write_store(tmp_path / "s", given_rows, dtype="bfloat16", shard_tokens=13))
    said, x_ND = store.statistics, everything(store).x_ND.double()
    assert said["rows"] == 101
    torch.testing.assert_close(torch.tensor(said["mean"], dtype=torch.float64), x_ND.mean(0))
    assert said["total_variance"] == pytest.approx(float((x_ND - x_ND.mean(0)).square().sum(1).mean()), rel=1e-12)
    policy = FilterPolicy(kind="none")
    wanted = norm_summary(given_rows.activations, fit(policy, norm_N))
    assert [value for _, value in said["norm"]["quantiles"]] == pytest.approx(list(wanted.quantiles), rel=1e-12)
    assert said["norm"]["median"] == pytest.approx(wanted.median_norm, rel=1e-12)
    assert said["norm"]["max_over_median"] == pytest.approx(wanted.max_over_median, rel=1e-12)
    large = norm_N >= 10 * wanted.median_norm
    first, special = given_rows.activations.position_N == 0, given_rows.activations.special_N
    assert int(large.sum()) > 0
    assert said["sinks"] == {
        "factor": 10.0,
        "position_0": int(first.sum()),
        "special": int(special.sum()),
        "large_norm": int(large.sum()),
        "any": int((large | first | special).sum()),
    }


def test_chunks_are_repeatable_and_epochs_differ(tmp_path: Path) -> None:
    store = Store(write_store(tmp_path / "s", rows(3000, 4), shard_tokens=700))
    source = StoreSource(store, seed=1, chunk_tokens=512)
    assert isinstance(source, Source)
    per_epoch = source.chunks_per_epoch
    first = list(islice(source.chunks(), 2 * per_epoch + 1))
    again = list(islice(StoreSource(Store(store.folder), seed=1, chunk_tokens=512).chunks(per_epoch), per_epoch + 1))
    for one, other in zip(first[per_epoch:], again, strict=True):
        assert torch.equal(one.x_ND, other.x_ND)
        assert torch.equal(one.index_N, other.index_N)
    epochs = [Activations.cat(first[:per_epoch]).index_N, Activations.cat(first[per_epoch : 2 * per_epoch]).index_N]
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert not torch.equal(epochs[0], epochs[1])
    other_seed = next(StoreSource(store, seed=2, chunk_tokens=512).chunks())
    assert not torch.equal(first[0].index_N, other_seed.index_N)
    steps = first[0].index_N.diff().abs()
    assert int((steps == 1).sum()) < 20  # rows of a block do not stay neighbours


@pytest.mark.parametrize(("mixing", "least", "most"), [(None, -0.2, 0.2), (Mixing(8, 64), -0.2, 0.25), (V01, 0.4, 1.0)])
def test_batches_of_a_sorted_store_are_no_more_alike_than_by_chance(
    mixing: Mixing | None, least: float, most: float, tmp_path: Path
) -> None:
    """Rows of one label, then rows of another: the share of a label in a batch and in the next (0.1: alike)."""
    n = 40_960
    store = Store(write_store(tmp_path / "s", rows(n, 4), shard_tokens=2048))
    source = StoreSource(store, chunk_tokens=4096, mixing=mixing)
    policy = FilterPolicy(kind="none", window_tokens=4096)
    stream = ActivationStream(source, batch_tokens=256, buffer_tokens=2048, seed=0, filter=policy)
    label_B = np.array([float((stream.next_batch().index_N < n // 2).float().mean()) for _ in range(n // 256)])
    lag_1 = float(np.corrcoef(label_B[1:], label_B[:-1])[0, 1])
    assert least <= lag_1 <= most


def test_how_a_store_is_shuffled_follows_from_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(write_store(tmp_path / "s", rows(3000, 4), shard_tokens=700))
    assert mixing_of(store) == Mixing(1, 64)
    monkeypatch.setattr("cosae.activations.store.source.FULL_ROWS", 2000)
    large = StoreSource(store, chunk_tokens=512)
    assert large.mixing.block_rows > 50  # a page of rows of a few bytes
    assert large.describe()["block_rows"] == large.mixing.block_rows
    epoch = Activations.cat(list(islice(large.chunks(), large.chunks_per_epoch)))
    assert torch.equal(epoch.index_N.sort().values, store.take("train", torch.arange(3000)).index_N.sort().values)


def test_a_guard_is_told_the_norms_of_the_whole_store_and_the_names_of_documents(tmp_path: Path) -> None:
    given_rows = rows(2000, 4)
    source = StoreSource(Store(write_store(tmp_path / "s", given_rows, rows(3, 4, 1, 0), shard_tokens=300)))
    reference = source.norm_reference()
    wanted = np.quantile(given_rows.activations.norm_N.double().numpy(), [0.05, 0.25, 0.5, 0.75, 0.95])
    assert reference.quantiles == pytest.approx(wanted.tolist(), rel=1e-12)
    assert reference.tokens == 2000
    assert [source.document_name(doc) for doc in (-1, 0, 1, 2, 3)] == [None, None, "doc b", "doc c", None]


def test_a_stream_from_a_store_resumes_to_the_bit(tmp_path: Path) -> None:
    def stream() -> ActivationStream:
        source = StoreSource(Store(tmp_path / "s"), seed=0, chunk_tokens=256)
        policy = FilterPolicy(window_tokens=500)
        return ActivationStream(source, batch_tokens=64, buffer_tokens=512, seed=0, filter=policy)

    write_store(tmp_path / "s", rows(2000, 4), dtype="bfloat16", shard_tokens=300)
    whole, cut = stream(), stream()
    for _ in range(10):
        whole.next_batch(), cut.next_batch()
    other = stream()
    other.restore(cut.state())
    for _ in range(40):
        whole.next_batch(), other.next_batch()
    assert whole.digest == other.digest


# What is damaged


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("sound") / "s", rows(40, 4), rows(9, 4, 5, 0), dtype="bfloat16")


def read_all(folder: Path) -> None:
    store = Store(folder)
    for side in ("train", "held_out"):
        everything(store, side)


@settings(max_examples=40)
@given(data=st.data())
def test_any_flipped_bit_is_refused_and_the_file_named(sound: Path, data: st.DataObject) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(sound, Path(temporary) / "s"))
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        flip(path, data.draw(st.integers(0, 8 * path.stat().st_size - 1)))
        with pytest.raises(CosaeError, match=path.name):
            read_all(folder)
        if path.name != "index.json":
            try:
                faults = list(Store(folder).faults())
            except CosaeError as error:
                faults = [str(error)]
            assert [path.name in fault for fault in faults] == [True]


@settings(max_examples=30)
@given(data=st.data())
def test_any_truncation_is_refused_at_opening_and_the_file_named(sound: Path, data: st.DataObject) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(sound, Path(temporary) / "s"))
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size - 1))])
        with pytest.raises(CosaeError, match=path.name):
            Store(folder)


def test_a_missing_a_swapped_and_a_foreign_shard_are_refused_at_opening(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "s"))
    one, other = folder / "train-00000.safetensors", folder / "train-00001.safetensors"
    assert one.stat().st_size == other.stat().st_size
    aside = one.rename(tmp_path / "aside")
    with pytest.raises(CosaeError, match=r"train-00000.*missing"):
        Store(folder)
    other.rename(one)
    aside.rename(other)
    with pytest.raises(CosaeError, match=r"train-00000.*another shard .*number 1"):
        Store(folder)
    foreign = write_store(tmp_path / "f", rows(40, 4), rows(9, 4, 5, 0), dtype="bfloat16", request={"corpus": "other"})
    shutil.copy(foreign / other.name, other)
    shutil.copy(sound / one.name, one)
    with pytest.raises(CosaeError, match=r"train-00001.*another store"):
        Store(folder)


def test_rows_changed_under_the_same_request_are_found_by_the_checksum(sound: Path, tmp_path: Path) -> None:
    """Equal in size, header and tag: only the bytes tell."""
    folder = Path(shutil.copytree(sound, tmp_path / "s"))
    twin = write_store(tmp_path / "t", rows(40, 4, seed=8), rows(9, 4, 5, 0), dtype="bfloat16")
    shutil.copy(twin / "train-00001.safetensors", folder / "train-00001.safetensors")
    store = Store(folder)
    store.take("train", torch.arange(16))
    with pytest.raises(CosaeError, match=r"train-00001.*checksum"):
        everything(store)


@pytest.mark.parametrize("header", [b"", b"\xff" * 8 + b"{}", (5).to_bytes(8, "little") + b"[1,2]", b"\x02" + bytes(7)])
def test_a_header_that_is_none_is_one_sentence(sound: Path, tmp_path: Path, header: bytes) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "s"))
    path = folder / "train-00000.safetensors"
    path.write_bytes(header + bytes(path.stat().st_size - len(header)))
    with pytest.raises(CosaeError, match=r"train-00000.*header"):
        Store(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["x"].update(data_offsets=[0, 10**12]),
        lambda header: header["x"].update(data_offsets=[-64, 0]),
        lambda header: header["norm"].update(data_offsets=header["token"]["data_offsets"]),
        lambda header: header["norm"].update(data_offsets="ab"),
        lambda header: header["norm"].pop("data_offsets"),
        lambda header: header["norm"].update(shape=[20_000_000_000]),
    ],
)
def test_a_header_that_points_elsewhere_is_refused_at_opening(sound: Path, tmp_path: Path, change: Any) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "s"))
    path = folder / "train-00000.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)[:length]
    path.write_bytes(content[:8] + text + content[8 + length :])
    with pytest.raises(CosaeError, match=r"train-00000.*header"):
        Store(folder)


def at(record: dict[str, Any], value: Any, *keys: Any) -> None:
    for key in keys[:-1]:
        record = record[key]
    record[keys[-1]] = value


@pytest.mark.parametrize(
    "change",
    [
        lambda record: at(record, "1", "version"),
        lambda record: at(record, 1.5, "version"),
        lambda record: record.pop("version"),
        lambda record: at(record, 20_000_000_000, "rows", "train"),
        lambda record: at(record, 20_000_000_000, "shards", 0, "rows"),
        lambda record: at(record, 1e300, "request", "d_in"),
        lambda record: at(record, 0, "request", "d_in"),
        lambda record: at(record, [[]], "documents", "train"),
        lambda record: at(record, 7, "documents", "train"),
        lambda record: at(record, [7], "shards"),
        lambda record: at(record, {"x": 1}, "request", "site"),
    ],
)
def test_an_index_of_other_kinds_is_one_sentence(sound: Path, tmp_path: Path, change: Any) -> None:
    """Well-formed, its digest its own, and nothing that cosae wrote."""
    from cosae.io.records import read_record, write_record

    folder = Path(shutil.copytree(sound, tmp_path / "s"))
    record = read_record(folder / "index.json")
    change(record)
    write_record(folder / "index.json", record)
    with pytest.raises(CosaeError, match=r"index.json|-00000.safetensors") as refusal:
        Store(folder)
    assert len(str(refusal.value)) < len(str(folder)) + 400


def test_folders_that_are_no_store(tmp_path: Path, sound: Path) -> None:
    with pytest.raises(CosaeError, match="holds no store"):
        Store(tmp_path)
    with pytest.raises(CosaeError, match="holds no store"):
        open_store(tmp_path / "absent")
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(CosaeError, match=r"index.json is damaged"):
        Store(tmp_path)
    both = tmp_path / "both"
    for name in ("a", "b"):
        shutil.copytree(sound, both / name)
    assert [place.name for place in find_stores(both)] == ["a", "b"]
    with pytest.raises(CosaeError, match=r"several sites \(a, b\): name one"):
        open_store(both)
    with pytest.raises(CosaeError, match=r"no store for the site 'mlp_out.1'"):
        open_store(both, "mlp_out.1")


def test_an_index_of_a_later_version_asks_for_an_upgrade(sound: Path, tmp_path: Path) -> None:
    from cosae.io.records import read_record, write_record

    folder = Path(shutil.copytree(sound, tmp_path / "s"))
    write_record(folder / "index.json", {**read_record(folder / "index.json"), "version": 99})
    with pytest.raises(CosaeError, match="later cosae"):
        Store(folder)
    assert json.loads((folder / "index.json").read_text())["record"]["version"] == 99


def test_equal_rows_make_equal_files(sound: Path, tmp_path: Path) -> None:
    again = write_store(tmp_path / "s", rows(40, 4), rows(9, 4, 5, 0), dtype="bfloat16")
    assert fingerprint(again) == fingerprint(sound)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_rows_far_from_zero_are_stored_centred(tmp_path: Path, dtype: str) -> None:
    """At a mean of 300 standard deviations plain bfloat16 adds a quarter of the variance as noise."""
    spread = rows(400, 32, 1)
    far = replace(spread, activations=replace(spread.activations, x_ND=spread.activations.x_ND + 300.0))
    exact_ND = far.activations.x_ND
    store = Store(write_store(tmp_path / "far", far, dtype=dtype, shard_tokens=150))
    back_ND = everything(store).x_ND
    variance = float((exact_ND.double() - exact_ND.double().mean(0)).square().sum(-1).mean())
    plain = restore_rows(*round_rows(exact_ND, dtype)).double() - exact_ND.double()
    noise = float((back_ND.double() - exact_ND.double()).square().sum(-1).mean()) / variance
    assert store.centred
    assert back_ND.dtype == torch.float32
    assert noise < 1e-3 < float(plain.square().sum(-1).mean()) / variance
    assert store.statistics["rounding_noise"] < 1e-3
    assert store.statistics["total_variance"] == pytest.approx(variance, rel=2e-3)
    assert noise_warning(store.statistics, dtype) is None


def test_rows_about_zero_are_stored_as_before(tmp_path: Path) -> None:
    store = Store(write_store(tmp_path / "near", rows(100, 16), dtype="bfloat16"))
    assert not store.centred
    assert store.record["version"] == 1
    assert everything(store).x_ND.dtype == torch.bfloat16


def test_a_store_of_0_1_that_lost_much_warns() -> None:
    """It was never centred and measured nothing; what rounding cost follows from its mean and variance."""
    known = {"mean": [100.0] * 8, "total_variance": 8.0}
    assert "2.8%" in str(noise_warning(known, "bfloat16"))
    assert noise_warning(known, "float16") is None
    assert noise_warning({"mean": [1.0] * 8, "total_variance": 8.0}, "bfloat16") is None
