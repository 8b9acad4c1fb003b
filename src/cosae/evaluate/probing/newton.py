"""The logistic regression of `probing.logistic` on a few features: the same minimum by Newton's method, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from cosae.evaluate.statistics import Array

FEW = 16
"""Features up to which this is used: a step costs N · F², and some ten steps are enough."""
STEPS, FLAT = 50, 1e-9


def fit(x_NF: NDArray[Any], label_N: NDArray[np.bool_], l2: float, check: Callable[[], None]) -> tuple[Array, float]:
    """Weights (F,) and the bias of one label, which needs both kinds of row. A step that does not lower the loss is
    halved. check is called in every step, and may raise to end the fit."""
    x_NF = np.hstack([x_NF, np.ones((len(x_NF), 1))], dtype=np.float64)
    penalty_F = np.append(np.full(x_NF.shape[1] - 1, l2), 0.0)
    sign_N = np.where(label_N, 1.0, -1.0)
    w_F = np.append(np.zeros(x_NF.shape[1] - 1), special.logit(label_N.mean()))

    def loss(w_F: Array) -> float:
        return float(np.logaddexp(0.0, -sign_N * (x_NF @ w_F)).sum() + 0.5 * penalty_F @ w_F**2)

    now = loss(w_F)
    for _ in range(STEPS):
        check()
        p_N = special.expit(x_NF @ w_F)
        slope_F = x_NF.T @ (p_N - label_N) + penalty_F * w_F
        if np.abs(slope_F).max() < FLAT * len(x_NF):
            break
        bend_FF = (x_NF * (p_N * (1 - p_N))[:, None]).T @ x_NF + np.diag(penalty_F + 1e-12)
        move_F, size = np.linalg.solve(bend_FF, slope_F), 1.0
        while (then := loss(w_F - size * move_F)) > now and size > 1e-6:
            size /= 2
        w_F, now = w_F - size * move_F, then
    return w_F[:-1], float(w_F[-1])
