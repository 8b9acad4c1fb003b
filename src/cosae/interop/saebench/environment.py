"""SAEBench in another environment: a job goes out as a file, SAEs as cosae folders, and an answer comes back as a file.

SAEBench 0.6 pins numpy < 2 and datasets < 4, so it rarely lives where cosae does. The other environment needs SAEBench
(and sae-probes) alone: a folder on its PYTHONPATH links to this cosae.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.interop.saebench.settings import Settings
from cosae.sae.file import save
from cosae.sae.model import SAE

JOB, ANSWER = "job.json", "answer.json"


def run_elsewhere(
    saes: Mapping[str, SAE],
    evals: Sequence[str],
    out: Path,
    settings: Settings,
    options: Mapping[str, Any],
    folder: Path,
    log: Path,
) -> Any:
    """What `run.evaluate_here` returns in the environment of settings.python; what is printed there goes to `log`.

    Job and answer pass through `folder`. Raises CosaeError where python cannot be run, cannot import cosae, or ends
    without an answer; and with the very sentence of a CosaeError over there.
    """
    for name, sae in saes.items():
        save(sae, folder / "saes" / name)
    (folder / "lent").mkdir()
    (folder / "lent" / "cosae").symlink_to(Path(__file__).resolve().parents[2], target_is_directory=True)
    job = {"saes": list(saes), "evals": evals, "out": out, "settings": asdict(settings), "options": options}
    (folder / JOB).write_text(json.dumps(job, default=str), encoding="utf-8")
    python = settings.python
    paths = [str(folder / "lent"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [str(python), "-m", __package__, str(folder)]
    try:
        with log.open("a", encoding="utf-8") as printed:
            done = subprocess.run(command, env=environment, stdout=printed, stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        raise CosaeError(f"python must be an interpreter that can be run. Got {python} ({error.strerror}).") from None
    place = folder / ANSWER
    if not place.is_file():
        last = ([line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()] or ["nothing"])[-1]
        raise CosaeError(f"{python} ended with status {done.returncode} and no answer; last: {last.strip()[:300]}")
    answer = json.loads(place.read_text("utf-8"))
    if "error" in answer:
        raise CosaeError(answer["error"])
    return answer["value"]
