"""(i) A model with LayerNorm instead of RMSNorm: a GPT-2-style twin on the same corpus."""

from __future__ import annotations

from studies import results
from studies.page import Claim, Result, intervals, write

CLAIM = Claim(
    "layer_norm_side",
    "i",
    "Cosine scoring is for RMSNorm models; deep LayerNorm models gain less",
    "cos > inner falls from 83–100 % shallow to 40–70 % deep in Pythia and Falcon (paper §7)",
    "wins of single features within noise: with norms this even the two predictors are nearly the same (§9 B11)",
)
SETS = ("natural", "twin")
ARMS = ("standard_unit_frame", "standard_layer_norm", "cosine", "cosine_fast", "cosine_per_feature")


def result() -> Result:
    """The same arms on both models, against the standard arm of each."""
    rows, drawn, gaps = [], [], {}
    for name in SETS:
        level, _ = results.alignment(name, "standard")
        norms = [results.evaluation(name, seed)["norms"]["sinks_out"]["cv"] for seed in results.seeds(name)]
        rows.append(
            [
                name,
                "standard",
                results.mean(results.recon(name, "standard")),
                level,
                "",
                "",
                f"{results.mean(norms):.3f}",
            ]
        )
        for arm in ARMS:
            level, gap = results.alignment(name, arm)
            recon = results.difference(results.recon(name, arm), results.recon(name, "standard"))
            rows.append([name, arm, results.mean(results.recon(name, arm)), level, recon, gap, ""])
            gaps[f"{name}/{arm}"] = {"fve": recon, "auroc": gap}
            drawn.append((f"{'RMSNorm' if name == 'natural' else 'LayerNorm'}: {arm}", gap))
    rms, layer = gaps["natural/cosine"]["auroc"], gaps["twin/cosine"]["auroc"]
    if rms.sign <= 0:
        verdict = "cannot be seen at this scale"
    else:
        verdict = "supported" if layer.high < rms.mean else "not supported"
    figures = f"cosine − standard, AUROC: RMSNorm (the embedded model) {rms}, LayerNorm (its twin) {layer}"
    head = ["model", "arm", "FVE", "AUROC", "FVE − standard", "AUROC − standard", "sd / mean of norms"]
    text = [
        "The twin (`studies/layer_norm_twin`): GPT-2 style, LayerNorm, learned positions, the same tokenizer, corpus, width and "
        "depth, 1.22 bits per byte. `natural` is the embedded model (Qwen3 style, RMSNorm).",
        "The claim speaks of a gain; where the RMSNorm model shows none, there is nothing that LayerNorm could take away.",
    ]
    table = ("Last block, held-out tokens, sinks out; means over seeds.", head, rows)
    return Result(verdict, figures, [table], text, gaps, intervals(drawn, "AUROC minus the standard arm's"), SETS)


if __name__ == "__main__":
    results.train(*SETS)
    write(CLAIM, result())
