"""Llama Scope's folders (`hyperparams.json`, `checkpoints/final.safetensors`): JumpReLU SAEs on normalised activations.

With n = √d / (the data's average norm, "in"), as the SAEs were trained:

    s = n x · W_encᵀ + b_enc;  f_i = s_i where s_i > n θ;  x̂ = (f · W_decᵀ + b_dec) / n

θ is held against s_i |d_i| where the file says `sparsity_include_decoder_norm` (released files have |d_i| = 1). n is
folded into the weights here, so that x is the model's own; without it scores are wrong by n, and L0 with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cosae.errors import CosaeError, short
from cosae.interop.linear import Linear, is_plain, linear_sae
from cosae.io.untrusted import read_json, read_safetensors, take, transposed
from cosae.sae.model import SAE

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def read(folder: str | Path) -> SAE:
    """The SAE in a folder of Llama Scope's. Raises CosaeError in one sentence; transcoders are named."""
    folder = Path(folder)
    config, path = read_json(folder / CONFIG), folder / WEIGHTS
    site = config.get("hook_point_in")
    if config.get("hook_point_out", site) != site:
        raise CosaeError(f"{folder} holds a transcoder (hook_point_out differs): cosae reads autoencoders only.")
    activation = str(config.get("act_fn", "jumprelu")).lower()
    if activation not in ("jumprelu", "relu", "topk"):
        raise CosaeError(f"{folder}: act_fn must be jumprelu, relu or topk. Got {short(config['act_fn'])} instead.")
    rows_FD, bias_F, decoder_DF, centre_D = (
        t.float() if t.is_floating_point() else t for t in take(read_safetensors(path), NAMES, path)
    )
    factor = _factor(config, folder, rows_FD.shape[-1])
    threshold = _number(config.get("jump_relu_threshold", 0.0), "jump_relu_threshold", folder)
    known = {"model_name": "model", "hook_point_in": "hook_name"}
    metadata: dict[str, Any] = {"format": "llama_scope", "norm_factor": factor}
    metadata |= {ours: config[theirs] for theirs, ours in known.items() if is_plain(config.get(theirs))}
    k = config.get("top_k")
    decoder_FD = transposed(decoder_DF, "decoder.weight", path)
    theta = torch.tensor(threshold * factor if activation == "jumprelu" else 0.0).expand(len(decoder_FD))
    if config.get("sparsity_include_decoder_norm", False):
        theta = theta / decoder_FD.double().norm(dim=1).clamp_min(1e-12)
    weights = Linear(
        rows_FD * factor,
        bias_F,
        decoder_FD / factor,
        centre_D / factor,
        "topk" if activation == "topk" else "jumprelu",
        k if isinstance(k, int) and not isinstance(k, bool) and k > 0 else None,
        None if activation == "topk" else theta,
        centred=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
    )
    return linear_sae(weights, str(path), metadata)


def _factor(config: dict[str, Any], folder: Path, d_in: int) -> float:
    """What activations are multiplied by: 1 where the file says that they are not normalised."""
    if config.get("norm_activation", "dataset-wise") in ("inference", "none", None):
        return 1.0
    norms = config.get("dataset_average_activation_norm")
    norm = norms.get("in") if isinstance(norms, dict) else None
    if config.get("norm_activation", "dataset-wise") != "dataset-wise" or norm is None:
        raise CosaeError(
            f"{folder}: norm_activation must be dataset-wise, with dataset_average_activation_norm.in. Got "
            f"{short(config.get('norm_activation'))} and {short(norms)} instead."
        )
    found = _number(norm, "dataset_average_activation_norm.in", folder)
    if not 1e-6 < found < 1e9:
        raise CosaeError(f"{folder}: dataset_average_activation_norm.in must be above 0. Got {found:g} instead.")
    return float(d_in**0.5) / found


def _number(value: Any, name: str, folder: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise CosaeError(f"{folder}: {name} must be a number. Got {short(value)} instead.")
    return float(value)
