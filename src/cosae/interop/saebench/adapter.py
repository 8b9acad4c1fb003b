"""A cosae SAE as SAEBench 0.6 wants to see one.

It has W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc, b_dec, device, dtype, cfg, dense `encode`, `decode`, `forward`.

SAEBench asks for decoder rows of unit length and casts an SAE to the model's dtype. Here cosae's own fold makes the
rows unit, in a copy: the SAE that was handed in stays as it is. What `.to(dtype)` casts are the tensors SAEBench looks
at; scores, norms and thresholds are computed from the copy, which stays in float32. All-zero rows (SAEBench zeroes
BOS and padding, then encodes them) encode to nothing, at any exponent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError, check_choice
from cosae.interop.linear import check_autoencoder
from cosae.interop.public import Public
from cosae.sae.fold import fold_decoder_norm
from cosae.sae.model import SAE

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class SAEBenchMetadata:
    """What SAELens keeps in `cfg.metadata` and SAEBench reads there."""

    model_name: str
    hook_name: str
    hook_layer: int
    hook_head_index: int | None = None
    context_size: int | None = None
    prepend_bos: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    exclude_special_tokens: bool = False
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None


@dataclass
class SAEBenchConfig:
    """The `cfg` SAEBench reads, writes into its results and sets fields on. `cosae`: our configuration and metadata."""

    model_name: str
    hook_name: str
    hook_layer: int
    d_in: int
    d_sae: int
    architecture: str
    dtype: str
    device: str
    context_size: int | None
    prepend_bos: bool
    seqpos_slice: tuple[int | None, ...]
    metadata: SAEBenchMetadata
    architecture_str: str = ""
    hook_head_index: int | None = None
    exclude_special_tokens: bool = False
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    normalize_activations: str = "none"
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    training_tokens: int = 0
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None
    cosae: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(json.loads(json.dumps(asdict(self))))  # tuples as lists, as JSON gives them back


class SAEBenchSAE(nn.Module):
    """A cosae SAE behind SAEBench's names.

    sae           calibrated; copied, never changed
    model_name    the model's name for SAEBench; default: what the SAE's metadata says
    hook_name     TransformerLens style (`blocks.12.hook_resid_post`) or cosae's (`resid_post.12`); default: the SAE's
    hook_layer    block of the hook; default: the number in hook_name
    context_size  tokens per prompt, for evals that ask the SAE
    dtype         of what goes out and of the tensors on show: SAEBench sets it by `.to(dtype=)`

    Raises CosaeError for an uncalibrated SAE, a decoder row of length zero, or a place that nobody named.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor

    def __init__(
        self,
        sae: SAE,
        *,
        model_name: str | None = None,
        hook_name: str | None = None,
        hook_layer: int | None = None,
        context_size: int | None = 128,
        prepend_bos: bool = True,
        seqpos_slice: tuple[int | None, ...] = (None,),
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not sae.calibrated:
            raise CosaeError("SAEBench encodes token by token: this SAE has no threshold yet: calibrate it first.")
        scored = fold_decoder_norm(sae).requires_grad_(False).eval()
        scored.to(sae.device if device is None else torch.device(device))
        self._scored = (scored,)  # in a tuple, so that .to(bfloat16) does not reach its weights
        self._present(_dtype(dtype))
        shown = {"context_size": context_size, "prepend_bos": prepend_bos, "seqpos_slice": seqpos_slice}
        self.cfg = _config(sae, model_name, hook_name, hook_layer, **shown)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)

    @property
    def sae(self) -> SAE:
        """The folded copy that computes, in float32."""
        return self._scored[0]

    device = property(attrgetter("W_dec.device"))
    dtype = property(attrgetter("W_dec.dtype"))

    @property
    def decodes_alone(self) -> bool:
        """Whether codes are all a reconstruction needs: raw frame, no norm restoring."""
        return self.sae.cfg.frame == "raw" and not self.sae.cfg.norm_restoring

    def encode(self, x: Tensor) -> Tensor:
        """x (..., d_in), any float dtype → dense codes (..., d_sae) in `dtype`; zero rows give zeros.

        Raises CosaeError for a wrong width and for activations that are not finite.
        """
        return self._outward(self.sae.encode(x).to_dense())

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Dense codes (..., d_sae) → x̂ (..., d_in) in `dtype`; all-zero codes give the centre.

        Raises CosaeError for a frame or decoder that needs more than codes (`decodes_alone`).
        """
        if not self.decodes_alone:
            kind = f"frame {self.sae.cfg.frame}, norm_restoring {self.sae.cfg.norm_restoring}"
            raise CosaeError(f"this SAE ({kind}) also needs the length of each token: use an eval that only encodes.")
        return self._outward(self.sae.decode(feature_acts.to(self.sae.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) → x̂ (..., d_in) in `dtype`; works for every SAE."""
        return self._outward(self.sae(x))

    def _outward(self, value: Tensor) -> Tensor:
        """In `dtype`, and finite: a sink's code can lie beyond float16."""
        largest = torch.finfo(self.dtype).max
        return value.clamp(-largest, largest).to(self.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SAEBenchSAE:
        """What `.to`, `.half`, `.cuda` come down to: moves the copy, casts only the tensors on show."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.sae.to(self.W_dec.device)
        self._present(self.W_dec.dtype)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        return self

    @torch.no_grad()
    def _present(self, dtype: torch.dtype) -> None:
        """W_enc, W_dec, b_enc, b_dec from the float32 copy, so that casting to and fro loses nothing."""
        sae = self.sae
        bias = sae.W_dec.new_zeros(sae.d_sae) if sae.b_enc is None else sae.b_enc
        for name, value in (("W_enc", sae.W_enc), ("W_dec", sae.W_dec), ("b_enc", bias), ("b_dec", sae.b_dec)):
            setattr(self, name, nn.Parameter(value.detach().to(dtype), requires_grad=False))


def tl_hook_name(hook_name: str) -> str:
    """`resid_post.3` → `blocks.3.hook_resid_post`; other names as they are."""
    short = re.fullmatch(r"(resid_pre|resid_post|attn_out|mlp_out)\.(\d+)", hook_name)
    return f"blocks.{short[2]}.hook_{short[1]}" if short else hook_name


def _config(
    sae: SAE, model_name: str | None, hook_name: str | None, hook_layer: int | None, **shown: Any
) -> SAEBenchConfig:
    check_autoencoder(sae, "SAEBench's measurements")
    model_name = model_name or sae.metadata.get("model")
    hook_name = hook_name or sae.metadata.get("hook_name") or sae.metadata.get("site")
    if not model_name or not hook_name:
        raise CosaeError("the SAE's metadata names no model or site: pass model_name and hook_name (resid_post.12).")
    hook_name = tl_hook_name(hook_name)
    digits = re.search(r"\d+", hook_name)
    if hook_layer is None and digits is None:
        raise CosaeError(f"hook_layer must be given where hook_name has no number. Got hook_name {hook_name!r}.")
    layer = int(digits[0]) if hook_layer is None and digits else int(hook_layer or 0)
    where = {"model_name": model_name, "hook_name": hook_name, "hook_layer": layer, **shown}
    architecture = f"cosae_{sae.cfg.score}_{sae.cfg.selector}"
    return SAEBenchConfig(
        **where,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        architecture=architecture,
        dtype="float32",
        device="cpu",
        metadata=SAEBenchMetadata(**where),
        architecture_str=architecture,
        activation_fn_str=sae.cfg.selector,
        training_tokens=int(sae.metadata.get("tokens") or 0),
        cosae={"sae": sae.cfg.to_dict(), "provenance": Public().metadata(sae.metadata)},
    )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    check_choice("dtype", str(dtype).removeprefix("torch."), DTYPES)
    return DTYPES[str(dtype).removeprefix("torch.")]
