"""A run that has ended: its SAEs and what was measured, in memory or read from its folder; and with more steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError, short
from cosae.io.values import from_plain
from cosae.recipe import Recipe
from cosae.run.folder import ARMS, EVALUATION, RECIPE, RUN, read_json
from cosae.sae.file import load
from cosae.sae.model import SAE, Calibration
from cosae.shown import Shown, counted, html_table
from cosae.train.checkpoint import checkpoints
from cosae.train.loop import TrainingConfig

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


def extended(recipe: Recipe, record: Mapping[str, Any], out: Path, steps: int) -> Recipe:
    """The recipe of a finished run with more steps. Raises CosaeError where it cannot be extended to so many."""
    if record.get("status") != "finished":
        raise CosaeError(f"the run in {out} is not finished: `cosae resume {out}` first, and then extend it.")
    training = from_plain(Recipe, record.get("recipe"), str(out / RUN)).training
    if steps <= training.steps:
        raise CosaeError(f"the run in {out} has done {training.steps} steps: --extend-to must be more. Got {steps}.")
    if not checkpoints(out):
        raise CosaeError(f"the run in {out} has no checkpoint left to go on from: it cannot be extended.")
    ends = (*training.extended_from, training.steps)
    return replace(recipe, training=replace(recipe.training, steps=steps, extended_from=ends))


def as_extended(recipe: Recipe, training: TrainingConfig) -> Recipe:
    """The recipe of a checkpoint, with the steps of a later part where `training` is that of the extended run."""
    ends, done = training.extended_from, recipe.training.steps
    if done not in ends or recipe.training.extended_from != ends[: ends.index(done)]:
        return recipe
    return replace(recipe, training=replace(recipe.training, steps=training.steps, extended_from=ends))


def describe_extension(training: TrainingConfig) -> str:
    """A line on the schedule of an extended run's last part."""
    (begin, end), optimizer = training.parts[-1], training.optimizer
    decay = f", and falls to 0 over the last {optimizer.decay_frac:.0%}" if optimizer.decay_frac else ""
    rises = f"rises over {counted(optimizer.warmup_steps, 'step')}{decay}"
    return f"extended from step {begin} to {end}: the learning rate has a new schedule there, in which it {rises}"
