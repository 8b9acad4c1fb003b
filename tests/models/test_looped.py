"""Modules that run several times in one forward pass: the right run, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.models.intervene.edits import steer
from cosae.models.intervene.splice import spliced
from cosae.models.sites import resolve_site
from tests.support.tiny import D, first_of, identity_sae, make_model, make_sae, make_sequences

transformers = pytest.importorskip("transformers")


def shared(order: list[int], family: str = "llama") -> Any:
    """A model whose list of blocks holds some of them several times."""
    model = make_model(family)
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[i] for i in order])
    return model


def runs_of(model: Any, module: nn.Module, sequences: Any) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(first_of(out).clone()))
    with torch.no_grad():
        model(sequences.ids_ST, use_cache=False)
    handle.remove()
    return seen


@pytest.mark.parametrize(("order", "runs"), [([0, 0, 0, 0], [0, 1, 2, 3]), ([0, 1, 0, 1], [0, 0, 1, 1])])
def test_a_name_of_a_shared_block_means_its_own_run(order: list[int], runs: list[int]) -> None:
    model, sequences = shared(order), make_sequences()
    names = [f"{kind}.{block}" for kind in ("resid_pre", "resid_post", "mlp_out") for block in range(4)]
    together = capture(model, sequences, names)
    for block, run in enumerate(runs):
        module = model.model.layers[block]
        of_block = runs_of(model, module, sequences)
        for name, expected in (
            (f"resid_post.{block}", of_block[run]),
            (f"mlp_out.{block}", runs_of(model, module.mlp, sequences)[run]),
            (f"model.layers.{block}.mlp", runs_of(model, module.mlp, sequences)[run]),
        ):
            assert torch.equal(capture(model, sequences, name)[name].x_ND, expected.reshape(-1, D)), name
            if name in together:
                assert torch.equal(together[name].x_ND, expected.reshape(-1, D)), name
        if block:
            assert torch.equal(together[f"resid_pre.{block}"].x_ND, together[f"resid_post.{block - 1}"].x_ND)


@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_splice_acts_on_the_named_run_only(block: int) -> None:
    model, sequences = shared([0, 0, 0, 0]), make_sequences()
    own = runs_of(model, model.model.layers[0], sequences)
    sae = make_sae(model, f"resid_post.{block}")
    with spliced(model, {f"resid_post.{block}": sae}) as run:
        own_after: list[torch.Tensor] = []
        handle = model.model.layers[0].register_forward_hook(lambda _m, _a, o: own_after.append(first_of(o)))
        model(sequences.ids_ST, use_cache=False)
        handle.remove()
    assert [torch.equal(a, b) for a, b in zip(own, own_after, strict=True)] == [i < block for i in range(4)]
    assert torch.allclose(own_after[block], sae(own[block]), atol=1e-5)
    assert run.codes[f"resid_post.{block}"].shape == (3, 12)
    both = {"resid_post.0": identity_sae(), "resid_post.3": identity_sae()}
    with spliced(model, both, edits={"resid_post.3": [steer(1, 3.0)]}):
        model(sequences.ids_ST)
    with pytest.raises(CosaeError, match="same place"):
        spliced(model, {"resid_post.3": sae, "model.layers.3": sae})


class Twice(nn.Module):
    """A body whose block runs once more than its list says."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = first_of(self.block(*args, **kwargs))
        return self.block(first, *args[1:], **kwargs)


def looped_llama() -> Any:
    model = make_model("llama")
    model.model.layers[1] = Twice(model.model.layers[1])
    return model, "model.layers.1.block", ("resid_post.0", "resid_post.1", "resid_post.3", "mlp_out.2")


def looped_shared() -> Any:
    model = shared([0, 0, 2, 3])
    model.model.layers[2] = Twice(model.model.layers[0])  # two by the list, and two more
    return model, "resid_post.1", ("resid_post.2", "resid_post.3")


def looped_inkling() -> Any:
    """Blocks 2 and 3 run three times, all others once."""
    config = pytest.importorskip("transformers.models.inkling2_loop.configuration_inkling2_loop")
    sizes = {"vocab_size": 97, "unpadded_vocab_size": 97, "hidden_size": D, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_rel": 4, "rel_extent": 16}
    windows = {f"swa_{name}": heads[name] for name in list(heads)[:3]} | {"sliding_window_size": 16}
    loops = {"loop_layer_index_start": 2, "loop_layer_index_end": 4, "loop_num_passes": 3, "loop_gate_rank": 4}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "n_layers_per_attn_res_block": 2}
    made = config.Inkling2LoopTextConfig(**sizes, **heads, **windows, **loops, **experts, **ids)
    torch.manual_seed(0)
    model = transformers.Inkling2LoopForCausalLM(made).eval().requires_grad_(False)
    return model, "model.layers.2", ("model.layers.0", "model.layers.5")


@pytest.mark.parametrize("make", [looped_llama, looped_shared, looped_inkling])
def test_a_site_in_a_loop_is_refused_and_others_are_read(make: Callable[[], Any]) -> None:
    model, inside, outside = make()
    sequences = make_sequences()
    for _ in range(2):  # the first pass is watched to its end, later ones are cut short
        with pytest.raises(CosaeError, match="ambiguous"):
            capture(model, sequences, inside)
        with pytest.raises(CosaeError, match="ambiguous"):
            capture(model, sequences, [outside[0], inside])
    for site in outside:
        capture(model, sequences, site)
    if "inkling" in make.__name__:  # its blocks return more than a vector
        return
    with spliced(model, {inside: identity_sae()}), pytest.raises(CosaeError, match="ambiguous"):
        model(sequences.ids_ST)
    with spliced(model, {outside[-1]: identity_sae()}, error_term=True):
        model(sequences.ids_ST)


@pytest.mark.parametrize(
    ("family", "given", "path"),
    [
        ("llama", "layers.3.mlp", "model.layers.3.mlp"),
        ("llama", "layers.3", "model.layers.3"),
        ("llama", "layers.2.mlp.up_proj", "model.layers.2.mlp.up_proj"),
        ("llama", "model.model.layers.1", "model.layers.1"),
        ("gpt2", "h.3.mlp", "transformer.h.3.mlp"),
        ("gpt_neox", "layers.0.attention", "gpt_neox.layers.0.attention"),
    ],
)
def test_a_path_may_leave_out_its_beginning(family: str, given: str, path: str) -> None:
    model = make_model(family)
    assert resolve_site(model, given) == resolve_site(model, path)
    assert resolve_site(model, path).module_path == path


def test_a_path_of_the_whole_model_means_the_same_in_its_body_and_other_beginnings_are_unknown() -> None:
    model = make_model("llama")
    assert resolve_site(model.model, "model.layers.3.mlp").module_path == "layers.3.mlp"
    for name in ("vision.layers.3", "layers.9.mlp", "layers.3.nothing", "slayers.3"):
        with pytest.raises(CosaeError, match=r"unknown|out of range"):
            resolve_site(model, name)
