"""Site names ↔ modules of a Hugging Face model.

In: a causal language model and a name. Out: a `Site`: which module's input or output is meant.

A site has up to three names, all accepted:

    short         TransformerLens style          what it is
    resid_pre.3   blocks.3.hook_resid_pre        input of block 3; resid_pre.0 is the embeddings as block 0
                                                 gets them: Gemma's √d factor, GPT-2's positions are in
    resid_post.3  blocks.3.hook_resid_post       output of block 3, before any final norm
    attn_out.3    blocks.3.hook_attn_out         what block 3's attention adds to the residual stream
    mlp_in.3      blocks.3.mlp.hook_in           what block 3's MLP reads, after its norm
    mlp_out.3     blocks.3.hook_mlp_out          what block 3's MLP adds to the residual stream

and the module path (`model.layers.3`, `transformer.h.3.mlp`, or any other module inside a block), meaning that module's
output. Gemma 2 and 3, OLMo 2 and GLM-4 normalise a sublayer's output once more before adding it: there `attn_out` and
`mlp_out` are taken after that post-norm, as TransformerLens and Gemma Scope do, and the module paths `….self_attn` and
`….mlp` give the vectors before it. Granite's residual multiplier is not included.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

from cosae.errors import CosaeError
from cosae.shown import counted
from cosae.types import Site

KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_in", "mlp_out")
HOOKS = {"mlp_in": "mlp.hook_in"}
"""TransformerLens' names, but for hook_KIND."""
ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
# Norms between a sublayer and the residual stream: the MLP's, the attention's. In Llama
# `post_attention_layernorm` is the MLP's input norm, so that name counts only beside one of the MLP's.
POST_NORMS = {
    "post_feedforward_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_self_attn_layernorm",
}


def resolve_site(model: nn.Module, site: str | Site) -> Site:
    """The `Site` of a short name, a TransformerLens style name or a module path.

    Raises `CosaeError` for a model without recognisable blocks, a name that is none of the three, or a block
    or module the model does not have; the sentence lists what there is.
    """
    if isinstance(site, Site):
        return site
    blocks_path, n_blocks = find_blocks(model)
    kinds = "|".join(KINDS)
    short = re.fullmatch(rf"(?P<kind>{kinds})\.(?P<block>\d+)", site)
    if found := short or re.fullmatch(rf"blocks\.(?P<block>\d+)\.hook_(?P<kind>{kinds})", site):
        return _named_site(model, found["kind"], int(found["block"]), blocks_path, n_blocks, site)
    for kind, hook in HOOKS.items():
        if found := re.fullmatch(rf"blocks\.(\d+)\.{re.escape(hook)}", site):
            return _named_site(model, kind, int(found[1]), blocks_path, n_blocks, site)
    return _path_site(model, site, blocks_path, n_blocks)


def find_blocks(model: nn.Module) -> tuple[str, int]:
    """Path of the list of decoder blocks and how many there are.

    It is the outermost `ModuleList` whose length is the configuration's `num_hidden_layers`; lists inside
    vision, audio or encoder towers do not count. Raises `CosaeError` where there is none.
    """
    n_blocks = getattr(text_config(model), "num_hidden_layers", None)
    modules = model.named_modules()
    lists = [path for path, module in modules if isinstance(module, nn.ModuleList) and len(module) == n_blocks]
    found = [path for path in lists if not any(word in path for word in ("vision", "visual", "audio", "encoder"))]
    inside = [path for path in lists if "encoder" in path]
    if not found and len(inside) == 1:
        raise CosaeError(
            f"{type(model).__name__} is an encoder with a language-modelling head (its blocks are {inside[0]}), not a "
            "decoder-only transformer; use one of those."
        )
    if not n_blocks or not found:
        wanted = counted(n_blocks, "block") if n_blocks else "decoder blocks"
        raise CosaeError(
            f"{type(model).__name__} has no list of {wanted} to read from; "
            "use a decoder-only transformer from Hugging Face transformers."
        )
    return min(found, key=lambda path: path.count(".")), int(n_blocks)


def holder_of_blocks(model: nn.Module) -> nn.Module:
    """The module that runs the list of decoder blocks. Raises CosaeError as `find_blocks` does."""
    path, _ = find_blocks(model)
    return model.get_submodule(path.rpartition(".")[0])


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's language part; None where the model has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _named_site(model: nn.Module, kind: str, block: int, blocks_path: str, n_blocks: int, asked: str) -> Site:
    _check_block(model, block, n_blocks, asked)
    path = f"{blocks_path}.{block}"
    child = None
    if kind in ("attn_out", "mlp_in", "mlp_out"):
        child = _sublayer(model.get_submodule(path), kind)
        if child is None:
            available = sorted(name for name, _ in model.get_submodule(path).named_children())
            does = "reads what its mlp reads" if kind == "mlp_in" else f"returns what its {kind.split('_')[0]} adds"
            raise CosaeError(
                f"Site '{asked}' is unknown: no module in block {block} of {type(model).__name__} {does}; use resid_pre.{block}, resid_post.{block} or a module "
                f"of the block ({path}. + {', '.join(available)})."
            )
        path = f"{path}.{child}"
    call, calls = _runs(model, blocks_path, block, child)
    return Site(
        name=f"{kind}.{block}",
        hook_name=f"blocks.{block}.{HOOKS.get(kind, f'hook_{kind}')}",
        module_path=path,
        block=block,
        reads="input" if kind in ("resid_pre", "mlp_in") else "output",
        call=call,
        calls=calls,
    )


def _check_block(model: nn.Module, block: int, n_blocks: int, asked: str) -> None:
    if block >= n_blocks:
        known = "one block, number 0" if n_blocks == 1 else f"{n_blocks} blocks, 0 to {n_blocks - 1}"
        raise CosaeError(f"Site '{asked}' is out of range: {type(model).__name__} has {known}.")


def _path_site(model: nn.Module, path: str, blocks_path: str, n_blocks: int) -> Site:
    path = _whole_path(path, blocks_path)
    inside = re.fullmatch(rf"{re.escape(blocks_path)}\.(\d+)(?:\.(.+))?", path)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if inside is None or (int(inside[1]) < n_blocks and path not in modules):
        children = [name for name, _ in model.get_submodule(f"{blocks_path}.0").named_children()]
        example = ".".join([blocks_path, "0", *children[-1:]])
        raise CosaeError(
            f"Site '{path}' is unknown: {type(model).__name__} has {', '.join(f'{kind}.N' for kind in KINDS)} for N = "
            f"0 to {n_blocks - 1}, and any module under {blocks_path}.N, such as {example}."
        )
    block = int(inside[1])
    if inside[2] is None:
        return _named_site(model, "resid_post", block, blocks_path, n_blocks, path)
    _check_block(model, block, n_blocks, path)
    for kind in ("attn_out", "mlp_out"):
        if _sublayer(model.get_submodule(f"{blocks_path}.{block}"), kind) == inside[2]:
            return _named_site(model, kind, block, blocks_path, n_blocks, path)
    call, calls = _runs(model, blocks_path, block, inside[2])
    return Site(name=path, hook_name=path, module_path=path, block=block, call=call, calls=calls)


def _whole_path(path: str, blocks_path: str) -> str:
    """The path from the model on of one that leaves out its beginning or adds to it: layers.3 is model.layers.3."""
    names = blocks_path.split(".")
    found = re.match(rf"((?:\w+\.)*?){re.escape(names[-1])}\.(\d+(?:\..+)?)$", path)
    if found is None or not {*found[1].split(".")[:-1]} <= {*names, "model"}:
        return path
    return f"{blocks_path}.{found[2]}"


def _runs(model: nn.Module, blocks_path: str, block: int, inside: str | None) -> tuple[int, int]:
    """`call` and `calls` of a Site: blocks may be one module several times, or share some of theirs."""
    modules = dict(model.named_modules(remove_duplicate=False))
    end = f".{inside}" if inside else ""
    own = modules[f"{blocks_path}.{block}{end}"]
    n_blocks = sum(1 for name in modules if re.fullmatch(rf"{re.escape(blocks_path)}\.\d+", name))
    same = [modules.get(f"{blocks_path}.{i}{end}") is own for i in range(n_blocks)]
    return sum(same[:block]), sum(same)


def _sublayer(block: nn.Module, kind: str) -> str | None:
    """Name of the child whose output is what the attention or MLP adds to the residual stream, or whose input is what
    the MLP reads, if any."""
    children = dict(block.named_children())
    if kind == "mlp_in":
        return next((name for name in MLP_NAMES if name in children), None)
    for mlp_norm, attention_norm in POST_NORMS.items():
        if mlp_norm in children:
            # AFMoE pairs the MLP norm's name of one family with the attention norm's of the other.
            norms = (mlp_norm,) if kind == "mlp_out" else (attention_norm, "post_attention_layernorm")
            return next((name for name in norms if name in children), None)
    names = ATTENTION_NAMES if kind == "attn_out" else MLP_NAMES
    name = next((name for name in names if name in children), None)
    # BLOOM's sublayers are handed the residual and return the sum, not what they add.
    if name is None or "residual" in inspect.signature(children[name].forward).parameters:
        return None
    return name
