"""A splice among other people's hooks, odd ways to leave, and the less usual ways to generate."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from cosae.activations.filter import Filter, FilterPolicy
from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.models.intervene.edits import ablate, set_to, steer
from cosae.models.intervene.splice import hook, spliced
from tests.support.tiny import (
    D,
    first_of,
    identity_sae,
    make_model,
    make_sae,
    make_sequences,
    mixed_sequences,
    on_first,
)

pytest.importorskip("transformers")
SITE = "resid_post.2"


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def sae(model: Any) -> Any:
    return make_sae(model)


def logits(model: Any, sequences: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(sequences.ids_ST, attention_mask=sequences.mask_ST.long(), use_cache=False, **options).logits


def hooks_of(model: Any) -> list[Any]:
    return [(dict(m._forward_hooks), dict(m._forward_pre_hooks), m.forward) for m in model.modules()]


def test_hooks_of_others_stay_and_act_in_the_order_they_were_hung(model: Any, sae: Any) -> None:
    sequences, block = make_sequences(), model.model.layers[2]
    seen: list[torch.Tensor] = []
    before = block.register_forward_hook(on_first(lambda x: x * 2))
    after = None
    try:
        doubled = logits(model, sequences)
        with spliced(model, {SITE: sae}, error_term=True):
            after = block.register_forward_hook(lambda _m, _a, out: seen.append(first_of(out).detach().clone()))
            assert torch.equal(logits(model, sequences), doubled)
        assert torch.equal(logits(model, sequences), doubled)
        assert len(seen) == 2
        assert torch.equal(seen[0], seen[1])
        with spliced(model, {SITE: sae}):
            logits(model, sequences)
        assert torch.equal(seen[2], seen[0])  # hung earlier, it sees what the splice gets
        assert [handle.id in block._forward_hooks for handle in (before, after)] == [True, True]
    finally:
        before.remove()
        if after is not None:
            after.remove()


def test_splices_may_be_left_in_any_order(model: Any) -> None:
    sequences, first, second = make_sequences(), make_sae(model, seed=1), make_sae(model, seed=2)
    before, own = hooks_of(model), logits(model, sequences)
    with spliced(model, {SITE: second}):
        only_second = logits(model, sequences)
    a, b = spliced(model, {SITE: first}), spliced(model, {SITE: second})
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert torch.equal(logits(model, sequences), only_second)
    b.__exit__(None, None, None)
    assert torch.equal(logits(model, sequences), own)
    assert hooks_of(model) == before


def test_an_error_in_a_pass_leaves_the_splice_usable_and_the_model_clean(model: Any, sae: Any) -> None:
    sequences = make_sequences()
    own = logits(model, sequences)
    with spliced(model, {SITE: sae}) as run:
        spliced_in = logits(model, sequences)
        with pytest.raises(IndexError):
            model(torch.full((1, 3), 10_000))
        broken = model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, sequences)
        broken.remove()
        assert torch.equal(logits(model, sequences), spliced_in)
        assert run.codes[SITE].shape == (3, 12)
    assert torch.equal(logits(model, sequences), own)


def test_one_sae_at_several_sites_and_the_same_one_twice(model: Any) -> None:
    sequences, sae = make_sequences(), identity_sae(D)
    own = logits(model, sequences)
    with spliced(model, {f"resid_post.{i}": sae for i in range(4)}, error_term=True) as run, ExitStack() as stack:
        stack.enter_context(spliced(model, {"resid_pre.1": sae}, error_term=True))
        assert torch.equal(logits(model, sequences), own)
    assert list(run.codes) == [f"resid_post.{i}" for i in range(4)]


def test_under_inference_mode_and_in_float64_and_bfloat16(sae: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, sequences = make_model("llama", dtype=dtype), mixed_sequences("left")
        own = logits(model, sequences)
        with torch.inference_mode(), spliced(model, {SITE: sae.double()}, error_term=True) as run:
            assert torch.equal(logits(model, sequences), own)
        assert run.codes[SITE].value_E.dtype == torch.float64
        feature = int(run.codes[SITE].feature_E[0])
        at = torch.zeros(3, 10, dtype=torch.bool)
        at[0, 8] = True
        with spliced(model, {SITE: sae.float()}, error_term=True, edits=set_to(feature, 50.0, at=at)):
            edited = logits(model, sequences)
        assert torch.equal(edited[0, :8], own[0, :8])  # to the bit: nothing that came before was touched
        assert torch.equal(edited[1:], own[1:])
        assert not torch.equal(edited[0, 8:], own[0, 8:])


def test_the_body_alone_hidden_states_and_embeddings(model: Any, sae: Any) -> None:
    sequences = make_sequences()
    with spliced(model, {SITE: sae}) as run, torch.no_grad():
        whole = model(sequences.ids_ST, output_hidden_states=True)
        codes = run.codes[SITE].to_dense()
        assert torch.allclose(whole.hidden_states[3], sae.decode(run.codes[SITE]), atol=1e-5)
        body = model.model(sequences.ids_ST).last_hidden_state
        assert torch.allclose(model.lm_head(body), whole.logits, atol=1e-5)
        embedded = model(inputs_embeds=model.get_input_embeddings()(sequences.ids_ST)).logits
        assert torch.allclose(embedded, whole.logits, atol=1e-5)
        assert torch.equal(run.codes[SITE].to_dense() != 0, codes != 0)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "offloaded"},
        {"repetition_penalty": 1.3},
    ],
)
def test_other_ways_to_generate_say_what_the_model_says_with_the_error_term(
    model: Any, sae: Any, options: dict[str, Any]
) -> None:
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        options = {"cache_implementation": "static"}
    ids = make_sequences(1, 10).ids_ST if "prompt_lookup_num_tokens" in options else make_sequences().ids_ST
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, **options}

    def said() -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    own = said()
    with spliced(model, {SITE: sae}, error_term=True, keep="history") as run:
        assert torch.equal(said(), own)
    assert sum(step.codes[SITE].shape[1] for step in run.history) >= own.shape[1] - 1
    plain = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    if options.get("do_sample") or "repetition_penalty" in options:
        return
    edits = [ablate([1, 2]), steer(6, 3.0, at=slice(8, None))]
    with spliced(model, {SITE: sae}, error_term=True, edits=edits):
        changed = said()
        assert torch.equal(changed, model.generate(ids, attention_mask=torch.ones_like(ids), **plain))


def test_a_mask_of_another_number_of_sequences_is_told(model: Any, sae: Any) -> None:
    at, before = torch.ones(3, 12, dtype=torch.bool), hooks_of(model)
    with spliced(model, {SITE: sae}, edits=ablate(1, at=at)), pytest.raises(CosaeError, match="6 sequences"):
        model.generate(make_sequences().ids_ST, num_beams=2, max_new_tokens=2, do_sample=False)
    assert hooks_of(model) == before


def test_a_plain_hook_keeps_dtype_and_leaves_masked_tokens(sae: Any) -> None:
    change = hook(sae.float(), error_term=False)
    x = torch.randn(2, 5, D).bfloat16()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    got = change(x, mask_ST=mask, hook="named by TransformerLens")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[~mask], x[~mask])
    assert not torch.equal(got[mask], x[mask])


def test_a_model_compiled_before_is_read_and_replaced_all_the_same(sae: Any) -> None:
    model, sequences = make_model("llama"), make_sequences()
    with spliced(model, {SITE: sae}):
        expected = logits(model, sequences)
    x_ND = capture(model, sequences, "mlp_out.2")["mlp_out.2"].x_ND
    for layer in model.model.layers:
        layer.compile(backend="eager")
    own = logits(model, sequences)
    assert torch.equal(capture(model, sequences, "mlp_out.2")["mlp_out.2"].x_ND, x_ND)
    outer, inner = spliced(model, {SITE: sae}), spliced(model, {"mlp_out.2": identity_sae()})
    outer.__enter__()
    inner.__enter__()
    inner.__exit__()
    assert torch.equal(logits(model, sequences), expected)
    outer.__exit__()
    assert torch.equal(logits(model, sequences), own)


def test_a_plain_hook_in_a_step_of_generation_must_be_told_the_position(sae: Any) -> None:
    x, at = torch.randn(2, 1, D), torch.ones(2, 4, dtype=torch.bool)
    for options in ({"edits": ablate(1, at=[3])}, {"edits": ablate(1, at=at)}, {"tokens": at}):
        change = hook(sae, **options)
        with pytest.raises(CosaeError, match="give position_ST"):
            change(x)
        assert change(x, position_ST=torch.tensor([[3], [3]])).shape == x.shape
        assert change(torch.randn(2, 4, D)).shape == (2, 4, D)
    change = hook(sae, tokens=Filter(FilterPolicy("position_0"), 1.0, 1))
    assert torch.equal(change(x, position_ST=torch.tensor([[0], [5]]))[0], x[0])
    assert not torch.equal(change(x, position_ST=torch.tensor([[0], [5]]))[1], x[1])
    with pytest.raises(CosaeError, match="give position_ST"):
        change(x)
