"""What the pass has found so far, of every SAE and of their pairs: bounded, and in arrays for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from cosae.activations.filter import Filter
from cosae.activations.sinks import sink_mask
from cosae.browse.collect import cofiring
from cosae.browse.collect.chunks import SAMPLE_TOKENS, Chunk
from cosae.browse.collect.cofiring import PairSums
from cosae.browse.collect.examples import Examples
from cosae.browse.collect.numbers import Numbers
from cosae.browse.collect.windows import Windows, kappas_around, values_around
from cosae.evaluate.norms.counterfactual import lengths
from cosae.kernels.cpu.native import each
from cosae.sae.model import SAE
from cosae.types import Activations, Codes

Array = NDArray[Any]
WAITING_ENTRIES = 2**22
"""Codes of later tokens that wait until pairs are counted on them together."""


@dataclass(frozen=True)
class Probe:
    """What must be known before the first token is counted, from the first tokens of the pass.

    median, factor   of |x|, against which sinks are told; cuts: between the quartiles of |x| of those that are none
    median_r   by SAE the median |x − c| of those
    """

    tokens: int
    median: float
    factor: float
    quantiles: tuple[float, ...]
    cuts: tuple[float, float, float]
    median_r: Mapping[str, float]


@dataclass
class SAEState:
    """One SAE, and what was found of its features."""

    name: str
    sae: SAE
    fitted: Filter | None
    numbers: Numbers
    examples: Examples
    windows: Windows
    sample: list[sparse.csr_array] = field(default_factory=list)
    waiting: list[sparse.csr_array] = field(default_factory=list)

    @classmethod
    def new(cls, name: str, sae: SAE, fitted: Filter | None, folder: Path, width: int, seed: int) -> SAEState:
        signed = sae.cfg.selector == "abs_topk"
        examples = Examples(sae.d_sae, signed, seed)
        windows = Windows(folder, sae.d_sae, examples.slots, width)
        return cls(name, sae, fitted, Numbers(sae.d_sae), examples, windows)

    @property
    def invariant(self) -> bool:
        """Whether the norm decides nothing, whatever the data: the frame takes it out, or every exponent is 0."""
        return self.sae.cfg.frame != "raw" or bool((self.sae.scale_a == 0).all())

    def counted(self, activations: Activations) -> Array:
        """(N,) bool: tokens that count: none special, none that the SAE's own filter leaves out, none all zero."""
        keep_N = ~activations.special_N & (activations.x_ND != 0).any(-1)
        counted: Array = (keep_N if self.fitted is None else keep_N & self.fitted.keep(activations)).cpu().numpy()
        return counted

    @torch.no_grad()
    def read(self, chunk: Chunk, probe: Probe, counted_N: Array, pair_N: Array) -> Array:
        """Count a chunk, and keep what belongs among the examples. Returns (N,) |x − c|."""
        activations, sae = chunk.activations, self.sae
        x_ND = activations.x_ND.to(sae.device, sae.dtype)
        by_token = _matrix(sae.encode(x_ND))
        r_N = lengths(sae, activations).numpy()
        by_feature = by_token.tocsc()
        feature_E = np.repeat(np.arange(sae.d_sae), np.diff(by_feature.indptr))
        token_E, value_E = by_feature.indices.astype(np.int64), by_feature.data
        self._count(chunk, probe, pair_N, counted_N, (feature_E, token_E, value_E))
        if not self.invariant:
            self._count_moved(x_ND, r_N, probe.median_r[self.name], counted_N, by_token)
        self._keep_examples(chunk, counted_N, (feature_E, token_E, value_E), x_ND)
        self._keep_codes(chunk, by_token, pair_N)
        return r_N

    def _count(
        self, chunk: Chunk, probe: Probe, pair_N: Array, counted_N: Array, entries: tuple[Array, Array, Array]
    ) -> None:
        norm_N = chunk.activations.norm_N.cpu().double().numpy()
        quartile_N = np.searchsorted(np.array(probe.cuts), norm_N, side="left")
        feature_e, token_e, value_e = (one[counted_N[entries[1]]] for one in entries)
        self.numbers.add(feature_e, value_e, norm_N[token_e], quartile_N[token_e], pair_N[token_e])
        self.numbers.tokens += int(counted_N.sum())
        self.numbers.quartile_tokens += np.bincount(quartile_N[counted_N], minlength=4)
        self.numbers.norm_sum += float(norm_N[counted_N].sum())

    def _count_moved(
        self, x_ND: torch.Tensor, r_N: Array, median_r: float, counted_N: Array, now: sparse.csr_array
    ) -> None:
        """Every token at the median length: what vanishes, what appears (cosae.evaluate.norms.driven)."""
        stretch_N = torch.from_numpy(median_r / np.maximum(r_N, 1e-30)).to(x_ND)
        moved_ND = self.sae.centre_D + stretch_N[:, None] * (x_ND - self.sae.centre_D)
        moved_ND[torch.from_numpy(r_N == 0)] = x_ND[torch.from_numpy(r_N == 0)]
        then = _matrix(self.sae.encode(moved_ND))
        keys = [_keys(one, counted_N) for one in (now, then)]
        for name, (a, b) in (("vanished", keys), ("appeared", reversed(keys))):
            only = a[~_among(a, b)] % self.sae.d_sae
            self.numbers.of[name] += np.bincount(only, minlength=self.sae.d_sae)

    def _keep_examples(
        self, chunk: Chunk, counted_N: Array, entries: tuple[Array, Array, Array], x_ND: torch.Tensor
    ) -> None:
        some = np.flatnonzero(counted_N[entries[1]])
        feature_E, token_E, value_E = (one[some] for one in entries)
        sequence_E = chunk.sequence_N[token_E] + chunk.first_sequence
        entry, slot = self.examples.offer(feature_E, token_E + chunk.first, sequence_E, value_E)
        if not len(entry):
            return
        width = self.windows.width
        feature, token = feature_E[entry], token_E[entry]
        start_N, length_N = chunk.windows(width)
        start, length = start_N[token], length_N[token]
        value = values_around(feature, start, length, width, entries, len(chunk))
        z_ND = self.sae._framed(x_ND).z_BD
        rows_FD = self.sae.score.rows_FD.detach()
        kappa = kappas_around(feature, token, start, length, width, chunk, z_ND, rows_FD)
        self.windows.put(feature, slot, token + chunk.first, value, kappa)

    def _keep_codes(self, chunk: Chunk, by_token: sparse.csr_array, pair_N: Array) -> None:
        first = min(max(SAMPLE_TOKENS - chunk.first, 0), len(chunk))
        if first:
            self.sample.append(by_token[:first])
        if first < len(chunk):
            self.waiting.append(by_token[first:][pair_N[first:]])

    def arrays(self) -> dict[str, Array]:
        """What a checkpoint keeps."""
        found = {**self.numbers.of, **{f"example_{name}": value for name, value in self.examples.arrays().items()}}
        found["tokens"] = np.array([self.numbers.tokens, *self.numbers.quartile_tokens])
        found["norm_sum"] = np.array(self.numbers.norm_sum)
        if self.sample:
            codes = joined(self.sample, self.sae.d_sae)
            found |= {"sample_indptr": codes.indptr, "sample_indices": codes.indices, "sample_data": codes.data}
        return found

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Put back what `arrays` gave."""
        for name, value in self.numbers.of.items():
            value[...] = arrays[name]
        for name, value in self.examples.arrays().items():
            value[...] = arrays[f"example_{name}"]
        self.numbers.tokens, self.numbers.quartile_tokens = int(arrays["tokens"][0]), arrays["tokens"][1:].copy()
        self.numbers.norm_sum = float(arrays["norm_sum"])
        if "sample_indptr" in arrays:
            parts = (arrays["sample_data"], arrays["sample_indices"], arrays["sample_indptr"])
            shape = (len(arrays["sample_indptr"]) - 1, self.sae.d_sae)
            self.sample = [sparse.csr_array(parts, shape=shape)]

    @staticmethod
    def bytes(n_features: int, signed: bool) -> int:
        """Of memory, beside the codes of the sample: whatever the number of tokens."""
        arrays = {**Numbers(1).of, **Examples(1, signed, 0).arrays()}
        return n_features * sum(value.nbytes for value in arrays.values())


def joined(parts: list[sparse.csr_array], n_features: int) -> sparse.csr_array:
    """Codes of parts one after the other."""
    if not parts:
        return sparse.csr_array((0, n_features), dtype=np.float32)
    return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")


def _matrix(codes: Codes) -> sparse.csr_array:
    """(N, F) float32, without zeros."""
    value_E, feature_E = codes.value_E.float().cpu().numpy(), codes.feature_E.cpu().numpy()
    found = sparse.csr_array((value_E, feature_E, codes.offset_B1.cpu().numpy()), shape=(codes.n_tokens, codes.d_sae))
    found.eliminate_zeros()
    return found


def _keys(codes: sparse.csr_array, counted_N: Array) -> Array:
    """Token · F + feature of every entry of a counted token, ascending."""
    token_E = np.repeat(np.arange(codes.shape[0]), np.diff(codes.indptr))
    key_E: Array = (token_E * codes.shape[1] + codes.indices)[counted_N[token_E]]
    return key_E


def _among(a: Array, b: Array) -> Array:
    """Which of a are in b, both ascending."""
    at = np.minimum(np.searchsorted(b, a), max(len(b) - 1, 0))
    found: Array = b[at] == a if len(b) else np.zeros(len(a), dtype=bool)
    return found


class Pairs:
    """Sums over pairs of features, within each SAE and of every two SAEs: candidates from the sample, counted on all.

    sums  (a, b) → PairSums, a before b or the same
    """

    def __init__(self, states: list[SAEState]) -> None:
        self._states = states
        self.sums: dict[tuple[int, int], PairSums] = {}
        self.near: dict[int, tuple[Array, Array]] = {}

    def choose(self, pair_N: Array) -> None:
        """Choose candidates on the sample, tokens pair_N of it, and count them there."""
        codes = [joined(one.sample, one.sae.d_sae)[pair_N[:SAMPLE_TOKENS]].tocsc() for one in self._states]

        def among(i: int, j: int) -> PairSums:
            a, b = self._states[i].sae, self._states[j].sae
            own, theirs = np.arange(a.d_sae)[:, None], np.arange(b.d_sae)[:, None]
            if i == j:
                self.near[i] = cofiring.best_by_cosine(a.W_dec, a.W_dec, cofiring.NEAREST, True)
                together = cofiring.best_by_jaccard(_fires(codes[i]), cofiring.CANDIDATES)
                return PairSums(*cofiring.unique_pairs([_spread(own, together), _spread(own, self.near[i][0])]))
            there, back = cofiring.best_by_correlation(codes[i], codes[j], MATCH_CANDIDATES)
            close = cofiring.best_by_cosine(a.W_dec, b.W_dec, MATCH_NEAREST, False)[0]
            close_back = cofiring.best_by_cosine(b.W_dec, a.W_dec, MATCH_NEAREST, False)[0]
            parts = [_spread(own, there), _spread(own, close)]
            parts += [_spread(theirs, back)[::-1], _spread(theirs, close_back)[::-1]]
            return PairSums(*cofiring.unique_pairs([(x, y) for x, y in parts]))

        n = len(self._states)
        places = [(i, j) for i in range(n) for j in range(i, n)]
        self.sums = dict(zip(places, each(lambda place: among(*place), places), strict=True))
        self._count(codes)

    def _count(self, codes: list[sparse.csc_array]) -> None:
        """Tokens more: within an SAE on how many both fire, across SAEs the products of values."""
        fires = [_fires(one) for one in codes]

        def count(place: tuple[int, int]) -> None:
            i, j = place
            self.sums[place].add(*((fires[i], fires[i]) if i == j else (codes[i], codes[j])))

        each(count, list(self.sums))

    def count_waiting(self) -> None:
        """Count what waits, if anything."""
        codes = [joined(one.waiting, one.sae.d_sae).tocsc() for one in self._states]
        for one in self._states:
            one.waiting.clear()
        if codes and codes[0].shape[0]:
            self._count(codes)

    @property
    def due(self) -> bool:
        """Whether enough waits."""
        return any(sum(part.nnz for part in one.waiting) >= WAITING_ENTRIES for one in self._states)

    def arrays(self) -> dict[str, Array]:
        """What a checkpoint keeps."""
        found = {f"near_{i}_{part}": value for i, both in self.near.items() for part, value in enumerate(both)}
        for (i, j), sums in self.sums.items():
            found |= {f"pair_{i}_{j}_{name}": getattr(sums, name) for name in ("i_P", "j_P", "sum_P")}
        return found

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Put back what `arrays` gave."""
        for i in range(len(self._states)):
            if f"near_{i}_0" in arrays:
                self.near[i] = arrays[f"near_{i}_0"], arrays[f"near_{i}_1"]
            for j in range(i, len(self._states)):
                if f"pair_{i}_{j}_i_P" in arrays:
                    sums = self.sums[i, j] = PairSums(arrays[f"pair_{i}_{j}_i_P"], arrays[f"pair_{i}_{j}_j_P"])
                    sums.sum_P = arrays[f"pair_{i}_{j}_sum_P"]


def _fires(code_NF: sparse.csc_array) -> sparse.csc_array:
    """1 for every code."""
    return sparse.csc_array((np.ones_like(code_NF.data), code_NF.indices, code_NF.indptr), shape=code_NF.shape)


MATCH_CANDIDATES, MATCH_NEAREST = 6, 3


def _spread(own_F1: Array, other_Fk: Array) -> tuple[Array, Array]:
    return np.broadcast_to(own_F1, other_Fk.shape), other_Fk


def sinks_of(activations: Activations, probe: Probe) -> Array:
    """(N,) bool."""
    found: Array = sink_mask(activations, probe.median, probe.factor).cpu().numpy()
    return found
