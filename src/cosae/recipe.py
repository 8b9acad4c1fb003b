"""A run, written down: one tree of frozen dataclasses. Named presets, changed, read, write, diff.

What a run does follows from its recipe, the code's commit and the data alone; every result carries all three.
"""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cosae.activations.filter import FilterPolicy
from cosae.activations.monitor import check_policy
from cosae.activations.perturbation import SETTINGS, Perturbation
from cosae.activations.positions import check_positions
from cosae.activations.synthetic import World
from cosae.errors import CosaeError, check_choice, check_least
from cosae.evaluate.probing.texts import LEAST_TEXTS
from cosae.io.legacy import V01_ORDER, upgrade, upgrade_path
from cosae.io.untrusted import check_bounded, one_sentence, parse_json, read_text
from cosae.io.values import convert, from_plain, to_plain
from cosae.shown import Shown, counted
from cosae.text.files import Reading
from cosae.text.mixture import parse_corpus
from cosae.train.arm import ARMS, Arm, check_arms
from cosae.train.loop import TrainingConfig
from cosae.train.parallel.config import ParallelConfig


@dataclass(frozen=True)
class DataConfig:
    """Where activations come from: a model on a corpus, a file of vectors, or a synthetic world.

    Raises CosaeError on a value that is not allowed.
    """

    model: str = "embedded"
    """embedded, a folder written by save_pretrained, a GGUF file, smollm2, or a repository of the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    model_dtype: str = "float32"
    attention: str | None = None
    """attn_implementation of transformers (the paper: eager); None for its default."""
    site: str = "resid_post.5"
    """Short name, TransformerLens name or module path (cosae.models.sites); several, A+B+C, for crosscoders."""
    target: str | None = None
    """What transcoders make of the site's activations: another site of the model; of a store, the site of another store
    in the folder; of a file of activations, a file with a row for each of its rows."""
    corpus: str | tuple[str, ...] = "pylib"
    """pylib, a folder, a .txt, .jsonl or .parquet file, a data set saved to disk, wiki:en, or
    hf:DATASET[:CONFIG][:SPLIT] (streamed). A list is a mixture: SPEC:WEIGHT each, weights being shares of the training
    tokens."""
    inputs: str = "text"
    """What the corpus holds: text, chat (conversations, through the model's chat template), ids (token ids that are
    ready), images or audio."""
    positions: str = "all"
    """Which places of a sequence become rows: all, cls, tokens, patches, frames, last, mean (one row a sequence), or a
    slice such as 1: (cosae.activations.positions)."""
    text_field: str = "text"
    """Key or column that holds a row's text; text stands for messages, input_ids, image or audio where the corpus holds
    those."""
    suffixes: tuple[str, ...] = ()
    """Endings of the files that a folder is searched for (.py, .jsonl …); none: all text and source files."""
    txt_unit: str = "file"
    """What is one document in a .txt file named by itself: file, paragraph or line."""
    n_workers: int = 0
    """Processes that tokenise; 0: the run's own. Their number changes nothing of what is trained on."""
    context: int = 256
    packing: str = "packed"
    """packed (documents fill whole sequences) or document (one document per sequence)."""
    add_bos: bool | None = None
    """Whether documents start with BOS; None where the tokenizer adds one by itself or the model is embedded."""
    max_chars: int | None = None
    """Each document is cut here."""
    min_chars: int = 0
    """Shorter documents are passed over."""
    batch_sequences: int | Literal["auto"] = 16
    """Sequences per forward pass; auto: as many as fit an eighth of the device's memory, measured, and no more than
    make 4096 tokens."""
    chunk_sequences: int = 64
    """Sequences captured between two looks of the shuffle buffer."""
    prefetch_chunks: int = 0
    """Chunks captured ahead, in a thread of their own, while SAEs train on those before; 0: none. Changes nothing of
    what is trained on."""
    held_out_frac: float = 0.1
    """Share of documents (or rows) kept out of training; pylib has a split of its own."""
    non_finite: str = "fatal"
    """What NaN and infinity do: fatal (the run stops and says where), or drop (left out, counted in run.json)."""
    order: str = "shuffled"
    """shuffled, or v0.1: documents of a data set on disk in its own order, rows of a store in blocks of 256, long
    documents counted whole, as 0.1 read them; what 0.1 began goes on so."""
    activations: str | None = None
    """A .safetensors, .npy or .parquet file of N × d vectors instead of a model."""
    activations_key: str | None = None
    """Tensor or column of that file."""
    world: World | None = None
    """A synthetic world instead of a model."""
    store: str | None = None
    """A folder written by `cosae capture` instead of a model."""
    store_site: str | None = None
    """Which of the stores in that folder, where it holds one for each of several sites."""

    @property
    def field(self) -> str:
        """Key or column that holds what the corpus is made of."""
        return INPUTS[self.inputs] if self.text_field == "text" else self.text_field

    @property
    def origin(self) -> str:
        """Where activations come from: store, world, activations or model."""
        return next((name for name in ORIGINS if getattr(self, name, None) is not None), "model")

    def from_origin(self, origin: str) -> DataConfig:
        """The same with everything that names another origin taken back."""
        kept = {name: getattr(self, name) for name in ("held_out_frac", "non_finite", "order", "positions")}
        return self if origin == self.origin else DataConfig(**{n: v for n, v in kept.items() if n in ORIGINS[origin]})

    def check_applies(self, names: Iterable[str], origin: str | None = None) -> None:
        """Raises CosaeError for a field, among those that were asked for, that has no say in data of this origin."""
        origin = origin or self.origin
        for name in names:
            if name in ORIGINS and name != origin:
                listed = "model, store, world and activations"
                raise CosaeError(f"activations are taken from one of {listed}. Got {origin} and {name}: drop one.")
            if name not in {origin, *ORIGINS[origin]}:
                raise CosaeError(f"{name} has no say in {_IN_WORDS[origin]}: drop it.")

    def __post_init__(self) -> None:
        check_policy(self.non_finite)
        parse_corpus(self.corpus)
        check_choice("inputs", self.inputs, INPUTS)
        check_positions(self.positions)
        Reading(self.text_field, self.suffixes, self.txt_unit, self.max_chars, self.inputs == "chat")
        least_of = {"context": 2, "batch_sequences": 1, "chunk_sequences": 1, "n_workers": 0, "prefetch_chunks": 0}
        for name, least in least_of.items():
            if getattr(self, name) != "auto":
                check_least(name, getattr(self, name), least)
        check_choice("packing", self.packing, ("packed", "document"))
        check_choice("order", self.order, ("shuffled", V01_ORDER))
        if self.max_chars is not None and self.min_chars > self.max_chars:
            raise CosaeError(f"min_chars must be at most max_chars. Got {self.min_chars} and {self.max_chars} instead.")


INPUTS = {"text": "text", "chat": "messages", "ids": "input_ids", "images": "image", "audio": "audio"}
"""What a corpus can hold → the field of a row that holds it."""
ORIGINS: dict[str, tuple[str, ...]] = {
    "store": ("store_site", "target", "order"),
    "world": (),
    "activations": ("activations_key", "positions", "target", "held_out_frac", "non_finite"),
    "model": tuple(f.name for f in fields(DataConfig) if not f.name.startswith(("store", "world", "activations"))),
}
"""Where activations can come from → the fields of DataConfig that have a say in them beside it."""
_IN_WORDS = {
    "store": "a store, which holds activations already",
    "world": "a synthetic world",
    "activations": "a file of activations",
    "model": "activations of a model",
}


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured after training, and on how much."""

    held_out_tokens: int = 131_072
    calibration_tokens: int = 65_536
    """Held-out tokens, disjoint from the measured ones, on which inference thresholds are set to the wanted L0."""
    probing: bool = True
    """Sparse probing on the embedded corpus' concepts; only where the corpus is pylib."""
    probe_tokens: int = 131_072
    """Training-split tokens on which probing chooses its latents."""
    min_positives: int = 200
    texts: tuple[str, ...] = ()
    """Labelled sets whose classes are probed, as `cosae eval probing --texts` takes them; only where a language model
    reads the texts. From a store, that is the model it was captured from."""
    max_texts: int = 400
    """Texts of one question and split, training and test together."""
    max_classes: int = 8
    """Classes of a set that are asked about, those with most texts."""
    text_splits: int = 3
    """Splits drawn, each with texts of its own."""
    resamples: int = 2000
    """Of every bootstrap."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("held_out_tokens", "calibration_tokens", "probe_tokens", "min_positives", "resamples"):
            check_least(name, getattr(self, name), 1)
        for name, least in {"max_texts": LEAST_TEXTS, "max_classes": 1, "text_splits": 1}.items():
            check_least(name, getattr(self, name), least)


OF_TEXTS = ("evaluation.max_texts", "evaluation.max_classes", "evaluation.text_splits")
INJECT_INTO = ("both", "training", "evaluation")


@dataclass(frozen=True, repr=False)
class Recipe(Shown):
    """One run: data, filter, perturbation, arms, training, evaluation. Its repr is what differs from the defaults."""

    name: str = "embedded"
    data: DataConfig = field(default_factory=DataConfig)
    filter: FilterPolicy = field(default_factory=FilterPolicy)
    perturbation: Perturbation = field(default_factory=Perturbation)
    inject_into: str = "both"
    """Which tokens get the perturbation: both (training and evaluation), training, or evaluation (a shift at
    deployment: thresholds are calibrated and probes chosen without it)."""
    d_sae: int | None = None
    """Width of arms that name none; None is 16 × d_in."""
    k: int = 32
    """Mean active features of arms that name none."""
    arms: tuple[Arm, ...] = tuple(
        ARMS[name] for name in ("standard", "standard_unit_frame", "cosine", "cosine_per_feature")
    )
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: str = "cpu"
    kernel: str = "auto"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How many processes train together; torchrun starts them."""

    def __post_init__(self) -> None:
        check_arms(self.arms)
        check_choice("inject_into", self.inject_into, INJECT_INTO)
        if self.d_sae is not None:
            check_least("d_sae", self.d_sae, 1)

    def _summary(self) -> dict[str, object]:
        differing = self.diff(Recipe())
        arms = [arm.name for arm in self.arms] if any(path.startswith("arms.") for path in differing) else None
        named = {path: here for path, (here, _) in differing.items() if not path.startswith("arms.")}
        return {"name": named.pop("name", None), "arms": arms, **named}

    @property
    def training_perturbation(self) -> Perturbation:
        """The perturbation on the stream that SAEs are trained on."""
        return self.perturbation if self.inject_into in ("both", "training") else Perturbation()

    def sample_perturbation(self, split: str) -> Perturbation:
        """The perturbation on a sample that something is measured on: "train", "calibration" or "held_out"."""
        deployed = self.inject_into == "evaluation" and split == "held_out"
        return self.perturbation if self.inject_into == "both" or deployed else Perturbation()

    def check(self) -> None:
        """Raises CosaeError for arms that no SAE can be, as far as that is known before the data are read."""
        if self.parallel.arm > len(self.arms):
            raise CosaeError(f"arm={self.parallel.arm} needs as many arms. Got {len(self.arms)}: lower it.")
        if self.parallel.data > self.training.batch_tokens:
            raise CosaeError(f"data={self.parallel.data} needs a row of each batch a process: raise batch_tokens.")
        for arm in self._filled(self.d_sae):
            if (arm.k_steps or 0) > self.training.steps:
                what = f"k_steps of {arm.name} must be at most the run's {self.training.steps} steps"
                raise CosaeError(f"{what}, or k never gets to its end. Got {arm.k_steps}: lower it.")
            if (arm.k_start or 0) * self.parallel.feature > (arm.sae.d_sae or math.inf):
                parts = f"each of feature={self.parallel.feature} parts of {arm.name}"
                raise CosaeError(f"{parts} must have k_start = {arm.k_start} features or more: lower k_start.")

    def check_applies(self, paths: Iterable[str]) -> None:
        """Raises CosaeError for a field, among those that were asked for, that has no say in what is asked besides."""
        paths = list(paths)
        self.data.check_applies(path.split(".")[1] for path in paths if path.startswith("data."))
        kind, left_out = self.perturbation.kind, self.filter.kind
        own = {name: {getattr(arm.sae, name) for arm in self.arms} for name in ("k", "d_sae")}
        for path in paths:
            section, _, name = path.rpartition(".")
            if section == "perturbation" and name not in ("kind", *SETTINGS[kind]):
                where = f"a perturbation of kind {kind}"
            elif path == "inject_into" and kind == "none":
                where = "a run without a perturbation"
            elif path == "filter.factor" and left_out != "norm":
                where = f"a filter of kind {left_out}"
            elif path in OF_TEXTS and not self.evaluation.texts:
                where = "a run without evaluation.texts"
            elif path in own and None not in own[path]:
                where = "arms that all have one of their own"
            else:
                continue
            raise CosaeError(f"{path} has no say in {where}: drop it.")

    @property
    def warnings(self) -> list[str]:
        """What is allowed and may not be what was meant."""
        begin, end = self.training.parts[-1]
        steps, optimizer = end - begin, self.training.optimizer
        if optimizer.warmup_steps <= steps * (1 - optimizer.decay_frac):
            return []
        return [
            f"of {counted(steps, 'step')} the first {optimizer.warmup_steps} are the warm-up and the last "
            f"{optimizer.decay_frac:.0%} the decay: the learning rate never reaches {optimizer.lr:g}. Take more steps, "
            "or lower training.optimizer.warmup_steps."
        ]

    def resolved(self, d_in: int, d_out: int | None = None, sites: tuple[int, ...] = ()) -> Recipe:
        """The recipe with every open field of its arms filled in, given the widths of activations, targets and
        joined sites."""
        d_sae = self.d_sae or 16 * d_in
        for arm in self.arms:
            if arm.sae.d_in not in (None, d_in):
                raise CosaeError(f"the arm {arm.name} asks for d_in {arm.sae.d_in}; the activations have width {d_in}.")
            if arm.sae.d_out not in (None, d_out):
                what = "there is no target" if d_out is None else f"the targets have width {d_out}"
                raise CosaeError(f"the arm {arm.name} asks for d_out {arm.sae.d_out}; {what}.")
            arm.sae.with_widths(d_in, d_out, sites)
        return replace(self, arms=self._filled(d_sae), d_sae=d_sae)

    def _filled(self, d_sae: int | None) -> tuple[Arm, ...]:
        """Arms with what they left open; where their width is not known, it stays open."""
        shared: dict[str, Any] = {"d_sae": d_sae, "k": self.k, "seed": self.training.seed, "kernel": self.kernel}
        return tuple(arm.with_defaults(lr=self.training.optimizer.lr, **shared) for arm in self.arms)

    def changed(self, changes: Mapping[str, Any] | None = None, **more: Any) -> Recipe:
        """A copy with fields changed, nested ones by dotted path: changed({"training.steps": 100}, k=64).

        Raises CosaeError for a field that does not exist or a value of the wrong kind.
        """
        recipe = self
        for path, value in {**(changes or {}), **more}.items():
            (value,) = upgrade({path: value}).values()
            recipe = _change(recipe, upgrade_path(path).split("."), value, path)
        return recipe

    def diff(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Dotted path → (this, other) of every leaf that differs."""
        mine, theirs = _leaves(to_plain(self)), _leaves(to_plain(other))
        paths = sorted(mine.keys() | theirs.keys())
        both = {path: (mine.get(path, "(absent)"), theirs.get(path, "(absent)")) for path in paths}
        return {path: pair for path, pair in both.items() if pair[0] != pair[1]}

    def write(self, path: str | Path) -> None:
        """JSON to `path`."""
        Path(path).write_text(json.dumps(to_plain(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """A recipe from JSON (.json) or YAML (.yaml, .yml; needs pyyaml). Fields left out keep their defaults.

        Raises CosaeError where the file is missing, not readable, or has unknown fields or wrong kinds.
        """
        path = Path(path)
        with one_sentence(f"the recipe {path} cannot be read", "give a .json or .yaml file"):
            text = read_text(path)
        with one_sentence(f"the recipe {path} is not well-formed"):
            plain = _parse_yaml(text) if path.suffix in (".yaml", ".yml") else parse_json(text, finite=False)
        try:
            return from_plain(cls, upgrade(plain), str(path))
        except CosaeError as error:
            raise CosaeError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise CosaeError("reading YAML needs pyyaml: pip install pyyaml, or write the recipe as JSON.") from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML 1.1 reads 1e-3 as text, for want of a dot; a recipe means the number. Nothing stands for itself many
        times: a few lines of aliases of aliases would be read as gigabytes."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("a recipe has no aliases: write values where they belong")
            return super().compose_node(parent, index)

    numbers = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", numbers, list("-+.0123456789"))
    plain = yaml.load(text, Loader)
    check_bounded(plain)
    return plain


def _change(node: Any, path: list[str], value: Any, whole: str) -> Any:
    name, *rest = path
    if not is_dataclass(node) or name not in {f.name for f in fields(node)}:
        names = ", ".join(f.name for f in fields(node)) if is_dataclass(node) else "nothing below it"
        raise CosaeError(f"a recipe has no field {whole!r}: at {name!r} it has {names}.")
    hint = typing.get_type_hints(type(node))[name]
    value = _change(getattr(node, name), rest, value, whole) if rest else convert(hint, value, whole)
    return replace(node, **{name: value})  # type: ignore[type-var]


def _leaves(plain: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(plain, dict | list):
        return {path: plain}
    items = plain.items() if isinstance(plain, dict) else enumerate(plain)
    return {k: v for key, item in items for k, v in _leaves(item, f"{path}.{key}" if path else str(key)).items()}
