"""(g) Does what holds under BatchTopK hold under other selectors?"""

from __future__ import annotations

from studies import results
from studies.page import Claim, Result, intervals, write
from studies.runsets import SELECTORS

CLAIM = Claim(
    "selectors",
    "g",
    "The gain holds under every selector",
    "top-1, inner → global a: TopK .731 → .802, AbsTopK .690 → .812 (50 M tokens; paper §7)",
    "the BatchTopK row mixes two sources (§9 B7); JumpReLU never reached its L0 and Gated was not compared (§9 B9)",
)
SETS = ("selectors",)


def result() -> Result:
    """Cosine minus standard under each of the five selectors."""
    rows, drawn, gaps = [], [], {}
    for selector in SELECTORS:
        base, mine = f"standard_{selector}", f"cosine_{selector}"
        level, gap = results.alignment("selectors", mine, base)
        fve = {arm: results.recon("selectors", arm) for arm in (base, mine)}
        l0 = {arm: results.recon("selectors", arm, "l0") for arm in (base, mine)}
        recon = results.difference(fve[mine], fve[base])
        cells = [results.mean(fve[base]), results.mean(fve[mine]), results.mean(l0[base]), results.mean(l0[mine])]
        rows.append([selector, *cells, level - gap.mean, level, recon, gap])
        gaps[selector] = {"fve": recon, "auroc": gap, "l0": l0}
        drawn.append((selector, gap))
    signs = [gaps[s]["auroc"].sign for s in SELECTORS]
    verdict = "supported" if min(signs) > 0 else "opposite" if max(signs) < 0 else "not supported"
    won = [s for s in SELECTORS if gaps[s]["auroc"].sign > 0]
    lost = [s for s in SELECTORS if gaps[s]["auroc"].sign < 0]
    figures = (
        "cosine − standard, AUROC: " + "; ".join(f"{s} {gaps[s]['auroc']}" for s in SELECTORS) + ". Above 0: "
        f"{', '.join(won) or 'none'}; below: {', '.join(lost) or 'none'}"
    )
    head = [
        "selector",
        "FVE standard",
        "FVE cosine",
        "L0 standard",
        "L0 cosine",
        "AUROC standard",
        "AUROC cosine",
        "FVE gap",
        "AUROC gap",
    ]
    text = ["All ten SAEs of a seed see the same batches; jumprelu and gated reach their L0 through the controller."]
    table = ("Natural activations, held-out tokens, sinks out; means over seeds.", head, rows)
    return Result(verdict, figures, [table], text, gaps, intervals(drawn, "AUROC, cosine minus standard"), SETS)


if __name__ == "__main__":
    results.train(*SETS)
    write(CLAIM, result())
