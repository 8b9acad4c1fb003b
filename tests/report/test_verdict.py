"""The answer a page begins with: by intervals whose number is counted, sinks counted once, in plain words."""

from pathlib import Path
from statistics import NormalDist

import pytest

from cosae.report.lenient import read_record
from cosae.report.records import Evaluation, Run, RunRecord
from cosae.report.verdict import answer, claims


def record(fve, median=None, auroc=None, sinks_in=None, arms=None):
    """A run whose arms a, b, … have these (difference, low, high) from the arm base; the same with sinks in."""

    def row(arm, ends, middle, sinks):
        names = ("difference", "low", "high")
        of_median = dict(zip(("median_token_" + name for name in names), middle, strict=True)) if middle else {}
        return {"arm": arm, "versus": "base", "sinks": sinks, **dict(zip(names, ends, strict=True)), **of_median}

    rows = [row(arm, ends, (median or {}).get(arm), "sinks_out") for arm, ends in fve.items()]
    rows += [row(arm, ends, None, "sinks_in") for arm, ends in (sinks_in or fve).items()]
    paired = [
        {"arm": arm, "versus": "base", "rule": "auroc", "group": group, "metric": "auroc",
         "difference": ends[0], "low": ends[1], "high": ends[2]}
        for arm, ends in (auroc or {}).items() for group in ("contextual", "lexical")
    ]  # fmt: skip
    concepts = [{"name": "x", "group": "contextual"}, {"name": "y", "group": "lexical"}]
    probing = {"sinks_out": {"concepts": concepts, "paired": paired}} if auroc else {}
    names = arms or ["base", *fve]
    return RunRecord(
        Path("run"),
        read_record(Run, {"status": "finished", "arms": {name: {"score": "inner"} for name in names}}),
        evaluation=read_record(Evaluation, {"paired_fve": rows, "probing": probing}),
        evaluated=True,
    )


def lines(found):
    return dict(answer(found).lines)


def test_one_interval_is_taken_as_it_is():
    found = record({"a": (0.02, 0.001, 0.04)})
    assert lines(found)["Reconstruction"] == "a is best (FVE +0.020 [+0.001, +0.040] against base)."
    assert lines(found)["Concepts"] == "not measured."
    assert "By 1 paired interval against base" in answer(found).how
    assert "Bonferroni" not in answer(found).how


def test_among_several_an_interval_that_barely_excludes_0_says_nothing():
    barely = (0.02, 0.001, 0.039)
    found = record(dict.fromkeys("abcd", barely))
    assert lines(found)["Reconstruction"] == "no arm is told apart from another."
    assert lines(found)["Not told apart"] == "in reconstruction, all 5 arms."
    assert "98.75 %" in answer(found).how
    assert "Bonferroni" in answer(found).how
    assert [claim.verdict for claim in claims(found)] == ["not told apart"] * 8


def test_intervals_are_widened_by_their_number_and_not_by_sinks_in():
    found = record({"a": (0.5, 0.4, 0.7), "b": (-0.5, -0.6, -0.4)}, auroc={"a": (0.0, -0.1, 0.1)})
    assert sum(claim.counted for claim in claims(found)) == 3  # of 6: no sinks in, no lexical concepts
    grown = NormalDist().inv_cdf(1 - 0.025 / 3) / NormalDist().inv_cdf(0.975)
    assert claims(found)[0].wider == pytest.approx((0.5 - 0.1 * grown, 0.5 + 0.2 * grown))
    assert "By 3 paired intervals" in answer(found).how
    worse = {"a": (-0.9, -0.95, -0.85), "b": (0.9, 0.85, 0.95)}
    assert answer(record({"a": (0.5, 0.4, 0.7)}, sinks_in=worse)) == answer(record({"a": (0.5, 0.4, 0.7)}))


def test_who_is_best_who_is_level_and_who_is_not_told_from_the_baseline():
    found = record(
        {"a": (0.10, 0.09, 0.11), "b": (0.11, 0.10, 0.12), "c": (0.0, -0.01, 0.01), "d": (-0.1, -0.11, -0.09)},
        auroc={"a": (-0.1, -0.11, -0.09), "b": (0.2, 0.19, 0.21), "c": (0.0, -0.01, 0.01)},
    )
    assert lines(found)["Reconstruction"] == "the best is a or b."
    assert lines(found)["Concepts"].startswith("b is best (AUROC, contextual, by AUROC +0.20 [")
    said = "in reconstruction, a and b; in reconstruction, c from base; in concepts, c from base."
    assert lines(found)["Not told apart"] == said


def test_one_measure_decides_where_the_other_is_silent_and_both_are_named_where_they_disagree():
    silent, higher, lower = (0.0, -0.5, 0.5), (0.1, 0.08, 0.12), (-0.1, -0.12, -0.08)
    found = record({"a": silent}, median={"a": higher})
    assert lines(found)["Reconstruction"].startswith("a is best (median token FVE +0.100")
    found = record({"a": lower}, median={"a": higher})
    assert lines(found)["Reconstruction"] == "the measures disagree: base by FVE; a by median token FVE."
    assert lines(record({"a": lower}, median={"a": lower}))["Reconstruction"] == "base is best."


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (record({}, arms=["base"]), "has one arm"),
        (record({}, arms=["base", "a"]), "no paired differences"),
        (record({"a": (None, None, None)}), "no paired differences"),
        (record({"gone": (0.1, 0.05, 0.2)}, arms=["base", "a"]), "no paired differences"),
    ],
)
def test_where_there_is_nothing_to_compare(found, said):
    ((name, words),) = answer(found).lines
    assert name == "Nothing to compare"
    assert said in words
