"""SAELens training classes with cosine scores. Imports sae_lens: come in through `cosae.interop.saelens.plugin`.

Leaves feature_acts and hidden_pre (B, d_sae), fp32. Losses, selectors, threshold averages and decoders are SAELens'
own; only the score is ours (cosae.interop.saelens.inference.CosineScored):

    CosineBatchTopKTrainingSAE             cosine_batchtopk              saved for inference as cosine_jumprelu
    CosineMatryoshkaBatchTopKTrainingSAE   cosine_matryoshka_batchtopk   saved for inference as cosine_jumprelu
    CosineJumpReLUTrainingSAE              cosine_jumprelu               saved for inference as cosine_jumprelu
    CosineTopKTrainingSAE                  cosine_topk                   saved for inference as cosae

Two deviations, both so that a short run exports what it trained: the threshold average of batch top-k starts at the
first batch's value and not at 0 (paper §2), and decoder rows start at length 1, the scale that b's start assumes.
"""

# mypy: disallow-subclassing-any=False, warn-return-any=False
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import (  # type: ignore[import-not-found]
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.jumprelu_sae import JumpReLU  # type: ignore[import-not-found]
from torch import Tensor

from cosae.errors import CosaeError
from cosae.interop.saelens import cosine, folds
from cosae.interop.saelens.inference import CosaeSAEConfig, CosineJumpReLUSAEConfig, CosineScored, Mixin, check
from cosae.sae.config import SAEConfig

TRAINED_SCORES = ("inner_unit", "cosine_fixed", "cosine", "cosine_per_feature")
"""Scores that can be trained in SAELens; `inner` is SAELens' own batchtopk, the rest needs cosae.fit."""


def check_training(cfg: Any) -> None:
    """Raises CosaeError for a score, dtype or convention that cannot be trained here."""
    check(cfg, ("none", "expected_average_only_in"), TRAINED_SCORES)
    if cfg.dtype.removeprefix("torch.") not in ("float32", "float64"):
        raise CosaeError(f"dtype must be float32 or float64 (autocast=True for bfloat16 products). Got {cfg.dtype!r}.")


class CosineTraining(CosineScored):
    """Score, folds and export of the training classes. A mixin."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., d_in) → (feature_acts, hidden_pre), each (..., d_sae); all-zero rows give zeros."""
        hidden_pre, live = self._scores(x)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * torch.linalg.vector_norm(self.W_dec, dim=-1)
        hidden_pre = hidden_pre * live
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """`b += ln n; b_enc · n; W_dec / n`. Raises CosaeError where that would change what top-k chooses."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            raise CosaeError("a fold would change what top-k chooses: fold the saved inference SAE instead.")
        return super().fold_and_get_W_dec_norm()

    def decode(self, feature_acts: Tensor) -> Tensor:
        """SAELens' own: sparse activations pass as they are."""
        return super(CosineScored, self).decode(feature_acts)

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Decoder norms folded where scores were scaled by them; one threshold per feature."""
        self.process_state_dict_for_saving(state_dict)
        if getattr(self.cfg, "rescale_acts_by_decoder_norm", False):
            state_dict.update(folds.fold_decoder_norm(state_dict, self.cfg.score))
        if "topk_threshold" in state_dict:
            step = state_dict.pop("topk_threshold").to(self.b_enc.dtype)
            state_dict["threshold"] = step.expand(self.cfg.d_sae).contiguous()

    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """As SAELens saves, with the numbers of the metadata that JSON can hold."""
        with self._read_back_as_float32():
            return super().save_inference_model(path)


@dataclass
class CosineTrainingConfig(Mixin):
    """What every configuration here adds to SAELens' own. A mixin; raises CosaeError on a value that is not allowed.

    score is one of TRAINED_SCORES; a learned b starts at b_init, None being ln(d_in) / 2.
    """

    score: str = "cosine"
    a_init: float = 0.0
    b_init: float | None = None
    decoder_init_norm: float | None = 1.0
    registered = ""
    n_groups = 4  # what the inference configuration asks for; no trained score has groups

    def __post_init__(self) -> None:
        super().__post_init__()
        check_training(self)

    @classmethod
    def architecture(cls) -> str:
        return cls.registered

    def get_inference_config_class(self) -> type[Any]:
        return CosineJumpReLUSAEConfig


@dataclass
class CosineBatchTopKTrainingSAEConfig(CosineTrainingConfig, BatchTopKTrainingSAEConfig):
    """Scores are scaled by decoder norms only if asked: SAELens' own top-k does it by default."""

    rescale_acts_by_decoder_norm: bool = False
    registered = cosine.BATCHTOPK


@dataclass
class CosineMatryoshkaBatchTopKTrainingSAEConfig(CosineTrainingConfig, MatryoshkaBatchTopKTrainingSAEConfig):
    rescale_acts_by_decoder_norm: bool = False
    registered = cosine.MATRYOSHKA


@dataclass
class CosineTopKTrainingSAEConfig(CosineTrainingConfig, TopKTrainingSAEConfig):
    rescale_acts_by_decoder_norm: bool = False
    registered = cosine.TOPK

    def get_inference_config_class(self) -> type[Any]:
        return CosaeSAEConfig

    @property
    def sae(self) -> dict[str, Any]:
        """Section `sae` of the inference configuration."""
        return SAEConfig(self.d_in, self.d_sae, score=self.score, selector="topk", k=self.k).to_dict()

    provenance = facts = property(lambda _: {})  # nothing that SAELens' metadata does not say


@dataclass
class CosineJumpReLUTrainingSAEConfig(CosineTrainingConfig, JumpReLUTrainingSAEConfig):
    """Bandwidth and first threshold are in units of scores, which start near √d_in times a cosine."""

    registered = cosine.JUMPRELU

    @property
    def k(self) -> float | None:
        """Features per token it aims at, where the sparsity loss has an aim."""
        return None if self.target_l0 is None else float(self.target_l0)


class StartedThreshold(Mixin):
    """SAELens' threshold average, started at the first batch's value instead of 0. A mixin."""

    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        """τ ← smallest kept value on first use, then SAELens' moving average."""
        positive = acts_topk[acts_topk > 0]
        if len(positive) and float(self.topk_threshold) == 0.0:
            self.topk_threshold: Tensor = positive.min().to(self.topk_threshold.dtype)
            return
        super().update_topk_threshold(acts_topk)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """The threshold goes on in double precision, as it was made."""
        super().process_state_dict_for_loading(state_dict)
        if "topk_threshold" in state_dict:
            state_dict["topk_threshold"] = state_dict["topk_threshold"].double()

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """The score's fold; a threshold in units of decoder norms shrinks with them."""
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            self.topk_threshold = self.topk_threshold / float(scaling_factor)


class CosineBatchTopKTrainingSAE(StartedThreshold, CosineTraining, BatchTopKTrainingSAE):
    """Batch top-k over cosine scores."""


class CosineMatryoshkaBatchTopKTrainingSAE(StartedThreshold, CosineTraining, MatryoshkaBatchTopKTrainingSAE):
    """Matryoshka prefixes with batch top-k over cosine scores."""


class CosineTopKTrainingSAE(CosineTraining, TopKTrainingSAE):
    """Top-k per token over cosine scores."""


class CosineJumpReLUTrainingSAE(CosineScored, JumpReLUTrainingSAE):
    """JumpReLU with trained thresholds over cosine scores."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., d_in) → (feature_acts, hidden_pre), each (..., d_sae); all-zero rows give zeros."""
        hidden_pre, live = self._scores(x)
        threshold = self.threshold.to(hidden_pre.dtype)
        acts = JumpReLU.apply(hidden_pre, threshold, self.bandwidth, self.cfg.jumprelu_ste_to_input) * live
        return self.hook_sae_acts_post(acts), hidden_pre
