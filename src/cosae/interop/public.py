"""What of an SAE's metadata may leave this machine: an allow-list.

    a text     passes where each of its words is in VOCABULARY: what recipes, records, sites and file formats say
    a digest   passes, and so do versions of packages and all numbers
    a model    passes by its name on the hub, a text by hf:DATASET, where nothing of that name lies here
    a name     that the user lists passes

Everything else becomes a neutral word, and a key with other words is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.io.fetched.packages import CORPORA, MODELS
from cosae.text.mixture import parse_corpus

VOCABULARY = frozenset(
    re.findall(
        r"\w+",
        """
    a abs absolute absorption abstopk activation activations add after all answer any apply architecture arm arms array
    at attention attn audio auto autoencoder autoencodernew autoencodertopk aux b balanced bandwidth base batch
    batchtopksae
    before below bench beta bf bfloat bias bin block blocks bool bos both buffer by byte c cached calibrated
    calibration causal centre chars chat checkpoint chosen chunk chunks circuit class classes clip cls code coefficient
    commit compiled concepts config content context conversation conversations core corpora corpus correlation cosae
    cosine count counts cpu crosscoder cuda cv d data dataset datasets dead decay decoder delphi delta demo dense
    density device dict dictionary digest direction distance document documents drop dtype e eager edges eight embed
    embedded embeddings encoder energy entries epoch epochs eps eval evaluation every exact exponent exponents export
    extended f
    factor false fatal feature features field file files filter filtered finite firings first fixed flash float fold
    folded format fp frac fraction frame frames frequencies frequency from fve gain gated gatedautoencoder gelu gemma
    geometric global gpt group grouped groups guessed h half head heads held hf hidden hierarchy high histogram hook id
    ids image images implementation in init inject injected inner input inputs int into j joined jumprelu
    jumpreluautoencoder k kept kernel key kind l language large largest layer layernorm layers learn learned learning
    length level levels lib line linear list llama llm lm ln load local log logged logits loss low lr magnitude main
    massive matching matryoshka matryoshkabatchtopk matryoshkabatchtopksae max mean measured median metadata min mistral
    mixed mlp mode model modern module moments moved n name native natural neo neox neuronpedia new no noise non none
    norm normal normalise normalize norms not nothing npy numba number numpy o of off on one only opt optimizer or order
    origin other out output over own owner p packages packed packing paper paragraph parallel parquet patch patches
    patching path per perturbation phi point policy position positions positives post power pre precision prefetch
    prefix prefixes probe probes probing program projection prompts published py pylib pythia python q quantile
    quantiles quartile qwen rank rare ratio raw read reading recipe reconstruction recovered relu resamples reset resid
    residual restoring revision reweight rms rope row rows run runs sae saebench saelens safetensors sample scale scales
    scikit score sdpa sec seconds seed seen selected selector self seqpos sequence sequences set sha shard shards share
    shared shuffled side sigma sink sinks site sites size skip sound sounds source space sparse sparsify sparsity
    special split splits spread sqrt standard start starts state statistics std step steps stop store stored stores
    stream streamed studies submodule suffixes sum summary swap synthetic t target tensor text texts textual threshold
    thresholds time timeout to token tokenizer tokenizers tokens topk torch total tracer train trained trainer training
    transcode transcoder transformer transformers true two txt type u uniform unit until used v value values variance
    vector vectors version vision w waiting wanted warmup weight weights width window with without words workers world
    written x xattn xs y z zero
    """,
    )
)
"""Words of recipes, records, sites and formats, in lower case and without digits. A name made of them tells nothing."""
PACKAGED = {"model": ("embedded", *MODELS), "corpus": ("pylib", *CORPORA)}
NEUTRAL = {"text": "not published", "run": "a run", "model": "local model", "corpus": "local corpus", "arm": "arm"}
NEUTRAL |= {"store": "local store", "activations": "local file", "start": "local SAE"}
LOCAL = "local"
"""Key under which metadata lists names that were files or folders of the machine they were written on."""

_PLACES = {
    **dict.fromkeys(("model", "model_name", "lm_name"), "model"),
    **dict.fromkeys(("dataset", "dataset_path"), "dataset"),
    **{name: name for name in ("corpus", "store", "activations", "start", "run", "arm")},
    "path": "activations",
}
_RENAMED = {"arms": "arm", "recipe": "run"}
"""Sections → what a `name` in them names."""
_WORDY = re.compile(r"[\w .:,=+×-]{0,120}")
_DIGEST = re.compile(r"[0-9a-f]{7,64}")
_VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc|\.?post|\.?dev)\d+)?(\+[a-z]{2,4}\d{0,4})?")
_HUB = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
_HUB_TEXT = re.compile(r"(?:hf:)?([\w-][\w.-]*(?:/[\w-][\w.-]*)?)((?::[\w.+-]+){0,2})")
_FILE = re.compile(
    r"(?i).*\.(jsonl?|ya?ml|txt|md|csv|tsv|parquet|arrow|npy|npz|safetensors|gguf|pth?|bin|py|gz|zst|zip)"
)
_ABSOLUTE = re.compile(r"(?<![\w.:/~-])~?(?:/[^\s/\"'<>|:;,()\[\]{}]+){2,}")
_BARE = re.compile(
    r"(distil)?gpt2(-(small|medium|large|xl))?|(pythia|opt|gemma|llama|qwen|phi|mistral)[\d.]*(-[\d.]+[mbk]?)*"
    r"(-(deduped|it|instruct|base|pt))?|wikitext|c4|imdb|openwebtext|ag_news|bookcorpus|wikipedia"
)
"""Names of the hub, and of TransformerLens, without an owner; any other word may be a folder's."""


def without_places(text: str) -> str:
    """A text with every absolute path cut down to its last part, or to what follows site-packages; URLs stay."""
    return _ABSOLUTE.sub(lambda path: path[0].partition("site-packages/")[2] or path[0].rsplit("/", 1)[1], text)


def of_the_hub(name: str, local: Collection[str] = ()) -> bool:
    """Whether a name is of a repository, and of nothing that lies here or is known to be `local`."""
    return bool(_HUB.fullmatch(name)) and name not in local and not Path(name).exists()


def says_nothing(text: str) -> bool:
    """Whether a text has no words but those of VOCABULARY, of which no name of anybody's is made."""
    return bool(_WORDY.fullmatch(text)) and VOCABULARY.issuperset(re.findall(r"[^\W\d_]+", text.lower()))


@dataclass(frozen=True)
class Public:
    """What is published beside the above: names that the user lists, whole or by their last part."""

    names: tuple[str, ...] = ()

    def metadata(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata as they may be published. Published metadata stay as they are."""
        listed = metadata.get(LOCAL)
        local = frozenset(map(str, listed)) if isinstance(listed, list | tuple) else frozenset()
        kept = {key: value for key, value in metadata.items() if key != LOCAL}
        found: dict[str, Any] = self._value(kept, "", local)
        return found

    def recipe(self, recipe: Mapping[str, Any], local: Sequence[str] = ()) -> dict[str, Any]:
        """A recipe as it may be published."""
        found: dict[str, Any] = self.metadata({"recipe": recipe, LOCAL: local})["recipe"]
        return found

    def arms(self, names: Iterable[str]) -> dict[str, str]:
        """Name of each arm → a name for it that may be published, one to one."""
        shown: dict[str, str] = {}
        for number, name in enumerate(names, 1):
            known = self.place("arm", name)
            shown[name] = known if known == name and known not in shown.values() else f"arm_{number}"
        return shown

    def place(self, kind: str, name: str, local: Collection[str] = ()) -> str:
        """A model, corpus, store, file, SAE, run or arm by a name that may be published, else a neutral word."""
        if kind in ("corpus", "dataset"):
            return self._corpus(name, local, kind == "dataset")
        if named := self._named(name):
            return named
        if name in PACKAGED.get(kind, ()) or (kind == "model" and _is_repository(name, local)):
            return name
        return name if kind in ("run", "arm") and says_nothing(name) else NEUTRAL[kind]

    def _named(self, name: str) -> str | None:
        last = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
        return next((text for text in (name, last) if text in self.names), None)

    def _corpus(self, entry: str, local: Collection[str], is_repository: bool) -> str:
        """One source of a corpus, with its weight where it has one."""
        try:
            ((spec, _),) = parse_corpus(entry)
        except CosaeError:
            return NEUTRAL["corpus"]
        weight = entry.removeprefix(spec) if entry.startswith(spec) else ""
        hub = _HUB_TEXT.fullmatch(spec) if is_repository or spec.startswith("hf:") else None
        known = spec in PACKAGED["corpus"] or (hub is not None and _is_repository(hub[1], local))
        return (self._named(spec) or (spec if known else NEUTRAL["corpus"])) + weight

    def _value(self, value: Any, key: str, local: Collection[str]) -> Any:
        if isinstance(value, Mapping):
            named = {str(name): one for name, one in value.items() if says_nothing(str(name))}
            if key == "packages":
                return {name: one for name, one in named.items() if _VERSION.fullmatch(str(one))}
            inner = _RENAMED.get(key)
            return {n: self._value(one, inner if inner and n == "name" else n, local) for n, one in named.items()}
        if isinstance(value, list | tuple):
            return [self._value(one, key, local) for one in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return (
            self._value(value.tolist(), key, local) if hasattr(value, "tolist") else self._text(str(value), key, local)
        )

    def _text(self, text: str, key: str, local: Collection[str]) -> str:
        if text in NEUTRAL.values() or text in self.names:
            return text
        if key in _PLACES:
            return self.place(_PLACES[key], text, local)
        return text if says_nothing(text) or _DIGEST.fullmatch(text) else NEUTRAL["text"]


def _is_repository(name: str, local: Collection[str]) -> bool:
    """Whether a name is surely one of the hub: OWNER/NAME, where there is no such folder here, or a known word."""
    owner, slash, _ = name.partition("/")
    if not of_the_hub(name, local) or _FILE.fullmatch(name):
        return False
    return not Path(owner).exists() if slash else bool(_BARE.fullmatch(name))


def strings(value: Any, where: str = "") -> Iterator[str]:
    """`place: text` of every text in a plain value; of numbers their place alone."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from strings(one, f"{where}.{key}" if where else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from strings(one, where)
    else:
        yield f"{where}: {value}" if isinstance(value, str) else where


def strings_of_json(path: Path) -> list[str]:
    """Every text of a JSON file, each once."""
    return list(dict.fromkeys(strings(json.loads(path.read_text("utf-8")))))
