"""What the study's files say, put together: plain numbers, from which the page is written and predictions are judged.

A gain is an arm's mean accuracy over the labelled sets minus the standard arm's, in points, arms of one run paired; its
95 % interval draws sets and seeds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from cosae.evaluate.statistics import crossed_draws, crossed_interval
from cosae.run.folder import read_json
from studies.real_model import saebench, second_sink
from studies.real_model.design import BLOCKS
from studies.real_model.measured import block_of
from studies.real_model.probing import by_set
from studies.runsets import SEEDS, finished, folder_of

RESAMPLES = 4000
STANDARD = "standard"
PAPER = ("in", "mean_difference/top_1")
"""The paper's protocol: every token pooled, latents by the raw mean difference."""
MASKED = ("out", "mean_difference/top_1")
MASKED_AUROC = ("out", "auroc/top_1")

Interval = list[float]
Numbers = dict[str, Any]


def seeds_of(name: str, kind: str = "texts") -> list[int]:
    """Seeds of a set of runs that are trained and measured."""
    return [s for s in SEEDS if finished(folder_of(name, s)) and (folder_of(name, s) / f"{kind}.json").exists()]


def collect(names: tuple[str, ...]) -> Numbers:
    """Everything, by set of runs."""
    found = {name: _of_runs(name) for name in names if seeds_of(name)}
    return {
        "runs": found,
        "dose": _dose(found),
        "saebench": saebench.numbers(_interval),
        "second_sink": second_sink.numbers(_interval),
        "predictions": {},
    }


def _of_runs(name: str) -> Numbers:
    seeds = seeds_of(name)
    texts = [read_json(folder_of(name, seed) / "texts.json") for seed in seeds]
    tokens = [read_json(folder_of(name, seed) / "tokens.json") for seed in seeds_of(name, "tokens")]
    evaluations = [read_json(folder_of(name, seed) / "evaluation.json") for seed in seeds]
    readings = {(pooling, reading) for pooling, by in _first(texts[0]).items() for reading in by}
    arms = {}
    for arm in dict.fromkeys([*texts[0], *evaluations[0]["reconstruction"]]):
        own = {}
        for pooling, reading in sorted(readings) if arm in texts[0] else ():
            value_DS = _table(texts, arm, pooling, reading)
            if value_DS is not None:
                standard_DS = _table(texts, STANDARD, pooling, reading)
                gain = None if arm == STANDARD or standard_DS is None else _interval(100 * (value_DS - standard_DS))
                own[f"{pooling}/{reading}"] = {"accuracy": round(float(value_DS.mean()), 4), "gain": gain}
        fired = [{k: _mean([one["fired"].get(k) for one in t.get(arm, {}).values()]) for k in FIRED} for t in texts]
        arms[arm] = {
            "readings": own,
            **{key: _mean([one[key] for one in fired]) for key in FIRED},
            **_of_tokens(arm, tokens, evaluations),
        }
    by_set = {}
    for pooling, reading in (PAPER, MASKED, MASKED_AUROC) if name == "real_14" else ():
        gain_DS = _table(texts, "cosine", pooling, reading) - _table(texts, STANDARD, pooling, reading)
        by_set[f"{pooling}/{reading}"] = (100 * gain_DS).round(1).tolist()
    return {
        "block": block_of(name),
        "seeds": seeds,
        "sets": len(texts[0][STANDARD]),
        "strength": _strength(tokens),
        "arms": arms,
        "splice": _splice(name),
        "gains_by_set": by_set,
        "sharing": _sharing(name),
        "discovery": _discovery(name),
    }


FIRED = ("at_position_0", "elsewhere")


def _first(found: Numbers) -> Numbers:
    """Poolings and readings: those of a set that has all of them."""
    values: Numbers = {}
    for one in found[STANDARD].values():
        for pooling, by in one["values"].items():
            values.setdefault(pooling, {}).update(by)
    return values


def _table(texts: list[Numbers], arm: str, pooling: str, reading: str) -> Any:
    """(sets, seeds) accuracies; None where the arm was not read so. `full` is of some sets alone."""
    try:
        own = [{n: o for n, o in t[arm].items() if reading in o["values"].get(pooling, {})} for t in texts]
        return np.array([by_set(one, pooling, reading, "accuracy") for one in own]).T if own[0] else None
    except KeyError:
        return None


def _interval(gain_DS: Any) -> Interval:
    n_sets, n_seeds = gain_DS.shape
    low, high = crossed_interval(gain_DS, crossed_draws(n_sets, n_seeds, 0, RESAMPLES))
    assert low is not None
    assert high is not None
    return [round(float(v), 2) for v in (gain_DS.mean(), low, high)]


def _of_tokens(arm: str, tokens: list[Numbers], evaluations: list[Numbers]) -> Numbers:
    """What the run's own evaluation and the held-out tokens say; means over seeds, and differences from standard."""
    if arm not in evaluations[0]["reconstruction"]:
        return {}
    found: Numbers = {}
    for sinks in ("sinks_out", "sinks_in"):
        for key in ("fve", "median_token_fve", "l0", "dead_frac"):
            own, base = ([e["reconstruction"][a][sinks].get(key) for e in evaluations] for a in (arm, STANDARD))
            if None not in own:
                found[f"{key}/{sinks}"] = _rounded(np.mean(own), 4)
                found[f"{key}/{sinks}/difference"] = _over_seeds(own, base) if arm != STANDARD else None
    found["exponent"] = [round(e["exponents"][arm]["mean"], 3) for e in evaluations]
    if tokens:
        for sinks in ("sinks_out", "sinks_in"):
            found[f"norm_driven/{sinks}"] = _mean([t[arm]["norm_driven"][sinks] for t in tokens])
            quartile = [(t[arm]["firing_norms"][sinks] or {}).get("quartile_share", [None] * 4)[3] for t in tokens]
            found[f"top_quartile/{sinks}"] = _mean(quartile)
        for key in ("l0_on", "sink_features", "firing_frac", "error_frac", "fve_on", "norm_ratio_on"):
            found[f"sinks/{key}"] = _mean([t[arm]["sinks"][key] for t in tokens])
    return found


def _strength(tokens: list[Numbers]) -> float | None:
    """Median norm of position 0 over the median of all tokens."""
    values = [t[STANDARD]["sinks"]["norm_over_median"] for t in tokens]
    return _mean([v[0] if isinstance(v, list) else v for v in values]) if values else None


def _splice(name: str) -> Numbers | None:
    """place/over → arm → recovered loss and KL, means over seeds, and the difference from standard."""
    runs = [read_json(folder_of(name, seed) / "splice.json") for seed in seeds_of(name, "splice")]
    if not runs:
        return None
    found: Numbers = {"seeds": len(runs), "tokens": runs[0]["tokens"]}
    for place, over in (("off_sinks", "sinks_out"), ("everywhere", "sinks_out"), ("everywhere", "sinks_in")):
        row = {}
        for arm in runs[0]["saes"]:
            own, base = ([r["saes"][a][place][over] for r in runs] for a in (arm, STANDARD))
            recovered, baseline = ([one["recovered_mean"] for one in side] for side in (own, base))
            row[arm] = {
                "recovered": _mean(recovered),
                "difference": _over_seeds(recovered, baseline) if arm != STANDARD else None,
                "kl": _mean([one["kl"] for one in own]),
            }
        found[f"{place}/{over}"] = row
    return found


def _discovery(name: str) -> Numbers:
    """Pair → way → gaps in AUROC of the second SAE over the first, in points, over questions and seeds; the share of
    the gap that shared features have too (separability), None where the gap may be 0."""
    runs = [read_json(folder_of(name, seed) / "discovery.json") for seed in seeds_of(name, "discovery")]
    found: Numbers = {}
    for pair, ways in runs[0].items() if runs else ():
        for way in ways:
            of = {key: np.array([r[pair][way][key] for r in runs]).T for key in ("full_a", "full_b", *_MATCHED)}
            full_CS, matched_CS = of["full_b"] - of["full_a"], of["matched_b"] - of["matched_a"]
            full = _interval(100 * full_CS)
            found.setdefault(pair, {})[way] = {
                "questions": len(full_CS),
                "shared_features": [r[pair][way]["matched"] for r in runs],
                "full": full,
                "shared": _interval(100 * matched_CS),
                "random": _mean([100 * r[pair][way]["gap_random"]["mean"] for r in runs]),
                "separability": None if full[1] <= 0 <= full[2] else _rounded(matched_CS.mean() / full_CS.mean(), 3),
            }
    return found


_MATCHED = ("matched_a", "matched_b")


def _sharing(name: str) -> Numbers:
    """Pair of SAEs → share of the first one's live features that the second has too, by the paper's rule; by seed."""
    runs = [read_json(folder_of(name, seed) / "sharing.json") for seed in seeds_of(name, "sharing")]
    return {pair: [round(run[pair]["shared_frac"], 3) for run in runs] for pair in (runs[0] if runs else {})}


def _over_seeds(own: list[float], base: list[float]) -> Interval:
    """Mean paired difference and its t-interval over seeds."""
    gap_S = np.subtract(own, base)
    half = stats.t.ppf(0.975, len(gap_S) - 1) * gap_S.std(ddof=1) / len(gap_S) ** 0.5 if len(gap_S) > 1 else np.inf
    return [_rounded(v, 4) for v in (gap_S.mean(), gap_S.mean() - half, gap_S.mean() + half)]


def _mean(values: list[Any]) -> float | None:
    known = [v for v in values if v is not None]
    return _rounded(np.mean(known), 4) if known else None


def _rounded(value: Any, digits: int = 3) -> Any:
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


def _dose(found: Numbers) -> list[Numbers]:
    """A row a block, by depth: how strong the sink is, how many latents fire on it, what the cosine gains."""
    rows = []
    for block in BLOCKS:
        one = found.get(f"real_{block}")
        if one is None:
            continue
        standard, cosine = one["arms"][STANDARD], one["arms"]["cosine"]["readings"]
        ways = {"paper": PAPER, "masked": MASKED, "masked_auroc": MASKED_AUROC, "last": ("last", PAPER[1])}
        gains = {way: cosine["/".join(at)]["gain"] for way, at in ways.items()}
        gains["in_auroc"] = cosine["in/auroc/top_1"]["gain"]
        dose = one["strength"] * standard["at_position_0"]
        on = {"standard": standard["at_position_0"], "cosine": one["arms"]["cosine"]["at_position_0"]}
        rows.append({"block": block, "strength": one["strength"], "on": on, "dose": dose, **gains})
    return rows
