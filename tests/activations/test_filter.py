"""Filters, sinks and norm facts against values worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosae.activations.filter import Filter, FilterKind, FilterPolicy, describe_sinks, fit, norm_summary
from cosae.activations.sample import Sample
from cosae.activations.sinks import median_norm, sink_mask
from cosae.activations.store.reader import Store
from cosae.activations.store.shards import ShardRows
from cosae.errors import CosaeError
from cosae.io.generators import seeded
from cosae.io.values import from_plain, to_plain
from cosae.types import Activations
from tests.support.small_stores import write_store


def made(norms: list[float], positions: list[int] | None = None, special: list[bool] | None = None) -> Activations:
    """Activations (n, 0) with the given norms along one axis."""
    x_ND = torch.tensor(norms)[:, None] * torch.tensor([[1.0, 0.0]])
    activations = Activations.bare(x_ND)
    if positions is not None:
        activations = replace(activations, position_N=torch.tensor(positions, dtype=torch.int32))
    if special is not None:
        activations = replace(activations, special_N=torch.tensor(special))
    return activations


def test_norm_drops_at_and_above_factor_times_median() -> None:
    fitted = fit(FilterPolicy("norm", factor=10), torch.tensor([1.0, 2.0, 3.0]))
    assert fitted.median_norm == 2.0
    assert fitted.keep(made([0.5, 19.999, 20.0, 400.0])).tolist() == [True, True, False, False]


def test_median_reads_only_the_window() -> None:
    norm_N = torch.tensor([1.0, 1.0, 1.0, 100.0, 100.0, 100.0, 100.0])
    fitted = fit(FilterPolicy("norm", window_tokens=3), norm_N)
    assert (fitted.median_norm, fitted.seen_tokens) == (1.0, 3)


def test_position_0_and_special() -> None:
    activations = made([1, 1, 1, 1], positions=[0, 1, 2, -1], special=[False, False, True, False])
    norm_N = activations.norm_N
    assert fit(FilterPolicy("position_0"), norm_N).keep(activations).tolist() == [False, True, True, True]
    both = fit(FilterPolicy("position_0", drop_special=True), norm_N)
    assert both.keep(activations).tolist() == [False, True, False, True]
    special = fit(FilterPolicy("none", drop_special=True), norm_N)
    assert special.keep(activations).tolist() == [True, True, False, True]
    assert fit(FilterPolicy("none"), norm_N).keep(activations).all()


def test_sinks_are_the_union_of_the_three_rules() -> None:
    activations = made([1, 1, 1, 50, 9.9], positions=[0, 1, 2, 3, 4], special=[False, True, False, False, False])
    assert sink_mask(activations, median_norm=1.0).tolist() == [True, True, False, True, False]
    assert sink_mask(made([1, 10, 9.9]), median_norm=1.0).tolist() == [False, True, False]


def test_median_is_the_mean_of_the_middle_two() -> None:
    assert median_norm(torch.tensor([4.0, 1.0, 3.0, 8.0])) == 3.5
    assert median_norm(torch.tensor([4.0, 1.0, 8.0])) == 4.0


def test_filter_survives_its_record() -> None:
    fitted = fit(FilterPolicy("norm", factor=7.0, window_tokens=5, drop_special=True), torch.rand(9) + 1)
    assert from_plain(Filter, to_plain(fitted), "it") == fitted
    with pytest.raises(CosaeError, match="median_norm"):
        from_plain(Filter, {"policy": {}}, "it")


def test_norm_facts_match_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(20_000, 3, generator=generator) + torch.tensor([100.0, 0, 0])  # a mean that eats fp32 digits
    x_ND[::100] *= 50
    window = Activations.bare(x_ND)
    fitted = fit(FilterPolicy("norm"), window.norm_N)
    metadata = norm_summary(window, fitted)
    kept = x_ND[torch.arange(20_000) % 100 != 0].double()
    assert metadata.filtered_frac == pytest.approx(0.01, abs=1e-12)
    assert metadata.total_variance == pytest.approx(float(kept.var(0, unbiased=False).sum()), rel=1e-12)
    assert metadata.median_norm == fitted.median_norm == pytest.approx(float(window.norm_N.double().quantile(0.5)))
    assert metadata.max_over_median == pytest.approx(float(window.norm_N.max()) / metadata.median_norm)
    marks = torch.tensor([0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1], dtype=torch.float64)
    assert metadata.quantiles == pytest.approx(window.norm_N.double().quantile(marks).tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "median"}, "none, position_0, norm"),
        ({"factor": 0.5}, "must lie in"),
        ({"factor": float("nan")}, "must lie in"),
        ({"window_tokens": 0}, "at least 1"),
    ],
)
def test_policies_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(CosaeError, match=message):
        FilterPolicy(**settings)


def test_fitting_refuses_what_has_no_median() -> None:
    with pytest.raises(CosaeError, match="gave none"):
        fit(FilterPolicy(), torch.empty(0))
    with pytest.raises(CosaeError, match="is 0"):
        fit(FilterPolicy("norm"), torch.zeros(5))
    with pytest.raises(CosaeError, match="finite"):
        fit(FilterPolicy("none"), torch.tensor([1.0, float("nan")]))
    everything_first = made([1, 1], positions=[0, 0])
    with pytest.raises(CosaeError, match="drops all 2"):
        norm_summary(everything_first, fit(FilterPolicy("position_0"), everything_first.norm_N))


@pytest.mark.parametrize("zeros", [0, 37])
def test_one_median_tells_the_sinks_everywhere(tmp_path: Path, zeros: int) -> None:
    """Filter, sample, summary and store, on norms whose middle is a gap: 390 between 60 and 720."""
    direction_ND = torch.nn.functional.normalize(torch.randn(200 + zeros, 8, generator=seeded("medians", 0)), dim=-1)
    length_N = torch.cat([torch.full((100,), 60.0), torch.full((100,), 720.0), torch.zeros(zeros)])
    given = Activations.bare(direction_ND * length_N[:, None], length_N)
    fitted = fit(FilterPolicy(), given.norm_N)
    store = Store(write_store(tmp_path / "store", ShardRows(given)))
    medians = [
        fitted.median_norm,
        norm_summary(given, fitted).median_norm,
        Sample.of(given).median_norm,
        store.statistics["norm"]["median"],
    ]
    assert medians == [390.0] * 4
    sinks = int((~fitted.keep(given)).sum()), int(Sample.of(given).sink_N.sum()), store.statistics["sinks"]["any"]
    assert sinks == (0, 0, 0)


@pytest.mark.parametrize(
    ("kind", "words", "kept"),
    [
        ("none", "with filter none they dominate loss and FVE (99 % of the squared norm)", 0.02),
        ("norm", "the filter norm leaves them out of training", 0.0),
        (
            "position_0",
            "with filter position_0 those it keeps (1 %) dominate loss and FVE (98 % of the squared norm)",
            0.01,
        ),
    ],
)
def test_what_a_filter_does_with_sinks_is_one_sentence(kind: FilterKind, words: str, kept: float) -> None:
    norm_N = torch.ones(200)
    norm_N[:4] = torch.tensor([90.0, 50.0, 90.0, 50.0])
    window = replace(Activations.bare(torch.nn.functional.pad(norm_N[:, None], (0, 1))), norm_N=norm_N)
    window.position_N[:] = torch.arange(200, dtype=window.position_N.dtype) % 100 + 1
    window.position_N[:2] = 0
    policy = FilterPolicy(kind)
    found = describe_sinks(window, fit(policy, norm_N))
    assert found["text"].startswith("2 % of tokens are attention sinks, up to 90 × the median norm; ")
    assert found["text"].endswith(words)
    assert (found["share"], found["kept"], found["largest_over_median"]) == (0.02, kept, 90.0)


def test_no_sinks_are_a_short_line() -> None:
    window = Activations.bare(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]))
    found = describe_sinks(window, fit(FilterPolicy("none"), window.norm_N))
    assert (found["text"], found["share"]) == ("no attention sinks: the largest norm is 1.5 × the median", 0.0)
