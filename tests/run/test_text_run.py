"""Runs on several sources, with tokenising processes and capture ahead: the same to the bit, and resumed to the bit."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cosae.cli import main
from cosae.cli.training import Train, build_recipe
from cosae.errors import CosaeError
from cosae.models.sources import StreamedModelSource
from cosae.recipe import Recipe
from cosae.run.dataset.open import dataset_of
from cosae.run.execute import execute, resume
from cosae.train.checkpoint import checkpoints
from cosae.train.loop import Interrupted
from cosae.types import Activations
from tests.run.test_resume import interrupt_after
from tests.support.tiny_model_runs import WORDS, recipe, save_tokenizer
from tests.support.tiny_models import make_model
from tests.support.tiny_runs import QUIET, assert_same_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def words(i: int, n: int = 120) -> str:
    return " ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(n))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A folder of 30 files and 60 lines of JSON, each its own text."""
    place = tmp_path_factory.mktemp("sources")
    (place / "code").mkdir()
    for i in range(30):
        (place / "code" / f"{i:02d}.py").write_text(words(i))
    rows = [{"body": words(100 + i, 40), "id": i} for i in range(60)]
    (place / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place / "code"), str(place / "notes.jsonl")


def mixed(model: Path, sources: tuple[str, str], **changes: Any) -> Recipe:
    both = (f"{sources[0]}:0.7", f"{sources[1]}:0.3")
    # .py files have no field: what names the rows' text says nothing to them
    settings = {"data.corpus": both, "data.text_field": "body", "training.steps": 30, **changes}
    return recipe(model, "pylib", **settings)


@pytest.fixture(scope="module")
def whole(model: Path, sources: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain run: tokenised and captured in step, never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finished = execute(mixed(model, sources), out, logs=QUIET)
    assert finished.run["source"]["corpus"] == [[sources[0], 0.7], [sources[1], 0.3]]
    return out


@pytest.mark.long
def test_a_mixture_is_the_same_run_however_it_is_read_and_wherever_it_is_stopped(
    model: Path, sources: tuple[str, str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = mixed(model, sources, **{"data.n_workers": 2, "data.prefetch_chunks": 2})
    interrupt_after(monkeypatch, 17)
    with pytest.raises(Interrupted):
        execute(busy, tmp_path / "run", logs=QUIET)
    monkeypatch.undo()
    for thread in threading.enumerate():  # those that read ahead or feed processes; the loops' pool stays
        if thread.name.startswith("cosae "):
            thread.join(10)
            assert not thread.is_alive()
    resume(tmp_path / "run", QUIET)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_data_set_that_breaks_in_the_middle_takes_no_step_with_it(
    model: Path, sources: tuple[str, str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = mixed(model, sources, **{"data.n_workers": 2, "data.prefetch_chunks": 2})
    broken, real = tmp_path / "broken", StreamedModelSource.chunks

    def breaking(self: StreamedModelSource, start: int = 0) -> Iterator[Activations]:
        yield from islice(real(self, start), 3)
        raise CosaeError("the data set failed at row 7")

    monkeypatch.setattr(StreamedModelSource, "chunks", breaking)
    with pytest.raises(CosaeError, match="failed at row 7"):
        execute(busy, broken, logs=QUIET)
    monkeypatch.undo()
    steps = [int(path.name.removeprefix("step_")) for path in checkpoints(broken)]
    assert steps
    assert steps[-1] % 5  # not where one was due, but where the data ended
    resume(broken, QUIET)
    assert_same_run(whole, broken)


def test_shares_and_sides_of_a_mixture(model: Path, sources: tuple[str, str]) -> None:
    data = dataset_of(mixed(model, sources))
    sides = {}
    for split in ("train", "held_out"):
        names = data.sample(split, 1200).documents
        sides[split] = set(names)
        assert any("notes.jsonl" in name for name in names)
        assert any("code:" in name for name in names)
    assert sides["train"].isdisjoint(sides["held_out"])
    chunk = next(data.text.text().chunks())[0]
    code = {i for i, name in enumerate(chunk.doc_names) if "code:" in name}
    share = sum(int((chunk.doc_ST == i).sum()) for i in code) / int(chunk.mask_ST.sum())
    assert 0.7 - 121 / chunk.ids_ST.numel() < share < 0.7 + 121 / chunk.ids_ST.numel()


def test_the_command_line_names_several_sources() -> None:
    assert build_recipe(Train(out=Path("x"), corpus=("a/:0.7", "b:0.3"))).data.corpus == ("a/:0.7", "b:0.3")
    assert build_recipe(Train(out=Path("x"), corpus=("a",))).data.corpus == "a"
    assert build_recipe(Train(out=Path("x"))).data.corpus == "pylib"
    listed = build_recipe(Train(out=Path("x"), set=('data.corpus=["a:2", "b"]', 'data.suffixes=[".rs"]')))
    assert (listed.data.corpus, listed.data.suffixes) == (("a:2", "b"), (".rs",))


@pytest.mark.parametrize(
    ("name", "content", "more", "says"),
    [
        ("empty", None, (), "at least one text or source file"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"', (), "line 2"),
        ("a.jsonl", b'{"body": "x"}\n', (), "data.text_field"),
        ("a.txt", b"caf\xe9", (), "UTF-8"),
        ("a.txt", b"\x00\x01\x02\xff", (), "UTF-8"),
        ("a.txt", b"one document\n" * 300, (), "data.txt_unit"),
        ("a.txt", b" \n\n\t\n", (), "none with text"),
        ("a.parquet", b"PAR1 but no more", (), "Parquet"),
        ("a.bin", b"\x00", (), "must be .txt, .jsonl or .parquet"),
        ("a.txt", b"x", ("--set", "data.text_field="), "text_field"),
        ("a.txt", b"x", ("--set", "data.n_workers=-1"), "n_workers must be at least 0"),
        ("a.txt", b"x", ("--set", "data.txt_unit=page"), "txt_unit must be one of"),
    ],
)
def test_an_awkward_corpus_is_one_sentence_and_leaves_nothing(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    more: tuple[str, ...],
    says: str,
) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(SystemExit) as left:
        main(
            [
                "train",
                "--out",
                str(tmp_path / "run"),
                "--model",
                str(model),
                "--site",
                "resid_post.2",
                "--corpus",
                str(path),
                "--quiet",
                *more,
            ]
        )
    said = capsys.readouterr().err.strip()
    assert left.value.code == 2
    assert said.startswith("cosae: ")
    assert says in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


def test_a_batch_that_is_chosen_is_written_down(model: Path, sources: tuple[str, str], tmp_path: Path) -> None:
    """128 sequences of 32 make 4096 tokens; going on takes the number that was written, not another choice."""
    auto = recipe(model, sources[0], **{"data.batch_sequences": "auto", "training.steps": 2})
    execute(auto, tmp_path / "run", logs=QUIET, measured=False)
    written = Recipe.read(tmp_path / "run" / "recipe.json")
    assert written.data.batch_sequences == 128
    assert json.loads((tmp_path / "run" / "run.json").read_text())["source"]["batch_sequences"] == 128
    for wrong in ("many", 0, 2.5):
        with pytest.raises(CosaeError, match="batch_sequences"):
            auto.changed({"data.batch_sequences": wrong})


def test_a_mixture_with_a_source_of_one_document_says_so(model: Path, sources: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(words(5))
    both = (sources[0], f"{tmp_path / 'one.txt'}:0.1")
    with pytest.raises(CosaeError, match=r"one\.txt"):
        _ = dataset_of(recipe(model, "pylib", **{"data.corpus": both})).source
