"""Labelled texts → pooled codes of every SAE, for `evaluate.text_probing`, without ever holding all tokens.

    texts → tokens (a text a sequence, its first `context` tokens) → activations → codes → pooled, sinks in and out

Beside the arms asked for: each one read without its codes' growth with the norm ("NAME, read without its norm", no
retraining), and an untrained SAE of the first arm's make.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from cosae.activations.sinks import sink_mask
from cosae.errors import CosaeError
from cosae.evaluate.encoding import encode_all
from cosae.evaluate.norms.read_time import remove_norm
from cosae.evaluate.probing.pooling import POOLINGS, pool, pool_vectors
from cosae.evaluate.probing.texts import SINKS, PooledSet
from cosae.evaluate.reconstruct import Autoencoder
from cosae.models.capture import capture
from cosae.run.dataset.corpus import adds_bos, pad_id
from cosae.run.dataset.dataset import ModelData
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.text.labelled import LabelledTexts
from cosae.text.packing import iterate_sequences
from cosae.text.pylib import Document
from cosae.text.tokenization import tokenize_documents
from cosae.types import Activations, Codes

READ_TIME = "{}, read without its norm"
UNTRAINED = "untrained SAE"
CHUNK = 64
"""Texts captured, encoded and pooled at once."""


@dataclass(frozen=True)
class Reading:
    """How texts are read: first `context` tokens, how pooled, and what multiple of the median norm makes a sink."""

    context: int = 128
    pooling: str = "mean"
    sink_factor: float = 10.0
    read_time: bool = True
    untrained: bool = True

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise CosaeError(f"pooling must be one of {', '.join(POOLINGS)}. Got {self.pooling!r} instead.")


def encode_texts(
    sets: Sequence[LabelledTexts], saes: Mapping[str, Sequence[SAE]], data: ModelData, reading: Reading | None = None
) -> list[PooledSet]:
    """The sets, encoded by every SAE of every arm and pooled. Texts without a token are left out.

    saes: arm → its SAEs (of several seeds), calibrated. Changes none. Raises CosaeError for an SAE of another width or
    without an inference threshold, and a set without tokens.
    """
    reading = Reading() if reading is None else reading
    first = next(_chunks(sets[0], data, reading))[1]
    median = float(first.norm_N.double().median())
    calm = first[~sink_mask(first, median, reading.sink_factor)]
    arms = _arms(saes, calm, reading)
    return [_encode(one, arms, data, reading, median) for one in sets]


def _arms(saes: Mapping[str, Sequence[SAE]], calm: Activations, reading: Reading) -> dict[str, list[Autoencoder]]:
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
    if reading.read_time:
        for name, listed in saes.items():
            if any(sae.cfg.frame == "raw" and bool((sae.scale_a != 0).any()) for sae in listed):
                arms[READ_TIME.format(name)] = [remove_norm(sae, calm) for sae in listed]
    if reading.untrained:
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
    one: LabelledTexts, arms: Mapping[str, Sequence[Autoencoder]], data: ModelData, reading: Reading, median: float
) -> PooledSet:
    codes: dict[str, dict[str, list[list[Codes]]]] = {s: {n: [[] for _ in a] for n, a in arms.items()} for s in SINKS}
    dense: dict[str, dict[str, list[NDArray[Any]]]] = {s: {"norm": [], "length": [], "x": []} for s in SINKS}
    rows: list[int] = []
    tokens: list[Any] = []
    for texts, activations in _chunks(one, data, reading):
        place_N = activations.doc_N.numpy().astype(np.int64) - len(rows)
        n = len(texts)
        rows += texts
        sink_N = sink_mask(activations, median, reading.sink_factor).numpy()
        for sinks, keep_N in zip(SINKS, (np.ones_like(sink_N), ~sink_N), strict=True):
            norm_N1 = activations.norm_N[:, None]
            dense[sinks]["norm"].append(pool_vectors(norm_N1, place_N, n, keep_N))
            dense[sinks]["length"].append(np.bincount(place_N[keep_N], minlength=n)[:, None].astype(np.float32))
            dense[sinks]["x"].append(pool_vectors(activations.x_ND, place_N, n, keep_N, reading.pooling))
        for name, listed in arms.items():
            for s, sae in enumerate(listed):
                found = encode_all(sae, activations)
                for sinks, keep_N in zip(SINKS, (np.ones_like(sink_N), ~sink_N), strict=True):
                    codes[sinks][name][s].append(pool(found, place_N, n, keep_N, reading.pooling))
        vocabulary = max(len(data.tokenizer), int(activations.token_N.max()) + 1)
        ones = np.ones(len(place_N))
        tokens.append(sparse.csr_matrix((ones, (place_N, activations.token_N.numpy())), shape=(n, vocabulary)))
    return PooledSet(
        name=one.name,
        classes=one.classes,
        class_S=one.class_N[rows],
        codes={s: {name: [Codes.cat(parts) for parts in listed] for name, listed in codes[s].items()} for s in SINKS},
        dense={s: {name: np.concatenate(parts) for name, parts in dense[s].items()} for s in SINKS},
        tokens_SV=sparse.vstack(tokens).tocsr(),
    )


def _chunks(one: LabelledTexts, data: ModelData, reading: Reading) -> Iterator[tuple[list[int], Activations]]:
    """Rows of a set that have a token, and their activations: doc_N counts such rows from the set's first."""
    recipe = data.recipe.data
    documents = (Document(str(row), text) for row, text in enumerate(one.texts))
    tokenized = tokenize_documents(documents, data.tokenizer, add_bos=adds_bos(recipe, data.tokenizer))
    packed = iterate_sequences(
        tokenized,
        reading.context,
        "document",
        pad_id=pad_id(data.tokenizer),
        special_ids=data.tokenizer.all_special_ids,
        rows_per_chunk=CHUNK,
    )
    for chunk in packed:
        longest = int(chunk.mask_ST.sum(1).max())
        names = [chunk.doc_names[i - chunk.first_doc] for i in chunk.doc_ST[:, 0].tolist()]
        found = capture(data.model, _cut(chunk, longest), data.site, batch_sequences=data.batch_sequences)
        yield [int(name) for name in names], found[data.site.name]


def _cut(chunk: Any, longest: int) -> Any:
    """Without the columns in which every row is padding."""
    fields = {
        name: getattr(chunk, name)[:, :longest] for name in ("ids_ST", "doc_ST", "index_ST", "mask_ST", "special_ST")
    }
    return replace(chunk, **fields)
