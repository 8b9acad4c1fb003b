"""An inner-product SAE of another library, whatever it is called there → `cosae.SAE` with the same outputs.

Every such SAE scores s = ⟨w_i, x − c⟩ + β_i or s = ⟨w_i, x⟩ + β_i; the second is the first with ⟨c, w_i⟩ added to β_i.
What differs is which scores fire:

    ReLU               s > 0                       jumprelu, θ = 0
    JumpReLU           s > θ_i and s > 0           jumprelu
    threshold (t)      s > max(t, 0)               batch_topk, calibrated; −1 stands for "not set" and lets all pass
    TopK               k largest positive s        topk
    AbsTopK            k largest |s|               abs_topk
    Gated              π > 0, ReLU(e^ρ·content + m)  gated

Enters plain tensors, checked here; leaves fp32. Sums are made in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.sae.config import DTYPES, SAEConfig
from cosae.sae.model import SAE

NO_THRESHOLD = 1e-30
"""θ of a plain ReLU: JumpReLU keeps ln θ, and no score that fp32 tells from 0 lies below this."""
MOST_VALUE, MOST_LOG = 1e9, 80.0
"""Of weights, and of what an exponential is taken of: beyond it sums leave float32, and only damage is."""
GUESSED_K = 32
"""k of files that do not say one (ReLU, JumpReLU); recorded as a guess."""


@dataclass(frozen=True)
class Linear:
    """Weights of one SAE. rows_FD, decoder_FD (F, D); bias_F (F,); centre_D (D,), what the decoder adds.

    k          None where the file does not say
    threshold  () or (F,): θ of jumprelu, the inference threshold of batch_topk; None where there is none
    centred    whether the encoder subtracts the centre
    gate_mag   gated: (ρ (F,), β_mag (F,))
    out_O      of a transcoder: (D_out,) what its decoder adds, its rows then being (F, D_out); centre_D is what its
               encoder subtracts. None for an autoencoder
    skip_OD    of a transcoder: (D_out, D) the linear map of x that is added; None where there is none
    """

    rows_FD: Tensor
    bias_F: Tensor
    decoder_FD: Tensor
    centre_D: Tensor
    selector: str
    k: int | None = None
    threshold: Tensor | None = None
    centred: bool = True
    gate_mag: tuple[Tensor, Tensor] | None = None
    prefixes: tuple[int, ...] = ()
    out_O: Tensor | None = None
    skip_OD: Tensor | None = None


@torch.no_grad()
def linear_sae(weights: Linear, source: str, metadata: dict[str, Any]) -> SAE:
    """The SAE, with what is text or a number of `metadata`.

    Raises CosaeError naming `source` for shapes that do not fit or values that are not finite numbers.
    """
    d_sae, d_in = _check(weights, source)
    k = weights.k if weights.k is not None else min(GUESSED_K, d_sae)
    if not 1 <= k <= d_sae:
        raise CosaeError(f"{source}: k must lie between 1 and the {d_sae} features. Got {k} instead.")
    out_O, skip_OD = weights.out_O, weights.skip_OD
    widths: dict[str, Any] = {"d_out": None if out_O is None else len(out_O), "skip": skip_OD is not None}
    sae = SAE(SAEConfig(d_in, d_sae, "inner", weights.selector, k, prefixes=weights.prefixes, **widths))
    rows_FD, bias_F = weights.rows_FD.double(), weights.bias_F.double()
    magnitude = weights.gate_mag
    if not weights.centred:
        shift_F = rows_FD @ weights.centre_D.double()
        bias_F = bias_F + shift_F
        if magnitude is not None:
            magnitude = (magnitude[0], magnitude[1].double() + magnitude[0].double().exp() * shift_F)
    sae.score.rows_FD.copy_(rows_FD)
    assert sae.score.bias_F is not None
    sae.score.bias_F.copy_(bias_F)
    sae.decoder.rows_FD.copy_(weights.decoder_FD)
    sae.centre_D.copy_(weights.centre_D)
    if sae.target is not None and out_O is not None:
        sae.target.centre_O.copy_(out_O)
    if sae.target is not None and sae.target.skip_OD is not None and skip_OD is not None:
        sae.target.skip_OD.copy_(skip_OD)
    if weights.selector == "jumprelu":
        theta = torch.zeros(()) if weights.threshold is None else weights.threshold.double()
        sae.selector.log_threshold_F.copy_(theta.clamp_min(NO_THRESHOLD).log().expand(d_sae))
    elif weights.selector == "batch_topk" and weights.threshold is not None:
        sae.selector.threshold = weights.threshold.float().clamp_min(0.0).clone()
    elif weights.selector == "gated":
        assert magnitude is not None
        sae.selector.r_mag_F.copy_(magnitude[0])
        sae.selector.b_mag_F.copy_(magnitude[1])
        sae.selector.threshold = torch.zeros(())
    sae.metadata = {name: value for name, value in metadata.items() if is_plain(value)}
    if weights.k is None:
        sae.metadata["k_guessed"] = True
    return sae


def check_autoencoder(sae: SAE, where: str) -> None:
    """Raises CosaeError for a transcoder or crosscoder, which `where` (in words) has no place for."""
    if sae.target is not None or sae.cfg.sites:
        what = "crosscoder" if sae.cfg.sites else "transcoder"
        raise CosaeError(f"{where} are of SAEs that reconstruct one site, which they read, and this is a {what}.")


def is_plain(value: Any) -> bool:
    """Whether it is text or a number, which is taken over of other libraries' metadata."""
    return isinstance(value, str | int | float)


def _check(weights: Linear, source: str) -> tuple[int, int]:
    if weights.rows_FD.ndim != 2:
        raise CosaeError(f"{source}: the encoder must be a matrix. Got shape {tuple(weights.rows_FD.shape)} instead.")
    d_sae, d_in = weights.rows_FD.shape
    per_feature, gate = ((d_sae,),), weights.gate_mag or (None, None)
    d_out = d_in if weights.out_O is None else len(weights.out_O)
    shapes = {
        "encoder": (weights.rows_FD, ((d_sae, d_in),)),
        "encoder bias": (weights.bias_F, per_feature),
        "decoder": (weights.decoder_FD, ((d_sae, d_out),)),
        "decoder bias": (weights.centre_D, ((d_in,),)),
        "threshold": (weights.threshold, ((), (d_sae,))),
        "gate's ρ": (gate[0], per_feature),
        "magnitude bias": (gate[1], per_feature),
        "output bias": (weights.out_O, ((d_out,),)),
        "skip": (weights.skip_OD, ((d_out, d_in),)),
    }
    for name, (value, allowed) in shapes.items():
        if value is None:
            continue
        if (shape := tuple(value.shape)) not in allowed:
            options = " or ".join(map(str, allowed))
            raise CosaeError(f"{source}: the {name} must have shape {options}, as the encoder. Got {shape} instead.")
        if value.dtype not in DTYPES or value.is_meta or value.is_nested:
            raise CosaeError(f"{source}: the {name} must hold numbers of 16, 32 or 64 bits. Got {value.dtype} instead.")
        most = MOST_LOG if name == "gate's ρ" else MOST_VALUE
        if not bool((value.abs() <= most).all()):  # NaN is not
            raise CosaeError(f"{source}: the {name} holds NaN, infinity or more than {most:g}; the file is damaged.")
    if d_sae < 1 or d_in < 1:
        raise CosaeError(f"{source}: the encoder is empty, of shape {(d_sae, d_in)}.")
    return int(d_sae), int(d_in)
