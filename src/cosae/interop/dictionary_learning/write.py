"""A cosae SAE → a folder that dictionary_learning's own `load_dictionary` reads, with the same outputs.

    cosae                                         becomes
    batch_topk                                    BatchTopKSAE; with prefixes MatryoshkaBatchTopKSAE
    batch_topk with one threshold per feature     JumpReluAutoEncoder (what a fold of decoder norms leaves)
    topk                                          AutoEncoderTopK
    jumprelu                                      JumpReluAutoEncoder
    jumprelu with θ = 0, a plain ReLU             AutoEncoder where decoder rows have length 1, else AutoEncoderNew
    gated                                         GatedAutoEncoder

Scores must be affine in x: the inner product, unit rows, or a cosine score whose exponent a is exactly 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.interop.dictionary_learning.read import CONFIG, TRAINERS, WEIGHTS
from cosae.interop.linear import NO_THRESHOLD, check_autoencoder
from cosae.interop.public import Public
from cosae.io.staged import staged
from cosae.kernels.terms import ROW_MIN
from cosae.sae.model import SAE

PLAIN = NO_THRESHOLD * 1e10
"""θ up to which jumprelu is a plain ReLU: what `linear` writes for one, with room for folds of decoder norms."""
State = dict[str, Tensor]


def write(
    sae: SAE, folder: str | Path, *, layer: int | None = None, model: str | None = None, context: int = 128
) -> Path:
    """Write `ae.pt` and `config.json`; returns the folder.

    layer, model, context: what their configuration asks for; by default what may be published of the SAE's metadata
    (cosae.interop.public). Raises CosaeError for an SAE their classes cannot express (a score that is not affine in x,
    frames, norm restoring, abs_topk, prefixes under another selector), an uncalibrated batch_topk, or a place that
    holds something else or cannot be written.
    """
    check_autoencoder(sae, "dictionary_learning's files")
    folder = Path(folder)
    with torch.no_grad():
        kind, expressed = _expressed(sae)
        fp32 = {name: value.float() if value.is_floating_point() else value for name, value in expressed.items()}
        state = {name: value.cpu().contiguous().clone() for name, value in fp32.items()}
    known = Public().metadata(sae.metadata)
    config = {
        "trainer": {
            "trainer_class": TRAINERS[kind],
            "dict_class": kind,
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            "k": sae.k,
            "layer": layer if layer is not None else known.get("layer"),
            "lm_name": model if model is not None else known.get("model"),
            "submodule_name": known.get("hf_hook_name"),
            "seed": known.get("seed"),
        },
        "buffer": {"ctx_len": known.get("context", context)},
    }
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CosaeError(f"{folder} is not an empty folder: choose another place to write to.")
    try:
        text = json.dumps(config, indent=2) + "\n"
        with staged(folder) as place:
            torch.save(state, place / WEIGHTS)
            (place / CONFIG).write_text(text, encoding="utf-8")
    except (RuntimeError, TypeError) as error:  # of PyTorch's writer on a full disk, and of metadata that is not plain
        raise CosaeError(f"{folder} cannot be written ({error}): choose another place.") from None
    return folder


def _expressed(sae: SAE) -> tuple[str, State]:
    """Their class and its state dict."""
    cfg = sae.cfg
    rows_FD = _affine_rows(sae)
    if not sae.calibrated:
        raise CosaeError("an uncalibrated batch_topk SAE has no threshold to write: calibrate it first.")
    if cfg.prefixes[:-1] and cfg.selector != "batch_topk":
        raise CosaeError(f"their Matryoshka class is batch_topk only. Got {cfg.selector}: keep it in cosae's format.")
    decoder_FD, centre_D = sae.W_dec.double(), sae.b_dec.double()
    bias_F = decoder_FD.new_zeros(sae.d_sae) if sae.b_enc is None else sae.b_enc.double()
    threshold = sae.threshold.double()
    linear = {"encoder.weight": rows_FD, "decoder.weight": decoder_FD.T}
    if cfg.selector == "gated":
        level = torch.nan_to_num(threshold, nan=0.0)
        gate = {"decoder_bias": centre_D, "gate_bias": bias_F - level, "r_mag": sae.selector.r_mag_F}
        return "GatedAutoEncoder", {**linear, **gate, "mag_bias": sae.selector.b_mag_F}
    free = {"W_enc": rows_FD.T, "W_dec": decoder_FD, "b_dec": centre_D}
    if cfg.selector == "jumprelu" and bool((threshold <= PLAIN).all()):
        length_F = decoder_FD.norm(dim=-1)
        if torch.allclose(length_F, torch.ones_like(length_F), rtol=0, atol=1e-6):
            return "AutoEncoder", {**linear, "encoder.bias": bias_F, "bias": centre_D}
        bias_F = bias_F - rows_FD @ centre_D
        return "AutoEncoderNew", {**linear, "encoder.bias": bias_F, "decoder.bias": centre_D}
    if cfg.selector == "jumprelu" or (cfg.selector == "batch_topk" and threshold.numel() > 1):
        return "JumpReluAutoEncoder", {**free, "b_enc": bias_F - rows_FD @ centre_D, "threshold": threshold}
    gain_F = sae.selector.rank_gain_F
    if not bool((gain_F == gain_F[0]).all()):
        raise CosaeError("an SAE whose decoder norms were folded ranks features by gains that theirs cannot hold.")
    k = torch.tensor(sae.k, dtype=torch.int32)
    centred = {**linear, "encoder.bias": bias_F, "b_dec": centre_D, "k": k}
    if cfg.selector == "topk":
        level = torch.tensor(float(sae.metadata.get("topk_threshold", -1.0)))
        return "AutoEncoderTopK", {**centred, "threshold": level}
    threshold = threshold.reshape(())
    if not cfg.prefixes:
        return "BatchTopKSAE", {**centred, "threshold": threshold}
    sizes = torch.diff(torch.tensor((0, *cfg.prefixes)))
    groups = {"b_enc": bias_F, "k": k, "threshold": threshold, "group_sizes": sizes}
    return "MatryoshkaBatchTopKSAE", {**free, **groups}


def _affine_rows(sae: SAE) -> Tensor:
    """(F, D) float64 rows of the score ⟨row, x − c⟩ + β. Raises CosaeError where the score is none."""
    cfg: Any = sae.cfg
    affine = cfg.score == "inner" or bool((sae.scale_a == 1).all())
    affine = affine and (sae.value_exponent is None or bool((sae.value_exponent == 0).all()))
    if not affine or cfg.frame != "raw" or cfg.norm_restoring or cfg.selector == "abs_topk":
        raise CosaeError(
            "dictionary_learning has classes for inner-product SAEs on raw activations under batch_topk, topk, "
            f"jumprelu and gated. Got {cfg.score} × {cfg.selector}, frame {cfg.frame}: keep it in cosae's format."
        )
    rows_FD: Tensor = sae.score.rows_FD.double()
    if cfg.score != "inner":
        gain_F: Tensor = sae.scale_b.double().exp().expand(sae.d_sae)
        rows_FD = rows_FD * (gain_F / rows_FD.norm(dim=-1).clamp_min(ROW_MIN))[:, None]
    return rows_FD
