from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from cosae.evaluate.probing import logistic, newton


@pytest.mark.parametrize("n_features", [1, 5])
@pytest.mark.parametrize("share", [0.4, 0.02])
def test_it_is_scikit_learns_minimum_and_that_of_many_features(n_features: int, share: float) -> None:
    rng = np.random.default_rng(n_features)
    label_N = rng.random(400) < share
    x_NF = rng.normal(size=(400, n_features)) + label_N[:, None]
    x_NF -= x_NF.mean(axis=0)
    weight_F, bias = newton.fit(x_NF, label_N, 1.0, lambda: None)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(x_NF, label_N)
    assert weight_F == pytest.approx(theirs.coef_[0], abs=1e-4)
    assert bias == pytest.approx(theirs.intercept_[0], abs=1e-4)
    padded_NF = np.hstack([x_NF, np.zeros((400, newton.FEW))])  # too wide for Newton's method
    wide_FC, bias_C = logistic.fit(padded_NF, label_N[:, None])
    assert np.hstack([wide_FC[:n_features, 0], bias_C]) == pytest.approx([*weight_F, bias], abs=2e-3)


def test_labels_that_a_feature_separates_end_at_the_penalised_minimum() -> None:
    x_N1: NDArray[np.float64] = np.linspace(-1000, 1000, 40)[:, None]
    weight_F, bias = newton.fit(x_N1, x_N1[:, 0] > 0, 1.0, lambda: None)
    slope = x_N1[:, 0] @ (1 / (1 + np.exp(-(x_N1[:, 0] * weight_F[0] + bias))) - (x_N1[:, 0] > 0)) + weight_F[0]
    assert abs(slope) < 1e-4
