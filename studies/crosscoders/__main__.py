"""Crosscoders of three sites of the embedded model, one of them ten times as loud as another: three seeds.

python -m studies.crosscoders            train what is missing, write numbers.json
python -m studies.crosscoders --table    the table of docs/transcoders.md from numbers.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosae.run.folder import read_json
from studies.runsets import CROSSCODER_SITES, ensure
from studies.transcoders.__main__ import main, spread

NUMBERS = Path(__file__).with_name("numbers.json")


def measured(seed: int) -> dict[str, dict[str, Any]]:
    """Numbers by arm of one seed's run, trained where it is not there."""
    (out,) = ensure("crosscoders", (seed,), progress=False)
    found = read_json(out / "evaluation.json")["reconstruction"]
    return {
        name: {key: one["sinks_out"][key] for key in ("fve", "by_site", "l0", "dead_frac")}
        for name, one in found.items()
    }


def table(numbers: Mapping[str, Any]) -> str:
    """One row an arm: mean over the seeds, least and largest behind it."""
    lines = [
        f"| arm | FVE of {' | of '.join(CROSSCODER_SITES)} | of all, joined | L0 |",
        f"|---|{'---|' * (len(CROSSCODER_SITES) + 2)}",
    ]
    for name in next(iter(numbers["seeds"].values())):
        of = [one[name] for one in numbers["seeds"].values()]
        sites = [spread([one["by_site"][i] for one in of], 3) for i in range(len(CROSSCODER_SITES))]
        cells = [*sites, spread([one["fve"] for one in of], 3), spread([one["l0"] for one in of], 1)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main("studies.crosscoders", NUMBERS, measured, table)
