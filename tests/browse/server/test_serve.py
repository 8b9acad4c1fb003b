"""A server of its own: it says where it is, stops at once, and refuses a taken port in a sentence."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra browse is not installed")
pytest.importorskip("pyarrow", reason="the extra browse is not installed")

from cosae.browse.server.serve import listening, notes_file, serve
from cosae.browse.store.reader import open_store
from cosae.errors import CosaeError
from tests.support.feature_stores import write_store

PROGRAM = """
import sys
from cosae.browse.server import serve
from cosae.browse.store.reader import open_store
serve(open_store(sys.argv[1]), port=0, log=lambda text: print(text, flush=True))
print("ended", flush=True)
"""


def test_it_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", 8)
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address is not None, line
        with urllib.request.urlopen(f"{address[0]}data/about") as answer:
            assert b'"saes"' in answer.read()
            start = time.monotonic()
            server.send_signal(signal.SIGINT)
            said, wrong = server.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert (server.returncode, said, wrong) == (0, "Stopped.\nended\n", "")


def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    store = open_store(write_store(tmp_path / "store", 8))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(CosaeError, match=f"port {port} of 127.0.0.1 cannot be had .*--port"):
            serve(store, port=port)
    store.close()


def test_addresses_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CosaeError, match="from 0"):
        listening("127.0.0.1", 70_000)
    with pytest.raises(CosaeError, match="no address"):
        listening("not an address", 0)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(write_store(tmp_path / "store", 8))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(CosaeError, match=r"cosae\[browse\]"):
        serve(store, port=0)
    store.close()


def test_notes_lie_beside_the_store() -> None:
    assert notes_file(Path("runs/a/browse")) == Path("runs/a/browse.notes.sqlite")
