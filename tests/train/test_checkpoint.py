"""Checkpoints: whole or absent, the damaged one passed over with a warning, the disk's refusal in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cosae.errors import CosaeError
from cosae.train import checkpoint
from cosae.train.checkpoint import FOLDER, KEEP, RECORD, checkpoints, read_latest, write_checkpoint


def written(run: Path, step: int) -> Path:
    parts = {
        "stream": {"buffer": torch.full((20, 3), float(step)), "generator": torch.arange(40, dtype=torch.uint8)},
        "arm.a<b": {
            "w": torch.arange(8.0).reshape(2, 4).T,
            "age": torch.tensor([2**40, 0]),
            "nan": torch.tensor(torch.nan),
        },
    }
    return write_checkpoint(run, step, parts, {"seconds": 0.1 + step, "arms": {"a<b": {"hint": None, "weight": 1 / 3}}})


def test_what_goes_in_comes_out_to_the_bit(tmp_path: Path) -> None:
    place = written(tmp_path, 7)
    assert place.parent == tmp_path / FOLDER
    parts, record, warnings = read_latest(tmp_path)
    assert warnings == []
    assert (record["step"], record["seconds"]) == (7, 7.1)
    assert record["arms"] == {"a<b": {"hint": None, "weight": 1 / 3}}
    assert set(parts) == {"stream", "arm.a<b"}
    assert torch.equal(parts["arm.a<b"]["w"], torch.arange(8.0).reshape(2, 4).T)
    assert parts["arm.a<b"]["age"].tolist() == [2**40, 0]
    assert bool(parts["arm.a<b"]["nan"].isnan())
    assert parts["stream"]["generator"].dtype == torch.uint8


def test_writing_copies_and_changes_nothing(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    write_checkpoint(tmp_path, 1, {"arm": {"w": weight, "same": weight}}, {})
    with torch.no_grad():
        weight.fill_(5.0)
    parts, _, _ = read_latest(tmp_path)
    assert parts["arm"]["w"].tolist() == parts["arm"]["same"].tolist() == [1.0, 1.0, 1.0]
    assert weight.requires_grad


def test_the_newest_few_are_kept_in_order(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        written(tmp_path, step)
    kept = checkpoints(tmp_path)
    assert len(kept) == KEEP == 2
    assert [p.name for p in kept] == ["step_000000100", "step_000001000"]
    assert read_latest(tmp_path)[1]["step"] == 1000


def test_the_same_step_may_be_written_again(tmp_path: Path) -> None:
    written(tmp_path, 5)
    write_checkpoint(tmp_path, 5, {"arm": {"w": torch.zeros(1)}}, {})
    parts, _, _ = read_latest(tmp_path)
    assert set(parts) == {"arm"}
    assert [p.name for p in (tmp_path / FOLDER).iterdir()] == ["step_000000005"]


def flip(file: Path, where: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x01
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def tamper(file: Path) -> None:
    """A number changed by a flip that leaves well-formed JSON."""
    text = file.read_text()
    assert "20.1" in text
    file.write_text(text.replace("20.1", "20.3"))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "tensor flipped": lambda place: flip(place / "arm.a<b.safetensors", 1.0),
    "header flipped": lambda place: flip(place / "arm.a<b.safetensors", 0.0),
    "stream flipped": lambda place: flip(place / "stream.safetensors", 0.9),
    "file truncated": lambda place: truncate(place / "stream.safetensors"),
    "file emptied": lambda place: (place / "stream.safetensors").write_bytes(b""),
    "file missing": lambda place: (place / "stream.safetensors").unlink(),
    "facts missing": lambda place: (place / RECORD).unlink(),
    "facts truncated": lambda place: truncate(place / RECORD),
    "facts flipped": lambda place: tamper(place / RECORD),
    "facts a list": lambda place: (place / RECORD).write_text("[1]"),
    "facts not text": lambda place: (place / RECORD).write_bytes(b"\xff\xfe\x00"),
    "folder emptied": lambda place: [file.unlink() for file in place.iterdir()],
    "a file in its place": lambda place: (shutil.rmtree(place), place.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_remark(tmp_path: Path, damage: str) -> None:
    written(tmp_path, 10)
    DAMAGES[damage](written(tmp_path, 20))
    parts, record, warnings = read_latest(tmp_path)
    assert record["step"] == 10
    assert parts["stream"]["buffer"][0, 0] == 10.0
    (warning,) = warnings
    assert "step_000000020 is damaged" in warning
    assert "going on from the checkpoint before it" in warning
    assert "\n" not in warning


def test_every_single_bit_of_the_record_is_guarded(tmp_path: Path) -> None:
    written(tmp_path, 10)
    file = written(tmp_path, 20) / RECORD
    whole = file.read_bytes()
    for byte in range(0, len(whole), 3):
        file.write_bytes(whole[:byte] + bytes([whole[byte] ^ 0x02]) + whole[byte + 1 :])
        assert read_latest(tmp_path)[1]["step"] == 10, whole[byte - 8 : byte + 8]


def test_where_none_is_whole_one_sentence_says_so(tmp_path: Path) -> None:
    for step in (10, 20):
        truncate(written(tmp_path, step) / "stream.safetensors")
    with pytest.raises(CosaeError, match=r"no checkpoint in .* is complete") as caught:
        read_latest(tmp_path)
    assert "Start the run again" in str(caught.value)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(CosaeError, match="has no checkpoint to go on from"):
        read_latest(tmp_path)


def test_a_half_written_folder_is_no_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    written(tmp_path, 10)
    half = tmp_path / FOLDER / ".step_000000020.partial"
    half.mkdir()
    (half / "stream.safetensors").write_bytes(b"half")
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000000010"]
    assert read_latest(tmp_path)[1]["step"] == 10
    written(tmp_path, 20)
    assert not half.exists()
    assert read_latest(tmp_path)[1]["step"] == 20


def test_a_later_version_is_named_and_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    written(tmp_path, 10)
    monkeypatch.undo()
    with pytest.raises(CosaeError, match=r"later cosae \(version 2\)"):
        read_latest(tmp_path)


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_full_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    written(tmp_path, 10)
    before = {p: p.read_bytes() for p in (tmp_path / FOLDER).rglob("*") if p.is_file()}
    real, calls = checkpoint.save_file, []

    def save_file(tensors: Any, file: Path) -> None:
        calls.append(file)
        if len(calls) > fails_at:
            file.write_bytes(b"part of it")
            raise OSError(28, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(CosaeError, match=r"step 20 could not be written.*No space left.*is kept"):
        written(tmp_path, 20)
    assert {p: p.read_bytes() for p in (tmp_path / FOLDER).rglob("*") if p.is_file()} == before
    assert read_latest(tmp_path)[1]["step"] == 10


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.write_text("x")
    with pytest.raises(CosaeError, match="could not be written"):
        written(run, 1)


def test_the_record_is_json_that_others_can_read(tmp_path: Path) -> None:
    record = json.loads((written(tmp_path, 3) / RECORD).read_text())["record"]
    assert (record["version"], record["step"]) == (1, 3)
    assert set(record["files"]) == {"stream.safetensors", "arm.a<b.safetensors"}
