"""One environment for each outside package, as its own pins want it; cosae is lent to them, never installed there.

python -m tests.interop.peers.environments [NAME …]   builds the named ones (all by default), prints their interpreters

They lie in $COSAE_PEERS (~/.cache/cosae-peers by default) and are built once; COSAE_NAME_PYTHON names another
interpreter. pip resolves everything a package asks for; left out are NVIDIA's libraries (a CPU needs none) and
torchvision (nothing here imports it, and a build for another torch breaks transformers).

    saelens, dictionary_learning, sparsify      test_saelens_peer.py, and all.py, which writes docs/INTEROP.md
    transformers_oldest, _pinned, _newest       tests/models/intervene/test_versions.py
    saebench                                    test_saebench_peer.py, and `cosae bench --python`
    circuit_tracer                              test_transcoders.py; its transcoders' classes alone
    neuronpedia, delphi, nnsight, transformer_lens    test_readers_peer.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "src"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LM = PROJECT["optional-dependencies"]["lm"]
TORCH = "torch==2.13.0"
COSAE_NEEDS = ("numpy", "safetensors", "scipy", "tqdm")
"""What `import cosae` and its readers take from the environment that borrows it."""
WHOLE = ("transformers", "tyro", "numba")
"""What the models, exports and splices of cosae take beside that; of cosae's own pinned versions."""
TESTED = (TORCH, *PROJECT["dependencies"][1:], *("pyarrow", "pytest", "pytest-xdist", "hypothesis"))
"""What the tests of models need beside transformers itself."""
WANTED: dict[str, tuple[str, ...]] = {
    "saelens": (TORCH, "sae-lens==6.54.12"),
    "dictionary_learning": (TORCH, "dictionary-learning==0.1.0"),
    "sparsify": (TORCH, "eai-sparsify==1.3.3"),
    "circuit_tracer": (TORCH, "safetensors", "huggingface-hub", "numpy", "einops", "pydantic"),
    "saebench": (TORCH, "sae-bench==0.6.0", "sae-probes==0.4.2"),
    "neuronpedia": (
        *(TORCH, *WHOLE, "neuronpedia==1.2.1"),
        *("einops", "eindex-callum", "jaxtyping", "dataclasses-json", "rich", "matplotlib", "datasets"),
    ),
    "delphi": (
        *(TORCH, *WHOLE),
        *("jaxtyping", "simple_parsing", "asyncer", "orjson", "blobfile", "beartype", "anyio"),
    ),
    "nnsight": (TORCH, *WHOLE, "nnsight==0.8.1", "accelerate"),
    "transformer_lens": (TORCH, *WHOLE, "transformer-lens==4.3.0"),
    "transformers_oldest": (*TESTED, next(need for need in LM if need.startswith("transformers")).replace(">=", "==")),
    "transformers_pinned": (*TESTED, "transformers"),
    "transformers_newest": (*TESTED, "transformers>0"),
}
ALONE: dict[str, tuple[str, ...]] = {"neuronpedia": ("sae-dashboard==0.8.0",), "delphi": ("eai-delphi==0.1.3",)}
ALONE["circuit_tracer"] = ("circuit-tracer==0.5.0",)
"""Installed without what they ask for: the rest of a dashboard; vllm, faiss, bitsandbytes, sentence-transformers."""
LEFT_OUT = ("nvidia", "torchvision", "triton")
MARK = ".complete"


def folder_of(name: str) -> Path:
    """$COSAE_PEERS/NAME, or a folder in the user's cache."""
    return Path(os.environ.get("COSAE_PEERS", Path.home() / ".cache" / "cosae-peers")) / name


def find_python(name: str) -> Path | None:
    """The interpreter: $COSAE_NAME_PYTHON, or that of the default folder; None where it was never built whole."""
    if named := os.environ.get(f"COSAE_{name.upper()}_PYTHON"):
        return Path(named) if Path(named).is_file() else None
    place = folder_of(name)
    return place / "bin" / "python" if (place / MARK).is_file() else None


def build(name: str, folder: Path | None = None) -> Path:
    """The interpreter of NAME's environment, built afresh where it is missing, unfinished or of other versions."""
    folder = folder or folder_of(name)
    python, wanted, alone = folder / "bin" / "python", (*WANTED[name], *COSAE_NEEDS), ALONE.get(name, ())
    if (folder / MARK).is_file() and (folder / MARK).read_text("utf-8").split() == [*wanted, *alone]:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        ours = ("-c", str(ROOT / "constraints.txt")) if "transformers" in wanted else ()
        subprocess.run([*pip, "--dry-run", "--report", str(report), *ours, *wanted], check=True)
        found = [entry["metadata"] for entry in json.loads(report.read_text("utf-8"))["install"]]
    pins = [f"{one['name']}=={one['version']}" for one in found if not one["name"].lower().startswith(LEFT_OUT)]
    subprocess.run([*pip, "--no-deps", *pins, *alone], check=True)
    (folder / MARK).write_text("\n".join((*wanted, *alone)), encoding="utf-8")
    return python


def run(python: Path, script: Path, *arguments: str, seconds: float = 1500) -> str:
    """What a script prints in that environment, with this checkout's cosae lent to it and no hub to wait for.

    Raises RuntimeError with the end of what it said where it fails.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": f"{SOURCE}{os.pathsep}{ROOT}",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as place:  # some packages write beside where they are run
        done = subprocess.run(
            [str(python), str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=environment,
            cwd=place,
        )
    if done.returncode:
        raise RuntimeError(f"{script.name} {' '.join(arguments)}\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    if unknown := [asked for asked in sys.argv[1:] if asked not in WANTED]:
        sys.exit(f"NAME must be one of {', '.join(WANTED)}. Got {unknown[0]!r} instead.")
    for asked in sys.argv[1:] or WANTED:
        print(asked, build(asked), flush=True)
