"""One function that reads an SAE of any library there is a reader for; nothing in the files is ever run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from cosae.errors import CosaeError, check_choice
from cosae.interop import cosine_paper, gemma_scope, goodfire, llama_scope, sparsify, transcoders
from cosae.interop.dictionary_learning import read as dictionary_learning
from cosae.interop.saelens import files as saelens_files
from cosae.io.kind import which_is
from cosae.io.untrusted import read_json
from cosae.sae import file as own
from cosae.sae.model import SAE

READERS: dict[str, Callable[[Path], SAE]] = {
    "cosae": own.load,
    "saelens": saelens_files.read,
    "dictionary_learning": dictionary_learning.read,
    "gemma_scope": gemma_scope.read,
    "sparsify": sparsify.read,
    "llama_scope": llama_scope.read,
    "goodfire": goodfire.read,
    "cosine_paper": cosine_paper.read,
    "circuit_tracer": transcoders.read_layer,
}
FORMATS = tuple(READERS)
RENAMED = {"authors": "cosine_paper"}  # names of 0.1, which still work


def read_sae(path: str | Path, *, format: str = "auto", device: str | torch.device = "cpu") -> SAE:
    """The SAE at `path`, a folder or a file; its `metadata["format"]` says whose it was where it is not cosae's own.

    Raises CosaeError, in one sentence, for a path that does not exist, no known format, or files that cannot be read.
    """
    path, format = Path(path), RENAMED.get(format, format)
    check_choice("format", format, ("auto", *FORMATS))
    try:
        there = path.exists()
    except OSError as error:
        raise CosaeError(f"{str(path)[:80]}… cannot be looked at ({error.strerror}): give an SAE's path.") from None
    if not there:
        raise CosaeError(f"{path} does not exist: give the folder or file of an SAE.")
    return READERS[detect(path) if format == "auto" else format](path).to(device)


def detect(path: Path) -> str:
    """The format of what lies at `path`, by its files' names and cosae's mark. Raises CosaeError where none fits."""
    if path.is_file():
        if path.suffix == ".npz" or path.name == gemma_scope.WEIGHTS:
            return "gemma_scope"
        if path.suffix == ".pt":
            return "cosine_paper"
        if path.suffix == goodfire.SUFFIX:
            return "goodfire"
        if transcoders.LAYER.fullmatch(path.name):
            return "circuit_tracer"
        files = f"an SAE's folder, a params.npz, a layer_N.safetensors or a {cosine_paper.NAME}"
        raise CosaeError(f"{path}{which_is(path)} is of no known format: give {files}.")
    try:
        there = {child.name for child in path.iterdir()}
    except OSError as error:
        raise CosaeError(f"{path} cannot be read ({error.strerror}): it must be a file or a folder.") from None
    if own.CONFIG in there and own.WEIGHTS in there:
        marked = read_json(path / own.CONFIG).get("format") == own.FORMAT
        return "cosae" if marked else "saelens"
    signs = (
        ("sparsify", {sparsify.CONFIG, sparsify.WEIGHTS}),
        ("dictionary_learning", {dictionary_learning.WEIGHTS, dictionary_learning.CONFIG}),
        ("cosine_paper", {cosine_paper.NAME}),
        ("gemma_scope", {gemma_scope.ARCHIVE}),
        ("gemma_scope", {gemma_scope.WEIGHTS}),
    )
    if found := next((name for name, needed in signs if needed <= there), None):
        return found
    if llama_scope.CONFIG in there and (path / llama_scope.WEIGHTS).is_file():
        return "llama_scope"
    if any(name.endswith(goodfire.SUFFIX) for name in there):
        return "goodfire"
    raise CosaeError(
        f"{path}{which_is(path)} holds no SAE of a known format: cfg.json with sae_weights.safetensors or "
        "sae.safetensors, config.json "
        f"with ae.pt, params.npz, params.safetensors, {llama_scope.CONFIG} with {llama_scope.WEIGHTS}, a .pth file or "
        f"{cosine_paper.NAME}."
    )
