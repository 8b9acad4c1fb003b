"""Effects of edits on predictions: against the head applied by hand, and where nothing may happen."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from cosae.errors import CosaeError
from cosae.evaluate.model.causal import measure_ablation, measure_edits, measure_steering
from cosae.models.capture import capture
from cosae.models.intervene.edits import ablate, set_to, steer
from cosae.types import Sequences
from tests.support.tiny import D, identity_sae, make_model, make_sae, make_sequences

pytest.importorskip("transformers")
LAST = "resid_post.3"


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return make_sequences(n_positions=12, lengths=[12, 7, 10, 12, 9], seed=5)


@pytest.fixture(scope="module")
def sae(model: Any) -> Any:
    return make_sae(model, LAST)


def by_hand(model: Any, sequences: Sequences, change: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """At the last block: (n,) KL, (n,) change of the cross-entropy and (n,) rows, from x′ and the head alone."""
    x_ND = capture(model, sequences, LAST)[LAST].x_ND
    mask_ST = sequences.mask_ST
    last_ST = mask_ST & ~torch.cat([mask_ST[:, 1:], torch.zeros(len(mask_ST), 1, dtype=torch.bool)], 1)
    at_N = ~last_ST[mask_ST]
    next_n = sequences.ids_ST.roll(-1, 1)[mask_ST][at_N]
    with torch.no_grad():
        own, new = (
            torch.log_softmax(model.lm_head(model.model.norm(v_ND[at_N])).double(), -1) for v_ND in (x_ND, change(x_ND))
        )
    kl_n = torch.nn.functional.kl_div(new, own, log_target=True, reduction="none").sum(-1)
    gain_n = (own - new).gather(1, next_n[:, None])[:, 0]
    return kl_n, gain_n, at_N


def common(model: Any, sequences: Sequences, sae: Any, n: int = 4) -> list[int]:
    codes = sae.encode(capture(model, sequences, LAST)[LAST].x_ND)
    return torch.bincount(codes.feature_E, minlength=sae.d_sae).argsort(descending=True)[:n].tolist()


def test_ablation_against_the_head_by_hand_and_exactly_nothing_off_the_feature(
    model: Any, sequences: Sequences, sae: Any
) -> None:
    features = common(model, sequences, sae)
    found = measure_ablation(model, LAST, sae, sequences, [*features, features[:2]])
    rows_FD = sae.W_dec.detach()

    for ids in ([features[0]], features[:2]):

        def without(x_ND: torch.Tensor, ids: list[int] = ids) -> torch.Tensor:
            return x_ND - sae.encode(x_ND).to_dense()[:, ids].detach() @ rows_FD[ids]

        kl_n, gain_n, at_N = by_hand(model, sequences, without)
        x_ND = capture(model, sequences, LAST)[LAST].x_ND
        dense = sae.encode(x_ND).to_dense().detach()
        on_n = (dense[:, ids] != 0).any(-1)[at_N]
        got = found["edits"]["+".join(map(str, ids))]
        assert got["on"]["tokens"] == int(on_n.sum()) > 5
        assert got["on"]["kl"] == pytest.approx(float(kl_n[on_n].mean()), rel=1e-3)
        assert got["on"]["cross_entropy_change"] == pytest.approx(float(gain_n[on_n].mean()), abs=1e-5)
        assert got["off"]["kl"] == 0.0  # a token of the last block predicts from itself alone
        assert got["off"]["cross_entropy_change"] == 0.0
        assert got["precision"] is None
        assert got["on_share"] == 1.0
        change_N = (dense[:, ids] @ rows_FD[ids]).norm(dim=-1)
        moved = change_N[change_N > 0]
        assert got["edited_tokens"] == len(moved)
        assert got["size"] == pytest.approx(float(moved.mean()), rel=1e-4)
    json.dumps(found, allow_nan=False)


def test_steering_against_the_head_by_hand_at_equal_size(model: Any, sequences: Sequences, sae: Any) -> None:
    found = measure_steering(model, LAST, sae, sequences, [3, 5, (3, 5)], amount=0.2)
    rows_FD = sae.W_dec.detach()
    for name, ids in (("3", [3]), ("5", [5]), ("3+5", [3, 5])):
        kl_n, _, at_N = by_hand(
            model, sequences, lambda x, ids=ids: x + 0.2 * x.norm(dim=-1, keepdim=True) * rows_FD[ids].sum(0)
        )
        on_n = (sae.encode(capture(model, sequences, LAST)[LAST].x_ND).to_dense()[:, ids] != 0).any(-1)[at_N]
        got = found["edits"][name]
        assert got["off"]["kl"] == pytest.approx(float(kl_n[~on_n].mean()), rel=1e-3)
        if on_n.any():
            assert got["precision"] == pytest.approx(float(kl_n[on_n].mean() / kl_n[~on_n].mean()), rel=1e-3)
            assert got["on_share"] == pytest.approx(float(kl_n[on_n].sum() / kl_n.sum()), rel=1e-3)
        assert got["edited_tokens"] == int(sequences.mask_ST.sum())
    assert found["edits"]["3"]["relative_size"] == pytest.approx(0.2, rel=1e-4)
    assert found["edits"]["5"]["relative_size"] == pytest.approx(0.2, rel=1e-4)


def test_a_planted_feature_is_specific_and_a_smeared_one_is_not(model: Any, sequences: Sequences) -> None:
    """Features ±e_i hold where x_i has their sign. One that pushes where its concept holds, one everywhere."""
    sae = identity_sae()
    x_ND = capture(model, sequences, LAST)[LAST].x_ND
    holds = torch.zeros_like(sequences.mask_ST).masked_scatter(sequences.mask_ST, x_ND[:, 4] > 0)
    edits = {"specific": steer(4, 3.0, at=holds), "smeared": steer(4, 3.0), "opposite": steer(4, 3.0, at=~holds)}
    found = measure_edits(model, LAST, sae, sequences, edits, holds=holds)["edits"]
    assert found["specific"]["on_share"] == 1.0
    assert found["opposite"]["on_share"] == 0.0
    assert 0.1 < found["smeared"]["on_share"] < 0.9
    assert found["specific"]["on"]["kl"] == pytest.approx(found["smeared"]["on"]["kl"], rel=1e-6)
    assert found["specific"]["precision"] is None
    assert found["opposite"]["precision"] == 0.0
    own = measure_ablation(model, LAST, sae, sequences, [4])["edits"]["4"]
    assert own["on"]["tokens"] == found["specific"]["on"]["tokens"]


def test_earlier_edits_reach_later_tokens_only(model: Any, sequences: Sequences) -> None:
    sae = make_sae(model, "resid_post.1")
    found = measure_edits(
        model, "resid_post.1", sae, sequences, {"push": set_to(2, 6.0, at=[5])}, holds=sequences.index_ST == 5
    )["edits"]["push"]
    assert found["on"]["tokens"] == 5
    assert found["off_reached"]["tokens"] == sum(length - 1 - 6 for length in (12, 7, 10, 12, 9))
    total_off = found["off"]["kl"] * found["off"]["tokens"]
    assert total_off == pytest.approx(found["off_reached"]["kl"] * found["off_reached"]["tokens"])
    assert found["off_reached"]["kl"] > 0


def test_a_feature_that_never_fires_does_nothing_and_costs_no_pass(model: Any, sequences: Sequences) -> None:
    sae = make_sae(model, LAST)
    with torch.no_grad():
        sae.score.bias_F[7] = -1e6
    passes: list[int] = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    found = measure_ablation(model, LAST, sae, sequences, [7])
    handle.remove()
    assert len(passes) == 1
    assert found["edits"]["7"]["off"]["kl"] == 0.0
    assert found["edits"]["7"]["on"] == {"tokens": 0, "kl": None, "cross_entropy_change": None}
    assert found["edits"]["7"]["on_share"] is None
    assert found["pooled"] == {
        "edits": 0,
        "edits_left_out": 1,
        "on_kl": None,
        "off_kl": None,
        "precision": None,
        "seed": 0,
    }


def test_pooled_counts_every_edit_once(model: Any, sequences: Sequences) -> None:
    sae = make_sae(model, "resid_post.1")
    found = measure_steering(model, "resid_post.1", sae, sequences, range(8), amount=0.1, n_resamples=100)
    both = [row for row in found["edits"].values() if row["on"]["tokens"]]
    assert found["pooled"]["edits"] == len(both) > 3
    on, off = (sum(row[side]["kl"] for row in both) for side in ("on", "off"))
    assert found["pooled"]["on_kl"]["mean"] == pytest.approx(on / len(both))
    assert found["pooled"]["precision"]["mean"] == pytest.approx(on / off)
    assert found["pooled"]["precision"]["low"] <= on / off <= found["pooled"]["precision"]["high"]


def test_batches_do_not_matter_no_sae_changes_and_reconstruction_can_be_the_reference(
    model: Any, sequences: Sequences
) -> None:
    sae = make_sae(model, "resid_post.1")
    before = {name: value.numpy().tobytes() for name, value in sae.state_dict().items()}
    features = list(range(6))
    one, other = (
        measure_ablation(model, "resid_post.1", sae, sequences, features, batch_sequences=size) for size in (1, 5)
    )
    for name in one["edits"]:
        for side in ("on", "off"):
            for key, value in one["edits"][name][side].items():
                assert value == pytest.approx(other["edits"][name][side][key], abs=1e-6)
    assert {name: value.numpy().tobytes() for name, value in sae.state_dict().items()} == before
    bare = measure_ablation(model, "resid_post.1", sae, sequences, features, error_term=False)
    assert bare["edits"]["0"]["size"] == pytest.approx(one["edits"]["0"]["size"], rel=1e-3)
    assert bare["edits"]["0"]["on"]["kl"] != one["edits"]["0"]["on"]["kl"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"edits": {}}, "at least one named edit"),
        ({"edits": {"a": ablate(99)}}, "Feature 99 is out of range"),
        ({"holds": torch.ones(2, 2, dtype=torch.bool)}, r"boolean tensor of shape \(5, 12\)"),
        ({"holds": {"b": torch.ones(5, 12, dtype=torch.bool)}}, "given for every edit"),
        ({"sequences": make_sequences(2, 1)}, "no token here predicts another"),
        ({"site": "resid_post.8"}, "out of range"),
    ],
)
def test_refusals(model: Any, sequences: Sequences, change: dict[str, Any], sentence: str) -> None:
    asked = {"site": LAST, "sae": identity_sae(D), "sequences": sequences, "edits": {"a": ablate(1)}, **change}
    with pytest.raises(CosaeError, match=sentence):
        measure_edits(model, **asked)
