"""Each family of networks: what is captured is what the model itself says of its blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.models.intervene.splice import spliced
from cosae.models.parts import find_parts
from cosae.models.sites import resolve_site
from cosae.types import Sequences, Site
from tests.support.tiny import first_of, identity_sae, make_sequences
from tests.support.tiny_families import FAMILIES, LAYERS, WIDTH, Family, family_inputs, make_family

pytest.importorskip("transformers")
made = cache(make_family)
READING = [name for name, family in FAMILIES.items() if family.reads == "text"]


def arguments(family: Family, given: Sequences) -> dict[str, Tensor]:
    """What a person would call the model with."""
    if given.inputs is not None:
        return dict(given.inputs)
    pair = {"decoder_input_ids": given.ids_ST} if family.stack == "decoder." else {}
    return {"input_ids": given.ids_ST, **pair}


def call(name: str, given: Sequences, **options: Any) -> Any:
    family, model = FAMILIES[name], made(name)
    with torch.no_grad():
        return model.get_submodule(family.own)(**arguments(family, given), **options)


def runs_of(name: str, site: Site, given: Sequences) -> list[Tensor]:
    """What goes into, or comes out of, a site's module, run by run."""
    seen: list[Tensor] = []
    module = made(name).get_submodule(site.module_path)
    if site.reads == "input":
        hook = module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0].clone()), with_kwargs=True
        )
    else:
        hook = module.register_forward_hook(lambda _m, _a, output: seen.append(first_of(output).clone()))
    call(name, given)
    hook.remove()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_captured_as_the_model_itself_gives_them(name: str) -> None:
    family, model, given = FAMILIES[name], made(name), family_inputs(name)
    found = call(name, given, output_hidden_states=True)
    own = found.decoder_hidden_states if family.stack == "decoder." else found.hidden_states
    if name == "mamba":  # whose list begins after the first block and ends with the normalised stream
        start = capture(model, given, "resid_pre.0")["resid_pre.0"].x_ND.reshape(own[0].shape)
        assert torch.equal(start, model.backbone.embeddings(given.ids_ST))
        own = (start, *own[:-1])
    n_blocks = len(own) - 1
    assert n_blocks == LAYERS
    sites = [f"{family.stack}resid_pre.{i}" for i in range(n_blocks)]
    sites += [f"{family.stack}resid_post.{i}" for i in range(n_blocks - 1)]
    captured = capture(model, given, sites)
    for block in range(n_blocks):
        assert torch.equal(captured[f"{family.stack}resid_pre.{block}"].x_ND, own[block].reshape(-1, WIDTH)), block
        if block:
            after = captured[f"{family.stack}resid_post.{block - 1}"]
            assert torch.equal(after.x_ND, own[block].reshape(-1, WIDTH))
    n_places = given.mask_ST.shape[1]
    assert after.position_N.tolist() == [*range(n_places)] * len(given)
    assert after.doc_N.tolist() == torch.arange(len(given)).repeat_interleave(n_places).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_sublayers_and_paths_equal_a_hook_by_hand(name: str) -> None:
    family, model, given = FAMILIES[name], made(name), family_inputs(name, 1)
    part = next(part for part in find_parts(model) if part.start == family.stack)
    if name == "mamba":
        with pytest.raises(CosaeError, match="mixer"):
            resolve_site(model, "mlp_out.1")
        sites = ["resid_pre.1", f"{part.path}.1.mixer", "resid_post.1"]
    else:
        sites = [f"{family.stack}{kind}.1" for kind in ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")]
    captured = {site: rows.x_ND for site, rows in capture(model, given, sites).items()}
    for asked in sites:
        site = resolve_site(model, asked)
        seen = runs_of(name, site, given)
        assert torch.equal(captured[asked], seen[site.call].reshape(len(captured[asked]), -1)), asked
        end = {"input": ":input", "output": ""}[site.reads]
        run = f"#{site.call}" if site.calls > 1 else ""
        path = f"{site.module_path}{run}{end}"
        assert torch.equal(capture(model, given, path)[path].x_ND, captured[asked])
        assert site.is_named(f"{site.module_path}{end}")
    if family.adds:
        before, attention, _, mlp, after = captured.values()
        torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_of_padded_texts_are_those_of_each_alone(name: str, padding: str) -> None:
    model, site = made(name), f"{FAMILIES[name].stack}resid_post.1"
    given = make_sequences(n_positions=10, lengths=[10, 6, 8], padding=padding)
    together = capture(model, given, site)[site]
    for row, length in enumerate([10, 6, 8]):
        alone = capture(model, make_sequences(n_positions=length, lengths=[length]), site)
        ids = given.ids_ST[row][given.mask_ST[row]]
        one = Sequences(**{f: getattr(given, f)[row][given.mask_ST[row]][None] for f in Sequences.PLACES})
        alone = capture(model, one, site)[site]
        torch.testing.assert_close(together[together.doc_N == row].x_ND, alone.x_ND, rtol=2e-5, atol=2e-5)
        assert torch.equal(alone.token_N.long(), ids)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mamba"])
def test_a_splice_that_changes_nothing_changes_nothing(name: str) -> None:
    family, model, given = FAMILIES[name], made(name), family_inputs(name, 2)
    site = f"{family.stack}resid_post.1"
    plain = call(name, given)[0]
    with spliced(model, {site: identity_sae(WIDTH)}, error_term=True) as run:
        assert torch.equal(call(name, given)[0], plain)
        assert run.codes[site].shape == tuple(given.mask_ST.shape)
    with spliced(model, {site: identity_sae(WIDTH)}):
        torch.testing.assert_close(call(name, given)[0], plain, rtol=1e-4, atol=1e-4)


def test_the_input_of_a_heads_output_layer_is_the_heads_side_by_side() -> None:
    model, given = made("gemma2"), make_sequences()
    path = "model.layers.1.self_attn.o_proj"
    found = capture(model, given, [f"{path}:input", path])
    weight = model.get_submodule(path).weight
    torch.testing.assert_close(found[f"{path}:input"].x_ND @ weight.T, found[path].x_ND)


def test_modules_outside_of_blocks_are_sites_too() -> None:
    model, given = made("vit"), family_inputs("vit")
    found = capture(model, given, ["embeddings", "layernorm", "layernorm:input"])
    last = call("vit", given).last_hidden_state
    assert torch.equal(found["layernorm"].x_ND, last.reshape(-1, WIDTH))
    assert resolve_site(model, "embeddings").block == -1
    assert torch.equal(found["embeddings"].x_ND, capture(model, given, "resid_pre.0")["resid_pre.0"].x_ND)


@pytest.mark.parametrize(
    ("name", "site", "match"),
    [
        ("clip text", "resid_post.1", "several stacks .*text.resid_post.N .*vision.resid_post.N"),
        ("t5 encoder", "mlp_out.1", "several stacks .*encoder.resid_post.N .*decoder.resid_post.N"),
        ("clip text", "audio.resid_post.1", "these stacks of blocks: text, vision"),
        ("albert", "encoder.albert_layer_groups.0", "ambiguous.*name the run"),
        ("albert", "encoder.albert_layer_groups.0#3", "out of range.* runs 3 times"),
        ("bert", "resid_post.1#x", "a run of a module must be a number"),
        ("whisper", "decoder.resid_post.1", "decoder.* reads text. Got audio"),
        ("clip vision", "text.resid_post.1", "text_model.* reads text. Got images"),
    ],
)
def test_what_cannot_be_read_says_why(name: str, site: str, match: str) -> None:
    with pytest.raises(CosaeError, match=match):
        capture(made(name), family_inputs(name), site)
