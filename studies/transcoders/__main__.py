"""Transcoders of the embedded model's fourth MLP: standard and cosine, with and without a linear skip, three seeds.

python -m studies.transcoders            train what is missing, measure, write numbers.json
python -m studies.transcoders --table    the table of docs/transcoders.md from numbers.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosae.io.atomic import write_text
from cosae.run import provenance
from cosae.run.evaluate import evaluate
from cosae.run.folder import read_json
from cosae.run.requests import EvalRequest
from studies.runsets import SEEDS, ensure

NUMBERS = Path(__file__).with_name("numbers.json")
SPLICED_TOKENS = 4096


def measured(seed: int) -> dict[str, dict[str, float]]:
    """Numbers by arm of one seed's run, trained where it is not there."""
    (out,) = ensure("transcoders", (seed,), progress=False)
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


def main(study: str, numbers: Path, measured: Callable[[int], Any], table: Callable[[Mapping[str, Any]], str]) -> None:
    """Measure every seed and write numbers.json, unless the table alone is asked for; print the table."""
    if "--table" not in sys.argv:
        found = {str(seed): measured(seed) for seed in SEEDS}
        stamp = {**provenance.stamp(), "hardware": provenance.hardware("cpu"), "recipe": study}
        write_text(numbers, json.dumps({**stamp, "seeds": found}, indent=1, default=str) + "\n")
    print(table(json.loads(numbers.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main("studies.transcoders", NUMBERS, measured, table)
