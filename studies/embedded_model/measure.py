"""a language model and token lists → bits per byte, baselines, norm facts. Plain numbers only.

    python studies/embedded_model/measure.py

measures the shipped model again, and how much of the held-out text stands verbatim in the training text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import PreTrainedModel

from cosae.models import embedded
from cosae.text import pylib
from cosae.text.packing import sequences
from cosae.text.pylib import Document
from cosae.text.tokenization import TokenizedDocument, tokenize_documents


@torch.inference_mode()
def bits_per_byte(
    model: PreTrainedModel,
    documents: Sequence[TokenizedDocument],
    n_bytes: int,
    context: int,
    stride: int,
    pad_id: int,
    n_rows: int = 16,
) -> float:
    """Every token of every document but its BOS is predicted exactly once; their nats over ln 2 and n_bytes.

    Each document stands alone, behind its BOS. Windows of `context` inputs start every `stride` tokens and
    only the targets that no earlier window had are counted: stride = context means no overlap (a window's
    first target then has one token to go by); a smaller stride gives every target context - stride tokens or
    all there are.
    """
    windows: list[tuple[torch.Tensor, torch.Tensor]] = []
    for document in documents:
        ids = torch.from_numpy(document.ids_T).long()
        counted = 1  # the BOS is given
        for start in range(0, max(len(ids) - 1, 0), stride):
            stop = min(start + context, len(ids) - 1)
            x, y = ids[start:stop], ids[start + 1 : stop + 1].clone()
            y[: counted - start - 1] = -100
            counted = stop + 1
            windows.append((x, y))
            if stop == len(ids) - 1:
                break
    windows.sort(key=lambda w: len(w[0]))  # rows of like length together: little padding
    nats = 0.0
    for first in range(0, len(windows), n_rows):
        rows = windows[first : first + n_rows]
        x = torch.nn.utils.rnn.pad_sequence([w[0] for w in rows], batch_first=True, padding_value=pad_id)
        y = torch.nn.utils.rnn.pad_sequence([w[1] for w in rows], batch_first=True, padding_value=-100)
        logits = model(input_ids=x).logits.float()
        nats += float(F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum"))
    return nats / math.log(2) / n_bytes


def baselines(
    train: Sequence[TokenizedDocument], held_out: Sequence[TokenizedDocument], n_bytes: int, n_vocab: int
) -> dict[str, float]:
    """Bits per byte of a unigram (add-one) and a bigram model over the same tokens.

    The bigram is Witten-Bell: p(b | a) = (n(a, b) + t(a) p(b)) / (n(a) + t(a)), with t(a) the number of kinds
    of token seen after a.
    """
    pair_counts: dict[int, int] = {}
    count_V = np.ones(n_vocab)
    after_V = np.zeros(n_vocab)
    kinds_V = np.zeros(n_vocab)
    pairs = np.concatenate([d.ids_T[:-1].astype(np.int64) * n_vocab + d.ids_T[1:] for d in train])
    key, n = np.unique(pairs, return_counts=True)
    pair_counts = dict(zip(key.tolist(), n.tolist(), strict=True))
    np.add.at(after_V, key // n_vocab, n)
    np.add.at(kinds_V, key // n_vocab, 1)
    np.add.at(count_V, key % n_vocab, n)
    p_V = count_V / count_V.sum()
    unigram = bigram = 0.0
    for document in held_out:
        a, b = document.ids_T[:-1].astype(np.int64), document.ids_T[1:].astype(np.int64)
        seen = np.array([pair_counts.get(k, 0) for k in (a * n_vocab + b).tolist()])
        unigram -= np.log2(p_V[b]).sum()
        p = (seen + kinds_V[a] * p_V[b]) / np.maximum(after_V[a] + kinds_V[a], 1)
        bigram -= np.log2(np.where(after_V[a] > 0, p, p_V[b])).sum()
    return {"unigram": float(unigram) / n_bytes, "bigram": float(bigram) / n_bytes}


@torch.inference_mode()
def norm_summary(
    model: PreTrainedModel,
    documents: Sequence[TokenizedDocument],
    context: int,
    pad_id: int,
    n_rows: int = 256,
) -> list[dict[str, float]]:
    """Residual norms after each block, over rows of held-out documents.

    cv, max_over_median: over all tokens of packed rows but position 0. first_over_median: median norm at
    position 0 of rows that start with a BOS, over the median of the rest.
    """

    def norms(packing: str) -> tuple[torch.Tensor, torch.Tensor]:
        rows = sequences(documents, context, packing, pad_id=pad_id)[:n_rows]
        parts = [
            torch.stack([h.float().norm(dim=-1) for h in _block_outputs(model, ids)]) for ids in rows.ids_ST.split(16)
        ]
        return torch.cat(parts, dim=1), rows.mask_ST

    packed_LST, mask_ST = norms("packed")
    mask_ST[:, 0] = False
    alone_LST, _ = norms("document")
    metadata = []
    for block in range(packed_LST.shape[0]):
        rest_N = packed_LST[block][mask_ST]
        median = rest_N.median()
        metadata.append(
            {
                "block": block,
                "median": float(median),
                "cv": float(rest_N.std() / rest_N.mean()),
                "max_over_median": float(rest_N.max() / median),
                "first_over_median": float(alone_LST[block][:, 0].median() / median),
            }
        )
    return metadata


def _blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The transformer blocks, under the name the architecture has for them."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def _block_outputs(model: PreTrainedModel, ids_ST: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream after each block; `output_hidden_states` would give the last one normalised."""
    taken: list[torch.Tensor] = []

    def take(_module: object, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        taken.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(take) for layer in _blocks(model)]
    try:
        model(input_ids=ids_ST)
    finally:
        for hook in hooks:
            hook.remove()
    return taken


def copied_bytes(train: Sequence[Document], held_out: Sequence[Document], run: int = 6) -> dict[str, int]:
    """Per held-out file, the bytes of lines inside a run of `run` non-blank lines that training text has too."""

    def lines(document: Document) -> list[str]:
        return [line for line in document.text.split("\n") if line.strip()]

    known: set[int] = set()
    for document in train:
        text = lines(document)
        known.update(hash(tuple(text[i : i + run])) for i in range(len(text) - run + 1))
    found = {}
    for document in held_out:
        text = lines(document)
        copied: set[int] = set()
        for i in range(len(text) - run + 1):
            if hash(tuple(text[i : i + run])) in known:
                copied.update(range(i, i + run))
        found[document.name] = sum(len(text[i].encode()) + 1 for i in copied)
    return found


def main() -> None:
    model, tokenizer = embedded.load()
    context, pad_id = model.config.max_position_embeddings, tokenizer.pad_token_id
    held_out = pylib.documents("held_out")
    tokens = list(tokenize_documents(held_out, tokenizer, add_bos=True))
    size = [len(d.text.encode()) for d in held_out]
    copied = copied_bytes(pylib.documents("train", include_tests=True), held_out)
    record: dict[str, object] = {"held_out_bytes": sum(size), "copied_bytes": sum(copied.values())}
    originals = [i for i, d in enumerate(held_out) if copied[d.name] < 0.05 * size[i]]
    for name, chosen in (("all", list(range(len(held_out)))), ("files with under 5 % copied", originals)):
        some, n_bytes = [tokens[i] for i in chosen], sum(size[i] for i in chosen)
        record[name] = {
            "files": len(chosen),
            "bytes": n_bytes,
            "no_overlap": bits_per_byte(model, some, n_bytes, context, context, pad_id),
            "stride_half": bits_per_byte(model, some, n_bytes, context, context // 2, pad_id),
        }
    record["most copied"] = sorted(copied.items(), key=lambda c: -c[1])[:8]
    record["norms"] = norm_summary(model, tokens, context, pad_id)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
