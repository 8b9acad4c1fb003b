"""(f) Is the gap in how features are found, or in how they are read? One score's SAE under the other's."""

from __future__ import annotations

from studies import results
from studies.page import Claim, Result, intervals, write
from studies.runsets import SEEDS

CLAIM = Claim(
    "score_swap",
    "f",
    "The same weights read better under the cosine score",
    "standard .709 FVE / .694 top-1, read as cosine .599 / .763; cosine .707 / .766, read as inner .612 / .698 (paper §7)",
    "nothing was refitted, so L0 is 55 and 86 instead of 80; 10 M tokens of continuation on unshuffled documents (§9 B8)",
)
SETS = ("natural", "injected")
READINGS = ("own score", "swapped, nothing refitted", "swapped, refitted")


def result() -> Result:
    """Each score's SAE under the other, at inference and after more training."""
    rows, drawn, gaps = [], [], {}
    for name in SETS:
        seeds = results.seeds(name)
        for pair in ("standard → cosine", "cosine → inner"):
            found = [results.more(name, seed)["swap"][pair] for seed in seeds]
            for reading in READINGS:
                numbers = {
                    key: [one[reading][key] for one in found] for key in ("fve", "median_token_fve", "l0", "auroc")
                }
                gap = results.difference(numbers["auroc"], [one["own score"]["auroc"] for one in found])
                own = reading == "own score"
                rows.append([name, pair, reading, *(results.mean(v) for v in numbers.values()), "" if own else gap])
                gaps[f"{name}/{pair}/{reading}"] = {**numbers, "gap": gap}
                if reading == "swapped, refitted":
                    drawn.append((f"{name}: {pair}, refitted", gap))
    onward = _continued(drawn, gaps)
    gain = gaps["natural/standard → cosine/swapped, refitted"]["gap"]
    verdict = "supported" if gain.sign > 0 else "opposite" if gain.sign < 0 else "not supported"
    figures = (
        f"standard weights read by cosine at equal L0 and best size: AUROC {gain} natural, "
        f"{gaps['injected/standard → cosine/swapped, refitted']['gap']} injected; nothing refitted L0 falls to "
        f"{results.mean(gaps['natural/standard → cosine/swapped, nothing refitted']['l0']):.1f}"
    )
    text = [
        "Refitted: gains so that old and new scores agree at the median length, the threshold to the old L0, and one factor "
        "on all codes for the best reconstruction. Nothing refitted: the paper's way.",
        "Continued: 300 more steps from the same SAE, refitted first, under its own score and under the other's.",
    ]
    head = ["runs", "swap", "reading", "FVE", "median token FVE", "L0", "AUROC", "AUROC − own score"]
    tables = [("At inference; held-out tokens, sinks out; means over seeds.", head, rows), onward]
    return Result(
        verdict,
        figures,
        tables,
        text,
        gaps,
        intervals(drawn, "AUROC minus that under its own score"),
        (*SETS, "continued"),
    )


def _continued(drawn: list, gaps: dict) -> tuple[str, list[str], list[list[object]]]:
    """The table of continued training."""
    rows: list[list[object]] = []
    for start, other in (("standard", "cosine"), ("cosine", "standard")):
        own = results.recon("continued", f"{start}_as_{start}")
        for to in (start, other):
            arm = f"{start}_as_{to}"
            fve, l0 = results.recon("continued", arm), results.recon("continued", arm, "l0")
            level, gap = results.alignment("continued", arm, f"{start}_as_{start}")
            rows.append(
                [
                    f"{start} goes on as {to}",
                    results.mean(fve),
                    results.mean(l0),
                    level,
                    results.difference(fve, own),
                    gap,
                ]
            )
            gaps[f"continued/{arm}"] = {"fve": fve, "auroc": level, "gap": gap}
            if to != start:
                drawn.append((f"continued: {start} as {to}", gap))
    head = ["continued", "FVE", "L0", "AUROC", "FVE − own score", "AUROC − own score"]
    return ("After 300 more steps, natural activations.", head, rows)


if __name__ == "__main__":
    results.train(*SETS, "continued")
    assert len(results.seeds("continued")) == len(SEEDS)
    write(CLAIM, result())
