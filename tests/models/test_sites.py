from __future__ import annotations

import pytest
import torch
from torch import nn

from cosae.errors import CosaeError
from cosae.models.sites import find_blocks, resolve_site
from cosae.types import Site
from tests.support.tiny_models import BLOCK_PATHS, BLOCKS, make_model

SUBLAYERS = {
    "llama": ("self_attn", "mlp"),
    "qwen3": ("self_attn", "mlp"),
    "mistral": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


@pytest.mark.parametrize("family", BLOCK_PATHS)
def test_short_lens_and_path_names_mean_the_same_site(family: str) -> None:
    model = make_model(family)
    block = f"{BLOCK_PATHS[family]}.3"
    attention, mlp = SUBLAYERS[family]
    for kind, path in (
        ("resid_post", block),
        ("attn_out", f"{block}.{attention}"),
        ("mlp_out", f"{block}.{mlp}"),
    ):
        expected = Site(f"{kind}.3", f"blocks.3.hook_{kind}", path, 3, "output")
        assert resolve_site(model, f"{kind}.3") == expected
        assert resolve_site(model, f"blocks.3.hook_{kind}") == expected
        assert resolve_site(model, path) == expected
        assert resolve_site(model, expected) is expected
    path = f"{block}.mlp"
    read = Site("mlp_in.3", "blocks.3.mlp.hook_in", path, 3, "input")
    assert resolve_site(model, "mlp_in.3") == resolve_site(model, "blocks.3.mlp.hook_in") == read
    before = Site("resid_pre.3", "blocks.3.hook_resid_pre", block, 3, "input")
    assert resolve_site(model, "resid_pre.3") == resolve_site(model, "blocks.3.hook_resid_pre") == before
    assert resolve_site(model, f"{BLOCK_PATHS[family]}.3") != before


def test_a_body_without_its_head_has_the_same_short_names() -> None:
    site = resolve_site(make_model("llama").model, "resid_post.1")
    assert (site.name, site.module_path) == ("resid_post.1", "layers.1")


def test_paths_inside_a_block_keep_their_path_as_name() -> None:
    site = resolve_site(make_model("gemma2"), "model.layers.2.mlp")  # before the post-norm: not mlp_out
    assert site == Site("model.layers.2.mlp", "model.layers.2.mlp", "model.layers.2.mlp", 2)


@pytest.mark.parametrize(
    "name",
    [
        *("resid_mid.1", "resid_post", "resid_post.-1", "blocks.1.hook_resid_mid", "", "x"),
        *("model.layers.1.nothing", "model.layers", "model.layers.1.", "model.nothing", "head"),
    ],
)
def test_unknown_sites_list_what_there_is(name: str) -> None:
    with pytest.raises(CosaeError, match=r"resid_pre.N.* N = 0 to 3.*model\.layers"):
        resolve_site(make_model("llama"), name)


@pytest.mark.parametrize(
    "name",
    ["resid_post.4", "blocks.4.hook_mlp_out", "model.layers.4", "model.layers.99.mlp", "resid_pre.10"],
)
def test_blocks_out_of_range_name_the_range(name: str) -> None:
    with pytest.raises(CosaeError, match=r"out of range.* 0 to 3"):
        resolve_site(make_model("llama"), name)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(CosaeError, match="Linear has no list of blocks"):
        resolve_site(nn.Linear(2, 2), "resid_post.0")


class Plain(nn.Module):
    """A decoder of no known family, with other lists of the same length: experts and a vision tower."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": BLOCKS})()
        self.vision_tower = nn.ModuleList(nn.Linear(2, 2) for _ in range(BLOCKS))
        self.stack = nn.Module()
        self.stack.steps = nn.ModuleList(block for _ in range(BLOCKS))


def test_blocks_of_unknown_families_are_found_by_their_number() -> None:
    block = nn.Module()
    block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(BLOCKS))
    assert find_blocks(Plain(block)) == ("stack.steps", BLOCKS)


def test_sublayers_that_return_the_sum_are_not_offered() -> None:
    class Summing(nn.Module):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return x + residual

    block = nn.Module()
    block.mlp = Summing()
    model = Plain(block)
    with pytest.raises(CosaeError, match=r"'mlp_out.1' .*no module"):
        resolve_site(model, "mlp_out.1")
    assert resolve_site(model, "stack.steps.1.mlp").name == "stack.steps.1.mlp"
