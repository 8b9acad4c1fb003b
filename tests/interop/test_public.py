"""Nothing of this machine leaves it but what an allow-list lets through: names, paths, whatever a text holds."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

import cosae
from cosae.activations.synthetic import World
from cosae.cli import main
from cosae.interop.dictionary_learning.write import write as write_dictionary
from cosae.interop.hub.transfer import preview, push
from cosae.interop.public import Public, says_nothing, strings_of_json, without_places
from cosae.io.escape import printable
from cosae.io.values import to_plain
from cosae.recipe import Recipe
from cosae.report.page import write_report
from cosae.run.execute import Logs, execute
from cosae.train.arm import ARMS
from tests.interop.test_hub import hub as hub
from tests.support.hub_stand_in import WRITER, Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of the hub's client
HIDDEN = [
    "/home/alice/zebra", "~/zebra", "./private/zebra.jsonl", "private/zebra.jsonl", "../zebra", r"C:\Users\zebra",
    "file:///home/zebra", "hf:/home/zebra", "hf:./zebra", "hf:zebra.jsonl", "zebra", "zebra one, as in /home/zebra",
    "Zébra", "hf:file:///zebra", "hf:zebra/tiger/lion", "zebra:0.3",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model and a text whose names could be those of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zebra" / "model").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("hidden", [*HIDDEN, "zebra/model", "zebra/gone", "hf:zebra/model", "hf:zebra/gone:en"])
def test_a_name_of_this_machine_becomes_a_neutral_word(here: Path, hidden: str) -> None:
    public = Public()
    for kind in ("model", "corpus", "dataset", "store", "activations", "start", "run", "arm"):
        assert "ebra" not in public.place(kind, hidden).lower().replace("é", "e")
    found = public.metadata({"model": hidden, "recipe": {"data": {"corpus": ["pylib:0.7", hidden]}}, hidden: 1})
    assert "bra" not in json.dumps(found).lower()
    assert found["recipe"]["data"]["corpus"][0] == "pylib:0.7"


def test_names_of_the_hub_packaged_ones_and_those_that_the_user_lists_pass(here: Path) -> None:
    public = Public(("notes.jsonl", "/data/mine"))
    passed = {
        "model": ["EleutherAI/pythia-70m", "gpt2", "embedded", "/data/mine"],
        "corpus": ["pylib", "hf:allenai/c4:en:train", "hf:allenai/c4:en:train:0.3", "/data/mine"],
        "dataset": ["monology/pile-uncopyrighted"],
        "arm": [*ARMS, "cosine-k=64"],
    }  # fmt: skip
    for kind, names in passed.items():
        assert [public.place(kind, name) for name in names] == names
    assert public.place("corpus", "/home/alice/notes.jsonl:0.25") == "notes.jsonl:0.25"
    assert public.place("corpus", "/home/alice/notes.jsonl") == "notes.jsonl"
    assert public.place("model", "me/model") == "me/model"
    assert (
        public.place("model", "me/model", local=["me/model"]) == "local model"
    )  # where it was trained it was a folder


def test_arms_stay_apart() -> None:
    shown = Public(("mine",)).arms(["cosine", "zebra", "start=zebra", "mine", "arm_2"])
    assert len(set(shown.values())) == 5
    assert (shown["cosine"], shown["mine"]) == ("cosine", "mine")
    assert "zebra" not in "".join(shown.values())


def test_every_field_and_word_of_a_recipe_may_be_published() -> None:
    """A field that is added must be added to the vocabulary, or it would be missing in what is pushed."""
    plain = to_plain(dataclasses.replace(Recipe(), arms=tuple(ARMS.values())))
    assert Public().recipe(plain) == plain


def marked(value: Any, mark: str) -> Any:
    """The same with every text replaced."""
    if isinstance(value, dict):
        return {name: marked(one, mark) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [marked(one, mark) for one in value]
    return mark if isinstance(value, str) or value is None else value


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that a recipe and a record say."""
    out = tmp_path_factory.mktemp("run") / "run"
    more = {
        "data.world": World.parse("log_normal:n_features=16,d_in=8,l0=2"), "d_sae": 16, "k": 2, "training.steps": 4,
        "training.batch_tokens": 64, "training.buffer_tokens": 512, "filter.window_tokens": 512,
        "evaluation.held_out_tokens": 256, "evaluation.calibration_tokens": 256, "evaluation.resamples": 5,
    }  # fmt: skip
    recipe = dataclasses.replace(Recipe().changed(more), arms=(ARMS["standard"], ARMS["cosine"]))
    execute(recipe, out, logs=Logs(False))
    return out


@pytest.mark.parametrize("mark", HIDDEN)
def test_a_secret_in_any_text_never_reaches_a_published_byte(run: Path, here: Path, hub: Hub, mark: str) -> None:
    source = here / "run"
    for arm in ("standard", "cosine"):
        sae = cosae.load(run / "arms" / arm)
        sae.metadata = {**marked(sae.metadata, mark), "notes": [mark, {mark: mark}], mark: mark, "model": mark}
        sae.metadata["recipe"]["data"] |= {"corpus": ["pylib:0.5", mark], "store": mark, "activations": mark}
        cosae.save(sae, source / "arms" / (arm if arm == "cosine" else "start=zebra"))
    evaluation = marked(json.loads((run / "evaluation.json").read_text()), mark)
    evaluation["reconstruction"]["start=zebra"] = evaluation["reconstruction"]["standard"] | {mark: mark}
    (source / "evaluation.json").write_text(json.dumps(evaluation))
    said = preview(source, "me/thing")
    assert "ebra" not in said
    assert "Zébra" not in said
    push(source, "me/thing", token=WRITER)
    files = hub.repositories["me/thing"].files("main")[1]
    assert files
    for name, content in files.items():  # type: ignore[union-attr]
        assert "zebra" not in name
        for secret in ("zebra", "Zébra", "Z\\u00e9bra"):
            assert secret.encode() not in content, name
        assert name in said
    folder = write_dictionary(cosae.load(source / "arms" / "start=zebra"), here / "theirs")
    assert b"ebra" not in b"".join(path.read_bytes() for path in folder.iterdir())


def test_what_a_dry_run_prints_is_what_leaves(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert ended.value.code == 0
        return capsys.readouterr().out

    monkeypatch.delenv("HF_TOKEN", raising=False)  # none is needed
    said = command("push", run, "me/thing", "--dry-run", "--message", "what is said", "--public-name", "a", "b")
    for word in ("me/thing", "what is said", "standard/cfg.json", "cosine/metrics.json", "README.md", "log_normal"):
        assert word in said, word
    assert str(run) not in said


@pytest.mark.parametrize("kind", ["neuronpedia", "delphi"])
def test_exports_name_no_place_of_this_machine(kind: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = cosae.SAE.build(d_in=192, d_sae=12, score="cosine", selector="topk", k=3, seed=0)
    sae.metadata = {"model": "embedded", "site": "resid_post.1"}
    cosae.save(sae, here / "zebra" / "sae")
    for side in ("text", "texts"):
        (here / "zebra" / side).mkdir()
        words = [f"the {side} of a story, line {i}, with some more words that say little\n" for i in range(60)]
        (here / "zebra" / side / "a.txt").write_text("".join(words))

    def command(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["export", kind, "zebra/sae", "--prompts", "6", "--context", "16", "--quiet", *map(str, words)])
        assert ended.value.code == 0
        return capsys.readouterr().out

    said = command("--corpus", "zebra/text", "--out", "out", "--dry-run")
    assert not (here / "out").exists()
    command("--corpus", "zebra/text", "--out", "out")
    for path in (path for path in (here / "out").rglob("*") if path.is_file()):
        assert b"zebra" not in path.read_bytes()
        assert f"{path.relative_to(here / 'out').as_posix()} ({path.stat().st_size:,} bytes)" in said
        if path.suffix == ".json":
            texts = {printable(text).strip() for text in strings_of_json(path)}
            assert texts <= {line.strip() for line in said.split("\n")}
    if kind == "neuronpedia":  # another text of this machine is another export, though its name is the same
        assert "not made again" in command("--corpus", "zebra/text", "--out", "out")
        assert "not made again" not in command("--corpus", "zebra/texts", "--out", "out")
    command("--corpus", "zebra/text", "--out", "out", "--public-name", "zebra/text")
    assert any(b"zebra/text" in path.read_bytes() for path in (here / "out").rglob("*.json"))


def test_words_that_say_nothing() -> None:
    assert says_nothing("blocks.5.hook_resid_post")
    assert not says_nothing("alice.layers.5")
    assert not says_nothing("/data/model")


@pytest.mark.skipif(os.name == "nt", reason="modes are of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_written_files_are_for_whom_the_umask_says(mask: int, mode: int, run: Path, here: Path) -> None:
    before = os.umask(mask)
    try:
        sae = cosae.load(run / "arms" / "cosine")
        cosae.save(sae, here / "sae")
        recipe = Recipe.read(run / "recipe.json")
        finished = execute(recipe.changed({"training.checkpoint_every": 2}), here / "run", logs=Logs(False))
        write_report([finished.out], here / "run" / "report.html")
    finally:
        os.umask(before)
    found = {path for folder in ("sae", "run") for path in (here / folder, *(here / folder).rglob("*"))}
    assert any(path.suffix == ".safetensors" for path in found)
    for path in found:
        wanted = mode | (mode & 0o444) >> 2 if path.is_dir() else mode
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('File "/home/me/x/lib/site-packages/sae_bench/core.py", line 3', 'File "sae_bench/core.py", line 3'),
        ("model in /data/private/llama: gone", "model in llama: gone"),
        ("see ~/work/notes.txt, or /srv/a/b.", "see notes.txt, or b."),
        (
            "https://host.example/a/b and a/b/c and 1/2/3 and /tmp",
            "https://host.example/a/b and a/b/c and 1/2/3 and /tmp",
        ),
    ],
)
def test_absolute_paths_lose_their_folders(text: str, shown: str) -> None:
    assert without_places(text) == shown
