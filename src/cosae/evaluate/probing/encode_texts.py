"""Labelled texts → pooled codes of every SAE, for `probing.texts`, without ever holding all tokens.

    texts of all questions (`texts.draw`) → tokens (a text a sequence, its first `context` tokens) → activations →
    codes → pooled, sinks in and out

Beside the arms asked for: each one read without its codes' growth with the norm ("NAME, read without its norm", no
retraining), and an untrained SAE of the first arm's make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from cosae.activations.sample import SINKS, Sample, SinkRule
from cosae.errors import CosaeError
from cosae.evaluate.context import Data, TextProbes
from cosae.evaluate.encoded import Autoencoder, encode_all
from cosae.evaluate.norms.read_time import remove_norm
from cosae.evaluate.probing.pooling import pool, pool_vectors
from cosae.evaluate.probing.texts import PooledSet, Rows, Split, draw
from cosae.io.progress import SILENT, Progress
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.text.labelled import LabelledTexts
from cosae.types import Activations, Codes

READ_TIME = "{}, read without its norm"
UNTRAINED = "untrained SAE"


def encode_texts(
    texts: TextProbes,
    saes: Mapping[str, Sequence[SAE]],
    data: Data,
    sink_factor: float,
    progress: Progress = SILENT,
) -> list[PooledSet]:
    """The texts that questions are asked about, encoded by every SAE of every arm and pooled. Of a set, a text that
    turns out to have no token is left out.

    saes: arm → its SAEs (of several seeds), calibrated. Changes none. Raises CosaeError for a set with too few texts,
    an SAE of another width or without an inference threshold, and a set without tokens.
    """
    drawn = draw_texts(texts)
    first = next(data.read_texts([texts.sets[0].texts[row] for row in drawn[0].row_S], texts.context))[1]
    sample = Sample.of(first, SinkRule(sink_factor))
    arms = _arms(saes, first[~sample.sink_N], texts)
    return [
        _encode(one, mine, arms, data, texts, sample.rule, progress)
        for one, mine in zip(texts.sets, drawn, strict=True)
    ]


class Drawn(NamedTuple):
    """What is asked of one set: the splits of its questions, and the texts that they take, ascending."""

    splits: Mapping[tuple[int, int], Split]
    row_S: Rows


def draw_texts(texts: TextProbes) -> list[Drawn]:
    """The questions to each set, from its labels; blank texts are passed over. Raises what `texts.draw` raises."""
    found = []
    for one in texts.sets:
        filled = np.array([bool(text.strip()) for text in one.texts])
        splits = draw(one.name, one.classes, one.class_N, texts.seeds, texts.max_texts, filled, texts.max_classes)
        found.append(Drawn(splits, np.unique(np.concatenate([split.rows for split in splits.values()]))))
    return found


def _arms(saes: Mapping[str, Sequence[SAE]], calm: Activations, texts: TextProbes) -> dict[str, list[Autoencoder]]:
    """Every arm and its readers. calm: tokens that are no sinks, which set the readers' scale."""
    arms: dict[str, list[Autoencoder]] = {}
    for name, listed in saes.items():
        for sae in listed:
            if sae.d_in != calm.x_ND.shape[1]:
                raise CosaeError(
                    f"{name} reads activations of width {sae.d_in}; the site given has width {calm.x_ND.shape[1]}: "
                    "name the model and site that it was trained on."
                )
            if not sae.calibrated:
                raise CosaeError(
                    f"{name} has no inference threshold, and texts are read token by token: calibrate it first "
                    "(cosae.sae.calibrate.calibrate)."
                )
        arms[name] = list(listed)
    if texts.read_time:
        for name, listed in saes.items():
            if any(sae.cfg.frame == "raw" and bool((sae.score.growth != 0).any()) for sae in listed):
                arms[READ_TIME.format(name)] = [remove_norm(sae, calm) for sae in listed]
    if texts.untrained:
        arms[UNTRAINED] = [_untrained(next(iter(saes.values()))[0], calm.x_ND.float())]
    return arms


def _untrained(sae: SAE, x_ND: Tensor) -> SAE:
    """Random weights of the same make, firing as often: what the pooled activations give any set of directions."""
    wanted = max(1, round(sum(int(sae.encode(x).count_B.sum()) for x in torch.split(x_ND, 4096)) / len(x_ND)))
    twin = SAE.build(
        d_in=sae.d_in, d_sae=sae.d_sae, score=sae.cfg.score, frame=sae.cfg.frame, k=wanted, seed=0, sample=x_ND[:4096]
    )
    calibrate(twin, x_ND)
    return twin


def _encode(
    one: LabelledTexts,
    drawn: Drawn,
    arms: Mapping[str, Sequence[Autoencoder]],
    data: Data,
    texts: TextProbes,
    rule: SinkRule,
    progress: Progress,
) -> PooledSet:
    codes: dict[str, dict[str, list[list[Codes]]]] = {s: {n: [[] for _ in a] for n, a in arms.items()} for s in SINKS}
    dense: dict[str, dict[str, list[NDArray[Any]]]] = {s: {"norm": [], "length": [], "x": []} for s in SINKS}
    rows: list[int] = []
    tokens: list[Any] = []
    fired: dict[str, dict[str, int]] = {name: dict.fromkeys(SINKS, 0) for name in arms}
    counted = dict.fromkeys(SINKS, 0)
    reading = data.read_texts([one.texts[row] for row in drawn.row_S], texts.context)
    for read, activations in progress.each(
        reading, f"encoding texts of {one.name}", "texts", len(drawn.row_S), lambda part: len(part[0])
    ):
        place_N = activations.doc_N.numpy().astype(np.int64) - len(rows)
        n = len(read)
        rows += read
        sample = Sample.of(activations, rule)
        keep = {sinks: sample.keep(sinks).numpy() for sinks in SINKS}
        for sinks, keep_N in keep.items():
            dense[sinks]["norm"].append(pool_vectors(activations.norm_N[:, None], place_N, n, keep_N))
            dense[sinks]["length"].append(np.bincount(place_N[keep_N], minlength=n)[:, None].astype(np.float32))
            dense[sinks]["x"].append(pool_vectors(activations.x_ND, place_N, n, keep_N, texts.pooling))
            counted[sinks] += int(keep_N.sum())
        for name, listed in arms.items():
            for s, sae in enumerate(listed):
                found = encode_all(sae, activations)
                token_E = found.token_E[found.value_E != 0].numpy()
                for sinks, keep_N in keep.items():
                    fired[name][sinks] += int(keep_N[token_E].sum()) if s == 0 else 0
                    codes[sinks][name][s].append(pool(found, place_N, n, keep_N, texts.pooling))
        vocabulary = max(data.vocabulary, int(activations.token_N.max()) + 1)
        ones = np.ones(len(place_N))
        tokens.append(sparse.csr_matrix((ones, (place_N, activations.token_N.numpy())), shape=(n, vocabulary)))
    row_S = drawn.row_S[rows]
    splits = {key: split.among(row_S) for key, split in drawn.splits.items()}
    if any(len(set(side)) < 2 for split in splits.values() for side in (split.train_label, split.test_label)):
        raise CosaeError(f"too few of the texts drawn from {one.name} have a token: look at the texts, or draw more.")
    return PooledSet(
        name=one.name,
        classes=one.classes,
        class_S=one.class_N[row_S],
        codes={s: {name: [Codes.cat(parts) for parts in listed] for name, listed in codes[s].items()} for s in SINKS},
        dense={s: {name: np.concatenate(parts) for name, parts in dense[s].items()} for s in SINKS},
        tokens_SV=sparse.vstack(tokens).tocsr(),
        splits=splits,
        n_texts=len(one),
        l0={name: {sinks: fired[name][sinks] / max(counted[sinks], 1) for sinks in SINKS} for name in arms},
    )
