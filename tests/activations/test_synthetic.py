"""Worlds are what they say: statistics of what fires and of lengths against their closed forms."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from cosae.activations.stream import Source
from cosae.activations.synthetic import SyntheticSource, World
from cosae.errors import CosaeError
from cosae.io.values import from_plain, to_plain

N = 20_000


def fired(world: World, n: int = N) -> torch.Tensor:
    """(n, F) bool of a held-out sample."""
    return SyntheticSource(world).held_out(n)[1].to_dense() > 0


def test_activations_are_the_truth_decoded() -> None:
    source = SyntheticSource(World(d_in=32, n_features=96, l0=5, norm="log_normal+sinks"))
    assert isinstance(source, Source)
    activations, truth = source.held_out(500)
    torch.testing.assert_close(activations.x_ND, truth.to_dense() @ source.feature_FD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(source.feature_FD.norm(dim=-1), torch.ones(96))
    assert (truth.count_B > 0).all()
    assert (activations.token_N == -1).all()
    assert (activations.position_N == -1).all()


def test_chunks_repeat_from_anywhere_and_share_nothing_with_held_out() -> None:
    source = SyntheticSource(World(), chunk_tokens=64)
    first = [chunk.x_ND for chunk in islice(source.chunks(), 4)]
    again = [chunk.x_ND for chunk in islice(SyntheticSource(World(), chunk_tokens=64).chunks(start=2), 2)]
    assert torch.equal(first[2], again[0])
    assert torch.equal(first[3], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], source.held_out(64)[0].x_ND)
    other = SyntheticSource(World(seed=1))
    assert not torch.equal(other.feature_FD, source.feature_FD)


@pytest.mark.parametrize("world", [World(n_features=64), World(n_features=64, frequencies="power")])
def test_features_fire_independently_at_their_rates(world: World) -> None:
    fired_NF = fired(world).double()
    rate_F = world.rate_F
    assert float(rate_F.sum()) == pytest.approx(8.0)
    assert float(rate_F.max()) <= 0.5
    spread_F = (rate_F * (1 - rate_F) / N).sqrt()
    assert float(((fired_NF.mean(0) - rate_F) / spread_F).abs().max()) < 5
    correlation = torch.corrcoef(fired_NF.T) - torch.eye(64)
    assert float(correlation.abs().max()) < 5.5 / N**0.5


def test_power_law_falls_as_one_over_rank() -> None:
    rate_F = World(n_features=1000, l0=2, frequencies="power").rate_F
    assert float(rate_F[9] / rate_F[99]) == pytest.approx(10.0)


def test_correlated_pairs_keep_their_rates() -> None:
    world = World(n_features=32, l0=6, correlation=0.6, frequencies="power")
    fired_NF = fired(world).double()
    assert float((fired_NF.mean(0) - world.rate_F).abs().max()) < 0.02
    correlation = torch.corrcoef(fired_NF.T)
    assert correlation[0, 1] == pytest.approx(0.6, abs=0.03)
    assert torch.diagonal(correlation, 1)[::2].mean() == pytest.approx(0.6, abs=0.03)
    assert float(torch.diagonal(correlation, 1)[1::2].abs().mean()) < 0.02


def test_children_fire_only_with_their_parents() -> None:
    world = World(n_features=40, l0=6, hierarchy=3)
    fired_NF = fired(world)
    parent_F = torch.arange(40) % world.n_parents
    assert world.n_parents == 10
    assert not (fired_NF & ~fired_NF[:, parent_F]).any()
    share = fired_NF[:, 10:].double().mean(0) / fired_NF[:, parent_F[10:]].double().mean(0)
    assert float((share - 0.5).abs().max()) < 0.06
    assert float(fired_NF.sum(1).double().mean()) == pytest.approx(6.0, rel=0.05)


def test_lengths_follow_the_chosen_law() -> None:
    plain = World(d_in=16, n_features=48)

    def norms(**changes: object) -> torch.Tensor:
        return SyntheticSource(replace(plain, **changes)).held_out(N)[0].norm_N

    torch.testing.assert_close(norms(), torch.full((N,), 4.0))
    torch.testing.assert_close(norms(norm_median=7.0), torch.full((N,), 7.0))
    log_N = norms(norm="log_normal", sigma=0.5).log()
    assert float(log_N.std()) == pytest.approx(0.5, rel=0.03)
    assert float(log_N.exp().median()) == pytest.approx(4.0, rel=0.03)
    sink_N = norms(norm="sinks", sink_frac=0.02, sink_factor=50.0) > 40
    assert float(sink_N.float().mean()) == pytest.approx(0.02, abs=0.004)
    both_N = norms(norm="log_normal+sinks", sink_frac=0.02)
    assert float((both_N > 40).float().mean()) == pytest.approx(0.02, abs=0.004)


def test_lengths_carry_content_only_where_asked() -> None:
    def explained(norm: str) -> float:
        """R² of the log length from which features fire."""
        activations, truth = SyntheticSource(World(n_features=64, norm=norm)).held_out(5000)
        fired_NF = torch.nn.functional.pad((truth.to_dense() > 0).double(), (0, 1), value=1.0)
        log_N = activations.norm_N.double().log()
        rest = log_N - fired_NF @ torch.linalg.lstsq(fired_NF, log_N[:, None]).solution[:, 0]
        return 1 - float(rest.var() / log_N.var())

    assert explained("content") > 0.999
    assert explained("log_normal") < 0.05


def test_spreading_lowers_the_overlap_of_features() -> None:
    def overlap(steps: int) -> float:
        feature_FD = SyntheticSource(World(d_in=16, n_features=32, spread_steps=steps)).feature_FD
        return float((feature_FD @ feature_FD.T).fill_diagonal_(0).square().sum())

    assert overlap(100) < 0.6 * overlap(0)
    # the frame bound: Σ cos² off the diagonal can be no less than F²/D - F
    assert overlap(100) == pytest.approx(32**2 / 16 - 32, rel=0.02)


def test_worlds_round_trip() -> None:
    world = World.parse("log_normal+sinks:sigma=1.0,n_features=1024,norm_median=3,frequencies=power")
    assert world == World(norm="log_normal+sinks", sigma=1.0, n_features=1024, norm_median=3.0, frequencies="power")
    assert from_plain(World, to_plain(world), "it") == world
    assert World.parse("none") == World()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "loud"}, "world norm"),
        ({"frequencies": "zipf"}, "uniform, power"),
        ({"l0": 0.0}, "l0"),
        ({"l0": 400.0}, "half of n_features"),
        ({"d_in": 0}, "d_in"),
        ({"sigma": -1.0}, "sigma"),
        ({"sink_frac": 2.0}, "sink_frac"),
        ({"sink_factor": 0.0}, "sink_factor"),
        ({"norm_median": -1.0}, "norm_median"),
        ({"hierarchy": 2, "correlation": 0.5}, "either"),
        ({"hierarchy": 3, "n_features": 16, "l0": 6.0}, "parent features"),
    ],
)
def test_worlds_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(CosaeError, match=message):
        World(**settings)
