"""A frozen model and its tokenizer, from a directory, a GGUF file or the Hugging Face hub.

Whatever transformers' AutoModel loads: a causal language model with its head, a model of text and images with its own,
any other (encoders, vision, audio, encoder-decoders) without."""

from __future__ import annotations

import logging
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cosae.errors import CosaeError, check_choice
from cosae.io.fetched.packages import MODELS, model_of
from cosae.io.kind import kind_of, which_is
from cosae.io.untrusted import check_plain, one_line, one_sentence
from cosae.models.gguf import dequantised, is_gguf, quantization
from cosae.models.parts import vocabulary_of
from cosae.shown import counted

TOKENIZER_FILES = (
    *("tokenizer.json", "tekken.json", "*.tiktoken", "*.model", "*.spm", "*.bpe.codes"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "bpe.codes"),
)
"""Any of which holds a tokenizer's vocabulary."""
ROUNDED = 64
"""Embeddings that a small vocabulary is rounded up by at most."""
UNUSED = ("masked_spec_embed",)
"""Parameters that only training uses, and that checkpoints may lack."""
MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name_or_path: str | os.PathLike[str],
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    attn_implementation: str | None = None,
    with_tokenizer: bool = True,
) -> tuple[nn.Module, Any]:
    """A model in eval mode, without gradients, and its tokenizer: None for a model that reads no text.

    name_or_path  a directory written by `save_pretrained`, a GGUF file, smollm2 or minilm (once fetched), or a
                  repository on the hub
    dtype         "float32", "bfloat16" or "float16"
    device        "cpu", "cuda", "cuda:1" ...
    revision      branch, tag or commit on the hub
    attn_implementation  as in transformers ("eager", "sdpa" ...); None for its default
    with_tokenizer  False: no tokenizer is looked for (token ids come ready-made)

    Raises `CosaeError` for a missing path, an unreachable hub or repository, a model that transformers does not know,
    weights that are damaged or incomplete, a missing tokenizer, and an unsupported dtype or device. Code from a
    repository is never run.
    """
    target = _device(device)
    transformers, name, where, config = read_configuration(name_or_path, dtype, revision)
    progress: Any = transformers.utils.logging
    progress.disable_progress_bar()  # a bar of its own for each load would break ours
    auto, model_class = classes_of(transformers, config, os.fspath(name_or_path))
    reads_text = getattr(model_class, "main_input_name", "input_ids") == "input_ids"
    tokenizer = load_tokenizer(transformers, name, where) if with_tokenizer and reads_text else None
    options: dict[str, Any] = dict(where, output_loading_info=True)
    # Renamed in transformers 4.56, with a warning on the old name.
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options["dtype" if version >= (4, 56) else "torch_dtype"] = MODEL_DTYPES[dtype]
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    failure = f"The weights of '{name}' could not be read"
    if quantised := getattr(config, "quantization_config", None):
        how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        failure = f"'{name}' is quantised ({how}), which transformers does not serve on {device} here"
        if target.type != "cpu":
            options["device_map"] = {"": target}
    model, info = _try(failure, auto.from_pretrained, name, **options)
    spare = {key.split("pooler.")[0] + "pooler" for key in info["missing_keys"] if "pooler." in key}
    for path in spare:  # checkpoints of masked language models have none; it runs after all blocks
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, None)
    missing = [key for key in map(str, info["missing_keys"]) if not key.startswith(tuple(spare)) and key not in UNUSED]
    wrong = sorted(missing) + sorted(map(str, info["mismatched_keys"]))
    if wrong:  # transformers would fill these with random numbers and go on
        raise CosaeError(
            f"The weights of '{name}' are incomplete: {counted(len(wrong), 'tensor')} missing or misshapen, "
            f"the first is {wrong[0]}; download the model again."
        )
    if tokenizer is not None:
        check_tokenizer(tokenizer, vocabulary_of(model), name)
    model.requires_grad_(False)
    model.quantization = quantization(Path(name))
    if model.quantization or os.fspath(name_or_path) in MODELS:
        model.config._name_or_path = os.fspath(name_or_path)  # for records: not a place in the cache
    return (model.eval() if quantised else model.eval().to(target)), tokenizer


def open_tokenizer(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Any:
    """The tokenizer of a model, without its weights. Raises CosaeError as `load_model`."""
    transformers, name, where, _ = read_configuration(name_or_path, "float32", revision)
    return load_tokenizer(transformers, name, where)


def read_configuration(
    name_or_path: str | os.PathLike[str], dtype: str, revision: str | None
) -> tuple[Any, str, dict[str, str], Any]:
    """transformers, the name for it, its options, and the configuration of a model. Raises CosaeError."""
    check_choice("dtype", dtype, MODEL_DTYPES)
    try:
        import transformers
    except ImportError:
        raise CosaeError("Reading a model needs transformers: pip install 'cosae[lm]'.") from None
    name = place_of(name_or_path)
    where = {"revision": revision} if revision is not None else {}
    config = _try(f"No model could be read from '{name}'", transformers.AutoConfig.from_pretrained, name, **where)
    with one_sentence(f"No model could be read from '{name}'", "its config.json is damaged"):
        classes_of(transformers, config, os.fspath(name_or_path))
    return transformers, name, where, config


def load_tokenizer(transformers: Any, name: str, where: dict[str, str]) -> Any:
    """The tokenizer of a directory or a repository. Raises CosaeError for a directory without its files, for which
    transformers makes one of a few entries up."""
    folder = Path(name)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else None
    has_one = there is None or any(fnmatch(path, pattern) for path in there for pattern in TOKENIZER_FILES)
    try:
        tokenizer = _try(
            f"No tokenizer could be read from '{name}'", transformers.AutoTokenizer.from_pretrained, name, **where
        )
    except CosaeError:
        if has_one:
            raise
        tokenizer = None
    wanted = getattr(tokenizer, "vocab_files_names", {"tokenizer_file": "tokenizer.json"})
    if not has_one and wanted:  # some, of bytes, need no files
        files = " and ".join(sorted({*wanted.values()} - {"tokenizer.json"}))
        raise CosaeError(
            f"'{name}' holds no tokenizer: tokenizer.json{f', or {files},' if files else ''} is missing. Copy it from "
            "where the model comes from, or write it with tokenizer.save_pretrained."
        )
    return tokenizer


def check_tokenizer(tokenizer: Any, n_embeddings: int, name: str) -> None:
    """Raises CosaeError for a tokenizer whose size says that it belongs to another model, or was made up.

    Embeddings may be longer, padded to a round number; tokens added to the vocabulary, which no text gives unless it
    spells them, may lie beyond them.
    """
    own = set(tokenizer.get_vocab().values()) - set(tokenizer.get_added_vocab().values())
    highest, n_entries = max(own, default=-1), len(tokenizer)
    is_small = 2 * n_entries < n_embeddings and n_embeddings - n_entries > ROUNDED
    if is_small or highest >= n_embeddings:
        raise CosaeError(
            f"The tokenizer of '{name}' does not fit the model: it has {n_entries} entries (ids up to {highest}), the "
            f"model's embedding {n_embeddings}. Files of it are missing or another model's: copy tokenizer.json again."
        )


def _device(device: str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError:
        raise CosaeError(f"device must be one such as cpu or cuda. Got '{device}' instead.") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise CosaeError(f"Device '{device}' was asked for, but this torch sees no CUDA device; use cpu.")
    return target


def place_of(name_or_path: str | os.PathLike[str]) -> str:
    """The argument for transformers: a folder, be it in the cache, or a name on the hub. Raises CosaeError for a path
    that is missing or no model, and for what has not been fetched."""
    name = os.fspath(model_of(os.fspath(name_or_path)) or name_or_path)
    looks_like_path = name.startswith((".", "/", "~", "\\")) or name.count("/") > 1
    is_path = looks_like_path or not isinstance(name_or_path, str)
    path = Path(name).expanduser()
    if is_gguf(path):
        return str(dequantised(path))
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        advice = "; name one of its files" if "GGUF" in (kind_of(path) or "") else ""
        raise CosaeError(f"'{name}'{which_is(path)} is not a model directory: it has no config.json{advice}.")
    if path.is_dir():
        check_plain(path)
        return str(path)
    if is_path or not name:
        raise CosaeError(
            f"Model path '{name}' does not exist; give a model directory, a GGUF file or a name on the hub."
        )
    return name


def _try(failure: str, load: Any, name: str, **options: Any) -> Any:
    """What `load` returns. Whatever it raises, and loaders raise nearly anything, becomes one sentence."""
    # they would announce each of their attempts, and every tensor of a head that is left out
    loggers = [logging.getLogger(package) for package in ("huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        return load(name, **options)
    except Exception as error:
        advice = "" if Path(name).is_dir() else " (no such directory here; the hub may be unreachable)"
        raise CosaeError(f"{failure}{advice}: {one_line(error)}.") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def classes_of(transformers: Any, config: Any, name: str) -> tuple[Any, Any]:
    """The Auto class that loads a configuration's model, and the model's own class.

    A causal language model where the configuration names one, or names none and can be one; else a model of text and
    images, else AutoModel. Raises CosaeError for a configuration that none of them knows.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    written = set(getattr(config, "architectures", None) or [])
    known = {name for names in CAUSAL.values() for name in ([names] if isinstance(names, str) else names)}
    causal = written & known if written else config.model_type in CAUSAL and config.model_type not in MASKED
    tries = ["AutoModelForImageTextToText", "AutoModel"]
    if causal and not getattr(config, "is_encoder_decoder", False):
        tries.insert(0, "AutoModelForCausalLM")
    for auto in (getattr(transformers, kind, None) for kind in tries):
        if auto is not None and type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return auto, found[0] if isinstance(found, tuple) else found
    kind = next(iter(written), config.model_type)
    raise CosaeError(f"'{name}' is a {kind}, which transformers' AutoModel does not load; choose another model.")
