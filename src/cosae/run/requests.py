"""What `cosae eval` and `cosae audit` are asked: their options, and the arguments of the functions behind them."""

from __future__ import annotations

from dataclasses import dataclass

from cosae.activations.perturbation import Perturbation
from cosae.activations.sample import SinkRule
from cosae.errors import CosaeError


@dataclass(frozen=True)
class EvalRequest:
    """What to measure SAEs on. What is left out is taken from each SAE's own file, then from the defaults."""

    model: str | None = None
    """embedded, a folder of a Hugging Face model or a repository; default: what the SAE's file says."""
    site: str | None = None
    """Where the SAE reads, such as resid_post.5; default: what its file says."""
    corpus: str | None = None
    """Text to run the model on, as for train; default: what the SAE's file says, else pylib."""
    activations: str | None = None
    """A .safetensors, .npy or .parquet file of N × d vectors instead of a model."""
    store: str | None = None
    """A folder of stored activations (cosae capture) instead of a model."""
    store_site: str | None = None
    """Which of the stores in that folder, where it holds several."""
    tokens: int | None = None
    """Held-out tokens; default 32 768, for splice, causal and patching 4096."""
    context: int | None = None
    """Tokens per sequence; of a labelled text its first 128 by default."""
    inject: str | None = None
    """Norm perturbation put on the activations first, such as log_normal:sigma=0.5: what if norms varied so?"""
    sink_factor: float = 10.0
    """Tokens of at least this multiple of the median norm are sinks, beside position 0 and special ids."""
    format: str = "auto"
    """Format of the SAE files; auto looks at them."""
    device: str = "cpu"
    seed: int = 0

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed, and for two origins of the tokens."""
        if self.tokens is not None and self.tokens < 64:
            raise CosaeError(f"a measurement needs at least 64 tokens to say anything. Got {self.tokens} instead.")
        if not self.sink_factor > 1:
            raise CosaeError(f"sink_factor must be above 1 (a multiple of the median). Got {self.sink_factor} instead.")
        if self.inject is not None:
            Perturbation.parse(self.inject)
        if (self.activations or self.store) and (self.model or self.site or self.corpus):
            raise CosaeError("activations are taken from a file or store, or from a model, not from both: drop one.")
        if self.activations and self.store:
            raise CosaeError("activations are taken from a file or from a store, not from both: drop one.")

    @property
    def rule(self) -> SinkRule:
        """What makes a token a sink."""
        return SinkRule(self.sink_factor)


@dataclass(frozen=True)
class EvalOptions:
    """What single measurements are asked beside the SAEs."""

    texts: tuple[str, ...] = ()
    """probing: labelled sets: .jsonl, .parquet, a folder of datasets' save_to_disk, hf:DATASET[:CONFIG][:SPLIT], or
    sae-probes[:NAME]; default: the token-level concepts of the embedded corpus."""
    text_column: str = "text"
    label_column: str = "label"
    seeds: int = 3
    """probing texts: splits drawn."""
    max_texts: int = 2000
    """probing texts: of one question, train and test together."""
    top: tuple[int, ...] = ()
    """probing: features of a probe; default 1 2 5 for texts, 1 for token-level concepts, where each other number is a
    regression for every concept and rule."""
    pooling: str = "mean"
    """probing texts: mean over tokens, or last."""
    features: tuple[int, ...] = ()
    """causal: features to ablate and steer; default: the eight that fire most."""

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed."""
        if self.pooling not in ("mean", "last"):
            raise CosaeError(f"pooling must be mean or last. Got {self.pooling!r} instead.")
