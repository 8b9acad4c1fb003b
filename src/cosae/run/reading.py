"""What an export runs the model on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """Model, site and text. Fields left None: what the SAE's file says, then DataConfig's defaults."""

    model: str | None = None
    """embedded, a folder of a Hugging Face model or a repository; default: what the SAE's file says."""
    site: str | None = None
    """Where the SAE reads, such as resid_post.5; default: what its file says."""
    corpus: str | None = None
    """Text to run the model on, as for train; default: what the SAE's file says, else pylib."""
    prompts: int = 4096
    """Sequences of text; all there are where it has fewer."""
    context: int = 128
    """Tokens of a sequence."""
    format: str = "auto"
    """Whose file the SAE is: auto tells by the files' names."""
    device: str = "cpu"
    seed: int = 0
    """Of the order in which documents are read, and of the windows that are drawn."""
