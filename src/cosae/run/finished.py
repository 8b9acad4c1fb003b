"""A run that has ended: its SAEs and what was measured, in memory or read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError, short
from cosae.run.folder import ARMS, EVALUATION, RECIPE, RUN, read_json
from cosae.sae.file import load
from cosae.sae.model import SAE, Calibration
from cosae.shown import Shown, html_table

SHOWN = ("score", "selector", "frame", "d_sae", "k", "l0", "fve")


@dataclass(repr=False)
class Finished(Shown):
    """A finished run. saes: trained, calibrated SAEs by arm; evaluation: what was measured, None where not asked."""

    saes: dict[str, SAE]
    evaluation: dict[str, Any] | None
    run: dict[str, Any]
    out: Path | None = None
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def _summary(self) -> dict[str, object]:
        known = {name: sae._summary() for name, sae in self.saes.items()}
        stopped = [name for name, arm in self.run.get("arms", {}).items() if arm.get("stopped")]
        return {
            "name": self.run.get("name"),
            "saes": list(self.saes),
            "tokens": self.run.get("tokens"),
            "setting": self.run.get("setting"),
            "l0": {name: one["l0"] for name, one in known.items()},
            "fve": {name: one["fve"] for name, one in known.items()},
            "stopped": stopped or None,
            "evaluated": self.evaluation is not None,
            "out": "in memory" if self.out is None else str(self.out),
        }

    def _repr_html_(self) -> str:
        """The run, and a row for each SAE."""
        of_saes = ("saes", "l0", "fve")
        whole = [(name, value) for name, value in self._summary().items() if value is not None and name not in of_saes]
        rows = [[name, *(sae._summary()[column] for column in SHOWN)] for name, sae in self.saes.items()]
        return html_table("Finished run", whole) + html_table("SAEs", rows, ("", *SHOWN))


def open_run(folder: str | Path) -> Finished:
    """A finished run from its folder, as `fit` returned it.

    >>> run = cosae.open_run("runs/mine")
    >>> codes = run.saes["cosine"].encode(x)

    Raises CosaeError where there is no run, it is not finished, or a file of it is damaged.
    """
    out = Path(folder)
    if not (out / RUN).is_file():
        raise CosaeError(f"{out} holds no run (it has no {RUN}): give the folder that was --out of `cosae train`.")
    record = read_json(out / RUN)
    if record.get("status") != "finished":
        how = f"go on with `cosae resume {out}`" if (out / RECIPE).is_file() else "start it again"
        raise CosaeError(f"the run in {out} is not finished (its status is {short(record.get('status'))}): {how}.")
    arms, there = record.get("arms"), {path.name for path in (out / ARMS).glob("[!.]*")}
    known = isinstance(arms, Mapping) and all(isinstance(arm, Mapping) for arm in arms.values())
    if not isinstance(arms, Mapping) or not known or not there.issuperset(arms):
        raise CosaeError(f"{out / ARMS} does not hold the SAEs that {RUN} names: the run's folder is damaged.")
    saes = {name: load(out / ARMS / name) for name in arms}
    evaluation = read_json(out / EVALUATION) if (out / EVALUATION).exists() else None
    found = {name: _calibration(sae.metadata) for name, sae in saes.items()}
    return Finished(saes, evaluation, record, out, {name: one for name, one in found.items() if one is not None})


def _calibration(known: Mapping[str, Any]) -> Calibration | None:
    """What an SAE's file says of its calibration."""
    if not {"l0_target", "l0_calibrated", "calibration_tokens"} <= known.keys():
        return None
    return Calibration(known["l0_target"], known["l0_calibrated"], known["calibration_tokens"], fve=known.get("fve"))
