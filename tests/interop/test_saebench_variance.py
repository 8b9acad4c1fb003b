"""Explained variance beside SAEBench core's formula: closed forms, and the same tokens as core looks at."""

from types import SimpleNamespace

import pytest
import torch

from cosae.interop.saebench.variance import VarianceTally, tallied


def spread(mean, noise, n=20_000, d=16, seed=0):
    """x = mean + unit normal noise, x̂ = x + `noise`-scaled error: true explained variance 1 − noise²."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw, dtype=torch.float64) + mean
    return x, x + noise * torch.randn(n, d, generator=draw, dtype=torch.float64)


def their_formula(batches, d):
    """Core 0.6.0, line by line in words: squares where the mean was meant, vectors joined end to end."""
    energy = torch.stack([x.square().sum(-1).mean() for x, _ in batches]).mean()
    squares = torch.cat([x.square().mean(0) for x, _ in batches]).mean(0)
    residual = torch.stack([(x - x_hat).square().sum(-1).mean() for x, x_hat in batches]).mean(0)
    return (1 - residual / (energy - squares**2)).item()


def test_a_strong_mean_flatters_their_number_and_not_ours():
    """σ² = 1, |mean|² = 9 in each of 16 directions, error variance 0.5: explained is 0.5.

    S = 16 · 10, R = 8: theirs is 1 − 8 / (160 − 10²) ≈ 0.867, uncentred 1 − 8/160 = 0.95.
    """
    x, x_hat = spread(mean=3.0, noise=0.5**0.5)
    tally = VarianceTally()
    tally.add(x, x_hat)
    report = tally.report(saebench=0.867)
    assert report["fve"] == pytest.approx(0.5, abs=0.01)
    assert report["saebench_formula"] == pytest.approx(1 - 8 / 60, abs=0.01)
    assert report["uncentred"] == pytest.approx(0.95, abs=0.01)
    assert report["saebench_explained_variance"] == 0.867
    assert report["tokens"] == 20_000


def test_without_a_mean_theirs_comes_out_too_low():
    """S = d σ²: 1 − 8 / (16 − 1) against 1 − 8/16."""
    tally = VarianceTally()
    tally.add(*spread(mean=0.0, noise=0.5**0.5))
    assert tally.report()["fve"] == pytest.approx(0.5, abs=0.01)
    assert tally.report()["saebench_formula"] == pytest.approx(1 - 8 / 15, abs=0.01)


def test_long_vectors_turn_their_denominator_negative():
    """S > d²: here 16 · (1 + 25²), so that the better an SAE, the nearer to 1 from above; ours stays 0.5."""
    tally = VarianceTally()
    tally.add(*spread(mean=25.0, noise=0.5**0.5))
    assert tally.report()["saebench_formula"] > 1
    assert tally.report()["fve"] == pytest.approx(0.5, abs=0.01)


def test_their_formula_in_batches_of_different_size():
    x, x_hat = spread(mean=2.0, noise=0.3, n=1000)
    batches = [(x[:100], x_hat[:100]), (x[100:400], x_hat[100:400]), (x[400:], x_hat[400:])]
    tally, whole = VarianceTally(), VarianceTally()
    for batch in batches:
        tally.add(*batch)
    whole.add(x, x_hat)
    assert tally.report()["saebench_formula"] == pytest.approx(their_formula(batches, 16), rel=1e-12)
    assert tally.report()["fve"] == pytest.approx(whole.report()["fve"], rel=1e-12)


def test_ours_is_the_closed_form_in_half_precision_too():
    x, x_hat = (t.bfloat16() for t in spread(mean=3.0, noise=0.7, n=500))
    tally = VarianceTally()
    tally.add(x, x_hat)
    wide, wide_hat = x.double(), x_hat.double()
    expected = 1 - (wide - wide_hat).square().sum() / (wide - wide.mean(0)).square().sum()
    assert tally.report()["fve"] == pytest.approx(expected.item(), rel=1e-9)


def test_no_tokens_and_no_variance_have_no_number():
    tally = VarianceTally()
    assert tally.report()["fve"] is None
    tally.add(torch.zeros(0, 4), torch.zeros(0, 4))
    tally.add(torch.zeros(3, 4), torch.zeros(3, 4))
    assert tally.report()["fve"] is None
    assert tally.report()["tokens"] == 3


class Halver:
    """An SAE that codes x by itself and decodes half of it."""

    def encode(self, x):
        return x

    def decode(self, codes):
        return codes / 2


class Store:
    def get_batch_tokens(self, n):
        return torch.tensor([[0, 5, 6], [0, 7, 1]])


def test_core_is_watched_on_its_own_tokens_and_left_as_it_was():
    x = torch.arange(24.0).reshape(2, 3, 4)

    def pass_of_core(sae, model, activation_store, *, n_batches, ignore_tokens=frozenset()):
        for _ in range(n_batches):
            activation_store.get_batch_tokens(2)
            sae.decode(sae.encode(x))
        return "metrics", "features"

    core = SimpleNamespace(get_sparsity_and_variance_metrics=pass_of_core)
    sae, store = Halver(), Store()
    with tallied(core) as measured:
        found = core.get_sparsity_and_variance_metrics(sae, None, store, n_batches=2, ignore_tokens={0, 1, None})
    assert found == ("metrics", "features")
    kept = torch.stack([x[0, 1], x[0, 2], x[1, 1]]).double()
    expected = 1 - (kept / 2).square().sum() / (kept - kept.mean(0)).square().sum()
    assert measured[id(sae)].report()["fve"] == pytest.approx(expected.item(), rel=1e-12)
    assert measured[id(sae)].n_tokens == 6
    assert core.get_sparsity_and_variance_metrics is pass_of_core
    assert not vars(sae)
    assert not vars(store)


def test_shadows_go_when_core_fails():
    def broken(sae, model, activation_store):
        raise RuntimeError("out of memory")

    core = SimpleNamespace(get_sparsity_and_variance_metrics=broken)
    sae, store = Halver(), Store()
    with tallied(core), pytest.raises(RuntimeError, match="out of memory"):
        core.get_sparsity_and_variance_metrics(sae, None, store)
    assert core.get_sparsity_and_variance_metrics is broken
    assert not vars(sae)
