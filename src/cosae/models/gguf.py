"""GGUF files as models: dequantised once, in float32, into the cache, as a folder that is read like any other.

The cache knows a file by its digest, so a file that was moved is not converted again and one that was changed is.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cosae.errors import CosaeError, CosaeWarning
from cosae.io.atomic import written
from cosae.io.digest import file_digest
from cosae.io.fetched.cache import cache_folder
from cosae.io.kind import which_is
from cosae.io.staged import staged
from cosae.io.untrusted import one_line, read_json

RECORD = "gguf.json"
MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a file says that it is one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def dequantised(path: Path) -> Path:
    """The folder that a GGUF file's model and tokenizer lie in, as `save_pretrained` writes one; made where it is not
    there yet, which a warning says.

    Raises CosaeError without transformers or the package gguf, for a file that transformers cannot read, and a disk
    that refuses.
    """
    sha256 = file_digest(path)
    out = cache_folder() / "gguf" / sha256[:32]
    if not out.is_dir():
        kinds = _kinds(path)
        message = f"{path.name} is dequantised to float32, once, into {out}; this takes a while"
        warnings.warn(CosaeWarning(message), stacklevel=2)
        with written(out, "make room, or set XDG_CACHE_HOME to another place"), staged(out) as folder:
            _convert(path, folder)
            record = {"sha256": sha256, "tensors": kinds}
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return out


def quantization(folder: Path) -> dict[str, Any] | None:
    """How the weights of a folder that `dequantised` made were quantised, for records; None of any other."""
    return read_json(folder / RECORD) if (folder / RECORD).is_file() else None


def _kinds(path: Path) -> dict[str, int]:
    """How many tensors are quantised in which way."""
    try:
        import gguf
        import transformers  # noqa: F401
    except ImportError:
        raise CosaeError(f"Reading the GGUF file {path.name} needs gguf: pip install 'cosae[lm,gguf]'.") from None
    with _one_sentence(path):
        return dict(Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors).most_common())


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Whatever readers of untrusted files raise, and that is nearly anything, as one sentence."""
    try:
        yield
    except Exception as error:
        raise CosaeError(f"'{path}'{which_is(path)} cannot be read by transformers: {one_line(error)}.") from error


def _convert(path: Path, folder: Path) -> None:
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    auto: Any = transformers
    read_weights: Any = load_gguf_checkpoint
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # the bar knows nothing of ours; arrays that may not be written to are not
    with _one_sentence(path), warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        tokenizer = auto.AutoTokenizer.from_pretrained(**where)
        config = auto.AutoConfig.from_pretrained(**where)
        with torch.device("meta"):
            sketch = auto.AutoModelForCausalLM.from_config(config)
        # what `from_pretrained(gguf_file=…)` reads, which asks for accelerate
        read = read_weights(str(path), return_tensors=True, model_to_load=sketch)["tensors"]
    weights = {name: tensor.to(torch.float32).contiguous() for name, tensor in read.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # they are floats now
    config.architectures = [type(sketch).__name__]  # as save_pretrained of a model writes; other loaders ask for it
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
