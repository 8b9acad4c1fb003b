"""`cosae explain` as a command: an endpoint, a chat model in this process, a dry run; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cosae.browse.collect.build import build_store
from cosae.browse.collect.building import BuildOptions, Listed
from cosae.browse.explain.endpoint import LocalChat
from cosae.browse.store.reader import open_store
from cosae.cli import main
from cosae.errors import CosaeError
from tests.support.chat_stand_in import is_judgement, numbered, standing
from tests.support.chunk_sources import MadeUp, made_up_sae
from tests.support.tiny_model_runs import save_tokenizer
from tests.support.tiny_models import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = MadeUp(300)
    listed = {"one": Listed(made_up_sae(source), "1"), "two": Listed(made_up_sae(source, "inner"), "2")}
    return build_store(tmp_path_factory.mktemp("explain") / "store", source, listed, BuildOptions(window=5))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["explain", *map(str, arguments)])
    return int(end.value.code or 0)


def test_an_endpoint_is_asked_and_its_words_are_found_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(messages: list[dict[str, str]]) -> str:
        texts = numbered(messages)
        return json.dumps([1] * len(texts)) if is_judgement(messages) else f"EXPLANATION: odd words {texts[:2]}"

    with standing(reply) as stand:
        asked = [folder, "--endpoint", stand.url, "--model", "a/b", "--n-features", 2, "--examples", 4, "--quiet"]
        assert run(*asked, "--dry-run", "--price-in", 2.5) == 0
        told = capsys.readouterr().out
        assert not stand.asked
        assert run(*asked) == 0
        shown = capsys.readouterr().out
        questions = len(stand.asked)
    assert f"4 features: {questions} questions" in told
    assert "at these prices" in told
    assert "0.500" in shown
    assert "detection: two" in shown
    store = open_store(folder)
    told_of = [one.text for name in ("one", "two") for one in store.explanations(name).values()]
    assert len(told_of) == 4
    assert all(text.startswith("odd words") for text in told_of)
    assert json.loads((folder / "explain.json").read_text())["saes"]["one"]["detection"]["value"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "--endpoint URL"),
        (("--endpoint", "http://x"), "--model NAME"),
        (("--endpoint", "http://x", "--local", "y"), "not both"),
        (("--local", "y", "--model", "z"), "drop it"),
        (("--local", "y", "--price-in", "1"), "--dry-run"),
        (("--local", "y", "--tokens", "10"), "no say"),
        (("--dry-run", "--per-question", "0"), "per_question"),
    ],
)
def test_what_makes_no_sense_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], word: str
) -> None:
    assert run(folder, *arguments) == 2
    assert word in capsys.readouterr().err


def test_a_chat_model_in_this_process(tmp_path: Path) -> None:
    """Random weights answer nonsense, always the same; a model without a template is refused."""
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    model = make_model("llama")
    with pytest.raises(CosaeError, match="template"):
        LocalChat(model, tokenizer, "tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    chat = LocalChat(model, tokenizer, "tiny")
    question = [{"role": "user", "content": "def return import"}]
    first, again = (chat.ask(question, 8, 0.0, seed) for seed in (0, 1))
    assert first == again
    assert first.tokens_in == 3
    assert first.tokens_out is not None
    assert 1 <= first.tokens_out <= 8
    drawn = [chat.ask(question, 8, 1.0, seed).text for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(CosaeError, match="does not fit"):
        chat.ask([{"role": "user", "content": "def " * 400}], 8, 0.0, 0)
