"""Model, site and text of an export."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """Model, site and text. Options that are not given come from the SAE's file, then from DataConfig's defaults."""

    model: str | None = None
    """Model: embedded, a folder of a Hugging Face model, or a repository. Default: from the SAE's file."""
    site: str | None = None
    """Site that the SAE reads, such as resid_post.5. Default: from its file."""
    corpus: str | None = None
    """Text on which the model runs, as for train. Default: from the SAE's file, else pylib."""
    prompts: int = 4096
    """Number of sequences of text; all, where the text has fewer."""
    context: int = 128
    """Tokens per sequence."""
    format: str = "auto"
    """Format of the SAE file. auto: recognised by the files."""
    device: str = "cpu"
    seed: int = 0
    """Seed of the order of documents, and of the windows that are drawn."""
