"""SAE = frame + score + selector + decoder.

    x → frame → z → score → selector → codes → decoder → ẑ → frame⁻¹ → x̂

`encode`, `decode` and `forward` follow the inference rule and change nothing. `train_forward` follows the training
rule and hands back everything a loss needs. No method stores anything on the object between calls.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.kernels import Entries, Kernel, ScoreTerms, StepCache, choose
from cosae.sae import frame as frames
from cosae.sae.decoder import Decoder
from cosae.sae.score import SCORES, Score
from cosae.sae.selector import SELECTORS, Selection, Selector
from cosae.types import Codes, Framed, NormStats, at_least_fp32

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What activations may come in. Eight-bit floats have no arithmetic of their own."""


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is made of. Raises CosaeError on a value that is not allowed."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of features."""
    score: str = "cosine"
    """One of cosae.sae.score.SCORES."""
    selector: str = "batch_topk"
    """One of cosae.sae.selector.SELECTORS."""
    k: int = 32
    """Mean active features per token (per token exactly for topk and abs_topk)."""
    frame: str = "raw"
    """What is scored and reconstructed: raw, unit or layer_norm."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka prefixes, ascending feature counts; d_sae is added at the end. Empty: one reconstruction."""
    norm_restoring: bool = False
    """Give the reconstruction of z the length of z."""
    n_groups: int = 4
    """Blocks of features that share a and b, for cosine_grouped."""
    bias: bool = True
    """Whether scores have a bias β."""
    bandwidth: float = 0.5
    """JumpReLU: width of the gradient window around θ, relative to θ."""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k", "n_groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CosaeError(f"{name} must be a whole number of at least 1. Got {value!r} instead.")
        _one_of("score", self.score, tuple(SCORES))
        _one_of("selector", self.selector, SELECTORS)
        _one_of("frame", self.frame, frames.FRAMES)
        if self.k > self.d_sae:
            raise CosaeError(
                f"k must be at most d_sae: an SAE of {self.d_sae} features cannot keep {self.k} of them. "
                "Lower k or raise d_sae."
            )
        if self.selector == "gated" and not self.bias:
            raise CosaeError("the gated selector needs the score's bias for its gates: leave bias=True.")
        if self.score == "cosine_grouped" and self.n_groups > self.d_sae:
            raise CosaeError(f"n_groups must be at most d_sae = {self.d_sae}. Got {self.n_groups} instead.")
        prefixes = tuple(int(p) for p in self.prefixes)
        if prefixes:
            if list(prefixes) != sorted(set(prefixes)) or prefixes[0] < 1 or prefixes[-1] > self.d_sae:
                raise CosaeError(
                    f"prefixes must be ascending feature counts between 1 and d_sae = {self.d_sae}. "
                    f"Got {list(prefixes)} instead."
                )
            prefixes = prefixes if prefixes[-1] == self.d_sae else (*prefixes, self.d_sae)
        object.__setattr__(self, "prefixes", prefixes)
        if not 0.0 < self.bandwidth < 2.0:
            raise CosaeError(f"bandwidth must lie between 0 and 2. Got {self.bandwidth!r} instead.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {**asdict(self), "prefixes": list(self.prefixes)}


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise CosaeError(f"{name} must be one of {', '.join(allowed)}. Got {value!r} instead.")


@dataclass(frozen=True)
class TrainOutput:
    """What one training-mode forward pass leaves for the loss.

    reconstructed  one (B, D) reconstruction of z for each prefix
    error    (B,) |z − ẑ|² of each of them, in the frame's units
    gate_error  gated only: (B,) |z − ẑ|² of ReLU(π) through the detached decoder
    """

    framed: Framed
    terms: ScoreTerms
    selection: Selection
    recon: tuple[Tensor, ...]
    error: tuple[Tensor, ...]
    gate_error: Tensor | None = None


class SAE(nn.Module):
    """A sparse autoencoder. Make one with `SAE.build`, train it with `cosae.fit`, keep it with `cosae.save`.

    cfg     what it is made of
    facts   JSON-able training facts: model, site, dataset, tokens, seed, filter, norm statistics, calibrated L0 ...
    kernel  "auto", "reference", "cpu" or "triton": which path computes (cosae.kernels.choose)
    """

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.metadata: dict[str, Any] = {}
        self.kernel = "auto"
        self.centre_D = nn.Parameter(torch.zeros(cfg.d_in))
        self.score = Score(cfg.score, cfg.d_in, cfg.d_sae, cfg.n_groups, cfg.bias)
        self.selector = Selector(cfg.selector, cfg.k, cfg.d_sae, cfg.bandwidth)
        self.decoder = Decoder(cfg.d_in, cfg.d_sae, cfg.prefixes, cfg.norm_restoring)

    @classmethod
    def build(
        cls,
        d_in: int,
        d_sae: int,
        score: str = "cosine",
        selector: str = "batch_topk",
        k: int = 32,
        seed: int = 0,
        frame: str = "raw",
        *,
        prefixes: tuple[int, ...] = (),
        norm_restoring: bool = False,
        n_groups: int = 4,
        bias: bool = True,
        bandwidth: float = 0.5,
        a_init: float = 0.0,
        b_init: str | float = "auto",
        centre: str = "geometric_median",
        sample: Tensor | None = None,
        kernel: str = "auto",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SAE:
        """A fresh SAE, initialised by `cosae.sae.initialise.initialise` (same arguments; see there).

        sample (n, d_in): activations to fit centre, b and thresholds to; without it the centre is 0 and b = ½ ln d.
        Raises CosaeError on a value that is not allowed.
        """
        from cosae.sae.initialise import initialise

        if dtype not in (torch.float32, torch.float64):
            raise CosaeError(
                f"dtype must be torch.float32 or torch.float64 (weights are never kept in half precision). "
                f"Got {dtype} instead."
            )
        choose(kernel, device, dtype)
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            score=score,
            selector=selector,
            k=k,
            frame=frame,
            prefixes=tuple(prefixes),
            norm_restoring=norm_restoring,
            n_groups=n_groups,
            bias=bias,
            bandwidth=bandwidth,
        )
        sae = cls(cfg)
        sae.kernel = kernel
        initialise(sae, seed=seed, a_init=a_init, b_init=b_init, centre=centre, sample=sample)
        return sae.to(device=device, dtype=dtype)

    # ------------------------------------------------------------------ what it is

    @property
    def d_in(self) -> int:
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        return self.cfg.d_sae

    @property
    def k(self) -> int:
        return self.cfg.k

    @property
    def calibrated(self) -> bool:
        """True where `encode` treats each token on its own; False for a batch_topk without a threshold yet."""
        return self.selector.calibrated

    @property
    def device(self) -> torch.device:
        return self.centre_D.device

    @property
    def dtype(self) -> torch.dtype:
        return self.centre_D.dtype

    @property
    def W_enc(self) -> Tensor:
        """(d_in, d_sae) encoder, SAELens' layout: a view."""
        return self.score.rows_FD.T

    @property
    def W_dec(self) -> Tensor:
        """(d_sae, d_in) decoder."""
        return self.decoder.rows_FD

    @property
    def b_enc(self) -> Tensor | None:
        """(d_sae,) score bias β; None where the score has none."""
        return self.score.bias_F

    @property
    def b_dec(self) -> Tensor:
        """(d_in,) centre c."""
        return self.centre_D

    @property
    def scale_a(self) -> Tensor:
        """() or (d_sae,) exponent a in force."""
        return self.score.a

    @property
    def scale_b(self) -> Tensor:
        """() or (d_sae,) log-gain b in force."""
        return self.score.b

    @property
    def threshold(self) -> Tensor:
        """() or (d_sae,): a code is active where its score exceeds this; NaN where not calibrated yet."""
        if self.cfg.selector == "jumprelu":
            return self.selector.log_threshold_F.exp()
        return self.selector.threshold

    def _kernel(self) -> Kernel:
        return choose(self.kernel, self.device, self.dtype)

    # ------------------------------------------------------------------ inference

    def encode(self, x: Tensor) -> Codes:
        """x (..., d_in), any float dtype → sparse Codes. All-zero rows encode to nothing.

        Raises CosaeError for a wrong width, a non-float tensor, or NaN or Inf (with the first one's position).
        """
        flat = self._checked(x)
        framed = self._framed(flat)
        selection = self.selector.infer_select(self.score.terms(framed), self._kernel())
        return Codes.from_entries(
            selection.entries.token_E,
            selection.entries.feature_E,
            selection.value_E,
            self.d_sae,
            tuple(x.shape[:-1]),
            framed.norm_stats,
        )

    def decode(self, codes: Codes | Tensor, norm_stats: NormStats | None = None) -> Tensor:
        """Codes, or a dense (..., d_sae) tensor → x̂ (..., d_in), fp32.

        A token without codes reconstructs to the centre. `norm_stats` overrides what the codes carry; frames other than
        raw and norm-restoring decoders need one or the other. Raises CosaeError where it is missing or widths differ.
        """
        codes = codes if isinstance(codes, Codes) else Codes.from_dense(codes)
        if codes.d_sae != self.d_sae:
            raise CosaeError(
                f"codes must have d_sae = {self.d_sae} features, as this SAE has. Got {codes.d_sae} instead."
            )
        norm_stats = codes.norm_stats if norm_stats is None else norm_stats
        if self.cfg.norm_restoring and norm_stats is None:
            raise CosaeError(
                "a norm-restoring decoder needs the length it restores, which these codes do not carry: decode "
                "codes that `encode` returned, or pass norm_stats=codes.norm_stats."
            )
        if norm_stats is not None and len(norm_stats.r_B) != codes.n_tokens:
            raise CosaeError(
                f"norm_stats must be of the tokens that are decoded: they are of {len(norm_stats.r_B)} tokens, the "
                f"codes of {codes.n_tokens}; slice both alike (norm_stats[rows])."
            )
        entries = Entries(codes.token_E, codes.feature_E)
        kernel = self._kernel()
        value_E = codes.value_E.to(at_least_fp32(self.centre_D).dtype)
        recon = self.decoder.reconstruct(kernel, value_E, entries, codes.n_tokens, norm_stats)[-1]
        x_hat = frames.denormalize(self.cfg.frame, recon, norm_stats, self.centre_D)
        return x_hat.reshape(*codes.shape, self.d_in)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) → reconstruction x̂ (..., d_in) at the inference rule."""
        return self.decode(self.encode(x))

    def _checked(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dtype not in DTYPES or x.ndim < 1 or x.shape[-1] != self.d_in:
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise CosaeError(
                f"x must be a float16, bfloat16, float32 or float64 tensor of shape (..., {self.d_in}). "
                f"Got {got} instead."
            )
        flat = x.reshape(-1, self.d_in)
        if not bool(torch.isfinite(flat.sum())):
            bad = (~torch.isfinite(flat)).nonzero()
            if len(bad):
                row, column = (int(i) for i in bad[0])
                at = [int(i) for i in torch.unravel_index(torch.tensor(row), x.shape[:-1])] if x.ndim > 1 else []
                raise CosaeError(
                    f"x must be finite. Got {float(flat[row, column])} at position {[*at, column]} "
                    f"({len(bad)} non-finite values in all): drop or mend those rows."
                )
        return flat

    def _framed(self, flat_BD: Tensor, live_B: Tensor | None = None) -> Framed:
        return frames.normalize(self.cfg.frame, flat_BD.to(self.device), self.centre_D, live_B)

    # ------------------------------------------------------------------ training

    def train_forward(
        self, x_BD: Tensor, hint: float | None = None, live_B: Tensor | None = None, cache: StepCache | None = None
    ) -> TrainOutput:
        """x (B, d_in) → everything a loss needs, by the training rule; differentiable in all parameters.

        `hint` is `selection.hint` of the batch before: it makes the search faster and changes no result. `live_B` is
        `frame.live_rows(x)`, where arms that share a batch have it already. `cache` is that of the training step.
        """
        kernel = self._kernel()
        framed = self._framed(x_BD, live_B)
        terms = self.score.terms(framed, self.cfg.frame != "unit" and not x_BD.requires_grad, cache)
        selection = self.selector.train_select(terms, kernel, hint)
        entries = selection.entries
        n_tokens = terms.n_tokens
        recon = self.decoder.reconstruct(kernel, selection.value_E, entries, n_tokens, framed.norm_stats)
        error = tuple(kernel.squared_errors(framed.z_BD, part, terms.centre_only) for part in recon)
        gate_error = None
        if self.cfg.selector == "gated":
            rows_FD = at_least_fp32(self.decoder.rows_FD).detach()
            gate = kernel.decode(selection.score_E, entries, rows_FD, n_tokens)
            gate_error = kernel.squared_errors(framed.z_BD, gate, terms.centre_only)
        return TrainOutput(framed, terms, selection, recon, error, gate_error)

    def scores(self, x: Tensor) -> Tensor:
        """Dense (..., d_sae) scores s of the definition, −inf for all-zero rows: for looking, not for speed."""
        from cosae.kernels import reference

        terms = self.score.terms(self._framed(self._checked(x)))
        return reference.scores(terms).reshape(*x.shape[:-1], self.d_sae)


@dataclass(frozen=True)
class Calibration:
    """What a calibration found. `l0` is the mean count on the calibration tokens at the new threshold."""

    target: float
    l0: float
    tokens: int
    margin: float = field(default=0.0)
