"""The claims' page follows from the committed numbers: verdicts are judged again here, by the rules the pages state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from studies.__main__ import CLAIMS, PAGE, page

ROOT = Path(__file__).parents[1]

NUMBERS = {claim: json.loads((ROOT / "studies" / claim / "numbers.json").read_text("utf-8")) for claim in CLAIMS}


def sign(estimate: list[float]) -> int:
    _, low, high = estimate
    return 1 if low > 0 else -1 if high < 0 else 0


def judged(claim: str, n: dict[str, Any]) -> str:
    """The verdict by the rule that the claim's page states."""
    names = ("not supported", "supported", "opposite")
    if claim == "matched_reconstruction":
        _, low, high = n["natural/cosine"]["fve"]
        return "supported" if low > -0.02 else "opposite" if high < -0.02 else "not supported"
    if claim == "learned_exponent":
        ends, fast = n["ends"], ("cosine_fast", "cosine_fast_from_1")
        varying = ("natural", "injected", "world_log_normal", "world_log_normal_1")
        settled = [s for s in varying if all(min(ends[f"{s}/{arm}"]) > 0.5 for arm in fast)]
        return "not supported" if settled else "supported"
    if claim == "concept_alignment":
        return names[sign(n["natural/sinks_out/auroc/cosine"]["gap"])]
    if claim == "norm_detectors":
        held = min(n["natural/standard"]["mostly"]) > 0.1 and max(n["natural/cosine"]["mostly"]) < 0.01
        return "supported" if held else "not supported"
    if claim == "reweighting":
        gap = n["reweighted_injected/cosine"]["auroc"]
        if sign(gap) <= 0 and sign(n["reweighted/cosine"]["auroc"]) <= 0:
            return "cannot be seen at this scale"
        closed = max(n[f"reweighted_injected/standard_over_{p}"]["auroc"][0] for p in ("r", "r2"))
        return "supported" if closed < gap[0] / 2 else "not supported"
    if claim == "score_swap":
        return names[sign(n["natural/standard → cosine/swapped, refitted"]["gap"])]
    if claim in ("selectors", "width_and_k"):
        cosine = [one["auroc"] for name, one in n.items() if claim == "selectors" or name.endswith("/cosine")]
        signs = [sign(one) for one in cosine]
        return "supported" if min(signs) > 0 else "opposite" if max(signs) < 0 else "not supported"
    if claim == "layer_norm_side":
        if sign(n["natural/cosine"]["auroc"]) <= 0:
            return "cannot be seen at this scale"
        return "supported" if n["twin/cosine"]["auroc"][2] < n["natural/cosine"]["auroc"][0] else "not supported"
    assert claim == "norm_shift"
    held = sign(n["gap"]["fve"]) > 0 and np.mean(n["cosine/0.5"]["l0"]) < 48
    return "supported" if held else "not supported"


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_verdict_follows_from_its_numbers(claim: str) -> None:
    found = NUMBERS[claim]
    assert found["verdict"] == judged(claim, found["numbers"])
    head = (ROOT / "studies" / claim / "RESULT.md").read_text("utf-8").splitlines()[2]
    assert head == f"**{found['verdict'].capitalize()}.** {found['figures']}"


def test_the_page_of_claims_is_what_the_numbers_give() -> None:
    assert PAGE.read_text("utf-8") == page()


def test_intervals_over_seeds_are_student_s_t() -> None:
    n = NUMBERS["norm_shift"]["numbers"]
    gaps = np.subtract(n["cosine/0.5"]["fve"], n["standard/0.5"]["fve"])
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5
    assert n["gap"]["fve"] == pytest.approx([gaps.mean(), gaps.mean() - half, gaps.mean() + half])


def test_figures_quote_the_numbers() -> None:
    """Spot checks of the line in the claims' page."""
    shift = NUMBERS["norm_shift"]
    low, high = shift["numbers"]["gap"]["fve"][1:]
    assert f"[{low:+.3f}, {high:+.3f}]" in shift["figures"]
    for name in ("batch_topk", "topk", "abs_topk", "jumprelu", "gated"):
        middle, low, high = NUMBERS["selectors"]["numbers"][name]["auroc"]
        assert f"{name} {middle:+.3f} [{low:+.3f}, {high:+.3f}]" in NUMBERS["selectors"]["figures"]
    reason = json.loads((ROOT / "studies" / "learned_exponent" / "reason.json").read_text("utf-8"))
    at = np.mean(reason["fve"]["σ 0.5"]["both"], axis=0)
    assert 0.4 <= reason["exponents"][int(at.argmax())] <= 0.6
