"""The labelled texts of every question through the model, once for all sites.

A file a set: of its texts that a question takes, in order, every token's text, position and, by site, x in bfloat16 and
|x| in float32. The model runs in bfloat16 (PRECISION). Written whole or not at all; what is there already is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosae.evaluate.context import TextProbes
from cosae.evaluate.probing.encode_texts import draw_texts
from cosae.evaluate.probing.texts import Split
from cosae.io.atomic import replaced
from cosae.models.capture import capture
from cosae.recipe import DataConfig
from cosae.run.dataset.base import DataUse
from cosae.run.dataset.model import ModelDataset
from cosae.text import Document
from cosae.text.labelled import LabelledTexts
from cosae.text.packing import iterate_sequences
from cosae.text.tokenization import tokenize_documents
from cosae.types import Activations
from studies.real_model.design import BLOCKS, CONTEXT, MODEL, TEXTS, TEXTS_A_QUESTION, labelled_sets

AT_ONCE = 16
PRECISION = "bfloat16"
"""Twice as fast as float32 where processors have bfloat16 units, and 1.1 to 1.4 % of an activation's length away."""


class ReadSet(NamedTuple):
    """One labelled set at one site: its questions (numbered among the texts read), and its tokens."""

    name: str
    splits: Mapping[tuple[int, int], Split]
    text_N: NDArray[np.int64]
    activations: Activations


def ensure(sets: list[LabelledTexts] | None = None) -> None:
    """Capture what is not there yet."""
    TEXTS.mkdir(parents=True, exist_ok=True)
    missing = [one for one in sets or labelled_sets() if not _file(one.name).exists()]
    if not missing:
        return
    config = DataConfig(model=MODEL, model_dtype=PRECISION, corpus="wiki:en", context=CONTEXT)
    data = ModelDataset(config, DataUse())
    for one in missing:
        row_S, _ = questions(one)
        found = read_texts(data, [one.texts[row] for row in row_S])
        with replaced(_file(one.name)) as staged:
            save_file(found, staged, {"set": one.name, "texts": str(len(row_S))})
        print(f"read {one.name}: {len(row_S)} texts, {len(found['text'])} tokens", flush=True)


def questions(one: LabelledTexts) -> tuple[NDArray[np.int64], Mapping[tuple[int, int], Split]]:
    """The texts that a set's questions take, ascending, and the questions: one split, so that seeds are the SAEs'."""
    probes = TextProbes((one,), context=CONTEXT, max_texts=TEXTS_A_QUESTION.get(one.name, 200), seeds=1)
    (drawn,) = draw_texts(probes)
    return drawn.row_S, {key: split.among(drawn.row_S) for key, split in drawn.splits.items()}


def read(one: LabelledTexts, block: int) -> ReadSet:
    """A captured set at the output of one block."""
    with safe_open(_file(one.name), framework="pt") as file:
        x_ND, norm_N = file.get_tensor(f"x.{block}"), file.get_tensor(f"norm.{block}")
        text_N, position_N = file.get_tensor("text"), file.get_tensor("position")
    none = torch.full_like(text_N, -1)
    special_N = torch.zeros_like(text_N, dtype=torch.bool)
    activations = Activations(x_ND, norm_N, none, text_N, position_N, none, special_N)
    return ReadSet(one.name, questions(one)[1], text_N.numpy().astype(np.int64), activations)


def _file(name: str) -> Any:
    return TEXTS / f"{name.replace(':', '_').replace(' ', '_')}.safetensors"


@torch.no_grad()
def read_texts(
    data: ModelDataset,
    texts: list[str],
    blocks: tuple[int, ...] = BLOCKS,
    context: int = CONTEXT,
    add_bos: bool = False,
) -> dict[str, Tensor]:
    """Tokens of some texts at the output of some blocks, in the texts' order."""
    documents = (Document(str(row), text) for row, text in enumerate(texts))
    tokenizer, sites = data.tokenizer, [f"resid_post.{block}" for block in blocks]
    tokenized = list(tokenize_documents(documents, tokenizer, add_bos=add_bos, head=context))
    by_length = sorted(tokenized, key=lambda one: len(one.ids_T))  # little padding
    special: dict[str, Any] = {"pad_id": tokenizer.pad_token_id or 0, "special_ids": ()}
    packed = iterate_sequences(iter(by_length), context, "document", rows_per_chunk=AT_ONCE, **special)
    parts: list[dict[str, Tensor]] = []
    for chunk in packed:
        names = torch.tensor([int(name) for name in chunk.doc_names])
        cut = chunk.columns(int(chunk.mask_ST.sum(1).max()))
        found = capture(data.model, cut, sites, batch_sequences=AT_ONCE)
        first = found[sites[0]]
        part = {"text": names[first.doc_N.long() - chunk.first_doc].int(), "position": first.position_N}
        for block, site in zip(blocks, sites, strict=True):
            part |= {f"x.{block}": found[site].x_ND.bfloat16(), f"norm.{block}": found[site].norm_N}
        parts.append(part)
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order_N = torch.argsort(whole["text"], stable=True)
    return {key: value[order_N].contiguous() for key, value in whole.items()}
