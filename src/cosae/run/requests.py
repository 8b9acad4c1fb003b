"""What `cosae eval`, `audit`, `export`, `browse`, `features` and `steer` are asked: their options.

The command line reads this for its help, so torch is imported only when something is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosae.errors import CosaeError, check_choice, check_least, check_positive

if TYPE_CHECKING:
    from cosae.activations.perturbation import Perturbation
    from cosae.activations.sample import SinkRule


@dataclass(frozen=True)
class Place:
    """Model and site. Options that are not given come from each SAE's file."""

    model: str | None = None
    """Model: embedded, a folder of a Hugging Face model, a GGUF file, smollm2, or a repository. Default: from the SAE's
    file."""
    site: str | None = None
    """Site that the SAE reads, such as resid_post.5. Default: from its file."""
    format: str = "auto"
    """Format of the SAE files. auto: recognised by the files."""
    device: str = "cpu"
    """Device: cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of everything that is drawn."""


@dataclass(frozen=True)
class Origin(Place):
    """Model, site and text. Options that are not given come from each SAE's file, then from DataConfig's defaults."""

    corpus: str | None = None
    """Text on which the model runs, as for train. Default: from the SAE's file, else pylib."""


@dataclass(frozen=True)
class Reading(Origin):
    """Model, site and text of an export or a look at features. The seed is of the order of documents and of windows."""

    prompts: int = 4096
    """Number of sequences of text; all, where the text has fewer."""
    context: int = 128
    """Tokens per sequence."""


SORTS = ("density", "largest", "norm")


@dataclass(frozen=True)
class FeatureOptions:
    """What to show of which features."""

    feature: tuple[int, ...] = ()
    """Features to show in full: examples in context, the tokens they promote and suppress. Default: a table."""
    search: str | None = None
    """Show the features that fire most on this text, relative to the largest value of each."""
    rows: int = 20
    """Rows of the table."""
    sort: str = "density"
    """Order of the table: density, largest (value), or norm (share of firings that the token's norm decides)."""
    examples: int = 10
    """Examples of a feature, each of another sequence."""

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed."""
        check_least("rows", self.rows, 1)
        check_least("examples", self.examples, 1)
        check_choice("sort", self.sort, SORTS)
        if self.feature and self.search is not None:
            raise CosaeError("features are named with --feature or looked for with --search, not both: drop one.")
        if self.feature and (self.rows != FeatureOptions.rows or self.sort != FeatureOptions.sort):
            raise CosaeError("--rows and --sort are of the table, which --feature does not show: drop them.")
        if self.search is not None and not self.search.strip():
            raise CosaeError("--search needs a text to look for. Got nothing but spaces.")


@dataclass(frozen=True)
class BrowseRequest(Origin):
    """What a feature store is built from. The seed is of the order of documents and of the examples that are drawn."""

    store: str | None = None
    """Folder written by `cosae capture`, instead of running a model; with --model, for the spelling of its tokens."""
    tokens: int = 200_000
    """Tokens of text to read; all, where there are fewer."""
    context: int = 128
    """Tokens per sequence."""
    window: int = 48
    """Tokens of text kept around each example."""
    inject: str | None = None
    """Perturbation of the norms, such as log_normal:sigma=0.5, as the SAEs' run had one. Default: none."""

    @property
    def perturbation(self) -> Perturbation:
        """What is done to the norms. Raises CosaeError."""
        from cosae.activations.perturbation import Perturbation

        return Perturbation() if self.inject is None else Perturbation.parse(self.inject)

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed, and for options that have no say."""
        _ = self.perturbation
        for name, least in (("tokens", 1), ("context", 3), ("window", 1)):
            check_least(name, getattr(self, name), least)
        if self.store is None:
            return
        for name in ("corpus", "context"):
            if getattr(self, name) != getattr(BrowseRequest, name):
                raise CosaeError(f"{name} has no say in activations that are there already: drop --{name}.")


@dataclass(frozen=True)
class SteerOptions:
    """What is done to which features. One of add, set, scale and ablate."""

    feature: tuple[int, ...]
    """Features to change."""
    add: float | None = None
    """Add this multiple of the features' decoder rows to every vector, in the activations' own units."""
    set: float | None = None
    """Give the features this value at every token."""
    scale: float | None = None
    """Multiply the features by this where they fire."""
    ablate: bool = False
    """Take the features out."""
    new_tokens: int = 40
    """Number of tokens to generate."""
    temperature: float = 0.0
    """0 always takes the likeliest token; above, tokens are drawn, with the same seed with and without the change."""

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed."""
        check_least("new_tokens", self.new_tokens, 1)
        check_positive("temperature", self.temperature, zero=True)
        if not self.feature:
            raise CosaeError("steer needs the number of a feature: --feature 7.")
        named = [name for name in ("add", "set", "scale") if getattr(self, name) is not None]
        named += ["ablate"] if self.ablate else []
        if len(named) != 1:
            got = " and ".join(f"--{name}" for name in named) or "none"
            raise CosaeError(f"steer needs one of --add X, --set X, --scale X and --ablate. Got {got}.")


@dataclass(frozen=True)
class EvalRequest(Origin):
    """What SAEs are measured on."""

    activations: str | None = None
    """File of N × d vectors (.safetensors, .npy, .parquet), instead of a model."""
    store: str | None = None
    """Folder written by `cosae capture`, instead of a model."""
    store_site: str | None = None
    """Which store of that folder, where it has several."""
    target: str | None = None
    """What transcoders reconstruct: a site, with --activations a file of vectors. Default: from the SAE's file."""
    tokens: int | None = None
    """Number of held-out tokens. Default: 32 768; 4096 for splice, causal and patching."""
    context: int | None = None
    """Tokens per sequence. Default for labelled texts: their first 128."""
    inject: str | None = None
    """Perturbation of the norms before measuring, such as log_normal:sigma=0.5."""
    sink_factor: float = 10.0
    """Sinks are tokens of at least this multiple of the median norm, position 0, and special ids."""

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed, and for two origins of the tokens."""
        if self.tokens is not None and self.tokens < 64:
            raise CosaeError(f"a measurement needs at least 64 tokens to say anything. Got {self.tokens} instead.")
        if not self.sink_factor > 1:
            raise CosaeError(f"sink_factor must be above 1 (a multiple of the median). Got {self.sink_factor} instead.")
        if self.inject is not None:
            from cosae.activations.perturbation import Perturbation

            Perturbation.parse(self.inject)
        if (self.activations or self.store) and (self.model or self.site or self.corpus):
            raise CosaeError("activations are taken from a file or store, or from a model, not from both: drop one.")
        if self.activations and self.store:
            raise CosaeError("activations are taken from a file or from a store, not from both: drop one.")
        if self.store_site and not self.store:
            raise CosaeError("store_site chooses among the stores of a folder: give --store, or drop --store-site.")
        if self.context is not None and (self.activations or self.store):
            raise CosaeError("context has no say in activations that are there already: drop --context.")

    @property
    def rule(self) -> SinkRule:
        """What makes a token a sink."""
        from cosae.activations.sample import SinkRule

        return SinkRule(self.sink_factor)


@dataclass(frozen=True)
class EvalOptions:
    """Options of single measurements."""

    texts: tuple[str, ...] = ()
    """For probing: labelled sets, each a .jsonl or .parquet file, a folder written by save_to_disk of datasets,
    hf:DATASET[:CONFIG][:SPLIT], sae-probes[:NAME], wiki:language or wiki:topic. Default: the token-level
    concepts of the embedded corpus."""
    text_column: str = "text"
    """For probing texts: column with the text."""
    label_column: str = "label"
    """For probing texts: column with the label."""
    seeds: int = 3
    """For probing texts: number of random splits, each with texts of its own."""
    max_texts: int = 2000
    """For probing texts: number of texts per question and split, training and test together, at least 50. Only texts
    that are drawn are encoded."""
    top: tuple[int, ...] = ()
    """For probing: numbers of features per probe. Default: 1 2 5 for texts, 1 for token-level concepts, where every
    other number means a regression for each concept and rule."""
    pooling: str = "mean"
    """For probing texts: mean over tokens, or last."""
    features: tuple[int, ...] = ()
    """For causal: ids of the features to ablate and steer. Default: the eight that fire most."""

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed."""
        from cosae.evaluate.probing.texts import LEAST_TEXTS

        check_choice("pooling", self.pooling, ("mean", "last"))
        if not self.texts:
            self._check_idle(
                ("text_column", "label_column", "seeds", "max_texts", "pooling"), "where no --texts are named"
            )
        check_least("seeds", self.seeds, 1)
        check_least("max_texts", self.max_texts, LEAST_TEXTS)

    def check_applies(self, measurement: str) -> None:
        """Raises CosaeError for an option that was given and has no say in this measurement."""
        if measurement != "causal":
            self._check_idle(("features",), f"in {measurement}")
        if measurement != "probing":
            self._check_idle(("texts", "top"), f"in {measurement}")

    def _check_idle(self, names: tuple[str, ...], where: str) -> None:
        for name in names:
            if getattr(self, name) != getattr(EvalOptions, name):
                raise CosaeError(f"{name} has no say {where}: drop --{name.replace('_', '-')}.")
