"""What README.md and docs/CLAIMS.md claim follows from the studies' numbers: no figure in them stands by itself."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = README[README.index("## What comes out") : README.index("## Train, look, audit")]
CLAIMS = (ROOT / "docs" / "CLAIMS.md").read_text("utf-8")
STUDIES = {path.parent.name: json.loads(path.read_text("utf-8")) for path in (ROOT / "studies").glob("*/numbers.json")}
REAL = STUDIES.pop("real_model")
STUDIES = {name: one for name, one in STUDIES.items() if "numbers" in one}  # those of claims
NUMBER = r"[+-]\d\.\d+"
ESTIMATE = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]")
ROWS = {
    f"{name}, {norms}": ("matched_reconstruction", f"{setting}/{{arm}}", key)
    for norms, setting in (("norms as they are", "natural"), ("norms × a random factor", "injected"))
    for name, key in (("FVE", "fve"), ("median token FVE", "median_token_fve"))
} | {"AUROC of concepts, norms as they are": ("concept_alignment", "natural/sinks_out/auroc/{arm}", "gap")}
TABLE = [[cell.strip() for cell in line.strip("|").split("|")] for line in RESULTS.splitlines() if line.startswith("|")]


def written(estimate: list[float]) -> str:
    middle, low, high = (f"{value:+.3f}" for value in estimate)
    return f"{middle} [{low}, {high}]"


def verdict(estimate: list[float]) -> str:
    _, low, high = estimate
    return "higher" if low > 0 else "lower" if high < 0 else "not told apart"


def leaves(value: object) -> list[float]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, float) else [leaf for one in inside for leaf in leaves(one)]


def estimates(value: object) -> list[list[float]]:
    """Every mean with its interval in a tree of numbers."""
    if isinstance(value, list) and len(value) == 3 and all(isinstance(one, float) for one in value):
        return [value] if value[1] <= value[0] <= value[2] else []
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [found for one in inside for found in estimates(one)]


def over_seeds(one: list[float], other: list[float]) -> list[float]:
    """Mean difference with its interval by Student's t."""
    gaps = np.subtract(one, other)
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5
    return [gaps.mean(), gaps.mean() - half, gaps.mean() + half]


def test_the_readme_s_table_is_of_these_rows() -> None:
    assert [row[0] for row in TABLE[2:]] == sorted(ROWS, key=[row[0] for row in TABLE].index)
    assert len(TABLE) == 2 + len(ROWS)


@pytest.mark.parametrize("column", [1, 2])
@pytest.mark.parametrize("row", TABLE[2:], ids=lambda row: row[0])
def test_the_readme_s_differences_are_the_studies(row: list[str], column: int) -> None:
    study, name, key = ROWS[row[0]]
    estimate = STUDIES[study]["numbers"][name.format(arm=TABLE[0][column].strip("`"))][key]
    assert row[column] == f"{written(estimate)} {verdict(estimate)}"


@pytest.mark.parametrize("column", [1, 2])
@pytest.mark.parametrize("row", TABLE[2:], ids=lambda row: row[0])
def test_the_demo_s_run_on_another_processor_agrees(row: list[str], column: int) -> None:
    demo = json.loads((ROOT / "docs" / "demo.json").read_text("utf-8"))
    assert "Xeon" not in demo["run"]
    setting = "natural" if "as they are" in row[0] else "injected"
    measure = "AUROC, contextual, by AUROC" if "AUROC" in row[0] else f"{row[0].partition(',')[0]}, sinks out"
    found = demo["differences"][f"{setting}: {measure}: {TABLE[0][column].strip('`')}"]
    assert row[column].endswith(f"] {verdict(found)}")


def test_the_readme_has_no_other_figures_of_results() -> None:
    (row,) = (row for row in REAL["dose"] if row["block"] == 14)
    paper, masked = (ON_REAL[0].format(*row[way]) for way in ("paper", "masked"))
    quoted = f"{paper} points with it, {masked} without".replace("-", "−")
    assert RESULTS.count(quoted) == 1
    rest = RESULTS.replace(quoted, "")
    assert len(re.findall(r"\d\.\d", rest)) == 3 * len(ESTIMATE.findall(rest)) == 30
    for line in RESULTS.splitlines():  # words of difference stand only where an interval does
        if not line.startswith("|"):
            assert not re.search(r"\b(better|worse|higher|lower|equally|more|less)\b", line), line


def test_the_readme_says_which_runs_its_numbers_are_of() -> None:
    svg = (ROOT / "docs" / "demo.svg").read_text("utf-8")
    which = re.search(r"<desc>(.*?)</desc>", svg)[1]  # type: ignore[index]
    assert json.loads((ROOT / "docs" / "demo.json").read_text("utf-8"))["run"] == which
    assert f"one run ({which})" in " ".join(RESULTS.split())
    for study in ("matched_reconstruction", "concept_alignment"):
        page = (ROOT / "studies" / study / "RESULT.md").read_text("utf-8")
        commits = re.search(r"Runs of commit (.*?);", page)[1].split(", ")  # type: ignore[index]
        assert f"commits {commits[0]} to {commits[-1]}" in RESULTS
        assert "Intel(R) Xeon(R) Processor" in page
        assert "`natural` 0, 1, 2" in page


def test_the_readme_says_what_its_figure_shows() -> None:
    svg = (ROOT / "docs" / "demo.svg").read_text("utf-8")
    found = re.findall(r"<title>(\w+): ([\d.]+)</title>", svg)
    injected = found[len(found) // 2 :]
    shortest = {arm: float(value) for arm, value in injected[::4]}
    assert min(shortest, key=shortest.__getitem__) == "standard"
    assert max(shortest, key=shortest.__getitem__) == "standard_unit_frame"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 106


def test_the_readme_installs_extras_that_exist() -> None:
    """.ci/package installs by this line what it has built."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (users,) = re.findall(r'`pip install "cosae\[([a-z,]+)\]"`', README)
    developers = re.findall(r'-e "\.\[([a-z,]+)\]"', README)
    assert len(developers) == 2
    assert {extra for line in (users, *developers) for extra in line.split(",")} <= set(known)


ON_REAL = ("{:+.1f} [{:+.1f}, {:+.1f}]", "{:+.4f} [{:+.4f}, {:+.4f}]")
"""How the column about the real model writes points, and variance explained."""


@pytest.mark.parametrize("claim", STUDIES)
def test_every_interval_on_the_claims_page_is_a_study_s(claim: str) -> None:
    """A rounded mean with its interval, for each that the page quotes of a study; none is edited by hand."""
    numbers = STUDIES[claim]["numbers"]
    known = {written(estimate) for estimate in estimates(numbers)}
    if claim == "norm_shift":  # its numbers are by seed
        by_seed = [one["fve"] for name, one in numbers.items() if name != "gap"]
        known |= {written(over_seeds(one, other)) for one in by_seed for other in by_seed}
    known |= {text.format(*one) for one in _lists(REAL) if len(one) == 3 for text in ON_REAL}
    (row,) = (line for line in CLAIMS.splitlines() if line.startswith("| (") and f"](../studies/{claim}/" in line)
    quoted = [f"{middle} [{low}, {high}]" for middle, low, high in ESTIMATE.findall(row.replace("−", "-"))]
    assert [one for one in quoted if one not in known] == []


@pytest.mark.parametrize("claim", ["norm_detectors", "learned_exponent"])
def test_the_claims_page_s_other_figures_are_means_over_seeds(claim: str) -> None:
    own = STUDIES[claim]["figures"]
    known = leaves(STUDIES[claim]["numbers"])
    means = [np.mean(v) for v in _lists(STUDIES[claim]["numbers"])]
    reason = ROOT / "studies" / claim / "reason.json"
    grid = [0.25, 0.5] if reason.exists() else []
    for text in re.findall(r"\d\.\d+", own):
        digits = len(text.split(".")[1])
        assert any(round(float(v), digits) == float(text) for v in [*known, *means, *grid]), text


def _lists(value: object) -> list[list[float]]:
    if isinstance(value, list) and value and all(isinstance(one, float) for one in value):
        return [value]
    inside = value.values() if isinstance(value, dict) else ()
    return [found for one in inside for found in _lists(one)]
