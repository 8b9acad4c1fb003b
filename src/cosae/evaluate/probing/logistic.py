"""Logistic regressions on one matrix, dense or sparse, however wide; all labels at once.

    for each label minimise Σ log(1 + exp(−y (x·w + b))) + ½ · l2 · |w|²,  y = ±1, b free

By L-BFGS from w = 0, each label on its own, deterministic; l2 = 1 is scikit-learn's C = 1, SAEBench's choice (paper
§6). On a dense matrix with more rows than columns it runs in coordinates in which the bound ¼XᵀX + l2 of the Hessian
(Böhning & Lindsay 1988) is the identity, so that correlated features do not slow it down; a rare label, 4p(1 − p) times
flatter than the bound, takes longer steps. The minimum is the same. Of other matrices nothing of size features ×
features is made. A few dense features go to `probing.newton`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, sparse, special
from torch import Tensor
from torch.nn.functional import softplus

from cosae.evaluate.encoded import row_slices
from cosae.evaluate.probing import lbfgs, newton
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
    if f <= newton.FEW and not sparse.issparse(x):
        fitted = [newton.fit(x, label_N, l2, check) for label_N in label_NC.T]
        return np.stack([weight_F for weight_F, _ in fitted], 1), np.array([bias for _, bias in fitted])
    share_C = label_NC.mean(axis=0)
    start_C, scale_C = (
        torch.from_numpy(one) for one in (special.logit(share_C), 1 / np.sqrt(4 * share_C * (1 - share_C)))
    )
    dtype = torch.from_numpy(np.empty(0, x.dtype)).dtype
    rows = list(row_slices(n, max(1, BLOCK_LOGITS // len(share_C))))
    blocks = [_Block(x[some], torch.from_numpy(label_NC[some])) for some in rows]
    turn, bias_unit = None, 1.0
    if not sparse.issparse(x) and f < n:
        square_FF = sum(x[some].T.astype(np.float64) @ x[some] for some in rows)
        turn, bias_unit = torch.from_numpy(linalg.cholesky(square_FF / 4 + l2 * np.eye(f))), 2 / math.sqrt(n)

    def unfold(v_VC: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        v_VC = v_VC * scale_C[columns]
        weight_FC = v_VC[:-1] if turn is None else torch.linalg.solve_triangular(turn, v_VC[:-1], upper=True)
        return weight_FC, start_C[columns] + bias_unit * v_VC[-1]

    def loss(v_VC: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        check()
        weight_FC, bias_C = unfold(v_VC, columns)
        value_C, slope_FC, slope_C = l2 / 2 * weight_FC.square().sum(0), l2 * weight_FC, torch.zeros_like(bias_C)
        some = columns if len(columns) < len(share_C) else slice(None)
        for block in blocks:
            logit_BC = block.times(weight_FC.to(dtype)).add_(bias_C.to(dtype))
            label_BC = block.label_BC[:, some]
            value_C = value_C + softplus(torch.where(label_BC, -logit_BC, logit_BC)).sum(0, dtype=torch.float64)
            pull_BC = logit_BC.sigmoid_().sub_(label_BC.to(dtype))
            slope_FC = slope_FC + block.transposed_times(pull_BC)
            slope_C = slope_C + pull_BC.sum(0)
        turned_FC = slope_FC if turn is None else torch.linalg.solve_triangular(turn.T, slope_FC, upper=False)
        return value_C, torch.vstack([turned_FC, bias_unit * slope_C]) * scale_C[columns]

    found_VC = lbfgs.minimise(loss, f + 1, len(share_C), 1e-7 * n, max_iterations)
    weight_FC, bias_C = unfold(found_VC, torch.arange(len(share_C)))
    return weight_FC.numpy(), bias_C.numpy()


@dataclass(frozen=True)
class _Block:
    """Some rows, dense or sparse, and their labels."""

    x_BF: Any
    label_BC: Tensor

    def times(self, weight_FC: Tensor) -> Tensor:
        """(B, C) rows times weights. Dense products are torch's: two libraries' threads would wait for each other."""
        if sparse.issparse(self.x_BF):
            return torch.from_numpy(self.x_BF @ weight_FC.numpy())
        return torch.from_numpy(self.x_BF) @ weight_FC

    def transposed_times(self, pull_BC: Tensor) -> Tensor:
        """(F, C) the transposed rows times one value for each row and label."""
        if sparse.issparse(self.x_BF):
            return torch.from_numpy(self.x_BF.T @ pull_BC.numpy())
        return torch.from_numpy(self.x_BF).T @ pull_BC


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
