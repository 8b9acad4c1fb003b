"""SAELens inference classes. Imports sae_lens: import `cosae.interop.saelens.plugin`, which says so when it is absent.

Enters x (..., d_in) of any float dtype; leave feature_acts (..., d_sae) and reconstructions in the SAE's dtype.

    CosineJumpReLUSAE   `cosine_jumprelu`: f = s · 1[s > θ_i], raw frame, every score of `cosine.JUMPRELU_SCORES`
    CosaeSAE            `cosae`, `cosae_SCORE_SELECTOR`: whatever cosae.SAE is (frames, selectors, norm restoring)

What SAELens' own methods would get wrong is overridden here: folds scale b and not encoder columns (which a cosine
normalises), all-zero rows encode to nothing, norms and scores are fp32 whatever the dtype of the weights, and a, b,
biases, centres and thresholds stay float32 when the SAE is cast to half precision.
"""

# mypy: disallow-subclassing-any=False, warn-return-any=False
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sae_lens  # type: ignore[import-not-found]
import torch
from torch import Tensor, nn

from cosae.errors import CosaeError, check_choice
from cosae.interop.saelens import cosine, folds
from cosae.interop.saelens.dense import HALF, dense_codes, dense_scores, dense_terms
from cosae.io.legacy import upgrade
from cosae.sae import file, fold, frame
from cosae.sae.config import SAEConfig as OwnConfig
from cosae.sae.decoder import LENGTH_MIN, Decoder
from cosae.sae.model import SAE
from cosae.sae.score import SCORES, sqrt_d_gain
from cosae.types import Framed, NormStats, at_least_fp32

WIDE = ("W_enc", "W_dec")
"""The only weights that may be held in half precision."""
if TYPE_CHECKING:
    Mixin = Any
else:
    Mixin = object


class Precise(Mixin):
    """For every class of ours: half precision only for WIDE, framing in fp32, files that lose nothing. A mixin."""

    def _frame(self, x: Tensor, kind: str = "raw") -> tuple[Framed, tuple[int, ...]]:
        """x (..., d_in) → Framed (B, d_in) fp32 or float64, and the leading shape."""
        x = self.hook_sae_input(self.reshape_fn_in(x.to(torch.promote_types(self.b_dec.dtype, torch.float32))))
        return frame.normalize(kind, x.reshape(-1, x.shape[-1]), self.b_dec), tuple(x.shape[:-1])

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """x − b_dec, fp32 at least; half precision would lose the direction of long vectors."""
        framed, lead = self._frame(sae_in)
        return framed.z_BD.reshape(*lead, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: value.data for name, value in self._parameters.items() if name not in WIDE}
        buffers = dict(self._buffers)
        out = super()._apply(fn, recurse)
        if self.W_dec.dtype in HALF:
            for name, value in before.items():
                self._parameters[name].data = at_least_fp32(value.to(self.W_dec.device))
            self._buffers.update({name: value.to(self.W_dec.device) for name, value in buffers.items()})
        return out

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Refuses tensors that were rounded on the way in. Raises CosaeError."""
        rounded = sorted(name for name, value in state_dict.items() if name not in WIDE and value.dtype in HALF)
        if names := ", ".join(rounded):
            raise CosaeError(f'{names} came in half precision: load with dtype="float32", then .to(torch.bfloat16).')
        super().process_state_dict_for_loading(state_dict)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """As SAELens saves; cfg.json says float32 for half-precision weights, so that reading rounds nothing more."""
        with self._read_back_as_float32():
            return super().save_model(path)

    @contextlib.contextmanager
    def _read_back_as_float32(self) -> Iterator[None]:
        dtype = self.cfg.dtype
        if "16" in dtype:
            self.cfg.dtype = "float32"
        try:
            yield
        finally:
            self.cfg.dtype = dtype

    @torch.no_grad()
    def _change(self, changed: Mapping[str, Tensor]) -> None:
        """Write weights in place; one that is new or of another shape (a shared b became one per feature) is put in."""
        for name, value in changed.items():
            old = self._parameters.get(name)
            if old is not None and old.shape == value.shape:
                old.data.copy_(value)
            else:
                learned = old is None or old.requires_grad
                setattr(self, name, nn.Parameter(value.to(self.b_dec.device), requires_grad=learned))

    def fold_W_dec_norm(self) -> None:
        """Unit decoder rows; the same reconstructions. Raises what fold_and_get_W_dec_norm raises."""
        self.fold_and_get_W_dec_norm()

    def fold_activation_whitening(self, *_: Any, **__: Any) -> None:
        """Always raises CosaeError: a whitening changes angles."""
        raise CosaeError('a whitening cannot be folded into a cosine score: train with normalize_activations="none".')


class CosineScored(Precise):
    """W_enc, W_dec, b_enc, b_dec, scale_a, scale_b and dense raw-frame scores for a SAELens class. A mixin."""

    def initialize_weights(self) -> None:
        """What the SAELens class makes, then scale_a, scale_b and b_enc; runs on the meta device when loading."""
        super().initialize_weights()
        family = SCORES[self.cfg.score]
        if family.row_power == 0:
            owners = (family.exponent_owner, family.gain_owner)
            for name, owner, start in zip(("scale_a", "scale_b"), owners, _starts(self.cfg), strict=True):
                shape = () if owner in ("fixed", "shared") else (self.cfg.d_sae,)
                value = torch.full(shape, start, dtype=at_least_fp32(self.b_dec).dtype, device=self.device)
                setattr(self, name, nn.Parameter(value, requires_grad=owner != "fixed"))
        for name, value in self._parameters.items():
            if name not in WIDE and value.dtype in HALF:
                value.data = value.data.float()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Takes scale_a and scale_b in either of their shapes, () or (d_sae,): a fold changes it."""
        super().process_state_dict_for_loading(state_dict)
        for name in ("scale_a", "scale_b"):
            value = state_dict.get(name)
            if value is None or name not in self._parameters or value.shape == self._parameters[name].shape:
                continue
            if tuple(value.shape) not in ((), (self.cfg.d_sae,)):
                raise CosaeError(f"{name} must have shape () or ({self.cfg.d_sae},). Got {tuple(value.shape)} instead.")
            old = self._parameters[name]
            setattr(self, name, nn.Parameter(torch.empty_like(value, device=old.device), old.requires_grad))

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scores, live): (..., d_sae) fp32 after hook_sae_acts_pre, 0 for all-zero rows of x; (..., 1) bool."""
        framed, lead = self._frame(x)
        score_BF = dense_scores(dense_terms(framed, self.cfg.score, self._parameters))[1]
        score: Tensor = self.hook_sae_acts_pre(score_BF.reshape(*lead, -1))
        return score, framed.live_B.reshape(*lead, 1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """feature_acts (..., d_sae) → reconstruction (..., d_in) in the SAE's dtype."""
        x_hat: Tensor = super().decode(feature_acts.to(self.W_dec.dtype))
        return x_hat.to(self.dtype)

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """`b += a ln s; W_dec, b_dec / s`. Raises CosaeError unless s is finite and positive."""
        self._change(folds.fold_input_scale(self._parameters, self.cfg.score, float(scaling_factor)))
        self.cfg.normalize_activations = "none"

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """`b += ln n; b_enc, threshold · n; W_dec / n`; returns n (d_sae,), fp32."""
        norm_F = torch.linalg.vector_norm(at_least_fp32(self.W_dec.data), dim=-1).clamp_min(folds.NORM_MIN)
        self._change(folds.fold_decoder_norm(self._parameters, self.cfg.score))
        return norm_F


def _starts(cfg: Any) -> tuple[float, float]:
    """(a, b) that training starts from: fixed ones, else cfg.a_init and cfg.b_init, b_init None being ½ ln d."""
    family = SCORES[cfg.score]
    a = float(getattr(cfg, "a_init", 0.0)) if family.exponent is None else family.exponent
    b_init = getattr(cfg, "b_init", None)
    b = sqrt_d_gain(cfg.d_in) if b_init is None else float(b_init)
    return a, 0.0 if family.gain_owner == "fixed" else b


@dataclass
class CosineJumpReLUSAEConfig(sae_lens.JumpReLUSAEConfig):
    """Configuration of CosineJumpReLUSAE. Raises CosaeError on a value that is not allowed."""

    score: str = "cosine"
    """One of cosae.interop.saelens.cosine.JUMPRELU_SCORES: those without a value exponent."""
    k: float | None = None
    """Mean active features per token it was trained for, where known."""
    n_groups: int = 4
    """Blocks of features that share a and b, for cosine_grouped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, ("none", "expected_average_only_in"))

    @classmethod
    def architecture(cls) -> str:
        return cosine.JUMPRELU


def check(cfg: Any, allowed: tuple[str, ...], scores: tuple[str, ...] = cosine.JUMPRELU_SCORES) -> None:
    """Raises CosaeError for a score that is not there or a convention a cosine score cannot express."""
    check_choice("score", cfg.score, scores)
    cosine.check_conventions(vars(cfg) | {"architecture": cfg.architecture()}, allowed)


class CosineJumpReLUSAE(CosineScored, sae_lens.JumpReLUSAE):
    """f = s · 1[s > θ_i] with s = exp(b) r^a |w|^u κ + β, κ the cosine around b_dec."""

    cfg: CosineJumpReLUSAEConfig

    def encode(self, x: Tensor) -> Tensor:
        """x (..., d_in) → feature_acts (..., d_sae) in the SAE's dtype; all-zero rows give zeros."""
        score, live = self._scores(x)
        acts = self.activation_fn(torch.where((score > self.threshold) & live, score, 0.0))
        return self.hook_sae_acts_post(acts.to(self.dtype))


@dataclass
class CosaeSAEConfig(sae_lens.SAEConfig):
    """Configuration of CosaeSAE: the sections of cosae's own cfg.json. Raises CosaeError on a damaged one.

    sae: every field of cosae.SAEConfig; facts: `provenance` as files of cosae 0.1 call it.
    """

    sae: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.provenance, self.facts = self.provenance or upgrade(self.facts), {}
        cosine.check_conventions(vars(self) | {"architecture": self.architecture()})
        _ = self.own

    @property
    def own(self) -> OwnConfig:
        """What cosae makes of section `sae`."""
        sections = {"architecture": self.architecture(), "sae": self.sae, "d_in": self.d_in, "d_sae": self.d_sae}
        try:
            return cosine.own_config(sections)
        except TypeError as error:
            raise CosaeError(f"section 'sae' of the configuration is not cosae's: {error}.") from None

    @classmethod
    def architecture(cls) -> str:
        """The name it is saved under; files that cosae wrote say cosae_SCORE_SELECTOR and are registered too."""
        return cosine.GENERIC


class CosaeSAE(Precise, sae_lens.SAE):
    """Any cosae SAE as SAELens sees one: parameters by their names on disk, dense scores between the hooks.

    `unit` and `layer_norm` frames and norm-restoring decoders put back what `encode` took out of its last x: there
    each `decode` needs an `encode` of the same tokens before it.
    """

    cfg: CosaeSAEConfig

    def initialize_weights(self) -> None:
        """Parameters that every file of this configuration has; runs on the meta device when loading."""
        super().initialize_weights()
        self._taken: NormStats | None = None
        self.b_dec: nn.Parameter = nn.Parameter(at_least_fp32(self.W_dec.data[0] * 0))
        for name, ours in cosine.OUR_NAMES.items():
            if self.cfg.metadata.get(name) is None and self.cfg.provenance.get(ours) is not None:
                self.cfg.metadata[name] = self.cfg.provenance[ours]
        own = self.cfg.own
        with torch.device("meta"):
            shapes = file.shapes(SAE(own))
        for name, (allowed, needed) in shapes.items():
            if needed and name not in ("W_enc", "W_dec", "b_dec"):
                start = sqrt_d_gain(own.sizes[0]) if name == "scale_b" and own.score != "inner_unit" else 0.0
                value = torch.full(allowed[-1], start, dtype=self.b_dec.dtype, device=self.device)
                setattr(self, name, nn.Parameter(value))

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Checks every tensor as `cosae.load` does and makes room for the optional ones. Raises CosaeError."""
        super().process_state_dict_for_loading(state_dict)
        cosine.assemble(self._described(), state_dict, "the state dict")
        for name in sorted(set(self._parameters) - set(state_dict)):
            delattr(self, name)
        for name, value in state_dict.items():
            if name not in self._parameters or self._parameters[name].shape != value.shape:
                setattr(self, name, nn.Parameter(torch.empty_like(value, device=self.b_dec.device)))

    def _described(self) -> dict[str, Any]:
        cfg = self.cfg
        return {"architecture": cfg.architecture(), "sae": cfg.sae, "d_in": cfg.d_in, "d_sae": cfg.d_sae}

    def encode(self, x: Tensor) -> Tensor:
        """x (..., d_in) → feature_acts (..., d_sae) in the SAE's dtype, by cosae's inference rule."""
        own = self.cfg.own
        framed, lead = self._frame(x, own.frame)

        def hook(value_BF: Tensor) -> Tensor:
            return self.hook_sae_acts_pre(value_BF.reshape(*lead, -1)).reshape(value_BF.shape)

        acts_BF = dense_codes(own, framed, self._parameters, hook)
        self._taken = framed.norm_stats
        return self.hook_sae_acts_post(acts_BF.reshape(*lead, -1).to(self.dtype))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """feature_acts (..., d_sae) → reconstruction (..., d_in) in the SAE's dtype.

        Raises CosaeError where a norm has to be put back and no `encode` of as many tokens came just before.
        """
        own = self.cfg.own
        rows_FD = at_least_fp32(self.W_dec)
        acts_BF = feature_acts.reshape(-1, feature_acts.shape[-1]).to(rows_FD.dtype)
        norm_stats = None
        if own.frame != "raw" or own.norm_restoring:
            norm_stats, self._taken = self._taken, None
            if norm_stats is None or len(norm_stats.r_B) != len(acts_BF):
                before = "no encode" if norm_stats is None else f"an encode of {len(norm_stats.r_B)}"
                raise CosaeError(f"encode the same tokens before each decode. Got {len(acts_BF)} rows after {before}.")
        if own.norm_restoring:
            assert norm_stats is not None
            norm_F = torch.linalg.vector_norm(rows_FD, dim=-1).clamp_min(LENGTH_MIN)
            recon_BD = Decoder._restore((acts_BF / norm_F) @ rows_FD, norm_stats.r_B)
        else:
            recon_BD = acts_BF @ rows_FD
        x_hat_BD = frame.denormalize(own.frame, recon_BD, norm_stats, self.b_dec)
        x_hat = self.hook_sae_recons(x_hat_BD.reshape(*feature_acts.shape[:-1], -1))
        return self.reshape_fn_out(x_hat.to(self.dtype), self.d_head)

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """cosae's own fold (cosae.sae.fold): old lengths (d_sae,), fp32. Raises CosaeError for a zero row."""
        norm_F: Tensor = torch.linalg.vector_norm(at_least_fp32(self.W_dec.data), dim=-1)
        self._change(file.to_disk(fold.fold_decoder_norm(self._whole())))
        return norm_F

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """An SAE for x out of one of s · x (cosae.sae.fold)."""
        self._change(file.to_disk(fold.fold_input_scale(self._whole(), float(scaling_factor))))

    def _whole(self) -> SAE:
        return cosine.assemble(self._described(), self.state_dict(), "the SAE")
