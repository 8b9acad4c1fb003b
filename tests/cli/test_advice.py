"""What a refusal advises can be done: the option is one of the verb's own, and is not set already."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cosae
from cosae.cli import VERBS, main
from tests.test_docs import options

TINY = [
    "--d-sae", "12", "--k", "2", "--arms", "standard", "--steps", "4", "--batch", "32", "--quiet", "--set",
    "training.buffer_tokens=128", "filter.window_tokens=128", "evaluation.held_out_tokens=64",
    "evaluation.calibration_tokens=64", "evaluation.resamples=5",
]  # fmt: skip
ROW = 417


@pytest.fixture
def holed(tmp_path: Path) -> Path:
    """A file of 600 rows of which one is no number."""
    x_ND = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    x_ND[ROW, 3] = np.nan
    np.save(tmp_path / "rows.npy", x_ND)
    return tmp_path / "rows.npy"


def run(capsys: Any, *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err


@pytest.mark.parametrize("verb", ["plan", "train --dry-run", "train"])
def test_plan_and_train_agree_on_a_row_that_is_no_number(verb: str, holed: Path, tmp_path: Path, capsys: Any) -> None:
    command = [*verb.split(), "--activations", holed, "--out", tmp_path / "out", *TINY]
    status, said = run(capsys, *command)
    assert (status, f"row {ROW}" in said, "data.non_finite=drop" in said) == (2, True, True)
    status, said = run(capsys, *command, "data.non_finite=drop")
    assert status == 0, said


def test_a_row_that_was_dropped_is_named_as_the_file_counts_it(holed: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    changes = ["data.non_finite=drop", "data.held_out_frac=0.02"]
    assert run(capsys, "train", "--activations", holed, "--out", out, *TINY, *changes)[0] == 0
    assert json.loads((out / "run.json").read_text())["non_finite"]["first"][0]["own_row"] == ROW
    (event,) = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert f"row {ROW} (counted from 0)" in event["text"]


@pytest.mark.parametrize("verb", ["audit", "eval reconstruction"])
def test_verbs_that_cannot_leave_rows_out_do_not_advise_it(verb: str, holed: Path, tmp_path: Path, capsys: Any) -> None:
    sae = cosae.save(cosae.SAE.build(d_in=8, d_sae=12, score="inner", selector="topk", k=2), tmp_path / "sae")
    status, said = run(capsys, *verb.split(), sae, "--activations", holed, "--quiet")
    assert (status, f"row {ROW}" in said, "non_finite" in said) == (2, True, False)
    assert "remove or repair" in said


@pytest.mark.parametrize("data", ["store", "activations"])
@pytest.mark.parametrize("verb", ["features", "steer", "export neuronpedia", "export delphi"])
def test_verbs_that_need_a_model_advise_no_file(verb: str, data: str, tmp_path: Path, capsys: Any) -> None:
    sae = cosae.SAE.build(d_in=8, d_sae=12, score="inner", selector="topk", k=2)
    sae.metadata = {"recipe": {"data": {data: "somewhere"}}}
    more = {"features": [], "steer": ["a prompt", "--feature", "1", "--ablate"]}.get(verb, ["--out", tmp_path / "out"])
    status, said = run(capsys, *verb.split(), cosae.save(sae, tmp_path / "sae"), *more)
    assert (status, "--model and --site" in said) == (2, True)
    assert set(re.findall(r"--[a-z][\w-]*", said)) <= options(verb)


def test_every_option_that_a_sentence_names_exists() -> None:
    verbs = [*VERBS, "plan capture", "export neuronpedia", "export delphi"]
    known = frozenset().union(*map(options, verbs)) | {"--help", "--version"}
    named = set()
    for path in Path(cosae.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Raise):
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                named |= {option for text in texts for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", str(text))}
    assert named - known <= {"--no-deps"}  # of pip
    assert "--activations" in named
