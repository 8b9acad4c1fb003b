"""(k) One exponent for what fires and what it is worth, or one for each? And what does the unit frame gain from?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from markupsafe import Markup

from cosae.activations.synthetic import SyntheticSource
from cosae.sae.file import load
from studies import results
from studies.page import Claim, Result, intervals, write
from studies.results import Estimate
from studies.runsets import GRID, folder_of, recipe_of

CLAIM = Claim(
    "two_exponents",
    "k",
    "One exponent of the norm is enough",
    "a score has one exponent a, global or one per feature (paper §1)",
    "value asks for an exponent of 1 and firing for 0 (REASON.md of claim b); a second exponent was never tried",
)
WORLDS = {"two_exponents": "world, σ 0.5", "two_exponents_1": "world, σ 1"}
MAIN = {**WORLDS, "two_exponents_natural": "natural"}
SETS = (*MAIN, "two_exponents_grid")
WINDOWED = "two_window_from_0_1"
FIRING = "firing: by cosine instead of inner product, values ∝ r"
VALUE = "value: ∝ r instead of not, firing by cosine"
WEIGHTS = "loss: weights 1/r² besides"
UNIT_ROWS = "unit rows, learned b"
NOTHING = "nothing else: the frame itself less (0, 1)"
TWO = "learned: two from (0, 1) less one from 0"
WINDOW = "the window: one from 0 with it less without"
DECIDES = "learned with the window: two from (0, 1) less one from 0"
PARTS = {
    "all of it": ("standard_unit_frame", "standard"),
    UNIT_ROWS: ("two_1_0", "standard"),
    FIRING: ("two_0_1", "two_1_0"),
    VALUE: ("two_0_1", "two_0_0"),
    WEIGHTS: ("two_0_1_over_r2", "two_0_1"),
    NOTHING: ("standard_unit_frame", "two_0_1"),
    TWO: ("two_from_0_1", "one_from_0"),
    "learned: two from (0, 0) less one from 0": ("two_from_0_0", "one_from_0"),
    DECIDES: (WINDOWED, "one_window_from_0"),
    WINDOW: ("one_window_from_0", "one_from_0"),
}
LEARNED = (
    *("one_from_0", "one_from_1", "one_window_from_0", "one_window_from_1"),
    *("two_from_0_1", "two_from_0_0", WINDOWED, "two_window_from_0_0"),
)
TOKENS = 4096
DELTAS = sorted({delta for _, delta in GRID})
Gaps = dict[str, dict[str, Estimate]]
Pairs = list[tuple[float, float]]
Table = tuple[str, Sequence[str], Sequence[Sequence[object]]]


def ends(name: str, arm: str) -> Pairs:
    """(a, δ) at the end, by seed; δ is 0 where there is none."""
    found = [results.evaluation(name, seed)["exponents"][arm] for seed in results.seeds(name)]
    return [(one["mean"], one.get("value_exponent", 0.0)) for one in found]


def slopes(name: str, arm: str) -> Pairs:
    """d FVE / d a of trained SAEs, by seed: through the values of kept entries, and through what fires besides."""
    found = []
    for seed in results.seeds(name):
        world = recipe_of(name, seed).data.world
        assert world is not None
        x_ND = SyntheticSource(world).sample(TOKENS)[0].x_ND
        sae = load(folder_of(name, seed) / "arms" / arm)
        spread = float((x_ND - x_ND.mean(0)).square().sum())
        parts = []
        for window in (0.0, 0.2):
            sae.selector.a_window = window
            (slope,) = torch.autograd.grad(sae.train_forward(x_ND).error[0].sum(), sae.score.exponent)
            parts.append(-float(slope) / spread)
        found.append((parts[0], parts[1] - parts[0]))
    return found


def gap(name: str, arms: tuple[str, str], key: str) -> Estimate:
    """A paired difference over seeds."""
    read = results.recovered if key == "mcc" else results.recon
    return results.difference(read(name, arms[0], key), read(name, arms[1], key))


def said(one: Estimate) -> str:
    """With its interval, where there is more than one seed."""
    return str(one) if math.isfinite(one.low) else f"{one.mean:+.3f} (one seed)"


def result() -> Result:
    """Parts of the unit frame's gain, where exponents end, and the reconstruction at pairs held fixed."""
    gaps = {
        f"{name}/{part}": {key: gap(name, arms, key) for key in ("fve", "median_token_fve", *_mcc(name))}
        for name in MAIN
        for part, arms in PARTS.items()
        if all(_has(name, arm) for arm in arms)
    }
    at_end = {f"{name}/{arm}": ends(name, arm) for name in MAIN for arm in LEARNED if _has(name, arm)}
    pulls = {f"two_exponents/{arm}": slopes("two_exponents", arm) for arm in LEARNED[:4]}
    grid = {f"{a:g}/{delta:g}": results.recon("two_exponents_grid", f"two_{a}_{delta}") for a, delta in GRID}
    verdict = "not supported" if all(gaps[f"{name}/{DECIDES}"]["fve"].sign > 0 for name in WORLDS) else "supported"
    tables = [_parts(gaps), _where(at_end, pulls), _held(grid)]
    numbers = {"gaps": gaps, "ends": at_end, "slopes": pulls, "grid": grid}
    return Result(verdict, _figures(gaps), tables, _text(gaps, at_end, pulls), numbers, _figure(gaps), SETS)


def _has(name: str, arm: str) -> bool:
    return arm in results.evaluation(name, 0)["exponents"]


def _mcc(name: str) -> tuple[str, ...]:
    return ("mcc",) if name in WORLDS else ()


def _figure(gaps: Gaps) -> Markup:
    rows = [(f"{part.split(',')[0]}, {MAIN[name]}", one["fve"]) for (name, part), one in _by_set(gaps)]
    return intervals(rows, "difference in FVE")


def _by_set(gaps: Gaps) -> list[tuple[tuple[str, str], dict[str, Estimate]]]:
    return [((key.split("/", 1)[0], key.split("/", 1)[1]), one) for key, one in gaps.items()]


def _parts(gaps: Gaps) -> Table:
    rows = [
        [MAIN[name], part, *(said(one[key]) if key in one else "–" for key in ("fve", "median_token_fve", "mcc"))]
        for (name, part), one in _by_set(gaps)
    ]
    caption = (
        "Differences between arms, 95 % intervals over seeds. All on the raw loss but where weights are named; MCC says how "
        "many of the true features were found."
    )
    return caption, ["runs", "difference", "FVE", "median token FVE", "MCC"], rows


def _where(at_end: dict[str, Pairs], pulls: dict[str, Pairs]) -> Table:
    rows = []
    for key, values in at_end.items():
        name, arm = key.split("/")
        pairs = ", ".join(f"({a:.2f}, {delta:.2f})" for a, delta in values)
        pull = [f"{mean:+.3f}" for mean in _means(pulls[key])] if key in pulls else ["–", "–"]
        rows.append([MAIN[name], arm, pairs, results.mean(results.recon(name, arm)), *pull])
    caption = (
        "Where (a, δ) ends, by seed; exponents and b at ten times the learning rate; `window`: with `a_window` 0.2. The last "
        "columns: by how much FVE would rise with a at the end, through the values of kept entries, which is all that a's "
        "gradient sees without the window, and through what fires."
    )
    return caption, ["runs", "arm", "(a, δ) at the end", "FVE", "dFVE/da, value", "dFVE/da, firing"], rows


def _held(grid: dict[str, list[float]]) -> Table:
    rows = [[f"a {a:g}", *(results.mean(grid[f"{a:g}/{d:g}"]) for d in DELTAS)] for a in sorted({a for a, _ in GRID})]
    return "FVE with both held fixed; world, σ 0.5, 500 steps.", ["", *(f"δ {d:g}" for d in DELTAS)], rows


def _means(values: Pairs) -> tuple[float, float]:
    return results.mean([one for one, _ in values]), results.mean([two for _, two in values])


def _figures(gaps: Gaps) -> str:
    two = "; ".join(f"{label} {gaps[f'{name}/{DECIDES}']['fve']}" for name, label in WORLDS.items())
    parts = {"firing": FIRING, "value": VALUE, "weights 1/r²": WEIGHTS}
    why = ", ".join(f"{word} {gaps[f'two_exponents/{part}']['fve']}" for word, part in parts.items())
    natural = said(gaps[f"two_exponents_natural/{TWO}"]["fve"])
    return (
        f"FVE, two exponents less one, both with the window: {two}; natural, without it: {natural}; what the unit frame's "
        f"FVE owes to (σ 0.5): {why}"
    )


def _text(gaps: Gaps, at_end: dict[str, Pairs], pulls: dict[str, Pairs]) -> list[str]:
    def of(name: str, part: str, key: str = "fve") -> str:
        return said(gaps[f"{name}/{part}"][key])

    def where(name: str, arm: str) -> str:
        return "({:.2f}, {:.2f})".format(*_means(at_end[f"{name}/{arm}"]))

    def a(name: str, arm: str) -> str:
        return f"{_means(at_end[f'{name}/{arm}'])[0]:.2f}"

    half, one, natural = MAIN
    value, firing = _means(pulls[f"{half}/one_from_0"])
    return [
        f"**Firing, value or the loss?** Where norms vary for no reason (σ 0.5) the unit frame gains {of(half, 'all of it')} of "
        f"FVE over the standard SAE: {of(half, UNIT_ROWS)} from unit rows and a gain that learns, {of(half, FIRING)} from firing "
        f"by cosine; the frame itself adds {of(half, NOTHING)} to the pair (0, 1). Where firing is by cosine already, values "
        f"that grow with r are worth {of(half, VALUE)}. Its loss is the raw one, so weights are no part of the gain; weights "
        f"1/r² would add {of(half, WEIGHTS)}. On natural activations, whose norms hardly vary, firing gives "
        f"{of(natural, FIRING)}, value {of(natural, VALUE)} and weights {of(natural, WEIGHTS)}.",
        f"At σ 1 FVE is the long tokens' affair: firing by cosine changes FVE by {of(one, FIRING)}, the median token's by "
        f"{of(one, FIRING, 'median_token_fve')} and the MCC of features by {of(one, FIRING, 'mcc')}; with weights 1/r² besides, "
        f"FVE by {of(one, WEIGHTS)} and the MCC by {of(one, WEIGHTS, 'mcc')} more (500 steps; at σ 0.5: 1000).",
        f"**Where one exponent ends, and why.** At σ 0.5 a learned exponent ends at {a(half, 'one_from_0')} from 0 and "
        f"{a(half, 'one_from_1')} from 1, above the best fixed one of about .5. There its gradient through values is "
        f"{value:+.3f}, nearly at rest, while FVE would fall by {-firing:.3f} for each unit of a through what fires, of which "
        f"batch top-k tells it nothing. With that gradient (`a_window`) it ends at {a(half, 'one_window_from_0')} and "
        f"{a(half, 'one_window_from_1')}, and FVE changes by {of(half, WINDOW)}.",
        f"**Where two end.** [REASON.md](../learned_exponent/REASON.md) predicts the ridge δ = 1 − 2a, best between (.1, .8) and "
        f"(.2, .6) at σ 0.5, between (.2, .6) and (.3, .3) at σ 1. From (0, 0) without the window: {where(half, 'two_from_0_0')} "
        f"at σ 0.5, {where(one, 'two_from_0_0')} at σ 1; with it: {where(half, 'two_window_from_0_0')}, "
        f"{where(one, 'two_window_from_0_0')}. From (0, 1) without it: {where(half, 'two_from_0_1')}, "
        f"{where(one, 'two_from_0_1')}, since the gradient of values tells the sum of a and δ alone; with it: "
        f"{where(half, WINDOWED)}, {where(one, WINDOWED)}. On natural activations: {where(natural, 'two_from_0_1')} without, "
        f"{where(natural, WINDOWED)} with it.",
        f"Two less one, on natural activations, learned without the window: {of(natural, TWO)}.",
        "Not supported means: in both worlds two exponents, learned with the window from (0, 1), have more FVE than one, learned "
        "with it from 0, the intervals off 0.",
    ]


if __name__ == "__main__":
    results.train(*SETS)
    write(CLAIM, result())
