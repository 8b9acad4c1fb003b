"""What fires as a token is, and what would fire were it of median length.

In: the EncodedPass of a cosae SAE. Out: the second and last pass of its tokens, each at the median length: what fires
in either reading is counted by feature and by document, and nothing else of it is kept.

Every token keeps the direction of x − c and gets the length r' = the median of r = |x − c|. Its scores become
    s'_i = content_i · (r'/r)^{a_i} + β_i          (paper §1; the inner product is a = 1)
so one product serves both readings, and where a = 0 the factor is 1 to the last bit: nothing changes, exactly. The
unit and layer_norm frames take the length out before anything is scored: there nothing changes by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.errors import CosaeError
from cosae.evaluate.encoded import BATCH_TOKENS, EncodedPass, resampling_units, row_slices
from cosae.kernels import ScoreTerms, reference
from cosae.sae.model import SAE
from cosae.types import Activations

Array = NDArray[np.float64]

DENSE_ELEMENTS = 1 << 24
"""Scores held at once (64 MB in fp32, a few copies of it): a bound on memory, of no influence on the numbers."""


@dataclass(frozen=True)
class Readings:
    """Entries of one batch that fire in either reading, on the CPU; all (E,).

    token_E, feature_E int64 (token among all N); now_E, then_E bool: fires as it is, fires at the median length;
    value_E, there_E float64: its value in each, where it fires
    """

    token_E: Tensor
    feature_E: Tensor
    now_E: Tensor
    then_E: Tensor
    value_E: Tensor
    there_E: Tensor

    def of(self, keep_N: Tensor) -> Readings:
        """Those of the tokens where keep_N (N,) is True."""
        on_E = keep_N[self.token_E]
        return Readings(*(getattr(self, name)[on_E] for name in self.__dataclass_fields__))


@torch.no_grad()
def lengths(sae: SAE, activations: Activations) -> Tensor:
    """(N,) float64: r = |x − c| of every token; in the layer_norm frame, where c lives after it, |x − mean x|."""
    parts = []
    for rows in row_slices(len(activations), BATCH_TOKENS):
        x_BD = activations.x_ND[rows].double()
        about = x_BD.mean(-1, keepdim=True) if sae.cfg.frame == "layer_norm" else sae.centre_D.double().to(x_BD.device)
        parts.append((x_BD - about).norm(dim=-1).cpu())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class MedianPass:
    """What the second pass found.

    median_r  the length that every token got
    r_N       (N,) float64, |x − c| of every token
    counts    firings in either reading, for "sinks_out" and "sinks_in"
    same_l0   entries (token · F + feature), of tokens that are no sinks, whose scores without the growth with r are the
              largest, as many as fire; None for selectors without one threshold on the scores
    """

    median_r: float
    r_N: Tensor
    counts: Mapping[str, Tally]
    same_l0: Tensor | None


@torch.no_grad()
def at_median(
    encoded: EncodedPass[SAE], median_r: float | None = None, on_rows: Callable[[int], None] = lambda n: None
) -> MedianPass:
    """Every token by the inference rule at r = median_r; the median r of the tokens that are no sinks by default.

    A token at the centre has no direction and stays as it is. Raises CosaeError for a batch_topk without a threshold
    (what a token keeps would depend on the tokens beside it), without tokens, and for a median_r that is no length.
    """
    sae, sample = encoded.sae, encoded.sample
    if not sae.calibrated:
        raise CosaeError(
            "the norm test reads each token on its own, and this batch_topk SAE has no inference threshold: calibrate "
            "it first (cosae.sae.calibrate.calibrate)."
        )
    live_N, out_N = encoded.keep["sinks_in"], encoded.keep["sinks_out"]
    if not bool(live_N.any()):
        raise CosaeError(f"norms need at least one token that is not all zero. Got {len(live_N)} rows, none.")
    if median_r is not None and not 0 < median_r < float("inf"):
        raise CosaeError(f"median_r must be a length above 0. Got {median_r} instead.")
    r_N = lengths(sae, sample.activations)
    middle = float(np.median(r_N[out_N if bool(out_N.any()) else live_N].numpy())) if median_r is None else median_r
    unit_N = resampling_units(sample.activations.doc_N)[0]
    counts = {sinks: Tally(encoded.keep[sinks], sae.d_sae, unit_N) for sinks in encoded.keep}
    largest = None
    if sae.cfg.selector not in ("gated", "abs_topk"):
        largest = Largest(int((out_N[encoded.codes.token_E]).sum()))
    for rows in row_slices(len(sample), max(1, min(encoded.batch_tokens, DENSE_ELEMENTS // sae.d_sae))):
        framed = sae._framed(sample.activations.x_ND[rows])
        terms = sae.score.terms(framed).detached()
        content_BF = reference.content(terms)
        to_median_B1 = torch.zeros_like(framed.norm_stats.r_B)[:, None]
        if sae.cfg.frame == "raw" and middle > 0:
            r_B = framed.norm_stats.r_B
            to_median_B1 = torch.where(r_B > 0, np.log(middle) - r_B.clamp_min(1e-30).log(), 0.0)[:, None]
        factor_BF = (terms.exponent * to_median_B1).exp()
        there = _fired(sae, terms, content_BF * factor_BF, to_median_B1)
        found = _readings(_fired(sae, terms, content_BF, 0.0), there, rows.start)
        for one in counts.values():
            one.add(found)
        if largest is not None:
            score_BF = _scores(terms, content_BF) * factor_BF
            score_BF[~out_N[rows].to(score_BF.device)] = -torch.inf
            largest.add(score_BF, rows.start)
        on_rows(rows.stop - rows.start)
    return MedianPass(middle, r_N, counts, None if largest is None else largest.ids())


def _readings(now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor], first: int) -> Readings:
    (now_BF, value_BF), (then_BF, there_BF) = now, then
    token_E, feature_E = (now_BF | then_BF).nonzero(as_tuple=True)
    now_E, then_E, value_E, there_E = (one[token_E, feature_E].cpu() for one in (now_BF, then_BF, value_BF, there_BF))
    return Readings(token_E.cpu() + first, feature_E.cpu(), now_E, then_E, value_E.double(), there_E.double())


def _scores(terms: ScoreTerms, content_BF: Tensor) -> Tensor:
    """(B, F) scores; −inf for rows of zeros."""
    score_BF = content_BF if terms.bias_F is None else content_BF + terms.bias_F
    return torch.where(terms.live_B[:, None], score_BF, -torch.inf)


class Largest:
    """The n largest positive scores of all batches, and where they are; ties with the next one are left out.

    Keeps at most 2 n and those of one batch: what is not above the n + 1 largest so far cannot be among them.
    """

    def __init__(self, n: int) -> None:
        self._n, self._floor = n, 0.0
        self._score_E = torch.zeros(0)
        self._id_E = torch.zeros(0, dtype=torch.int64)

    def add(self, score_BF: Tensor, first: int) -> None:
        id_E = (score_BF.reshape(-1) > self._floor).nonzero()[:, 0]
        self._score_E = torch.cat([self._score_E, score_BF.reshape(-1)[id_E].cpu()])
        self._id_E = torch.cat([self._id_E, id_E.cpu() + first * score_BF.shape[1]])
        if len(self._id_E) > 2 * (self._n + 1):
            self._cut()

    def _cut(self) -> None:
        if len(self._id_E) > self._n:
            self._score_E, kept = self._score_E.topk(self._n + 1)
            self._id_E = self._id_E[kept]
            self._floor = float(self._score_E[-1])

    def above(self) -> float:
        """What they lie above: the next largest score; 0 where there is none."""
        self._cut()
        return self._floor

    def ids(self) -> Tensor:
        """token · F + feature of each."""
        return self._id_E[self._score_E > self.above()]


def _fired(sae: SAE, terms: ScoreTerms, content_BF: Tensor, log_longer: Tensor | float) -> tuple[Tensor, Tensor]:
    """(B, F) bool and values by the inference rule, on content of tokens exp(log_longer) times as long as terms."""
    on_BF, value_BF = _chosen(sae, terms, content_BF)
    if terms.value_exponent is not None:
        value_BF = reference.values(terms, value_BF) * (terms.value_exponent * log_longer).exp()
    return on_BF, value_BF


def _chosen(sae: SAE, terms: ScoreTerms, content_BF: Tensor) -> tuple[Tensor, Tensor]:
    """(B, F) bool and what is chosen: the inference rule of every selector, on content that is already there."""
    selector = sae.selector
    score_BF = _scores(terms, content_BF)
    if selector.name in ("topk", "abs_topk"):
        gain_F = selector.rank_gain_F
        ranked_BF = torch.where(terms.live_B[:, None], score_BF / gain_F, 0.0)
        ranked_BF = ranked_BF.abs() if selector.name == "abs_topk" else ranked_BF.relu()
        keep_BK = ranked_BF.sort(dim=-1, descending=True, stable=True).indices[:, : selector.k]
        mask_BF = torch.zeros_like(ranked_BF, dtype=torch.bool).scatter_(1, keep_BK, True)
        return mask_BF & (ranked_BF > 0), score_BF
    if selector.name == "gated":
        opened_BF = score_BF > torch.nan_to_num(selector.threshold, nan=0.0)
        value_BF = (selector.r_mag_F.exp() * content_BF + selector.b_mag_F).relu()
        return opened_BF & (value_BF > 0), value_BF
    return score_BF > sae.threshold, score_BF


class Tally:
    """Sums over the tokens of one set, batch by batch: firings and moments by feature, firings by unit (document)."""

    def __init__(self, keep_N: Tensor, d_sae: int, unit_N: NDArray[np.int64]) -> None:
        self.keep_N, self.unit_N, self.d_sae, self.units = keep_N, unit_N, d_sae, int(unit_N.max()) + 1
        self.actual_F, self.median_F, self.both_F = np.zeros((3, d_sae))
        self.moment_5F = np.zeros((5, d_sae))
        self.union_U, self.both_U = np.zeros((2, self.units))
        self.change = 0.0

    def add(self, found: Readings) -> None:
        found = found.of(self.keep_N)
        feature_E, now_E, then_E = found.feature_E.numpy(), found.now_E.numpy(), found.then_E.numpy()
        both_E = now_E & then_E
        for sum_F, on_E in ((self.actual_F, now_E), (self.median_F, then_E), (self.both_F, both_E)):
            sum_F += np.bincount(feature_E[on_E], minlength=self.d_sae)
        unit_E = self.unit_N[found.token_E.numpy()]
        self.union_U += np.bincount(unit_E, minlength=self.units)
        self.both_U += np.bincount(unit_E[both_E], minlength=self.units)
        value_E, there_E = found.value_E.numpy()[both_E], found.there_E.numpy()[both_E]
        self.change += float((np.abs(there_E - value_E) / np.maximum(np.abs(value_E), 1e-30)).sum())
        products = (value_E, there_E, value_E * value_E, there_E * there_E, value_E * there_E)
        for sum_F, product_E in zip(self.moment_5F, products, strict=True):
            sum_F += np.bincount(feature_E[both_E], product_E, self.d_sae)

    def value_norm(self) -> tuple[Array, float | None]:
        """(F,) and pooled 1 − corr², exactly 0 where both values are the same; NaN where a value never varies."""
        v_F, w_F, vv_F, ww_F, vw_F = self.moment_5F
        n_F = np.maximum(self.both_F, 1.0)
        var_F, there_F, cov_F = vv_F - v_F * v_F / n_F, ww_F - w_F * w_F / n_F, vw_F - v_F * w_F / n_F
        # what rounding leaves of a constant is no variance
        known_F = (self.both_F > 1) & (var_F > 1e-10 * vv_F)
        slope_F = np.divide(cov_F, there_F, out=np.zeros_like(cov_F), where=there_F > 1e-10 * ww_F)
        left_F = np.where(known_F, np.clip(var_F - cov_F * slope_F, 0.0, var_F), 0.0)
        norm_F = np.divide(left_F, var_F, out=np.full_like(var_F, np.nan), where=known_F)
        total = var_F[known_F].sum()
        return norm_F, float(left_F.sum() / total) if total > 0 else None
