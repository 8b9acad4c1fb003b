"""A small model, an SAE, sequences and a tokenizer for the tests of exports; and their dense truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cosae.models.capture import capture
from tests.support.tiny import D, make_model, make_sae, make_sequences

__all__ = ["D", "Words", "dense", "make_model", "make_sae", "make_sequences", "whole_sequences"]


class Words:
    """A tokenizer of 97 words; 5 is part of a character, 6 a word of SentencePiece's."""

    def __len__(self) -> int:
        return 97

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [{5: "Ã", 6: "\u2581six"}.get(i, f"w{i}") for i in ids]

    def decode(self, ids: list[int], **_: Any) -> str:
        return {5: "\ufffd", 6: "six"}.get(ids[0], f"w{ids[0]}")


def whole_sequences(n: int = 40, context: int = 12, seed: int = 3) -> Any:
    """Full sequences that begin with the special id 1."""
    sequences = make_sequences(n, context, seed=seed)
    sequences.ids_ST[:, 0] = 1
    sequences.special_ST[:, 0] = True
    return sequences


def dense(model: Any, sae: Any, sequences: Any, site: str) -> tuple[np.ndarray, np.ndarray]:
    """(S, T, F) float32 codes with special tokens silent, and (S, T, D) activations."""
    x_ND = capture(model, sequences, site)[site].x_ND
    with torch.no_grad():
        codes = sae.encode(x_ND).to_dense()
    codes[sequences.special_ST.reshape(-1)] = 0
    shape = tuple(sequences.ids_ST.shape)
    return codes.reshape(*shape, -1).numpy(), x_ND.reshape(*shape, -1).numpy()
