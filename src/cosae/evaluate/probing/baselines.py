"""What one latent must beat, and what it can hardly beat: floors and a ceiling for sparse probing.

Enters: the train tokens with labels, and the held-out tokens. Leaves: (N, C) float scores of the held-out
tokens, to be ranked like the codes of a chosen latent. Everything is fitted on the train tokens only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cosae.evaluate.probing.ranking import Array, Labels, auroc_of_dimensions
from cosae.evaluate.reconstruct import row_slices
from cosae.types import Activations

BLOCK = 4096
"""Tokens whose logits are held at once while a logistic probe is fitted."""


def token_identity(train: Activations, label_NC: Labels, held_out: Activations, smoothing: float = 1.0) -> Array:
    """How often the token's id had the concept in train: (n₊(id) + s · p) / (n(id) + s).

    p is the concept's share of the train tokens, s (`smoothing`) a number of tokens; an id that train never
    saw scores p.
    """
    id_N, id_M = train.token_N.cpu().numpy(), held_out.token_N.cpu().numpy()
    known_V, row_N, count_V = np.unique(id_N, return_inverse=True, return_counts=True)
    share_C = label_NC.mean(axis=0)
    first_V = np.cumsum(count_V) - count_V
    grouped_NC = label_NC[np.argsort(row_N, kind="stable")]
    positive_VC = np.add.reduceat(grouped_NC, first_V, axis=0, dtype=np.float64)
    score_VC = (positive_VC + smoothing * share_C) / (count_V[:, None] + smoothing)
    row_M = np.minimum(np.searchsorted(known_V, id_M), len(known_V) - 1)
    scores: Array = np.where((known_V[row_M] == id_M)[:, None], score_VC[row_M], share_C)
    return scores


def norm_alone(train: Activations, label_NC: Labels, held_out: Activations) -> Array:
    """|x|, or −|x| where small norms speak for the concept in train."""
    norm_N1 = train.norm_N.float().cpu().numpy()[:, None]
    sign_C = np.where(auroc_of_dimensions(norm_N1, label_NC)[0] < 0.5, -1.0, 1.0)
    scores: Array = held_out.norm_N.double().cpu().numpy()[:, None] * sign_C
    return scores


def best_dimension(train: Activations, label_NC: Labels, held_out: Activations) -> Array:
    """The single dimension of x, of either sign, with the best AUROC in train."""
    area_DC = auroc_of_dimensions(train.x_ND.float().cpu().numpy(), label_NC)
    dimension_C = np.abs(area_DC - 0.5).argmax(axis=0)
    sign_C = np.where(area_DC[dimension_C, np.arange(area_DC.shape[1])] < 0.5, -1.0, 1.0)
    scores: Array = held_out.x_ND.float().cpu().numpy()[:, dimension_C] * sign_C
    return scores


def logistic(train: Activations, label_NC: Labels, held_out: Activations, **options: Any) -> NDArray[np.float32]:
    """Logits of `fit_logistic` on x, standardised by the mean and deviation of train."""
    x_ND = train.x_ND.float().cpu()
    mean_D, deviation_D = x_ND.mean(0), x_ND.std(0, correction=0)
    deviation_D = torch.where(deviation_D > 0, deviation_D, torch.ones_like(deviation_D))
    weight_DC, bias_C = fit_logistic((x_ND - mean_D) / deviation_D, torch.from_numpy(label_NC), **options)
    scores: NDArray[np.float32] = ((held_out.x_ND.float().cpu() - mean_D) / deviation_D @ weight_DC + bias_C).numpy()
    return scores


def fit_logistic(x_ND: Tensor, label_NC: Tensor, l2: float = 1.0, max_iterations: int = 20) -> tuple[Tensor, Tensor]:
    """C logistic regressions at once: weights (D, C) and biases (C,), fp32.

    x_ND      (N, D) fp32, of mean 0 over the tokens
    label_NC  (N, C) bool, both kinds present for each concept

    Minimises Σ log loss + ½ · l2 · |w|² for each concept, l2 > 0 (1 is scikit-learn's C = 1, SAEBench's
    choice; the bias is free), by full-batch L-BFGS: deterministic.

    L-BFGS runs in coordinates in which the bound ¼XᵀX + l2 of the Hessian (Böhning & Lindsay 1988) is the
    identity, so correlated dimensions do not slow it down; a rare concept, 4p(1 − p) times flatter than the
    bound, takes longer steps. The minimum is the same.
    """
    n, d = x_ND.shape
    target_NC, share_C = label_NC.float(), label_NC.double().mean(0)
    curvature_DD = (x_ND.T.double() @ x_ND.double() / 4 + l2 * torch.eye(d, dtype=torch.float64)) / n
    turn_DD = torch.linalg.inv(torch.linalg.cholesky(curvature_DD)).T.float()
    turned_NV = torch.cat([x_ND @ turn_DD, torch.full((n, 1), 2.0)], dim=1)  # the last column carries the bias
    scale_C = (4 * share_C * (1 - share_C)).rsqrt().float()
    start_C = torch.logit(share_C).float()
    v_VC = torch.zeros(d + 1, target_NC.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [v_VC],
        max_iter=max_iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-6,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        fit = 0.0
        with torch.no_grad():  # the gradient by hand and in blocks: autograd would keep several (N, C) buffers
            scaled_VC = v_VC * scale_C
            gradient_VC = torch.zeros_like(scaled_VC)
            for rows in row_slices(n, BLOCK):
                logit_BC = torch.addmm(start_C, turned_NV[rows], scaled_VC)
                fit += float(functional.softplus(logit_BC).sub_(logit_BC * target_NC[rows]).sum())
                gradient_VC.addmm_(turned_NV[rows].T, logit_BC.sigmoid_().sub_(target_NC[rows]))
            weight_DC = turn_DD @ scaled_VC[:-1]
            gradient_VC[:-1] += l2 * (turn_DD.T @ weight_DC)
            v_VC.grad = gradient_VC * (scale_C / n)
            return (fit + l2 / 2 * float(weight_DC.square().sum())) / n

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    solution_VC = v_VC.detach() * scale_C
    return turn_DD @ solution_VC[:-1], start_C + 2 * solution_VC[-1]
