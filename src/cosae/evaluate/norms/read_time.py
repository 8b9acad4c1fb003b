"""Read-time norm removal: what a trained SAE would say had its codes not grown with the token's length. No retraining.

In: a cosae SAE. Out: an autoencoder whose codes are f_i / r^{a_i − a}, r = |x − c| over its median: the code of a
score with exponent a on the same features (the free baseline the paper left out, §9 E; a standard SAE has a_i = 1, and
its codes are divided by r^{1 − a}). Where values grow by a value exponent δ_i beside, they are divided by r^{δ_i} too.
Two readings:

    keep_firings  the SAE's own inference rule chooses, only the values change
    same L0       the changed scores are compared with one threshold, set on a sample so that as many fire as before
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.evaluate.encoded import row_slices
from cosae.evaluate.norms.counterfactual import DENSE_ELEMENTS, Largest, lengths
from cosae.kernels import reference
from cosae.sae.model import SAE
from cosae.types import Activations, Codes, NormStats


@dataclass(frozen=True)
class ReadTime:
    """An SAE read with its codes' growth with the norm taken out; see `remove_norm`, which makes one.

    sae        the SAE it reads; never changed
    exponent   a: what is left of the growth, 0 for none
    median_r   the length at which codes keep their size
    threshold  None where the SAE's own firings are kept; else changed scores above it fire
    """

    sae: SAE
    exponent: float
    median_r: float
    threshold: float | None = None

    @property
    def d_sae(self) -> int:
        return self.sae.d_sae

    @torch.no_grad()
    def encode(self, x_BD: Tensor) -> Codes:
        """x (..., d_in) → the changed codes, sparse. Raises what `SAE.encode` raises."""
        codes = self.sae.encode(x_BD)
        assert codes.norm_stats is not None
        if self.threshold is None:
            return codes.with_values(codes.value_E * self._factor_of(codes, codes.norm_stats))
        flat_BD = x_BD.reshape(-1, x_BD.shape[-1])
        tokens, features, values = [], [], []
        for rows in row_slices(len(flat_BD), max(1, DENSE_ELEMENTS // self.d_sae)):
            score_BF, value_BF = self._changed(flat_BD[rows])
            token_E, feature_E = (score_BF > self.threshold).nonzero(as_tuple=True)
            tokens.append(token_E + rows.start)
            features.append(feature_E)
            values.append(value_BF[token_E, feature_E])
        return Codes.from_entries(
            torch.cat(tokens),
            torch.cat(features),
            torch.cat(values),
            self.d_sae,
            tuple(x_BD.shape[:-1]),
            codes.norm_stats,
        )

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """The SAE's own reconstruction from these codes, their growth put back first."""
        if codes.norm_stats is None:
            raise CosaeError("codes read without their norm need it back to be decoded: decode what `encode` returned.")
        return self.sae.decode(codes.with_values(codes.value_E / self._factor_of(codes, codes.norm_stats)))

    def _changed(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F) scores, −inf for rows of zeros, and what they are worth, each with its growth taken out."""
        framed = self.sae._framed(x_BD)
        terms = self.sae.score.terms(framed).detached()
        score_BF = reference.scores(terms)
        changed_BF = score_BF * self._factor(framed.norm_stats, terms.exponent)
        if terms.value_exponent is None:
            return changed_BF, changed_BF
        growth = terms.exponent + terms.value_exponent
        return changed_BF, reference.values(terms, score_BF) * self._factor(framed.norm_stats, growth)

    def _factor(self, norm_stats: NormStats, growth: Tensor) -> Tensor:
        """(B, 1) or (B, F): (r / median)^{a − growth_i}; 1 where the frame has no length left to take out."""
        if self.sae.cfg.frame != "raw":
            return torch.ones_like(norm_stats.r_B)[:, None]
        log_r_B = (norm_stats.r_B.clamp_min(1e-30) / self.median_r).log()
        return ((self.exponent - growth) * log_r_B[:, None]).exp()

    def _factor_of(self, codes: Codes, norm_stats: NormStats) -> Tensor:
        """(E,) the same for codes, which have their values' growth."""
        factor_BF = self._factor(norm_stats, self.sae.score.growth.detach())
        return factor_BF[codes.token_E, codes.feature_E if factor_BF.shape[1] > 1 else 0]


@torch.no_grad()
def remove_norm(sae: SAE, activations: Activations, exponent: float = 0.0, *, keep_firings: bool = True) -> ReadTime:
    """The SAE, read with exponent `exponent` in place of its own.

    activations  a sample of what it is to read, without sinks: sets the median r, and with keep_firings=False the
                 threshold at which the sample fires as often as under the SAE's own rule
    Raises CosaeError for an uncalibrated batch_topk, an empty sample, and with keep_firings=False for an SAE whose rule
    is not one threshold on the scores (gated, abs_topk).
    """
    if not sae.calibrated:
        raise CosaeError("norm can be removed from an SAE with an inference threshold only: calibrate it first.")
    if not len(activations):
        raise CosaeError("removing the norm needs a sample of activations to set its scale; got none.")
    median = float(lengths(sae, activations).median())
    if not median > 0:
        raise CosaeError("removing the norm needs activations that are not all at the SAE's centre.")
    reader = ReadTime(sae, exponent, median)
    if keep_firings:
        return reader
    if sae.cfg.selector in ("gated", "abs_topk"):
        raise CosaeError(
            f"the {sae.cfg.selector} selector has no single threshold on its scores to set anew: use keep_firings=True."
        )
    return ReadTime(sae, exponent, median, _threshold(reader, activations.x_ND.float()))


def _threshold(reader: ReadTime, x_ND: Tensor) -> float:
    """The score above which as many entries of the sample lie as fire now."""
    n_fired = sum(int(reader.sae.encode(x_ND[rows]).count_B.sum()) for rows in row_slices(len(x_ND), 4096))
    largest = Largest(n_fired)
    for rows in row_slices(len(x_ND), max(1, DENSE_ELEMENTS // reader.d_sae)):
        largest.add(reader._changed(x_ND[rows])[0], rows.start)
    return largest.above()
