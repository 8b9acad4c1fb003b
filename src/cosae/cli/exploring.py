"""The commands of `cosae` that look at single features: features, steer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cosae.cli.options import logger
from cosae.errors import CosaeError
from cosae.io.escape import printable
from cosae.run.requests import FeatureOptions, Place, Reading, SteerOptions


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
