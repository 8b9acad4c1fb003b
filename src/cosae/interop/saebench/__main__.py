"""The other side of `environment.run_elsewhere`, where SAEBench is: python -m cosae.interop.saebench FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.interop.saebench.environment import ANSWER, JOB
from cosae.interop.saebench.run import evaluate_here
from cosae.interop.saebench.settings import Settings
from cosae.io.atomic import write_text
from cosae.sae.file import load


def main(folder: Path) -> None:
    """Read the job, run it here, and write the answer."""
    job = json.loads((folder / JOB).read_text("utf-8"))
    try:
        saes = {name: load(folder / "saes" / name) for name in job["saes"]}
        value = evaluate_here(saes, job["evals"], Path(job["out"]), Settings(**job["settings"]), job["options"])
        answer: dict[str, Any] = {"value": value}
    except CosaeError as error:
        answer = {"error": str(error)}
    write_text(folder / ANSWER, json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
