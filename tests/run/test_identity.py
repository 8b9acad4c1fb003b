"""Where an SAE was trained, by its file, against where it is read: said first, and again where nothing is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cosae
from cosae.cli import main
from cosae.errors import CosaeWarning
from cosae.models.sites import KINDS, resolve_site
from cosae.run.audit import run_audit
from cosae.run.evaluate import evaluate, screen
from cosae.run.identity import read_elsewhere
from cosae.run.requests import EvalRequest
from tests.support.tiny_models import make_model

ELSEWHERE = r"trained at resid_post\.5 of embedded, by its file, and is read here at resid_post\.1"
SMALL: dict[str, Any] = {"tokens": 300}


def sae(folder: Path, **metadata: Any) -> Path:
    """An SAE of the embedded model's width, far from any activation of it."""
    made = cosae.SAE.build(d_in=192, d_sae=64, score="inner", selector="batch_topk", k=4, seed=0)
    with torch.no_grad():
        made.b_dec.add_(30.0)
    made.metadata = metadata
    return Path(cosae.save(made, folder))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some text, a store of resid_post.1, and SAEs of resid_post.5 and of nowhere."""
    folder = tmp_path_factory.mktemp("identity")
    (folder / "text").mkdir()
    for number in range(24):
        (folder / "text" / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 30)
    sae(folder / "at5", model="embedded", site="resid_post.5", hook_name="blocks.5.hook_resid_post")
    sae(folder / "nowhere")
    arguments = ["--site", "resid_post.1", "--tokens", "400", "--held-out-tokens", "300", "--context", "32", "--quiet"]
    with pytest.raises(SystemExit) as end:
        main(["capture", *arguments, "--corpus", str(folder / "text"), "--out", str(folder / "store")])
    assert end.value.code == 0
    return folder


def request(place: Path, **changes: Any) -> EvalRequest:
    at = {} if "store" in changes else {"model": "embedded", "corpus": str(place / "text"), "context": 32}
    return EvalRequest(**{**SMALL, **at, **changes})


@pytest.mark.parametrize("where", ["site", "store"])
def test_an_audit_elsewhere_says_so_before_its_verdict_and_within_it(place: Path, tmp_path: Path, where: str) -> None:
    asked = request(place, **({"site": "resid_post.1"} if where == "site" else {"store": str(place / "store")}))
    with pytest.warns(CosaeWarning, match=f"at5: it was {ELSEWHERE}"):
        found = run_audit([place / "at5"], asked, tmp_path / "audit")
    written = json.loads((tmp_path / "audit" / "audit.json").read_text())["saes"][0]
    assert "resid_post.5" in written["elsewhere"]
    assert "worse than their mean" in written["verdict"]["because"]
    assert written["elsewhere"] in written["verdict"]["because"]
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert page.index("It was trained at resid_post.5 of embedded") < page.index("Fooled by norm: ")
    from cosae.report.audit import audit_text

    shown = audit_text(found)
    assert shown.index("warning: it was trained at resid_post.5") < shown.index("fooled by norm")


def test_an_audit_at_home_or_of_an_unknown_sae_says_nothing(place: Path) -> None:
    for name, site in (("at5", "resid_post.5"), ("at5", "model.layers.5"), ("nowhere", "resid_post.1")):
        (one,) = run_audit([place / name], request(place, site=site))["saes"]
        assert one["elsewhere"] is None
        assert "trained at" not in one["verdict"]["because"]


@pytest.mark.parametrize("measurement", ["reconstruction", "splice"])
def test_an_evaluation_elsewhere_says_so_first_and_again_where_it_is_worse_than_the_mean(
    place: Path, measurement: str
) -> None:
    with pytest.warns(CosaeWarning, match=ELSEWHERE):
        found = evaluate(measurement, [f"A={place / 'at5'}"], request(place, site="resid_post.1"))
    assert "resid_post.5" in found["warnings"]["A"]
    shown = screen(found)
    assert shown.startswith("A: it was trained at resid_post.5")
    assert "A is worse than the mean here: it was trained at resid_post.5" in shown


def test_a_folder_of_sparsify_knows_its_module() -> None:
    model = make_model("llama")
    known = {"format": "sparsify", "hf_hook_name": "layers.3.mlp"}
    assert "layers.3.mlp" in read_elsewhere(known, "m", resolve_site(model, "resid_post.3"), model)
    assert read_elsewhere(known, "m", resolve_site(model, "mlp_out.3"), model) == ""
    assert read_elsewhere(known, "m", resolve_site(model, "model.layers.3.mlp"), None) == ""


def test_names_of_one_place_are_equal_and_others_are_not() -> None:
    model = make_model("llama")
    for kind in KINDS:
        site = resolve_site(model, f"{kind}.2")
        paths = {site.module_path, site.module_path.removeprefix("model.")} if site.reads == "output" else set()
        names = {site.name, site.hook_name} | paths
        assert [name for name in names if not site.is_named(name)] == []
        others = {f"{other}.{block}" for other in KINDS for block in range(4)} - {site.name}
        same = {"resid_pre": "resid_post.1", "resid_post": "resid_pre.3"}.get(kind)
        assert {name for name in others if site.is_named(name)} == ({same} if same else set())
        assert not site.is_named("layers.12.mlp")
    assert resolve_site(model, "resid_post.2").is_named("model.layers.2.output")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"model": "google/gemma-2-2b"}, "trained at google/gemma-2-2b, by its file"),
        ({"model": "other/GEMMA-2-9b", "site": "resid_post.2"}, ""),
        ({"model": "/models/gemma-2-9b/", "layer": 2}, ""),
        ({"layer": 3}, "trained at block 3"),
        ({"recipe": {"data": {"world": {"kind": "x"}}}}, "a synthetic world, not on google/gemma-2-9b"),
        ({"model": 3, "site": ["a"], "recipe": "x", "layer": "2"}, ""),
        ({}, ""),
    ],
)
def test_models_and_blocks_are_compared_as_far_as_they_are_known(metadata: dict[str, Any], said: str) -> None:
    site = resolve_site(make_model("llama"), "resid_post.2")
    found = read_elsewhere(metadata, "google/gemma-2-9b", site)
    assert said in found
    assert bool(found) is bool(said)
