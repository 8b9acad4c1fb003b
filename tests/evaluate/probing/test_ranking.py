"""Ranking against scikit-learn, and against the definition counted pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from cosae.errors import CosaeError
from cosae.evaluate.probing.ranking import (
    auroc_of_dimensions,
    auroc_of_latents,
    columns_of,
    mean_difference_of_latents,
    rank_quality,
    rank_quality_of_latents,
    select,
)
from cosae.types import Codes


def world(seed: int, n: int, f: int, c: int, zero: float, levels: int, signed: bool) -> tuple[torch.Tensor, np.ndarray]:
    """Dense codes with many ties and silent tokens, and labels with both kinds in every column."""
    rng = np.random.default_rng(seed)
    value = rng.integers(-levels if signed else 1, levels + 1, size=(n, f)) / 3
    dense = np.where(rng.random((n, f)) < zero, 0.0, value)
    label = rng.random((n, c)) < rng.uniform(0.05, 0.95, size=c)
    label[0], label[1] = True, False
    return torch.from_numpy(dense.astype(np.float32)), label


worlds = st.builds(
    world,
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 40),
    f=st.integers(1, 6),
    c=st.integers(1, 4),
    zero=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    levels=st.integers(1, 8),
    signed=st.booleans(),
)


@settings(max_examples=80)
@given(worlds)
def test_all_latents_at_once_equal_scikit_learn_one_by_one(drawn: tuple[torch.Tensor, np.ndarray]) -> None:
    dense, label = drawn
    got = auroc_of_latents(Codes.from_dense(dense), label)
    expected = [[roc_auc_score(column, latent) for column in label.T] for latent in dense.numpy().T]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(auroc_of_dimensions(dense.numpy(), label), expected, rtol=0, atol=1e-12)


@settings(max_examples=80)
@given(worlds)
def test_dense_scores_equal_scikit_learn(drawn: tuple[torch.Tensor, np.ndarray]) -> None:
    dense, label = drawn
    n = min(dense.shape[1], label.shape[1])
    score, label = dense.numpy()[:, :n], label[:, :n]
    area, precision = rank_quality(score, label)
    np.testing.assert_allclose(area, [roc_auc_score(label[:, c], score[:, c]) for c in range(n)], atol=1e-12)
    expected = [average_precision_score(label[:, c], score[:, c]) for c in range(n)]
    np.testing.assert_allclose(precision, expected, atol=1e-12)


@settings(max_examples=80)
@given(worlds)
def test_sorting_the_codes_alone_equals_sorting_all_scores(drawn: tuple[torch.Tensor, np.ndarray]) -> None:
    """Of either sign, with and without silent tokens, to the last bit."""
    dense, label = drawn
    latent_C = np.arange(label.shape[1]) % dense.shape[1]
    sign_C = np.where(np.arange(len(latent_C)) % 2, -1.0, 1.0)
    expected = rank_quality(dense.numpy()[:, latent_C] * sign_C, label)
    found = rank_quality_of_latents(columns_of(Codes.from_dense(dense)), latent_C, sign_C, label)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_auroc_counts_pairs() -> None:
    dense = torch.tensor([[2.0], [0.0], [-1.0], [0.0], [2.0]])
    label = np.array([[True], [True], [False], [False], [False]])
    # pairs won: 2 beats −1 and 0 and ties 2; 0 beats −1, ties 0, loses to 2
    assert auroc_of_latents(Codes.from_dense(dense), label)[0, 0] == pytest.approx((2.5 + 1.5) / 6)


def test_codes_of_exactly_zero_tie_with_the_silent() -> None:
    token, feature = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0])
    explicit = Codes.from_entries(token, feature, torch.tensor([0.0, 1.0, -0.0]), 2, (4,))
    implicit = Codes.from_entries(token[1:2], feature[1:2], torch.tensor([1.0]), 2, (4,))
    label = np.array([[True], [False], [False], [True]])
    np.testing.assert_array_equal(auroc_of_latents(explicit, label), auroc_of_latents(implicit, label))
    assert auroc_of_latents(explicit, label)[1, 0] == 0.5  # the latent that never fires


def test_large_float_values_sort_within_their_latent() -> None:
    """The integer sort key must hold over the whole range of fp32, subnormals and both signs included."""
    tiny, huge = np.float32(1e-45), np.finfo(np.float32).max
    column = np.array([-huge, -1.5, -tiny, 0.0, tiny, 1.5, huge], dtype=np.float32)
    dense = torch.from_numpy(np.stack([column, -column, np.roll(column, 2)], axis=1))
    for cut in range(1, 7):
        label = np.arange(7)[:, None] >= cut
        area = auroc_of_latents(Codes.from_dense(dense), label)
        assert area[0, 0] == 1.0
        assert area[1, 0] == 0.0
        assert area[2, 0] == pytest.approx(roc_auc_score(label[:, 0], np.roll(np.arange(7), 2)))


def test_mean_difference_is_that_of_dense_codes() -> None:
    dense, label = world(3, 50, 5, 3, 0.6, 5, True)
    x = dense.double().numpy()
    expected = [[x[y, f].mean() - x[~y, f].mean() for y in label.T] for f in range(5)]
    np.testing.assert_allclose(mean_difference_of_latents(Codes.from_dense(dense), label), expected, atol=1e-12)


def test_columns_and_kept_tokens_are_those_of_dense_codes() -> None:
    dense, _ = world(4, 30, 6, 1, 0.5, 5, True)
    codes = Codes.from_dense(dense.reshape(5, 6, 6))
    wanted = np.array([3, 0, 3])
    np.testing.assert_array_equal(columns_of(codes)[:, wanted].toarray(), dense.numpy()[:, wanted])
    keep = np.random.default_rng(0).random(30) < 0.5
    kept = codes.take(keep)
    assert kept.shape == (int(keep.sum()),)
    torch.testing.assert_close(kept.to_dense(), dense[torch.from_numpy(keep)])


def test_the_rules_choose_different_latents() -> None:
    """Latent 0 knows the concept and whispers; latent 1 fires on half of everything and shouts."""
    rng = np.random.default_rng(5)
    label = rng.random(2000) < 0.2
    dense = np.zeros((2000, 3), dtype=np.float32)
    dense[:, 0] = 0.01 * label
    dense[:, 1] = 100.0 * (rng.random(2000) < np.where(label, 0.6, 0.5))
    dense[:, 2] = 0.02 * ~label  # as loud as the whisper, against the concept
    codes = Codes.from_dense(torch.from_numpy(dense))
    right = select(codes, label[:, None], "auroc")
    assert (right.latent_C[0], right.value_C[0], right.sign_C[0]) == (0, 1.0, 1.0)
    loud = select(codes, label[:, None], "mean_difference")
    assert (loud.latent_C[0], loud.sign_C[0]) == (1, 1.0)
    quiet = select(take_columns(codes, [0, 2]), label[:, None], "mean_difference")
    assert (quiet.latent_C[0], quiet.sign_C[0]) == (1, -1.0)
    assert quiet.value_C[0] == pytest.approx(-0.02)


def take_columns(codes: Codes, columns: list[int]) -> Codes:
    return Codes.from_dense(codes.to_dense()[:, columns])


def test_of_equal_latents_the_first_is_chosen() -> None:
    dense, label = world(6, 40, 3, 2, 0.3, 5, False)
    codes = Codes.from_dense(torch.cat([torch.zeros(40, 1), dense, dense], dim=1))
    for rule in ("auroc", "mean_difference"):
        assert (select(codes, label, rule).latent_C < 4).all()  # type: ignore[arg-type]


def test_mistakes_get_one_sentence() -> None:
    dense, label = world(7, 20, 3, 2, 0.3, 5, False)
    codes = Codes.from_dense(dense)
    with pytest.raises(CosaeError, match="20 tokens"):
        auroc_of_latents(codes, label[:-1])
    with pytest.raises(CosaeError, match="booleans"):
        auroc_of_latents(codes, label.astype(int))
    with pytest.raises(CosaeError, match="only one kind"):
        auroc_of_latents(codes, np.ones((20, 1), dtype=bool))
    with pytest.raises(CosaeError, match="NaN"):
        rank_quality(np.full((20, 2), np.nan), label)
    with pytest.raises(CosaeError, match="NaN"):
        auroc_of_latents(codes.with_values(codes.value_E * np.nan), label)
    with pytest.raises(CosaeError, match=r"rule .*auroc"):
        select(codes, label, "best")  # type: ignore[arg-type]
    with pytest.raises(CosaeError, match="20 tokens"):
        codes.take(np.ones(3, dtype=bool))


def test_the_standardised_rule_is_not_carried_by_a_latent_s_size() -> None:
    """A large latent, hardly related, beats a small exact one by its raw difference only."""
    label_NC = np.zeros((200, 1), dtype=bool)
    label_NC[:50] = True
    dense = torch.zeros(200, 3)
    dense[:50, 0] = 0.1  # the concept itself, small
    dense[::4, 1] = 30.0
    dense[:6, 1] = 30.0  # large, hardly related
    codes = Codes.from_dense(dense)
    assert select(codes, label_NC, "mean_difference").latent_C.tolist() == [1]
    chosen = select(codes, label_NC, "standardised_difference")
    assert chosen.latent_C.tolist() == [0]
    expected = 0.1 / dense[:, 0].double().std(correction=0).item()
    assert chosen.value_C[0] == pytest.approx(expected, rel=1e-6)
    assert select(Codes.from_dense(-dense), label_NC, "standardised_difference").sign_C.tolist() == [-1.0]
