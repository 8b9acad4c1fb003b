"""Files that cosae 0.1 wrote (tests/fixtures/v0_1) are still read, and mean the same.

Only the front door is used: `cosae.load`, `resume`, `fit`, `Recipe.read` and the command line. Names inside files may
change from one version to the next; so JSON and printed text are compared by the numbers in them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cosae
from cosae.cli import main

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "v0_1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
SAES = sorted(str(config.parent.relative_to(FIXTURES)) for config in FIXTURES.rglob("cfg.json"))
RECIPES = sorted(path.name for path in (FIXTURES / "recipes").iterdir() if path.name != "settings.json")
TENSORS = load_file(FIXTURES / "expected.safetensors")
INPUTS = load_file(FIXTURES / "inputs.safetensors")
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixtures, and the working directory: the paths that 0.1 wrote down are relative to it."""
    copied = shutil.copytree(FIXTURES, tmp_path / "v0_1")
    monkeypatch.chdir(copied)
    return copied


def command(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What `cosae ARGUMENTS` prints, with this exit status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    shown = capsys.readouterr()
    assert (end.value.code or 0) == status, shown.err
    return shown.out


def leaves(value: Any) -> Iterator[Any]:
    """What a JSON value holds below all its names."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def numbers(value: Any) -> list[float]:
    """The numbers of a JSON value, or of a printed text, ascending; not those that are truth values."""
    if isinstance(value, str):
        return sorted(float(found.replace("−", "-")) for found in NUMBER.findall(value))
    return sorted(float(leaf) for leaf in leaves(value) if type(leaf) in (int, float))


def words(value: Any) -> list[str]:
    return sorted(leaf for leaf in leaves(value) if isinstance(leaf, str))


def missing(old: list[float], new: list[float], rel: float) -> list[float]:
    """Numbers of `old` that `new` lacks, each counted as often as it is there. Both ascending."""
    lacking, at = [], 0
    for number in old:
        slack = rel * max(abs(number), 1e-3)
        while at < len(new) and new[at] < number - slack:
            at += 1
        if at < len(new) and new[at] <= number + slack:
            at += 1
        else:
            lacking.append(number)
    return lacking


def assert_holds(new: Any, old: Any, rel: float = 1e-4) -> None:
    """All numbers of `old` are in `new`, which may hold more."""
    assert numbers(old), "nothing to compare"
    assert missing(numbers(old), numbers(new), rel) == []


def assert_codes(sae: cosae.SAE, folder: str) -> None:
    """Codes and reconstructions are those that 0.1 computed."""
    x = INPUTS.get(folder, INPUTS["x8"]).to(sae.dtype)
    with torch.no_grad():
        codes = sae.encode(x)
        found = {"codes": codes.to_dense().float(), "x_hat": sae.decode(codes).float()}
    for name, value in found.items():
        wanted = TENSORS[f"sae/{folder}/{name}"]
        scale = float(wanted.abs().max())
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6 * max(scale, 1.0), msg=lambda m, n=name: n + m)
        assert name != "codes" or torch.equal(value != 0, wanted != 0)


def assert_weights(sae: cosae.SAE, wanted: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    """Encoder, decoder, centre and bias are close to the tensors of an SAE's file."""
    bias = "b_gate" if "b_gate" in wanted else "b_enc"
    found = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, bias: sae.b_enc, "scale_a": sae.scale_a}
    for name, value in found.items():
        if name in wanted:
            close = {"rtol": tolerance, "atol": tolerance}
            torch.testing.assert_close(value.detach(), wanted[name], **close, msg=lambda m, n=name: f"{n}: {m}")


def of(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in TENSORS.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------- SAEs


@pytest.mark.parametrize("folder", SAES)
def test_an_sae_gives_its_codes(folder: str, tmp_path: Path) -> None:
    sae = cosae.load(FIXTURES / folder)
    assert_codes(sae, folder)
    assert_codes(cosae.load(cosae.save(sae, tmp_path / "again")), folder)  # and so it does when written anew


@pytest.mark.parametrize("folder", SAES)
def test_an_sae_is_inspected(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((FIXTURES / folder / "cfg.json").read_text())
    shown = json.loads(command(capsys, "inspect", str(FIXTURES / folder)))
    known = {name: value for name, value in config["facts"].items() if name != "recipe"}
    assert_holds(shown, [config["sae"], known, EXPECTED["inspect"][folder]], rel=1e-6)
    assert set(words(config["sae"])) <= set(words(shown))


# ------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("runs", sorted(EXPECTED["report"]))
def test_a_finished_run_is_reported(place: Path, capsys: pytest.CaptureFixture[str], runs: str) -> None:
    printed = command(capsys, "report", *runs.split(), "--out", "page.html")
    wanted = re.sub(r"(?m)^.* paired 95 % intervals .*$", "", EXPECTED["report"][runs])  # now an answer
    assert_holds(printed, wanted, rel=1e-9)
    page = (place / "page.html").read_text()
    for run in runs.split():
        assert all(arm in page for arm in EXPECTED["finished"][run]["arms"])


@pytest.mark.parametrize("run", sorted(EXPECTED["resumed"]))
def test_an_unfinished_run_goes_on_to_the_same_end(place: Path, capsys: pytest.CaptureFixture[str], run: str) -> None:
    """From the command line for two of them, from Python for the others; 0.1's own weights are the yardstick."""
    wanted, out = EXPECTED["resumed"][run], place / "trained" / run
    if run in ("interrupted", "twice_interrupted"):
        command(capsys, "resume", f"trained/{run}", "--quiet")
        assert (out / "report.html").stat().st_size > 10_000
        saes = {arm: cosae.load(out / "arms" / arm) for arm in wanted["arms"]}
    else:
        saes = cosae.resume(f"trained/{run}").saes
    assert sorted(saes) == wanted["arms"]
    for arm, sae in saes.items():
        assert_weights(sae, of(f"resumed/{wanted['end']}/{arm}/"))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == wanted["lines"]
    if wanted["end"] == "file":  # the same batches, to the bit
        assert wanted["stream_digest"] in (out / "run.json").read_text()


@pytest.mark.parametrize("run", ["finished", "store"])
def test_the_recipe_of_a_run_trains_the_same_saes(place: Path, run: str) -> None:
    recipe = cosae.Recipe.read(f"trained/{run}/recipe.json")
    saes = cosae.fit(recipe, evaluate=False).saes
    assert sorted(saes) == EXPECTED["finished"][f"trained/{run}"]["arms"]
    for arm, sae in saes.items():
        wanted = load_file(f"trained/{run}/arms/{arm}/sae_weights.safetensors")
        assert_weights(sae, wanted, tolerance=1e-3)


# ---------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_shown_as_it_was(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    file = f"recipes/{name}"
    wanted = EXPECTED["recipes"].get(name) or json.loads(Path(file).read_text())
    recipe = cosae.Recipe.read(file)
    shown = json.loads(command(capsys, "train", "--recipe", file, "--show", "--out", "nowhere"))
    recipe.write("again.json")
    assert cosae.Recipe.read("again.json") == recipe
    for found in (shown, json.loads(Path("again.json").read_text())):
        assert_holds(found, wanted, rel=1e-12)
        assert set(words(wanted)) <= set(words(found))
    assert [arm.name for arm in recipe.arms] == [arm["name"] for arm in wanted["arms"]]


def test_old_paths_are_set_from_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--set and `changed` take the dotted paths that 0.1 had."""
    old = {
        **json.loads(Path("recipes/settings.json").read_text()),
        "nuisance.kind": "log_normal",
        "nuisance.sigma": 0.375,
        "inject_into": "evaluation",
    }
    given = [f"{path}={value}" for path, value in old.items()]
    shown = json.loads(command(capsys, "train", "--show", "--out", "nowhere", "--set", *given))
    recipe = cosae.Recipe().changed(old)
    recipe.write("again.json")
    for found in (shown, json.loads(Path("again.json").read_text())):
        assert_holds(found, [value for value in old.values() if not isinstance(value, str)], rel=1e-12)
        assert {"log_normal", "evaluation"} <= set(words(found))


# ----------------------------------------------------------------------------------------------- stores


@pytest.mark.parametrize("store", ["stores/vectors", "stores/model"])
def test_a_store_is_whole_and_says_what_it_is(place: Path, capsys: pytest.CaptureFixture[str], store: str) -> None:
    command(capsys, "verify", store)
    shown = json.loads(command(capsys, "inspect", store))
    assert_holds(shown, EXPECTED["inspect"][store], rel=1e-9)


@pytest.mark.parametrize(
    ("store", "site"), [("stores/vectors", None), ("stores/model", None), ("stores", "resid_post.1")]
)
def test_a_store_is_trained_on(place: Path, capsys: pytest.CaptureFixture[str], store: str, site: str | None) -> None:
    settings = json.loads(Path("recipes/settings.json").read_text()) | {"filter.window_tokens": 200}
    small = [f"{path}={value}" for path, value in settings.items()]
    options = ["--steps", "4", "--d-sae", "16", "--k", "3", "--arms", "standard", "--quiet", "--set", *small]
    printed = command(capsys, "train", "--store", store, "--out", "new", *(["--site", site] if site else []), *options)
    assert "standard" in printed
    changes = {path.replace(".", "__"): value for path, value in settings.items()} | {"data__store_site": site}
    again = cosae.fit(store, ["standard"], steps=4, d_sae=16, k=3, evaluate=False, **changes)
    assert_weights(again.saes["standard"], load_file("new/arms/standard/sae_weights.safetensors"))


def test_an_unfinished_store_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {path.name: path.read_bytes() for path in Path("stores/partial").glob("*.safetensors")}
    command(capsys, *EXPECTED["capture"])
    assert all((place / "stores/partial" / name).read_bytes() == content for name, content in kept.items())
    found = {path.name: path for path in Path("stores/partial").glob("*.safetensors")}
    assert sorted(found) == sorted(EXPECTED["shards"])
    for name, wanted in EXPECTED["shards"].items():
        shard = load_file(found[name])
        for column, first in wanted.items():
            rounding = 1 if column == "x" else 1e-5  # one level of int8
            np.testing.assert_allclose(shard[column].flatten()[:6].double(), first, rtol=1e-4, atol=rounding)
    command(capsys, "verify", "stores/partial")


# ------------------------------------------------------------------------------------ audits, measurements


def test_an_audit_says_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = command(capsys, *EXPECTED["audit"], "--out", "new")
    assert_holds(printed, EXPECTED["audit_screen"], rel=1e-3)
    old, new = (json.loads(Path(folder, "audit.json").read_text())["saes"] for folder in ("audit", "new"))
    assert_holds(new, old, rel=1e-3)


@pytest.mark.parametrize("measurement", sorted(EXPECTED["eval"]))
def test_a_measurement_says_the_same(place: Path, capsys: pytest.CaptureFixture[str], measurement: str) -> None:
    command(capsys, *EXPECTED["eval"][measurement], "--out", "new.json")
    old, new = (json.loads(Path(file).read_text()) for file in (f"eval/{measurement}.json", "new.json"))
    assert_holds(new, old["found"], rel=1e-3)


# ---------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("name", sorted(path.name for path in (FIXTURES / "exports/dictionary_learning").iterdir()))
def test_a_dictionary_is_measured_like_the_sae_it_was_written_from(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    found = []
    for folder in (f"exports/dictionary_learning/{name}", f"saes/{name}"):
        on = ["--activations", "activations.npy", "--tokens", "400", "--quiet", "--out", "new.json"]
        command(capsys, "eval", "reconstruction", f"A={folder}", *on)
        found.append(numbers(json.loads(Path("new.json").read_text())))
    assert len(found[0]) > 20
    assert len(missing(*found, rel=1e-3)) <= 0.05 * len(found[0])  # layers and seeds are written down differently


def test_a_pushed_sae_is_the_one_of_the_run() -> None:
    one, other = (cosae.load(FIXTURES / folder) for folder in ("exports/hub", "trained/finished/arms/cosine"))
    assert torch.equal(one.W_enc, other.W_enc)
    assert torch.equal(one(INPUTS["x8"]), other(INPUTS["x8"]))


@pytest.mark.parametrize("kind", ["delphi", "neuronpedia"])
def test_an_export_is_made_again_in_its_place(place: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    out = place / "exports" / kind
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.suffix in (".safetensors", ".json"))
    before = {file: (out / file).read_bytes() for file in files}
    command(capsys, *EXPECTED[kind], "--out", f"exports/{kind}")
    for file in files:
        assert (out / file).is_file(), file
        if file.suffix == ".safetensors":
            (place / "old.safetensors").write_bytes(before[file])
            old = load_file(place / "old.safetensors")
            for name, value in load_file(out / file).items():
                torch.testing.assert_close(value.double(), old[name].double(), rtol=1e-2, atol=1e-3)
        elif file.name.startswith("batch-"):
            assert_holds(json.loads((out / file).read_text()), json.loads(before[file]), rel=1e-2)
