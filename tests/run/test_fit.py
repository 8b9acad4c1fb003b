"""`cosae.fit`: a tensor, a file, a recipe; short names of the common fields; what it refuses."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cosae
from cosae.errors import CosaeError
from cosae.run.execute import execute
from tests.support.tiny_runs import ARMS, QUIET, recipe

SMALL: dict[str, Any] = {"d_sae": 32, "k": 3, "steps": 5, "batch_tokens": 32}


def x_of(n: int = 600, d: int = 16) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 1.0


def test_a_tensor_in_memory() -> None:
    x_ND = x_of(3000)
    before = x_ND.clone()
    run = cosae.fit(x_ND, ["standard", "cosine,k=5"], **SMALL)
    assert torch.equal(x_ND, before)
    assert list(run.saes) == ["standard", "cosine-k=5"]
    assert (run.out, run.evaluation) == (None, None)
    for name, k in (("standard", 3), ("cosine-k=5", 5)):
        sae = run.saes[name]
        assert (sae.d_in, sae.d_sae, sae.k, sae.calibrated) == (16, 32, k, True)
        assert run.calibrations[name].l0 == pytest.approx(k, rel=0.01)
        assert sae(x_ND).shape == x_ND.shape
        assert sae.encode(x_ND).l0 == pytest.approx(k, rel=0.2)
    assert run.run["source"]["source"] == "tensor"
    assert run.run["tokens"] == 5 * 32


def test_arrays_and_lists_of_them_give_the_same_run_as_a_tensor() -> None:
    x_ND = x_of()
    array = x_ND.numpy().copy()
    array.setflags(write=False)
    wanted = cosae.fit(x_ND, "standard", **SMALL).saes["standard"].W_dec
    for data in (array, array.astype(np.float64), array.astype(">f4"), [array[:100], x_ND[100:]], x_ND.double()):
        assert torch.equal(cosae.fit(data, "standard", **SMALL).saes["standard"].W_dec, wanted)


def test_progress_is_shown_where_somebody_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cosae.fit(x_of(), "standard", **SMALL)
    assert capsys.readouterr().err == ""
    cosae.fit(x_of(), "standard", progress=True, **SMALL)
    assert "step 1/5" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ipykernel", object())  # a notebook without widgets
    cosae.fit(x_of(), "standard", **SMALL)
    assert "training (5 of 5 steps)" in capsys.readouterr().err
    cosae.fit(x_of(), "standard", progress=False, **SMALL)
    assert capsys.readouterr().err == ""


def test_it_learns() -> None:
    x_ND = x_of(2000) @ torch.diag(torch.linspace(0.1, 2.0, 16))
    one, many = (
        cosae.fit(x_ND, "standard", d_sae=64, k=6, steps=steps, lr=5e-3, evaluate=True, evaluation__resamples=10)
        for steps in (1, 150)
    )
    fve = [run.evaluation["reconstruction"]["standard"]["sinks_in"]["fve"] for run in (one, many) if run.evaluation]
    assert fve[1] > fve[0] + 0.1


def test_the_same_call_gives_the_same_weights_and_another_seed_others() -> None:
    a, b, c = (cosae.fit(x_of(), "cosine", seed=seed, **SMALL).saes["cosine"].W_dec for seed in (4, 4, 5))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_file_of_vectors(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", x_of().numpy())
    small = {**SMALL, "training__buffer_tokens": 128, "filter__window_tokens": 300}
    for path in (tmp_path / "x.npy", str(tmp_path / "x.npy")):
        run = cosae.fit(path, "standard", **small)
        assert run.run["name"] == "x"
        assert run.saes["standard"].d_in == 16
        assert run.run["source"]["n_rows"] == 600


def test_a_recipe_and_a_folder(tmp_path: Path) -> None:
    small = replace(recipe(**{"training.steps": 5}), arms=ARMS[:1])
    run = cosae.fit(small, out=tmp_path / "run", k=2)
    assert run.evaluation is not None
    assert run.calibrations["standard"].target == 2.0
    assert (tmp_path / "run" / "evaluation.json").exists()
    same = execute(small.changed(k=2), None, logs=QUIET, measured=False)
    assert torch.equal(run.saes["standard"].W_dec, same.saes["standard"].W_dec)
    quiet = cosae.fit(small, out=tmp_path / "other", evaluate=False)
    assert quiet.evaluation is None
    assert not (tmp_path / "other" / "evaluation.json").exists()
    with pytest.raises(CosaeError, match="already holds a run"):
        cosae.fit(small, out=str(tmp_path / "run"))


@pytest.mark.parametrize("n", [3, 4, 20])
def test_tiny_tensors_are_fitted_to(n: int) -> None:
    run = cosae.fit(x_of(n, 4), "standard", d_sae=8, k=2, steps=2)
    assert run.run["norm_summary"]["window_tokens"] <= n
    assert run.run["recipe"]["training"]["batch_tokens"] <= n


def test_sizes_that_were_asked_for_are_kept() -> None:
    run = cosae.fit(x_of(), "standard", d_sae=8, k=2, steps=1, batch_tokens=700, training__buffer_tokens=1500)
    training = run.run["recipe"]["training"]
    assert (training["batch_tokens"], training["buffer_tokens"]) == (700, 1500)


def test_masked_rows_and_half_types_are_taken() -> None:
    x_ND = x_of()
    x_ND[::7] = 0.0
    run = cosae.fit(x_ND.to(torch.bfloat16), ["standard", "cosine"], **SMALL)
    for sae in run.saes.values():
        assert all(bool(torch.isfinite(p).all()) for p in sae.parameters())
        assert sae.encode(x_ND).count_B[0] == 0


X = x_of()


@pytest.mark.parametrize(
    ("data", "arms", "changes", "says"),
    [
        (X, [], {}, "at least one arm"),
        (X, ["standard", "standard"], {}, "different names"),
        (X, "manhattan", {}, "an arm must start with one of"),
        (X, [3], {}, "arms must be names or Arm objects"),
        (X, 3, {}, "arms must be names or Arm objects"),
        (X, None, {"width": 3}, "a recipe has no field 'width'"),
        (X, None, {"training__step": 3}, "a recipe has no field 'training.step'"),
        (X, None, {"steps": 0}, "steps must be at least 1"),
        (X, None, {"steps": "ten"}, "must be of type int"),
        (X, None, {"lr": 0}, "lr must be a positive number"),
        (X, None, {"k": 33, "d_sae": 32}, "k must be at most d_sae"),
        (X, None, {"data__held_out_frac": 1.0}, "held_out_frac must lie between 0 and 1"),
        (X, None, {"data__activations": "x.npy"}, "from a tensor or a file"),
        (X.int(), None, {}, "Got torch.int32"),
        (X[0], None, {}, r"Got torch.float32 \(16,\)"),
        (X.reshape(30, 5, 4, 16), None, {}, r"\(30, 5, 4, 16\): pass x.flatten\(1, -2\)"),
        ([X.reshape(30, 20, 16), X], None, {}, r"one width d"),
        ([X, X[:, :3]], None, {}, r"one width d. Got \(600, 16\), \(600, 3\)"),
        ([], None, {}, "an empty list"),
        (np.array([["a"]]), None, {}, "must be floats"),
        (X.int().numpy(), None, {}, "Got torch.int32"),
        (X[:1], None, {}, "N of at least 2"),
        (X.index_fill(0, torch.tensor([3]), torch.inf), None, {}, "Got inf at row 3, column 0"),
        (torch.zeros(100, 4), None, {}, "median norm .* is 0"),
        (torch.ones(100, 4), None, {}, "their variance in the first window is 0"),
        (X[:2], None, {}, "their variance in the first window is 0"),
        (np.zeros((4, 4)), None, {}, "median norm .* is 0"),
        (3, None, {}, "Got int instead"),
        ("headline", None, {}, "preset must be one of"),
        ("nowhere.npy", None, {}, "nowhere.npy"),
        (Path("nowhere"), None, {}, "nowhere"),
    ],
)
def test_what_it_refuses_in_one_sentence(
    data: Any, arms: Any, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(CosaeError, match=says) as caught:
        cosae.fit(data, arms, out=tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_its_example_runs() -> None:
    """The lines of the docstring, on smaller numbers."""
    lines = [
        line.strip()[4:] for line in (inspect.getdoc(cosae.fit) or "").splitlines() if line.strip().startswith(">>>")
    ]
    assert len(lines) == 2
    space: dict[str, Any] = {"cosae": cosae, "x": x_of()}
    exec("\n".join(lines).replace("1024", "64").replace("k=16", "k=4").replace("500", "3"), space)
    assert space["codes"].d_sae == 64
