"""`cosae demo --real`, offline: a tiny model and texts stand in for what is fetched, position 0 is planted huge."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import cosae.models.capture as capture_module
from cosae import presets
from cosae.activations.perturbation import Perturbation
from cosae.activations.store.reader import Store
from cosae.activations.synthetic import World
from cosae.cli import main
from cosae.errors import CosaeError
from cosae.io.fetched.cache import cache_folder
from cosae.io.fetched.packages import folder_of
from cosae.recipe import Recipe
from cosae.run import demo
from cosae.run.dataset.open import dataset_of
from cosae.run.execute import Logs, execute
from cosae.run.measure import text_probes
from cosae.train import loop
from tests.support.fetched import SETS, write_fetched
from tests.support.small_stores import REQUEST, rows, write_store
from tests.support.tiny_runs import assert_same_run

FACTOR = 150.0
pytestmark = pytest.mark.filterwarnings("ignore:.* is dequantised:cosae.errors.CosaeWarning")


def small() -> Recipe:
    """The preset in little, position 0 of each text made FACTOR times as long."""
    return presets._demo_real().changed(
        {
            "data.site": "resid_post.1",
            "data.context": 32,
            "data.batch_sequences": 8,
            "data.chunk_sequences": 16,
            "perturbation": Perturbation("sinks", position=0, factor=FACTOR),
            "d_sae": 96,
            "k": 6,
            "filter.window_tokens": 512,
            "training.steps": 30,
            "training.batch_tokens": 64,
            "training.buffer_tokens": 512,
            "training.optimizer.warmup_steps": 3,
            "training.checkpoint_every": 10,
            "evaluation.held_out_tokens": 400,
            "evaluation.calibration_tokens": 400,
            "evaluation.resamples": 50,
            "evaluation.texts": ("wiki:language", *(f"sae-probes:{name}" for name in SETS)),
            "evaluation.max_texts": 50,
            "evaluation.max_classes": 2,
        }
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        write_fetched()
    return folder


@pytest.fixture(autouse=True)
def in_little(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setitem(presets.PRESETS, "demo-real", small)
    monkeypatch.setattr(demo, "CAPTURED_TOKENS", 2000)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--real", *words])
    return int(ended.value.code or 0)


def test_it_captures_once_and_a_second_run_reads_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", str(tmp_path / "one")) == 0
    said = capsys.readouterr()
    (store,) = (cache_folder() / "stores").iterdir()
    lines = said.err.splitlines()
    planned = next(i for i, line in enumerate(lines) if line.startswith("time: about"))
    captured = lines.index(f"activations are captured, once, into {store}")
    assert planned < captured < lines.index("filling buffer (0 of 512 tokens)")
    assert any("capturing" in line for line in lines[planned : planned + 4])
    assert any("encoding labelled texts" in line for line in lines[planned : planned + 20])
    assert "Sinks: position 0 of a text" in said.out
    assert said.out.splitlines()[-1] == f"Look at the features, side by side: cosae browse {tmp_path / 'one'}"
    assert (Store(store).n_rows("train"), list(Store(store).faults())) == (2000, [])

    monkeypatch.setattr(demo, "capture_stores", None)  # and nothing is captured
    assert run("--out", str(tmp_path / "two"), "--quiet", "--steps", "20") == 0
    assert capsys.readouterr().err == ""
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert [one["recipe"]["training"]["steps"] for one in runs] == [30, 20]
    assert runs[0]["source"] == runs[1]["source"]
    _check_page(tmp_path / "one", said.out)


def _check_page(out: Path, screen: str) -> None:
    """What page and screen say of the sinks is what was measured, and that is what was planted."""
    found = json.loads((out / "evaluation.json").read_text())
    sinks, texts = found["sinks"], found["texts"]
    standard = sinks["standard"]
    assert found["norms"]["position_0_over_median"] == pytest.approx(FACTOR, rel=0.5)
    assert standard["large"] == standard["large_at_0"] > 0
    assert standard["l0_at_0"] > 2 * standard["l0_off"]  # an inner product grows with the norm
    assert sinks["standard_unit_frame"]["l0_at_0"] < standard["l0_at_0"]
    assert [one["name"] for one in texts["sets"]] == ["wiki:language", *SETS]
    assert [len(one["classes"]) for one in texts["sets"]] == [2, 1, 1]
    assert texts["interval"]["over"] == "sets"
    page = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text())
    assert f"{standard['large']} of {found['tokens']} held-out tokens" in page.replace("\N{NARROW NO-BREAK SPACE}", "")
    rows = {(r["arm"], r["sinks"], r["reading"]): r for r in texts["paired"] if r["metric"] == "accuracy"}
    for arm in ("standard_unit_frame", "cosine"):
        gap = rows[arm, "sinks_in", "mean_difference/top_1"]
        words = f"{gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}".replace("-", "\N{MINUS SIGN}")
        assert f"{arm} {words}" in page
        assert f"{arm} {words}".replace("\N{MINUS SIGN}", "-") in screen
    masked = {(r["arm"], r["reading"], r["metric"]): r for r in texts["masked"]}
    by = texts["summary"]
    for arm in texts["arms"]:
        inside, outside = (by[s][arm]["auroc/top_1"]["accuracy"]["mean"] for s in ("sinks_in", "sinks_out"))
        assert masked[arm, "auroc/top_1", "accuracy"]["difference"] == pytest.approx(outside - inside, abs=1e-12)
    assert "Attention sinks" in page
    assert "Probing of whole texts" in page
    for arm, shown in found["features"].items():
        assert 1 <= len(shown) <= 8
        assert f"{len(shown)} features of {arm}" in page
        for example in (one for feature in shown for one in feature["examples"]):
            assert example["token"]
            assert example["before"] + example["after"]
    assert set(found["features"]) == set(texts["arms"])


def test_what_is_not_fetched_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    folder_of("wiki").mkdir(parents=True)
    assert run("--out", str(tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "cosae fetch smollm2 sae-probes" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["capturing", "training"])
def test_a_signal_keeps_what_is_done_and_the_demo_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one_set = {"evaluation.texts": (f"sae-probes:{SETS[0]}",)}
    monkeypatch.setitem(presets.PRESETS, "demo-real", lambda: small().changed(one_set))
    write_fetched()
    out, sent = tmp_path / "out", []
    read, advance = capture_module.read_sites, loop._advance

    def strike() -> None:
        if not sent:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

    def reading(*args: Any) -> Any:
        if (cache_folder() / "stores").is_dir():
            strike()
        return read(*args)

    def stepping(state: Any, **named: Any) -> Any:
        if named["step"] == 14:
            strike()
        return advance(state, **named)

    if place == "capturing":
        monkeypatch.setattr(capture_module, "read_sites", reading)
    else:
        monkeypatch.setattr(loop, "_advance", stepping)
    assert run("--out", str(out), "--quiet") == 130
    assert time.monotonic() - sent[0] < 10
    said = capsys.readouterr().err
    if place == "capturing":
        assert "What was captured so far is kept: give the same command again." in said
        assert not out.exists()
        assert run("--out", str(out), "--quiet") == 0
    else:
        assert f"Go on with: cosae resume {out}" in said
        with pytest.raises(SystemExit) as ended:
            main(["resume", str(out), "--quiet"])
        assert ended.value.code == 0
    assert run("--out", str(tmp_path / "again"), "--quiet") == 0
    assert_same_run(tmp_path / "again", out)
    assert (out / "report.html").is_file()


def test_the_real_preset_names_texts_that_can_be_probed() -> None:
    recipe = presets._demo_real()
    assert recipe.evaluation.texts[:2] == ("wiki:language", "wiki:topic")
    assert recipe.filter.kind == "norm"
    assert (recipe.data.packing, recipe.data.context) == ("document", 128)
    with dataset_of(small()) as data:
        assert text_probes(small(), data).sets[0].name == "wiki:language"


def test_a_store_s_model_reads_texts_where_it_is_no_place_here_or_the_recipe_names_it(tmp_path: Path) -> None:
    """A store may come from a stranger, who could name any folder."""
    (tmp_path / "model").mkdir()
    model, sets = str(tmp_path / "model"), {"evaluation.texts": ("wiki:language",), "evaluation.max_texts": 50}
    request = {**REQUEST, "model": model}
    write_store(tmp_path / "store", rows(900), rows(300, document=0), request=request, shard_tokens=512)
    recipe = Recipe().changed({"data.store": str(tmp_path / "store"), **sets})
    with dataset_of(recipe) as data, pytest.raises(CosaeError, match=r"a place on this machine.*data\.model"):
        text_probes(recipe, data)
    named = recipe.changed({"data.model": model})
    with dataset_of(named) as data:
        assert [one.name for one in text_probes(named, data).sets] == ["wiki:language"]


def test_texts_without_a_model_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    recipe = Recipe().changed({"data.world": World(d_in=8), "evaluation.texts": ("wiki:language",)})
    with pytest.raises(CosaeError, match=r"need a language model.*drop evaluation\.texts"):
        execute(recipe, tmp_path / "run", logs=Logs(False))
    assert not (tmp_path / "run").exists()
