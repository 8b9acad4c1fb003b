"""(k) One exponent for what fires and what it is worth, or one for each? And what does the unit frame gain from?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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
PARTS = {
    "all of it": ("standard_unit_frame", "standard"),
    "unit rows, learned b": ("two_1_0", "standard"),
    "firing: by cosine instead of inner product, values ∝ r": ("two_0_1", "two_1_0"),
    "value: ∝ r instead of not, firing by cosine": ("two_0_1", "two_0_0"),
    "loss: weights 1/r² besides": ("two_0_1_over_r2", "two_0_1"),
    "nothing else: the frame itself less (0, 1)": ("standard_unit_frame", "two_0_1"),
    "two exponents, learned from (0, 1), less one, learned from 0": ("two_from_0_1", "one_from_0"),
}
LEARNED = (
    *("one_from_0", "one_from_1", "one_window_from_0", "one_window_from_1"),
    *("two_from_0_1", "two_from_0_0", "two_window_from_0_1", "two_window_from_0_0"),
)
TOKENS = 16_384


def ends(name: str, arm: str) -> list[tuple[float, float]]:
    """(a, δ) at the end, by seed; δ is 0 where there is none."""
    found = [results.evaluation(name, seed)["exponents"][arm] for seed in results.seeds(name)]
    return [(one["mean"], one.get("value_exponent", 0.0)) for one in found]


def slopes(name: str, arm: str) -> list[tuple[float, float]]:
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
        f"{name}/{part}": {key: gap(name, arms, key) for key in _keys(name)}
        for name in MAIN
        for part, arms in PARTS.items()
        if all(arm in results.evaluation(name, 0)["reconstruction"] for arm in arms)
    }
    at_end = {f"{name}/{arm}": ends(name, arm) for name in MAIN for arm in LEARNED if _has(name, arm)}
    pulls = {f"{name}/{arm}": slopes(name, arm) for name in WORLDS for arm in LEARNED[:4]}
    grid = {f"{a:g}/{delta:g}": results.recon("two_exponents_grid", f"two_{a}_{delta}") for a, delta in GRID}
    both = [gaps[f"{name}/{list(PARTS)[-1]}"]["fve"] for name in WORLDS]
    verdict = "not supported" if all(one.sign > 0 for one in both) else "supported"
    numbers = {"gaps": gaps, "ends": at_end, "slopes": pulls, "grid": grid}
    return Result(
        verdict, _figures(gaps, at_end), _tables(gaps, at_end, pulls, grid), _text(at_end), numbers, _figure(gaps), SETS
    )


def _has(name: str, arm: str) -> bool:
    return arm in results.evaluation(name, 0)["exponents"]


def _keys(name: str) -> tuple[str, ...]:
    return ("fve", "median_token_fve", *(("mcc",) if name in WORLDS else ()))


def _figure(gaps: dict[str, dict[str, Estimate]]) -> Any:
    rows = [
        (f"{key.split('/', 1)[1].split(':')[0]}, {MAIN[key.split('/')[0]]}", one["fve"]) for key, one in gaps.items()
    ]
    return intervals(rows, "difference in FVE")


def _pair(values: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"({a:.2f}, {delta:.2f})" for a, delta in values)


def _tables(
    gaps: dict[str, dict[str, Estimate]],
    at_end: dict[str, list[tuple[float, float]]],
    pulls: dict[str, list[tuple[float, float]]],
    grid: dict[str, list[float]],
) -> list[tuple[str, Sequence[str], Sequence[Sequence[object]]]]:
    parts = [
        [MAIN[key.split("/")[0]], key.split("/", 1)[1], one["fve"], one["median_token_fve"], one.get("mcc", "–")]
        for key, one in gaps.items()
    ]
    where = []
    for key, values in at_end.items():
        name, arm = key.split("/")
        pull = _slope(pulls[key]) if key in pulls else ["–", "–"]
        where.append([MAIN[name], arm, _pair(values), results.mean(results.recon(name, arm)), *pull])
    deltas = sorted({delta for _, delta in GRID})
    held = [[f"a {a:g}", *(results.mean(grid[f"{a:g}/{d:g}"]) for d in deltas)] for a in sorted({a for a, _ in GRID})]
    slope = "dFVE/da by {}"
    return [
        (
            "What the unit frame gains from: differences between arms, 95 % intervals over seeds; all on the raw loss but "
            "where weights are named.",
            ["runs", "difference", "FVE", "median token FVE", "features recovered (MCC)"],
            parts,
        ),
        (
            "Where (a, δ) ends, by seed; every exponent and b at ten times the learning rate. At the end, by how much FVE "
            "would rise with a: through the values of kept entries, which is all that its gradient sees without a window, "
            "and through what fires.",
            ["runs", "arm", "(a, δ) at the end", "FVE", slope.format("value"), slope.format("firing")],
            where,
        ),
        ("FVE with both held fixed; world, σ 0.5.", ["", *(f"δ {delta:g}" for delta in deltas)], held),
    ]


def _slope(values: Sequence[tuple[float, float]]) -> list[str]:
    return [f"{results.mean([one[at] for one in values]):+.3f}" for at in (0, 1)]


def _figures(gaps: dict[str, dict[str, Estimate]], at_end: dict[str, list[tuple[float, float]]]) -> str:
    last, firing, value, loss = (list(PARTS)[at] for at in (-1, 2, 3, 4))
    two = "; ".join(f"{label} {gaps[f'{name}/{last}']['fve']}" for name, label in MAIN.items())
    why = ", ".join(
        f"{word} {gaps[f'two_exponents/{part}']['fve']}"
        for word, part in (("firing", firing), ("value", value), ("weights 1/r²", loss))
    )
    return f"FVE, two exponents less one: {two}; what the unit frame gains from (world, σ 0.5): {why}"


def _text(at_end: dict[str, list[tuple[float, float]]]) -> list[str]:
    return []


if __name__ == "__main__":
    results.train(*SETS)
    write(CLAIM, result())
