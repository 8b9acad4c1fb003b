"""Recovery scores of dictionaries whose right answer is known."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from cosae.activations.synthetic import SyntheticSource, World
from cosae.errors import CosaeError
from cosae.evaluate.recovery import recovery
from cosae.types import Codes

G, N = 24, 3000


@pytest.fixture(scope="module")
def world() -> tuple[torch.Tensor, Codes]:
    source = SyntheticSource(World(d_in=16, n_features=G, l0=3))
    return source.feature_FD, source.held_out(N)[1]


def test_the_truth_itself_scores_one(world: tuple[torch.Tensor, Codes]) -> None:
    feature_GD, truth = world
    scores = recovery(feature_GD, truth, feature_GD, truth)
    for name in ("mcc", "mcc_over_true", "uniqueness", "precision", "recall", "f1", "auroc", "f1_argmax"):
        assert scores[name] == pytest.approx(1.0), name
    assert scores["l0"] == scores["true_l0"] == pytest.approx(truth.l0)
    assert scores["dead_frac"] == 0
    assert scores["n_true_seen"] == G


def test_order_length_and_sign_of_rows_do_not_matter(world: tuple[torch.Tensor, Codes]) -> None:
    feature_GD, truth = world
    order = torch.randperm(G, generator=torch.Generator().manual_seed(0))
    sign_G = torch.where(torch.arange(G) % 2 == 0, 1.0, -1.0)
    decoder = (feature_GD * sign_G[:, None] * torch.arange(1, G + 1)[:, None])[order]
    codes = Codes.from_dense((truth.to_dense() * sign_G)[:, order])
    scores = recovery(decoder, codes, feature_GD, truth)
    for name in ("mcc", "uniqueness", "f1", "auroc"):
        assert scores[name] == pytest.approx(1.0), name


def test_a_missing_feature_costs_its_share(world: tuple[torch.Tensor, Codes]) -> None:
    feature_GD, truth = world
    scores = recovery(feature_GD[:-1], Codes.from_dense(truth.to_dense()[:, :-1]), feature_GD, truth)
    assert scores["mcc"] == pytest.approx(1.0)
    assert scores["mcc_over_true"] == pytest.approx((G - 1) / G)
    assert scores["f1"] == pytest.approx((G - 1) / G)
    assert scores["auroc"] == pytest.approx((G - 0.5) / G)
    assert scores["f1_argmax"] == pytest.approx(1.0)  # the rule that cannot see what is missing


def test_two_latents_on_one_feature_are_seen(world: tuple[torch.Tensor, Codes]) -> None:
    feature_GD, truth = world
    decoder = feature_GD.clone()
    decoder[1] = feature_GD[0]
    dense = truth.to_dense()
    dense[:, 1] = dense[:, 0]
    scores = recovery(decoder, Codes.from_dense(dense), feature_GD, truth)
    assert scores["uniqueness"] == pytest.approx((G - 1) / G)
    assert scores["f1_argmax"] == pytest.approx(1.0)
    assert scores["f1"] < 1 - 0.5 / G


def test_detection_by_hand() -> None:
    eye = torch.eye(2)
    truth = Codes.from_dense(torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 0], [0, 1]]))
    codes = Codes.from_dense(torch.tensor([[2.0, 0], [0.5, 0], [0, 0], [1, 0], [0, 0]]))
    scores = recovery(eye, codes, eye, truth)
    # feature 0: hits 2, fired 3, true 3; feature 1: its latent is silent
    assert scores["precision"] == pytest.approx(2 / 3 / 2)
    assert scores["recall"] == pytest.approx(2 / 3 / 2)
    assert scores["f1"] == pytest.approx(2 / 3 / 2)
    # feature 0: trues score 2, .5, 0 against others 1, 0: wins 2 + 1 + .5 of 6; the silent latent has one
    # half
    assert scores["auroc"] == pytest.approx((3.5 / 6 + 0.5) / 2)
    assert scores["dead_frac"] == 0.5


def test_auroc_is_the_dense_one_with_ties_and_signs() -> None:
    generator = torch.Generator().manual_seed(2)
    dense = torch.randint(-3, 4, (400, 3), generator=generator).float()
    true = (torch.rand(400, 3, generator=generator) < 0.3).float()
    flip = torch.tensor([1.0, -1.0, 1.0])
    scores = recovery(torch.eye(3) * flip, Codes.from_dense(dense), torch.eye(3), Codes.from_dense(true))
    expected = [roc_auc_score(true[:, i], (dense * flip)[:, i]) for i in range(3)]
    assert scores["auroc"] == pytest.approx(sum(expected) / 3, rel=1e-12)


def test_random_codes_detect_nothing(world: tuple[torch.Tensor, Codes]) -> None:
    feature_GD, truth = world
    shuffled = truth.to_dense()[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    scores = recovery(feature_GD, Codes.from_dense(shuffled), feature_GD, truth)
    assert scores["auroc"] == pytest.approx(0.5, abs=0.01)
    assert scores["precision"] == pytest.approx(3 / G, abs=0.03)  # the base rate


def test_features_that_never_occur_are_left_out() -> None:
    truth = Codes.from_dense(torch.tensor([[1.0, 0], [1, 0], [0, 0]]))
    scores = recovery(torch.eye(2), truth, torch.eye(2), truth)
    assert scores["n_true_seen"] == 1
    assert scores["f1"] == scores["auroc"] == 1.0


def test_pairing_is_the_best_total_not_the_greedy_one() -> None:
    angle = torch.tensor([0.0, 0.3])
    feature_GD = torch.stack([angle.cos(), angle.sin()], 1)
    decoder = torch.stack([(angle + 0.14).cos(), (angle + 0.14).sin()], 1)  # both nearest to feature 1 or 0
    truth = Codes.from_dense(torch.eye(2))
    scores = recovery(decoder, truth, feature_GD, truth)
    assert scores["mcc"] == pytest.approx(float(torch.tensor(0.14).cos()), rel=1e-6)


def test_inputs_are_checked(world: tuple[torch.Tensor, Codes]) -> None:
    feature_GD, truth = world
    with pytest.raises(CosaeError, match="decoder rows"):
        recovery(feature_GD[1:], truth, feature_GD, truth)
    with pytest.raises(CosaeError, match="same width"):
        recovery(feature_GD[:, 1:], truth, feature_GD, truth)
    with pytest.raises(CosaeError, match="same tokens"):
        recovery(feature_GD, truth, feature_GD, Codes.from_dense(truth.to_dense()[1:]))


def test_codes_beyond_fp32_along_no_feature_are_scored_without_a_warning(world: tuple[torch.Tensor, Codes]) -> None:
    """What an arm that blew up may leave: infinite codes on rows that point nowhere."""
    feature_GD, truth = world
    dense = truth.to_dense()
    dense[dense > 0] = torch.inf
    scores = recovery(torch.zeros_like(feature_GD), Codes.from_dense(dense), feature_GD, truth)
    assert scores["mcc"] == 0.0
    assert 0.0 <= scores["auroc"] <= 1.0
