"""The predictions of PREDICTIONS.md against the numbers: held, refuted, neither, or not run.

"Refuted" is the condition that the file states; "held" is the prediction itself; between them lies "neither".
"""

from __future__ import annotations

from typing import Any

from scipy import stats

from studies.real_model.numbers import PAPER, Interval, Numbers

STRONG, SINKS, NONE = (12, 14), (12, 14, 18, 24, 28), (10, 11)
Verdict = tuple[str, str]


def judge(numbers: Numbers) -> dict[str, list[str]]:
    """Prediction → [verdict, our figures]."""
    dose = {row["block"]: row for row in numbers["dose"]}
    runs = numbers["runs"]
    rules = {
        "P1": lambda: _p1(dose),
        "P2": lambda: _p2(dose),
        "P3": lambda: _p3(dose),
        "P4": lambda: _p4(runs, dose),
        "P5": lambda: _control(runs, "random", lambda left: left >= 0.8, lambda left: left < 0.8),
        "P6": lambda: _control(runs, "clipped", lambda left: left <= 1 / 3, lambda left: left > 0.5),
        "P7": lambda: _p7(runs),
        "P8": lambda: _p8(dose),
        "P9": lambda: _p9(runs),
        "P10": lambda: _p10(numbers["dose"]),
        "P11": lambda: _p11(runs),
        "P12": lambda: _p12(runs),
    }
    found = {}
    for name, rule in rules.items():
        try:
            found[name] = list(rule())
        except KeyError as missing:
            found[name] = ["not run", f"{missing.args[0]} is not there yet"]
    return found


def shown(gain: Interval) -> str:
    """A gain and its interval, in points."""
    middle, low, high = gain
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def gain_of(runs: Numbers, name: str, at: tuple[str, str], arm: str = "cosine") -> Any:
    """An arm's gain in one set of runs. Raises KeyError where it was not run."""
    if name not in runs:
        raise KeyError(name)
    return runs[name]["arms"][arm]["readings"]["/".join(at)]["gain"]


def _p1(dose: dict[int, Numbers]) -> Verdict:
    gains = {b: dose[b]["paper"] for b in SINKS if b in dose}
    text = "; ".join(f"block {b} ({dose[b]['strength']:.0f} ×) {shown(g)}" for b, g in gains.items())
    if any(g[1] < (5 if b in STRONG else 0) for b, g in gains.items()):
        return "refuted", text
    if set(SINKS) - set(gains):
        raise KeyError(f"block {min(set(SINKS) - set(gains))}")
    return ("held" if min(gains[b][0] for b in STRONG) >= 8 and gains[28][0] >= 4 else "neither"), text


def _p2(dose: dict[int, Numbers]) -> Verdict:
    left = {b: dose[b]["masked"][0] / dose[b]["paper"][0] for b in STRONG}
    text = "; ".join(f"block {b} {shown(dose[b]['masked'])}, {left[b]:.0%} left" for b in STRONG)
    return _by(max(left.values()) <= 1 / 3, max(left.values()) > 0.5), text


def _p3(dose: dict[int, Numbers]) -> Verdict:
    gains = {b: dose[b]["masked_auroc"] for b in STRONG}
    text = "; ".join(f"block {b} {shown(g)}" for b, g in gains.items())
    return _by(all(abs(g[0]) <= 1.5 for g in gains.values()), any(g[1] > 1.5 for g in gains.values())), text


def _p4(runs: Numbers, dose: dict[int, Numbers]) -> Verdict:
    ways = [(p, f"{r}/top_1") for p in ("in", "out") for r in ("auroc", "mean_difference", "standardised_difference")]
    gains = {(b, *at): gain_of(runs, f"real_{b}", at) for b in NONE for at in ways}
    worst = max(gains, key=lambda key: abs(gains[key][0]))
    text = "; ".join(f"block {b} (sink {dose[b]['strength']:.0f} ×) {shown(gains[b, *PAPER])}" for b in NONE)
    text += f"; furthest from 0: {shown(gains[worst])} (block {worst[0]}, pooled {worst[1]}, {worst[2]})"
    return _by(all(abs(g[0]) <= 2 for g in gains.values()), any(g[1] > 2 for g in gains.values())), text


def _control(runs: Numbers, pooling: str, held: Any, refuted: Any) -> Verdict:
    control, whole = gain_of(runs, "real_14", (pooling, PAPER[1])), gain_of(runs, "real_14", PAPER)
    left = control[0] / whole[0]
    return _by(held(left), refuted(left)), f"block 14 {shown(control)}, {left:.0%} of {whole[0]:+.1f} left"


def _p7(runs: Numbers) -> Verdict:
    gain = gain_of(runs, "real_10", ("planted", PAPER[1]))
    return _by(gain[0] >= 5, gain[1] < 2), f"block 10, sink planted {shown(gain)}"


def _p8(dose: dict[int, Numbers]) -> Verdict:
    gains = {b: row["last"] for b, row in dose.items()}
    if set(SINKS) - set(gains):
        raise KeyError(f"block {min(set(SINKS) - set(gains))}")
    text = "; ".join(f"block {b} {shown(g)}" for b, g in gains.items())
    return _by(all(abs(g[0]) <= 2 for g in gains.values()), any(gains[b][1] > 2 for b in SINKS)), text


def _p9(runs: Numbers) -> Verdict:
    gain, whole = gain_of(runs, "real_14_unfiltered", PAPER), gain_of(runs, "real_14", PAPER)
    left = gain[0] / whole[0]
    return _by(left <= 0.5, left > 0.75), f"block 14, filter none {shown(gain)}, {left:.0%} of {whole[0]:+.1f}"


def _p10(dose: list[Numbers]) -> Verdict:
    if len(dose) < 7:
        raise KeyError("a block")
    rho = float(stats.spearmanr([row["dose"] for row in dose], [row["paper"][0] for row in dose]).statistic)
    return _by(rho >= 0.7, rho < 0.5), f"ρ = {rho:.2f} over seven blocks"


def _p11(runs: Numbers) -> Verdict:
    if "real_14" not in runs:
        raise KeyError("real_14")
    read = runs["real_14"]["arms"]["standard_unit_frame"]["readings"]
    raw, scaled = (read[f"in/{way}mean_difference/top_1"]["accuracy"] for way in ("raw/", ""))
    text = f"unit frame, block 14: {raw:.3f} as they are, {scaled:.3f} standardised"
    return _by(abs(raw - 0.5) <= 0.03 and scaled >= 0.7, raw > 0.6), text


def _p12(runs: Numbers) -> Verdict:
    splice = runs["real_14"]["splice"] if "real_14" in runs else None
    if splice is None:
        raise KeyError("the splice of real_14")
    off, on = splice["off_sinks/sinks_out"], splice["everywhere/sinks_in"]
    far = max(abs(one["difference"][0]) for one in off.values() if one["difference"])
    share = max(on[arm]["recovered"] / off[arm]["recovered"] for arm in off)
    text = "; ".join(f"{arm} {off[arm]['recovered']:.3f}, sinks too {on[arm]['recovered']:.3f}" for arm in off)
    return _by(far <= 0.02 and share < 0.5, far > 0.05 or share >= 1), f"block 14: {text}"


def _by(held: bool, refuted: bool) -> str:
    return "refuted" if refuted else "held" if held else "neither"
