"""Labelled texts → codes of an SAE → pooled in five ways → what a few latents tell of each class.

    in        every token                                        the paper's and SAEBench's
    out       all but position 0 (and what is as long)           the sink left out, nothing else changed
    random    all but one token a text, drawn among the others   control: is it the leaving out?
    clipped   every token, codes at position 0 at most the latent's largest elsewhere   control: is it the size?
    last      the last token                                     control: no sink in it
    planted   as `in`, position 0 made 150 × the median length along one direction: where there is no sink (block 10)

A question is one class against as many other texts, 80 of each for choosing and fitting, 20 of each for scoring; a
set's value is the mean over its questions. Latents are chosen by each rule of `cosae.evaluate.probing.ranking`; a
logistic regression (C = 1) reads the first ones standardised, and for `raw/…` as they are, as SAEBench does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from cosae.activations.perturbation import Perturbation, apply
from cosae.activations.sinks import FACTOR, sink_mask
from cosae.evaluate.encoded import Autoencoder, encode_all
from cosae.evaluate.probing import logistic
from cosae.evaluate.probing.pooling import pool
from cosae.evaluate.probing.ranking import EVERY_RULE, rank_quality
from cosae.evaluate.probing.texts import TOPS, Split, choose
from cosae.types import Codes
from studies.real_model.texts import ReadSet

POOLINGS = ("in", "out", "random", "clipped", "last")
FULLY = ("in", "out")
"""Poolings that are also read by more latents and without standardising."""
LIGHTLY = ("in", "out", "last")
"""Poolings where a run only serves the dose–response figure: one latent."""
PLANTED = Perturbation(kind="sinks", position=0, factor=150.0, direction="massive")
METRICS = ("accuracy", "auroc")
Values = dict[str, dict[str, list[float]]]


def probe(
    sae: Autoencoder | None,
    one: ReadSet,
    median_norm: float,
    *,
    closely: bool = True,
    full: bool = False,
    planted: bool = False,
) -> dict[str, Any]:
    """One SAE (None: the dimensions of x) on one set: pooling → reading → [accuracy, AUROC], and what fires.

    closely: all poolings, 1, 2 and 5 latents; full: all latents too.
    """
    sink_N = sink_mask(one.activations, median_norm, FACTOR).numpy()
    n_texts = int(one.text_N.max()) + 1
    values: Values = {}
    if sae is None:
        codes = Codes.from_dense(one.activations.x_ND.float())
        poolings = dict(_pooled(codes, one, sink_N, n_texts, FULLY))
        fired: dict[str, float] = {}
    else:
        codes = encode_all(sae, one.activations)
        poolings = dict(_pooled(codes, one, sink_N, n_texts, POOLINGS if closely else LIGHTLY))
        count_N = np.bincount(codes.token_E.numpy(), weights=codes.value_E.numpy() != 0, minlength=len(sink_N))
        first_N = one.activations.position_N.numpy() == 0
        fired = {"at_position_0": float(count_N[first_N].mean()), "elsewhere": float(count_N[~sink_N].mean())}
        if planted:
            moved = encode_all(sae, apply(one.activations, PLANTED))
            poolings |= {"planted": dict(_pooled(moved, one, sink_N, n_texts, ("in",)))["in"]}
    for pooling, pooled in poolings.items():
        tops = TOPS if closely and pooling in FULLY and sae is not None else TOPS[:1]
        scored = [
            dict(_scored(pooled, split, tops, pooling in FULLY, full and pooling in FULLY and sae is not None))
            for split in one.splits.values()
        ]
        values[pooling] = {reading: np.mean([s[reading] for s in scored], axis=0).tolist() for reading in scored[0]}
    return {"values": values, "fired": fired, "questions": len(one.splits)}


def _pooled(
    codes: Codes, one: ReadSet, sink_N: NDArray[np.bool_], n_texts: int, wanted: tuple[str, ...]
) -> Iterator[tuple[str, Codes]]:
    """(pooling, codes of texts)."""
    everything = np.ones_like(sink_N)
    keep = {"in": everything, "out": ~sink_N, "random": ~_one_other(one), "clipped": everything, "last": everything}
    for pooling in wanted:
        tokens = _clipped(codes, sink_N) if pooling == "clipped" else codes
        yield pooling, pool(tokens, one.text_N, n_texts, keep[pooling], "last" if pooling == "last" else "mean")


def _one_other(one: ReadSet) -> NDArray[np.bool_]:
    """(N,) bool: of every text one token drawn among those after position 0; none where there is no other."""
    rng = np.random.default_rng(len(one.text_N))
    draw_N = rng.random(len(one.text_N))
    draw_N[one.activations.position_N.numpy() == 0] = -1.0
    order_N = np.lexsort((draw_N, one.text_N))
    last_N = np.append(one.text_N[order_N][1:] != one.text_N[order_N][:-1], True)
    chosen_N = np.zeros(len(draw_N), dtype=bool)
    chosen_N[order_N[last_N]] = True
    return chosen_N & (draw_N >= 0)


def _clipped(codes: Codes, sink_N: NDArray[np.bool_]) -> Codes:
    """Codes at sinks cut to the latent's largest code at any other token."""
    token_E, feature_E, value_E = codes.token_E.numpy(), codes.feature_E.numpy(), codes.value_E.numpy().copy()
    at_sink_E = sink_N[token_E]
    largest_F = np.zeros(codes.d_sae, dtype=value_E.dtype)
    np.maximum.at(largest_F, feature_E[~at_sink_E], value_E[~at_sink_E])
    value_E[at_sink_E] = np.minimum(value_E[at_sink_E], largest_F[feature_E[at_sink_E]])
    return Codes(codes.offset_B1, codes.feature_E, torch.from_numpy(value_E), codes.d_sae, codes.shape)


def _scored(
    codes: Codes, split: Split, tops: Sequence[int], raw: bool, full: bool
) -> Iterator[tuple[str, list[float]]]:
    """(reading, [accuracy, AUROC]) of one question."""
    code_SF: sparse.csr_matrix = codes.to_scipy()
    for rule, feature_K in choose(codes, split, EVERY_RULE, max(tops)).items():
        columns_SK = code_SF[:, feature_K].toarray().astype(np.float64)
        for top in tops:
            yield f"{rule}/top_{top}", score(columns_SK[:, :top], split)
        if raw and rule == "mean_difference":
            yield f"raw/{rule}/top_1", score(columns_SK[:, :1], split, standardised=False)
    if full:
        yield "full", score(code_SF, split)


def score(x: Any, split: Split, standardised: bool = True) -> list[float]:
    """Accuracy and AUROC of a regression on some latents (dense), or on all (sparse, by the library's own solver)."""
    train, test, label_N1 = x[split.train_R], x[split.test_R], split.train_label[:, None]
    if sparse.issparse(x):
        logit_M1 = logistic.scores(train, label_N1, test)
    else:
        mean_K, deviation_K = train.mean(axis=0), train.std(axis=0)
        scale_K = np.divide(1.0, deviation_K, out=np.zeros_like(deviation_K), where=deviation_K > 0)
        scale_K = scale_K if standardised else np.ones_like(scale_K)
        weight_K1, bias_1 = logistic.fit((train - mean_K) * scale_K, label_N1)
        logit_M1 = (test - mean_K) * scale_K @ weight_K1 + bias_1
    accuracy = float(((logit_M1[:, 0] > 0) == split.test_label).mean())
    return [accuracy, float(rank_quality(logit_M1, split.test_label[:, None])[0][0])]


def by_set(found: Mapping[str, Mapping[str, Any]], pooling: str, reading: str, metric: str) -> list[float]:
    """Of one SAE one number a set, in the order of the sets."""
    at = METRICS.index(metric)
    return [one["values"][pooling][reading][at] for one in found.values()]
