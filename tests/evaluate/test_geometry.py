"""Geometry against closed forms: orthogonal, parallel, planted duplicates, random directions."""

from __future__ import annotations

import json
import math
import resource

import pytest
import torch

import cosae
from cosae.errors import CosaeError
from cosae.evaluate import geometry as module
from cosae.evaluate.geometry import alignment, describe_rows, effective_dimension, geometry


def test_orthogonal_rows_use_every_dimension_and_have_no_neighbour() -> None:
    found = describe_rows(torch.eye(7) * torch.arange(1.0, 8.0)[:, None])
    assert found["participation_ratio"] == pytest.approx(7, rel=1e-9)
    assert found["entropy_dimension"] == pytest.approx(7, rel=1e-9)
    assert found["mean_max_cosine"] == 0.0
    assert found["near_duplicates"]["pairs"] == 0


def test_parallel_rows_use_one_dimension_and_are_all_duplicates() -> None:
    found = describe_rows(torch.tensor([[1.0, 2.0]]) * torch.tensor([1.0, 3.0, 0.1])[:, None])
    assert found["participation_ratio"] == pytest.approx(1, rel=1e-6)
    assert found["entropy_dimension"] == pytest.approx(1, rel=1e-6)
    assert found["mean_max_cosine"] == pytest.approx(1, rel=1e-6)
    assert (found["near_duplicates"]["pairs"], found["near_duplicates"]["frac"]) == (3, 1.0)


def test_an_uneven_spectrum_has_its_closed_form() -> None:
    """Six rows along e0, two along e1: eigenvalues 3/4 and 1/4."""
    rows = torch.zeros(8, 5)
    rows[:6, 0], rows[6:, 1] = 2.0, 5.0
    found = effective_dimension(rows)
    assert found["participation_ratio"] == pytest.approx(1 / (0.75**2 + 0.25**2), rel=1e-12)
    assert found["entropy_dimension"] == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-12
    )


def test_the_spectrum_is_not_truncated() -> None:
    """More directions than the paper's 512: random rows in 700 dimensions, close to 1 / (1/D + 1/F)."""
    rows = torch.randn(4000, 700, generator=torch.Generator().manual_seed(0))
    assert effective_dimension(rows)["participation_ratio"] == pytest.approx(1 / (1 / 700 + 1 / 4000), rel=0.02)


@pytest.mark.parametrize("elements", [1, 50, 1 << 25])
def test_planted_duplicates_are_listed_whatever_the_chunk(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    rows = torch.eye(10, 12)
    rows[7] = 3 * rows[2]
    rows[9] = rows[2] + 0.3 * rows[4]
    found = describe_rows(rows)
    near = math.cos(math.atan(0.3))
    listed = found["near_duplicates"]["closest"]
    assert [pair[:2] for pair in listed] == [[2, 7], [2, 9], [7, 9]]
    assert [pair[2] for pair in listed] == pytest.approx([1.0, near, near], rel=1e-6)
    assert found["near_duplicates"]["features"] == 3
    others = math.sin(math.atan(0.3))  # row 4 has row 9 as its nearest
    assert found["mean_max_cosine"] == pytest.approx((1 + 1 + near + others) / 10, rel=1e-5)


def test_opposite_rows_are_no_duplicates() -> None:
    found = describe_rows(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert (found["mean_max_cosine"], found["near_duplicates"]["pairs"]) == (-1.0, 0)


def test_zero_rows_and_a_single_row() -> None:
    assert effective_dimension(torch.zeros(3, 2)) == {"participation_ratio": None, "entropy_dimension": None}
    found = describe_rows(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert (found["mean_max_cosine"], found["participation_ratio"]) == (0.0, 1.0)
    assert describe_rows(torch.ones(1, 4))["mean_max_cosine"] is None


def test_an_sae_s_alignment_and_its_alive_features() -> None:
    sae = cosae.SAE.build(d_in=4, d_sae=6, score="cosine", selector="topk", k=2, seed=0)
    with torch.no_grad():
        sae.decoder.rows_FD.copy_(torch.cat([torch.eye(4), torch.eye(4)[:2]]))
        sae.score.rows_FD.copy_(5 * sae.decoder.rows_FD)
        sae.score.rows_FD[1] = -sae.score.rows_FD[1]
    before = sae.W_dec.detach().clone()
    found = geometry(sae)
    assert found["alignment"]["quantiles"][0] == -1.0
    assert found["alignment"]["mean"] == pytest.approx(4 / 6)
    assert found["decoder"]["near_duplicates"]["pairs"] == 2
    assert found["encoder"]["near_duplicates"]["pairs"] == 1
    alive = geometry(sae, alive_F=torch.tensor([True, True, True, True, False, False]))
    assert (alive["features"], alive["decoder"]["near_duplicates"]["pairs"]) == (4, 0)
    assert alignment(sae).tolist() == [1, -1, 1, 1, 1, 1]
    pair = geometry(sae, alive_F=torch.tensor([False, True, False, True, False, True]))
    assert pair["decoder"]["near_duplicates"]["closest"] == [[1, 5, 1.0]]  # feature ids, not places among the three
    json.dumps(found, allow_nan=False)
    assert torch.equal(before, sae.W_dec)
    with pytest.raises(CosaeError, match="each of 6 features"):
        geometry(sae, alive_F=torch.ones(5, dtype=torch.bool))


def test_the_threshold_of_duplicates_is_a_choice_and_the_effective_dimension_counts_directions_alike() -> None:
    """Eight directions at 60° in pairs: cosine 1/2. Rows of any length weigh the same."""
    rows = torch.zeros(8, 8)
    for pair in range(4):
        rows[2 * pair, 2 * pair] = 1.0
        rows[2 * pair + 1, 2 * pair] = 0.5
        rows[2 * pair + 1, 2 * pair + 1] = 0.75**0.5
    assert describe_rows(rows)["near_duplicates"]["pairs"] == 0
    found = describe_rows(rows * torch.arange(1, 9)[:, None], 0.499)
    assert (found["near_duplicates"]["pairs"], found["near_duplicates"]["features"]) == (4, 8)
    assert found["near_duplicates"]["cosine"] == 0.499
    # each pair has eigenvalues 1 ± 1/2, of a trace of 8
    shares = [1.5 / 8, 0.5 / 8] * 4
    assert found["participation_ratio"] == pytest.approx(1 / sum(p * p for p in shares), rel=1e-6)
    assert found["entropy_dimension"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-6)
    for cosine in (0.0, 1.5):
        with pytest.raises(CosaeError, match="at most 1"):
            describe_rows(rows, cosine)


@pytest.mark.slow
def test_sixty_five_thousand_features_stay_within_memory() -> None:
    rows = torch.randn(65_536, 32, generator=torch.Generator().manual_seed(0))
    rows[65_535] = 2 * rows[7]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = describe_rows(rows, 0.99)
    assert found["near_duplicates"]["closest"][0][:2] == [7, 65_535]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # kilobytes; all cosines take 17 GB
