"""What fires as a token is, and what would fire were it of median length.

In: a cosae SAE and Activations. Out: batch by batch, every entry that fires in either reading, with both values.

Every token keeps the direction of x − c and gets the length r' = the median of r = |x − c|. Its scores become
    s'_i = content_i · (r'/r)^{a_i} + β_i          (paper §1; the inner product is a = 1)
so one product serves both readings, and where a = 0 the factor is 1 to the last bit: nothing changes, exactly. The
unit and layer_norm frames take the length out before anything is scored: there nothing changes by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.errors import CosaeError
from cosae.evaluate.reconstruct import row_slices
from cosae.kernels import ScoreTerms, reference
from cosae.sae import frame as frames
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
def lengths(sae: SAE, activations: Activations, batch_tokens: int = 4096) -> Tensor:
    """(N,) float64: r = |x − c| of every token; in the layer_norm frame, where c lives after it, |x − mean x|."""
    parts = []
    for rows in row_slices(len(activations), batch_tokens):
        x_BD = activations.x_ND[rows].double()
        about = x_BD.mean(-1, keepdim=True) if sae.cfg.frame == "layer_norm" else sae.centre_D.double().to(x_BD.device)
        parts.append((x_BD - about).norm(dim=-1).cpu())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def readings(sae: SAE, activations: Activations, median_r: float, batch_tokens: int = 4096) -> Iterator[Readings]:
    """Both readings of every token by the inference rule. A token at the centre has no direction and stays as it is.

    Raises CosaeError for a batch_topk without a threshold: there what a token keeps depends on the tokens beside it.
    """
    if not sae.calibrated:
        raise CosaeError(
            "the norm test reads each token on its own, and this batch_topk SAE has no inference threshold: calibrate "
            "it first (cosae.sae.calibrate.calibrate)."
        )
    for rows in row_slices(len(activations), max(1, min(batch_tokens, DENSE_ELEMENTS // sae.d_sae))):
        framed = frames.normalize(sae.cfg.frame, activations.x_ND[rows].to(sae.device), sae.centre_D)
        terms = sae.score.terms(framed).detached()
        content_BF = reference.content(terms)
        log_ratio_B = torch.zeros_like(framed.norm_stats.r_B)
        if sae.cfg.frame == "raw" and median_r > 0:
            r_B = framed.norm_stats.r_B
            log_ratio_B = torch.where(r_B > 0, np.log(median_r) - r_B.clamp_min(1e-30).log(), 0.0)
        other_BF = content_BF * (terms.exponent * log_ratio_B[:, None]).exp()
        now_BF, value_BF = _fired(sae, terms, content_BF)
        then_BF, there_BF = _fired(sae, terms, other_BF)
        token_E, feature_E = (now_BF | then_BF).nonzero(as_tuple=True)
        found = (one[token_E, feature_E].cpu() for one in (now_BF, then_BF, value_BF.double(), there_BF.double()))
        yield Readings(token_E.cpu() + rows.start, feature_E.cpu(), *found)


def _fired(sae: SAE, terms: ScoreTerms, content_BF: Tensor) -> tuple[Tensor, Tensor]:
    """(B, F) bool and values: the inference rule of every selector, on content that is already there."""
    selector = sae.selector
    score_BF = content_BF if terms.bias_F is None else content_BF + terms.bias_F
    score_BF = torch.where(terms.live_B[:, None], score_BF, -torch.inf)
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

    def __init__(self, keep_N: Tensor, d_sae: int, unit_N: NDArray[np.int64], units: int) -> None:
        self.keep_N, self.unit_N, self.d_sae, self.units = keep_N, unit_N, d_sae, units
        self.actual_F, self.median_F, self.both_F = np.zeros((3, d_sae))
        self.moment_5F = np.zeros((5, d_sae))
        self.union_U, self.both_U = np.zeros((2, units))
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
