"""What a feature's decoder direction says to the vocabulary, and how tokens are spelled for readers.

    logits_f = (direction of f in the residual stream) · W_Uᵀ

The plain unembedding, without the final norm's gain: what the direction adds to the logits up to the norm's scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cosae.types import Site

OUT_OF_RANGE = "<|outofrange|>"
"""Spelling of embedding rows that stand for no token: SAEDashboard's."""
ON_STREAM = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def residual_directions(model: nn.Module, site: Site, rows_FD: Tensor) -> Tensor | None:
    """(F, d_model) fp32 directions in the residual stream of decoder rows (F, d_in).

    At sites on the stream the rows themselves; at the input of a linear layer that writes to the stream (attention's
    or the MLP's last one) through its weights; None elsewhere.
    """
    rows_FD = rows_FD.detach().float().cpu()
    if site.hook_name.startswith("blocks.") and site.hook_name.endswith(ON_STREAM):
        return rows_FD
    weight_OI = _linear_weight(model, site)
    if weight_OI is None or weight_OI.shape != (int(_text_config(model).hidden_size), rows_FD.shape[1]):
        return None
    return rows_FD @ weight_OI.T


def head_shares(model: nn.Module, site: Site, rows_FD: Tensor) -> Tensor | None:
    """(F, heads) share of each attention head in the length of decoder rows, at the input of attention's output layer.

    |d_head| / Σ_heads |d_head|. None at every other site.
    """
    path = site.module_path.split(".")
    if site.reads != "input" or len(path) < 2 or ("attn" not in path[-2] and "attention" not in path[-2]):
        return None
    heads = getattr(_text_config(model), "num_attention_heads", None)
    if _linear_weight(model, site) is None or not heads or rows_FD.shape[1] % heads:
        return None
    length_FH: Tensor = rows_FD.detach().float().cpu().reshape(len(rows_FD), heads, -1).norm(dim=-1)
    return length_FH / length_FH.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def unembedding(model: nn.Module) -> Tensor | None:
    """(V, d_model) fp32 unembedding; None for a model without one."""
    weight = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    return weight.detach().float().cpu() if isinstance(weight, Tensor) else None


def spellings(tokenizer: Any, n_rows: int) -> list[str]:
    """Texts of ids 0 … n_rows − 1 with their spaces; a token that is part of a character is spelled as its piece."""
    return [spelling(tokenizer, token) for token in range(n_rows)]


def spelling(tokenizer: Any, token: int) -> str:
    """The text of one id with its spaces, as in `spellings`."""
    piece = tokenizer.convert_ids_to_tokens([token])[0] if token < len(tokenizer) else None
    if piece is None:
        return OUT_OF_RANGE
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if "\ufffd" in text or not text:
        return str(piece)
    starts = piece.startswith("\u2581") and not text.startswith(" ")  # SentencePiece strips it from a first word
    return f" {text}" if starts else text


def _linear_weight(model: nn.Module, site: Site) -> Tensor | None:
    """(out, in) weights of the linear layer whose input the site is."""
    module = model.get_submodule(site.module_path) if site.reads == "input" else None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    return (weight.T if type(module).__name__ == "Conv1D" else weight).detach().float().cpu()


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
