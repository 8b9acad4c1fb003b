"""Transcoders of the embedded model's fourth MLP: standard and cosine, with and without a linear skip, three seeds.

python -m studies.transcoders            train what is missing, measure, write numbers.json
python -m studies.transcoders --table    the table of docs/transcoders.md from numbers.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosae.io.atomic import write_text
from cosae.recipe import Recipe
from cosae.run import provenance
from cosae.run.evaluate import evaluate
from cosae.run.execute import Logs, execute, resume
from cosae.run.folder import read_json
from cosae.run.requests import EvalRequest
from studies.runsets import CACHE, SEEDS, base, finished

NUMBERS = Path(__file__).with_name("numbers.json")
ARMS = (
    "standard",
    "standard_unit_frame",
    "standard_unit_frame,name=standard_unit_frame_input,target_frame=input",
    "cosine",
    "standard,name=standard_skip,skip=true",
    "cosine,name=cosine_skip,skip=true",
)
SPLICED_TOKENS = 4096
SITE, TARGET = "mlp_in.3", "mlp_out.3"


def recipe(seed: int) -> Recipe:
    """The studies' common recipe on a pair of sites, smaller."""
    changes: dict[str, Any] = {
        "data.site": SITE,
        "data.target": TARGET,
        "d_sae": 1024,
        "k": 32,
        "training.seed": seed,
        "training.steps": 300,
        "training.batch_tokens": 512,
        "training.buffer_tokens": 32_768,
        "filter.window_tokens": 16_384,
        "evaluation.held_out_tokens": 16_384,
        "evaluation.calibration_tokens": 16_384,
        "evaluation.probing": False,
    }
    return base("transcoders", *ARMS).changed(changes)


def measured(seed: int) -> dict[str, dict[str, float]]:
    """Numbers by arm of one seed's run, trained where it is not there."""
    out = CACHE / f"transcoders-{seed}"
    if not out.exists():
        execute(recipe(seed), out, logs=Logs(progress=False))
    elif not finished(out):
        resume(out, Logs(progress=False))
    own = read_json(out / "evaluation.json")
    spliced = evaluate("splice", [str(out)], EvalRequest(tokens=SPLICED_TOKENS))["found"]["saes"]
    return {
        name: {
            "fve": found["sinks_out"]["fve"],
            "median_token_fve": found["sinks_out"]["median_token_fve"],
            "l0": found["sinks_out"]["l0"],
            "dead": found["sinks_out"]["dead_frac"],
            "loss_increase": spliced[name]["everywhere"]["sinks_in"]["increase"],
            "recovered": spliced[name]["everywhere"]["sinks_in"]["recovered_mean"],
        }
        for name, found in own["reconstruction"].items()
    }


def spread(values: Sequence[float], digits: int) -> str:
    """Mean of the seeds, and the least and largest."""
    mean, low, high = sum(values) / len(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(numbers: Mapping[str, Any]) -> str:
    """One row an arm: mean over the seeds, least and largest behind it."""
    columns = {
        "FVE": ("fve", 3),
        "median token's": ("median_token_fve", 3),
        "L0": ("l0", 1),
        "loss increase, nats": ("loss_increase", 4),
        "loss recovered": ("recovered", 3),
    }
    lines = [f"| arm | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in next(iter(numbers["seeds"].values())):
        of = [one[name] for one in numbers["seeds"].values()]
        cells = [spread([one[key] for one in of], digits) for key, digits in columns.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if "--table" not in sys.argv:
        found = {str(seed): measured(seed) for seed in SEEDS}
        stamp = {**provenance.stamp(), "hardware": provenance.hardware("cpu"), "recipe": "studies.transcoders"}
        write_text(NUMBERS, json.dumps({**stamp, "seeds": found}, indent=1, default=str) + "\n")
    print(table(json.loads(NUMBERS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
