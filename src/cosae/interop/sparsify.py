"""sparsify's folders (`cfg.json`, `sae.safetensors`): TopK autoencoders (ecosystem.md §2e; eai-sparsify 1.3).

s = (x − b_dec) · encoderᵀ + bias;  the k largest positive;  x̂ = f · W_dec + b_dec

Of a transcoder (transcode: true) nothing is subtracted, and W_skip may be added (cosae.interop.transcoders).
"""

from __future__ import annotations

from pathlib import Path

from cosae.errors import CosaeError, short
from cosae.interop.linear import Linear, linear_sae
from cosae.interop.transcoders import transcoder
from cosae.io.untrusted import read_json, read_safetensors, take, whole
from cosae.sae.model import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(folder: str | Path) -> SAE:
    """The SAE or transcoder in a folder of sparsify's. Raises CosaeError."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    path = folder / WEIGHTS
    state = read_safetensors(path)
    transcodes = bool(config.get("transcode"))
    if not transcodes and (config.get("skip_connection") or "W_skip" in state):
        raise CosaeError(
            f"{folder} holds an autoencoder with a skip connection (W_skip), which is of transcoders here."
        )
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise CosaeError(
            f"{folder}: the activation must be topk. Got {short(activation)}, which cosae has no selector for."
        )
    rows_FD, bias_F, decoder_FD, centre_D = take(state, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), path)
    k = whole(config.get("k"), "k", folder / CONFIG)
    hook = folder.name if "." in folder.name else None  # folders are named after the module that was hooked
    if transcodes:
        places = {} if hook is None else {"site": f"{hook}:input", "target": hook}
        metadata = {"format": "sparsify", **places}
        skip_OD = state.get("W_skip")
        return transcoder(rows_FD, bias_F, decoder_FD, centre_D, str(path), metadata, skip_OD, k=k)
    weights = Linear(rows_FD, bias_F, decoder_FD, centre_D, "topk", k)
    return linear_sae(weights, str(path), {"format": "sparsify", "hf_hook_name": hook})
