"""The verbs of `cosae` that train and show runs: train, plan, demo, resume, report."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cosae.cli.options import RecipeOptions, progress
from cosae.errors import CosaeError

if TYPE_CHECKING:
    from cosae.recipe import Recipe


NO_ARMS = (
    "cosae: no --arms given: training standard, and standard_unit_frame, which takes each token's norm out and puts it "
    "back. Which is better depends on the norms: docs/choosing.md."
)


@dataclass(frozen=True, kw_only=True)
class Train(RecipeOptions):
    """Train several SAEs on the same batches of activations, measure them, and write a report.

    Example: cosae train --arms standard cosine,k=64 standard,frame=unit --steps 2000 --out runs/first
    """

    out: Path
    """Folder for the run; it must be new or empty."""
    arms: tuple[str, ...] = ()
    """SAEs to train, each as NAME or NAME,field=value,… Names: standard, standard_unit_frame, standard_layer_norm,
    unit_rows, cosine_fixed, cosine, cosine_per_feature, cosine_base_delta, cosine_grouped."""
    site: str | None = None
    """Site at which activations are read: resid_post.5, mlp_out.3, blocks.3.hook_resid_post, model.layers.3, …"""
    target: str | None = None
    """Train transcoders: what they make of the site, such as mlp_out.5 of mlp_in.5. With a store, the site of another
    store in its folder; with --activations, a second file."""
    activations: str | None = None
    """File of N × d vectors (.safetensors, .npy, .parquet), instead of a model."""
    store: str | None = None
    """Folder written by `cosae capture`, instead of a model."""
    world: str | None = None
    """Synthetic world, instead of a model: log_normal:sigma=0.5 or none:n_features=512,d_in=128."""
    inject: str | None = None
    """Perturbation of the norms, recorded in the run: log_normal:sigma=1.0 or sinks:frac=0.006,factor=160."""
    inject_into: str | None = None
    """Which tokens are perturbed: both, training, or evaluation (a shift at deployment)."""
    filter: str | None = None
    """Tokens left out of training: none, position_0, or norm (those of at least 10 × the median norm)."""
    d_sae: int | None = None
    """Number of features, where an arm does not set it."""
    k: int | None = None
    """Mean number of active features per token, where an arm does not set it."""
    steps: int | None = None
    """Training steps."""
    batch: int | None = None
    """Tokens per step."""
    lr: float | None = None
    """Learning rate, where an arm does not set it."""
    kernel: str | None = None
    """Which implementation computes: auto, reference (the dense definition), cpu or triton."""
    parallel: str | None = None
    """Under torchrun: how its processes share the work, as data=2,feature=2,arm=1."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run's folder."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""
    show: bool = False
    """Print the recipe as JSON, and stop."""


@dataclass(frozen=True, kw_only=True)
class Plan(Train):
    """Print the memory, disk and time that a run needs; nothing is written. For a capture: `cosae plan capture`.

    Memory and disk follow from the recipe; the time is estimated from a short sample of the run. Takes the options of
    train. A run that cannot fit is refused, with the number to lower. Example: cosae plan --d-sae 65536 --steps 20000
    """

    out: Path = Path("runs/plan")
    """Folder to which the run would be written; its disk is checked."""


@dataclass(frozen=True)
class Demo:
    """Train six SAEs on the embedded model, with unchanged and with perturbed norms; print a table, write a report.

    Takes a few minutes on two cores and needs no network. With --real: three SAEs on a pretrained model with attention
    sinks, after `cosae fetch smollm2 wiki sae-probes`; below 20 minutes on two cores the first time, less afterwards.
    """

    out: Path | None = None
    """Folder for the runs and the report. Default: runs/demo; with --real, runs/demo-real."""
    real: bool = False
    """Run on the pretrained model SmolLM2-135M, and show what its attention sinks do."""
    steps: int | None = None
    """Training steps of each SAE, instead of 500; with --real, instead of 1000."""
    quiet: bool = False
    """Do not print progress."""


@dataclass(frozen=True)
class Resume:
    """Continue an interrupted run from its last checkpoint, or with --extend-to a finished one from its end."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    extend_to: int | None = None
    """Go on with a finished run until it has this many steps in all, with a new schedule of the learning rate. Its SAEs
    and what was measured are replaced at the end."""
    metrics_only: bool = False
    """Leave out TensorBoard and W&B, where the run was started with them."""
    quiet: bool = False
    """Do not print progress."""
    parallel: str | None = None
    """Under torchrun: how its processes share the work from here on, as data=2,feature=2,arm=1."""


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page about one or several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""
    out: Path | None = None
    """File for the page. Default: report.html in the first run's folder."""


def build_recipe(command: Train) -> Recipe:
    """The recipe a `train` command line names. Raises CosaeError for what it does not allow."""
    from cosae.activations.perturbation import Perturbation
    from cosae.activations.synthetic import World
    from cosae.train.arm import parse_arm
    from cosae.train.parallel.config import ParallelConfig

    more = {
        "arms": tuple(parse_arm(text) for text in command.arms) or None,
        "data.site": command.site,
        "data.world": None if command.world is None else World.parse(command.world),
        "perturbation": None if command.inject is None else Perturbation.parse(command.inject),
        "parallel": None if command.parallel is None else ParallelConfig.parse(command.parallel),
    }
    recipe = command.changed_recipe(more)
    if recipe.name == "embedded":  # the preset's name, which says nothing true of other data
        file = recipe.data.store or recipe.data.activations
        other = Path(file).stem if file else Path(recipe.data.model).name
        recipe = replace(recipe, name="world" if recipe.data.world is not None else other or "run")
    return recipe


def train(command: Train) -> int:
    recipe = build_recipe(command)
    if command.show:
        from cosae.io.values import to_plain

        print(json.dumps(to_plain(recipe), indent=2))
        return 0
    for text in recipe.warnings if os.environ.get("RANK", "0") == "0" else ():
        print(f"cosae: warning: {text}", file=sys.stderr)
    if not (command.arms or command.recipe or command.quiet) and command.preset == RecipeOptions.preset:
        print(NO_ARMS, file=sys.stderr)
    if command.dry_run or isinstance(command, Plan):
        if recipe.parallel.n > 1:
            raise CosaeError(
                "a plan is of one process: drop --parallel; docs/scale.md says what each of several needs."
            )
        from cosae.run.plan.check import plan_run, screen

        print(screen(plan_run(recipe, command.out, progress(command.quiet))))
        return 0
    from cosae.run.execute import Logs, execute

    logs = Logs(not command.quiet, command.tensorboard, command.wandb)
    return _conclude([execute(recipe, command.out, logs=logs)], command.out)


def demo(command: Demo) -> int:
    from cosae.run import demo as demos

    out = demo_folder(command)
    if command.real:
        finished, shown = [demos.demo_real(out, command.steps, not command.quiet)], out
    else:
        finished, shown = demos.demo(out, command.steps, not command.quiet), out / "natural"
    status = _conclude(finished, out)
    print(f"Look at the features, side by side: cosae browse {shlex.quote(str(shown))}")
    return status


def demo_folder(command: Demo) -> Path:
    """Where a demo is written."""
    return command.out or Path("runs/demo-real" if command.real else "runs/demo")


def resume(command: Resume) -> int:
    from cosae.run.execute import Logs
    from cosae.run.execute import resume as go_on
    from cosae.train.parallel.config import ParallelConfig

    if command.extend_to is None and finished(command.run) and not (command.run / "report.html").exists():
        return report(Report((command.run,)))  # ended while its page was written
    logs = Logs(not command.quiet, metrics_only=command.metrics_only)
    mesh = None if command.parallel is None else ParallelConfig.parse(command.parallel)
    return _conclude([go_on(command.run, logs, parallel=mesh, extend_to=command.extend_to)], command.run)


def _conclude(finished: Sequence[Any], out: Path) -> int:
    """The report, then the arms that had to stop; status 1 where there are any. Of several processes' run, the first
    process reports."""
    if not all(run.run for run in finished):
        return 0
    report(Report(tuple(run.out for run in finished), out / "report.html"))
    runs = [run.run for run in finished]
    arms = [arm for run in runs for arm in run["arms"].items()]
    stopped = [f"cosae: {name} stopped: {arm['stopped']}" for name, arm in arms if arm["stopped"]]
    print("".join(f"{line}\n" for line in stopped), file=sys.stderr, end="")
    return 1 if stopped else 0


def report(command: Report) -> int:
    from cosae.report.page import summary_table, write_report

    if not command.runs:
        raise CosaeError("report needs the folder of at least one run: cosae report RUN…")
    page = write_report(command.runs, command.out or command.runs[0] / "report.html")
    print(f"{summary_table(command.runs)}\n\nReport: {page}")
    return 0


def finished(run: Path) -> bool:
    from cosae.run.folder import RUN, read_json

    return (run / RUN).exists() and read_json(run / RUN).get("status") == "finished"
