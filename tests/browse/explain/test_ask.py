"""Explanations and their scores, against an endpoint that knows the truth, knows nothing, or misbehaves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosae.browse.collect.build import build_store
from cosae.browse.collect.building import BuildOptions, Listed
from cosae.browse.explain import prompts
from cosae.browse.explain.ask import bill, choose, explain_features
from cosae.browse.explain.endpoint import Endpoint
from cosae.browse.explain.material import material
from cosae.browse.explain.options import ExplainOptions
from cosae.browse.explain.score import balanced_accuracy, mean_of, paired
from cosae.browse.store.reader import FeatureStore, open_store
from cosae.browse.store.records import Score
from cosae.errors import CosaeError
from tests.support.chat_stand_in import Stand, is_judgement, numbered, standing
from tests.support.chunk_sources import MadeUp, made_up_sae

OPTIONS = ExplainOptions(n_features=3, examples=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = MadeUp(300)
    saes = {"a/b <i>": made_up_sae(source, "inner"), "c": made_up_sae(source, "cosine", seed=1)}
    listed = {name: Listed(sae, name) for name, sae in saes.items()}
    return build_store(tmp_path_factory.mktemp("explain") / "store", source, listed, BuildOptions(window=5))


@pytest.fixture
def store(folder: Path) -> FeatureStore:
    for path in (*folder.glob("explain.json*"), *folder.glob("sae*/explanations.json")):
        path.unlink()
    return open_store(folder)


def ask(store: FeatureStore, stand: Stand, options: ExplainOptions = OPTIONS, **more: Any) -> Any:
    chat = Endpoint(stand.url, "maker/model:7b", **{"timeout_s": 30.0, "sleep": lambda _: None, **more})
    chosen = choose(store, [one.name for one in store.saes], options, 0)
    return explain_features(store, chosen, chat, options)


def knows(store: FeatureStore) -> Any:
    """Answers by the truth: an explanation names its feature, and a text is known by its spelling."""
    firing: dict[tuple[str, str], set[str]] = {}
    marks: dict[tuple[str, str], set[str]] = {}
    for one in choose(store, [info.name for info in store.saes], OPTIONS, 0):
        key = (one.sae, str(one.id))
        for text in (*one.material.shown, *one.material.judged):
            if text.positive:
                spelled = [store.spell(id) for id in text.ids_W]
                firing.setdefault(key, set()).add("".join(spelled))
                marks.setdefault(key, set()).add(prompts.marked(spelled, text.on_W))

    def reply(messages: list[dict[str, str]]) -> str:
        texts = numbered(messages)
        if not is_judgement(messages):
            key = next(key for key, known in marks.items() if set(texts) <= known)
            return f"Let me see.\nEXPLANATION: feature {key[1]} of {key[0]}"
        found = re.search(r"fire on: feature (\d+) of (.*)\n", messages[-1]["content"])
        if found is None:
            return json.dumps([1] * len(texts))
        known = (firing if "somewhere" in messages[0]["content"] else marks)[found[2], found[1]]
        return json.dumps([int(text in known) for text in texts])

    return reply


def test_texts_are_what_they_say_and_never_shared(store: FeatureStore) -> None:
    source = MadeUp(300)
    saes = {"a/b <i>": made_up_sae(source, "inner"), "c": made_up_sae(source, "cosine", seed=1)}
    kinds = set()
    for one in choose(store, list(saes), OPTIONS, 0):
        with torch.no_grad():
            fires_N = (saes[one.sae].encode(source.x_ND).to_dense()[:, one.id] != 0).numpy()
        own = {int(example.ids_W[example.at]) for example in store.feature(one.sae, one.id).examples}
        groups = [one.material.shown, one.material.silent, one.material.judged]
        assert sum(len({text.sequence for text in group}) for group in groups[1:]) + len(
            {text.sequence for text in groups[0]}
        ) == len({text.sequence for group in groups for text in group})
        positives = [text for text in one.material.judged if text.positive]
        assert 2 <= len(positives) <= 6
        assert len(one.material.judged) - len(positives) <= len(positives)
        for text in (*one.material.judged, *one.material.silent):
            start, end = source.start_S1[text.sequence], source.start_S1[text.sequence + 1]
            ids = source.id_N[start:end].tolist()
            places = [i for i in range(len(ids)) if tuple(ids[i : i + len(text.ids_W)]) == text.ids_W]
            assert places
            there = [fires_N[start + i : start + i + len(text.ids_W)] for i in places]
            assert any(part.any() == text.positive for part in there)
            assert any(text.on_W)
            kinds.add(text.kind)
            if text.kind == "same_token":
                assert own & set(text.ids_W)
    assert kinds == {"positive", "random", "neighbour", "same_token"}


def test_one_who_knows_is_right_and_shuffled_and_constant_explanations_are_not(store: FeatureStore) -> None:
    with standing(knows(store)) as stand:
        found = ask(store, stand)
    for sae, known in found.explanations.items():
        assert len(known) == 3
        for id, one in known.items():
            assert one.text == f"feature {id} of {sae}"
            assert one.detection.value == one.fuzzing.value == 1.0
            assert one.baselines["constant"].value == 0.5
            assert one.baselines["shuffled"].value < 0.9
            assert 0 <= one.baselines["unigram"].value <= 1
            assert store.feature(sae, id).explanation == one
    assert found.summary["saes"]["c"]["detection"]["value"] == 1.0
    assert found.summary["paired"][0]["detection"]["difference"] == 0.0
    assert {body["model"] for body in stand.asked} == {"maker/model:7b"}
    assert store.table("c", "score").rows[0].score == 1.0
    assert [row.id for row in store.table("c", search="feature ", search_in="label").rows]


def test_answers_that_cannot_be_read_are_asked_again_then_counted_never_scored(store: FeatureStore) -> None:
    truth = knows(store)
    tries: dict[str, int] = {}

    def reply(messages: list[dict[str, str]]) -> str | None:
        if not is_judgement(messages) or "somewhere" in messages[0]["content"]:
            return str(truth(messages))
        question = messages[1]["content"]
        tries[question] = tries.get(question, 0) + 1
        return [None, "yes, no and maybe", "[1, 0"][tries[question] % 3]

    with standing(reply) as stand:
        found = ask(store, stand)
    for known in found.explanations.values():
        for one in known.values():
            assert (one.fuzzing.value, one.fuzzing.low, one.fuzzing.judged) == (None, None, 0)
            assert one.fuzzing.failed == one.detection.judged
            assert one.detection.value == 1.0
    assert set(tries.values()) == {3}
    again = [body["messages"] for body in stand.asked if len(body["messages"]) > 2]
    assert all("could not be read" in messages[-1]["content"] for messages in again)
    lines = [json.loads(line) for line in (store.folder / "explain.jsonl").read_text().splitlines()]
    assert len(lines) == len(stand.asked)
    assert sum(line["answer"] is None for line in lines) > 0


@pytest.mark.parametrize("leaves_out", [False, True], ids=["null", "left out"])
def test_no_explanation_is_none_and_is_counted(store: FeatureStore, leaves_out: bool) -> None:
    with standing(lambda messages: None) as stand:
        stand.leaves_out = leaves_out
        found = ask(store, stand)
    assert all(known == {} for known in found.explanations.values())
    assert found.summary["saes"]["c"]["unexplained"] == 3
    assert len(stand.asked) == 6 * 3


def test_what_the_server_cannot_take_is_asked_later(store: FeatureStore) -> None:
    waits: list[float] = []
    with standing(knows(store)) as stand:
        stand.trouble = [429, 500, "truncated", "empty", 503, "slow"]
        found = ask(store, stand, timeout_s=0.3, sleep=waits.append)
    assert found.summary["saes"]["c"]["detection"]["value"] == 1.0
    assert len(waits) == 6
    assert 3.0 in waits  # what the server asked for
    assert found.summary["asked"] == len(stand.asked) - 6


def test_a_run_that_stopped_pays_for_nothing_twice(store: FeatureStore) -> None:
    truth, limit = knows(store), [25]

    def reply(messages: list[dict[str, str]]) -> str:
        limit[0] -= 1
        return str(truth(messages))

    with standing(reply) as stand:
        answer = stand.answer
        no_credit = (401, b"no credit", dict[str, str]())
        stand.answer = lambda body: answer(body) if limit[0] > 0 else no_credit  # type: ignore[method-assign]
        with pytest.raises(CosaeError, match="401"):
            ask(store, stand)
        paid = [line for line in (store.folder / "explain.jsonl").read_text().splitlines() if line]
        with (store.folder / "explain.jsonl").open("a") as file:
            file.write('{"key": "torn')
        limit[0], before = 10**9, len(stand.asked)
        found = ask(store, stand)
        questions = found.summary["asked"] + found.summary["answered_before"]
        assert found.summary["answered_before"] == len(paid)
        assert len(stand.asked) - before == found.summary["asked"] == questions - len(paid)
        assert ask(store, stand).summary["asked"] == 0


def test_the_bill_is_what_is_asked(store: FeatureStore) -> None:
    chosen = choose(store, [one.name for one in store.saes], OPTIONS, 0)
    told = bill(store, chosen, OPTIONS)
    with standing(knows(store)) as stand:
        ask(store, stand)
    assert told.questions == len(stand.asked)
    characters = sum(len(one["content"]) for body in stand.asked for one in body["messages"])
    assert told.tokens_in == pytest.approx(characters / 3.5, rel=0.35)  # explanations here are short
    assert told.cost(1.0, 2.0) == pytest.approx((told.tokens_in + 2 * told.tokens_out) / 1e6)


def test_the_key_is_sent_and_never_written(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSAE_EXPLAIN_KEY", "sk-secret-of-mine")
    with standing(knows(store)) as stand:
        ask(store, stand, ExplainOptions(n_features=1, examples=4, baselines=()))
        assert {one["Authorization"] for one in stand.headers} == {"Bearer sk-secret-of-mine"}
        assert {one["path"] for one in stand.asked} == {"/v1/chat/completions"}
    for path in store.folder.rglob("*"):
        assert not path.is_file() or b"sk-secret" not in path.read_bytes()


def test_features_that_are_named_are_explained_and_earlier_ones_stay(store: FeatureStore) -> None:
    with standing(knows(store)) as stand:
        first = ask(store, stand)
        told = {id for known in first.explanations.values() for id in known}
        ids = (row.id for row in store.table("c", limit=100).rows if row.id not in told)
        id = next(id for id in ids if material(store, store.feature("c", id), 4, 0))
        stand.reply = lambda messages: "EXPLANATION: it" if not is_judgement(messages) else "[1, 1, 1, 1, 1]"
        ask(store, stand, ExplainOptions(feature=(id,), examples=4))
    assert set(store.explanations("c")) == {*first.explanations["c"], id}
    with pytest.raises(CosaeError, match="out of range"):
        choose(store, ["c"], ExplainOptions(feature=(99,)), 0)


def test_answers_are_read_strictly() -> None:
    assert prompts.read_judgements("Sure: [1, 0, true]", 3) == [1, 0, 1]
    for wrong in (
        None,
        "",
        "[1, 0]",
        "[1, 0, 2]",
        "[1, 0, 0.5]",
        '["1", 0, 1]',
        "1, 0, 1",
        "[1, 0, [1]]",
        "[1, 0, null]",
    ):
        assert prompts.read_judgements(wrong, 3) is None
    assert prompts.read_explanation("I think.\n**EXPLANATION:** words of law\n") == "words of law"
    assert prompts.read_explanation("words of law") == "words of law"
    for wrong in (None, "", "one\ntwo", "EXPLANATION:"):
        assert prompts.read_explanation(wrong) is None


def test_scores_by_hand() -> None:
    one = balanced_accuracy([True, True, False, False, True], [1, 0, 0, 0, None], 0)
    assert (one.value, one.judged, one.failed) == (0.75, 4, 1)
    assert one.low is not None
    assert one.high is not None
    assert one.low <= 0.75 <= one.high
    assert balanced_accuracy([True, False], [1, None], 0).value is None
    mean = mean_of([one, Score(1.0, 1.0, 1.0, 4, 0), Score(None, None, None, 0, 4), None], 0)
    assert mean is not None
    assert (mean.value, mean.judged, mean.failed) == (0.875, 8, 5)
    both = paired({0: 0.5, 1: 0.75, 2: 1.0}, {0: 0.75, 1: 1.0, 5: 1.0}, 0)
    assert both is not None
    assert (both["features"], both["difference"]) == (2, 0.25)
    assert np.isclose(both["low"], 0.25)


def test_an_address_and_options_are_checked() -> None:
    with pytest.raises(CosaeError, match="address"):
        Endpoint("localhost:8000", "m")
    with pytest.raises(CosaeError, match="baseline"):
        ExplainOptions(baselines=("random",)).check()
    with pytest.raises(CosaeError, match="examples"):
        ExplainOptions(examples=1).check()
