"""`cosae capture`: a model's activations on a corpus, written once, to be trained on many times.

    documents → tokens → sequences → one forward for all sites → one store a site

The held-out side is written first, so that even a store that is cut short can be measured on; a document's side is a
function of the document alone. A forward pass depends on nothing but its own chunk of sequences, so a capture that
goes on writes what one that never stopped would have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cosae.activations.store.format import SIDES
from cosae.activations.store.reader import find_stores
from cosae.activations.store.shards import ShardRows
from cosae.activations.store.writer import StoreWriter, started_request
from cosae.errors import CosaeError
from cosae.io.digest import file_digest
from cosae.io.legacy import V01_ORDER
from cosae.io.lock import LOCK, hold
from cosae.io.progress import SILENT, Progress
from cosae.io.signals import stop_on_signals
from cosae.io.values import to_plain
from cosae.recipe import DataConfig
from cosae.run import provenance
from cosae.run.capture.media import CaptureMedia, open_corpus
from cosae.run.capture.request import Capture
from cosae.run.capture.text import CaptureText, Part
from cosae.run.dataset.corpus import check_corpus
from cosae.run.dataset.model import batch_size, open_model
from cosae.run.plan.check import check_capture
from cosae.shown import counted
from cosae.types import Activations, Site

UNRELATED = [
    "site",
    "target",
    "activations",
    "activations_key",
    "world",
    "store",
    "store_site",
    "n_workers",
    "prefetch_chunks",
]
"""Fields of a recipe's data that decide nothing of what is captured."""


def capture_stores(
    request: Capture,
    out: Path,
    *,
    progress: Progress = SILENT,
    log: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Write, or go on writing, the stores; returns their folders.

    Raises CosaeError for a model, site or corpus that cannot be read, what cannot fit in memory or on disk, a folder
    that holds something else or that another capture is writing, and a disk that refuses; KeyboardInterrupt after
    Ctrl-C or SIGTERM, at once: complete shards are kept, what is on its way to one is captured again by the same call,
    which resumes.
    """
    check_corpus(request.data)
    request = request.as_begun(out)
    check_capture(request, out)
    with stop_on_signals(at_once=KeyboardInterrupt()) as progress.stop:
        return _capture(request, out, progress, log)


def _capture(request: Capture, out: Path, progress: Progress, log: Callable[[str], None]) -> list[Path]:
    from cosae.models.capture import capture
    from cosae.models.sites import resolve_site

    with progress.phase("loading model"):
        opened = open_model(request.data, request.device)
    model = opened[0]
    sites = [resolve_site(model, name) for name in request.sites]
    if len(set(sites)) < len(sites):
        raise CosaeError(f"each site may be named once. Got {', '.join(request.sites)} instead.")
    if request.data.batch_sequences == "auto":
        at_once = started_with(out, "batch_sequences") or batch_size(request.data, model, sites, "float32")
        request = replace(request, data=replace(request.data, batch_sequences=at_once))
    text = open_corpus(request.data, opened, request.sites[0], request.seed, request.n_held_out)
    train, held_out = counted(request.tokens, "train token"), counted(request.n_held_out, "held-out token")
    log(f"capturing {train}, and {held_out} on top")
    with closing(text):
        first = next(text.parts("train", 1)).sequences[:1]
        widths = {site: int(capture(model, first, site)[site.name].x_ND.shape[1]) for site in sites}
        with hold(out):  # two captures into one folder would take each other's shards for their own
            try:
                return _write(request, out, model, text, widths, progress, log)
            finally:
                # A store is its own files, the same bytes whoever wrote them. Removed while it is held and nothing more
                # is written: who has opened it already finds it gone once locked (filelock looks), and opens the next
                (out / LOCK).unlink(missing_ok=True)


def _write(
    request: Capture,
    out: Path,
    model: Any,
    text: CaptureText | CaptureMedia,
    widths: Mapping[Site, int],
    progress: Progress,
    log: Callable[[str], None],
) -> list[Path]:
    """The stores' folders, written to their end."""
    from cosae.models.capture import capture

    writers = _writers(request, out, model, text, widths, log)
    folders = [writer.folder for writer in writers.values()]
    if all(writer.finished for writer in writers.values()):
        log(f"{out} is complete")
        return folders
    told = set(text.warnings)
    for warning in text.warnings:
        log(warning)
    # in float32 whatever the store's dtype: rows are centred, and scales taken, before any rounding
    options: dict[str, Any] = {"batch_sequences": request.data.batch_sequences, "on_rows": progress.rows}
    documents: dict[str, Sequence[str]] = {}
    before = 0
    there = min(sum(writer.n_rows(side) for side in SIDES) for writer in writers.values())
    with progress.phase("capturing", request.tokens + request.n_held_out, done=there):
        for side in SIDES:
            done = 0
            for part in text.parts(side, request.tokens):
                n = part.n_rows
                missing = [w for w in writers.values() if not w.finished and w.n_rows(side) < done + n]
                if missing:
                    found = capture(model, part.sequences, list(widths), **options)
                    for site, writer in writers.items():
                        if writer in missing:
                            writer.append(side, done, _rows(found[site.name], part)[:n])
                done += n
                progress.reached(before + done)
            before += done
            documents[side] = text.names(side)
            for writer in writers.values():
                writer.end(side)
    for side, asked in (("train", request.tokens), ("held_out", request.n_held_out)):
        if text.n_rows[side] < asked:
            log(f"the {side} side of the corpus ended after {text.n_rows[side]:,} of {counted(asked, 'token')}")
    for warning in (w for w in text.warnings if w not in told):
        log(warning)
    for writer in writers.values():
        if not writer.finished:
            writer.finish(documents)
    return folders


def started_with(out: Path, setting: str) -> Any:
    """What a store in `out` was started with, so that a size that was measured is kept; None where there is none."""
    return next((started_request(place).get(setting) for place in find_stores(out)), None)


def _rows(found: Activations, part: Part) -> ShardRows:
    """Captured rows with their labels, documents numbered across both sides."""
    doc_N = torch.where(found.doc_N >= 0, found.doc_N + part.first_document, found.doc_N)
    return ShardRows(replace(found, doc_N=doc_N.to(torch.int32)), *part.labels(found))


def _writers(
    request: Capture,
    out: Path,
    model: Any,
    text: CaptureText | CaptureMedia,
    widths: Mapping[Site, int],
    log: Callable[[str], None],
) -> dict[Site, StoreWriter]:
    data = {k: v for k, v in to_plain(request.data).items() if k not in UNRELATED}
    record = {
        **data,
        "revision": getattr(model.config, "_commit_hash", None) or data["revision"],
        "model_sha256": _digest_of(request.data.model),
        "model_type": getattr(model.config, "model_type", type(model).__name__),
        "attention": getattr(model.config, "_attn_implementation", None),
        **text.record,
        "seed": request.seed,
        "tokens": request.tokens,
        "held_out_tokens": request.n_held_out,
    }
    if (quantized := getattr(model, "quantization", None)) is not None:
        record["quantization"] = quantized
    for name in ("inputs", "positions"):  # which were not written before there was a choice
        if record[name] == getattr(DataConfig, name):
            del record[name]
    if request.data.order == V01_ORDER:
        del record["order"]  # which 0.1 did not write
    written_by = {"commit": provenance.commit(), "packages": provenance.packages(), "threads": torch.get_num_threads()}
    label_bytes = -(-len(text.concepts or ()) // 8)
    return {
        site: StoreWriter(
            out / site.name if len(widths) > 1 else out,
            {**record, "site": site.to_record()},
            written_by,
            d_in=d_in,
            dtype=request.dtype,
            shard_tokens=request.rows_per_shard(d_in, label_bytes),
            concepts=text.concepts,
            log=log,
        )
        for site, d_in in widths.items()
    }


def _digest_of(model: str) -> str | None:
    """SHA-256 over a local model's weights; None for one of the hub, which its revision names."""
    from cosae.models.embedded import embedded_path
    from cosae.models.load import place_of

    folder = embedded_path(model) or Path(place_of(model))
    if not folder.is_dir():
        return None
    running = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
        if path.is_file():
            running.update(path.name.encode() + bytes.fromhex(file_digest(path)))
    return running.hexdigest()
