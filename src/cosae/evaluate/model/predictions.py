"""What a model predicts, token by token, and how far a change to it moves the predictions.

In: a model and batches of `Sequences`. Out: per token that predicts another one of its own document

    cross-entropy   −ln q(next token)                     nats, q what the changed model predicts
    KL              Σ_v p_v (ln p_v − ln q_v)             nats, p what the model predicts unchanged

in float64, whatever the model's dtype. The last token of a document predicts nothing that could be checked and is left
out of both, so that both are over the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.evaluate.encoded import row_slices
from cosae.io.progress import SILENT, Progress
from cosae.models.hooks import arguments_of
from cosae.models.parts import body_of
from cosae.types import Sequences

CHUNK_ENTRIES = 8_000_000
"""Probabilities turned into float64 at once: a bound on memory, of no influence on the numbers."""


def predicting(sequences: Sequences) -> Tensor:
    """(S, T) bool: real tokens followed by a real token of the same document."""
    mask_ST, doc_ST = sequences.mask_ST, sequences.doc_ST
    found_ST = torch.zeros_like(mask_ST)
    found_ST[:, :-1] = mask_ST[:, :-1] & mask_ST[:, 1:] & (doc_ST[:, :-1] == doc_ST[:, 1:])
    return found_ST


def scored_batches(
    sequences: Sequences, size: int, progress: Progress = SILENT
) -> Iterator[tuple[slice, Sequences, Tensor]]:
    """Rows, sequences and `predicting` (S, T) of each batch in which a token predicts another.

    Raises CosaeError where there is no such batch.
    """
    if not bool(predicting(sequences).any()):
        raise CosaeError("no token here predicts another of its document: give sequences of two tokens and more.")
    batches = [*row_slices(len(sequences), size)]
    for rows in progress.each(batches, "running the model", "batches of sequences"):
        batch = sequences[rows]
        at_ST = predicting(batch)
        if bool(at_ST.any()):
            yield rows, batch, at_ST


@torch.no_grad()
def logits_at(model: nn.Module, batch: Sequences, at_ST: Tensor) -> Tensor:
    """(n, V) logits of the tokens where at_ST (S, T) is True, row by row, in the model's dtype.

    Raises CosaeError for a model without a language-modelling head.
    """
    output: Any = model(**arguments_of(body_of(model), batch))
    logits_STV = getattr(output, "logits", None)
    if logits_STV is None:
        raise CosaeError(f"{type(model).__name__} predicts no tokens; give the causal language model with its head.")
    logits_nV: Tensor = logits_STV[at_ST.to(logits_STV.device)]
    return logits_nV


def next_ids(batch: Sequences, at_ST: Tensor) -> Tensor:
    """(n,) int64: the token that follows each of those where at_ST is True."""
    return batch.ids_ST.roll(-1, dims=1)[at_ST]


@torch.no_grad()
def cross_entropy(logits_nV: Tensor, next_n: Tensor) -> Tensor:
    """(n,) float64 on the CPU: nats by which each next token surprises."""
    surprise_n = torch.zeros(len(logits_nV), dtype=torch.float64)
    next_n = next_n.to(logits_nV.device)
    for rows in _chunks(logits_nV):
        log_q = torch.log_softmax(logits_nV[rows].double(), dim=-1)
        surprise_n[rows] = -log_q.gather(1, next_n[rows, None])[:, 0].cpu()
    return surprise_n


@torch.no_grad()
def divergence(logits_nV: Tensor, changed_nV: Tensor) -> Tensor:
    """(n,) float64 on the CPU: KL from what `logits` predict to what `changed` predict; exactly 0 where they agree."""
    kl_n = torch.zeros(len(logits_nV), dtype=torch.float64)
    for rows in _chunks(logits_nV):
        log_p = torch.log_softmax(logits_nV[rows].double(), dim=-1)
        log_q = torch.log_softmax(changed_nV[rows].double(), dim=-1)
        terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)  # 0 · ln 0 = 0
        kl_n[rows] = terms.sum(-1).clamp_min(0.0).cpu()
    return kl_n


def _chunks(logits_nV: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_ENTRIES // max(1, logits_nV.shape[1]))
    return row_slices(len(logits_nV), size)
