"""One streaming pass over tokens, for several SAEs of one site at once → a feature store.

    chunks → each SAE: codes → numbers, examples with their windows, codes of the first tokens, pairs of features
           → at the end the store's files, written beside `out` and put in place in one step

Memory: what `planned_bytes` says, whatever the number of tokens. What grows with it lies on disk in a working folder
beside `out`, which a pass that was interrupted goes on from, to the same store.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from cosae.browse.collect.building import Building, BuildOptions, Listed
from cosae.browse.collect.chunks import Source
from cosae.browse.collect.examples import Examples
from cosae.browse.collect.finish import write_store
from cosae.browse.collect.state import SAEState
from cosae.browse.collect.windows import Windows
from cosae.browse.store.format import RECORD
from cosae.errors import CosaeError
from cosae.io.lock import hold
from cosae.io.progress import SILENT, Progress
from cosae.io.staged import filled
from cosae.sae.model import SAE


def planned_bytes(saes: Mapping[str, SAE], window: int) -> tuple[int, int]:
    """Memory and, beside 9 bytes a token and 5 an SAE, disk that a pass needs while it runs, whatever its length."""
    memory = disk = 0
    for sae in saes.values():
        signed = sae.cfg.selector == "abs_topk"
        memory += SAEState.bytes(sae.d_sae, signed)
        disk += Windows.bytes(sae.d_sae, Examples(1, signed, 0).slots, window)
    return memory, disk


def build_store(
    out: Path, source: Source, saes: Mapping[str, Listed], options: BuildOptions, progress: Progress = SILENT
) -> Path:
    """Build the store at `out`, or go on building it.

    Raises CosaeError for SAEs of different widths or without a threshold, a working folder of another build, one that
    another process is writing, no tokens, a disk that refuses, and where `out` holds something else.
    """
    options.check()
    _check(saes)
    work = out.with_name(f".{out.name}.building")
    with hold(work):
        building = Building(work, source, saes, options)
        with progress.phase("reading features", max(source.total, 1), done=building.tokens.count):
            for chunk in building.chunks():
                building.read(chunk)
                progress.advance(len(chunk))
        if not building.tokens.count:
            raise CosaeError("a feature store needs at least one token. Got none: give more text.")
        building.complete()
        with filled(out, RECORD) as staged:
            write_store(staged, building, progress)
    shutil.rmtree(work, ignore_errors=True)
    return out


def _check(saes: Mapping[str, Listed]) -> None:
    if not saes:
        raise CosaeError("a feature store needs at least one SAE.")
    widths = {name: one.sae.d_in for name, one in saes.items()}
    if len(set(widths.values())) > 1:
        raise CosaeError(f"the SAEs of one store read one site, and so have one width. Got {widths} instead.")
    for name, one in saes.items():
        if not one.sae.calibrated:
            raise CosaeError(f"{name} has no inference threshold yet: set one with cosae calibrate.")
