"""(k) One exponent for what fires and what it is worth, or one for each? And what does the unit frame gain from?"""

from __future__ import annotations

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
DECIDES = "learned with the window: two from (0, 1) less one from 0"
PARTS = {
    "all of it": ("standard_unit_frame", "standard"),
    "unit rows, learned b": ("two_1_0", "standard"),
    FIRING: ("two_0_1", "two_1_0"),
    VALUE: ("two_0_1", "two_0_0"),
    WEIGHTS: ("two_0_1_over_r2", "two_0_1"),
    "nothing else: the frame itself less (0, 1)": ("standard_unit_frame", "two_0_1"),
    "learned: two from (0, 1) less one from 0": ("two_from_0_1", "one_from_0"),
    "learned: two from (0, 0) less one from 0": ("two_from_0_0", "one_from_0"),
    DECIDES: (WINDOWED, "one_window_from_0"),
    "the window: one from 0 with it less without": ("one_window_from_0", "one_from_0"),
}
LEARNED = (
    *("one_from_0", "one_from_1", "one_window_from_0", "one_window_from_1"),
    *("two_from_0_1", "two_from_0_0", WINDOWED, "two_window_from_0_0"),
)
TOKENS = 16_384
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


def result() -> Result:
    """Parts of the unit frame's gain, where exponents end, and the reconstruction at pairs held fixed."""
    gaps = {
        f"{name}/{part}": {key: gap(name, arms, key) for key in ("fve", "median_token_fve", *_mcc(name))}
        for name in MAIN
        for part, arms in PARTS.items()
        if all(_has(name, arm) for arm in arms)
    }
    at_end = {f"{name}/{arm}": ends(name, arm) for name in MAIN for arm in LEARNED if _has(name, arm)}
    pulls = {f"{name}/{arm}": slopes(name, arm) for name in WORLDS for arm in LEARNED}
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
        [MAIN[name], part, one["fve"], one["median_token_fve"], one.get("mcc", "–")]
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
    two = "; ".join(
        f"{label} {gaps[f'{name}/{DECIDES}']['fve']}" for name, label in MAIN.items() if _has(name, WINDOWED)
    )
    parts = {"firing": FIRING, "value": VALUE, "weights 1/r²": WEIGHTS}
    why = ", ".join(f"{word} {gaps[f'two_exponents/{part}']['fve']}" for word, part in parts.items())
    return f"FVE, two exponents less one, both with the window: {two}; what the unit frame's FVE owes to (σ 0.5): {why}"


def _text(gaps: Gaps, at_end: dict[str, Pairs], pulls: dict[str, Pairs]) -> list[str]:
    return []


if __name__ == "__main__":
    results.train(*SETS)
    write(CLAIM, result())
