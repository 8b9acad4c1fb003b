"""Build the peers' environments, run every check in them, and write docs/INTEROP.md from what they say.

python -m tests.interop.peers.all        minutes; environments that exist already are used as they are

environments.py builds them, and those of the other slow tests, one by one; it lists which test needs which.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from cosae.interop.read import read_sae
from tests.interop.peers.environments import build, find_python, run
from tests.support.foreign_files import WRITERS, inputs, write

HERE = Path(__file__).resolve().parent

PAGE = HERE.parents[2] / "docs" / "INTEROP.md"
CHECKS = {
    "dictionary_learning": "dictionary_learning_checks.py",
    "sparsify": "sparsify_checks.py",
    "saelens": "saelens_checks.py",
}
HEAD = """# Differences against other libraries

Written by `tests/interop/peers/all.py` from the real packages, each in its own environment: the largest difference over
features and reconstructions of some hundred random inputs, relative to the largest value of the source's own answer.
Gemma Scope has no package: its files go through SAELens' loaders for them. The paper's files are held against its
formulae (§1, §4) in float64. [interop/README.md](interop/README.md) says what each format loses.

| format | source | direction | architecture | largest relative difference |
|---|---|---|---|---|
"""


def measure(name: str) -> list[dict[str, Any]]:
    """Rows of one package, from its environment. Raises RuntimeError where a check fails."""
    python = find_python(name)
    assert python is not None, f"{name} was never built"
    said = json.loads(run(python, HERE / CHECKS[name]).splitlines()[-1])
    return [{**row, "source": said["package"]} for row in said["rows"]]


@torch.no_grad()
def paper() -> list[dict[str, Any]]:
    """Rows of the paper's checkpoints, against its formulae."""
    rows = []
    for kind in WRITERS["cosine_paper"][1]:
        with tempfile.TemporaryDirectory() as scratch:
            written = write("cosine_paper", kind, Path(scratch) / "sae")
            sae = read_sae(written.folder)
        codes = sae.encode(inputs())
        features, recon = written.answer(inputs())
        pairs = ((codes.to_dense().double(), features), (sae.decode(codes).double(), recon))
        worst = max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)
        rows.append({"format": "the paper", "direction": "read", "architecture": kind, "difference": worst})
    return [{**row, "source": "formulae, float64"} for row in rows]


def page(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        f"| {r['format']} | {r['source']} | {r['direction']} | {r['architecture']} | {r['difference']:.1e} |"
        for r in rows
    ]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = paper()
    for one in CHECKS:
        build(one)
        found += measure(one)
    PAGE.write_text(page(found), encoding="utf-8")
    print(PAGE, max(row["difference"] for row in found))
