"""Run by an environment with a real package: FORMAT PLACE SKIP. Loads PLACE/ours, and saves one that cosae reads.

Prints {"written": its outputs of what cosae wrote, "read": the largest relative difference of what it wrote}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosae.interop.read import read_sae

D, F, K = 12, 40, 4


def random(module: Any) -> Any:
    g = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        size = 0.3 if parameter.ndim == 1 else 1.0
        parameter.data = (size * torch.randn(parameter.shape, generator=g)).to(parameter.dtype)
    return module


def sparsify(place: Path, skip: bool) -> tuple[Any, Any, Path]:
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=F, k=K, transcode=True, skip_connection=skip)
    theirs = random(SparseCoder(D, config))
    theirs.save_to_disk(place / "layers.3.mlp")
    return (
        lambda x: SparseCoder.load_from_disk(place / "ours").forward(x).sae_out,
        lambda x: theirs.forward(x).sae_out,
        place / "layers.3.mlp",
    )


def saelens(place: Path, skip: bool) -> tuple[Any, Any, Path]:
    from sae_lens import SAE
    from sae_lens.saes.transcoder import (
        JumpReLUSkipTranscoder,
        JumpReLUSkipTranscoderConfig,
        JumpReLUTranscoder,
        JumpReLUTranscoderConfig,
    )

    plain, skipping = (
        (JumpReLUTranscoder, JumpReLUTranscoderConfig),
        (
            JumpReLUSkipTranscoder,
            JumpReLUSkipTranscoderConfig,
        ),
    )
    kind, config = skipping if skip else plain
    theirs = random(kind(config(d_in=D, d_sae=F, d_out=D, apply_b_dec_to_input=False)))
    theirs.threshold.data.abs_()
    theirs.save_model(place / "theirs")
    return lambda x: SAE.load_from_disk(place / "ours")(x), theirs, place / "theirs"


def circuit_tracer(place: Path, skip: bool) -> tuple[Any, Any, Path]:
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, load_transcoder_set

    theirs = random(SingleLayerTranscoder(D, F, JumpReLU(torch.zeros(F)), 3, skip, dtype=torch.float32))
    theirs.activation_function.threshold.data.abs_()
    (place / "theirs").mkdir()
    theirs.to_safetensors(str(place / "theirs" / "layer_3.safetensors"))

    def ours(x: Tensor) -> Tensor:
        file = str(place / "ours" / "layer_3.safetensors")
        loaded = load_transcoder_set({0: file}, "scan", "mlp.hook_in", "hook_mlp_out", dtype=torch.float32)
        return loaded[0](x)

    return ours, theirs, place / "theirs" / "layer_3.safetensors"


if __name__ == "__main__":
    format, place, skip = sys.argv[1], Path(sys.argv[2]), bool(int(sys.argv[3]))
    ours, theirs, saved = globals()[format](place, skip)
    x = 0.7 + torch.randn(400, D, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        mine, wanted = read_sae(saved)(x), theirs(x)
        written = ours(x[:64]).tolist()
    print(json.dumps({"written": written, "read": float((mine - wanted).abs().max() / wanted.abs().max())}))
