"""Scores → which entries stay, and with what value. Two rules each: in training, and at inference.

    name        training                                   inference                          value
    batch_topk  k·B largest positive scores of the batch   s > threshold (calibrated)         s
    topk        k largest positive scores of each token    the same                           s
    abs_topk    k largest |s| of each token                the same                           s, sign kept
    jumprelu    s > θ_i                                    s > θ_i (θ scaled to the wanted L0) s
    gated       π = s > 0 opens the gate                   π > threshold (calibrated)         ReLU(e^ρ·content + β_mag)

A score with a value exponent δ multiplies every value by r^δ; choice, thresholds and ranks stay on s.

What fires passes no gradient to the exponent a of batch_topk, unless it is given a window of relative width w around
the smallest kept score t (after JumpReLU's, below): an entry that crosses t brings the value t, and t moves so that as
many stay. With m the mean over the window's entries,
    ∂f/∂a += (1 / w) · (∂s/∂a − m(∂s/∂a)) where |s − t| < w·t/2, of kept and dropped entries alike, and no other value.

An uncalibrated batch_topk falls back at inference to the training rule over the rows it is handed (paper §2);
`SAE.calibrated` says which of the two holds.

JumpReLU's gradients (paper §2; arXiv 2407.14435 §3) with a rectangle of *relative* width `bandwidth` around θ, so that
they mean the same at any scale of the scores, in φ = ln θ:
    ∂f/∂φ = −(θ / bandwidth) · 1[|s − θ| < bandwidth·θ/2],   ∂L0/∂φ = −(1 / bandwidth) · the same,   ∂f/∂s = 1[s > θ].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cosae.kernels import ALONE, Entries, Kernel, Peers, ScoreTerms
from cosae.kernels.autograd import apply
from cosae.kernels.deterministic import total
from cosae.kernels.select import shared

SELECTORS = ("batch_topk", "topk", "abs_topk", "jumprelu", "gated")
CALIBRATED_SELECTORS = ("batch_topk", "jumprelu", "gated")
TOPK_SELECTORS = ("batch_topk", "topk", "abs_topk")
PENALISED_SELECTORS = ("jumprelu", "gated")


@dataclass(frozen=True)
class Selection:
    """Chosen entries of a batch; all (E,) and differentiable where a gradient exists.

    score_E  s = content + β
    value_E  code values. In training some may be 0: entries inside JumpReLU's window below θ, gates whose magnitude
             is 0. They carry gradients and are no firings.
    count_B  expected-L0 surrogate per token, differentiable in θ; None but for jumprelu
    hint     smallest kept score, for the next batch's search
    """

    entries: Entries
    score_E: Tensor
    value_E: Tensor
    count_B: Tensor | None = None
    hint: float | None = None

    def fired(self) -> Selection:
        """Only the entries whose value is not 0."""
        on = (self.value_E != 0).nonzero()[:, 0]
        if len(on) == len(self.entries):
            return self
        entries = Entries(self.entries.token_E[on], self.entries.feature_E[on], cache=self.entries.cache)
        return Selection(entries, self.score_E[on], self.value_E[on], self.count_B, self.hint)


def divided(terms: ScoreTerms, gain_F: Tensor) -> ScoreTerms:
    """Terms without a graph whose scores are s / gain, gain (F,) > 0: what top-k compares."""
    terms, gain_F = terms.detached(), gain_F.to(terms.z_BD.dtype)
    if bool((gain_F == 1).all()):
        return terms
    return replace(
        terms,
        rows_FD=terms.rows_FD / gain_F[:, None] if terms.plain else terms.rows_FD,
        bias_F=None if terms.bias_F is None else terms.bias_F / gain_F,
        log_gain=terms.log_gain if terms.plain else terms.log_gain - gain_F.log(),
    )


class _JumpValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_E: Tensor, log_theta_E: Tensor, bandwidth: float) -> Tensor:
        theta_E = log_theta_E.exp()
        on_E = score_E > theta_E
        ctx.save_for_backward(theta_E, on_E, (score_E - theta_E).abs() < 0.5 * bandwidth * theta_E)
        ctx.bandwidth = bandwidth
        return score_E * on_E

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        theta_E, on_E, window_E = ctx.saved_tensors
        return grads[0] * on_E, -grads[0] * window_E * theta_E / ctx.bandwidth, None


class _JumpCount(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_E: Tensor, log_theta_E: Tensor, bandwidth: float) -> Tensor:
        theta_E = log_theta_E.exp()
        ctx.save_for_backward((score_E - theta_E).abs() < 0.5 * bandwidth * theta_E)
        ctx.bandwidth = bandwidth
        return (score_E > theta_E).to(score_E.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (window_E,) = ctx.saved_tensors
        return None, -grads[0] * window_E / ctx.bandwidth, None


class Selector(nn.Module):
    """Owns k and what the rule needs.

    threshold        () or (F,) fp32 buffer, NaN until calibrated: inference threshold of batch_topk and gated
    rank_gain_F      (F,) fp32 buffer of ones: scores are ranked divided by it. Only a fold of decoder norms sets it,
                     so that top-k keeps choosing what it chose before the fold
    log_threshold_F  (F,) φ = ln θ, jumprelu only
    r_mag_F, b_mag_F (F,) ρ and β_mag, gated only (arXiv 2404.16014)
    """

    threshold: Tensor
    rank_gain_F: Tensor

    def __init__(self, name: str, k: int, d_sae: int, bandwidth: float, a_window: float = 0.0) -> None:
        super().__init__()
        self.a_window = a_window
        self.name = name
        self.k = k
        self.bandwidth = bandwidth
        self.register_buffer("threshold", torch.tensor(float("nan")))
        self.register_buffer("rank_gain_F", torch.ones(d_sae))
        if name == "jumprelu":
            self.log_threshold_F = nn.Parameter(torch.zeros(d_sae))
        if name == "gated":
            self.r_mag_F = nn.Parameter(torch.zeros(d_sae))
            self.b_mag_F = nn.Parameter(torch.zeros(d_sae))

    @property
    def calibrated(self) -> bool:
        """True where inference needs no batch: top-k per token, own thresholds, or a calibrated one."""
        return self.name != "batch_topk" or not bool(self.threshold.isnan().any())

    def train_select(
        self,
        terms: ScoreTerms,
        kernel: Kernel,
        hint: float | None = None,
        peers: Peers = ALONE,
        k: int | None = None,
    ) -> Selection:
        """The training rule; differentiable. `hint` is what the last batch's Selection carried; `peers` have the rest
        of the batch and of the dictionary; `k`: another than its own."""
        k = self.k if k is None else k
        if self.name == "jumprelu":
            theta_F = self.log_threshold_F.detach().to(terms.z_BD.dtype).exp()
            entries = kernel.select_above(terms.detached(), theta_F * (1 - 0.5 * self.bandwidth))
            score_E = self._scores(terms, kernel, entries)[0]
            log_theta_E = kernel.at_feature(self.log_threshold_F.to(score_E.dtype), entries)
            value_E = kernel.entry_values(terms, entries, apply(_JumpValue, score_E, log_theta_E, self.bandwidth))
            on_E = apply(_JumpCount, score_E.detach(), log_theta_E, self.bandwidth)
            count_B = on_E.new_zeros(terms.n_tokens).index_add(0, entries.token_E, on_E)
            return Selection(entries, score_E, value_E, count_B)
        if self.name == "gated":
            zero = terms.z_BD.new_zeros(())
            return self._evaluate(terms, kernel, kernel.select_above(terms.detached(), zero))
        if self.name == "batch_topk":
            n_keep, ranked = k * int(peers.tokens(terms.live_B.sum())), divided(terms, self.rank_gain_F)
            entries, found = kernel.select_batch_topk(ranked, n_keep, hint, peers)
            if self.a_window and found > 0:
                return self._with_window(terms, ranked, kernel, entries, found, peers)
            return self._evaluate(terms, kernel, entries, found)
        ranked, absolute = divided(terms, self.rank_gain_F), self.name == "abs_topk"
        entries = kernel.select_topk(ranked, k, absolute)
        if peers.feature_ranks > 1:
            with torch.no_grad():
                score_E = self._scores(ranked, kernel, entries)[0]
            keep_E = shared.merged_topk(entries.token_E, score_E.abs(), k, terms.n_tokens, peers)
            entries = Entries(entries.token_E[keep_E], entries.feature_E[keep_E], cache=terms.cache)
        return self._evaluate(terms, kernel, entries)

    def _with_window(
        self, terms: ScoreTerms, ranked: ScoreTerms, kernel: Kernel, kept: Entries, least: float, peers: Peers
    ) -> Selection:
        """The kept entries and, with value 0, those in the window below the least of them; what the window tells a."""
        low = terms.z_BD.new_tensor(least * (1 - 0.5 * self.a_window))
        entries = kernel.select_above(ranked, low)
        flat_E, kept_E = (some.token_E * terms.n_features + some.feature_E for some in (entries, kept))
        on_E = torch.isin(flat_E, kept_E, assume_unique=True)
        score_E, content_E = self._scores(terms, kernel, entries)
        gain_E = self.rank_gain_F.to(score_E.dtype)[entries.feature_E]
        inside_E = score_E.detach() < gain_E * least * (1 + 0.5 * self.a_window)
        a = terms.exponent
        a_E = kernel.at_feature(a, entries) if a.dim() else a
        slope_E = content_E.detach() * terms.log_r_B.detach()[entries.token_E] / gain_E
        moved_E = (a_E - a_E.detach()) * slope_E * inside_E  # 0, with the gradient of s / gain
        mean = peers.both_and_back(total(moved_E)) / peers.both(inside_E.sum()).clamp_min(1)
        value_E = score_E * on_E + (moved_E - mean * inside_E) * gain_E / self.a_window
        return Selection(entries, score_E, kernel.entry_values(terms, entries, value_E), hint=least)

    def infer_select(self, terms: ScoreTerms, kernel: Kernel) -> Selection:
        """The inference rule."""
        dtype = terms.z_BD.dtype
        if self.name == "jumprelu":
            threshold = self.log_threshold_F.detach().to(dtype).exp()
        elif self.name == "gated" or (self.name == "batch_topk" and self.calibrated):
            threshold = torch.nan_to_num(self.threshold, nan=0.0).to(dtype)
        else:
            return self.train_select(terms, kernel).fired() if self.a_window else self.train_select(terms, kernel)
        selection = self._evaluate(terms, kernel, kernel.select_above(terms.detached(), threshold))
        return selection.fired() if self.name == "gated" else selection

    def _scores(self, terms: ScoreTerms, kernel: Kernel, entries: Entries) -> tuple[Tensor, Tensor]:
        content_E = kernel.entry_content(terms, entries)
        if terms.bias_F is None:
            return content_E, content_E
        return content_E + kernel.at_feature(terms.bias_F, entries), content_E

    def _evaluate(self, terms: ScoreTerms, kernel: Kernel, entries: Entries, hint: float | None = None) -> Selection:
        score_E, content_E = self._scores(terms, kernel, entries)
        if self.name != "gated":
            return Selection(entries, score_E, kernel.entry_values(terms, entries, score_E), hint=hint)
        r_mag_E = kernel.at_feature(self.r_mag_F.to(content_E.dtype), entries)
        b_mag_E = kernel.at_feature(self.b_mag_F.to(content_E.dtype), entries)
        magnitude_E = (r_mag_E.exp() * content_E + b_mag_E).relu()
        return Selection(entries, score_E, kernel.entry_values(terms, entries, magnitude_E), hint=hint)

    @property
    def margin_gain_F(self) -> Tensor:
        """(F,) g, of which "s / g > t" is the inference rule: calibration finds t, `set_margin` sets it."""
        return self.log_threshold_F.detach().exp() if self.name == "jumprelu" else self.rank_gain_F

    @torch.no_grad()
    def set_margin(self, t: float) -> None:
        """Make "m > t" the inference rule."""
        if self.name == "jumprelu":
            self.log_threshold_F.add_(torch.tensor(t).log())
        elif bool((self.rank_gain_F == 1).all()):
            self.threshold = self.threshold.new_tensor(t)
        else:
            self.threshold = t * self.rank_gain_F

    @torch.no_grad()
    def scale_scores_(self, factor_F: Tensor) -> None:
        """Keep choosing the same entries after every score was multiplied by factor (F,) > 0: a fold."""
        if self.name == "jumprelu":
            self.log_threshold_F.add_(factor_F.log())
            return
        threshold = torch.nan_to_num(self.threshold, nan=0.0) if self.name == "gated" else self.threshold
        self.threshold = threshold * factor_F
        self.rank_gain_F = self.rank_gain_F * factor_F
