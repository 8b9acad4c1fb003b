"""The commands of `cosae` for stores of activations: capture, verify."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cosae.cli.options import RecipeOptions, logger, progress
from cosae.errors import CosaeError
from cosae.shown import counted


@dataclass(frozen=True, kw_only=True)
class Capture(RecipeOptions):
    """Write a model's activations to disk once, to train on them many times with `cosae train --store`.

    After an interruption the same command continues, and ends with the same bytes.
    Example: cosae capture --site resid_post.3 resid_post.5 --tokens 2000000 --out stores/embedded
    """

    out: Path
    """Folder for the store; with several sites, each gets a store in it."""
    tokens: int
    """Number of training tokens to capture; those of --held-out-tokens come on top."""
    held_out_tokens: int | None = None
    """Number of tokens of held-out documents to capture, for thresholds and evaluation; 0 for none. Default: as many as
    of training, at most 196 608."""
    site: tuple[str, ...] = ()
    """One or several sites: resid_post.5, mlp_out.3, blocks.3.hook_resid_post, model.layers.3, …"""
    store_dtype: str = "bfloat16"
    """Precision on disk: float32, bfloat16, float16, or int8 with a scale per row."""
    shard_tokens: int | None = None
    """Tokens per file. Default: about 128 MB."""


@dataclass(frozen=True, kw_only=True)
class PlanCapture(Capture):
    """Print the memory, disk and time that a capture needs; nothing is written. Takes the options of capture."""

    out: Path = Path("stores/plan")
    """Folder to which the store would be written; its disk is checked."""
    tokens: int = 1_000_000
    """Number of training tokens to capture; those of --held-out-tokens come on top."""


@dataclass(frozen=True)
class Verify:
    """Read every byte of a store and name damaged files. The exit status is 1 if there are any."""

    store: Annotated[Path, tyro.conf.Positional]
    """Folder of a store, or of several."""


def build_capture(command: Capture) -> Any:
    """What a `capture` command line asks for. Raises CosaeError for what it does not allow."""
    from cosae.run.capture.request import Capture as CaptureRequest

    recipe = command.changed_recipe({"data.site": command.site[0] if command.site else None})
    amounts = command.tokens, command.held_out_tokens, command.store_dtype, command.shard_tokens
    sites = command.site or (recipe.data.site,)
    return CaptureRequest(recipe.data, sites, *amounts, recipe.training.seed, recipe.device)


def capture(command: Capture) -> int:
    """Write the stores, or say what they would take."""
    from cosae.run.capture.stores import capture_stores
    from cosae.run.plan.check import plan_capture, screen

    request, log = build_capture(command), logger(command.quiet)
    if command.dry_run or isinstance(command, PlanCapture):
        print(screen(plan_capture(request, command.out, progress(command.quiet))))
        return 0
    stores = capture_stores(request, command.out, progress=progress(command.quiet), log=log)
    for store in stores:
        print(f"{store}: {_summary(store)}")
    print(f"Train on it with: cosae train --store {stores[0]} --out RUN")
    return 0


def go_on_capturing(out: Path) -> str:
    """What a person can do after an interruption, and what there is to go on from."""
    from cosae.activations.store.reader import find_stores
    from cosae.activations.store.writer import rows_written

    rows = [rows_written(place) for place in find_stores(out)]
    written = f"{counted(min(rows), 'token')} {'is' if min(rows) == 1 else 'are'} written" if any(rows) else ""
    return f"{written or 'Nothing was written yet'}. Go on with the same command."


def verify(command: Verify) -> int:
    """Every fault on standard output."""
    from cosae.activations.store.reader import Store, find_stores

    places = find_stores(command.store)
    if not places:
        raise CosaeError(f"{command.store} holds no store (no index.json in it or below it): check the path.")
    sound = True
    for place in places:
        try:
            faults = list(Store(place, check=False).faults())
        except CosaeError as error:
            faults = [str(error)]
        for fault in faults:
            print(f"cosae: {fault}", file=sys.stderr)
        print(f"{place}: {f'damaged, {len(faults)} of its files' if faults else f'complete; {_summary(place)}'}")
        sound &= not faults
    return 0 if sound else 1


def inspect_store(folder: Path) -> dict[str, Any]:
    """What a store is, without its long lists."""
    from cosae.activations.store.reader import Store

    store = Store(folder)
    record, statistics = store.record, store.statistics
    return {
        "format": record["format"],
        "request": {k: v for k, v in record["request"].items() if k != "concepts"},
        "concepts": len(store.concepts or ()),
        "rows": record["rows"],
        "documents": {side: len(names) for side, names in record["documents"].items()},
        "shards": len(record["shards"]),
        "bytes": sum(entry["bytes"] for entry in record["shards"]),
        "statistics": {k: v for k, v in statistics.items() if k != "mean"},
        "written_by": record["written_by"],
    }


def _summary(folder: Path) -> str:
    from cosae.activations.store.reader import Store

    store = Store(folder)
    size = sum(entry["bytes"] for entry in store.record["shards"]) / 1e6
    rows = f"{store.n_rows('train'):,} train and {counted(store.n_rows('held_out'), 'held-out token')}"
    return (
        f"{rows}, width {store.d_in}, {store.dtype}, {size:.3g} MB in {counted(len(store.record['shards']), 'shard')}"
    )
