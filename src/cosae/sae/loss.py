"""Named loss terms. Each is normalised so that it means the same at any d and any scale of the activations.

    reconstruction  Σ_b q_b |e_b|² / (Σ_b q_b · variance), averaged over prefixes; e in frame or raw units
    aux_k           |residual − ε|² / |residual − mean residual|², ε reconstructed from dead features alone
    sparsity        λ · L0 / k (jumprelu) or λ · mean Σ_i ReLU(π_i) / (k · typical π) (gated)
    gate            reconstruction of z from ReLU(π) through the detached decoder (gated; arXiv 2404.16014)

Of a transcoder, x − c and z are the target's y − c and t (cosae.sae.target).

`variance` is a constant of the run: the mean of |z − mean z|² (frame units) or |x − mean x|² (raw units) on the first
window of the stream, so that reconstruction ≈ 1 − FVE. With 1.0 instead it is the paper's Σ_d squared error (§3).
Weights q = |x − c|^−p, detached, divided by their batch mean (paper §5.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding

from cosae.errors import CosaeError, check_choice, check_positive
from cosae.kernels import Peers, reference
from cosae.kernels.deterministic import matmul, total
from cosae.kernels.select import shared
from cosae.sae.model import SAE, TrainOutput
from cosae.types import at_least_fp32

SPACES = ("raw", "frame")
DENOMINATOR_MIN = 1e-8


@dataclass(frozen=True)
class LossConfig:
    """How the terms are made and weighed. Raises CosaeError on a value that is not allowed."""

    space: str = "raw"
    """Units of the squared error: raw (of x) or frame (of z). They differ in the unit and layer_norm frames."""
    reweight: float = 0.0
    """p of the per-token weights |x − c|^−p; 0 is none, 1 and 2 are the paper's mild and strong."""
    normalise: str = "variance"
    """What the squared error is divided by: variance (of the first window) or none (the paper's sum over d)."""
    aux_k: int | None = None
    """Dead features per token that reconstruct the residual; None is d_in / 2 (paper §3)."""
    aux_coefficient: float = 1 / 32
    """Weight of aux_k; 0 turns it off."""

    def __post_init__(self) -> None:
        check_choice("loss space", self.space, SPACES)
        check_choice("loss normalise", self.normalise, ("variance", "none"))
        check_positive("reweight", self.reweight, zero=True)
        check_positive("aux_coefficient", self.aux_coefficient, zero=True)
        if self.aux_k is not None and self.aux_k < 1:
            raise CosaeError("aux_k must be at least 1; to turn aux off, set aux_coefficient to 0.")


def token_weights(output: TrainOutput, power: float) -> Tensor:
    """(B,) q = |x − c|^−p over its batch mean; 0 for masked rows; no gradient."""
    live_B = output.framed.live_B
    r_B = output.length_B.detach().clamp_min(DENOMINATOR_MIN)
    weight_B = torch.where(live_B, r_B.pow(-power), 0.0)
    weight = output.peers.tokens(total(weight_B)).clamp_min(torch.finfo(weight_B.dtype).tiny)
    return weight_B * (output.n_live / weight)


def squared_error(output: TrainOutput, error_B: Tensor, recon_BD: Tensor, space: str) -> Tensor:
    """(B,) |x − x̂|² in raw units, or |z − ẑ|² in the frame's, of one of the output's own reconstructions and errors."""
    if space == "raw" and output.sites is not None:
        return ((output.target_BD - recon_BD) * output.sites.spread(output.stats.scale_B)).square().sum(-1)
    return error_B * output.stats.scale_B.square() if space == "raw" else error_B


def reconstruction(output: TrainOutput, config: LossConfig, variance: float) -> Tensor:
    """() mean over live tokens and prefixes of the weighted squared error over `variance`."""
    weight_B = token_weights(output, config.reweight)
    pairs = zip(output.error, output.recon, strict=True)
    per_prefix = [total(weight_B * squared_error(output, *pair, config.space)) for pair in pairs]
    return output.peers.tokens(torch.stack(per_prefix)).mean() / output.n_live.clamp_min(1) / variance


def aux_k(sae: SAE, output: TrainOutput, dead_F: Tensor, config: LossConfig, sparse_gradients: bool = False) -> Tensor:
    """() share of the residual's variance that the dead features fail to explain (paper §3, aux-k).

    Per token the dead features of the aux_k largest pre-ReLU scores reconstruct the detached residual with ReLU(s). The
    gradient goes past the ReLU, since a score below 0 would pass none and the feature would stay dead (paper §9 #13);
    the value does not, since dead features would then learn to subtract. Only the dead features' rows, biases and
    decoder rows learn: a centre or a shared exponent that follows the dead costs the living their reconstruction.
    Costs what its dead features cost: products with their rows only; with `sparse_gradients` rows' gradients come back
    as sparse tensors, which autograd adds in place to the dense ones of the other terms instead of filling and adding
    a whole matrix. dead_F (F,) bool with at least one True.
    """
    dead = dead_F.nonzero()[:, 0]
    terms = output.terms
    dead_FD = embedding(dead, terms.rows_FD, sparse=sparse_gradients)
    dead_terms = replace(terms.detached(), bias_F=terms.bias_F).of_features(dead, dead_FD)
    score_BF = reference.content(dead_terms, matmul(dead_terms.z_BD, dead_terms.rows_FD.T))
    if dead_terms.bias_F is not None:
        score_BF = score_BF + dead_terms.bias_F
    peers = output.peers
    k = config.aux_k if config.aux_k is not None else max(1, sae.d_in // 2)
    score_BF = reference.values(dead_terms, _relu_straight_through(score_BF, k, peers))
    dead_rows_FD = embedding(dead, at_least_fp32(sae.decoder.rows_FD), sparse=sparse_gradients)
    recon_BD = peers.features(matmul(score_BF, dead_rows_FD))
    live_B1 = terms.live_B[:, None]
    residual_BD = (output.target_BD - output.recon[-1]).detach() * live_B1
    mean_D = peers.tokens(residual_BD.sum(0)) / output.n_live.clamp_min(1)
    spread = peers.tokens(total(((residual_BD - mean_D) * live_B1).square())).clamp_min(DENOMINATOR_MIN)
    missed = peers.tokens(total(((residual_BD - recon_BD) * live_B1).square()))
    return missed / spread


def _relu_straight_through(score_BF: Tensor, k: int, peers: Peers) -> Tensor:
    """ReLU of each row's k largest, 0 elsewhere; the gradient of all k is 1, below 0 as well."""
    if peers.feature_ranks > 1:
        score_BF = score_BF * shared.among_largest(score_BF.detach(), k, peers)
    elif k < score_BF.shape[1]:
        kept = score_BF.topk(k, dim=-1).indices
        score_BF = score_BF * torch.zeros_like(score_BF).scatter_(1, kept, 1.0)
    return score_BF + (score_BF.relu() - score_BF).detach()


def sparsity(sae: SAE, output: TrainOutput) -> Tensor:
    """() what λ multiplies: mean L0 over k (jumprelu), mean Σ_i ReLU(π_i) over k · mean ReLU(π) (gated)."""
    n_live, peers = output.n_live.clamp_min(1), output.peers
    if output.selection.count_B is not None:
        return peers.both(total(output.selection.count_B)) / n_live / sae.k
    open_E = output.selection.score_E
    sum_, (n_open,) = peers.both(total(open_E)), peers.counts(len(open_E))
    typical = (sum_.detach() / n_open).clamp_min(DENOMINATOR_MIN) if n_open else open_E.new_ones(())
    return sum_ / n_live / sae.k / typical


def terms_of(
    sae: SAE,
    output: TrainOutput,
    config: LossConfig,
    *,
    variance: float,
    dead_F: Tensor | None = None,
    sparsity_weight: float = 0.0,
    sparse_gradients: bool = False,
) -> dict[str, Tensor]:
    """Every term of this SAE's loss by name, already weighed: their sum is the loss.

    variance: what squared errors are divided by. dead_F: (F,) bool, None where nothing is dead. sparse_gradients: see
    `aux_k`; only where the sum of all terms is what backward is called on.
    """
    terms = {"reconstruction": reconstruction(output, config, variance)}
    if output.gate_error is not None and output.gate_recon is not None:
        error_B = squared_error(output, output.gate_error, output.gate_recon, config.space) * output.framed.live_B
        terms["gate"] = output.peers.tokens(total(error_B)) / output.n_live.clamp_min(1) / variance
    if sae.cfg.selector in ("jumprelu", "gated"):
        terms["sparsity"] = sparsity_weight * sparsity(sae, output)
    if dead_F is not None and config.aux_coefficient > 0:
        terms["aux_k"] = config.aux_coefficient * aux_k(sae, output, dead_F, config, sparse_gradients)
    return terms
