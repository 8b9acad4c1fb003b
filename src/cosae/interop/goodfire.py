"""Goodfire's files (`….pth`): ReLU SAEs as one state dict, or the folder that holds one.

f = ReLU(x · W_encᵀ + b_enc);  x̂ = f · W_decᵀ + b_dec
"""

from __future__ import annotations

from pathlib import Path

import torch

from cosae.errors import CosaeError
from cosae.interop.linear import Linear, linear_sae
from cosae.io.untrusted import read_pickled, take, tensors, transposed
from cosae.sae.model import SAE

SUFFIX = ".pth"
NAMES = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")


def read(path: str | Path) -> SAE:
    """The SAE in a file of Goodfire's. Raises CosaeError in one sentence."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob(f"*{SUFFIX}"))
        if len(files) != 1:
            raise CosaeError(f"{path} must hold one {SUFFIX} file. Got {len(files)} instead: name one.")
        path = files[0]
    rows_FD, bias_F, decoder_DF, centre_D = (
        t.float() if t.is_floating_point() else t for t in take(tensors(read_pickled(path), path), NAMES, path)
    )
    decoder_FD = transposed(decoder_DF, "decoder_linear.weight", path)
    weights = Linear(rows_FD, bias_F, decoder_FD, centre_D, "jumprelu", None, torch.zeros(()), centred=False)
    return linear_sae(weights, str(path), {"format": "goodfire"})
