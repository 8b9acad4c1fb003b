"""Activations harvested, tokens per second, beside SAELens and sparsify: `python -m benchmarks.harvest`.

The embedded model on sequences of the embedded corpus, float32, batches of equal size. Two ends: activations in memory,
and on disk in each library's own format (sparsify has none). Every library runs in a process of its own, one after the
other in each round, in turning order. Nothing is printed for a way whose first batch is not the model's own
`hidden_states` to 1e-4.

The peers are installed from PyPI into environments of their own, $COSAE_PEERS/saelens and $COSAE_PEERS/sparsify
(default: ~/.cache/cosae-peers), each with the package and torch; those that are missing are left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import describe_machine, median_ratio
from cosae.models import embedded
from cosae.models.sites import resolve_site
from cosae.text.packing import sequences
from cosae.text.pylib import documents
from cosae.text.tokenization import tokenize_documents

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-4
"""Of the largest absolute value of the model's own answer."""
LIBRARIES = {"cosae": ("memory", "disk"), "SAELens": ("memory", "disk"), "sparsify": ("memory",)}


class Library:
    """A process of `benchmarks.harvest_worker`."""

    def __init__(self, name: str, python: str, job: dict[str, Any], scratch: Path) -> None:
        self.name, self.folder = name, scratch / name
        self.folder.mkdir()
        file = self.folder / "job.json"
        file.write_text(json.dumps({**job, "library": name, "folder": str(self.folder)}), "utf-8")
        path = [str(ROOT), *([os.environ["PYTHONPATH"]] if name == "cosae" and "PYTHONPATH" in os.environ else [])]
        own = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.harvest_worker", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "log.txt").open("w"),
            text=True,
            env={**os.environ, **own},
        )

    def ask(self, word: str, way: str) -> dict[str, float]:
        """One answer. Raises SystemExit with the end of the process' own words where it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{word} {way}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.name} ended:\n{(self.folder / 'log.txt').read_text()[-1500:]}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def end(self) -> None:
        """Close its input and wait for it."""
        try:
            self._process.communicate(timeout=20)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()


def find_pythons() -> dict[str, str]:
    """The interpreter of each library that is there."""
    folder = Path(os.environ.get("COSAE_PEERS", Path.home() / ".cache" / "cosae-peers"))
    peers = {name: folder / name.lower() / "bin" / "python" for name in LIBRARIES if name != "cosae"}
    return {"cosae": sys.executable, **{name: str(path) for name, path in peers.items() if path.exists()}}


def prepare(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """The job every library gets, and what the first batch must come to (N, D)."""
    model, tokenizer = embedded.load()
    tokens = tokenize_documents(documents("train"), tokenizer, add_bos=True, max_tokens=args.sequences * args.context)
    ids_ST = sequences(tokens, args.context, pad_id=tokenizer.pad_token_id).ids_ST
    np.save(scratch / "ids.npy", ids_ST.numpy())
    site = resolve_site(model, args.site)
    with torch.no_grad():
        states = model(ids_ST[: args.batch], output_hidden_states=True).hidden_states
    if site.name == f"resid_post.{len(states) - 2}":  # the last of them has the final norm on it
        raise SystemExit(f"{site.name} is behind the last hidden state that the model reports: choose an earlier site")
    job = {
        "model": str(embedded.model_path()),
        "ids": str(scratch / "ids.npy"),
        "site": site.name,
        "module_path": site.module_path,
        "d_in": int(states[0].shape[-1]),
        "batch": args.batch,
        "threads": args.threads,
    }
    return job, states[site.block + 1].flatten(0, 1)


def find_fault(library: Library, way: str, wanted_ND: torch.Tensor) -> str | None:
    """What is wrong with a way's first batch, or None."""
    library.ask("first", way)
    found_ND = torch.from_numpy(np.load(library.folder / f"{way}.npy"))
    if found_ND.shape != wanted_ND.shape:
        return f"its activations have the shape {tuple(found_ND.shape)}, not {tuple(wanted_ND.shape)}"
    error = float((found_ND - wanted_ND).abs().max() / wanted_ND.abs().max())
    return None if error < TOLERANCE else f"its activations are off by {error:.1e} of the largest"


def race(libraries: Sequence[Library], rounds: int, clock: str) -> dict[tuple[str, str], list[float]]:
    """Seconds of every way, round by round."""
    contestants = [(library, way) for library in libraries for way in LIBRARIES[library.name]]
    seconds: dict[tuple[str, str], list[float]] = {(library.name, way): [] for library, way in contestants}
    for turn in range(-1, rounds):  # the first round warms up
        for step in range(len(contestants)):
            library, way = contestants[(turn + step) % len(contestants)]
            taken = library.ask("go", way)[clock]
            if turn >= 0:
                seconds[library.name, way].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("sequences", 64), ("context", 256), ("batch", 16), ("rounds", 9), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--site", default="resid_post.4", help="resid_post.N, not the last")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()
    args.sequences -= args.sequences % args.batch
    torch.set_num_threads(args.threads)
    pythons = find_pythons()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        job, wanted_ND = prepare(args, scratch)
        libraries = [Library(name, python, job, scratch) for name, python in pythons.items()]
        try:
            faults = {
                f"{library.name}, {way}": fault
                for library in libraries
                for way in LIBRARIES[library.name]
                if (fault := find_fault(library, way, wanted_ND))
            }
            if faults:
                sys.exit("\n".join(f"not reported: {name}: {fault}" for name, fault in faults.items()))
            seconds = race(libraries, args.rounds, args.clock)
        finally:
            for library in libraries:
                library.end()
    n_tokens = args.sequences * args.context
    print(describe_machine())
    print(f"{n_tokens} tokens a call, batches of {args.batch} × {args.context}, {args.site} ({args.clock} time)")
    for (name, way), taken in seconds.items():
        speed, ratio = n_tokens / statistics.median(taken), median_ratio(taken, seconds["cosae", way])
        print(f"{name:10} {way:8} {speed:9.0f} tokens/s   {ratio:5.2f} × the seconds of cosae, {way}")
    for name in LIBRARIES.keys() - pythons.keys():
        print(f"{name} was left out: no environment for it (see the top of benchmarks/harvest.py)")


if __name__ == "__main__":
    main()
