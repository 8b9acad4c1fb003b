"""`cosae VERB`: each verb is one call into a room. A user's mistake is one sentence on stderr and exit status 2."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from cosae import share_verbs, store_verbs
from cosae.share_verbs import Export, Pull, Push
from cosae.store_verbs import Capture, Verify
from cosae.types import CosaeError


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
    """Norm nuisance put on the activations: log_normal:sigma=1.0 or sinks:frac=0.006,factor=160 (recorded)."""
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


@dataclass(frozen=True)
class Inspect:
    """Show what a saved SAE is (score, selector, width, training facts), or a store of activations."""

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved SAE, or of a store."""


@dataclass(frozen=True)
class Audit:
    """Is this SAE fooled by norm? For SAEs that exist already; nothing is trained.

    Reads cosae's own folders and those of SAELens, dictionary_learning, Gemma Scope, sparsify and the paper. Answers on
    the screen; audit.json and audit.html in --out. Example: cosae audit runs/first/arms/standard
    """

    saes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders or files of SAEs; those of one site are audited on the same tokens."""
    model: str | None = None
    """embedded, a folder of a Hugging Face model or a repository; default: what the SAE's file says."""
    site: str | None = None
    """Where the SAE reads, such as resid_post.5; default: what its file says."""
    corpus: str | None = None
    """Text to run the model on, as for train; default: what the SAE's file says, else pylib."""
    activations: str | None = None
    """A .safetensors, .npy or .parquet file of N × d vectors instead of a model."""
    store: str | None = None
    """A folder of stored activations (cosae capture) instead of a model."""
    store_site: str | None = None
    tokens: int = 32_768
    context: int | None = None
    """Tokens per sequence."""
    inject: str | None = None
    """Norm nuisance put on the activations first, such as log_normal:sigma=0.5: what if norms varied so?"""
    sink_factor: float = 10.0
    """Tokens of at least this multiple of the median norm are sinks, beside position 0 and special ids."""
    format: str = "auto"
    """Format of the files; auto looks at them."""
    device: str = "cpu"
    seed: int = 0
    out: Path = Path("audit")
    """Folder for audit.json and audit.html."""
    quiet: bool = False


@dataclass(frozen=True)
class Eval:
    """One measurement of SAEs that exist already, side by side; nothing is trained.

    MEASUREMENT is reconstruction, norms, sinks, geometry, probing, matching, splice or causal; an SAE is
    [NAME=]PATH[,PATH…], several paths being SAEs of several seeds. Example: cosae eval probing A=run/arms/standard
    B=run/arms/cosine --texts reviews.jsonl
    """

    measurement: Annotated[str, tyro.conf.Positional]
    saes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Of one site; any format that `audit` reads. The first is what the others are compared with."""
    texts: tuple[str, ...] = ()
    """probing: labelled sets: .jsonl, .parquet, a folder of datasets' save_to_disk, hf:DATASET[:CONFIG][:SPLIT], or
    sae-probes[:NAME]; default: the token-level concepts of the embedded corpus."""
    text_column: str = "text"
    label_column: str = "label"
    seeds: int = 3
    """probing texts: splits drawn."""
    max_texts: int = 2000
    """probing texts: of one question, train and test together."""
    pooling: str = "mean"
    """probing texts: mean over tokens, or last."""
    features: tuple[int, ...] = ()
    """causal: features to ablate and steer; default: the eight that fire most."""
    model: str | None = None
    """embedded, a folder of a Hugging Face model or a repository; default: what the SAE's file says."""
    site: str | None = None
    corpus: str | None = None
    """Text to run the model on, as for train."""
    activations: str | None = None
    """A .safetensors, .npy or .parquet file of N × d vectors instead of a model."""
    store: str | None = None
    """A folder of stored activations (cosae capture) instead of a model."""
    store_site: str | None = None
    tokens: int | None = None
    """Held-out tokens; default 32 768, for splice and causal 4096."""
    context: int | None = None
    """Tokens per sequence; of a labelled text its first 128 by default."""
    inject: str | None = None
    sink_factor: float = 10.0
    format: str = "auto"
    device: str = "cpu"
    seed: int = 0
    out: Path | None = None
    """A JSON file for everything that was measured."""
    quiet: bool = False


VERBS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "demo": Demo,
    "resume": Resume,
    "report": Report,
    "inspect": Inspect,
    "audit": Audit,
    "capture": Capture,
    "verify": Verify,
    "export": Export,
    "push": Push,
    "pull": Pull,
    "eval": Eval,
    "plan": Plan,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `cosae` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["--version"], ["-V"], ["version"]):
        from cosae import __version__

        print(f"cosae {__version__}")
        return
    command = _parse(given)
    from cosae.kernels import keep_memory
    from cosae.train.loop import Interrupted

    keep_memory()
    try:
        sys.exit(_DO[type(command)](command))
    except CosaeError as error:
        print(f"cosae: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"cosae: stopped after step {stop.step}; saved. {_how_to_go_on(command)}", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print(f"\ncosae: interrupted. {_how_to_go_on(command)}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _parse(given: list[str]) -> Any:
    """A verb's options. `plan` is asked of train, or of capture where that is named."""
    if given[:2] == ["plan", "capture"]:
        return tyro.cli(store_verbs.PlanCapture, args=given[2:], prog="cosae plan capture", use_underscores=False)
    if given[:2] == ["plan", "train"]:
        given = ["plan", *given[2:]]
    return tyro.extras.subcommand_cli_from_dict(
        VERBS,
        args=given or ["--help"],
        prog="cosae",
        description="Train and judge sparse autoencoders with inner-product and cosine scores, side by side.",
        use_underscores=False,
    )


def _how_to_go_on(command: Any) -> str:
    """What a person can do after an interruption."""
    if isinstance(command, Export):
        return share_verbs.after_interruption(command)
    if isinstance(command, Capture):
        return store_verbs.go_on_capturing(command.out)
    from cosae.train.checkpoint import checkpoints

    place = command.run if isinstance(command, Resume) else getattr(command, "out", None)
    runs = [place, place / "natural", place / "injected"] if isinstance(place, Path) else []
    unfinished = [run for run in runs if run.is_dir() and checkpoints(run) and not _finished(run)]
    return f"Go on with: cosae resume {unfinished[0]}" if unfinished else "Nothing was saved yet: start again."


def _finished(run: Path) -> bool:
    from cosae.run.folder import RUN, read_json

    return (run / RUN).exists() and read_json(run / RUN).get("status") == "finished"


def build_recipe(command: Train) -> Any:
    """The recipe a `train` command line names. Raises CosaeError for what it does not allow."""
    from cosae.activations.nuisance import Nuisance
    from cosae.activations.synthetic import World
    from cosae.recipe import Recipe, preset
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
        "nuisance": None if command.inject is None else Nuisance.parse(command.inject),
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


def changes_of(named: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Dotted path → value of the options that were given, and of PATH=VALUE texts."""
    changes = {path: value for path, value in named.items() if value is not None}
    for text in settings:
        path, equals, value = text.partition("=")
        if not equals:
            raise CosaeError(f"--set takes field=value, with a dotted path for the field. Got {text!r} instead.")
        changes[path] = _literal(value)
    return changes


def _literal(text: str) -> Any:
    """JSON where it is JSON (numbers, true, null, lists), else the text itself."""
    import json

    try:
        return json.loads(text)
    except ValueError:
        return text


def _train(command: Train) -> int:
    recipe = build_recipe(command)
    if command.show:
        import json

        from cosae.recipe import to_plain

        print(json.dumps(to_plain(recipe), indent=2))
        return 0
    if command.dry_run or isinstance(command, Plan):
        from cosae.run.plan import plan_run, screen

        print(screen(plan_run(recipe, command.out, store_verbs.speaker(command.quiet))))
        return 0
    from cosae.run.execute import Logs, execute

    logs = Logs(not command.quiet, command.tensorboard, command.wandb)
    return _conclude([execute(recipe, command.out, logs=logs)], command.out)


def _demo(command: Demo) -> int:
    from cosae.run.demo import demo

    return _conclude(demo(command.out, command.steps, not command.quiet), command.out)


def _resume(command: Resume) -> int:
    from cosae.run.execute import Logs, resume

    if _finished(command.run) and not (command.run / "report.html").exists():
        return _report(Report((command.run,)))  # ended while its page was written
    return _conclude([resume(command.run, Logs(not command.quiet))], command.run)


def _conclude(finished: Sequence[Any], out: Path) -> int:
    """Table and remarks on standard output, the page beside the run; status 1 where an arm had to stop."""
    from cosae.evaluate.report import summary_table, write_report
    from cosae.run.execute import moving_remarks

    folders = [run.out for run in finished]
    page = write_report(folders, out / "report.html")
    print(summary_table(folders))
    stopped = []
    for run in finished:
        for remark in moving_remarks(run.run):
            print(f"[{run.run['setting']}] {remark}")
        stopped += [f"{name} stopped: {arm['stopped']}" for name, arm in run.run["arms"].items() if arm["stopped"]]
    print(f"\nReport: {page}")
    for line in stopped:
        print(f"cosae: {line}", file=sys.stderr)
    return 1 if stopped else 0


def _report(command: Report) -> int:
    from cosae.evaluate.report import summary_table, write_report

    if not command.runs:
        raise CosaeError("report needs the folder of at least one run: cosae report RUN…")
    page = write_report(command.runs, command.out or command.runs[0] / "report.html")
    print(summary_table(command.runs))
    print(f"\nReport: {page}")
    return 0


def _inspect(command: Inspect) -> int:
    import json

    from cosae.activations.store import find_stores
    from cosae.sae.file import load

    if stores := find_stores(command.sae):
        print(json.dumps([store_verbs.inspect_store(place) for place in stores], indent=2))
        return 0
    sae = load(command.sae)
    shown = {
        **sae.cfg.to_dict(),
        "calibrated": sae.calibrated,
        "a_mean": float(sae.scale_a.detach().mean()),
        "facts": {k: v for k, v in sae.facts.items() if k != "recipe"},
    }
    print(json.dumps(shown, indent=2))
    return 0


def _audit(command: Audit) -> int:
    from dataclasses import fields

    from cosae.run.audit import run_audit, screen
    from cosae.run.existing import Wanted

    wanted = Wanted(**{f.name: getattr(command, f.name) for f in fields(Wanted)})
    print(screen(run_audit(command.saes, wanted, command.out, share_verbs.said(command.quiet))))
    print(f"\nReport: {command.out / 'audit.html'}")
    return 0


def _eval(command: Eval) -> int:
    from dataclasses import fields

    from cosae.run.existing import Wanted
    from cosae.run.judge import Texts, judge, tokens_of
    from cosae.run.judge_screen import screen
    from cosae.run.texts import Reading

    given = {f.name: getattr(command, f.name) for f in fields(Wanted) if f.name != "tokens"}
    wanted = Wanted(tokens=tokens_of(command.measurement, command.tokens), **given)
    reading = Reading(command.context or Reading.context, command.pooling, command.sink_factor)
    texts = Texts(command.texts, command.text_column, command.label_column, command.max_texts, command.seeds, reading)
    say = (lambda _: None) if command.quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    options: dict[str, Any] = {"texts": texts, "features": command.features, "out": command.out, "say": say}
    print(screen(judge(command.measurement, command.saes, wanted, **options)))
    return 0


_DO: dict[type[Any], Any] = {
    Train: _train,
    Demo: _demo,
    Resume: _resume,
    Report: _report,
    Inspect: _inspect,
    Audit: _audit,
    Capture: store_verbs.capture,
    Verify: store_verbs.verify,
    Export: share_verbs.export,
    Push: share_verbs.push,
    Pull: share_verbs.pull,
    Eval: _eval,
    Plan: _train,
    store_verbs.PlanCapture: store_verbs.capture,
}

if __name__ == "__main__":
    main()
