"""Norm perturbations: they change norms as declared, nothing else, and depend on nothing but their key."""

from dataclasses import replace

import pytest
import torch

from cosae.activations.perturbation import Perturbation, apply
from cosae.errors import CosaeError
from cosae.io.generators import keyed_generator
from cosae.io.values import from_plain, to_plain
from cosae.types import Activations

N, D = 20_000, 8


@pytest.fixture(scope="module")
def clean() -> Activations:
    generator = torch.Generator().manual_seed(0)
    bare = Activations.bare(torch.randn(N, D, generator=generator) + 1)
    return replace(bare, position_N=(torch.arange(N) % 100).int(), token_N=torch.arange(N).int())


def cosines(a: Activations, b: Activations) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.x_ND, b.x_ND, dim=-1)


def test_none_hands_back_the_very_object(clean: Activations) -> None:
    assert apply(clean, Perturbation()) is clean


def test_log_normal_spreads_log_norms_by_sigma_apart_from_content(clean: Activations) -> None:
    noisy = apply(clean, Perturbation("log_normal", sigma=0.7, seed=3))
    gain_N = (noisy.norm_N / clean.norm_N).log()
    assert float(gain_N.mean()) == pytest.approx(0, abs=4 * 0.7 / N**0.5)
    assert float(gain_N.std()) == pytest.approx(0.7, rel=0.03)
    correlation = torch.corrcoef(torch.stack([gain_N, clean.norm_N]))[0, 1]
    assert abs(float(correlation)) < 4 / N**0.5
    assert float(cosines(noisy, clean).min()) > 1 - 1e-6
    torch.testing.assert_close(noisy.norm_N, noisy.x_ND.norm(dim=-1), rtol=0, atol=0)
    assert torch.equal(noisy.token_N, clean.token_N)


def test_own_sinks_scale_a_share_and_leave_the_rest_to_the_bit(clean: Activations) -> None:
    noisy = apply(clean, Perturbation("sinks", frac=0.05, factor=160.0))
    sink_N = noisy.norm_N > 2 * clean.norm_N
    assert float(sink_N.float().mean()) == pytest.approx(0.05, abs=4 * (0.05 / N) ** 0.5)
    torch.testing.assert_close(noisy.x_ND[sink_N], 160 * clean.x_ND[sink_N])
    assert torch.equal(noisy.x_ND[~sink_N], clean.x_ND[~sink_N])


def test_massive_sinks_share_one_direction_and_size(clean: Activations) -> None:
    perturbation = Perturbation("sinks", frac=0.01, factor=30.0, direction="massive", seed=5)
    noisy = apply(clean, perturbation, chunk_index=4)
    sink_N = (noisy.x_ND != clean.x_ND).any(-1)
    first = noisy.x_ND[sink_N][0]
    assert torch.equal(noisy.x_ND[sink_N], first.expand(int(sink_N.sum()), D))
    assert float(first.norm()) == pytest.approx(30 * float(clean.norm_N.median()), rel=1e-5)
    other = apply(clean, perturbation, chunk_index=5, split="held_out")
    other_sink_N = (other.x_ND != clean.x_ND).any(-1)
    assert not torch.equal(sink_N, other_sink_N)
    torch.testing.assert_close(other.x_ND[other_sink_N][0], first)  # the direction is the world's, not the chunk's


def test_sinks_at_a_position(clean: Activations) -> None:
    noisy = apply(clean, Perturbation("sinks", position=0, factor=5.0))
    assert torch.equal(noisy.norm_N > 2 * clean.norm_N, clean.position_N == 0)
    with pytest.raises(CosaeError, match="positions"):
        apply(Activations.bare(clean.x_ND), Perturbation("sinks", position=0))


def test_draws_depend_on_seed_split_and_chunk_alone(clean: Activations) -> None:
    perturbation = Perturbation("log_normal", seed=1)
    once = apply(clean, perturbation, 7).x_ND
    torch.manual_seed(99)
    assert torch.equal(apply(clean, perturbation, 7).x_ND, once)
    for other in (
        apply(clean, perturbation, 8),
        apply(clean, perturbation, 7, split="held_out"),
        apply(clean, replace(perturbation, seed=2), 7),
    ):
        assert not torch.equal(other.x_ND, once)


def test_half_precision_comes_back_as_float32(clean: Activations) -> None:
    low = replace(clean, x_ND=clean.x_ND.bfloat16())
    noisy = apply(low, Perturbation("sinks", frac=0.5, factor=1.1))
    assert noisy.x_ND.dtype == noisy.norm_N.dtype == torch.float32


def test_key_parts_do_not_run_together() -> None:
    draws = [torch.rand(1, generator=keyed_generator(*key)) for key in ((1, "a", 12), (1, "a1", 2), (11, "a", 2))]
    assert len({float(draw) for draw in draws}) == 3


@pytest.mark.parametrize(
    ("text", "perturbation"),
    [
        ("none", Perturbation()),
        ("log_normal", Perturbation("log_normal")),
        ("log_normal:sigma=0.5,seed=4", Perturbation("log_normal", sigma=0.5, seed=4)),
        ("sinks:frac=0.006,factor=160", Perturbation("sinks")),
        ("sinks:position=0,direction=massive", Perturbation("sinks", position=0, direction="massive")),
    ],
)
def test_text_and_record_round_trip(text: str, perturbation: Perturbation) -> None:
    assert Perturbation.parse(text) == perturbation
    assert Perturbation.parse(str(perturbation)) == perturbation
    assert from_plain(Perturbation, to_plain(perturbation), "it") == perturbation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise", "none, log_normal, sinks"),
        ("log_normal:frac=0.1", "takes sigma, seed"),
        ("log_normal:sigma", "name=value"),
        ("log_normal:sigma=big", "must be a number"),
        ("sinks:seed=1.5", "whole number"),
        ("sinks:frac=2", "must lie in"),
        ("sinks:frac=nan", "must lie in"),
        ("sinks:factor=0", "must lie in"),
        ("sinks:position=-1", "at least 0"),
        ("sinks:direction=up", "own"),
        ("sinks:seed=1,seed=2", "twice"),
    ],
)
def test_wrong_text_is_answered_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(CosaeError, match=message) as caught:
        Perturbation.parse(text)
    assert "\n" not in str(caught.value)


def test_foreign_record_is_refused() -> None:
    with pytest.raises(CosaeError, match="strength"):
        from_plain(Perturbation, {"kind": "sinks", "strength": 1}, "it")
