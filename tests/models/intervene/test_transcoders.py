"""A transcoder stands in for its target: the same as replacing the MLP's output by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cosae.errors import CosaeError
from cosae.evaluate.model.splice import measure_splice
from cosae.models.capture import capture
from cosae.models.intervene.edits import ablate, steer
from cosae.models.intervene.splice import spliced
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from tests.support.tiny import D, make_model, make_sequences

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "skip"])
def transcoder(model: Any, request: pytest.FixtureRequest) -> SAE:
    read, added = (a.x_ND for a in capture(model, make_sequences(), ["mlp_in.1", "mlp_out.1"]).values())
    sae = SAE.build(D, 24, "cosine", "batch_topk", 5, 0, d_out=D, skip=request.param, sample=read, target=added)
    with torch.no_grad():
        if sae.target.skip_OD is not None:
            sae.target.skip_OD.copy_(0.1 * torch.eye(D))
    calibrate(sae, read)
    sae.metadata = {"site": "mlp_in.1", "target": "mlp_out.1"}
    return sae


def logits(model: Any, sequences: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(sequences.ids_ST, attention_mask=sequences.mask_ST.long(), use_cache=False).logits


def test_the_target_is_replaced_as_by_hand(model: Any, transcoder: SAE) -> None:
    sequences = make_sequences()
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda _, args, out: transcoder(args[0]))
    wanted = logits(model, sequences)
    handle.remove()
    for key in ("mlp_out.1", ("mlp_in.1", "mlp_out.1")):
        with spliced(model, {key: transcoder}, tokens="all") as run:
            torch.testing.assert_close(logits(model, sequences), wanted)
        read = capture(model, sequences, "mlp_in.1")["mlp_in.1"].x_ND
        assert torch.equal(run.codes["mlp_out.1"].to_dense().reshape(-1, 24), transcoder.encode(read).to_dense())
    assert not torch.allclose(wanted, logits(model, sequences))


def test_with_the_error_term_nothing_changes_but_what_is_edited(model: Any, transcoder: SAE) -> None:
    sequences = make_sequences()
    own = logits(model, sequences)
    with spliced(model, {"mlp_out.1": transcoder}, error_term=True, tokens="all"):
        assert torch.equal(logits(model, sequences), own)
    feature = int(transcoder.encode(capture(model, sequences, "mlp_in.1")["mlp_in.1"].x_ND).feature_E[0])
    for edit in (ablate(feature), steer(feature, 3.0)):
        with spliced(model, {"mlp_out.1": transcoder}, error_term=True, edits=edit, tokens="all"):
            assert not torch.allclose(logits(model, sequences), own)


def test_spliced_loss(model: Any, transcoder: SAE) -> None:
    """Ablations are of the target; a perfect transcoder recovers all."""
    sequences = make_sequences(4)
    found = measure_splice(model, "mlp_in.1", {"one": transcoder}, sequences, target="mlp_out.1", n_resamples=20)
    assert found["target"] == "mlp_out.1"
    assert abs(found["saes"]["one"]["error_term"]["kl"]) < 1e-6
    zero = found["ablations"]["zero"]["everywhere"]["sinks_in"]["kl"]
    handle = model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: 0 * out)
    without = logits(model, sequences).log_softmax(-1)
    handle.remove()
    own = logits(model, sequences).log_softmax(-1)
    kl_ST = (own.exp() * (own - without)).sum(-1)
    assert zero == pytest.approx(float(kl_ST[:, :-1].mean()), rel=0.2)
    with pytest.raises(CosaeError, match="of the other kind"):
        measure_splice(model, "mlp_in.1", {"one": transcoder}, sequences)


def test_swapped_sites_and_unknown_inputs_are_named(model: Any, transcoder: SAE) -> None:
    with (
        spliced(model, {("mlp_out.1", "mlp_in.1"): transcoder}, tokens="all"),
        pytest.raises(CosaeError, match="swapped"),
    ):
        logits(model, make_sequences())
    lost = SAE.build(D, 24, "cosine", "topk", 5, d_out=D)
    with pytest.raises(CosaeError, match="does not say where its input is read"):
        spliced(model, {"mlp_out.1": lost})
