"""The commands of `cosae` that look at single features: features, browse, explain, steer."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cosae.browse.explain.options import Asking, ExplainOptions
from cosae.cli.options import logger, progress
from cosae.errors import CosaeError
from cosae.io.escape import printable
from cosae.run.requests import BrowseRequest, FeatureOptions, Place, Reading, SteerOptions


@dataclass(frozen=True)
class Features:
    """Print what an SAE's features fire on: tokens in context, how often, and the tokens that they promote.

    Without --feature a table of features. Tokens that the SAE's training left out are not counted.
    Example: cosae features runs/demo/natural --sae cosine --feature 7
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder or file of an SAE, of any format that cosae reads, or folder of a run."""
    options: Annotated[FeatureOptions, tyro.conf.arg(name="")] = field(default_factory=FeatureOptions)
    sae: str | None = None
    """Which SAE of a run, by its name."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=lambda: Reading(prompts=512))
    quiet: bool = False
    """Do not print progress."""


@dataclass(frozen=True)
class Steer:
    """Print how a model goes on from a prompt, without and with a change to features of an SAE.

    What the SAE misses is put back, so only the change acts; tokens that its training left out are not changed.
    Example: cosae steer runs/demo/natural --sae cosine --feature 7 --add 5 "def add("
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder or file of an SAE, of any format that cosae reads, or folder of a run."""
    prompt: Annotated[str, tyro.conf.Positional]
    """Text to go on from."""
    options: Annotated[SteerOptions, tyro.conf.arg(name="")]
    sae: str | None = None
    """Which SAE of a run, by its name."""
    place: Annotated[Place, tyro.conf.arg(name="")] = field(default_factory=Place)
    quiet: bool = False
    """Do not print progress."""


@dataclass(frozen=True)
class Browse:
    """Look at the features of one or several SAEs side by side, in pages that are served on this machine.

    What is missing is built first: the model reads --tokens tokens of text once. Takes SAEs of one site, a run's folder
    for all of its SAEs, or a feature store that was built before.
    Example: cosae browse runs/demo/natural
    """

    saes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders or files of SAEs, of any format that cosae reads, or a run's folder, or that of a feature store."""
    request: Annotated[BrowseRequest, tyro.conf.arg(name="")] = field(default_factory=BrowseRequest)
    out: Path | None = None
    """Folder for the feature store. Default: RUN/features, or SAE.features beside the first SAE."""
    rebuild: bool = False
    """Build the store anew where it is there already."""
    static: Path | None = None
    """Write the pages as plain files to this folder, instead of serving them: all but what runs the model."""
    host: str = "127.0.0.1"
    """Address to listen on. The default can be reached from this machine alone."""
    port: int = 8321
    """Port to listen on; 0 for any free one."""
    open: bool = False
    """Open the pages in a browser."""
    quiet: bool = False
    """Do not print progress."""


@dataclass(frozen=True)
class Explain:
    """Let a language model say what features fire on, and score what it says on texts that it was not told of.

    Scored by detection and fuzzing beside baselines; explanations show in cosae browse. Every question and answer is
    kept in the store's explain.jsonl, from which the same command goes on.
    Example: cosae explain runs/demo/natural --endpoint http://127.0.0.1:8000/v1 --model NAME
    """

    saes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders or files of SAEs of one site, or a run's folder, or that of a feature store."""
    asking: Annotated[Asking, tyro.conf.arg(name="")] = field(default_factory=Asking)
    options: Annotated[ExplainOptions, tyro.conf.arg(name="")] = field(default_factory=ExplainOptions)
    reads: str | None = None
    """Model that the SAEs read, as --model of browse. Default: from their files."""
    site: str | None = None
    """Site that the SAEs read. Default: from their files."""
    corpus: str | None = None
    """Text, as --corpus of browse."""
    tokens: int = BrowseRequest.tokens
    """Tokens of text, as --tokens of browse."""
    device: str = "cpu"
    """Device: cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of what is drawn: features, texts, answers."""
    out: Path | None = None
    """Folder of the feature store, as --out of browse."""
    quiet: bool = False
    """Do not print progress."""


def explain(command: Explain) -> int:
    from cosae.run.explore.browse import is_store
    from cosae.run.explore.explain import explain as run_explain

    if not command.saes:
        raise CosaeError("explain needs the folder of a run, of at least one SAE, or of a feature store.")
    options = {name: getattr(command, name) for name in ("site", "corpus", "tokens", "device", "seed")}
    if len(command.saes) == 1 and is_store(command.saes[0]):
        for name in ("reads", "site", "corpus", "tokens", "out"):
            if getattr(command, name) != getattr(Explain, name):
                raise CosaeError(f"--{name} has no say in a feature store that is there already: drop it.")
    request = BrowseRequest(model=command.reads, **options)
    shown = progress(command.quiet)
    print(run_explain(command.saes, request, command.asking, command.options, command.out, shown))
    return 0


def browse(command: Browse) -> int:
    from cosae.browse.server import serve, write_static
    from cosae.browse.server.serve import listening
    from cosae.browse.server.static import MARK
    from cosae.browse.store.reader import open_store
    from cosae.io.staged import check_place
    from cosae.run.explore.browse import prepare
    from cosae.run.explore.live import live_model

    if not command.saes:
        raise CosaeError("browse needs the folder of a run, or of at least one SAE: cosae browse RUN")
    if command.static is not None:
        for name in ("host", "port", "open"):
            if getattr(command, name) != getattr(Browse, name):
                raise CosaeError(f"--{name} is of the server, which --static does without: drop one of them.")
        check_place(command.static, MARK)
    else:
        listening(command.host, command.port).close()  # before anything is built
    log = logger(command.quiet)
    folder = prepare(command.saes, command.request, command.out, command.rebuild, progress(command.quiet))
    with closing(open_store(folder)) as store:
        if command.static is not None:
            print(f"Pages: {write_static(store, command.static, log) / 'index.html'}")
        else:
            live = live_model(store, command.request, log)
            serve(store, command.host, command.port, command.open, live, lambda text: print(text, flush=True))
            if live is not None and not live.stop():
                os._exit(0)  # a model that is loaded or reads cannot be ended otherwise, and takes its time
    return 0


def features(command: Features) -> int:
    from cosae.run.explore.features import look, screen
    from cosae.run.saes import choose_sae

    command.options.check()
    path = choose_sae(command.source, command.sae)
    print(screen(look(path, command.reading, command.options.examples, logger(command.quiet)), command.options))
    return 0


def steer(command: Steer) -> int:
    from cosae.run.explore.steer import steer as run_steer
    from cosae.run.saes import choose_sae

    command.options.check()
    if command.place.seed != Place.seed and command.options.temperature == 0:
        raise CosaeError(
            "without --temperature nothing is drawn, so that --seed has no say: give one, or drop the other."
        )
    path = choose_sae(command.source, command.sae)
    found = run_steer(path, command.prompt, command.place, command.options, logger(command.quiet))
    print(printable(str(found), keep="\n\t"))
    return 0
