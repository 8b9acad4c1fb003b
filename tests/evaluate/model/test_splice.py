"""The cost of a splice against numbers worked out by hand, and against SAEs whose cost is known."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cosae.activations.sinks import median_norm, sink_mask
from cosae.errors import CosaeError
from cosae.evaluate.model import predictions
from cosae.evaluate.model.splice import PLACES, measure_splice
from cosae.models import embedded
from cosae.models.capture import capture
from cosae.types import Sequences
from tests.support.tiny import D, identity_sae, make_model, make_sae, make_sequences

pytest.importorskip("transformers")
SITE = "resid_post.3"


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def sequences(model: Any) -> Sequences:
    """Documents the model wrote itself, so that it predicts them better than any broken model does."""
    drawn = make_sequences(n_positions=24, lengths=[24, 17, 20, 24, 9, 24, 24, 13], seed=5)
    torch.manual_seed(3)
    ids_ST = model.generate(drawn.ids_ST[:, :1], do_sample=True, top_k=0, min_new_tokens=23, max_new_tokens=23)
    return replace(drawn, ids_ST=torch.where(drawn.mask_ST, ids_ST, 0))


@pytest.fixture(scope="module")
def found(model: Any, sequences: Sequences) -> dict[str, Any]:
    saes = {"standard": make_sae(model, SITE, score="inner"), "cosine": make_sae(model, SITE)}
    return measure_splice(model, SITE, saes, sequences, factor=1.2, n_resamples=200)


class ByHand:
    """The last block's output is what the final norm and the head read: every number follows from x′ alone."""

    def __init__(self, model: Any, sequences: Sequences) -> None:
        self.model, self.sequences = model, sequences
        activations = capture(model, sequences, SITE)[SITE]
        self.x_ND, self.norm_N = activations.x_ND, activations.norm_N
        self.sink_N = sink_mask(activations, median_norm(activations.norm_N), 1.2)
        self.doc_N = activations.doc_N
        last_ST = sequences.mask_ST & ~sequences.mask_ST.roll(-1, 1)
        last_ST[:, -1] = sequences.mask_ST[:, -1]
        self.at_N = ~last_ST[sequences.mask_ST]
        self.next_n = sequences.ids_ST.roll(-1, 1)[sequences.mask_ST][self.at_N]
        self.own = self.log_q(self.x_ND)

    @torch.no_grad()
    def log_q(self, x_ND: torch.Tensor) -> torch.Tensor:
        logits = self.model.lm_head(self.model.model.norm(x_ND[self.at_N].float()))
        return torch.log_softmax(logits.double(), -1)

    def loss(self, log_q: torch.Tensor) -> torch.Tensor:
        return -log_q[torch.arange(len(self.next_n)), self.next_n]

    def kl(self, log_q: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.kl_div(log_q, self.own, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("name", ["standard", "cosine"])
@pytest.mark.parametrize("place", PLACES)
def test_every_number_against_the_head_applied_by_hand(
    model: Any, sequences: Sequences, found: dict[str, Any], name: str, place: str
) -> None:
    hand = ByHand(model, sequences)
    sae = make_sae(model, SITE, score="inner") if name == "standard" else make_sae(model, SITE)
    replaced_N = torch.ones_like(hand.sink_N) if place == "everywhere" else ~hand.sink_N
    assert 8 < int(hand.sink_N.sum()) < 100

    def put(new_ND: torch.Tensor) -> torch.Tensor:
        return hand.log_q(torch.where(replaced_N[:, None], new_ND, hand.x_ND))

    log_q = put(sae(hand.x_ND))
    own = hand.loss(hand.own)
    mean_D = hand.x_ND.double()[replaced_N].mean(0).float()
    harm = {"mean": hand.loss(put(mean_D.expand_as(hand.x_ND))) - own, "zero": hand.loss(put(0 * hand.x_ND)) - own}
    for over, in_n in (("sinks_in", torch.ones(len(own), dtype=torch.bool)), ("sinks_out", ~hand.sink_N[hand.at_N])):
        got = found["saes"][name][place][over]
        increase = (hand.loss(log_q) - own)[in_n]
        assert got["tokens"] == int(in_n.sum())
        assert got["cross_entropy"] == pytest.approx(float(hand.loss(log_q)[in_n].mean()), abs=1e-5)
        assert got["increase"] == pytest.approx(float(increase.mean()), abs=1e-5)
        assert got["kl"] == pytest.approx(float(hand.kl(log_q)[in_n].mean()), rel=1e-4)
        for kind, harm_n in harm.items():
            assert found["ablations"][kind][place][over]["increase"] == pytest.approx(
                float(harm_n[in_n].mean()), abs=1e-5
            )
            recovered = 1 - float(increase.sum() / harm_n[in_n].sum())
            assert harm_n[in_n].sum() > 1
            assert got[f"recovered_{kind}"] == pytest.approx(recovered, abs=1e-4)
        norm_n = hand.norm_N.double()[hand.at_N]
        cuts = np.quantile(norm_n[in_n].numpy(), [0.25, 0.5, 0.75])
        quartile_n = torch.bucketize(norm_n, torch.tensor(cuts))
        for q, row in enumerate(got["by_norm_quartile"]):
            here = in_n & (quartile_n == q)
            assert row["tokens"] == int(here.sum()) > 0
            assert row["kl"] == pytest.approx(float(hand.kl(log_q)[here].mean()), rel=1e-4)


def test_the_models_own_loss_is_transformers_own(model: Any, sequences: Sequences, found: dict[str, Any]) -> None:
    labels = sequences.ids_ST.masked_fill(~sequences.mask_ST, -100)
    with torch.no_grad():
        loss = model(sequences.ids_ST, attention_mask=sequences.mask_ST.long(), labels=labels).loss
    assert found["model"]["sinks_in"] == pytest.approx(float(loss), abs=1e-5)


def test_on_sinks_left_alone_nothing_changes_where_only_they_are_counted(
    model: Any, sequences: Sequences, found: dict[str, Any]
) -> None:
    """At the last block a token's own vector is all that counts, so sinks left as they are keep KL 0."""
    everywhere, off = (found["saes"]["cosine"][place] for place in PLACES)
    assert off["sinks_out"]["kl"] == pytest.approx(everywhere["sinks_out"]["kl"], rel=1e-6)
    kept = off["sinks_out"]["tokens"]
    total = off["sinks_in"]["tokens"]
    assert off["sinks_in"]["kl"] == pytest.approx(off["sinks_out"]["kl"] * kept / total, rel=1e-9)
    assert everywhere["sinks_in"]["kl"] > off["sinks_in"]["kl"]


@pytest.mark.parametrize("site", ["resid_post.1", "resid_pre.2", "mlp_out.2"])
def test_a_perfect_sae_recovers_everything(model: Any, sequences: Sequences, site: str) -> None:
    found = measure_splice(model, site, {"perfect": identity_sae()}, sequences, n_resamples=50)
    for place in PLACES:
        for over in ("sinks_in", "sinks_out"):
            numbers = found["saes"]["perfect"][place][over]
            assert numbers["kl"] < 1e-9
            assert abs(numbers["increase"]) < 1e-5
            for kind in ("mean", "zero"):
                assert numbers[f"recovered_{kind}"] == pytest.approx(1, abs=1e-4)


def test_the_error_term_leaves_nothing(found: dict[str, Any]) -> None:
    for name in ("standard", "cosine"):
        assert found["saes"][name]["error_term"] == {"kl": 0.0, "increase": 0.0}


def test_an_sae_that_reconstructs_the_mean_alone_recovers_nothing(model: Any, sequences: Sequences) -> None:
    sae = identity_sae()
    x_ND = capture(model, sequences, "resid_post.1")["resid_post.1"].x_ND
    with torch.no_grad():
        sae.centre_D.copy_(x_ND.double().mean(0))
        sae.selector.set_margin(1e9)
    found = measure_splice(model, "resid_post.1", {"mean": sae}, sequences, n_resamples=50)
    assert found["saes"]["mean"]["everywhere"]["sinks_in"]["recovered_mean"] == pytest.approx(0, abs=1e-4)


def test_it_does_not_depend_on_the_batch_size_nor_change_an_sae(model: Any, sequences: Sequences) -> None:
    saes = {"standard": make_sae(model, "resid_post.1", score="inner"), "cosine": make_sae(model, "resid_post.1")}
    before = {name: {k: v.numpy().tobytes() for k, v in sae.state_dict().items()} for name, sae in saes.items()}
    one, other = (
        measure_splice(model, "resid_post.1", saes, sequences, batch_sequences=size, n_resamples=50) for size in (1, 4)
    )
    assert close(one, other) > 500
    after = {name: {k: v.numpy().tobytes() for k, v in sae.state_dict().items()} for name, sae in saes.items()}
    assert before == after
    assert all(parameter.grad is None for sae in saes.values() for parameter in sae.parameters())
    json.dumps(one, allow_nan=False)


def close(one: Any, other: Any) -> int:
    """How many numbers were found equal to 1e-6 (relative or absolute)."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return sum(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return sum(close(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float):
        assert one == pytest.approx(other, abs=2e-6, rel=2e-6)
        return 1
    assert one == other
    return 0


def test_paired_differences_are_those_of_the_values_and_their_intervals_hold_them(found: dict[str, Any]) -> None:
    assert len(found["paired"]) == 2 * 2 * 4 * 2
    for row in found["paired"]:
        numbers = found["saes"][row["arm"]][row["spliced_in"]][row["over"]]
        assert row["value"] == (None if numbers[row["metric"]] is None else pytest.approx(numbers[row["metric"]]))
        assert row["unit"] == "documents"
        if row["arm"] == row["versus"]:
            assert row["difference"] is None
        elif row["value"] is not None:
            base = found["saes"][row["versus"]][row["spliced_in"]][row["over"]][row["metric"]]
            assert row["difference"] == pytest.approx(row["value"] - base, abs=1e-9)
            assert row["difference_low"] <= row["difference"] <= row["difference_high"]


def test_an_sae_against_its_own_copy_differs_by_nothing(model: Any, sequences: Sequences) -> None:
    sae = make_sae(model, SITE)
    rows = measure_splice(model, SITE, {"a": sae, "b": sae}, sequences, n_resamples=50)["paired"]
    differences = [row["difference"] for row in rows if row["arm"] == "b" and row["value"] is not None]
    assert differences == [0.0] * len(differences)
    assert len(differences) >= 4


def test_predictions_do_not_cross_documents() -> None:
    packed = make_sequences(1, 8)
    doc_ST = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    packed = Sequences(packed.ids_ST, doc_ST, packed.index_ST, packed.mask_ST, packed.special_ST, ("a", "b"))
    assert predictions.predicting(packed)[0].tolist() == [True, True, False, True, True, True, True, False]


def test_divergence_in_closed_form() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    got = predictions.divergence(p.log(), q.log() + 3.0)
    assert float(got) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2), rel=1e-6)
    never = torch.tensor([[0.0, float("-inf"), 0.0]])
    assert float(predictions.divergence(never, never)) == 0.0
    assert predictions.divergence(p[:0], q[:0]).shape == (0,)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, ids = torch.randn(50, 7), torch.randn(50, 7), torch.randint(0, 7, (50,))
    whole = predictions.divergence(a, b), predictions.cross_entropy(a, ids)
    monkeypatch.setattr(predictions, "CHUNK_ENTRIES", 21)
    assert torch.equal(predictions.divergence(a, b), whole[0])
    assert torch.equal(predictions.cross_entropy(a, ids), whole[1])


def test_on_the_embedded_model_the_mean_is_the_harder_reference() -> None:
    from cosae.text.packing import sequences as cut
    from cosae.text.pylib import Document
    from cosae.text.tokenization import tokenize_documents

    model, tokenizer = embedded.load()
    text = "import os\n\n\ndef {}(path):\n    with open(path) as file:\n        return file.read()\n"
    documents = [Document(name, text.format(name)) for name in ("read", "load", "slurp", "fetch")]
    tokens = tokenize_documents(documents, tokenizer, add_bos=True)
    batch = cut(tokens, 32, pad_id=tokenizer.pad_token_id, special_ids=tokenizer.all_special_ids)
    x_ND = capture(model, batch, "resid_post.2")["resid_post.2"].x_ND
    import cosae
    from cosae.sae.calibrate import calibrate

    rough = cosae.SAE.build(d_in=192, d_sae=384, k=8, sample=x_ND)
    calibrate(rough, x_ND)
    found = measure_splice(
        model, "resid_post.2", {"rough": rough, "perfect": identity_sae(192)}, batch, n_resamples=50, baseline="rough"
    )
    numbers = found["saes"]["rough"]["everywhere"]["sinks_out"]
    assert found["model"]["sinks_out"] < found["ablations"]["mean"]["everywhere"]["sinks_out"]["cross_entropy"]
    assert numbers["kl"] > 0
    assert numbers["increase"] > 0
    perfect = found["saes"]["perfect"]["everywhere"]["sinks_out"]
    assert perfect["recovered_mean"] == pytest.approx(1, abs=1e-4)
    assert perfect["recovered_zero"] == pytest.approx(1, abs=1e-4)
    assert numbers["recovered_mean"] < 1


def test_where_an_ablation_does_no_harm_there_is_no_recovery(model: Any) -> None:
    """On random tokens this model does worse than the mean would: breaking it helps."""
    noise = make_sequences(n_positions=12, lengths=[12, 7, 10, 12, 9], seed=5)
    found = measure_splice(model, "resid_post.1", {"one": identity_sae()}, noise, n_resamples=50)
    assert found["ablations"]["mean"]["everywhere"]["sinks_in"]["increase"] < 0
    assert found["saes"]["one"]["everywhere"]["sinks_in"]["recovered_mean"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"saes": {}}, "at least one SAE by name"),
        ({"baseline": "other"}, "the baseline must be one of the SAEs"),
        ({"site": "resid_post.7"}, "out of range"),
        ({"sequences": make_sequences(2, 1)}, "no token here predicts another"),
        ({"site": "model.layers.1.mlp.up_proj"}, "has width 64"),
    ],
)
def test_refusals(model: Any, sequences: Sequences, change: dict[str, Any], sentence: str) -> None:
    asked = {"site": "resid_post.1", "saes": {"one": identity_sae(D)}, "sequences": sequences, **change}
    with pytest.raises(CosaeError, match=sentence):
        measure_splice(model, **asked)


def test_a_model_without_a_head_or_in_training_is_refused(sequences: Sequences) -> None:
    model = make_model("gpt2")
    with pytest.raises(CosaeError, match="predicts no tokens"):
        measure_splice(model.transformer, "resid_post.1", {"one": identity_sae()}, sequences)
    with pytest.raises(CosaeError, match="training mode"):
        measure_splice(model.train(), "resid_post.1", {"one": identity_sae()}, sequences)
