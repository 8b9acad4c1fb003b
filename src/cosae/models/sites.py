"""Site names ↔ modules of a Hugging Face model.

In: a model and a name. Out: a `Site`: which module's input or output is meant, and in which of its runs.

A site inside a block has up to three names, all accepted:

    short         TransformerLens style          what it is
    resid_pre.3   blocks.3.hook_resid_pre        input of block 3; resid_pre.0 is the embeddings as block 0
                                                 gets them: Gemma's √d factor, GPT-2's positions are in
    resid_post.3  blocks.3.hook_resid_post       output of block 3, before any final norm
    attn_out.3    blocks.3.hook_attn_out         what block 3's attention adds to the residual stream
    mlp_in.3      blocks.3.mlp.hook_in           what block 3's MLP reads, after its norm
    mlp_out.3     blocks.3.hook_mlp_out          what block 3's MLP adds to the residual stream

and the module path (`model.layers.3`, `transformer.h.3.mlp`, or any other module of the model), meaning that module's
output; `PATH:input` is what goes into it, the heads of an attention side by side. A module that runs several times in a
forward pass needs its run named, from 0: `PATH#2`, `PATH#2:input`. Where a model has several stacks of blocks
(`cosae.models.parts`) short names begin with the stack's: `vision.resid_post.3`, `encoder.blocks.3.hook_resid_post`.

`A+B+C` joins the vectors of several sites, one behind the other, for a crosscoder.

Gemma 2 and 3, OLMo 2 and GLM-4 normalise a sublayer's output once more before adding it, and DINO scales it: there
`attn_out` and `mlp_out` are taken after that, as TransformerLens and Gemma Scope do, and the module paths `….self_attn`
and `….mlp` give the vectors before it. In models that normalise after adding (BERT) `resid_post` is normalised, the
sublayers' outputs are not. Granite's residual multiplier is not included.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import Literal

from torch import nn

from cosae.errors import CosaeError
from cosae.models.parts import Part, find_parts, main_part
from cosae.types import Site, split_site

KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_in", "mlp_out")
HOOKS = {"mlp_in": "mlp.hook_in"}
"""TransformerLens' names, but for hook_KIND."""
ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
# What stands between a sublayer and the residual stream: the MLP's, the attention's. In Llama
# `post_attention_layernorm` is the MLP's input norm, so that name counts only beside one of the MLP's.
AFTER = {
    "post_feedforward_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_self_attn_layernorm",
    "layer_scale2": "layer_scale1",
}
# Where families keep a sublayer that goes by none of the names above, or that returns the sum: its last, first layer
LAYERS = {
    "attn_out": ("attention.output.dense", "layer.0.SelfAttention"),
    "mlp_in": ("intermediate", "fc1", "layer.2.DenseReluDense", "layer.1.DenseReluDense"),
    "mlp_out": ("output.dense", "fc2", "layer.2.DenseReluDense", "layer.1.DenseReluDense"),
}
ALBERT = {"attn_out": "attention.dense", "mlp_in": "ffn", "mlp_out": "ffn_output"}
Reads = Literal["input", "output"]
_SHORT = re.compile(rf"(?:(?P<part>\w+)\.)??(?P<kind>{'|'.join(KINDS)})\.(?P<block>\d+)")
_HOOK = re.compile(r"(?:(?P<part>\w+)\.)??blocks\.(?P<block>\d+)\.(?P<hook>[\w.]+)")


def resolve_site(model: nn.Module, site: str | Site) -> Site:
    """The `Site` of a short name, a TransformerLens style name or a module path.

    Raises `CosaeError` for a name that is none of the three, a short name in a model without recognisable blocks, and a
    block or module the model does not have; the sentence lists what there is.
    """
    if isinstance(site, Site):
        return site
    if "+" in site:
        places = [resolve_site(model, one) for one in site.split("+")]
        if len(set(places)) < len(places):
            raise CosaeError(f"each of the joined sites may be named once. Got '{site}' instead.")
        names, hooks = ("+".join(getattr(one, key) for one in places) for key in ("name", "hook_name"))
        return replace(places[0], name=names, hook_name=hooks, joined=tuple(places[1:]))
    name, run, reads = split_site(site)
    short, hook = _SHORT.fullmatch(name), _HOOK.fullmatch(name)
    kind = short["kind"] if short else hook and _kind_of(hook["hook"])
    if kind and (found := short or hook):
        place = _in_block(model, _part(model, found["part"], site), kind, int(found["block"]), site)
        if reads != place.reads and reads == "input":
            place = replace(place, name=site, hook_name=site, reads=reads)
    else:
        place = _at_path(model, name, reads, run)
    return place if run is None else _in_run(place, run)


def find_blocks(model: nn.Module) -> tuple[str, int]:
    """Path of the list of blocks that short names mean, and how many there are. Raises CosaeError where there are
    none, or several stacks of them."""
    part = main_part(model)
    return part.path, part.n_blocks


def _kind_of(hook: str) -> str | None:
    return next((kind for kind in KINDS if hook == HOOKS.get(kind, f"hook_{kind}")), None)


def _part(model: nn.Module, name: str | None, asked: str) -> Part:
    """The stack of blocks that a short name begins with. Raises CosaeError for one the model does not have."""
    if name is None:
        return main_part(model)
    parts = find_parts(model)
    for part in parts:
        if part.name == name:
            return part
    listed = ", ".join(part.name for part in parts) or "none"
    raise CosaeError(f"Site '{asked}' is unknown: {type(model).__name__} has these stacks of blocks: {listed}.")


def _in_block(model: nn.Module, part: Part, kind: str, block: int, asked: str) -> Site:
    _check_block(model, part, block, asked)
    own = _own_place(model, part, block)
    path = f"{part.path}.{own}"
    child = None
    if kind not in ("resid_pre", "resid_post"):
        child = _sublayer(model.get_submodule(path), kind)
        if child is None:
            available = sorted(name for name, _ in model.get_submodule(path).named_children())
            does = "reads what its mlp reads" if kind == "mlp_in" else f"returns what its {kind.split('_')[0]} adds"
            raise CosaeError(
                f"Site '{asked}' is unknown: no module in block {block} of {type(model).__name__} {does}; use "
                f"{part.start}resid_pre.{block}, {part.start}resid_post.{block} or a module of the block ({path}. + "
                f"{', '.join(available)})."
            )
        path = f"{path}.{child}"
    call, calls = _runs(model, part, block, child)
    return Site(
        name=f"{part.start}{kind}.{block}",
        hook_name=f"{part.start}blocks.{block}.{HOOKS.get(kind, f'hook_{kind}')}",
        module_path=path,
        block=block,
        reads="input" if kind in ("resid_pre", "mlp_in") else "output",
        call=call,
        calls=calls,
    )


def _check_block(model: nn.Module, part: Part, block: int, asked: str) -> None:
    if block >= (n := part.n_blocks):
        known = "one block, number 0" if n == 1 else f"{n} blocks, 0 to {n - 1}"
        raise CosaeError(f"Site '{asked}' is out of range: {type(model).__name__} has {known}.")


def _at_path(model: nn.Module, path: str, reads: Reads, run: int | None) -> Site:
    """The site of a module path: a short one where it has a short name."""
    parts = find_parts(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for part in parts:
        whole = _whole_path(path, part.path)
        inside = re.fullmatch(rf"{re.escape(part.path)}\.(\d+)(?:\.(.+))?", whole)
        if inside is None or (int(inside[1]) < part.n_blocks and whole not in modules):
            continue
        block, child = int(inside[1]), inside[2]
        _check_block(model, part, block, path)
        if part.n_blocks != _length(modules[part.path]):  # a place of the list is several blocks
            return _plain(whole, block, reads)
        if child is None:
            return _in_block(model, part, "resid_post" if reads == "output" else "resid_pre", block, path)
        for kind in ("attn_out", "mlp_out") if reads == "output" else ("mlp_in",):
            if _sublayer(modules[f"{part.path}.{block}"], kind) == child:
                return _in_block(model, part, kind, block, path)
        call, calls = _runs(model, part, block, child)
        return replace(_plain(whole, block, reads), call=call, calls=calls)
    there = path if path in modules else path.removeprefix("model.")
    found = modules.get(there) if there else None
    if run is not None and isinstance(found, nn.ModuleList) and len({*found}) == 1:
        return _plain(f"{there}.0", -1, reads)  # one block, several times
    if found is None or isinstance(found, nn.ModuleList | nn.ModuleDict):
        raise CosaeError(f"Site '{path}' is unknown: {_what_there_is(model, parts)}.")
    return _plain(there, -1, reads)


def _plain(path: str, block: int, reads: Reads) -> Site:
    name = path if reads == "output" else f"{path}:input"
    return Site(name, name, path, block, reads)


def _what_there_is(model: nn.Module, parts: list[Part]) -> str:
    if not parts:
        some = ", ".join(name for name, _ in [*model.named_children()][:4])
        return f"{type(model).__name__} has no blocks with short names; name a module by its path ({some} …)"
    listed = []
    for part in parts:
        kinds = ", ".join(f"{part.start}{kind}.N" for kind in KINDS)
        listed.append(f"{kinds} for N = 0 to {part.n_blocks - 1}")
    children = [name for name, _ in model.get_submodule(f"{parts[0].path}.0").named_children()]
    example = ".".join([parts[0].path, "0", *children[-1:]])
    return f"{type(model).__name__} has {'; '.join(listed)}; and any module by its path, such as {example}"


def _in_run(place: Site, run: int) -> Site:
    """One run of a module, by its number. What else runs of it there are is not asked."""
    name = f"{place.module_path}#{run}{':input' if place.reads == 'input' else ''}"
    return replace(place, name=name, hook_name=name, call=run, calls=0)


def _whole_path(path: str, blocks_path: str) -> str:
    """The path from the model on of one that leaves out its beginning or adds to it: layers.3 is model.layers.3."""
    names = blocks_path.split(".")
    found = re.match(rf"((?:\w+\.)*?){re.escape(names[-1])}\.(\d+(?:\..+)?)$", path)
    if found is None or not {*found[1].split(".")[:-1]} <= {*names, "model"}:
        return path
    return f"{blocks_path}.{found[2]}"


def _own_place(model: nn.Module, part: Part, block: int) -> int:
    """Where in the list a block is: ALBERT's groups are several blocks each."""
    return block * _length(model.get_submodule(part.path)) // part.n_blocks


def _length(module: nn.Module) -> int:
    return len(module) if isinstance(module, nn.ModuleList) else 0


def _runs(model: nn.Module, part: Part, block: int, inside: str | None) -> tuple[int, int]:
    """`call` and `calls` of a Site: blocks may be one module several times, or share some of theirs."""
    modules = dict(model.named_modules(remove_duplicate=False))
    end = f".{inside}" if inside else ""
    blocks = [modules.get(f"{part.path}.{_own_place(model, part, i)}{end}") for i in range(part.n_blocks)]
    same = [module is blocks[block] for module in blocks]
    return sum(same[:block]), sum(same)


def _sublayer(block: nn.Module, kind: str) -> str | None:
    """The module inside a block whose output is what the attention or MLP adds to the residual stream, or whose input
    is what the MLP reads, if any."""
    children, modules = dict(block.named_children()), dict(block.named_modules())
    if kind != "mlp_in":
        for of_mlp, of_attention in AFTER.items():
            if of_mlp in children:
                # AFMoE pairs the MLP norm's name of one family with the attention norm's of the other.
                norms = (of_mlp,) if kind == "mlp_out" else (of_attention, "post_attention_layernorm")
                return next((name for name in norms if name in children), None)
    if "albert_layers" in children:
        only = _length(children["albert_layers"]) == 1
        return f"albert_layers.0.{ALBERT[kind]}" if only else None
    names = ATTENTION_NAMES if kind == "attn_out" else MLP_NAMES
    name: str | None = next((path for path in (*LAYERS[kind], *names) if path in modules), None)
    # BLOOM's sublayers are handed the residual and return the sum, not what they add.
    if name is None or (kind != "mlp_in" and "residual" in inspect.signature(modules[name].forward).parameters):
        return None
    return name
