"""`cosae.load_dictionary`: dictionary_learning's function of that name, for every format that cosae reads.

One difference is meant: an all-zero row of x is padding, encodes to nothing and reconstructs to the centre.
"""

from __future__ import annotations

import copy
import math
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.interop.dictionary_learning.read import CONFIG, WEIGHTS
from cosae.interop.linear import check_autoencoder
from cosae.interop.read import read_sae
from cosae.io.untrusted import read_json
from cosae.sae.fold import fold_input_scale
from cosae.sae.model import SAE


class Dictionary(nn.Module):
    """A cosae SAE with the methods of dictionary_learning's `Dictionary`; features are dense.

    activation_dim and dict_size are its widths; dict_class is their class's name, or "cosae.SAE".
    """

    def __init__(self, sae: SAE, dict_class: str = "cosae.SAE") -> None:
        super().__init__()
        check_autoencoder(sae, "dictionary_learning's objects")
        self.sae, self.dict_class = sae, dict_class
        self.activation_dim, self.dict_size = sae.d_in, sae.d_sae

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        k: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> Dictionary:
        """From their `ae.pt`, whose config.json lies beside it, or any path that cosae reads. Raises CosaeError."""
        path = Path(path)
        found, _config = load_dictionary(path.parent if path.name == WEIGHTS else path, device or "cpu")
        if k is not None and k != found.sae.k:
            raise CosaeError(f"{path}: k is {found.sae.k} there. Got {k} instead.")
        return found.to(dtype=dtype)

    @property
    def k(self) -> Tensor:
        """() int32."""
        return torch.tensor(self.sae.k, dtype=torch.int32)

    @property
    def threshold(self) -> Tensor:
        """() or (dict_size,): theirs by name; −1 where nothing was set."""
        if self.sae.cfg.selector == "topk":
            return torch.tensor(float(self.sae.metadata.get("topk_threshold", -1.0)), device=self.sae.device)
        return torch.nan_to_num(self.sae.threshold, nan=-1.0)

    @property
    def encoder(self) -> SimpleNamespace:
        """weight (dict_size, activation_dim), bias (dict_size,): for looking."""
        return SimpleNamespace(weight=self.sae.score.rows_FD, bias=self.sae.b_enc)

    @property
    def decoder(self) -> SimpleNamespace:
        """weight (activation_dim, dict_size): for looking."""
        return SimpleNamespace(weight=self.sae.W_dec.T, bias=None)

    W_enc, W_dec = property(attrgetter("sae.W_enc")), property(attrgetter("sae.W_dec"))
    b_enc, b_dec = property(attrgetter("sae.b_enc")), property(attrgetter("sae.b_dec"))

    def encode(
        self,
        x: Tensor,
        return_active: bool = False,
        use_threshold: bool | None = None,
        *,
        return_topk: bool = False,
        return_gate: bool = False,
        normalize_decoder: bool = False,
        output_pre_jump: bool = False,
    ) -> Any:
        """x (..., activation_dim) → features (..., dict_size), by the rule that decides at inference.

        use_threshold     True: positive scores above `threshold`; False: the k·B best of the batch (batch_topk), or
                          the k best of each row; top-k classes. None, the default: what the SAE's own selector does
        return_active     (features, (dict_size,) bool of those that fired, positive scores); batch top-k classes
        return_topk       (features, k best values, their ids, positive scores); AutoEncoderTopK
        return_gate       (features, ReLU of the gate's score); GatedAutoEncoder
        normalize_decoder features times decoder lengths
        output_pre_jump   (features, scores); JumpReluAutoEncoder

        Raises CosaeError where an option is not this SAE's.
        """
        features = self._features(x, use_threshold)
        if normalize_decoder:
            features = features * self.sae.W_dec.norm(dim=-1)
        if not (return_active or return_topk or return_gate or output_pre_jump):
            return features
        score = self._scores(x)
        if return_gate:
            if self.sae.cfg.selector != "gated":
                raise CosaeError(f"return_gate is for gated SAEs. Got one of {self.sae.cfg.selector}.")
            return features, (score - torch.nan_to_num(self.sae.threshold, nan=0.0)).relu()
        if output_pre_jump:
            return features, score
        positive = score.relu()
        if return_topk:
            best = positive.topk(self.sae.k, dim=-1, sorted=False)
            return features, best.values, best.indices, positive
        return features, features.reshape(-1, self.dict_size).sum(0) > 0, positive

    def _scores(self, x: Tensor) -> Tensor:
        """(..., dict_size) what theirs calls features before they are chosen; 0 for rows of zeros."""
        if self.sae.value_exponent is not None:
            raise CosaeError(
                "an SAE with a value exponent chooses features by other numbers than their values: leave out "
                "return_active, return_topk, return_gate, output_pre_jump and use_threshold."
            )
        return torch.nan_to_num(self.sae.scores(x), neginf=0.0)

    def _features(self, x: Tensor, use_threshold: bool | None) -> Tensor:
        selector = self.sae.cfg.selector
        if use_threshold is None or use_threshold == (selector == "batch_topk" and self.sae.calibrated):
            return self.sae.encode(x).to_dense()
        if selector not in ("batch_topk", "topk"):
            raise CosaeError(f"use_threshold is for batch_topk and topk SAEs. Got one of {selector}.")
        positive = self._scores(x).relu()
        if use_threshold:
            return positive * (positive > self.threshold)
        flat = positive.flatten()
        best = flat.topk(min(self.sae.k * (positive.numel() // self.dict_size), flat.numel()), sorted=False)
        return torch.zeros_like(flat).scatter(-1, best.indices, best.values).reshape(positive.shape)

    def decode(self, f: Tensor, normalize_decoder: bool = False) -> Tensor:
        """Features → reconstruction. An SAE that takes the norm out needs it: use `forward`, or `sae.decode`."""
        return self.sae.decode(f / self.sae.W_dec.norm(dim=-1) if normalize_decoder else f)

    def forward(
        self,
        x: Tensor,
        output_features: bool = False,
        ghost_mask: Tensor | None = None,
        normalize_decoder: bool = False,
    ) -> Any:
        """Reconstruction, or (reconstruction, features) with output_features=True.

        AutoEncoderNew gives its features times the decoder's lengths here, as theirs does. Raises CosaeError for
        ghost_mask, which is for training.
        """
        if ghost_mask is not None:
            raise CosaeError("ghost_mask is for training dictionary_learning's own classes: leave it out.")
        codes = self.sae.encode(x)
        x_hat = self.sae.decode(codes)
        if not output_features:
            return x_hat
        scaled = normalize_decoder or self.dict_class == "AutoEncoderNew"
        return x_hat, codes.to_dense() * (self.sae.W_dec.norm(dim=-1) if scaled else 1.0)

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """For activations that are `scale` times as long: features and reconstructions grow with them.

        Biases, centre and thresholds times scale; a cosine's log-gain b += (1 − a) ln scale. Raises CosaeError unless
        scale is finite and positive.
        """
        if not (math.isfinite(scale) and scale > 0):
            raise CosaeError(f"scale must be a positive number. Got {scale!r} instead.")
        sae = copy.deepcopy(self.sae)
        sae = fold_input_scale(sae, 1.0 / scale)
        if sae.cfg.frame == "raw":
            if not sae.cfg.norm_restoring:
                sae.decoder.rows_FD.div_(scale)
            sae.score.scale_content_(sae.W_dec.new_full((sae.d_sae,), scale))
            if sae.score.bias_F is not None:
                sae.score.bias_F.mul_(scale)
            if sae.cfg.selector == "jumprelu":
                sae.selector.log_threshold_F.add_(math.log(scale))
            else:
                sae.selector.threshold = sae.selector.threshold * scale
            if sae.cfg.selector == "gated":
                sae.selector.b_mag_F.mul_(scale)
            if "topk_threshold" in sae.metadata and sae.metadata["topk_threshold"] >= 0:
                sae.metadata["topk_threshold"] *= scale
        self.sae = sae.requires_grad_(False)


def load_dictionary(base_path: str | Path, device: str | torch.device = "cpu") -> tuple[Dictionary, dict[str, Any]]:
    """Drop-in for dictionary_learning's function of that name: (dictionary, config), for their folders and all others.

    config is their config.json, or one made from the SAE's metadata. Raises CosaeError where the folder holds no SAE.
    """
    folder = Path(base_path)
    sae = read_sae(folder, device=device)
    sae.requires_grad_(False)
    if sae.metadata.get("format") == "dictionary_learning" and (folder / CONFIG).is_file():
        return Dictionary(sae, str(sae.metadata["dict_class"])), read_json(folder / CONFIG)
    trainer = {"dict_class": "cosae.SAE", "activation_dim": sae.d_in, "dict_size": sae.d_sae, "k": sae.k}
    names = {"lm_name": "model", "submodule_name": "hf_hook_name", "layer": "layer"}
    trainer |= {theirs: sae.metadata.get(ours) for theirs, ours in names.items()} | {"trainer_class": None}
    return Dictionary(sae), {"trainer": trainer, "buffer": {"ctx_len": sae.metadata.get("context")}}
