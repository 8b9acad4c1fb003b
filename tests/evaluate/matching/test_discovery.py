"""Discovery versus separability: closed forms, the random control, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from cosae.errors import CosaeError
from cosae.evaluate import tables
from cosae.evaluate.matching import compare
from cosae.evaluate.matching.discovery import discovery_separability
from cosae.evaluate.matching.match import Pairs


def test_discovery_and_separability_have_their_closed_forms() -> None:
    """B's gain of 0.2 comes wholly from a feature A has not; then wholly from a matched one."""
    concepts = 30
    a = np.full((3, concepts), 0.6)
    b = np.full((3, concepts), 0.6)
    b[2] = 0.8
    pairs = Pairs(np.array([0, 1]), np.array([0, 1]), np.ones(2), np.ones(2))
    new = discovery_separability(a, a, b, b, pairs)
    assert new["gap_full"]["mean"] == pytest.approx(0.2)
    assert (new["gap_matched"]["mean"], new["discovery_frac"]) == (0.0, 1.0)
    shared = Pairs(np.array([0, 2]), np.array([0, 2]), np.ones(2), np.ones(2))
    sharper = discovery_separability(a, a, b, b, shared)
    assert sharper["separability_frac"] == pytest.approx(1.0)
    equal = discovery_separability(a, a, a, a, shared)
    assert (equal["separability_frac"], equal["discovery_frac"]) == (None, None)


def test_features_are_chosen_in_training_and_scored_held_out() -> None:
    train, held = np.array([[0.9, 0.5], [0.8, 0.6]]), np.array([[0.5, 0.9], [0.95, 0.7]])
    other = np.full((2, 2), 0.5)
    pairs = Pairs(np.array([0]), np.array([0]), np.ones(1), np.ones(1))
    found = discovery_separability(other, other, train, held, pairs)
    assert found["gap_full"]["mean"] == pytest.approx((0.0 + 0.2) / 2)


def one_to_one(*ids: int) -> Pairs:
    return Pairs(np.array(ids), np.array(ids), np.ones(len(ids)), np.ones(len(ids)))


def test_a_gap_of_both_kinds_is_split_and_every_resample_is_shared() -> None:
    """Half of the concepts gain 0.2 from a new feature, all gain 0.1 from a sharper one: 0.1 of a mean gap of 0.15."""
    concepts = 40
    a = np.full((3, concepts), 0.6)
    b = np.full((3, concepts), 0.7)
    b[2, : concepts // 2] = 0.8
    found = discovery_separability(a, a, b, b, one_to_one(0, 1))
    assert found["gap_full"]["mean"] == pytest.approx(0.15)
    assert found["gap_matched"] == {key: pytest.approx(0.1) for key in ("mean", "low", "high")}
    assert found["gap_discovery"]["mean"] == pytest.approx(0.05)
    assert found["separability_frac"] == pytest.approx(0.1 / 0.15)
    assert found["separability_low"] < 0.1 / 0.15 < found["separability_high"]
    assert found["discovery_low"] == pytest.approx(1 - found["separability_high"])
    # 0.1 / (0.1 + 0.1 q), q the share of gaining concepts, binomial about 1/2
    sd = (0.25 / concepts) ** 0.5
    assert found["separability_low"] == pytest.approx(0.1 / (0.1 + 0.1 * (0.5 + 1.96 * sd)), abs=0.02)
    assert found["per_concept"]["full_b"].tolist() == [0.8] * 20 + [0.7] * 20


def test_a_gap_that_may_be_nothing_has_no_shares() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.5, 0.9, (2, 4, 12))
    found = discovery_separability(a, a, b, b, one_to_one(0, 1))
    assert found["gap_full"]["low"] < 0 < found["gap_full"]["high"]
    shares = [found[f"{what}_{end}"] for what in ("separability", "discovery") for end in ("frac", "low", "high")]
    assert shares == [None] * 6


def test_random_features_show_what_any_restriction_does() -> None:
    """B has many weak copies of what it knows, A one feature a concept: leaving out features at random hurts A more."""
    concepts = 10
    a = np.where(np.eye(concepts, dtype=bool), 0.9, 0.5)
    b = np.full((concepts, concepts), 0.9)
    found = discovery_separability(a, a, b, b, one_to_one(0), n_random=200)
    assert found["gap_full"]["mean"] == 0.0
    assert found["gap_random"]["mean"] == pytest.approx(0.9 - (0.1 * 0.9 + 0.9 * 0.5), abs=1e-9)
    silent = np.concatenate([a, np.full((90, concepts), 0.5)])
    with_silent = discovery_separability(silent, silent, b, b, one_to_one(0), n_random=200)
    assert with_silent["gap_random"]["mean"] == pytest.approx(found["gap_random"]["mean"], abs=1e-9)
    again = discovery_separability(a, a, b, b, one_to_one(0), n_random=200)
    assert again["gap_random"] == found["gap_random"]


def test_what_does_not_fit_is_refused() -> None:
    a = np.full((3, 4), 0.6)
    with pytest.raises(CosaeError, match="at least one matched pair"):
        discovery_separability(a, a, a, a, one_to_one())
    with pytest.raises(CosaeError, match="features, concepts"):
        discovery_separability(a, a[:2], a, a, one_to_one(0))
    with pytest.raises(CosaeError, match="features, concepts"):
        discovery_separability(a, a, a[:, :2], a[:, :2], one_to_one(0))
    with pytest.raises(CosaeError, match="feature 3 of 3"):
        discovery_separability(a, a, a, a, one_to_one(3))
    with pytest.raises(CosaeError, match="finite"):
        discovery_separability(a, a, a * np.nan, a, one_to_one(0))


def test_a_pair_that_shares_no_feature_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several yardsticks may share nothing: its row says so, and the measurement goes on."""
    empty = SimpleNamespace(pairs=SimpleNamespace(shared=one_to_one), numbers=lambda: {"pairs": 0})
    monkeypatch.setattr(compare.matching, "match_saes", lambda *_, **__: empty)
    context = SimpleNamespace(sample=lambda: SimpleNamespace(labelled_N=np.ones(3, bool)), encoded=lambda sae: sae)
    sae = SimpleNamespace(d_sae=4)
    found = compare._decompose(context, sae, sae, {}, "cosine")
    assert "share no feature" in found["none"]
    by = {"cosine": {"pairs": [found], "yardsticks": []}}
    ((_, (_, row)),) = tables.discovery({"a": "A", "b": "B", "concepts": 3, "by": by})
    assert row[2:] == ["0", "-", "-", "-", "-"]
