"""What SAEBench's mask leaves in: with a BOS at position 0, the first word of some texts is a sink as well.

The texts of `saebench` with a BOS, block 14: SAEBench's rule and its regression on raw codes, pooled from position 1,
which is what it pools, and from position 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import cosae
from cosae.activations.sinks import FACTOR
from cosae.evaluate.encoded import encode_all
from cosae.evaluate.probing.pooling import pool
from cosae.evaluate.probing.ranking import mean_difference_of_latents
from cosae.evaluate.probing.texts import Split
from cosae.recipe import DataConfig
from cosae.run.dataset.base import DataUse
from cosae.run.dataset.model import ModelDataset
from cosae.run.folder import read_json, write_json
from cosae.types import Activations, Codes
from studies.real_model import probing, saebench
from studies.real_model.design import MODEL
from studies.real_model.texts import read_texts
from studies.runsets import SEEDS, folder_of

FILE = saebench.PLACE / "second_sink.json"
RUN, BLOCK = "real_14", 14
FIRST = (1, 2)


def ensure() -> None:
    """Read the texts and write FILE, where it is not there yet."""
    if FILE.exists():
        return
    data = ModelDataset(DataConfig(model=MODEL, corpus="wiki:en"), DataUse())
    saes = {f"{arm}_{s}": cosae.load(folder_of(RUN, s) / "arms" / arm) for s in SEEDS for arm in saebench.ARMS}
    found: dict[str, Any] = {"ratio": [], **{str(first): {name: [] for name in saes} for first in FIRST}}
    for set_name in saebench.SETS:
        sides = [saebench.lines(set_name, part) for part in ("train", "test")]
        texts = [one["text"] for side in sides for one in side]
        read = read_texts(data, texts, (BLOCK,), saebench.SIZES["context_length"], add_bos=True)
        activations, position_N = Activations.bare(read[f"x.{BLOCK}"].float()), read["position"].numpy()
        norm_N = read[f"norm.{BLOCK}"].numpy()
        found["ratio"] += (norm_N[position_N == 1] / np.median(norm_N)).round(2).tolist()
        splits = _splits(*(np.array([one["label"] for one in side]) for side in sides))
        for name, sae in saes.items():
            codes = encode_all(sae, activations)
            for first in FIRST:
                pooled = pool(codes, read["text"].numpy().astype(np.int64), len(texts), position_N >= first, "mean")
                found[str(first)][name] += [_accuracy(pooled, split) for split in splits]
    write_json(FILE, found)


def _splits(train_S: NDArray[Any], test_S: NDArray[Any]) -> list[Split]:
    """A question a class: its texts and as many others, drawn by the class's number."""
    found = []
    for label in range(4):
        rng, rows = np.random.default_rng(label), []
        for at, label_S in ((0, train_S), (len(train_S), test_S)):
            own, others = np.flatnonzero(label_S == label), np.flatnonzero(label_S != label)
            rows.append(at + np.sort(np.concatenate([own, rng.choice(others, len(own), replace=False)])))
        labels = np.concatenate([train_S, test_S]) == label
        found.append(Split(rows[0], rows[1], labels[rows[0]], labels[rows[1]]))
    return found


def _accuracy(codes: Codes, split: Split) -> float:
    """One latent, chosen by the raw mean difference, its codes as they are."""
    keep_N = np.zeros(codes.n_tokens, dtype=bool)
    keep_N[split.train_R] = True
    difference_F = mean_difference_of_latents(codes.take(keep_N), split.train_label[:, None])[:, 0]
    column_S1 = codes.to_scipy()[:, [int(np.abs(difference_F).argmax())]].toarray()
    return probing.score(column_S1, split, standardised=False)[0]


def numbers(interval: Any) -> dict[str, Any]:
    """Share of texts whose first word is a sink; by the first position pooled, accuracies and the cosine's gain."""
    if not FILE.exists():
        return {}
    found = read_json(FILE)
    ratio = np.array(found["ratio"])
    rows: dict[str, Any] = {"texts": len(ratio), "second_sinks": round(float((ratio >= FACTOR).mean()), 4)}
    for first in map(str, FIRST):
        by_arm = {arm: np.array([found[first][f"{arm}_{s}"] for s in SEEDS]).T for arm in saebench.ARMS}
        standard, cosine = by_arm.values()
        means = {arm: round(float(of.mean()), 4) for arm, of in by_arm.items()}
        rows[first] = {**means, "gain": interval(100 * (cosine - standard))}
    return rows
