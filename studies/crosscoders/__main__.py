"""Crosscoders of three sites of the embedded model, one of them ten times as loud as another: three seeds.

python -m studies.crosscoders            train what is missing, write numbers.json
python -m studies.crosscoders --table    the table of docs/transcoders.md from numbers.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosae.io.atomic import write_text
from cosae.recipe import Recipe
from cosae.run import provenance
from cosae.run.execute import Logs, execute, resume
from cosae.run.folder import read_json
from studies.runsets import CACHE, SEEDS, base, finished
from studies.transcoders.__main__ import spread

NUMBERS = Path(__file__).with_name("numbers.json")
SITES = ("attn_out.1", "mlp_out.3", "resid_post.5")
FRAME = "loss.space=frame"
ARMS = (
    "standard",
    "cosine",
    f"standard,name=standard_balanced,balanced=true,{FRAME}",
    f"cosine,name=cosine_balanced,balanced=true,{FRAME}",
    f"standard,name=standard_unit_frame,frame=unit,{FRAME}",
)


def recipe(seed: int) -> Recipe:
    """The studies' common recipe on joined sites, smaller."""
    changes: dict[str, Any] = {
        "data.site": "+".join(SITES),
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
    return base("crosscoders", *ARMS).changed(changes)


def measured(seed: int) -> dict[str, dict[str, Any]]:
    """Numbers by arm of one seed's run, trained where it is not there."""
    out = CACHE / f"crosscoders-{seed}"
    if not out.exists():
        execute(recipe(seed), out, logs=Logs(progress=False))
    elif not finished(out):
        resume(out, Logs(progress=False))
    found = read_json(out / "evaluation.json")["reconstruction"]
    return {
        name: {key: one["sinks_out"][key] for key in ("fve", "by_site", "l0", "dead_frac")}
        for name, one in found.items()
    }


def table(numbers: Mapping[str, Any]) -> str:
    """One row an arm: mean over the seeds, least and largest behind it."""
    lines = [f"| arm | FVE of {' | of '.join(SITES)} | of all, joined | L0 |", f"|---|{'---|' * (len(SITES) + 2)}"]
    for name in next(iter(numbers["seeds"].values())):
        of = [one[name] for one in numbers["seeds"].values()]
        sites = [spread([one["by_site"][i] for one in of], 3) for i in range(len(SITES))]
        cells = [*sites, spread([one["fve"] for one in of], 3), spread([one["l0"] for one in of], 1)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if "--table" not in sys.argv:
        found = {str(seed): measured(seed) for seed in SEEDS}
        stamp = {**provenance.stamp(), "hardware": provenance.hardware("cpu"), "recipe": "studies.crosscoders"}
        write_text(NUMBERS, json.dumps({**stamp, "seeds": found}, indent=1, default=str) + "\n")
    print(table(json.loads(NUMBERS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
