"""What of an SAE's metadata may leave this machine: an allow-list, by key and by what a text looks like.

Names of the hub, what is packaged, sites, digests, versions and the words of a recipe are published, and names that the
user lists. A model, text, file or folder of this machine becomes a neutral word; so does every text under a key that is
not known here. Numbers pass as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.text.mixture import parse_corpus

PACKAGED = {"model": ("embedded",), "corpus": ("pylib",)}
RUNS = ("embedded", "demo", "demo-injected", "paper", "world", "tensor", "run")
"""Names of runs that nobody chose."""
NEUTRAL = {"text": "not published", "name": "a run", "model": "local model", "corpus": "local corpus"}
NEUTRAL |= {"store": "local store", "activations": "local file", "start": "local SAE"}
LOCAL = "local"
"""Key under which metadata lists names that were files or folders of the machine they were written on."""

_PLACES = {
    **dict.fromkeys(("model", "model_name", "lm_name"), "model"),
    **dict.fromkeys(("corpus", "dataset", "dataset_path"), "corpus"),
    **{name: name for name in ("store", "activations", "start", "name")},
    **{"path": "activations", "run": "name"},
}
_SITES = ("site", "hook_name", "hf_hook_name", "module_path", "store_site", "submodule_name", "hook_point")
_WORDS = {
    *("format", "dict_class", "architecture", "source", "stream_digest", "commit", "kind", "revision"),
    *("sha256", "sequences_sha256", "first_chunk_sha256", "model_sha256", "python", "cosae", "torch", "numpy"),
    *("transformers", "tokenizers", "datasets", "safetensors", "scikit-learn", "numba", "store_dtype", "state_dtype"),
    *("model_dtype", "file_dtype", "dtype", "attention", "attn_implementation", "model_type", "packing", "txt_unit"),
    *("non_finite", "inject_into", "device", "kernel", "score", "selector", "frame", "suffixes", "batch_sequences"),
    *("normalise", "space", "b_init", "centre", "norm", "frequencies", "direction", "policy"),
}
_WORD = re.compile(r"[\w.+×:-]{1,80}")
_SITE = re.compile(r"(?:[A-Za-z_]\w*\.)+\d+(?:\.[A-Za-z_]\w*)*(?::input)?")
_HUB = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
_HUB_TEXT = re.compile(r"hf:([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::[\w.+-]+){0,2}")


def of_the_hub(name: str, local: Collection[str] = ()) -> bool:
    """Whether a name is of a repository, and of nothing that lies here or is known to be `local`."""
    return bool(_HUB.fullmatch(name)) and name not in local and not Path(name).exists()


def arm_name(name: str) -> str:
    """An arm's name as it may be published: without the folder that one which goes on from a saved SAE is named after."""
    return re.sub(r"start=.*", "start", name)


@dataclass(frozen=True)
class Public:
    """What is published beside names of the hub: names that the user lists, whole or by their last part."""

    names: tuple[str, ...] = ()

    def metadata(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata as they may be published. Published metadata stay as they are."""
        listed = metadata.get(LOCAL)
        local = frozenset(map(str, listed)) if isinstance(listed, list | tuple) else frozenset()
        kept = {key: value for key, value in metadata.items() if key != LOCAL}
        found: dict[str, Any] = self._value(kept, "", local)
        return found

    def place(self, kind: str, name: str, local: Collection[str] = ()) -> str:
        """A model, corpus, store, file, SAE or run by a name that may be published, else the neutral word for it."""
        if kind == "corpus":
            return self._corpus(name, local)
        if named := self._named(name):
            return named
        known = name in PACKAGED.get(kind, ()) or (kind == "model" and of_the_hub(name, local))
        return name if known or (kind == "name" and name in RUNS) else NEUTRAL[kind]

    def _named(self, name: str) -> str | None:
        last = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
        return next((text for text in (name, last) if text in self.names), None)

    def _corpus(self, entry: str, local: Collection[str]) -> str:
        """One source of a corpus, with its weight where it has one."""
        if named := self._named(entry):
            return named
        try:
            ((spec, _),) = parse_corpus(entry)
        except CosaeError:
            return NEUTRAL["corpus"]
        weight = entry.removeprefix(spec) if entry.startswith(spec) else ""
        hub = _HUB_TEXT.fullmatch(spec)
        known = spec in PACKAGED["corpus"] or (hub is not None and of_the_hub(hub[1], local))
        return (self._named(spec) or (spec if known else NEUTRAL["corpus"])) + weight

    def _value(self, value: Any, key: str, local: Collection[str]) -> Any:
        if isinstance(value, Mapping):
            named = {str(name): one for name, one in value.items() if re.fullmatch(r"[\w-]{1,60}", str(name))}
            keys = {"name": "arm"} if key == "arms" else {}
            return {name: self._value(one, keys.get(name, name), local) for name, one in named.items()}
        if isinstance(value, list | tuple):
            return [self._value(one, key, local) for one in value]
        return self._text(value, key, local) if isinstance(value, str) else value

    def _text(self, text: str, key: str, local: Collection[str]) -> str:
        if text in NEUTRAL.values() or text in self.names:
            return text
        if key == "arm":
            return arm_name(text) if _WORD.fullmatch(text) or "=" in text else NEUTRAL["text"]
        if key in _PLACES:
            return self.place(_PLACES[key], text, local)
        if key in _SITES:
            return text if _SITE.fullmatch(text) else NEUTRAL["text"]
        plain = (key in _WORDS and _WORD.fullmatch(text)) or (key, text) == ("text_field", "text")
        return text if plain else NEUTRAL["text"]


def strings(value: Any, where: str = "") -> Iterator[str]:
    """`place: text` of every text in a plain value, keys too."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from strings(one, f"{where}.{key}" if where else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from strings(one, where)
    elif isinstance(value, str):
        yield f"{where}: {value}"
    else:
        yield f"{where}"


def strings_of_json(path: Path) -> list[str]:
    """Every text of a JSON file, each once; of numbers, under which key they are."""
    return list(dict.fromkeys(strings(json.loads(path.read_text("utf-8")))))
