"""The batch that fits: bytes grow with sequences as predicted, the budget and the number of tokens bind."""

from __future__ import annotations

import pytest
import torch

from cosae.errors import CosaeError
from cosae.models.batching import ENOUGH_TOKENS, choose_batch, device_bytes, measure_pass
from cosae.models.capture import capture
from cosae.models.sites import resolve_site
from tests.support.tiny_models import make_model, make_sequences


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_bytes_of_a_pass_grow_by_the_sequence_and_with_the_depth(family: str) -> None:
    model = make_model(family)
    last, first = ([resolve_site(model, f"resid_post.{block}")] for block in (3, 0))
    one, two, nine = (measure_pass(model, last, n, 32) for n in (1, 2, 9))
    assert 0 < one < two < nine
    assert nine == pytest.approx(one + 8 * (two - one), rel=0.02)
    assert measure_pass(model, first, 9, 32) <= nine
    rows = 9 * 32 * 32 * 4  # what is kept of one site alone
    every = [resolve_site(model, f"resid_post.{block}") for block in range(4)]
    assert measure_pass(model, every, 9, 32) >= nine + 2 * rows


def test_the_budget_and_the_tokens_bind() -> None:
    model = make_model("llama")
    one = measure_pass(model, [resolve_site(model, "resid_post.2")], 1, 32)
    assert choose_batch(model, "resid_post.2", 32, budget_bytes=9 * one) == 8
    assert choose_batch(model, "resid_post.2", 32, budget_bytes=one // 2) == 1
    assert choose_batch(model, "resid_post.2", 32) * 32 == ENOUGH_TOKENS  # a tiny model fits any machine
    assert choose_batch(model, ["resid_post.2", "mlp_out.1"], 48) == 64  # a power of two below 4096 / 48
    assert device_bytes(torch.device("cpu")) > 2**28
    with pytest.raises(CosaeError, match="context"):
        choose_batch(model, "resid_post.2", 0)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model, sequences = make_model("llama"), make_sequences()
    before = capture(model, sequences, "resid_post.2")["resid_post.2"].x_ND
    measure_pass(model, [resolve_site(model, "resid_post.2")], 2, 12)
    assert torch.equal(capture(model, sequences, "resid_post.2")["resid_post.2"].x_ND, before)
    assert not any(module._forward_hooks for module in model.modules())
