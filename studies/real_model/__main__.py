"""The study, one command, over as many sittings as it takes: what is there already is kept.

    python -m studies.real_model              capture, run, saebench, write the page (hours on two cores)
    python -m studies.real_model STAGE …      capture, run, saebench, page: these alone

First: cosae fetch smollm2, cosae fetch wiki, cosae fetch sae-probes.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from cosae.recipe import DataConfig
from cosae.run.capture.request import Capture
from cosae.run.capture.stores import capture_stores
from studies.real_model import measured, saebench, second_sink, texts
from studies.real_model.design import BLOCKS, CONTEXT, CORPUS, HELD_OUT_TOKENS, MODEL, STORES, TRAIN_TOKENS
from studies.runsets import REAL_CLOSELY, SEEDS

ORDER = (
    *("real_14", "real_10", "real_12", "real_14_unfiltered", "real_28"),
    *("real_11", "real_18", "real_24", "real_14_reweighted"),
)
"""Sets of runs, what the verdict needs most first."""
LAST = "real_14_wide"
"""Takes four times as long as any other."""


def capture() -> None:
    """Activations of all sites, and the labelled texts."""
    data = DataConfig(model=MODEL, corpus=CORPUS, context=CONTEXT, packing="document")
    sites = tuple(f"resid_post.{block}" for block in BLOCKS)
    capture_stores(Capture(data, sites, TRAIN_TOKENS, HELD_OUT_TOKENS), STORES)
    texts.ensure()


def run() -> None:
    """Train and measure every run, two at a time, a thread each; checkpoints go once a run is finished."""
    jobs = [(name, seed, "run") for name in ORDER for seed in SEEDS]
    closely = [f"real_{block}" for block in REAL_CLOSELY]
    jobs += [(name, seed, kind) for name in closely for kind in ("sharing", "splice") for seed in SEEDS]
    jobs += [("real_14", seed, "discovery") for seed in SEEDS] + [(LAST, seed, "run") for seed in SEEDS]
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for future in [pool.submit(measured.one, *job) for job in jobs]:
            future.result()


def bench() -> None:
    """Block 14 and block 10 through SAEBench's own code."""
    if not saebench.python().is_file():
        where = "python -m tests.interop.peers.environments saebench"
        print(f"studies.real_model: left out, SAEBench's environment is not there: {where}", file=sys.stderr)
        return
    saebench.ensure()
    second_sink.ensure()


def page() -> None:
    """RESULT.md, numbers.json and the figures from what is there."""
    from studies.real_model.result import write

    write()


STAGES = {"capture": capture, "run": run, "saebench": bench, "page": page}

if __name__ == "__main__":
    asked = sys.argv[1:] or list(STAGES)
    if unknown := [stage for stage in asked if stage not in STAGES]:
        sys.exit(f"studies.real_model: a stage is one of {', '.join(STAGES)}. Got {unknown[0]!r} instead.")
    for stage in asked:
        STAGES[stage]()
