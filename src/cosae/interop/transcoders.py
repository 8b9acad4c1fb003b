"""Transcoders of other libraries: what they all compute, and the files they keep it in.

    s = x · W_encᵀ + b_enc;  f = s where s > θ (or the k largest positive);  y = f · W_dec + b_dec (+ x · W_skipᵀ)

    sparsify        cfg.json (transcode: true), sae.safetensors                                       TopK
    saelens         cfg.json, sae_weights.safetensors; (jumprelu_)(skip_)transcoder                   ReLU, JumpReLU
    circuit_tracer  layer_N.safetensors, one file a layer; config.yaml beside them names the sites    ReLU, JumpReLU

No centre is subtracted there, and constants are folded: here s = ⟨w, x − c⟩ + β and y = m (Σ f d + W (x − c)) + c_out.
Their loaders compute inner products, so that a cosine score cannot be written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cosae.errors import CosaeError, check_choice
from cosae.interop.linear import Linear, linear_sae
from cosae.interop.public import Public
from cosae.io.staged import staged
from cosae.io.untrusted import read_safetensors, read_text, take
from cosae.kernels.terms import ROW_MIN
from cosae.sae.model import SAE

FORMATS = ("sparsify", "saelens", "circuit_tracer")
LAYER = re.compile(r"layer_(\d+)\.safetensors")
THRESHOLD = "activation_function.threshold"
HOOK = re.compile(r"^(feature_(?:in|out)put_hook):\s*[\"']?([\w.]+)[\"']?\s*$", re.MULTILINE)
FP32 = torch.float32


@torch.no_grad()
def as_linear(sae: SAE) -> Linear:
    """What the libraries compute of a transcoder, centres and constants folded, in float64.

    Raises CosaeError for an autoencoder, a score that is no inner product, a frame that takes something out, a restored
    norm, and a selector that is no threshold or top-k.
    """
    if sae.target is None:
        raise CosaeError("this SAE reconstructs what it reads and is no transcoder: export it as an SAE.")
    cfg = sae.cfg
    if cfg.score not in ("inner", "inner_unit"):
        raise CosaeError(f"their loaders compute inner products; the score {cfg.score} cannot be written for them.")
    if cfg.frame != "raw" or cfg.norm_restoring:
        what = "a decoder that restores norms" if cfg.norm_restoring else f"the frame {cfg.frame}"
        raise CosaeError(f"their loaders read x as it is; {what} cannot be written for them.")
    if cfg.selector not in ("topk", "batch_topk", "jumprelu") or not sae.calibrated:
        what = f"an uncalibrated {cfg.selector}" if not sae.calibrated else cfg.selector
        raise CosaeError(f"their loaders know thresholds and top-k; {what} cannot be written for them.")
    rows_FD = sae.score.rows_FD.double()
    if cfg.score == "inner_unit":
        rows_FD = rows_FD / torch.linalg.vector_norm(rows_FD, dim=-1, keepdim=True).clamp_min(ROW_MIN)
    centre_D, size = sae.centre_D.double(), sae.target.size.double()
    bias_F = -rows_FD @ centre_D
    bias_F = bias_F if sae.score.bias_F is None else bias_F + sae.score.bias_F.double()
    out_O, skip_OD = sae.target.centre_O.double(), None
    if sae.target.skip_OD is not None:
        skip_OD = size * sae.target.skip_OD.double()
        out_O = out_O - skip_OD @ centre_D
    threshold = None if cfg.selector == "topk" else sae.threshold.double().expand(sae.d_sae)
    return Linear(
        rows_FD=rows_FD,
        bias_F=bias_F,
        decoder_FD=size * sae.decoder.rows_FD.double(),
        centre_D=torch.zeros_like(centre_D),
        selector="topk" if threshold is None else "jumprelu",
        k=sae.k,
        threshold=threshold,
        out_O=out_O,
        skip_OD=skip_OD,
    )


def write(sae: SAE, path: str | Path, format: str, layer: int | None = None) -> Path:
    """Write a transcoder for another library: a folder, of circuit_tracer the folder of its layers' files.

    layer: of circuit_tracer, by default that of the site it reads. Raises CosaeError as `as_linear` does, and for what
    a format has no place for.
    """
    check_choice("the format of a transcoder", format, FORMATS)
    path, weights = Path(path), as_linear(sae)
    if (weights.selector == "topk") != (format == "sparsify"):
        what = "thresholds, no top-k" if weights.selector == "topk" else "top-k alone"
        raise CosaeError(f"{format} keeps transcoders with {what}: this one's selector is {sae.cfg.selector}.")
    assert weights.out_O is not None
    if format != "saelens" and sae.d_in != sae.d_out:
        raise CosaeError(f"{format} keeps transcoders of one width. Got {sae.d_in} and {sae.d_out}: write saelens.")
    known = Public().metadata(sae.metadata)
    if format == "circuit_tracer":
        return _write_layer(weights, known, path, layer)
    with staged(path) as folder:
        if format == "sparsify":
            _write_sparsify(weights, folder)
        else:
            _write_saelens(weights, known, folder)
    return path


def _tensors(named: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value.to(FP32).cpu().contiguous() for name, value in named.items() if value is not None}


def _write_sparsify(weights: Linear, folder: Path) -> None:
    state = {"encoder.weight": weights.rows_FD, "encoder.bias": weights.bias_F, "W_dec": weights.decoder_FD}
    save_file(_tensors({**state, "b_dec": weights.out_O, "W_skip": weights.skip_OD}), folder / "sae.safetensors")
    d_sae, d_in = weights.rows_FD.shape
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": False,
        "num_latents": d_sae,
        "k": weights.k,
        "multi_topk": False,
        "skip_connection": weights.skip_OD is not None,
        "transcode": True,
        "d_in": d_in,
    }
    (folder / "cfg.json").write_text(json.dumps(config) + "\n", encoding="utf-8")


def _write_saelens(weights: Linear, known: Mapping[str, Any], folder: Path) -> None:
    assert weights.threshold is not None
    assert weights.out_O is not None
    theta_F = weights.threshold.clamp_min(0.0)
    state = {"W_enc": weights.rows_FD.T, "b_enc": weights.bias_F, "W_dec": weights.decoder_FD, "b_dec": weights.out_O}
    save_file(_tensors({**state, "W_skip": weights.skip_OD, "threshold": theta_F}), folder / "sae_weights.safetensors")
    hooks = {"hook_name": known.get("hook_name"), "hook_name_out": known.get("target_hook_name")}
    metadata = {"sae_lens_version": "6.0.0", "model_name": known.get("model"), **hooks}
    config = {
        "architecture": "jumprelu_transcoder" if weights.skip_OD is None else "jumprelu_skip_transcoder",
        "d_in": weights.rows_FD.shape[1],
        "d_out": len(weights.out_O),
        "d_sae": len(weights.rows_FD),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {name: value for name, value in metadata.items() if isinstance(value, str)},
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_layer(weights: Linear, known: Mapping[str, Any], folder: Path, layer: int | None) -> Path:
    """One layer's file; config.yaml beside it where there is none yet."""
    hooks = [re.fullmatch(r"blocks\.(\d+)\.(.+)", str(known.get(name))) for name in ("hook_name", "target_hook_name")]
    if layer is None:
        if hooks[0] is None:
            raise CosaeError("circuit_tracer keeps one file a layer, and this transcoder names none: give layer=.")
        layer = int(hooks[0][1])
    folder.mkdir(parents=True, exist_ok=True)
    state = {"W_enc": weights.rows_FD, "W_dec": weights.decoder_FD, "b_enc": weights.bias_F, "b_dec": weights.out_O}
    file = folder / f"layer_{layer}.safetensors"
    save_file(_tensors({**state, "W_skip": weights.skip_OD, THRESHOLD: weights.threshold}), file)
    names = [("hook_in", "mlp.hook_in"), ("hook_out", "hook_mlp_out")]
    read, written = (usual if found is None else found[2] for found, (_, usual) in zip(hooks, names, strict=True))
    config = folder / "config.yaml"
    if not config.exists():
        lines = ["model_kind: transcoder_set", f"feature_input_hook: {json.dumps(read)}"]
        lines += [f"feature_output_hook: {json.dumps(written)}", f"model_name: {json.dumps(known.get('model') or '')}"]
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def read_layer(file: str | Path) -> SAE:
    """The transcoder in a layer_N.safetensors of circuit-tracer. Raises CosaeError."""
    file = Path(file)
    state = read_safetensors(file)
    rows_FD, bias_F, decoder_FD, out_O = take(state, ("W_enc", "b_enc", "W_dec", "b_dec"), file)
    unknown = sorted(set(state) - {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip", THRESHOLD})
    if unknown:
        raise CosaeError(f"{file} holds {unknown[0]!r}, which no transcoder of one layer has.")
    metadata: dict[str, Any] = {"format": "circuit_tracer"}
    if (named := LAYER.fullmatch(file.name)) is not None:
        config = file.with_name("config.yaml")
        hooks = dict(HOOK.findall(read_text(config))) if config.is_file() else {}
        for ours, theirs in (("hook_name", "feature_input_hook"), ("target", "feature_output_hook")):
            if theirs in hooks:
                metadata[ours] = f"blocks.{named[1]}.{hooks[theirs]}"
        metadata["layer"] = int(named[1])
    return transcoder(
        rows_FD, bias_F, decoder_FD, out_O, str(file), metadata, state.get("W_skip"), state.get(THRESHOLD)
    )


def transcoder(
    rows_FD: Tensor,
    bias_F: Tensor,
    decoder_FD: Tensor,
    out_O: Tensor,
    source: str,
    metadata: dict[str, Any],
    skip_OD: Tensor | None = None,
    threshold: Tensor | None = None,
    k: int | None = None,
) -> SAE:
    """The transcoder of these weights: TopK where k is given, else JumpReLU, ReLU without a threshold."""
    if rows_FD.ndim != 2 or out_O.ndim != 1:
        shapes = f"{tuple(rows_FD.shape)} and {tuple(out_O.shape)}"
        raise CosaeError(f"{source}: an encoder must be a matrix and an output bias a vector. Got {shapes}.")
    selector = "jumprelu" if k is None else "topk"
    parts: dict[str, Any] = {"k": k, "threshold": threshold, "out_O": out_O, "skip_OD": skip_OD}
    centre_D = torch.zeros(rows_FD.shape[1])
    return linear_sae(Linear(rows_FD, bias_F, decoder_FD, centre_D, selector, **parts), source, metadata)
