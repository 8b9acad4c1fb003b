"""Makes the environments in which the exports and hooks meet the real packages.

    python tests/share/peers/build_readers.py FOLDER [NAME…]

One virtual environment FOLDER/NAME each, of Python's own venv: neuronpedia, delphi, nnsight, transformer_lens. cosae
itself is lent to them on PYTHONPATH. Then: COSAE_PEERS=FOLDER pytest -m slow tests/share/test_readers_peer.py
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[3]
OURS = ("torch==2.13.0", "transformers", "scipy", "safetensors", "tyro", "tqdm", "numba")
"""What cosae needs of a peer's environment; torch pinned, so that no newer build comes."""
PACKAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "neuronpedia": (
        (
            *OURS,
            "neuronpedia==1.2.1",
            "einops",
            "eindex-callum",
            "jaxtyping",
            "dataclasses-json",
            "rich",
            "matplotlib",
            "datasets",
        ),
        ("--no-deps", "sae-dashboard==0.8.0"),
    ),
    # vllm, faiss, bitsandbytes and sentence-transformers have no part in loading a cache and stay out
    "delphi": (
        (*OURS, "jaxtyping", "simple_parsing", "asyncer", "orjson", "blobfile", "beartype", "anyio"),
        ("--no-deps", "eai-delphi==0.1.3"),
    ),
    "nnsight": ((*OURS, "nnsight==0.8.1", "accelerate"),),
    "transformer_lens": ((*OURS, "transformer-lens==4.3.0"),),
}


def build(folder: Path, name: str) -> None:
    place = folder / name
    if not (place / "bin" / "python").exists():
        venv.create(place, with_pip=True, symlinks=True)
    for packages in PACKAGES[name]:
        pinned = () if "--no-deps" in packages else ("-c", str(ROOT / "constraints.txt"))
        subprocess.run([place / "bin" / "python", "-m", "pip", "install", "-q", *pinned, *packages], check=True)


if __name__ == "__main__":
    for wanted in sys.argv[2:] or PACKAGES:
        build(Path(sys.argv[1]), wanted)
