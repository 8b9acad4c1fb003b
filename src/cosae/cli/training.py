"""The verbs of `cosae` that train and show runs: train, plan, demo, resume, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from cosae.cli.options import changes_of, logger
from cosae.errors import CosaeError


@dataclass(frozen=True)
class Train:
    """Train several SAEs in lockstep on one stream of activations, measure them, and write a report.

    Example: cosae train --arms standard cosine,k=64 standard,frame=unit --steps 2000 --out runs/first
    """

    out: Path
    """Folder for the run; must not hold one yet."""
    preset: str = "embedded"
    """Recipe to start from: embedded, demo, demo-injected or paper."""
    recipe: Path | None = None
    """A recipe file (.json, .yaml) to start from instead of a preset."""
    arms: tuple[str, ...] = ()
    """SAEs to train: NAME or NAME,field=value,…; names: standard, standard_unit_frame, standard_layer_norm, unit_rows,
    cosine_fixed, cosine, cosine_per_feature, cosine_base_delta, cosine_grouped."""
    model: str | None = None
    """embedded, a folder with a Hugging Face causal language model, or a repository of the hub."""
    site: str | None = None
    """Where activations are read: resid_post.5, mlp_out.3, blocks.3.hook_resid_post, model.layers.3 …"""
    corpus: tuple[str, ...] = ()
    """pylib, a folder, a .txt, .jsonl or .parquet file, or hf:DATASET[:CONFIG][:SPLIT]; several, as in code/:0.7
    notes.jsonl:0.3, are mixed by weight."""
    activations: str | None = None
    """A .safetensors, .npy or .parquet file of N × d vectors instead of a model."""
    store: str | None = None
    """A folder written by `cosae capture` instead of a model."""
    world: str | None = None
    """A synthetic world instead of a model, e.g. log_normal:sigma=0.5 or none:n_features=512,d_in=128."""
    inject: str | None = None
    """Norm perturbation put on the activations: log_normal:sigma=1.0 or sinks:frac=0.006,factor=160 (recorded)."""
    inject_into: str | None = None
    """Which tokens get it: both (default), training, or evaluation (a shift at deployment)."""
    filter: str | None = None
    """Tokens left out of training: none, position_0 or norm (≥ 10 × the median of the first window)."""
    d_sae: int | None = None
    """Number of features of arms that name none; default 16 × d."""
    k: int | None = None
    """Mean active features per token of arms that name none."""
    steps: int | None = None
    batch: int | None = None
    """Tokens per step."""
    lr: float | None = None
    seed: int | None = None
    """Of the data order and of arms that name none."""
    dtype: str | None = None
    """Precision the model runs in: float32, bfloat16 or float16. SAEs are always trained in float32."""
    device: str | None = None
    kernel: str | None = None
    """auto; reference for the dense definition; cpu or triton to insist on that path."""
    set: tuple[str, ...] = ()
    """Any other field of the recipe, by dotted path: training.log_every=50 evaluation.probing=false."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run's folder."""
    wandb: str | None = None
    """Also log to this W&B project."""
    quiet: bool = False
    """No progress display."""
    show: bool = False
    """Print the recipe that would run, as JSON, and stop."""
    dry_run: bool = False
    """Print what the run would take in memory, disk and time, as `cosae plan` does, and stop."""


@dataclass(frozen=True)
class Plan(Train):
    """What a run would take in memory, disk and time; nothing is written. `cosae plan capture …` asks for a capture.

    Memory and disk are told from configurations, time from a short sample of the run. Takes the options of train, and
    refuses what cannot fit, saying what to lower to what. Example: cosae plan --d-sae 65536 --steps 20000
    """

    out: Path = Path("runs/plan")
    """Where the run would be written: whose disk is looked at."""


@dataclass(frozen=True)
class Demo:
    """Six arms on the embedded model, with its norms as they are and with injected ones; a table and a report.

    A few minutes on two cores, no network.
    """

    out: Path = Path("runs/demo")
    """Folder for the two runs and the report."""
    steps: int | None = None
    """Training steps of each arm, instead of the demo's own number."""
    quiet: bool = False
    """No progress display."""


@dataclass(frozen=True)
class Resume:
    """Go on with an interrupted run from its last checkpoint."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    quiet: bool = False


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page about one or several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""
    out: Path | None = None
    """The page; default: report.html in the first run's folder."""


def build_recipe(command: Train) -> Any:
    """The recipe a `train` command line names. Raises CosaeError for what it does not allow."""
    from cosae.activations.perturbation import Perturbation
    from cosae.activations.synthetic import World
    from cosae.presets import preset
    from cosae.recipe import Recipe
    from cosae.train.arm import parse_arm

    recipe = Recipe.read(command.recipe) if command.recipe is not None else preset(command.preset)
    if command.arms:
        recipe = replace(recipe, arms=tuple(parse_arm(text) for text in command.arms))
    if command.store is not None and (command.model or command.corpus or command.dtype):
        raise CosaeError("a store holds activations already: drop --model, --corpus and --dtype, or --store.")
    named = {
        "data.model": command.model,
        "data.site": command.site if command.store is None else None,
        "data.corpus": command.corpus[0] if len(command.corpus) == 1 else command.corpus or None,
        "data.activations": command.activations,
        "data.store": command.store,
        "data.store_site": command.site if command.store is not None else None,
        "data.model_dtype": command.dtype,
        "data.world": None if command.world is None else World.parse(command.world),
        "perturbation": None if command.inject is None else Perturbation.parse(command.inject),
        "inject_into": command.inject_into,
        "filter.kind": command.filter,
        "d_sae": command.d_sae,
        "k": command.k,
        "training.steps": command.steps,
        "training.batch_tokens": command.batch,
        "training.optimizer.lr": command.lr,
        "training.seed": command.seed,
        "device": command.device,
        "kernel": command.kernel,
    }
    recipe = recipe.changed(changes_of(named, command.set))
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
    if command.dry_run or isinstance(command, Plan):
        from cosae.run.plan.check import plan_run, screen

        print(screen(plan_run(recipe, command.out, logger(command.quiet))))
        return 0
    from cosae.run.execute import Logs, execute

    logs = Logs(not command.quiet, command.tensorboard, command.wandb)
    return _conclude([execute(recipe, command.out, logs=logs)], command.out)


def demo(command: Demo) -> int:
    from cosae.run.demo import demo as run_demo

    return _conclude(run_demo(command.out, command.steps, not command.quiet), command.out)


def resume(command: Resume) -> int:
    from cosae.run.execute import Logs
    from cosae.run.execute import resume as go_on

    if finished(command.run) and not (command.run / "report.html").exists():
        return report(Report((command.run,)))  # ended while its page was written
    return _conclude([go_on(command.run, Logs(not command.quiet))], command.run)


def _conclude(finished: Sequence[Any], out: Path) -> int:
    """Table and warnings on standard output, the page beside the run; status 1 where an arm had to stop."""
    from cosae.report.page import summary_table, write_report
    from cosae.run.execute import moving_warnings

    folders = [run.out for run in finished]
    page = write_report(folders, out / "report.html")
    print(summary_table(folders))
    stopped = []
    for run in finished:
        for warning in moving_warnings(run.run):
            print(f"[{run.run['setting']}] {warning}")
        stopped += [f"{name} stopped: {arm['stopped']}" for name, arm in run.run["arms"].items() if arm["stopped"]]
    print(f"\nReport: {page}")
    for line in stopped:
        print(f"cosae: {line}", file=sys.stderr)
    return 1 if stopped else 0


def report(command: Report) -> int:
    from cosae.report.page import summary_table, write_report

    if not command.runs:
        raise CosaeError("report needs the folder of at least one run: cosae report RUN…")
    page = write_report(command.runs, command.out or command.runs[0] / "report.html")
    print(summary_table(command.runs))
    print(f"\nReport: {page}")
    return 0


def finished(run: Path) -> bool:
    from cosae.run.folder import RUN, read_json

    return (run / RUN).exists() and read_json(run / RUN).get("status") == "finished"
