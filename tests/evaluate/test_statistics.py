"""Intervals against closed forms: a normal mean, an exact constant shift, medians counted by hand."""

import numpy as np
import pytest

from cosae.errors import CosaeError
from cosae.evaluate.statistics import (
    KEPT_UNITS,
    crossed_draws,
    crossed_interval,
    mean_interval,
    paired_mean_interval,
    percentile_interval,
    ratio_interval,
    resample_counts,
    weighted_medians,
)


def test_every_resample_draws_as_many_units_as_there_are():
    counts_RU = resample_counts(7, seed=3, n_resamples=50)
    assert counts_RU.shape == (50, 7)
    assert (counts_RU.sum(1) == 7).all()


def test_resamples_depend_on_the_seed_alone():
    assert np.array_equal(resample_counts(20, seed=1), resample_counts(20, seed=1))
    assert np.array_equal(resample_counts(KEPT_UNITS + 1, seed=1), resample_counts(KEPT_UNITS + 1, seed=1))
    assert not resample_counts(20, seed=1).flags.writeable
    assert not np.array_equal(resample_counts(20, seed=1), resample_counts(20, seed=2))


def test_interval_of_a_mean_has_the_width_of_theory():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    interval = mean_interval(values, n_resamples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval["mean"] == pytest.approx(values.mean())
    assert interval["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_pairing_removes_what_both_arms_share():
    baseline = np.random.default_rng(0).normal(0.0, 10.0, 50)
    difference = paired_mean_interval(baseline + 0.25, baseline)
    assert difference["low"] == pytest.approx(0.25)
    assert difference["high"] == pytest.approx(0.25)


def test_a_ratio_of_sums_and_the_resamples_it_rests_on():
    above_U, below_U = np.array([2.0, 4.0, 3.0]), np.array([1.0, 2.0, 0.0])
    counts_RU = np.array([[1, 1, 1], [2, 1, 0], [0, 0, 3]])
    assert ratio_interval(above_U, below_U, counts_RU) is None  # the last resample has a denominator of 0
    found = ratio_interval(above_U, below_U, counts_RU, every=False)
    assert found == pytest.approx((3.0, 2.025, 2.975, 2))
    assert ratio_interval(above_U, -below_U, counts_RU, every=False) is None


def test_a_table_is_drawn_by_rows_and_columns():
    table = np.random.default_rng(0).normal(size=(40, 1)) + np.zeros((40, 3))
    low, high = crossed_interval(table, crossed_draws(40, 3, n_resamples=2000))
    one = mean_interval(table[:, 0])
    assert (low, high) == pytest.approx((one["low"], one["high"]), abs=0.03)
    assert crossed_interval(table[:1, :1], []) == (None, None)
    assert crossed_interval(np.array([[1.0, 2.0, 3.0]]), []) == pytest.approx(
        (2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3
    )


def test_nine_in_ten_lie_between_the_ends():
    assert percentile_interval(np.arange(101), level=0.9) == pytest.approx((5, 95))


def test_weighted_median_repeats_tokens_of_a_drawn_unit():
    value_N, unit_N = [5.0, 1.0, 3.0], [2, 0, 1]
    counts_RU = np.array([[1, 1, 1], [0, 1, 2], [3, 0, 0], [2, 2, 0]])
    assert weighted_medians(value_N, unit_N, counts_RU).tolist() == [3.0, 5.0, 1.0, 1.0]


def test_mistakes_are_named():
    with pytest.raises(CosaeError, match="got none"):
        mean_interval([])
    with pytest.raises(CosaeError, match="NaN"):
        mean_interval([0.5, float("nan")])
    with pytest.raises(CosaeError, match="got 2 and 1"):
        paired_mean_interval([1.0, 2.0], [1.0])
