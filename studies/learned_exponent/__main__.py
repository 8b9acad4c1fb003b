"""(b) Does a learned exponent stay under one half, and what does the loss want?"""

from __future__ import annotations

from studies import results
from studies.page import Claim, Result, curves, write
from studies.runsets import FIXED_EXPONENTS

CLAIM = Claim(
    "learned_exponent",
    "b",
    "A learned exponent a stays under one half",
    "a = .26 global, .08 on average per feature; 'no feature chooses more than half' (paper §7)",
    "every run starts at 0 with a learning rate that cannot carry a further; starts at 1 were never tried (§9 C21)",
)
SETS = ("natural", "injected", "world_log_normal", "world_log_normal_1", "world_none")
ARMS = ("cosine", "cosine_fast", "cosine_from_1", "cosine_fast_from_1", "cosine_per_feature")
FIXED = {"world_fixed_a": "world, σ 0.5", "world_fixed_a_1": "world, σ 1", "natural_fixed_a": "natural"}


def result() -> Result:
    """Where a ends from 0 and from 1, and the reconstruction at each fixed a."""
    ends, rows = {}, []
    for name in SETS:
        for arm in ARMS:
            if arm not in results.evaluation(name, results.seeds(name)[0])["exponents"]:
                continue
            values = results.exponents(name, arm)
            ends[f"{name}/{arm}"] = values
            mean = sum(values) / len(values)
            rows.append([name, arm, mean, ", ".join(f"{v:.2f}" for v in values), _score(name, arm)])
    series, best = [], {}
    for name, label in FIXED.items():
        fve = [results.mean(results.recon(name, f"a_{a:g}")) for a in FIXED_EXPONENTS]
        best[name] = FIXED_EXPONENTS[fve.index(max(fve))]
        series.append((label, FIXED_EXPONENTS, fve))
    above = {key: values for key, values in ends.items() if min(values) > 0.5}
    # a value that its start decides, or of norms that do not vary, is no finding: both starts must end above one half
    starts = ("cosine_fast", "cosine_fast_from_1")
    settled = [name for name in SETS if name != "world_none" and all(f"{name}/{arm}" in above for arm in starts)]
    from_zero = [v for key, values in ends.items() if key.endswith("/cosine_fast") for v in values]
    verdict = "not supported" if settled else "supported"
    figures = (
        f"from 1 with its own rate a ends at {results.mean(ends['natural/cosine_fast_from_1']):.2f} on natural activations and "
        f"{results.mean(ends['world_log_normal/cosine_fast_from_1']):.2f} in a world of σ 0.5; from 0 at "
        f"{results.mean(ends['natural/cosine_fast']):.2f} and {results.mean(ends['world_log_normal/cosine_fast']):.2f}; the least error "
        f"lies at a fixed a of {best['world_fixed_a']:g} (σ 0.5), {best['world_fixed_a_1']:g} (σ 1), "
        f"{best['natural_fixed_a']:g} (natural)"
    )
    text = [
        "On natural activations a ends near where it starts: norms vary so little that the loss is flat in a, and the start "
        "decides. Where norms vary for no reason (worlds), starts at 0 and at 1 with ten times the learning rate move "
        "towards one another, and what they move towards is what the curve of fixed exponents prefers.",
        "Why neither 0 nor 1: a code has two tasks. Its value must grow in proportion to the length r of what it rebuilds, "
        "which asks for a = 1; whether it fires should depend on direction alone, which asks for a = 0. One exponent serves "
        "both. With the dictionary held at the truth the least error lies near a = .5 for every spread of the norms: "
        "[REASON.md](REASON.md).",
        f"Arms that ended above one half for every seed: {', '.join(above) or 'none'}. From 0, fast: "
        f"{min(from_zero):.2f} to {max(from_zero):.2f}.",
        "Not supported means: somewhere norms vary and both fast starts, from 0 and from 1, end above one half for every seed: "
        f"{', '.join(settled) or 'nowhere'}. On natural activations the start decides; where norms do not vary a has no effect.",
    ]
    head = ["runs", "arm", "a at the end", "by seed", "FVE"]
    fixed = ["fixed a", *(label for label in FIXED.values())]
    grid = [[f"{a:g}", *(values[at] for _, _, values in series)] for at, a in enumerate(FIXED_EXPONENTS)]
    tables = [
        ("Where a ends; `fast`: a and b at ten times the learning rate.", head, rows),
        ("FVE with a held fixed.", fixed, grid),
    ]
    numbers = {"ends": ends, "fixed": {name: values for name, _, values in series}, "best_fixed": best}
    return Result(
        verdict, figures, tables, text, numbers, curves(series, "exponent a, held fixed", "FVE"), (*SETS, *FIXED)
    )


def _score(name: str, arm: str) -> float:
    return results.mean(results.recon(name, arm))


if __name__ == "__main__":
    results.train(*SETS, *FIXED)
    write(CLAIM, result())
