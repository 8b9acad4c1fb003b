"""(c) Do cosine features match human concepts better, with sinks in and out, under three selection rules?"""

from __future__ import annotations

from cosae.evaluate.probing.ranking import EVERY_RULE
from studies import results
from studies.measured import READ_TIME
from studies.page import Claim, Result, intervals, write

CLAIM = Claim(
    "concept_alignment",
    "c",
    "Cosine features match human concepts far more often",
    "SAEBench top-1 .667 standard, .808 global a, .813 per feature: +14 points (paper §7)",
    "latents are picked by raw mean difference over pooled tokens that hold the sink; the same weights gain 6.9 points "
    "from a read-time change of the score (§9 A5)",
)
SETS = ("natural", "sinks")
ARMS = ("standard_unit_frame", "cosine", "cosine_fast", "cosine_per_feature", READ_TIME)


def result() -> Result:
    """Mean AUROC of the best single latent, minus the standard arm's."""
    rows, drawn, gaps = [], [], {}
    settings = [("natural", "sinks_out"), ("sinks", "sinks_out"), ("sinks", "sinks_in")]
    for name, sinks in settings:
        for rule in EVERY_RULE:
            level, _ = results.alignment(name, "standard", "standard", rule, sinks)
            rows.append([name, sinks.replace("_", " "), rule, "standard", level, ""])
            for arm in ARMS:
                level, gap = results.alignment(name, arm, "standard", rule, sinks)
                rows.append([name, sinks.replace("_", " "), rule, arm, level, gap])
                gaps[f"{name}/{sinks}/{rule}/{arm}"] = {"auroc": level, "gap": gap}
                if rule != "standardised_difference" and arm in ("standard_unit_frame", "cosine", "cosine_per_feature"):
                    drawn.append((f"{name}, {sinks.replace('_', ' ')}, by {rule.replace('_', ' ')}: {arm}", gap))
    main = gaps["natural/sinks_out/auroc/cosine"]["gap"]
    raw = gaps["sinks/sinks_in/mean_difference/cosine"]["gap"]
    out = gaps["sinks/sinks_out/mean_difference/cosine"]["gap"]
    verdict = {1: "supported", 0: "not supported", -1: "opposite"}[main.sign]
    figures = (
        f"cosine − standard, AUROC over contextual concepts: natural {main}; with planted sinks and the paper's rule "
        f"{raw} with sinks in, {out} with sinks out; unit frame − standard, natural "
        f"{gaps['natural/sinks_out/auroc/standard_unit_frame']['gap']}"
    )
    head = ["runs", "tokens", "latent chosen by", "arm", "AUROC", "− standard"]
    text = [
        "Concepts are exact and token-level (Python's own grammar), read by one latent that is chosen on training files and "
        "scored on held-out ones; `sinks`: position 0 made 120 × as long along one direction, filtered in training as in the "
        "paper.",
        "Intervals draw seeds and concepts together. Nothing is pooled over a text here, so a sink can weigh in only through "
        "the choice of the latent; the paper's pooling gives it more.",
    ]
    table = ("One latent per concept; means over seeds and concepts.", head, rows)
    return Result(verdict, figures, [table], text, gaps, intervals(drawn, "AUROC minus the standard arm's"), SETS)


if __name__ == "__main__":
    results.train(*SETS)
    write(CLAIM, result())
