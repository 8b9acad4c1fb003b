"""The feature browser at size: a store built from made-up tokens, and a server on one.

    python -m benchmarks.browse build OUT --features 16384 --tokens 2000000
    python -m benchmarks.browse serve OUT

`build` prints processor seconds, peak memory and bytes of state a feature; `serve` the times of requests to a fresh
server, and its memory.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosae.browse.collect.build import build_store, planned_bytes
from cosae.browse.collect.building import BuildOptions, Listed
from cosae.browse.collect.chunks import Chunk
from cosae.browse.store.reader import open_store
from cosae.io.progress import Progress
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.types import Activations

D, ATOMS, ACTIVE, CONTEXT, CHUNK, WORDS = 64, 8192, 8, 128, 8192, 30_000


class MadeUp:
    """Sequences of CONTEXT tokens, each a sum of a few of ATOMS directions, with norms that vary (a `Source`)."""

    model, site, corpus, context, concepts = "made up", "resid_post.0", "numbers", CONTEXT, ()

    def __init__(self, tokens: int) -> None:
        self.total = tokens
        self.identity: dict[str, Any] = {"tokens": tokens}
        self.atom_AD = torch.randn(ATOMS, D, generator=torch.Generator().manual_seed(0))

    def rows(self, number: int) -> Activations:
        draw = np.random.default_rng([1, number])
        n = min(CHUNK, self.total - number * CHUNK)
        atom = torch.from_numpy((ATOMS * draw.random((n, ACTIVE)) ** 2).astype(np.int64))
        x_ND = (self.atom_AD[atom] * torch.from_numpy(draw.random((n, ACTIVE, 1))).float()).sum(1)
        x_ND *= torch.from_numpy(draw.lognormal(0, 0.3, (n, 1))).float()
        place = torch.arange(n) + number * CHUNK
        position, doc = (place % CONTEXT).int(), (place // (8 * CONTEXT)).int()
        ids = (atom[:, 0] * WORDS // ATOMS).int()
        return Activations(x_ND, x_ND.norm(dim=1), ids, doc, position, position, torch.zeros(n, dtype=torch.bool))

    def chunks(self, skip: int) -> Iterator[Chunk]:
        for number in range(skip, -(-self.total // CHUNK)):
            found = self.rows(number)
            names = {int(doc): f"document {doc}" for doc in found.doc_N.unique().tolist()}
            yield Chunk(found, number * CHUNK, number * CHUNK // CONTEXT, names)

    def spell(self, token: int) -> str:
        return f" word{token}"

    def logits(self, rows_FD: Any) -> None:
        return None


def build(out: Path, features: int, tokens: int, saes: int) -> None:
    source = MadeUp(tokens)
    sample_ND = source.rows(0).x_ND
    listed = {}
    for seed, score in zip(range(saes), ("inner", "cosine"), strict=False):
        sae = SAE.build(D, features, score, k=32, seed=seed, sample=sample_ND)
        calibrate(sae, sample_ND)
        listed[score] = Listed(sae, score)
    memory, disk = planned_bytes({name: one.sae for name, one in listed.items()}, BuildOptions().window)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    build_store(out, source, listed, BuildOptions(), Progress())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n = features * saes
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{n:,} features, {tokens:,} tokens: {time.process_time() - start:.0f} s of processor time")
    print(f"memory: peak {peak / 2**10:,.0f} MB, {before / 2**10:,.0f} MB before; {memory / n:,.0f} bytes a feature")
    print(f"disk: up to {disk / n:,.0f} bytes a feature meanwhile; the store has {size / 2**20:,.0f} MB")


def serve(out: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "cosae", "browse", str(out), "--port", "0", "--quiet"], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        begun = time.perf_counter()
        found = re.search(r"http://\S+/", server.stdout.readline())
        assert found is not None
        print(f"announced after {time.perf_counter() - begun:.1f} s")
        first, *_ = names = [one.name for one in open_store(out).saes]
        n = open_store(out).saes[0].d_sae

        def ask(path: str) -> float:
            start = time.perf_counter()
            urllib.request.urlopen(f"{found[0]}data/{path}").read()
            return 1000 * (time.perf_counter() - start)

        table = f"table?sae={first}"
        requests = (table, f"feature?sae={first}&id=5", "about", f"{table}&sort=norm_driven&offset={n - 50}")
        for path in (*requests, f"{table}&q=word4242", f"scatter?sae={first}"):
            print(f"{path:50} first {ask(path):5.0f} ms, then {ask(path):5.0f} ms")
        draw = random.Random(0)
        times = sorted(ask(f"feature?sae={draw.choice(names)}&id={draw.randrange(n)}") for _ in range(60))
        print(f"a feature: median {times[30]:.0f} ms, slowest {times[-1]:.0f} ms")
        status = Path(f"/proc/{server.pid}/status").read_text("utf-8")
        for name, size in re.findall(r"(VmHWM|VmRSS):\s+(\d+)", status):
            print(f"{name} {int(size) / 1024:.0f} MB")
        server.send_signal(signal.SIGINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "serve"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--saes", type=int, default=1, choices=[1, 2])
    given = parser.parse_args()
    if given.what == "build":
        build(given.out, given.features, given.tokens, given.saes)
    else:
        serve(given.out)


if __name__ == "__main__":
    main()
