"""Tiny models of the activations' tests, SAEs for them, and an SAE that reconstructs everything."""

from __future__ import annotations

from typing import Any

import torch

import cosae
from cosae.activations.filter import Filter, FilterPolicy
from cosae.io.values import to_plain
from cosae.models.capture import capture
from cosae.sae.calibrate import calibrate
from cosae.types import Sequences
from tests.support.tiny_models import BLOCK_PATHS, D, make_model, make_sequences

FAMILIES = tuple(BLOCK_PATHS)
EVERY_TOKEN = to_plain(Filter(FilterPolicy("none"), 1.0, 1))
"""What an SAE's metadata says that was trained without a filter."""
__all__ = [
    "FAMILIES",
    "D",
    "first_of",
    "identity_sae",
    "make_model",
    "make_sae",
    "make_sequences",
    "mixed_sequences",
    "on_first",
]


def mixed_sequences(padding: str = "right", seed: int = 0) -> Sequences:
    """Three documents of different lengths, padded on one side."""
    return make_sequences(n_positions=10, lengths=[10, 6, 8], padding=padding, seed=seed)


def make_sae(model: Any, site: str = "resid_post.2", seed: int = 0, **options: Any) -> cosae.SAE:
    """A random, calibrated SAE for a site of a model, of 48 features and L0 6."""
    x_ND = capture(model, make_sequences(6, 20, seed=99), site)[site].x_ND
    options = {"score": "cosine", "k": 6, "d_sae": 48, **options}
    sae = cosae.SAE.build(d_in=x_ND.shape[1], seed=seed, sample=x_ND, **options)
    with torch.no_grad():
        if sae.score.family.exponent_owner != "fixed":
            sae.score.set_exponent(0.5)
    calibrate(sae, x_ND)
    sae.metadata["filter"] = EVERY_TOKEN
    return sae


def identity_sae(d: int = D, **options: Any) -> cosae.SAE:
    """2d features, rows ±I: x̂ = Σ ReLU(±x_i) (±e_i) = x."""
    sae = cosae.SAE.build(d_in=d, d_sae=2 * d, score="inner", selector="batch_topk", k=d, bias=False, **options)
    with torch.no_grad():
        sae.score.rows_FD.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        sae.decoder.rows_FD.copy_(sae.score.rows_FD)
        sae.centre_D.zero_()
        sae.selector.set_margin(0.0)
    sae.metadata["filter"] = EVERY_TOKEN
    return sae


def first_of(out: Any) -> Any:
    """The tensor of a module's output: blocks return tuples in older transformers."""
    return out[0] if isinstance(out, tuple) else out


def on_first(change: Any) -> Any:
    """A forward hook that changes the tensor of a module's output."""
    return lambda _m, _a, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
