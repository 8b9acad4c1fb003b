"""What encoders put around a text: [CLS] … [SEP] (BERT, ESM, ModernBERT), … </s> (T5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cosae.text.tokenization import TokenizedDocument, whole


class Around(NamedTuple):
    """Ids before and after a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def around_of(tokenizer: Any) -> Around | None:
    """What an encoder's tokenizer puts around every text; None for those of models that only go on with a text, which
    put a BOS in front of it or nothing."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    ids = list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), None)
    if not bare or start is None:
        return None
    found = Around(tuple(ids[:start]), tuple(ids[start + len(bare) :]))
    has_class = getattr(tokenizer, "cls_token_id", None) in found.before
    return found if found.after and (has_class or not found.before) else None


def surrounded(tokenized: Iterable[TokenizedDocument], around: Around, context: int) -> Iterator[TokenizedDocument]:
    """Each document as one row of an encoder: cut to what fits, with what stands around it."""
    room = context - len(around.before) - len(around.after)
    for document in whole(tokenized):
        ids_T, offset_T2 = document.ids_T[:room], document.offset_T2[:room]
        if not len(ids_T):
            yield document
            continue
        before, after = (np.array(ids, dtype=np.int32) for ids in around)
        nowhere = [np.zeros((len(ids), 2), dtype=np.int32) for ids in around]
        yield TokenizedDocument(
            document.name,
            np.concatenate([before, ids_T, after]),
            np.concatenate([nowhere[0], offset_T2, nowhere[1]]),
        )
