"""dictionary_learning's folders (`ae.pt`, `config.json`), read and written (ecosystem.md §2b; the package's 0.1.0).

    dict_class               fires where                       becomes
    AutoEncoder              s > 0, decoder normalised on load  jumprelu, θ = 0, unit decoder rows
    AutoEncoderNew           s > 0, no centre subtracted        jumprelu, θ = 0
    JumpReluAutoEncoder      s > θ_i, no centre subtracted      jumprelu
    GatedAutoEncoder         π > 0                              gated
    AutoEncoderTopK          k largest positive                 topk
    BatchTopKSAE             s > threshold (−1: all positive)   batch_topk
    MatryoshkaBatchTopKSAE   the same, all groups               batch_topk with prefixes

Writing: the inner product in the raw frame under batch_topk, topk, jumprelu and gated.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cosae.sae.fold import fold_decoder_norm
from cosae.sae.model import SAE
from cosae.share.linear import Linear, linear_sae
from cosae.share.untrusted import read_json, read_pickled, take, tensors, whole
from cosae.types import CosaeError

WEIGHTS, CONFIG = "ae.pt", "config.json"
CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "JumpReluAutoEncoder",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


def read(folder: str | Path) -> SAE:
    """The SAE in a folder of dictionary_learning's. Raises CosaeError in one sentence."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or not isinstance(trainer.get("dict_class"), str):
        raise CosaeError(f"{folder / CONFIG} names no trainer.dict_class: it is not dictionary_learning's.")
    kind = trainer["dict_class"]
    if kind not in CLASSES:
        raise CosaeError(f"{folder}: dict_class must be one of {', '.join(CLASSES)}. Got {kind!r} instead.")
    path = folder / WEIGHTS
    state = tensors(read_pickled(path), path)
    sae = linear_sae(_linear(kind, state, trainer, path), str(path), _facts(config, trainer, kind))
    return fold_decoder_norm(sae) if kind == "AutoEncoder" else sae


def _linear(kind: str, state: dict[str, Tensor], trainer: dict[str, Any], path: Path) -> Linear:
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        enc_DF, bias_F, decoder_FD, centre_D, threshold = take(
            state, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), path
        )
        if kind == "JumpReluAutoEncoder":
            rows_FD = _transposed(enc_DF, path)
            return Linear(rows_FD, bias_F, decoder_FD, centre_D, "jumprelu", None, threshold, centred=False)
        (sizes,) = take(state, ("group_sizes",), path)
        prefixes = tuple(int(p) for p in torch.cumsum(sizes.long(), 0))
        k = _k(state, trainer, path)
        rows_FD = _transposed(enc_DF, path)
        return Linear(rows_FD, bias_F, decoder_FD, centre_D, "batch_topk", k, threshold, prefixes=prefixes)
    rows_FD, decoder_DF = take(state, ("encoder.weight", "decoder.weight"), path)
    decoder_FD = _transposed(decoder_DF, path)
    if kind == "GatedAutoEncoder":
        names = ("decoder_bias", "gate_bias", "r_mag", "mag_bias")
        centre_D, gate_F, r_mag_F, mag_F = take(state, names, path)
        return Linear(rows_FD, gate_F, decoder_FD, centre_D, "gated", gate_mag=(r_mag_F, mag_F))
    (bias_F,) = take(state, ("encoder.bias",), path)
    if kind == "AutoEncoderNew":
        (centre_D,) = take(state, ("decoder.bias",), path)
        return Linear(rows_FD, bias_F, decoder_FD, centre_D, "jumprelu", centred=False)
    (centre_D,) = take(state, ("bias" if kind == "AutoEncoder" and "bias" in state else "b_dec",), path)
    if kind == "AutoEncoder":
        return Linear(rows_FD, bias_F, decoder_FD, centre_D, "jumprelu")
    k = _k(state, trainer, path)
    if kind == "AutoEncoderTopK":
        return Linear(rows_FD, bias_F, decoder_FD, centre_D, "topk", k)
    (threshold,) = take(state, ("threshold",), path)
    return Linear(rows_FD, bias_F, decoder_FD, centre_D, "batch_topk", k, threshold)


def _transposed(matrix: Tensor, path: Path) -> Tensor:
    if matrix.ndim != 2:
        raise CosaeError(f"{path}: weights must be matrices. Got shape {tuple(matrix.shape)} instead.")
    return matrix.T


def _k(state: dict[str, Tensor], trainer: dict[str, Any], path: Path) -> int:
    """k of the configuration, which must be the weights' own where both have one."""
    asked = trainer.get("k")
    stored = int(state["k"]) if "k" in state and state["k"].numel() == 1 else None
    if asked is not None and stored is not None and whole(asked, "k", path) != stored:
        raise CosaeError(f"{path}: k is {asked} in {CONFIG} but {stored} in the weights: they do not belong together.")
    return whole(asked if asked is not None else stored, "k", path)


def _facts(config: dict[str, Any], trainer: dict[str, Any], kind: str) -> dict[str, Any]:
    """Training facts under cosae's names."""
    buffer = config.get("buffer") if isinstance(config.get("buffer"), dict) else {}
    assert isinstance(buffer, dict)
    layer = trainer.get("layer")
    found = {
        "format": "dictionary_learning",
        "dict_class": kind,
        "model": trainer.get("lm_name"),
        "hf_hook_name": trainer.get("submodule_name"),
        "site": f"resid_post.{layer}" if isinstance(layer, int) and _is_residual(trainer, layer) else None,
        "layer": layer,
        "seed": trainer.get("seed"),
        "context": buffer.get("ctx_len"),
    }
    return {name: value for name, value in found.items() if isinstance(value, str | int | float)}


def _is_residual(trainer: dict[str, Any], layer: int) -> bool:
    """Whether the submodule's name says the residual stream after that block (their convention)."""
    return str(trainer.get("submodule_name", "")) in (f"resid_post_layer_{layer}", f"model.layers.{layer}")


def write(
    sae: SAE, folder: str | Path, *, layer: int | None = None, model: str | None = None, context: int = 128
) -> Path:
    """Write a folder that dictionary_learning's own `load_dictionary` reads, with the same outputs.

    layer, model: what their configuration asks for; the SAE's facts by default. Raises CosaeError for an SAE their
    classes cannot express (any score but the inner product, frames, norm restoring, abs_topk), an uncalibrated
    batch_topk, or a place that holds something else or cannot be written.
    """
    folder = Path(folder)
    kind, state = _state(sae)
    config = {
        "trainer": {
            "trainer_class": f"{kind}Trainer",
            "dict_class": kind,
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            "k": sae.k,
            "layer": layer if layer is not None else sae.facts.get("layer"),
            "lm_name": model if model is not None else sae.facts.get("model"),
            "submodule_name": sae.facts.get("hf_hook_name"),
            "seed": sae.facts.get("seed"),
        },
        "buffer": {"ctx_len": sae.facts.get("context", context)},
    }
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CosaeError(f"{folder} is not an empty folder: choose another place to write to.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            torch.save(state, staged / WEIGHTS)
            (staged / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            staged.chmod(0o755)
            if folder.exists():
                folder.rmdir()
            staged.replace(folder)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    except (OSError, RuntimeError) as error:
        raise CosaeError(f"{folder} cannot be written ({error}): choose another place.") from None
    return folder


def _state(sae: SAE) -> tuple[str, dict[str, Tensor]]:
    """Their class and its state dict."""
    cfg = sae.cfg
    if cfg.score != "inner" or cfg.frame != "raw" or cfg.norm_restoring or cfg.selector == "abs_topk":
        raise CosaeError(
            "dictionary_learning has classes for inner-product SAEs on raw activations under batch_topk, topk, "
            f"jumprelu and gated only. Got {cfg.score} × {cfg.selector}, frame {cfg.frame}: keep it in cosae's format."
        )
    if not sae.calibrated:
        raise CosaeError("an uncalibrated batch_topk SAE has no threshold to write: calibrate it first.")
    rows_FD, decoder_FD = sae.score.rows_FD.detach(), sae.W_dec.detach()
    zero_F = torch.zeros(sae.d_sae)
    bias_F = zero_F if sae.b_enc is None else sae.b_enc.detach()
    centre_D = sae.b_dec.detach()
    k = torch.tensor(sae.k, dtype=torch.int32)
    if cfg.selector == "jumprelu":
        state = {
            "W_enc": rows_FD.T,
            "b_enc": bias_F - (rows_FD.double() @ centre_D.double()).float(),
            "W_dec": decoder_FD,
            "b_dec": centre_D,
            "threshold": sae.threshold.detach(),
        }
        return "JumpReluAutoEncoder", _plain(state)
    state = {"encoder.weight": rows_FD, "decoder.weight": decoder_FD.T}
    if cfg.selector == "gated":
        threshold = torch.nan_to_num(sae.selector.threshold, nan=0.0)
        gate = {"decoder_bias": centre_D, "gate_bias": bias_F - threshold, "r_mag": sae.selector.r_mag_F.detach()}
        return "GatedAutoEncoder", _plain({**state, **gate, "mag_bias": sae.selector.b_mag_F.detach()})
    state |= {"encoder.bias": bias_F, "b_dec": centre_D, "k": k}
    if not bool((sae.selector.rank_gain_F == 1).all()):
        raise CosaeError("an SAE whose decoder norms were folded ranks features by gains that theirs cannot hold.")
    if cfg.selector == "topk":
        return "AutoEncoderTopK", _plain({**state, "threshold": torch.tensor(-1.0)})
    if sae.threshold.numel() != 1:
        raise CosaeError("their BatchTopK has one threshold; this SAE has one per feature.")
    return "BatchTopKSAE", _plain({**state, "threshold": sae.threshold.detach().reshape(())})


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous().clone() for name, value in state.items()}


class Dictionary(nn.Module):
    """A cosae SAE with the methods of dictionary_learning's `Dictionary`: dense features, `output_features=`.

    activation_dim, dict_size   widths;  sae   the SAE itself
    """

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.sae = sae
        self.activation_dim, self.dict_size = sae.d_in, sae.d_sae

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        """x (..., activation_dim) → dense features (..., dict_size) at the inference rule."""
        return self.sae.encode(x).to_dense()

    def decode(self, f: Tensor) -> Tensor:
        """Dense features → reconstruction. An SAE that takes the norm out needs it: use `forward`, or `sae.decode`."""
        return self.sae.decode(f)

    def forward(self, x: Tensor, output_features: bool = False, **_: Any) -> Any:
        """Reconstruction, or (reconstruction, features) with output_features=True."""
        codes = self.sae.encode(x)
        x_hat = self.sae.decode(codes)
        return (x_hat, codes.to_dense()) if output_features else x_hat


def load_dictionary(base_path: str | Path, device: str | torch.device = "cpu") -> tuple[Dictionary, dict[str, Any]]:
    """Drop-in for dictionary_learning's function of that name: (dictionary, config), for their folders and cosae's own.

    Raises CosaeError, in one sentence, where the folder is neither.
    """
    from cosae.share.read import read_sae

    folder = Path(base_path)
    sae = read_sae(folder, device=device)
    sae.requires_grad_(False)
    if (folder / CONFIG).is_file():
        return Dictionary(sae), read_json(folder / CONFIG)
    trainer = {"dict_class": "cosae.SAE", "activation_dim": sae.d_in, "dict_size": sae.d_sae, "k": sae.k}
    trainer |= {"lm_name": sae.facts.get("model"), "submodule_name": sae.facts.get("hf_hook_name")}
    return Dictionary(sae), {"trainer": trainer, "buffer": {}}
