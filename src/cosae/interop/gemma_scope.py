"""Gemma Scope's files: `params.npz`, and the later `config.json` beside `params.safetensors` (ecosystem.md §2e).

f_i = s_i · 1[s_i > θ_i],  s = x · W_enc + b_enc,  x̂ = f · W_dec + b_dec:  JumpReLU, no centre subtracted
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from cosae.errors import CosaeError, short
from cosae.interop.linear import Linear, is_plain, linear_sae
from cosae.io.untrusted import read_json, read_npz, read_safetensors, take, transposed
from cosae.sae.model import SAE

ARCHIVE, WEIGHTS, CONFIG = "params.npz", "params.safetensors", "config.json"
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
FOLDER = re.compile(r"layer_(\d+)/width_(\w+)/average_l0_(\d+)")
EMBEDDING = re.compile(r"(^|/)embedding(/|$)")


def read(path: str | Path) -> SAE:
    """The SAE in a folder of Gemma Scope's, or in its params file. Raises CosaeError in one sentence."""
    path = Path(path)
    file = path
    if path.is_dir():
        file = path / ARCHIVE if (path / ARCHIVE).is_file() else path / WEIGHTS
    state = read_npz(file) if file.suffix == ".npz" else read_safetensors(file)
    lower = {name.lower(): value for name, value in state.items()}
    enc_DF, bias_F, decoder_FD, centre_D, theta_F = (
        t.float() if t.is_floating_point() else t for t in take(lower, NAMES, file)
    )
    rows_FD = transposed(enc_DF, "W_enc", file)
    config = read_json(file.parent / CONFIG) if (file.parent / CONFIG).is_file() else {}
    _check(config, file.parent, lower)
    if EMBEDDING.search(file.parent.as_posix()):  # scaled as the model scales its embeddings: by the root of the width
        rows_FD, decoder_FD = rows_FD / len(enc_DF) ** 0.5, decoder_FD * len(enc_DF) ** 0.5
    found = FOLDER.search(file.parent.as_posix())
    metadata: dict[str, Any] = {"format": "gemma_scope"}
    if found:
        metadata |= {"layer": int(found[1]), "l0_published": int(found[3])}
    names = {"model_name": "model", "hf_hook_point_in": "hf_hook_name", "layer": "layer", "l0": "l0_published"}
    metadata |= {ours: config[theirs] for theirs, ours in names.items() if is_plain(config.get(theirs))}
    k = max(int(found[3]), 1) if found else None  # the average L0 that the folder is named after
    return linear_sae(
        Linear(rows_FD, bias_F, decoder_FD, centre_D, "jumprelu", k, theta_F, centred=False), str(file), metadata
    )


def _check(config: dict[str, Any], folder: Path, state: dict[str, Tensor]) -> None:
    kind = config.get("type", "sae")
    if str(kind) not in ("sae", "SAE") or "affine_skip_connection" in state:
        kind = "transcoder" if kind in ("sae", "SAE") else short(kind)
        raise CosaeError(f"{folder} holds a {kind}: cosae reads autoencoders only.")
    if "scaling_factor" in state and not bool((state["scaling_factor"] == 1).all()):
        raise CosaeError(f"{folder} holds a scaling_factor of finetuned features, which cosae does not express.")
    architecture = str(config.get("architecture", "jump_relu")).replace("_", "").lower()
    if architecture != "jumprelu":
        raise CosaeError(f"{folder}: architecture must be jump_relu. Got {short(config['architecture'])} instead.")
