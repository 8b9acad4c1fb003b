"""What `cosae explain` is asked. The command line reads this for its help, so nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from cosae.errors import CosaeError, check_choice, check_least, check_positive, check_range

ASKED_BASELINES = ("shuffled", "constant")
"""The baselines whose questions cost as much as an explanation's."""


@dataclass(frozen=True)
class Asking:
    """Whom to ask: an endpoint by its address, or a chat model in this process."""

    endpoint: str | None = None
    """Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1. The key is read from COSAE_EXPLAIN_KEY
    or OPENAI_API_KEY and never written."""
    model: str | None = None
    """Name of the model at the endpoint."""
    local: str | None = None
    """Chat model to run in this process instead: a folder, smollm2 (once fetched) or a repository."""
    parallel: int = 4
    """Questions that an endpoint is asked at once."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    dry_run: bool = False
    """Ask nothing: print how many questions and tokens it would be, and what they cost."""
    price_in: float = 0.0
    """For --dry-run: price of a million tokens of questions."""
    price_out: float = 0.0
    """For --dry-run: price of a million tokens of answers."""

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed, and unless exactly one is asked."""
        for name in ("price_in", "price_out"):
            check_positive(name, getattr(self, name), zero=True)
        if self.endpoint is not None and self.local is not None:
            raise CosaeError("an endpoint or a local model is asked, not both: drop --endpoint or --local.")
        if self.dry_run:
            return
        if self.price_in or self.price_out:
            raise CosaeError("prices are for --dry-run: add it, or drop --price-in and --price-out.")
        if self.endpoint is None and self.local is None:
            raise CosaeError("explain needs somebody to ask: --endpoint URL with --model NAME, or --local MODEL.")
        if self.endpoint is not None and not self.model:
            raise CosaeError("explain needs the name of the endpoint's model: --model NAME.")
        if self.local is not None and self.model is not None:
            raise CosaeError("--model is of an endpoint's model, which --local does without: drop it.")


@dataclass(frozen=True)
class ExplainOptions:
    """What is explained, and how it is judged."""

    feature: tuple[int, ...] = ()
    """Features to explain, of every SAE. Default: drawn at random."""
    n_features: int = 50
    """Number of features drawn for each SAE, at the same quantiles of density in all."""
    examples: int = 10
    """Positive texts that an explanation is judged on, and as many negative ones."""
    per_question: int = 5
    """Texts per question of detection and fuzzing."""
    baselines: tuple[str, ...] = ("shuffled", "constant", "unigram")
    """What explanations are held against: shuffled (another feature's), constant (the words "any text"), unigram (a
    classifier of tokens, which asks nobody)."""
    retries: int = 2
    """How often a question is asked again whose answer cannot be read."""
    max_tokens: int = 300
    """Tokens of an answer, at most."""
    temperature: float = 0.0
    """Of the answers; 0: always the likeliest token."""

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed."""
        for name, least in (
            ("n_features", 1),
            ("examples", 2),
            ("per_question", 1),
            ("retries", 0),
            ("max_tokens", 16),
        ):
            check_least(name, getattr(self, name), least)
        check_range("temperature", self.temperature, "[0, 2]")
        for name in self.baselines:
            check_choice("a baseline", name, (*ASKED_BASELINES, "unigram"))
