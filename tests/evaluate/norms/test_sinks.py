"""Sinks: planted ones are found where they are, with the features that only they switch on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.types import Activations, Codes
from tests.support.passes import sink_metrics


class Planted:
    """Feature 0 fires wherever |x| > 10, feature 1 on every token; reconstructs half of x."""

    d_sae = 4

    def encode(self, x_BD: Tensor) -> Codes:
        self.x_BD = x_BD
        dense = torch.zeros(len(x_BD), 4)
        dense[:, 1] = 1.0
        dense[:, 0] = (x_BD.norm(dim=-1) > 10).float()
        return Codes.from_dense(dense)

    def decode(self, codes: Codes) -> Tensor:
        return self.x_BD / 2


def activations_with_sinks(n: int = 40, every: int = 10) -> tuple[Activations, Tensor]:
    x_ND = torch.nn.functional.normalize(torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    sink_N = torch.arange(n) % every == 0
    x_ND[sink_N] *= 50
    bare = Activations.bare(x_ND)
    place = (torch.arange(n) % every).int()
    found = Activations(x_ND, bare.norm_N, 7 + place, place // 100, place, place, torch.zeros(n, dtype=torch.bool))
    return found, sink_N


@pytest.mark.parametrize("batch_tokens", [1, 7, 4096])
def test_planted_sinks_are_described(batch_tokens: int) -> None:
    activations, sink_N = activations_with_sinks()
    found = sink_metrics(Planted(), activations, sink_N, batch_tokens)
    assert (found["n_sinks"], found["sink_frac"]) == (4, 0.1)
    assert found["norm_over_median"] == pytest.approx(50, rel=1e-5)
    assert found["positions"] == [[0, 4]]
    assert found["tokens"] == [[7, 4]]
    assert (found["l0_on"], found["l0_off"], found["l0_at_0"]) == (2.0, 1.0, 2.0)
    assert (found["large"], found["large_at_0"]) == (4, 4)
    assert (found["features_on"], found["sink_features"]) == (2, 1)
    assert found["firing_frac"] == pytest.approx(8 / 44)
    assert found["norm_ratio_on"] == pytest.approx(0.5, rel=1e-6)
    x_ND = activations.x_ND.double()
    total_N = (x_ND - x_ND.mean(0)).square().sum(-1)
    error_N = (x_ND / 2).square().sum(-1)
    assert found["error_frac"] == pytest.approx(float(error_N[sink_N].sum() / error_N.sum()), abs=1e-9)
    assert found["variance_frac"] == pytest.approx(float(total_N[sink_N].sum() / total_N.sum()), abs=1e-9)
    assert found["fve_on"] == pytest.approx(1 - float(error_N[sink_N].sum() / total_N[sink_N].sum()), abs=1e-9)


def test_a_large_token_elsewhere_is_not_at_position_0() -> None:
    activations, sink_N = activations_with_sinks()
    x_ND = activations.x_ND.clone()
    x_ND[3] *= 50
    moved = replace(activations, x_ND=x_ND, norm_N=x_ND.norm(dim=-1))
    found = sink_metrics(Planted(), moved, sink_N)
    assert (found["n_sinks"], found["large"], found["large_at_0"]) == (4, 5, 4)


def test_without_sinks_what_is_about_them_is_none() -> None:
    activations, sink_N = activations_with_sinks()
    found = sink_metrics(Planted(), activations[~sink_N], torch.zeros(36, dtype=torch.bool))
    assert found["n_sinks"] == 0
    assert [found[k] for k in ("norm_over_median", "l0_on", "fve_on", "norm_ratio_on")] == [None] * 4
    assert (found["sink_features"], found["firing_frac"]) == (0, 0.0)


def test_where_all_are_sinks_the_rest_is_none() -> None:
    activations, sink_N = activations_with_sinks()
    found = sink_metrics(Planted(), activations[sink_N], torch.ones(4, dtype=torch.bool))
    assert found["l0_off"] is None
    assert found["error_frac"] == 1.0


def test_a_mask_of_another_length_is_refused() -> None:
    activations, sink_N = activations_with_sinks()
    with pytest.raises(CosaeError, match="one entry for each of 40"):
        sink_metrics(Planted(), activations, sink_N[:-1])
