"""(h) Does the answer depend on the number of features or of active ones?"""

from __future__ import annotations

from studies import results
from studies.page import Claim, Result, intervals, write

CLAIM = Claim(
    "width_and_k",
    "h",
    "The gain holds across k and width",
    "top-1 standard / per feature, k 10 .653 / .733, 20 .695 / .782, 40 .678 / .792, 80 .731 / .816, 160 .693 / .788 (paper §7)",
    "at low k the cosine arm has more dead features, unremarked (92.6 against 64.7 % at k 20); 'grows with width' is not monotone (§9 C24)",
)
SETS = {"k_8": "3072 features, k 8", "k_64": "3072, k 64", "width_768": "768, k 32", "width_6144": "6144, k 32"}


def result() -> Result:
    """Cosine and the unit frame minus standard at each shape that was trained."""
    rows, drawn, gaps = [], [], {}
    trained = [name for name in SETS if results.seeds(name)]
    for name in trained:
        for arm in ("standard", "standard_unit_frame", "cosine"):
            level, gap = results.alignment(name, arm)
            fve = results.recon(name, arm)
            dead = results.recon(name, arm, "dead_frac")
            recon = results.difference(fve, results.recon(name, "standard"))
            own = arm == "standard"
            rows.append(
                [
                    SETS[name],
                    arm,
                    results.mean(fve),
                    results.mean(dead),
                    level,
                    "" if own else recon,
                    "" if own else gap,
                ]
            )
            if not own:
                gaps[f"{name}/{arm}"] = {"fve": recon, "auroc": gap}
                drawn.append((f"{SETS[name]}: {arm}", gap))
    signs = [gaps[f"{name}/cosine"]["auroc"].sign for name in trained]
    verdict = "supported" if min(signs) > 0 else "opposite" if max(signs) < 0 else "not supported"
    figures = "cosine − standard, AUROC: " + "; ".join(f"{SETS[n]} {gaps[f'{n}/cosine']['auroc']}" for n in trained)
    head = ["shape", "arm", "FVE", "dead", "AUROC", "FVE − standard", "AUROC − standard"]
    table = ("Natural activations, held-out tokens, sinks out; means over seeds.", head, rows)
    text = ["Dead: never fired on the held-out tokens."]
    return Result(
        verdict, figures, [table], text, gaps, intervals(drawn, "AUROC minus the standard arm's"), tuple(trained)
    )


if __name__ == "__main__":
    results.train(*SETS)
    write(CLAIM, result())
