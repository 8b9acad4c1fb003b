"""Logistic regressions on one matrix, dense or sparse, however wide; all labels at once.

    for each label minimise Σ log(1 + exp(−y (x·w + b))) + ½ · l2 · |w|²,  y = ±1, b free

By L-BFGS from w = 0, deterministic; l2 = 1 is scikit-learn's C = 1, SAEBench's choice (paper §6). On a dense matrix
with more rows than columns it runs in coordinates in which the bound ¼XᵀX + l2 of the Hessian (Böhning & Lindsay 1988)
is the identity, so that correlated features do not slow it down; a rare label, 4p(1 − p) times flatter than the bound,
takes longer steps. The minimum is the same. Of other matrices nothing of size features × features is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, sparse, special
from scipy.optimize import minimize
from torch.nn.functional import softplus

from cosae.evaluate.encoded import row_slices
from cosae.evaluate.probing.ranking import deviations
from cosae.evaluate.statistics import Array

BLOCK_LOGITS = 1 << 20
"""Logits held at once."""


def fit(
    x: Any,
    label_NC: NDArray[np.bool_],
    l2: float = 1.0,
    max_iterations: int = 200,
    check: Callable[[], None] = lambda: None,
) -> tuple[Array, Array]:
    """Weights (F, C) and biases (C,). x (N, F) fp32 or float64, dense or sparse; label_NC (N, C), each with both kinds.

    check is called in every iteration, and may raise to end the fit.
    A dense x must have mean 0 over the rows to gain from the change of coordinates.
    """
    n, f = x.shape
    share_C = label_NC.mean(axis=0)
    start_C, scale_C = special.logit(share_C), 1 / np.sqrt(4 * share_C * (1 - share_C))
    blocks = [(x[rows], label_NC[rows]) for rows in row_slices(n, max(1, BLOCK_LOGITS // len(share_C)))]
    turn, bias_unit = None, 1.0
    if not sparse.issparse(x) and f < n:
        square_FF = sum(x_BF.T.astype(np.float64) @ x_BF for x_BF, _ in blocks)
        turn, bias_unit = linalg.cholesky(square_FF / 4 + l2 * np.eye(f)), 2 / np.sqrt(n)

    def unfold(flat: Array) -> tuple[Array, Array]:
        v_VC = flat.reshape(f + 1, -1) * scale_C
        weight_FC = v_VC[:-1] if turn is None else linalg.solve_triangular(turn, v_VC[:-1])
        return weight_FC, start_C + bias_unit * v_VC[-1]

    def loss(flat: Array) -> tuple[float, Array]:
        check()
        weight_FC, bias_C = unfold(flat)
        value, slope_FC, slope_C = l2 / 2 * float(np.vdot(weight_FC, weight_FC)), l2 * weight_FC, np.zeros_like(bias_C)
        for x_BF, label_BC in blocks:
            logit_BC = x_BF @ weight_FC.astype(x.dtype) + bias_C.astype(x.dtype)
            part, pull_BC = _loss_and_slope(np.asarray(logit_BC), label_BC)
            value += part
            slope_FC = slope_FC + x_BF.T @ pull_BC
            slope_C += pull_BC.sum(axis=0)
        turned_FC = slope_FC if turn is None else linalg.solve_triangular(turn, slope_FC, trans="T")
        return value, (np.vstack([turned_FC, bias_unit * slope_C]) * scale_C).ravel()

    options = {"maxiter": max_iterations, "gtol": 1e-6 * n, "ftol": 1e-10, "maxcor": 20}
    found = minimize(loss, np.zeros((f + 1) * len(share_C)), jac=True, method="L-BFGS-B", options=options)
    return unfold(found.x)


def _loss_and_slope(logit_BC: NDArray[Any], label_BC: NDArray[np.bool_]) -> tuple[float, NDArray[Any]]:
    """Σ log(1 + exp(−y · logit)), and its slope in every logit; by torch, whose exponentials are vectorised."""
    logits, labels = torch.from_numpy(logit_BC), torch.from_numpy(label_BC)
    lost = softplus(torch.where(labels, -logits, logits)).sum(dtype=torch.float64)
    return float(lost), logits.sigmoid().sub_(labels.to(logits.dtype)).numpy()


def scores(train: Any, label_NC: NDArray[np.bool_], test: Any, **options: Any) -> Array:
    """(M, C) logits of the test rows, from a `fit` to train rows (N, F), every feature divided by its train deviation.

    Dense features are centred too; sparse ones are not, so that they stay sparse (the bias is free, and the penalty
    does not see it). A feature that does not vary in train counts nothing.
    """
    if sparse.issparse(train):
        scale_F = _scales(deviations(train))
        scaled, wanted = (part.multiply(scale_F[None]).tocsr() for part in (train, test))
    else:
        deviation_F, mean_F = (one.numpy() for one in torch.std_mean(torch.from_numpy(train), 0, correction=0))
        scale_F = _scales(deviation_F)
        scaled, wanted = ((part - mean_F) * scale_F for part in (train, test))
    weight_FC, bias_C = fit(scaled, label_NC, **options)
    logit_MC: Array = wanted @ weight_FC.astype(wanted.dtype) + bias_C
    return logit_MC


def _scales(deviation_F: NDArray[Any]) -> NDArray[Any]:
    scale_F: NDArray[Any] = np.divide(1.0, deviation_F, out=np.zeros_like(deviation_F), where=deviation_F > 0)
    return scale_F
