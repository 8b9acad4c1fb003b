"""One logistic regression on a matrix, dense or sparse, however wide: nothing of size features × features is made.

    minimise Σ log(1 + exp(−y (x·w + b))) + ½ · l2 · |w|²,  y = ±1, b free

By L-BFGS from 0, deterministic; l2 = 1 is scikit-learn's C = 1, SAEBench's choice (paper §6).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, special
from scipy.optimize import minimize

Array = NDArray[np.float64]


def fit(x: Any, label_N: NDArray[np.bool_], l2: float = 1.0, max_iterations: int = 200) -> tuple[Array, float]:
    """Weights (F,) and bias. x (N, F) float64, dense or sparse; label_N (N,) bool with both kinds."""
    sign_N = np.where(label_N, 1.0, -1.0)

    def loss(parameters: Array) -> tuple[float, Array]:
        margin_N = sign_N * (x @ parameters[:-1] + parameters[-1])
        pull_N = -sign_N * special.expit(-margin_N)
        gradient = np.append(x.T @ pull_N + l2 * parameters[:-1], pull_N.sum())
        value = np.logaddexp(0, -margin_N).sum() + l2 / 2 * float(parameters[:-1] @ parameters[:-1])
        return float(value), gradient

    options = {"maxiter": max_iterations, "gtol": 1e-6 * len(label_N), "ftol": 1e-10}
    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options=options)
    return found.x[:-1], float(found.x[-1])


def scores(train: Any, label_N: NDArray[np.bool_], test: Any) -> Array:
    """(M,) logits of the test rows, fitted on train rows (N, F) with every feature divided by its train deviation.

    Dense features are centred too; sparse ones are not, so that they stay sparse (the bias is free, and the penalty
    does not see it). A feature that does not vary in train counts nothing.
    """
    if sparse.issparse(train):
        mean_F = np.asarray(train.mean(axis=0)).ravel()
        square_F = np.asarray(train.multiply(train).mean(axis=0)).ravel()
        scale_F = _scales(np.sqrt(np.maximum(square_F - mean_F**2, 0.0)))
        scaled, wanted = (part.multiply(scale_F[None]).tocsr() for part in (train, test))
    else:
        mean_F, scale_F = train.mean(axis=0), _scales(train.std(axis=0))
        scaled, wanted = ((part - mean_F) * scale_F for part in (train, test))
    weight_F, bias = fit(scaled, label_N)
    logit_M: Array = wanted @ weight_F + bias
    return logit_M


def _scales(deviation_F: Array) -> Array:
    return np.divide(1.0, deviation_F, out=np.zeros_like(deviation_F), where=deviation_F > 0)
