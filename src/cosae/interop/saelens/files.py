"""SAELens' folders (`cfg.json`, `sae_weights.safetensors`), its own architectures (ecosystem.md §2a; sae_lens 6).

    architecture               fires where              becomes
    standard                   s > 0                    jumprelu, θ = 0
    jumprelu                   s > θ_i and s > 0        jumprelu
    topk                       k largest positive       topk
    abstopk                    k largest |s|            abs_topk
    gated                      π > 0                    gated
    batchtopk                  s > topk_threshold       batch_topk           training checkpoints
    matryoshka_batchtopk       the same                 batch_topk, prefixes training checkpoints

With rescale_acts_by_decoder_norm the scores are those times |d_i| and the decoder rows have length 1; without
apply_b_dec_to_input the encoder subtracts no centre. A training checkpoint's scale of activations
(`activation_scaler.json`) is folded; configurations older than SAELens 6 are read by their old names.
cosae's own architectures: see `cosine`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosae.activations.filter import Filter, FilterPolicy
from cosae.errors import CosaeError, check_choice, short
from cosae.interop.linear import Linear, linear_sae
from cosae.interop.saelens import cosine
from cosae.interop.transcoders import transcoder
from cosae.io.untrusted import number, read_json, read_safetensors, take, transposed, whole
from cosae.io.values import to_plain
from cosae.sae import file as own
from cosae.sae.fold import fold_input_scale
from cosae.sae.model import SAE

ARCHITECTURES = ("standard", "jumprelu", "topk", "abstopk", "gated", "batchtopk", "matryoshka_batchtopk")
TRAINING = ("batchtopk", "matryoshka_batchtopk")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
EXPRESSED = ("none", "expected_average_only_in")
"""normalize_activations that leave an inference SAE's input as it is: the second one's scale is folded when saved."""


def read(folder: str | Path) -> SAE:
    """The SAE in a SAELens folder. Raises CosaeError, in one sentence, for what cosae cannot express or cannot read."""
    folder = Path(folder)
    config = _modern(read_json(folder / own.CONFIG))
    kind = config.get("architecture", "standard")
    if kind in cosine.ARCHITECTURES and config.get("format") == own.FORMAT:
        return own.load(folder)
    if kind not in (*ARCHITECTURES, *TRANSCODERS, *cosine.ARCHITECTURES):
        known = ", ".join([*ARCHITECTURES, *TRANSCODERS])
        raise CosaeError(
            f"{folder}: the architecture must be {known} or one of cosae's own. Got {short(kind)} instead."
        )
    path = folder / own.WEIGHTS
    state = read_safetensors(path)
    if kind in cosine.ARCHITECTURES:
        return cosine.assemble(config, state, str(path), _scaling_factor(folder))
    _check_conventions(config, kind, folder)
    if kind in TRANSCODERS:
        return _transcoder(config, kind, state, path)
    sae = linear_sae(_linear(kind, config, state, path), str(path), _metadata(config, kind))
    if (trained_on := _filter(config)) is not None:
        sae.metadata["filter"] = to_plain(trained_on)
    if config.get("normalize_activations") != "expected_average_only_in":
        return sae
    scale = _scaling_factor(folder)
    if scale is None and kind in TRAINING:
        raise CosaeError(f"{folder}: activations were rescaled, and {cosine.SCALER} does not say by what: copy it all.")
    return sae if scale is None else fold_input_scale(sae, scale)


def _scaling_factor(folder: Path) -> float | None:
    """What a checkpoint's activations were multiplied by while it trained; None where it says nothing."""
    path = folder / cosine.SCALER
    factor = read_json(path).get("scaling_factor") if path.is_file() else None
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float)):
        raise CosaeError(f"{path} does not hold a scaling factor: the file is damaged.")
    return None if factor is None else float(factor)


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration from before SAELens 6 under today's names: there topk was an activation of standard."""
    if isinstance(config.get("normalize_activations"), bool | None):
        scaled = config.get("normalize_activations") is True
        config = {**config, "normalize_activations": "expected_average_only_in" if scaled else "none"}
    details = config.get("activation_fn_kwargs")
    if config.get("activation_fn_str", config.get("activation_fn")) == "topk" and isinstance(details, dict):
        config = {**config, "architecture": "topk", "k": details.get("k")}
    return config


def _check_conventions(config: dict[str, Any], kind: str, folder: Path) -> None:
    check_choice(f"{folder}: normalize_activations", config.get("normalize_activations", "none"), EXPRESSED)
    for name in ("finetuning_scaling_factor", "use_error_term"):
        if config.get(name):
            raise CosaeError(f"{folder}: {name} is set, which cosae does not express.")
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if kind == "standard" and activation != "relu":
        raise CosaeError(f"{folder}: a standard SAE must have the activation relu. Got {short(activation)} instead.")


def _linear(kind: str, config: dict[str, Any], state: dict[str, Tensor], path: Path) -> Linear:
    enc_DF, decoder_FD, centre_D = take(state, ("W_enc", "W_dec", "b_dec"), path)
    rows_FD = transposed(enc_DF, "W_enc", path)
    centred = bool(config.get("apply_b_dec_to_input", True))
    made = partial(Linear, decoder_FD=decoder_FD, centre_D=centre_D, centred=centred)
    if kind == "gated":
        gate_F, r_mag_F, mag_F = take(state, ("b_gate", "r_mag", "b_mag"), path)
        return made(rows_FD, gate_F, selector="gated", gate_mag=(r_mag_F, mag_F))
    (bias_F,) = take(state, ("b_enc",), path)
    if kind == "standard":
        return made(rows_FD, bias_F, selector="jumprelu")
    if kind == "jumprelu":
        if "threshold" not in state and "log_threshold" in state:  # a training checkpoint
            state = {**state, "threshold": state["log_threshold"].float().exp()}
        (theta_F,) = take(state, ("threshold",), path)
        return made(rows_FD, bias_F, selector="jumprelu", threshold=theta_F)
    k = whole(config.get("k"), "k", path)
    if config.get("rescale_acts_by_decoder_norm", kind in TRAINING):
        if decoder_FD.shape != rows_FD.shape or bias_F.shape != rows_FD.shape[:1]:
            shapes = f"{tuple(decoder_FD.shape)}, {tuple(bias_F.shape)}"
            raise CosaeError(f"{path}: W_dec and b_enc do not fit W_enc: {shapes}; the file is damaged.")
        length_F = decoder_FD.double().norm(dim=-1)
        if not bool((length_F > 0).all()):
            raise CosaeError(f"{path}: decoder rows of length 0 cannot be rescaled to length 1; the file is damaged.")
        rows_FD, bias_F = rows_FD.double() * length_F[:, None], bias_F.double() * length_F
        made = partial(made, decoder_FD=decoder_FD.double() / length_F[:, None])
    if kind in ("topk", "abstopk"):
        return made(rows_FD, bias_F, selector="topk" if kind == "topk" else "abs_topk", k=k)
    (threshold,) = take(state, ("topk_threshold",), path)
    widths = config.get("matryoshka_widths") or ()
    if not isinstance(widths, list | tuple):
        raise CosaeError(f"{path.parent / own.CONFIG}: matryoshka_widths must be a list. Got {short(widths)} instead.")
    prefixes = tuple(whole(width, "a Matryoshka width", path) for width in widths)
    theta = torch.tensor(number(threshold, "topk_threshold", path))
    return made(rows_FD, bias_F, selector="batch_topk", k=k, threshold=theta, prefixes=prefixes)


def _transcoder(config: dict[str, Any], kind: str, state: dict[str, Tensor], path: Path) -> SAE:
    """One of SAELens' transcoders: nothing is subtracted of x, b_dec is of the output (cosae.interop.transcoders)."""
    enc_DF, bias_F, decoder_FO, out_O = take(state, ("W_enc", "b_enc", "W_dec", "b_dec"), path)
    skip_OD = take(state, ("W_skip",), path)[0] if "skip" in kind else None
    threshold = take(state, ("threshold",), path)[0] if "jumprelu" in kind else None
    metadata = _metadata(config, kind)
    known = {**config, **(config["metadata"] if isinstance(config.get("metadata"), dict) else {})}
    metadata["target"] = known.get("hook_name_out")
    rows_FD = transposed(enc_DF, "W_enc", path)
    return transcoder(rows_FD, bias_F, decoder_FO, out_O, str(path), metadata, skip_OD, threshold)


def _filter(config: dict[str, Any]) -> Filter | None:
    """Which tokens training left out, where the file says so; no norm is known."""
    metadata = config.get("metadata")
    known = {**config, **(metadata if isinstance(metadata, dict) else {})}
    first, special = known.get("seqpos_slice"), known.get("exclude_special_tokens")
    from_second = isinstance(first, list) and first[:1] == [1]
    if not from_second and special is None:
        return None
    return Filter(FilterPolicy("position_0" if from_second else "none", drop_special=bool(special)), 0.0, 0)


def _metadata(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Metadata of training under cosae's names; SAELens keeps them in `metadata`, older versions beside the rest."""
    metadata = config.get("metadata")
    known = {**config, **(metadata if isinstance(metadata, dict) else {})}
    names = {**cosine.OUR_NAMES, "context_size": "context", "seed": "seed", "neuronpedia_id": "neuronpedia_id"}
    found = {ours: known.get(theirs) for theirs, ours in names.items()}
    found |= {"format": "saelens", "saelens_architecture": kind}
    changed = ("normalize_activations", "reshape_activations")
    return found | {name: config[name] for name in changed if config.get(name) not in (None, "none")}
