"""`cosae explain` at a real server: `transformers serve`, with a chat model of random weights.

COSAE_CHAT_MODEL may name the folder of another chat model.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cosae.browse.collect.build import build_store
from cosae.browse.collect.building import BuildOptions, Listed
from cosae.browse.explain.endpoint import Endpoint, LocalChat
from cosae.browse.store.reader import open_store
from cosae.cli import main
from tests.support.chunk_sources import MadeUp, made_up_sae
from tests.support.tiny_model_runs import save_tokenizer
from tests.support.tiny_models import make_config

pytestmark = pytest.mark.slow
PATIENCE_S = 120
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if named := os.environ.get("COSAE_CHAT_MODEL"):
        return Path(named)
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("chat") / "tiny chat"
    folder.mkdir()
    save_tokenizer(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = make_config("llama")
    config.max_position_embeddings = 4096
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that is asked for its health until it answers."""
    httpx = pytest.importorskip("httpx", reason="the extra explain is not installed")
    pytest.importorskip("accelerate", reason="transformers serve is not installed: pip install 'transformers[serving]'")
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve is not installed: pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(chat_model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as written:
        serving = subprocess.Popen(
            command, stdout=written, stderr=written, env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        )
    try:
        until = time.monotonic() + PATIENCE_S
        while True:
            assert serving.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serving.terminate()
        serving.wait(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = MadeUp(300)
    listed = {"one": Listed(made_up_sae(source), "1"), "two": Listed(made_up_sae(source, "inner"), "2")}
    return build_store(tmp_path_factory.mktemp("explain") / "store", source, listed, BuildOptions(window=5))


def test_the_server_answers_as_the_model_does_in_this_process(chat_model: Path, address: str) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(chat_model).eval()
    local = LocalChat(model, tokenizer, "here")
    there = Endpoint(address, str(chat_model))
    for words in ("def return class", "if x is not y : import z"):
        question = [{"role": "system", "content": "for x in y"}, {"role": "user", "content": words}]
        told = there.ask(question, 12, 0.0, 0)
        assert told == local.ask(question, 12, 0.0, 0)
        assert told.text
    there.close()


def explain(folder: Path, address: str, model: object) -> int:
    asked = ["explain", str(folder), "--endpoint", address, "--model", str(model), "--n-features", "2", "--quiet"]
    with pytest.raises(SystemExit) as end:
        main([*asked, "--examples", "4", "--baselines", "constant", "unigram", "--retries", "1", "--max-tokens", "24"])
    return int(end.value.code or 0)


def test_features_are_explained_once(folder: Path, chat_model: Path, address: str) -> None:
    """What cannot be read is counted; the same command asks nothing again."""
    assert explain(folder, address, chat_model) == 0
    first = json.loads((folder / "explain.json").read_text())
    lines = [json.loads(line) for line in (folder / "explain.jsonl").read_text().splitlines()]
    assert len(lines) == first["asked"] >= 4
    assert first["answered_before"] == 0
    assert all(line["tokens_in"] > 50 and 0 < line["tokens_out"] <= 24 for line in lines)
    assert sum(line["tokens_in"] for line in lines) == first["tokens_in"]
    explained = {name: open_store(folder).explanations(name) for name in ("one", "two")}
    for name, found in first["saes"].items():
        assert found["features"] == 2
        assert len(explained[name]) == 2 - found["unexplained"]
        for kind in ("detection", "fuzzing") if explained[name] else ():
            assert found[kind]["judged"] + found[kind]["failed"] == 8 * len(explained[name])
            assert (found[kind]["value"] is None) <= (found[kind]["judged"] < 8)
    assert explain(folder, address, chat_model) == 0
    again = json.loads((folder / "explain.json").read_text())
    assert again["asked"] == 0
    assert again["answered_before"] == first["asked"]
    assert again["saes"] == first["saes"]


def test_a_model_that_the_server_does_not_have_is_said(
    folder: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(folder, address, "somebody/else:7b") == 2
    told = capsys.readouterr().err
    assert "somebody/else:7b" in told
    assert "--model" in told
