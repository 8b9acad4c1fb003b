"""What `cosae eval`, `audit` and `export` are asked: their options, and the arguments of the functions behind them.

The command line reads this for its help, so torch is imported only when something is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosae.errors import CosaeError, check_choice

if TYPE_CHECKING:
    from cosae.activations.sample import SinkRule


@dataclass(frozen=True)
class Origin:
    """Model, site and text. Options that are not given come from each SAE's file, then from DataConfig's defaults."""

    model: str | None = None
    """Model: embedded, a folder of a Hugging Face model, or a repository. Default: from the SAE's file."""
    site: str | None = None
    """Site that the SAE reads, such as resid_post.5. Default: from its file."""
    corpus: str | None = None
    """Text on which the model runs, as for train. Default: from the SAE's file, else pylib."""
    format: str = "auto"
    """Format of the SAE files. auto: recognised by the files."""
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Reading(Origin):
    """Model, site and text of an export. The seed is of the order of documents, and of the windows that are drawn."""

    prompts: int = 4096
    """Number of sequences of text; all, where the text has fewer."""
    context: int = 128
    """Tokens per sequence."""


@dataclass(frozen=True)
class EvalRequest(Origin):
    """What SAEs are measured on."""

    activations: str | None = None
    """File of N × d vectors (.safetensors, .npy, .parquet), instead of a model."""
    store: str | None = None
    """Folder written by `cosae capture`, instead of a model."""
    store_site: str | None = None
    """Which store of that folder, where it has several."""
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
    hf:DATASET[:CONFIG][:SPLIT], or sae-probes[:NAME]. Default: the token-level concepts of the embedded corpus."""
    text_column: str = "text"
    """For probing texts: column with the text."""
    label_column: str = "label"
    """For probing texts: column with the label."""
    seeds: int = 3
    """For probing texts: number of random splits."""
    max_texts: int = 2000
    """For probing texts: number of texts per question, training and test together."""
    top: tuple[int, ...] = ()
    """For probing: numbers of features per probe. Default: 1 2 5 for texts, 1 for token-level concepts, where every
    other number means a regression for each concept and rule."""
    pooling: str = "mean"
    """For probing texts: mean over tokens, or last."""
    features: tuple[int, ...] = ()
    """For causal: ids of the features to ablate and steer. Default: the eight that fire most."""

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed."""
        check_choice("pooling", self.pooling, ("mean", "last"))
