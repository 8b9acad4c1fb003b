"""The one door for files of others: whatever is wrong with one, its reader returns or says one short sentence."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cosae.errors import CosaeError
from tests.support.readers import READERS, Reader, damage, replace

CASES, MANY_CASES = 12, 500
MOST_CHARACTERS = 900
MOST_MEMORY = 600 * 2**20


def peak_memory() -> int:
    """Largest resident bytes since `forget_peak`; 0 where this is not known."""
    if not sys.platform.startswith("linux"):
        return 0
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def forget_peak() -> int:
    """Begin to measure anew; bytes that are resident now."""
    if sys.platform.startswith("linux") and os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    return peak_memory()


def returns_or_says_one_sentence(reader: Reader, path: Path, where: str) -> bool:
    """Whether it returned."""
    try:
        reader.read(path)
    except CosaeError as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {str(error)[:300]}") from error
    else:
        return True
    said = said.replace(str(path.parent), "")
    assert "\n" not in said, where
    assert len(said) < MOST_CHARACTERS, f"{where}: {len(said)} characters: {said[:300]}"
    return False


def fuzz(name: str, folder: Path, cases: int) -> None:
    reader = READERS[name]
    path = reader.write(folder)
    whole = {file: file.read_bytes() for file in reader.files(path)}
    assert returns_or_says_one_sentence(reader, path, "as it was written")
    before, refused = forget_peak(), 0
    for seed in range(cases):
        draw = random.Random(seed)
        file = draw.choice(sorted(whole))
        damage(file, draw)
        if reader.seal is not None and draw.random() < 0.5:
            with suppress(Exception):  # damaged beyond that: refused all the same
                reader.seal(path)
        refused += not returns_or_says_one_sentence(reader, path, f"{name}, seed {seed}, {file.name}")
        for there in reader.files(path):
            if there not in whole:
                there.unlink()
        for there, content in whole.items():
            replace(there, content)
    assert refused > cases // 10
    assert peak_memory() - before < MOST_MEMORY


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    fuzz(name, tmp_path, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_damaged_files_are_read_or_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    fuzz(name, tmp_path, MANY_CASES)


def parquet(table: Any) -> Callable[[Path], object]:
    """Writes a Parquet file whose text is whatever the bytes are."""

    def write(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: pa.array(column, pa.binary()).view(pa.string()) for name, column in table.items()}
        pq.write_table(pa.table(columns), path)

    return write


def archive(entries: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as there:
            for i in range(entries):
                there.writestr(str(i), b"")

    return write


def npy(header: str) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


SPARSE = 1_500_000_000
ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
NAMED: tuple[tuple[str, str, bytes | int | Callable[[Path], object]], ...] = (
    ("recipe.json", "recipe.json", b"[" * 100_000),
    ("recipe.json", "recipe.json", b'{"a":' * 100_000),
    ("recipe.json", "recipe.json", b'{"training": {"steps": 1e15}}'),
    ("recipe.json", "recipe.json", b'{"training": {"optimizer": {"lr": 1e308}}}'),
    ("recipe.json", "recipe.json", SPARSE),
    ("recipe.yaml", "recipe.yaml", b"[" * 20_000),
    ("recipe.yaml", "recipe.yaml", b"{a: 1, 2: 3, [4]: 5}"),
    ("recipe.yaml", "recipe.yaml", b"1: 2\nname: x\n"),
    ("recipe.yaml", "recipe.yaml", b"name: !!bool abc"),
    ("recipe.yaml", "recipe.yaml", b"name: !!timestamp abc"),
    ("recipe.yaml", "recipe.yaml", b"name: !!python/object/apply:os.system [true]"),
    ("recipe.yaml", "recipe.yaml", ALIASES.encode()),
    ("recipe.yaml", "recipe.yaml", b"x" * 100_000 + b": 1"),
    ("x.npy", "x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000000000000000, 4)}")),
    ("x.npy", "x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4")),
    ("x.npy", "x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -4)}")),
    ("x.npy", "x.npy", npy("\x00" * 50)),
    ("x.parquet", "x.parquet", b"PAR1" + b"\xff" * 64 + b"PAR1"),
    ("text.jsonl", "rows.jsonl", b'{"text": ' + b"[" * 100_000),
    ("text.jsonl", "rows.jsonl", b'{"text": ' + b"9" * 100_000 + b"}"),
    ("text.parquet", "rows.parquet", parquet({"text": [b"\xff\xfe", b"\xc3"]})),
    ("labels.jsonl", "rows.jsonl", b'{"text": "a", "label": ' + b'{"a":' * 100_000),
    ("labels.parquet", "rows.parquet", parquet({"text": [b"a"], "label": [b"\xc3"]})),
    ("saved text", "state.json", b"[" * 100_000),
    ("model", "config.json", b"[" * 100_000),
    ("model", "tokenizer.json", b"{}"),
    ("cosae", "cfg.json", SPARSE),
    ("dictionary", "ae.pt", b"PK\x03\x04" + bytes(100) + b"PK\x05\x06" + bytes(18)),
    ("dictionary", "ae.pt", archive(5_000)),
    ("dictionary", "config.json", SPARSE),
    ("gemma_scope npz", "params.npz", archive(5_000)),
    ("gemma_scope npz", "params.npz", b"PK\x03\x04" + bytes(100)),
    ("saelens jumprelu", "cfg.json", SPARSE),
    ("report", "run.json", b"[" * 100_000),
    ("finished run", "run.json", b"[" * 100_000),
    ("checkpoint", "checkpoint.json", b"[" * 100_000),
)


@pytest.mark.parametrize(("name", "file", "content"), NAMED, ids=[f"{i} {name}" for i, (name, *_) in enumerate(NAMED)])
def test_hostile_files_by_name(
    name: str, file: str, content: bytes | int | Callable[[Path], object], tmp_path: Path
) -> None:
    path = READERS[name].write(tmp_path)
    (place,) = [found for found in READERS[name].files(path) if found.name == file]
    place.unlink()
    if callable(content):
        content(place)
    elif isinstance(content, int):
        place.touch()
        os.truncate(place, content)
    else:
        place.write_bytes(content)
    before = forget_peak()
    with pytest.raises(CosaeError) as refusal:
        READERS[name].read(path)
    said = str(refusal.value).replace(str(tmp_path), "")
    assert "\n" not in said
    assert len(said) < MOST_CHARACTERS
    assert path.name in said
    assert peak_memory() - before < MOST_MEMORY


def lets_go(pipe: Path) -> bool:
    """Whether somebody has the pipe open for reading, which is let go then: it reads the end of a file."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno != errno.ENXIO:  # nobody reads
            raise
        return False
    return True


def test_who_waits_for_a_pipe_is_seen_and_let_go(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert not lets_go(tmp_path / "pipe")
    read: list[bytes] = []
    reading = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reading.start()
    end = time.monotonic() + 60
    while not (seen := lets_go(tmp_path / "pipe")) and time.monotonic() < end:
        time.sleep(0.01)
    reading.join(60)
    assert (seen, read) == (True, [b""])


@pytest.mark.parametrize("name", READERS)
def test_pipes_and_endless_devices_are_refused(name: str, tmp_path: Path) -> None:
    """In the place of each file in turn. A reader that opened a pipe would wait for a writer."""
    path, end = READERS[name].write(tmp_path), time.monotonic() + 600
    for place in READERS[name].files(path):
        for endless in ("pipe", "device"):
            aside = place.rename(tmp_path / "aside")
            if endless == "pipe":
                os.mkfifo(place)
            else:
                place.symlink_to("/dev/zero")
            done: list[bool] = []
            reading = threading.Thread(
                target=lambda: done.append(not returns_or_says_one_sentence(READERS[name], path, str(place))),  # noqa: B023
                daemon=True,
            )
            reading.start()
            opened = False
            while reading.is_alive() and time.monotonic() < end:  # however slow the machine is
                reading.join(0.02)
                opened = opened or (endless == "pipe" and lets_go(place))
            assert not opened, f"{place} is opened, and waited for"
            assert done, f"{place}: another exception, or still read"
            place.unlink()
            aside.rename(place)
