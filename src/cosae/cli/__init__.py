"""`cosae VERB`: each verb is one call into a room. A user's mistake is one sentence on stderr and exit status 2."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from cosae.cli import exploring, looking, sharing, stores, training
from cosae.cli.help import registry
from cosae.errors import CosaeError, CosaeWarning
from cosae.io.escape import printable
from cosae.io.signals import Interrupted, stop_on_signals

VERBS: dict[str, tuple[type[Any], Callable[..., int]]] = {
    "train": (training.Train, training.train),
    "demo": (training.Demo, training.demo),
    "resume": (training.Resume, training.resume),
    "report": (training.Report, training.report),
    "inspect": (looking.Inspect, looking.inspect),
    "audit": (looking.Audit, looking.audit),
    "eval": (looking.Eval, looking.evaluate),
    "calibrate": (looking.Calibrate, looking.calibrate),
    "features": (exploring.Features, exploring.features),
    "browse": (exploring.Browse, exploring.browse),
    "explain": (exploring.Explain, exploring.explain),
    "steer": (exploring.Steer, exploring.steer),
    "plan": (training.Plan, training.train),
    "capture": (stores.Capture, stores.capture),
    "verify": (stores.Verify, stores.verify),
    "export": (sharing.Export, sharing.export),
    "bench": (sharing.Bench, sharing.bench),
    "push": (sharing.Push, sharing.push),
    "pull": (sharing.Pull, sharing.pull),
    "fetch": (sharing.Fetch, sharing.fetch),
}
"""Name → (its options, what it does with them and returns as exit status)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `cosae` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["--version"], ["-V"], ["version"]):
        from cosae import __version__

        print(f"cosae {__version__}")
        return
    command = None
    try:
        command = _parse(given)
        from cosae.kernels import keep_memory  # this imports torch, for which `--help` need not wait

        keep_memory()
        with warnings.catch_warnings():
            warnings.showwarning = _show  # type: ignore[assignment]  # what it is called with, by place
            with stop_on_signals(at_once=KeyboardInterrupt()):
                _check_processes(command)
                sys.exit(_call_of(command)(command))
    except CosaeError as error:
        print("cosae: " + printable(str(error), keep="\n"), file=sys.stderr)
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


def _check_processes(command: Any) -> None:
    """Raises CosaeError for a command that torchrun started several times, and that one process runs."""
    if "WORLD_SIZE" not in os.environ:
        return
    from cosae.train.parallel.config import started

    together = isinstance(command, training.Train | training.Resume) and not isinstance(command, training.Plan)
    if started() > 1 and not together:
        raise CosaeError("only train and resume run in several processes: start this command without torchrun.")


def _show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """A warning of ours in one line, without the place in the code; others' as they are."""
    from tqdm import tqdm  # which `--help` need not wait for

    ours = issubclass(category, CosaeWarning)
    theirs = warnings.formatwarning(message, category, filename, lineno)
    # past a bar that is on screen, and without a newline of its own
    tqdm.write(f"cosae: warning: {printable(str(message))}\n" if ours else theirs, file=sys.stderr, end="")


def _parse(given: list[str]) -> Any:
    """A verb's options. `plan` is asked of train, or of capture where that is named."""
    if given[:2] == ["plan", "capture"]:
        return tyro.cli(stores.PlanCapture, args=given[2:], prog="cosae plan capture", **_options(given))
    if given[:2] == ["plan", "train"]:
        given = ["plan", *given[2:]]
    return tyro.extras.subcommand_cli_from_dict(
        {name: options for name, (options, _) in VERBS.items()},
        args=given or ["--help"],
        prog="cosae",
        description="Train and evaluate sparse autoencoders with inner-product and cosine scores, side by side.",
        **_options(given),
    )


def _options(given: list[str]) -> dict[str, Any]:
    config = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    return {"use_underscores": False, "config": config, "registry": registry(given)}


def _call_of(command: Any) -> Callable[..., int]:
    """What a parsed command line asks for; the options of `plan capture` are those of `capture`."""
    return next(call for options, call in reversed(VERBS.values()) if isinstance(command, options))


def _how_to_go_on(command: Any) -> str:
    """What a person can do after an interruption."""
    if isinstance(command, sharing.Export | sharing.Bench):
        return sharing.after_interruption(command)
    if isinstance(command, stores.Capture):
        return stores.go_on_capturing(command.out)
    if isinstance(command, looking.Audit | looking.Eval):
        return "Nothing was written: give the same command again."
    runs_on = isinstance(command, training.Train | training.Demo | training.Resume)
    if not runs_on or isinstance(command, training.Plan) or getattr(command, "dry_run", False):
        return "Give the same command again."
    from cosae.run.folder import RECIPE

    real = isinstance(command, training.Demo) and command.real
    if isinstance(command, training.Demo):
        place = training.demo_folder(command)
    else:
        place = command.run if isinstance(command, training.Resume) else command.out
    runs = [place, place / "natural", place / "injected"]
    unfinished = [run for run in runs if (run / RECIPE).is_file() and not training.finished(run)]
    if unfinished:
        return f"Go on with: cosae resume {unfinished[0]}"
    kept = "What was captured so far is kept: give the same command again."
    return kept if real else "Nothing was saved yet: start again."
