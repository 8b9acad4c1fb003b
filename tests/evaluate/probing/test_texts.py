"""Document-level probing with planted answers: a planted feature is found by every rule, chance stays at one half."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from cosae.activations.sample import SINKS
from cosae.errors import CosaeError
from cosae.evaluate.probing.logistic import fit, scores
from cosae.evaluate.probing.pooling import pool, pool_vectors
from cosae.evaluate.probing.ranking import EVERY_RULE
from cosae.evaluate.probing.texts import PooledSet, choose, draw, probe_texts, split_of
from cosae.types import Codes

S, F, D = 240, 20, 6


def pooled_set(name: str = "planted", seed: int = 0, n_classes: int = 2, arms: int = 1) -> PooledSet:
    """Feature 3 of "good" stands for class 1; "noise" knows nothing; "loud" also has feature 7, large and blind."""
    rng = np.random.default_rng(seed)
    class_S = rng.integers(n_classes, size=S)
    noise = rng.exponential(size=(S, F)) * (rng.random((S, F)) < 0.3)
    good = noise.copy()
    good[:, 3] = (class_S == 1) * rng.uniform(1, 2, size=S)
    loud = good.copy()
    loud[:, 7] = 1e4 * rng.exponential(size=S)
    codes = {
        k: [Codes.from_dense(torch.from_numpy(v).float())] * arms
        for k, v in (("noise", noise), ("good", good), ("loud", loud))
    }
    x = rng.normal(size=(S, D)).astype(np.float32)
    dense = {"norm": np.abs(x[:, :1]), "length": np.full((S, 1), 9.0, dtype=np.float32), "x": x}
    tokens = sparse.csr_matrix(rng.integers(3, size=(S, 30)).astype(float))
    return PooledSet(
        name, tuple("abcd"[:n_classes]), class_S, dict.fromkeys(SINKS, codes), dict.fromkeys(SINKS, dense), tokens
    )


def test_a_planted_feature_is_perfect_and_noise_is_one_half() -> None:
    sets = [pooled_set(f"set {i}", i) for i in range(6)]
    found = probe_texts(sets, baseline="noise", seeds=2, n_resamples=200)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for sinks in SINKS:
        for rule in EVERY_RULE:
            for top in (1, 2, 5):
                reading = found["summary"][sinks]["good"][f"{rule}/top_{top}"]
                assert reading["accuracy"]["mean"] == pytest.approx(1, abs=0.02)
                assert reading["auroc"]["mean"] > 0.999
            assert found["latents"][sinks]["good"][rule]["set 0"]["b"][0] == 3
            blind = found["summary"][sinks]["noise"][f"{rule}/top_1"]["auroc"]
            assert blind["low"] < 0.5 < blind["high"]
        for floor in ("norm", "best_dimension"):
            assert found["summary"][sinks][floor]["floor"]["auroc"]["mean"] == pytest.approx(0.5, abs=0.1)
    rows = {(r["arm"], r["reading"], r["metric"]): r for r in found["paired"] if r["sinks"] == "sinks_out"}
    assert rows["good", "full", "accuracy"]["low"] > 0.2
    assert found["interval"]["over"] == "sets and seeds"


def test_the_rule_decides_where_a_blind_feature_is_loud() -> None:
    found = probe_texts([pooled_set()], baseline="noise", seeds=1, tops=(1,), full=False)
    first = {rule: found["latents"]["sinks_out"]["loud"][rule]["planted"]["b"][0] for rule in EVERY_RULE}
    assert first == {"auroc": 3, "mean_difference": 7, "standardised_difference": 3}
    assert found["interval"]["over"] is None
    assert found["summary"]["sinks_out"]["loud"]["auroc/top_1"]["accuracy"]["low"] is None


def test_what_a_mask_does_is_paired_by_set() -> None:
    """ "loud" without its blind feature is "good": leaving out what is loud gives all of it back, in every set."""
    sets = []
    for i in range(4):
        one = pooled_set(f"set {i}", i)
        loud, good = one.codes["sinks_in"]["loud"], one.codes["sinks_in"]["good"]
        sets.append(
            replace(one, codes={"sinks_in": {"arm": loud, "same": good}, "sinks_out": {"arm": good, "same": good}})
        )
    found = probe_texts(sets, seeds=1, tops=(1,), full=False, rules=("mean_difference",), n_resamples=200)
    assert found["interval"]["over"] == "sets"
    masked = {(row["arm"], row["metric"]): row for row in found["masked"]}
    by = found["values"]
    gaps = np.subtract(*(by[s]["arm"]["mean_difference/top_1"]["accuracy"] for s in ("sinks_out", "sinks_in")))
    row = masked["arm", "accuracy"]
    assert row["difference"] == pytest.approx(gaps.mean())
    assert 0.3 < row["low"] <= gaps.mean() <= row["high"] <= gaps.max()
    assert [masked["same", "accuracy"][key] for key in ("difference", "low", "high")] == [0.0, 0.0, 0.0]


def test_of_many_classes_those_with_most_texts_are_asked_about() -> None:
    class_S = np.repeat(np.arange(5), [90, 30, 60, 25, 60])
    asked = {n: {c for c, _ in draw("s", tuple("abcde"), class_S, 2, 100, None, n)} for n in (2, 3, None)}
    assert asked == {2: {0, 2}, 3: {0, 2, 4}, None: {0, 1, 2, 3, 4}}
    assert draw("s", ("a", "b"), class_S % 2, 1, 100, None, 1).keys() == {(1, 0)}


def test_permuted_labels_stay_at_one_half_within_their_interval() -> None:
    rng = np.random.default_rng(5)
    sets = [replace(pooled_set(f"s{i}", i), class_S=rng.permutation(pooled_set(f"s{i}", i).class_S)) for i in range(5)]
    found = probe_texts(sets, baseline="good", seeds=2, n_resamples=500)
    for reading, by in found["summary"]["sinks_in"]["good"].items():
        assert by["auroc"]["low"] < 0.5 < by["auroc"]["high"], reading


def test_several_classes_are_asked_one_by_one_and_seeds_take_saes_in_turn() -> None:
    one = pooled_set(n_classes=3, arms=2)
    arms = {name: [listed[0], Codes.from_dense(torch.zeros(S, F))] for name, listed in one.codes["sinks_in"].items()}
    found = probe_texts([replace(one, codes=dict.fromkeys(SINKS, arms))], seeds=2, tops=(1,), rules=("auroc",))
    assert found["sets"][0]["classes"] == ["a", "b", "c"]
    first, second = found["values"]["sinks_in"]["good"]["auroc/top_1"]["auroc"][0]
    assert first > 0.6
    assert second == 0.5
    assert found["interval"]["how"] == "Student's t"


def test_a_split_is_balanced_disjoint_and_a_function_of_its_seed() -> None:
    class_S = np.array([0] * 300 + [1] * 60)
    one, again, other = split_of(class_S, 1, 0), split_of(class_S, 1, 0), split_of(class_S, 1, 1)
    assert one is not None
    assert again is not None
    assert other is not None
    assert (one.train_label.sum(), len(one.train_label), one.test_label.sum(), len(one.test_label)) == (48, 96, 12, 24)
    assert not set(one.train_R) & set(one.test_R)
    assert (one.train_R == again.train_R).all()
    assert not np.array_equal(one.train_R, other.train_R)
    assert split_of(class_S[:320], 1, 0) is None


def test_pooling_by_hand_with_sinks_in_and_out() -> None:
    dense = torch.tensor([[8.0, 0, 1], [0, 2, 0], [4, 0, 0], [0, 0, 3]])
    codes, text_N = Codes.from_dense(dense), np.array([0, 0, 0, 2])
    keep_N = np.array([False, True, True, True])
    everything = np.ones(4, dtype=bool)
    assert pool(codes, text_N, 3, everything).to_scipy().toarray() == pytest.approx(
        np.array([[4, 2 / 3, 1 / 3], [0, 0, 0], [0, 0, 3]]), abs=1e-6
    )
    assert pool(codes, text_N, 3, keep_N).to_scipy().toarray() == pytest.approx(
        np.array([[2, 1, 0], [0, 0, 0], [0, 0, 3]])
    )
    assert pool(codes, text_N, 3, everything, "last").to_scipy().toarray().tolist() == [[4, 0, 0], [0, 0, 0], [0, 0, 3]]
    assert pool_vectors(dense, text_N, 3, keep_N).tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 3]]
    both = Codes.cat([pool(codes, text_N, 3, keep_N), pool(codes, text_N, 3, keep_N)])
    assert both.n_tokens == 6
    with pytest.raises(CosaeError, match="pooling must be one of"):
        pool(codes, text_N, 3, keep_N, "max")


def test_the_regression_is_scikit_learn_s_dense_and_sparse() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 8)) * (rng.random((400, 8)) < 0.5)
    label = rng.random(400) < 1 / (1 + np.exp(-(x @ np.linspace(-2, 2, 8) + 0.3)))
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(x, label)
    for given in (x, sparse.csr_matrix(x)):
        weight_F1, bias = fit(given, label[:, None])
        assert weight_F1[:, 0] == pytest.approx(theirs.coef_[0], abs=2e-3)
        assert bias == pytest.approx(theirs.intercept_[0], abs=2e-3)
    label_N1 = label[:300, None]
    wide = scores(1000 * x[:300], label_N1, 1000 * x[300:])
    assert wide == pytest.approx(scores(x[:300], label_N1, x[300:]), abs=1e-3)


def test_choosing_breaks_ties_by_the_smallest_id() -> None:
    codes = Codes.from_dense(torch.zeros(S, F))
    split = split_of(np.arange(S) % 2, 1, 0)
    assert split is not None
    assert choose(codes, split, ("auroc",), 3)["auroc"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sets": []}, "needs a labelled set"),
        ({"sets": [pooled_set(), pooled_set()]}, "must have different names"),
        ({"baseline": "absent"}, "baseline must be one of"),
        ({"sets": [replace(pooled_set(), class_S=np.array([1] + [0] * (S - 1)))]}, "has no class with 20"),
    ],
)
def test_refusals(change: dict, sentence: str) -> None:
    with pytest.raises(CosaeError, match=sentence):
        probe_texts(**{"sets": [pooled_set()], **change})
