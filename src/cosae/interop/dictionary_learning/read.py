"""dictionary_learning's folders (`ae.pt`, `config.json`) → `cosae.SAE` (ecosystem.md §2b; the package's 0.1.0).

dict_class               fires where                       becomes
AutoEncoder              s > 0, decoder normalised on load  jumprelu, θ = 0, unit decoder rows
AutoEncoderNew           s > 0, no centre subtracted        jumprelu, θ = 0
JumpReluAutoEncoder      s > θ_i, no centre subtracted      jumprelu
GatedAutoEncoder         π > 0                              gated
AutoEncoderTopK          k largest positive                 topk
BatchTopKSAE             s > threshold (−1: all positive)   batch_topk
MatryoshkaBatchTopKSAE   the same, all groups               batch_topk with prefixes
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosae.errors import CosaeError, check_choice
from cosae.interop.linear import Linear, linear_sae
from cosae.io.untrusted import number, read_json, read_pickled, take, tensors, transposed, whole
from cosae.sae.fold import fold_decoder_norm
from cosae.sae.model import SAE

WEIGHTS, CONFIG = "ae.pt", "config.json"
TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}
"""Their classes that are read, and which of their trainers makes each."""


def read(folder: str | Path) -> SAE:
    """The SAE in a folder of dictionary_learning's. Raises CosaeError in one sentence."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or not isinstance(trainer.get("dict_class"), str):
        raise CosaeError(f"{folder / CONFIG} names no trainer.dict_class: it is not dictionary_learning's.")
    kind = trainer["dict_class"]
    check_choice(f"{folder}: dict_class", kind, TRAINERS)
    path = folder / WEIGHTS
    state = tensors(read_pickled(path), path)
    metadata = _metadata(config, trainer, kind)
    if kind == "AutoEncoderTopK" and "threshold" in state:
        metadata["topk_threshold"] = number(state["threshold"], "threshold", path)  # their encode(use_threshold=True)
    sae = linear_sae(_linear(kind, state, trainer, path), str(path), metadata)
    return fold_decoder_norm(sae) if kind == "AutoEncoder" else sae


def _linear(kind: str, state: dict[str, Tensor], trainer: dict[str, Any], path: Path) -> Linear:
    def get(*names: str) -> list[Tensor]:
        return take(state, names, path)

    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        enc_DF, bias_F, decoder_FD, centre_D, threshold = get("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        made = partial(Linear, transposed(enc_DF, "W_enc", path), bias_F, decoder_FD, centre_D, threshold=threshold)
        if kind == "JumpReluAutoEncoder":
            aim = trainer.get("target_l0", 0)  # features per token it was trained for
            known = isinstance(aim, int | float) and not isinstance(aim, bool) and 1 <= aim < 2**31
            return made("jumprelu", round(aim) if known else None, centred=False)
        return made("batch_topk", _k(state, trainer, path), prefixes=_prefixes(state, path))
    rows_FD, decoder_DF = get("encoder.weight", "decoder.weight")
    decoder_FD = transposed(decoder_DF, "decoder.weight", path)
    if kind == "GatedAutoEncoder":
        centre_D, gate_F, r_mag_F, mag_F = get("decoder_bias", "gate_bias", "r_mag", "mag_bias")
        return Linear(rows_FD, gate_F, decoder_FD, centre_D, "gated", gate_mag=(r_mag_F, mag_F))
    own = {"AutoEncoderNew": "decoder.bias", "AutoEncoder": "bias" if "bias" in state else "b_dec"}
    bias_F, centre_D = get("encoder.bias", own.get(kind, "b_dec"))
    made = partial(Linear, rows_FD, bias_F, decoder_FD, centre_D)
    if kind in own:
        return made("jumprelu", centred=kind == "AutoEncoder")
    k = _k(state, trainer, path)
    if kind == "AutoEncoderTopK":
        return made("topk", k)
    (threshold,) = get("threshold")
    return made("batch_topk", k, threshold)


def _prefixes(state: dict[str, Tensor], path: Path) -> tuple[int, ...]:
    (sizes,) = take(state, ("group_sizes",), path)
    d_sae = state["W_dec"].shape[0] if state["W_dec"].ndim else 0
    if sizes.ndim != 1 or sizes.is_floating_point() or sizes.numel() > max(d_sae, 1):
        raise CosaeError(f"{path}: group_sizes must be a list of integers. Got {sizes.dtype} {tuple(sizes.shape)}.")
    if not bool((sizes > 0).all()) or int(sizes.long().sum()) != d_sae:
        raise CosaeError(f"{path}: group_sizes must be positive and add up to the {d_sae} features.")
    return tuple(int(p) for p in torch.cumsum(sizes.long(), 0))


def _k(state: dict[str, Tensor], trainer: dict[str, Any], path: Path) -> int:
    """k of the configuration, which must be the weights' own where both have one."""
    asked = trainer.get("k")
    stored = whole(number(state["k"], "k", path), "k", path) if "k" in state else None
    if asked is not None and stored is not None and whole(asked, "k", path) != stored:
        raise CosaeError(f"{path}: k is {asked} in {CONFIG} but {stored} in the weights: they do not belong together.")
    return whole(asked if asked is not None else stored, "k", path)


def _metadata(config: dict[str, Any], trainer: dict[str, Any], kind: str) -> dict[str, Any]:
    buffer, layer, module = config.get("buffer"), trainer.get("layer"), trainer.get("submodule_name")
    residual = (f"resid_post_layer_{layer}", f"model.layers.{layer}")  # the stream after that block, as they name it
    return {
        "format": "dictionary_learning",
        "dict_class": kind,
        "model": trainer.get("lm_name"),
        "hf_hook_name": module,
        "site": f"resid_post.{layer}" if isinstance(layer, int) and module in residual else None,
        "layer": layer,
        "seed": trainer.get("seed"),
        "context": buffer.get("ctx_len") if isinstance(buffer, dict) else None,
    }
