"""The claims' page follows from the committed numbers: verdicts are judged again here, by the rules the pages state."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from cosae.evaluate.probing.ranking import EVERY_RULE
from cosae.types import Activations, Codes
from studies.__main__ import CLAIMS, PAGE, page
from studies.crosscoders import __main__ as crosscoders
from studies.real_model import probing
from studies.real_model.texts import ReadSet
from studies.transcoders import __main__ as transcoders

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
    if claim == "two_exponents":
        part = "learned with the window: two from (0, 1) less one from 0"
        signs = [sign(n["gaps"][f"{name}/{part}"]["fve"]) for name in ("two_exponents", "two_exponents_1")]
        return "not supported" if min(signs) > 0 else "supported"
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
    ends = {arm: [a for a, _ in pairs] for arm, pairs in NUMBERS["two_exponents"]["numbers"]["ends"].items()}
    for start in (0, 1):  # what fires pulls a learned exponent to the best fixed one
        plain, windowed = (ends[f"two_exponents/one{label}_from_{start}"] for label in ("", "_window"))
        assert len(plain) == len(windowed) == 3
        assert max(windowed) < min(plain)
    reason = json.loads((ROOT / "studies" / "learned_exponent" / "reason.json").read_text("utf-8"))
    at = np.mean(reason["fve"]["σ 0.5"]["both"], axis=0)
    assert 0.4 <= reason["exponents"][int(at.argmax())] <= 0.6
    for grids in reason["two"].values():  # the ridge
        mean = np.mean(grids, axis=0)
        best = [reason["delta"][int(row.argmax())] for row in mean[:6]]
        assert best == pytest.approx([1 - 2 * a for a in reason["a"][:6]], abs=0.11)


REAL = json.loads((ROOT / "studies" / "real_model" / "numbers.json").read_text("utf-8"))


def gain(block: int | str, reading: str) -> list[float]:
    found: list[float] = REAL["runs"][f"real_{block}"]["arms"]["cosine"]["readings"][reading]["gain"]
    return found


def refuted_on_the_real_model() -> dict[str, bool]:
    """The predictions of studies/real_model/PREDICTIONS.md that were tried, by what that file says refutes them."""
    paper, masked = "in/mean_difference/top_1", "out/mean_difference/top_1"
    sinks, runs, there = (12, 14, 18, 24, 28), REAL["runs"], {row["block"] for row in REAL["dose"]}
    rules = [f"{side}/{rule}/top_1" for side in ("in", "out") for rule in EVERY_RULE]
    dose = [(row["strength"] * row["on"]["standard"], gain(row["block"], paper)[0]) for row in REAL["dose"]]

    def spliced() -> bool:
        off, on = (runs["real_14"]["splice"][key] for key in ("off_sinks/sinks_out", "everywhere/sinks_in"))
        far = [abs(one["recovered"] - off["standard"]["recovered"]) for one in off.values()]
        return max(far) > 0.05 or any(on[arm]["recovered"] >= off[arm]["recovered"] for arm in off)

    def raw() -> float:
        readings = runs["real_14"]["arms"]["standard_unit_frame"]["readings"]
        return float(readings["in/raw/mean_difference/top_1"]["accuracy"])

    refuted = {
        "P1": lambda: [gain(b, paper)[1] < (5 if b < 18 else 0) for b in sinks if b in there],
        "P2": lambda: [gain(b, masked)[0] > gain(b, paper)[0] / 2 for b in (12, 14)],
        "P3": lambda: [gain(b, "out/auroc/top_1")[1] > 1.5 for b in (12, 14)],
        "P4": lambda: [gain(b, reading)[1] > 2 for b in (10, 11) for reading in rules],
        "P5": lambda: [gain(14, "random/mean_difference/top_1")[0] < 0.8 * gain(14, paper)[0]],
        "P6": lambda: [gain(14, "clipped/mean_difference/top_1")[0] > 0.5 * gain(14, paper)[0]],
        "P7": lambda: [gain(10, "planted/mean_difference/top_1")[1] < 2],
        "P8": lambda: [gain(b, "last/mean_difference/top_1")[1] > 2 for b in sinks],
        "P9": lambda: [gain("14_unfiltered", paper)[0] > 0.75 * gain(14, paper)[0]],
        "P10": lambda: [stats.spearmanr(dose).statistic < 0.5],
        "P11": lambda: [raw() > 0.6],
        "P12": lambda: [spliced()],
    }
    tried = [name for name, (verdict, _) in REAL["predictions"].items() if verdict != "not run"]
    return {name: any(refuted[name]()) for name in tried}


def test_predictions_on_the_real_model_are_judged_by_their_own_file() -> None:
    assert {name: REAL["predictions"][name][0] == "refuted" for name in refuted_on_the_real_model()} == (
        refuted_on_the_real_model()
    )
    text = (ROOT / "studies" / "real_model" / "RESULT.md").read_text("utf-8")
    for name, (verdict, figures) in REAL["predictions"].items():
        assert f"| {name} | **{verdict}** | {figures.replace('|', chr(92) + '|')} |" in text


def test_an_interval_of_the_real_model_draws_sets_and_seeds() -> None:
    values = REAL["runs"]["real_14"]["gains_by_set"]
    for reading, by_set in values.items():
        gain_DS = np.array(by_set)
        assert gain_DS.shape == (81, len(REAL["runs"]["real_14"]["seeds"]))
        rng = np.random.default_rng(0)
        drawn = [
            gain_DS[rng.integers(81, size=81)][:, rng.integers(gain_DS.shape[1], size=gain_DS.shape[1])].mean()
            for _ in range(2000)
        ]
        middle, low, high = gain(14, reading)
        assert middle == pytest.approx(gain_DS.mean(), abs=0.01)
        assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.5)


def small_set() -> ReadSet:
    """Two texts of three and one tokens, position 0 long."""
    x_ND = torch.tensor([[90.0, 0.0], [1.0, 2.0], [3.0, 0.5], [80.0, 1.0]])
    none = torch.full((4,), -1, dtype=torch.int32)
    text_N, position_N = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0], dtype=torch.int32)
    special_N = torch.zeros(4, dtype=torch.bool)
    activations = Activations(x_ND, x_ND.norm(dim=-1), none, text_N.int(), position_N, none, special_N)
    return ReadSet("small", {}, text_N.numpy(), activations)


def test_the_controls_of_the_real_model_change_what_they_say() -> None:
    one, sink_N = small_set(), np.array([True, False, False, True])
    left_out = probing._one_other(one)
    assert left_out.sum() == 1
    assert not left_out[[0, 3]].any()
    clipped = probing._clipped(Codes.from_dense(one.activations.x_ND), sink_N).to_dense()
    assert clipped.tolist() == [[3.0, 0.0], [1.0, 2.0], [3.0, 0.5], [3.0, 1.0]]
    pooled = dict(probing._pooled(Codes.from_dense(one.activations.x_ND), one, sink_N, 2, probing.POOLINGS))
    assert pooled["in"].to_dense()[0].tolist() == pytest.approx([94 / 3, 2.5 / 3])
    assert pooled["out"].to_dense().tolist() == [[2.0, 1.25], [0.0, 0.0]]
    assert pooled["last"].to_dense().tolist() == [[3.0, 0.5], [80.0, 1.0]]


@pytest.mark.parametrize("study", [transcoders, crosscoders])
def test_the_page_of_transcoders_has_the_numbers_that_were_measured(study: ModuleType) -> None:
    """Three seeds an arm, and the table that the study prints."""
    numbers = json.loads(study.NUMBERS.read_text("utf-8"))
    assert study.table(numbers) in (ROOT / "docs" / "transcoders.md").read_text("utf-8")
