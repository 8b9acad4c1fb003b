"""Where activations come from is named once: what contradicts it is refused, and the record says what is true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cosae
from cosae.activations.store.format import INDEX
from cosae.cli import main
from cosae.cli.training import Train, build_recipe
from cosae.errors import CosaeError
from cosae.recipe import DataConfig, Recipe
from cosae.run.dataset.store import StoreDataset
from cosae.run.execute import Logs, execute, resume
from tests.support.small_stores import rows, write_store
from tests.support.tiny_runs import final_tensors

SMALL: dict[str, Any] = {"filter__window_tokens": 100, "training__buffer_tokens": 64, "batch_tokens": 16, "steps": 2}
SMALL |= {"evaluation__held_out_tokens": 30, "evaluation__calibration_tokens": 30, "d_sae": 12, "k": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of resid_post.4 of the embedded model."""
    folder = tmp_path_factory.mktemp("origins") / "store"
    sizes = ["--tokens", "300", "--held-out-tokens", "200", "--context", "32", "--set", "data.max_chars=2000"]
    with pytest.raises(SystemExit) as end:
        main(["capture", "--site", "resid_post.4", *sizes, "--out", str(folder), "--quiet"])
    assert end.value.code == 0
    return folder


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(["train", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("site", ["resid_post.3", "nonsense", "model.layers.3", "resid_post.5"])
@pytest.mark.parametrize("option", ["--site", "--set"])
def test_a_site_that_is_not_the_stores_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], site: str, option: str
) -> None:
    given = ["--site", site] if option == "--site" else ["--set", f"data.site={site}"]
    said = refused("--store", str(store), "--out", str(tmp_path / "run"), *given, capsys=capsys)
    assert f"is a store of resid_post.4, not of {site}" in said
    assert not (tmp_path / "run").exists()
    if site != "resid_post.5":  # the default of a recipe, which nobody asked for
        with pytest.raises(CosaeError, match=r"store of resid_post\.4, not of"):
            execute(Recipe(data=DataConfig(store=str(store), site=site)), tmp_path / "run")


@pytest.mark.parametrize("site", [None, "resid_post.4", "blocks.4.hook_resid_post", "model.layers.4", "layers.4"])
def test_the_recipe_of_a_run_on_a_store_has_the_stores_own_site_model_and_text(
    store: Path, tmp_path: Path, site: str | None
) -> None:
    out = tmp_path / "run"
    cosae.fit(str(store), "standard", out=out, evaluate=False, data__store_site=site, **SMALL)
    data = json.loads((out / "recipe.json").read_text())["data"]
    assert {name: data[name] for name in ("site", "model", "corpus", "context", "max_chars", "store")} == {
        "site": "resid_post.4", "model": "embedded", "corpus": "pylib", "context": 32, "max_chars": 2000,
        "store": str(store),
    }  # fmt: skip
    saved = cosae.load(out / "arms" / "standard").metadata
    assert (saved["recipe"]["data"]["site"], saved["site"]) == ("resid_post.4", "resid_post.4")


def test_a_run_whose_recipe_said_another_site_goes_on(store: Path, tmp_path: Path) -> None:
    """0.1 wrote the default into recipes of stores: it decided nothing, and the same run goes on as it would."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    recipe = Recipe(data=DataConfig(store=str(store)), d_sae=12, k=2, arms=Recipe().arms[:1]).changed(
        {name.replace("__", "."): value for name, value in SMALL.items() if "__" in name}
        | {
            "training.batch_tokens": 16,
            "training.steps": 6,
            "training.checkpoint_every": 2,
            "evaluation.probing": False,
        }
    )
    execute(recipe, whole, logs=Logs(False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreDataset, "resolved", lambda self: self.config)
        patch.setattr("cosae.run.execute.calibrate", lambda *_, **__: (_ for _ in ()).throw(OSError("stop")))
        with pytest.raises(OSError, match="stop"):
            execute(recipe, out, logs=Logs(False))
    assert Recipe.read(out / "recipe.json").data.site == "resid_post.5"
    resume(out, Logs(False))
    torch.testing.assert_close(final_tensors(out), final_tensors(whole), rtol=0, atol=0, equal_nan=True)


def test_what_contradicts_the_store_is_refused_and_what_agrees_is_not(store: Path) -> None:
    with pytest.raises(CosaeError, match=r"captured with context 32, not 64: drop data\.context"):
        cosae.fit(str(store), "standard", evaluate=False, data__context=64, **SMALL)
    with pytest.raises(CosaeError, match="captured with model 'embedded', not 'gpt2'"):
        cosae.fit(str(store), "standard", evaluate=False, data__model="gpt2", **SMALL)
    assert cosae.fit(str(store), "standard", evaluate=False, data__context=32, **SMALL).saes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"world": "none:d_in=8", "model": "gpt2"}, "Got world and model"),
        ({"world": "none:d_in=8", "store": "s"}, "Got store and world"),
        ({"activations": "x.npy", "store": "s"}, "Got store and activations"),
        ({"activations": "x.npy", "model": "gpt2"}, "Got activations and model"),
        ({"activations": "x.npy", "site": "resid_post.1"}, "site has no say in a file of activations"),
        ({"world": "none:d_in=8", "corpus": ("a",)}, "corpus has no say in a synthetic world"),
        ({"store": "s", "context": 32}, "context has no say in a store"),
        ({"store": "s", "dtype": "bfloat16"}, "model_dtype has no say in a store"),
        ({"store": "s", "set": ("data.packing=document",)}, "packing has no say in a store"),
        ({"world": "none:d_in=8", "set": ("data.held_out_frac=0.2",)}, "held_out_frac has no say in a synthetic world"),
        ({"set": ("data.store_site=resid_post.3",)}, "store_site has no say in activations of a model"),
        ({"set": ("data.activations_key=x",)}, "activations_key has no say in activations of a model"),
    ],
)
def test_an_option_that_would_decide_nothing_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CosaeError, match=says):
        build_recipe(Train(out=Path("run"), **options))


def test_an_origin_that_is_named_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    base = Recipe().changed({"data.store": "old", "data.store_site": "resid_post.3"})
    base.write(tmp_path / "store.json")
    data = build_recipe(Train(out=Path("run"), recipe=tmp_path / "store.json", model="gpt2", site="resid_post.1")).data
    assert data == DataConfig(model="gpt2", site="resid_post.1")
    paper = build_recipe(Train(out=Path("run"), preset="paper", store="mine")).data
    assert paper == DataConfig(store="mine")
    kept = build_recipe(Train(out=Path("run"), preset="paper", activations="x.npy")).data
    assert kept == DataConfig(activations="x.npy", held_out_frac=0.05)
    same = build_recipe(Train(out=Path("run"), recipe=tmp_path / "store.json", site="resid_post.4")).data
    assert same == replace(base.data, store_site="resid_post.4")


def test_a_store_that_knows_no_site_takes_none(tmp_path: Path) -> None:
    write_store(tmp_path / "s", rows(200), rows(40))
    assert (tmp_path / "s" / INDEX).is_file()
    with pytest.raises(CosaeError, match=r"a store of no site that it knows, not of resid_post\.1"):
        cosae.fit(str(tmp_path / "s"), "standard", evaluate=False, data__store_site="resid_post.1", **SMALL)


def test_fit_on_a_tensor_takes_nothing_of_a_model() -> None:
    with pytest.raises(CosaeError, match="corpus has no say in a file of activations"):
        cosae.fit(torch.randn(100, 4), "standard", data__corpus="pylib", **SMALL)
