"""The model behind the live pages: what it says of a text is what a direct call says; steering is `cosae steer`'s."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cosae.errors import CosaeError
from cosae.models.embedded import load
from cosae.recipe import DataConfig
from cosae.run.explore.live import MOST_TOKENS, LiveModel
from cosae.run.explore.steer import Steerable, continued, steer
from cosae.run.requests import Place, SteerOptions
from cosae.sae.calibrate import calibrate
from cosae.sae.file import save
from cosae.sae.model import SAE
from tests.support.feature_stores import write_store

TEXT = "def f(x):\n    return x + 1\n"
NAMES = ("one", "a/b <i>")
ASKED = {"sae": "a/b <i>", "feature": 5, "action": "add", "amount": 9, "prompt": "def f(", "new_tokens": 4, "seed": 0}


class Store:
    """What the live model asks of a feature store."""

    def __init__(self, saes: dict[str, SAE], folder: Path) -> None:
        self.saes = [SimpleNamespace(name=name, path=str(folder / str(i))) for i, name in enumerate(saes)]

    def overview(self) -> Any:
        return SimpleNamespace(norms=SimpleNamespace(median=10.0, factor=2.0))

    def columns(self, name: str) -> dict[str, Any]:
        return {"largest": np.arange(64.0)}

    def sae(self, name: str) -> Any:
        if name not in NAMES:
            raise CosaeError(f"no SAE {name!r}")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("live")
    model, tokenizer = load()
    ids = tokenizer(TEXT * 8, return_tensors="pt", add_special_tokens=False)["input_ids"]
    x_ND = model(ids, output_hidden_states=True).hidden_states[4][0].detach()
    saes = {}
    for i, name in enumerate(NAMES):
        saes[name] = sae = SAE.build(192, 64, "inner", k=6, seed=i, sample=x_ND)
        calibrate(sae, x_ND)
        sae.metadata = {"model": "embedded", "site": "resid_post.3"}
        sae.metadata |= (
            {"filter": {"policy": {"kind": "position_0"}, "median_norm": 1.0, "seen_tokens": 9}} if i else {}
        )
        save(sae, folder / str(i))
    return LiveModel(Store(saes, folder), Place()), saes, folder  # type: ignore[arg-type]


def test_what_fires_on_a_text_is_what_a_direct_call_says(parts: Any) -> None:
    live, saes, _ = parts
    found = live.activations(TEXT)
    model, tokenizer = load()
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    ids = ids if len(found["tokens"]) == len(ids) else ids[1:]
    with torch.no_grad():
        x_ND = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[4][0]
    assert "".join(token["text"] for token in found["tokens"][-5:]) == tokenizer.decode(ids[-5:])
    norms = x_ND.norm(dim=-1).tolist()
    assert [token["norm"] for token in found["tokens"]] == pytest.approx(norms, rel=1e-4)
    assert [token["sink"] for token in found["tokens"]][1:] == [norm >= 20 for norm in norms[1:]]
    assert found["tokens"][0]["sink"], "position 0"
    for one, (name, sae) in zip(found["saes"], saes.items(), strict=True):
        with torch.no_grad():
            dense_NF = sae.encode(x_ND).to_dense()
        assert one["name"] == name
        assert len(one["entries"]) == int((dense_NF != 0).sum()) > 10
        for token, feature, value in one["entries"]:
            assert value == pytest.approx(float(dense_NF[token, feature]), rel=1e-3, abs=1e-4)
            assert one["largest"][feature] == feature
        assert one["left_out"] == [0]


def test_steering_is_the_command_s(parts: Any) -> None:
    live, _, folder = parts
    found = live.steer(ASKED | {"temperature": 0.8})
    direct = steer(folder / "1", "def f(", Place(), SteerOptions((5,), add=9.0, new_tokens=4, temperature=0.8))
    assert (found["without"], found["changed"]) == (direct.without, direct.changed)
    assert live.steer(ASKED | {"action": "ablate", "amount": None})["what"].startswith("ablate 5")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sae": "nobody"}, "no SAE"),
        ({"sae": 5}, "must be text"),
        ({"feature": 64}, "64"),
        ({"feature": -1}, "whole number"),
        ({"feature": "5"}, "whole number"),
        ({"action": "delete"}, "action"),
        ({"amount": float("inf")}, "must be a number"),
        ({"amount": "9"}, "must be a number"),
        ({"temperature": -1}, "temperature"),
        ({"new_tokens": 10**6}, "from 0 to 200"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"seed": -1}, "whole number"),
        ({"prompt": None}, "must be text"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(change: dict[str, Any], words: str, parts: Any) -> None:
    with pytest.raises(CosaeError, match=words):
        parts[0].steer(ASKED | change)


def test_texts_that_cannot_be_read(parts: Any) -> None:
    with pytest.raises(CosaeError, match="no text"):
        parts[0].activations(" \n")
    with pytest.raises(CosaeError, match=f"at most {MOST_TOKENS:,}"):
        parts[0].activations("a b " * MOST_TOKENS)


def test_who_stops_it_waits_for_one_token(parts: Any) -> None:
    live = LiveModel(parts[0]._store, Place())
    assert live.stop(1.0)
    with pytest.raises(CosaeError, match="stopping"):
        live.steer(ASKED)
    with pytest.raises(CosaeError, match="stopping"):
        live.activations(TEXT)
    stopped = iter([False, True, True, True])
    sae = parts[1]["one"]
    model, tokenizer = load()
    data = DataConfig(model="embedded", site="resid_post.3")
    options = SteerOptions((5,), ablate=True, new_tokens=50)
    found = continued(Steerable(sae, data, model, tokenizer), "def f(", options, 0, lambda: next(stopped))
    assert len(found.changed_T) == len(found.without_T) - 1 < 20


BUSY = """
import sys, time
from cosae.cli import main
from cosae.run.explore import live

def opened(self):
    print("loading", flush=True)
    time.sleep(60)

live.LiveModel._opened = opened
live.live_model = live.LiveModel
main(["browse", sys.argv[1], "--port", "0", "--quiet"])
"""


def test_ctrl_c_does_not_wait_for_a_model_that_is_being_loaded(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", 8)
    command = [sys.executable, "-c", BUSY, str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
        assert address is not None
        body, kind = json.dumps({"text": "a"}).encode(), {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{address[0]}data/activations", body, kind)

        def ask() -> None:
            with suppress(OSError):
                urllib.request.urlopen(asked)

        asking = threading.Thread(target=ask)
        asking.start()
        assert server.stdout.readline() == "loading\n"
        start = time.monotonic()
        server.send_signal(signal.SIGINT)
        said, wrong = server.communicate(timeout=20)
        asking.join()
    assert time.monotonic() - start < 5
    assert (server.returncode, said, wrong) == (0, "Stopped.\n", "")
