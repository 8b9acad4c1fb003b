"""A text that somebody typed → the model's activations on it."""

from __future__ import annotations

from typing import Any

from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.recipe import DataConfig
from cosae.run.dataset.corpus import adds_bos, around_texts, pad_id
from cosae.text.encoders import surrounded
from cosae.text.packing import sequences
from cosae.text.pylib import Document
from cosae.text.tokenization import tokenize_documents
from cosae.types import Activations, Site


def read_text(
    model: Any, tokenizer: Any, site: Site, data: DataConfig, text: str, most: int | None = None
) -> Activations:
    """Activations of every token of the text, in order, with BOS where the SAE's training had one.

    Raises CosaeError for a text without a token, and for one of more than `most`.
    """
    bos = adds_bos(data, tokenizer)
    read = list(tokenize_documents([Document("text", text)], tokenizer, add_bos=bos))
    if (around := around_texts(data, tokenizer)) is not None:
        read = list(surrounded(read, around, data.context))
    n = sum(len(one.ids_T) for one in read)
    if most is not None and n > most:
        raise CosaeError(f"the text has {n:,} tokens, and at most {most:,} are read at once: shorten it.")
    special: dict[str, Any] = {"pad_id": pad_id(tokenizer), "special_ids": tokenizer.all_special_ids}
    packed = sequences(read, max(2, n), "document", **special)
    if not len(packed):
        raise CosaeError(f"the text {text[:80]!r} has no token that counts: give a longer one.")
    return capture(model, packed, site)[site.name]
