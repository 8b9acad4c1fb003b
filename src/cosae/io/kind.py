"""What a path is, in words, for messages about one that is something else than was asked for."""

from __future__ import annotations

from pathlib import Path

PICKLE = "a pickle, which may run code and is never opened"
MAGIC = {
    b"GGUF": "a GGUF file of model weights",
    b"\x93NUMPY": "a NumPy array",
    b"PAR1": "a Parquet file",
    **{b"\x80" + bytes([protocol]): PICKLE for protocol in (2, 3, 4, 5)},
}
SUFFIXES = {
    **{".safetensors": "a safetensors file of tensors", ".npz": "an archive of NumPy arrays"},
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), "a PyTorch file"),
    **dict.fromkeys((".pkl", ".pickle"), PICKLE),
    **{".txt": "a text file", ".jsonl": "a file of JSON lines", ".json": "a JSON file"},
}
FOLDERS = (
    ("adapter_config.json", "a LoRA adapter without its model, into which it must be merged first"),
    ("cfg.json", "an SAE"),
    ("ae.pt", "an SAE of dictionary_learning"),
    ("recipe.json", "a cosae run, whose SAEs lie in its folder arms"),
    ("index.json", "a store of activations"),
    ("dataset_info.json", "a data set"),
    ("dataset_dict.json", "a data set in splits"),
    ("model_index.json", "a diffusers pipeline"),
    ("config.json", "a Hugging Face model"),
    ("params.json", "a model in the format of the original Llama, which must be converted"),
    ("snapshots", "a folder of the hub's cache, whose model lies in its folder snapshots"),
    ("*.gguf", "a folder of GGUF files of model weights"),
    ("*.safetensors", "a folder of safetensors files"),
)


def kind_of(path: Path) -> str | None:
    """As in "a GGUF file of model weights"; None where nothing is there, or nothing is known of it."""
    if path.is_file():
        return _kind_of_file(path)
    if not path.is_dir():
        return None
    found = (words for name, words in FOLDERS if any(True for _ in path.glob(name)))
    return next(found, None) or (None if any(path.iterdir()) else "an empty folder")


def which_is(path: Path) -> str:
    """What follows "Got 'x'": ", which is a GGUF file of model weights,"; empty where nothing is known of it."""
    kind = kind_of(path)
    return f", which is {kind}," if kind else ""


def _kind_of_file(path: Path) -> str | None:
    if named := SUFFIXES.get(path.suffix.lower()):
        return named
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError:
        return None
    if not start:
        return "an empty file"
    return next((words for magic, words in MAGIC.items() if start.startswith(magic)), None)
