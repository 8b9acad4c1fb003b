"""The real model's word on the paper's claims, for docs/CLAIMS.md: one cell a claim, and the paragraph above them."""

from __future__ import annotations

import json
from typing import Any

from studies.real_model.design import FOLDER
from studies.real_model.judge import shown
from studies.real_model.measured import READ_TIME
from studies.real_model.numbers import PAPER

ORDINARY = 3.0
"""Times the median norm below which position 0 is called no sink."""
UNTRIED = "not tried there"


def numbers() -> dict[str, Any]:
    """numbers.json; empty where the study was not run."""
    path = FOLDER / "numbers.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}, "dose": []}


def paragraph(found: dict[str, Any]) -> str:
    """What a reader can quote."""
    rows = {row["block"]: row for row in found["dose"]}
    if 14 not in rows:
        return ""
    at, sets, seeds = rows[14], found["runs"]["real_14"]["sets"], len(found["runs"]["real_14"]["seeds"])
    ordinary = [f"{shown(row['paper'])} at block {b}" for b, row in rows.items() if row["strength"] < ORDINARY]
    calm = " and ".join(ordinary) or "not run"
    weak = (
        f"; with a weak one ({rows[28]['strength']:.0f} ×) {shown(rows[28]['paper'])} at block 28" if 28 in rows else ""
    )
    if 11 in rows:
        made = f"one block later, which makes the sink ({rows[11]['strength']:.0f} ×)"
        weak = f", and {made}, {shown(rows[11]['paper'])}{weak}"
    read = found["runs"]["real_14"]["arms"][READ_TIME]["readings"]["/".join(PAPER)]["gain"]
    most = at["paper"][1] > 0 and at["masked"][0] <= at["paper"][0] / 2
    headline = "the gain is mostly one token a text" if most else "the gain is not one token a text alone"
    return (
        f"**On a pretrained model {headline}.** SmolLM2-135M, output of block 14, where position 0 has "
        f"{at['strength']:.0f} times the median norm: by the paper's protocol cosine − standard is "
        f"{shown(at['paper'])} points of top-1 probing accuracy; with position 0 left out of the pooling "
        f"{shown(at['masked'])}; with latents chosen by AUROC as well {shown(at['masked_auroc'])}. Where the model has "
        f"no sink, by the same protocol: {calm}{weak}. The same standard SAEs gain {shown(read)} when their codes are "
        f"read with the norm divided out, without any training. Means over {sets} labelled sets and {seeds} seeds, "
        "95 % intervals over both; predictions written down before, controls and what failed: "
        "[studies/real_model](../studies/real_model/RESULT.md). One model of 135 million parameters is not Qwen3-8B."
    )


def cells(found: dict[str, Any]) -> dict[str, str]:
    """Letter of the claim → its cell."""
    run = found["runs"].get("real_14")
    if run is None:
        return {}
    arms = run["arms"]
    cosine, standard, unit = arms["cosine"], arms["standard"], arms["standard_unit_frame"]
    fve = [
        f"{name} {_gap(arm['fve/sinks_out/difference'])}" for name, arm in (("cosine", cosine), ("unit frame", unit))
    ]
    ends = {name: arms[name]["exponent"] for name in ("cosine", "cosine_fast", "cosine_fast_from_1")}
    told = "; ".join(f"{name} {', '.join(f'{v:.2f}' for v in values)}" for name, values in ends.items())
    at = {row["block"]: row for row in found["dose"]}[14]
    read = arms["standard, read by cosine"]["readings"]
    swapped = [shown(read[way]["gain"]) for way in ("in/mean_difference/top_1", "out/auroc/top_1")]
    wide, reweighted = (found["runs"].get(f"real_14_{name}") for name in ("wide", "reweighted"))
    return {
        "a": f"FVE − standard, sinks out: {'; '.join(fve)}",
        "b": f"a at the end, three seeds: {told}",
        "c": f"{shown(at['paper'])} points by the paper's protocol, {shown(at['masked'])} with position 0 left out, "
        f"{shown(at['masked_auroc'])} by AUROC as well",
        "d": f"firings that the norm decides, sinks out: standard {standard['norm_driven/sinks_out']:.3f}, cosine "
        f"{cosine['norm_driven/sinks_out']:.3f}; latents on at position 0: {standard['at_position_0']:.0f} and "
        f"{cosine['at_position_0']:.0f} of 2304",
        "f": f"standard weights read by cosine, refitted: {swapped[0]} points by the paper's protocol, {swapped[1]} "
        "with position 0 left out and by AUROC",
        "e": UNTRIED if reweighted is None else _reweighted(reweighted),
        "h": UNTRIED if wide is None else _wide(wide),
        "k": _two_exponents(arms),
    }


def _reweighted(run: dict[str, Any]) -> str:
    arms = {"1/r": "standard_over_r", "1/r²": "standard_over_r2", "cosine": "cosine"}
    by = {words: run["arms"][arm]["readings"]["/".join(PAPER)]["gain"] for words, arm in arms.items()}
    return "by the paper's protocol, points over standard: " + ", ".join(f"{w} {shown(g)}" for w, g in by.items())


def _two_exponents(arms: dict[str, Any]) -> str:
    two, one = (arms[name]["fve/sinks_out/difference"] for name in ("two_unit", "cosine"))
    gain = arms["two_unit"]["readings"]["/".join(PAPER)]["gain"]
    return (
        f"FVE − standard: (a, δ) = (0, 1) {_gap(two)}, cosine {_gap(one)}; by the paper's protocol of probing "
        f"{shown(gain)} points: its codes have the norm again"
    )


def _wide(run: dict[str, Any]) -> str:
    read = run["arms"]["cosine"]["readings"]
    by = [shown(read[way]["gain"]) for way in ("in/mean_difference/top_1", "out/auroc/top_1")]
    return f"9216 features: {by[0]} points by the paper's protocol, {by[1]} with position 0 left out and by AUROC"


def _gap(interval: list[float]) -> str:
    return f"{interval[0]:+.4f} [{interval[1]:+.4f}, {interval[2]:+.4f}]"
