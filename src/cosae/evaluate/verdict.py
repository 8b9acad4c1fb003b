"""An audit's numbers as plain sentences, each with its evidence.

In: the mapping of `audit.audit`. Out: the verdict and lines of topic, level, sentence, evidence. A level is a rule of
thumb whose bound is a constant below, not a finding: "ok" below the bound, "look" above it, "note" where a number has
no better side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cosae.evaluate import l0
from cosae.shown import counted

NORM_DRIVEN = 0.05
"""Share of firings that depend on the length alone, above which an SAE is said to be fooled by norm."""
L0_RATIO = 1.5
"""L0 of the longest quarter of tokens over that of the shortest, above which the budget follows the norm."""
QUARTILE_GAP = 0.1
"""Difference of the median token's FVE between norm quartiles that is worth a look."""
GROWTH = 0.2
"""Growth of codes with the length (ln per ln) that is worth a look."""
DEAD = 0.1
DUPLICATES = 0.01
SHIFT = 1.25
"""Ratio of today's median norm to that of training beyond which (either way) thresholds meet other scores."""


class Line(NamedTuple):
    """One answer."""

    topic: str
    level: str
    sentence: str
    evidence: str


def verdict(numbers: Mapping[str, Any]) -> dict[str, str]:
    """The one-line answer. Of an SAE that does not reconstruct these tokens, it says so whatever the answer is."""
    found = numbers["norm_driven"]
    share, fve = found["sinks_out"]["share"], numbers["reconstruction"]["sinks_out"]["fve"]
    bound = f"of its firings come or go with the token's length alone (bound {_percent(NORM_DRIVEN)}), sinks left out"
    if found["invariant"]:
        fooled, because = "no", "its scores do not read the token's length at all"
    elif share is None:
        fooled, because = "unknown", "no feature fires on these tokens"
    elif share > NORM_DRIVEN:
        fooled, because = "yes", f"{_percent(share)} {bound}"
    else:
        fooled, because = "no", f"only {_percent(share)} {bound}"
    if worse_than_mean(numbers):
        because += f"; but it reconstructs these tokens worse than their mean would (FVE {_number(fve, 2)})"
    return {"fooled": fooled, "because": because}


def worse_than_mean(numbers: Mapping[str, Any]) -> bool:
    """Whether the mean of the tokens would be nearer to them than the reconstruction is, sinks left out."""
    fve = numbers["reconstruction"]["sinks_out"]["fve"]
    return fve is not None and fve < 0


def lines(numbers: Mapping[str, Any]) -> list[Line]:
    """The answers in the order they are read."""
    return [
        _norms_line(numbers),
        *_shift_line(numbers),
        _driven_line(numbers),
        _firing_line(numbers),
        _quartile_line(numbers),
        _l0_line(numbers),
        *_calibration_line(numbers),
        _sinks_line(numbers),
        *_sink_effect_line(numbers),
        _read_time_line(numbers),
        _dead_line(numbers),
        _duplicates_line(numbers),
    ]


def _norms_line(numbers: Mapping[str, Any]) -> Line:
    norms = numbers["norms"]
    spread = (norms["sinks_out"] or {}).get("cv")
    token = norms["log_norm_by_token"]
    known = "" if token is None else f"; the token's identity predicts {_percent(max(token['r2'], 0))} of log-norm"
    sentence = (
        "Norms hardly vary here: no score can gain or lose much by them."
        if spread is not None and spread < 0.1
        else "Norms vary from token to token: a score that follows them sees it."
    )
    evidence = f"sd / mean {_number(spread)} without sinks, largest {_number(norms['largest_over_median'])} × median"
    return Line("norms", "note", sentence, evidence + known)


def _shift_line(numbers: Mapping[str, Any]) -> list[Line]:
    ratio = numbers["shift"]["ratio"]
    if ratio is None:
        return []
    away = max(ratio, 1 / ratio) > SHIFT
    sentence = (
        "These activations are of another length than those it was trained on: thresholds meet other scores."
        if away
        else "The lengths are those it was trained on."
    )
    return [Line("norm shift", "look" if away else "ok", sentence, f"median norm {_number(ratio)} × that of training")]


def _driven_line(numbers: Mapping[str, Any]) -> Line:
    found, out = numbers["norm_driven"], numbers["norm_driven"]["sinks_out"]
    share_in = found["sinks_in"]["share"]
    if found["invariant"]:
        return Line(
            "norm-driven", "ok", "No firing depends on the token's length: its scores do not read it.", "0 % exactly"
        )
    if out["share"] is None:
        return Line("norm-driven", "look", "No feature fires on these tokens.", "L0 0")
    fooled = out["share"] > NORM_DRIVEN
    sentence = (
        "Give every token the median length and many features switch on or off."
        if fooled
        else "Give every token the median length and nearly the same features fire."
    )
    evidence = (
        f"{_percent(out['share'])} of firings change ({_percent(out['vanished_frac'])} vanish, "
        f"{_percent(out['appeared_frac'])} appear); {_percent(share_in)} with sinks in; "
        f"{out['features_mostly']:,} of {counted(out['features_counted'], 'feature')} mostly norm-driven"
    )
    return Line("norm-driven", "look" if fooled else "ok", sentence, evidence)


def _firing_line(numbers: Mapping[str, Any]) -> Line:
    out = numbers["firing_norms"]["sinks_out"]
    if not out["quartile_share"]:
        return Line("where it fires", "note", "No feature fires on these tokens.", "L0 0")
    shares = " / ".join(_percent(s, 0) for s in out["quartile_share"])
    sentence = "Share of firings by norm quartile, shortest tokens first; 25 % each if norms were dealt at random."
    evidence = f"{shares}; {out['features_above']} of {out['features_counted']} fire on longer tokens than chance"
    return Line("where it fires", "note", sentence, evidence)


def _quartile_line(numbers: Mapping[str, Any]) -> Line:
    quartiles = numbers["reconstruction"]["sinks_out"]["by_norm_quartile"]
    values = [q["median_token_fve"] for q in quartiles]
    known = [v for v in values if v is not None]
    uneven = len(known) > 1 and max(known) - min(known) > QUARTILE_GAP
    sentence = (
        "Reconstruction depends on the token's length." if uneven else "Tokens of all lengths are reconstructed alike."
    )
    return Line(
        "reconstruction",
        "look" if uneven else "ok",
        sentence,
        f"median token FVE by norm quartile {' / '.join(_number(v, 2) for v in values)}; FVE "
        f"{_number(numbers['reconstruction']['sinks_out']['fve'])} without sinks, "
        f"{_number(numbers['reconstruction']['sinks_in']['fve'])} with",
    )


def _l0_line(numbers: Mapping[str, Any]) -> Line:
    out = numbers["reconstruction"]["sinks_out"]
    values = [q["l0"] for q in out["by_norm_quartile"]]
    short, long = values[0], values[-1]
    ratio = long / short if short and long is not None else None
    uneven = ratio is not None and max(ratio, 1 / ratio if ratio else 0) > L0_RATIO
    sentence = (
        "The budget of features follows the token's length."
        if uneven
        else "Tokens of all lengths get about as many features."
    )
    evidence = f"L0 by norm quartile {' / '.join(_number(v, 1) for v in values)}, {_number(out['l0'], 1)} in all"
    return Line("L0", "look" if uneven else "ok", sentence, evidence)


def _calibration_line(numbers: Mapping[str, Any]) -> list[Line]:
    found = numbers["l0"]
    if found["calibrated"] is None:
        return []
    sentence = (
        "Its threshold was set on other text, for another L0 than it has here: cosae calibrate sets it on this one."
        if found["differs"]
        else "About as many features fire here as on the text that its threshold was set on."
    )
    return [Line("calibrated L0", "look" if found["differs"] else "ok", sentence, l0.said(found))]


def _sinks_line(numbers: Mapping[str, Any]) -> Line:
    sinks = numbers["sinks"]
    if not sinks["n_sinks"]:
        return Line(
            "sinks", "note", "No attention sinks among these tokens.", "no token at position 0, none special or long"
        )
    where = [str(p) for p, _ in sinks["positions"][:3] if p >= 0]
    names = [repr(text) for text, _, _ in sinks["spelled"][:3] if text is not None]
    place = f", at position {', '.join(where)}" if where else ""
    spelled = f", mostly {', '.join(names)}" if names else ""
    long = sinks["norm_over_median"] is not None and sinks["norm_over_median"] >= 3
    sentence = (
        "Sinks are far longer than other tokens." if long else "What is set apart as sinks is of ordinary length."
    )
    evidence = (
        f"{counted(sinks['n_sinks'], 'token')} ({_percent(sinks['sink_frac'], 2)}), "
        f"{_number(sinks['norm_over_median'], 1)} × median length{place}{spelled}"
    )
    return Line("sinks", "look" if long else "note", sentence, evidence)


def _sink_effect_line(numbers: Mapping[str, Any]) -> list[Line]:
    sinks = numbers["sinks"]
    if not sinks["n_sinks"]:
        return []
    flood = sinks["l0_off"] and sinks["l0_on"] > 3 * sinks["l0_off"]
    failed = sinks["fve_on"] is not None and sinks["fve_on"] < 0
    sentence = (
        "On sinks it switches on a flood of features."
        if flood
        else "On sinks it reconstructs worse than the mean would."
        if failed
        else "On sinks it behaves as elsewhere."
    )
    evidence = (
        f"{_number(sinks['l0_on'], 0)} features on a sink against {_number(sinks['l0_off'], 0)} elsewhere; "
        f"features that fire mostly on sinks: {sinks['sink_features']}; sinks hold {_percent(sinks['firing_frac'])} of "
        f"firings and {_percent(sinks['error_frac'])} of the squared error; FVE on them {_number(sinks['fve_on'], 2)}"
    )
    return [Line("on sinks", "look" if flood or failed else "ok", sentence, evidence)]


def _read_time_line(numbers: Mapping[str, Any]) -> Line:
    found = numbers["read_time"]
    before, after, changed = found["growth_before"], found["growth_after"], found["firings_changed"]
    grows = before is not None and after is not None and before > GROWTH
    sentence = "Codes hardly grow with the token's length: there is little to take out when reading."
    if grows and abs(after) < before:
        sentence = "Codes grow with the token's length; dividing it out when reading takes that away, no retraining."
    elif grows:
        sentence = "Codes grow with the token's length, but less than in proportion: dividing by it overshoots."
    evidence = f"ln code per ln length {_number(before, 2)}, {_number(after, 2)} after removal"
    if changed is not None:
        evidence += f"; at equal L0 removal would change {_percent(changed)} of firings"
    return Line("read-time removal", "look" if grows else "ok", sentence, evidence)


def _dead_line(numbers: Mapping[str, Any]) -> Line:
    out = numbers["reconstruction"]["sinks_out"]
    many = out["dead_frac"] > DEAD
    sentence = "Many features never fire here." if many else "Nearly every feature fires."
    evidence = (
        f"{_percent(out['dead_frac'])} dead and {_percent(out['rare_frac'])} firing on fewer than 1 in 10 000, "
        f"over {counted(out['tokens'], 'token')}"
    )
    return Line("dead features", "look" if many else "ok", sentence, evidence)


def _duplicates_line(numbers: Mapping[str, Any]) -> Line:
    found = numbers["geometry"]["decoder"]
    near = found["near_duplicates"]
    many = near["frac"] > DUPLICATES
    sentence = "Some features point the same way." if many else "Hardly any two features point the same way."
    evidence = (
        f"{counted(near['pairs'], 'pair')} with cosine ≥ {near['cosine']} ({_percent(near['frac'])} of features); "
        f"mean max cosine {_number(found['mean_max_cosine'], 2)}; "
        f"{_number(found['participation_ratio'], 0)} effective dimensions"
    )
    return Line("duplicates", "look" if many else "ok", sentence, evidence)


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
