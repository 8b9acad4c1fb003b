"""What an SAE's file may name: a stranger's nothing of this machine, by any verb; in the user's own run, its text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cosae
from cosae.activations.synthetic import World
from cosae.errors import CosaeError
from cosae.interop.neuronpedia.settings import Options
from cosae.io.values import to_plain
from cosae.run.audit import run_audit
from cosae.run.evaluate import evaluate
from cosae.run.explore.features import look
from cosae.run.explore.steer import steer
from cosae.run.export import export_delphi, export_neuronpedia
from cosae.run.requests import EvalRequest, Place, Reading, SteerOptions

SITE = "resid_post.3"
SMALL: dict[str, Any] = {"prompts": 4, "context": 32}


def audit(path: Path, **options: Any) -> Any:
    return run_audit([path], EvalRequest(tokens=256, context=32, **options))


def measure(path: Path, **options: Any) -> Any:
    return evaluate("reconstruction", [str(path)], EvalRequest(tokens=256, context=32, **options))


VERBS: dict[str, Callable[..., Any]] = {
    "audit": audit,
    "eval": measure,
    "features": lambda path, **options: look(path, Reading(**SMALL, **options)),
    "export neuronpedia": lambda path, **options: export_neuronpedia(
        path, path.with_name("out"), Reading(**SMALL, **options), Options()
    ),
    "export delphi": lambda path, **options: export_delphi(path, path.with_name("out"), Reading(**SMALL, **options)),
    "steer": lambda path, **options: steer(path, "def g(", Place(**options), SteerOptions((7,), add=1.0, new_tokens=1)),
}
of_every_verb = pytest.mark.parametrize("verb", VERBS)


def saved(folder: Path, metadata: dict[str, Any]) -> Path:
    sae = cosae.SAE.build(192, 32, "inner", "topk", k=4, seed=0)
    sae.metadata = {"model": "embedded", "site": SITE, **metadata}
    return cosae.save(sae, folder)


@of_every_verb
@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"corpus": "diary"}, "names the text 'diary'.*--corpus"),
        ({"corpus": ["pylib", "hf:/home/me/diary"]}, "names the text 'hf:/home/me/diary'"),
        ({"corpus": "/usr"}, "names the text '/usr'"),
        ({"model": "model"}, "names the model 'model'.*--model"),
        ({"model": "/somewhere/model"}, "names the model"),
        ({"model": "../model"}, "names the model"),
    ],
)
def test_a_file_names_no_place_of_this_machine(
    verb: str, data: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pulled SAE whose metadata name a local corpus or model: nothing of it is opened."""
    monkeypatch.chdir(tmp_path)
    for name in ("diary", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "diary" / "secret.txt").write_text("secret " * 500)
    path = saved(tmp_path / "sae", {"model": data.get("model", "embedded"), "recipe": {"data": data}})
    if verb == "steer" and "corpus" in data:
        pytest.skip("steering reads no text")
    with pytest.raises(CosaeError, match=says):
        VERBS[verb](path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on files of this machine."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "corpus").mkdir()
    for i in range(12):
        lines = "".join(f"def f{i}_{j}(x):\n    return x + {j}\n\n" for j in range(60))
        (folder / "corpus" / f"{i}.py").write_text(lines)
    small = {"filter__window_tokens": 1024, "training__buffer_tokens": 2048, "evaluation__calibration_tokens": 256}
    data = {"data__corpus": str(folder / "corpus"), "data__context": 32, "data__site": SITE}
    cosae.fit("embedded", "cosine", out=folder / "run", evaluate=False, d_sae=32, k=4, steps=4, batch_tokens=128,
              progress=False, **small, **data)  # fmt: skip
    return folder / "run"


@of_every_verb
def test_an_sae_in_the_run_that_trained_it_needs_no_option(verb: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert VERBS[verb](tmp_path / "run" / "arms" / "cosine") is not None


def test_outside_of_its_run_or_with_another_text_an_sae_needs_the_option(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / "arms" / "cosine", alone)
    with pytest.raises(CosaeError, match=r"names the text .*--corpus"):
        audit(alone)
    audit(alone, corpus=str(run.parent / "corpus"))
    shutil.copytree(run, tmp_path / "run")
    data = {"corpus": str(tmp_path)}
    stranger = saved(tmp_path / "run" / "arms" / "stranger", {"recipe": {"data": data}})
    with pytest.raises(CosaeError, match=r"names the text .*--corpus"):
        audit(stranger)


def test_a_file_chooses_no_processes_and_no_world_of_another_width(tmp_path: Path) -> None:
    path = saved(tmp_path / "sae", {"recipe": {"data": {"n_workers": 10_000, "prefetch_chunks": 10_000}}})
    data = look(path, Reading(**SMALL)).opened.data
    assert (data.n_workers, data.prefetch_chunks) == (0, 0)
    world = to_plain(World(d_in=10**9, n_features=10**9))
    path = saved(tmp_path / "worldly", {"recipe": {"data": {"world": world}}})
    with pytest.raises(CosaeError, match="a world of width 1000000000"):
        audit(path)
