"""Direction against norm at equal size: the geometry, and models of which the answer is known."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosae.errors import CosaeError
from cosae.evaluate.model.patching import KINDS, _rounds, measure_patching, perturb
from cosae.evaluate.model.predictions import predicting
from cosae.models.capture import capture
from cosae.types import Sequences
from tests.support.tiny import make_model, make_sequences

pytest.importorskip("transformers")


@settings(deadline=None, max_examples=60)
@given(size=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_every_change_has_the_same_size_and_changes_one_thing_only(size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z_nD, other_nD = (3 * torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    for kind in KINDS:
        new_nD = perturb(z_nD, other_nD, kind, size)
        assert torch.allclose((new_nD - z_nD).norm(dim=-1), size * z_nD.norm(dim=-1), rtol=1e-9)
        cosine_n = torch.cosine_similarity(new_nD, z_nD, dim=-1)
        if kind.startswith("norm"):
            assert torch.allclose(cosine_n, torch.ones(6, dtype=torch.float64))
        else:
            assert torch.allclose(new_nD.norm(dim=-1), z_nD.norm(dim=-1))
            assert torch.allclose(cosine_n, torch.full((6,), math.cos(2 * math.asin(size / 2)), dtype=torch.float64))
            nearer_n = torch.cosine_similarity(new_nD, other_nD) > torch.cosine_similarity(z_nD, other_nD)
            within_n = torch.cosine_similarity(z_nD, other_nD) < math.cos(2 * math.asin(size / 2))
            assert nearer_n[within_n].all()


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return make_sequences(n_positions=12, lengths=[12, 7, 10, 12, 9], seed=5)


def test_before_a_final_norm_the_model_reads_direction_alone(sequences: Sequences) -> None:
    """RMSNorm follows the last block: a token's length there means nothing."""
    found = measure_patching(make_model("llama"), "resid_post.3", sequences, n_pairs=25, n_resamples=100)
    for row in found["by_size"]:
        assert row["kinds"]["norm_up"]["kl_here"] < 1e-9
        assert row["kinds"]["norm_down"]["kl_here"] < 1e-9
        assert row["kinds"]["direction"]["kl_here"] > 1e-4
        assert row["kinds"]["random"]["kl_here"] > 1e-4
        assert all(row["kinds"][kind]["kl_after"] < 1e-9 for kind in KINDS)
        assert all(row["kinds"][kind]["size"] == pytest.approx(row["size"], rel=1e-5) for kind in KINDS)
        if row["direction_over_norm"] is not None:
            assert row["direction_over_norm"]["low"] > 1e3
    assert [row["degrees"] for row in found["by_size"]] == sorted(row["degrees"] for row in found["by_size"])
    json.dumps(found, allow_nan=False)


def test_without_a_final_norm_the_norm_patch_costs_what_its_second_order_says(sequences: Sequences) -> None:
    """Logits W x, so x (1 ± ε) changes them by ± ε W x: KL = ½ ε² Var_p(W x), the mean over every token there is."""
    model = make_model("llama")
    model.model.norm = torch.nn.Identity()
    x = capture(model, sequences, "resid_post.3")["resid_post.3"]
    usable_N = predicting(sequences)[sequences.mask_ST] & (x.position_N > 0) & ~x.special_N
    found = measure_patching(
        model, "resid_post.3", sequences, n_pairs=int(usable_N.sum()), sizes=[0.01], n_resamples=50
    )
    kinds = found["by_size"][0]["kinds"]
    with torch.no_grad():
        logits_NV = model.lm_head(x.x_ND[usable_N]).double()
    p_NV = logits_NV.softmax(-1)
    variance_N = (p_NV * logits_NV.square()).sum(-1) - (p_NV * logits_NV).sum(-1).square()
    assert found["pairs"] == int(usable_N.sum())
    for kind in ("norm_up", "norm_down"):
        assert kinds[kind]["kl_here"] == pytest.approx(0.5 * 0.01**2 * float(variance_N.mean()), rel=0.03)


def test_in_the_middle_of_a_model_later_tokens_feel_it_too_and_batches_do_not_matter(sequences: Sequences) -> None:
    model = make_model("gpt2")
    one, other = (
        measure_patching(
            model, "resid_post.1", sequences, n_pairs=30, sizes=[0.1], batch_sequences=size, n_resamples=50
        )
        for size in (1, 4)
    )
    kinds = one["by_size"][0]["kinds"]
    assert all(kinds[kind]["kl_after"] > 1e-6 for kind in KINDS)
    for kind in KINDS:
        for name, value in kinds[kind].items():
            assert value == pytest.approx(other["by_size"][0]["kinds"][kind][name], rel=1e-4, abs=1e-9)
    assert one["pairs"] == 30
    again = measure_patching(model, "resid_post.1", sequences, n_pairs=30, sizes=[0.1], n_resamples=50, seed=1)
    assert again["by_size"] != one["by_size"]


def test_a_centre_is_what_lengths_are_measured_from(sequences: Sequences) -> None:
    model: Any = make_model("llama")
    x_ND = capture(model, sequences, "resid_post.1")["resid_post.1"].x_ND
    found = measure_patching(
        model, "resid_post.1", sequences, n_pairs=10, sizes=[0.1], centre_D=x_ND.mean(0), n_resamples=50
    )
    assert found["centred"]
    assert all(row["size"] == pytest.approx(0.1, rel=1e-4) for row in found["by_size"][0]["kinds"].values())


def test_a_sequence_holds_one_change_at_a_time_and_none_is_lost() -> None:
    flat_P = torch.tensor([0, 3, 12, 13, 14, 25, 1])
    rounds = _rounds(flat_P, 12, 2)
    seen = torch.cat([members for _, members in rounds])
    assert sorted(seen.tolist()) == list(range(7))
    for rows, members in rounds:
        assert len(set(rows.tolist())) == len(rows) <= 2
        assert torch.equal(flat_P[members] // 12, rows)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"sizes": [1.5]}, "between 0 and 1"), ({"n_pairs": 0}, "at least 1"), ({"site": "here"}, "unknown")],
)
def test_refusals(sequences: Sequences, change: dict[str, Any], sentence: str) -> None:
    asked = {"site": "resid_post.1", **change}
    with pytest.raises(CosaeError, match=sentence):
        measure_patching(make_model("llama"), sequences=sequences, **asked)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(CosaeError, match="at least two tokens"):
        measure_patching(make_model("llama"), "resid_post.1", make_sequences(1, 2))
