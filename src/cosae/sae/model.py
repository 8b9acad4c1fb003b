"""SAE = frame + score + selector + decoder.

    x → frame → z → score → selector → codes → decoder → ẑ → frame⁻¹ → x̂

A transcoder is one whose decoder approximates another site's vectors y in the place of x (cosae.sae.target).

`encode`, `decode` and `forward` follow the inference rule and change nothing. `train_forward` follows the training
rule and hands back everything a loss needs. No method stores anything on the object between calls.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.kernels import ALONE, Entries, Kernel, Peers, ScoreTerms, StepCache, choose, reference
from cosae.kernels.cpu.sums import token_offsets
from cosae.sae import frame as frames
from cosae.sae.config import InitConfig, SAEConfig, check_activations
from cosae.sae.decoder import Decoder
from cosae.sae.describe import summary
from cosae.sae.initialise import initialise
from cosae.sae.score import Score
from cosae.sae.selector import Selection, Selector
from cosae.sae.target import Target
from cosae.shown import Shown
from cosae.types import Codes, Framed, NormStats, at_least_fp32


@dataclass(frozen=True)
class TrainOutput:
    """What one training-mode forward pass leaves for the loss.

    recon    one (B, D) reconstruction of `target_BD` for each prefix
    error    (B,) |z − ẑ|² of each of them, in the frame's units
    target_BD  what is reconstructed: z; of a transcoder, t (cosae.sae.target)
    stats    what has to be put back to have it in raw units
    gate_error, gate_recon  gated only: (B,) |z − ẑ|² of ReLU(π) through the detached decoder, and that ẑ (B, D)
    sites    what a crosscoder's x joins
    n_live   () tokens that are not masked, those of the peers too
    """

    framed: Framed
    terms: ScoreTerms
    selection: Selection
    recon: tuple[Tensor, ...]
    error: tuple[Tensor, ...]
    n_live: Tensor
    target_BD: Tensor
    stats: NormStats
    gate_error: Tensor | None = None
    gate_recon: Tensor | None = None
    sites: frames.Sites | None = None
    peers: Peers = ALONE

    @property
    def length_B(self) -> Tensor:
        """(B,) |x − c| in raw units, of a transcoder |y − c|."""
        if self.sites is not None:
            length_B: Tensor = torch.linalg.vector_norm(self.target_BD * self.sites.spread(self.stats.scale_B), dim=-1)
            return length_B
        own = self.target_BD is self.framed.z_BD
        return (self.stats.r_B if own else torch.linalg.vector_norm(self.target_BD, dim=-1)) * self.stats.scale_B


class SAE(Shown, nn.Module):
    """A sparse autoencoder. Make one with `SAE.build`, train it with `cosae.fit`, keep it with `cosae.save`.

    cfg     what it is made of
    metadata  JSON-able, of training: model, site, dataset, tokens, seed, filter, norm statistics, calibrated L0 ...
    kernel  "auto", "reference", "cpu" or "triton": which path computes (cosae.kernels.choose)
    """

    site_scale_P: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.metadata: dict[str, Any] = {}
        self.kernel = "auto"
        d_in, d_sae, k = cfg.sizes
        self.centre_D = nn.Parameter(torch.zeros(d_in))
        self.score = Score(cfg.family, d_in, d_sae, cfg.n_groups, cfg.bias)
        self.selector = Selector(cfg.selector, k, d_sae, cfg.bandwidth, cfg.a_window)
        self.decoder = Decoder(self.d_out, d_sae, cfg.prefixes, cfg.norm_restoring)
        if cfg.sites:
            self.register_buffer("site_scale_P", torch.ones(len(cfg.sites)))
        self.target = None if cfg.d_out is None else Target(d_in, cfg.d_out, cfg.target_frame, cfg.skip)

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
        sample: Tensor | None = None,
        target: Tensor | None = None,
        kernel: str = "auto",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **more: Any,
    ) -> SAE:
        """A fresh SAE: `start` with the fields of SAEConfig and InitConfig by name (prefixes=, bias=, a_init=, ...).

        Raises CosaeError on a value that is not allowed.
        """
        start = {f.name: more.pop(f.name) for f in fields(InitConfig) if f.name in more}
        if unknown := sorted(set(more) - {f.name for f in fields(SAEConfig)}):
            known = ", ".join(f.name for part in (SAEConfig, InitConfig) for f in fields(part))
            raise CosaeError(f"an SAE is built from {known}. Got {unknown[0]!r} instead.")
        cfg = SAEConfig(d_in, d_sae, score, selector, k, frame, **more)
        how: dict[str, Any] = {"kernel": kernel, "device": device, "dtype": dtype}
        return cls.start(cfg, InitConfig(**start), seed=seed, sample=sample, target=target, **how)

    @classmethod
    def start(
        cls,
        cfg: SAEConfig,
        init: InitConfig,
        *,
        seed: int,
        sample: Tensor | None = None,
        target: Tensor | None = None,
        kernel: str = "auto",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SAE:
        """A fresh SAE, initialised from `seed` (cosae.sae.initialise).

        sample (n, d_in): activations to fit centre, b and thresholds to; without it the centre is 0 and b = ½ ln d.
        target (n, d_out): of a transcoder, the sample's targets.
        Raises CosaeError on a value that is not allowed.
        """
        if dtype not in (torch.float32, torch.float64):
            raise CosaeError(f"dtype must be torch.float32 or torch.float64: weights are never halves. Got {dtype}.")
        choose(kernel, device, dtype)
        sae = cls(cfg)
        sae.kernel = kernel
        parts = (sae.centre_D, sae.score, sae.selector, sae.decoder, sae.target, sae.sites)
        initialise(cfg, init, *parts, seed=seed, sample=sample, target_sample=target)
        return sae.to(device=device, dtype=dtype)

    @property
    def d_in(self) -> int:
        return self.cfg.sizes[0]

    @property
    def d_sae(self) -> int:
        return self.cfg.sizes[1]

    @property
    def sites(self) -> frames.Sites | None:
        """The sites that a crosscoder joins; None for one site."""
        return frames.Sites(self.cfg.sites, self.site_scale_P) if self.cfg.sites else None

    @property
    def d_out(self) -> int:
        """Width of what it reconstructs: d_in, but for a transcoder."""
        return self.cfg.d_out or self.d_in

    @property
    def k(self) -> int:
        return self.cfg.sizes[2]

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
        """(d_sae, d_out) decoder."""
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
    def out_centre(self) -> Tensor:
        """(d_out,) what a token without codes reconstructs to (a linear skip aside)."""
        return self.centre_D if self.target is None else self.target.centre_O

    @property
    def scale_a(self) -> Tensor:
        """() or (d_sae,) exponent a in force."""
        return self.score.a

    @property
    def scale_b(self) -> Tensor:
        """() or (d_sae,) log-gain b in force."""
        return self.score.b

    @property
    def value_exponent(self) -> Tensor | None:
        """() or (d_sae,) value exponent δ in force: codes are r^δ times their score; None for scores without one."""
        return self.score.delta

    @property
    def threshold(self) -> Tensor:
        """() or (d_sae,): a code is active where its score exceeds this; NaN where not calibrated yet."""
        if self.cfg.selector == "jumprelu":
            return self.selector.log_threshold_F.exp()
        return self.selector.threshold

    def _summary(self) -> dict[str, object]:
        return summary(self.cfg, self.metadata, self.calibrated)

    def _kernel(self) -> Kernel:
        return choose(self.kernel, self.device, self.dtype)

    def encode(self, x: Tensor) -> Codes:
        """x (..., d_in), any float dtype → sparse Codes. All-zero rows encode to nothing.

        Raises CosaeError for a wrong width, a non-float tensor, or NaN or Inf (with the first one's position).
        """
        flat = self._checked(x)
        framed = self._framed(flat)
        selection = self.selector.infer_select(self.score.terms(framed), self._kernel())
        entries, shape = selection.entries, tuple(x.shape[:-1])
        offset_B1 = token_offsets(entries, len(flat))
        return Codes(offset_B1, entries.feature_E, selection.value_E, self.d_sae, shape, self._stats(framed))

    def decode(self, codes: Codes | Tensor, norm_stats: NormStats | None = None) -> Tensor:
        """Codes, or a dense (..., d_sae) tensor → x̂ (..., d_in), fp32; of a transcoder, ŷ (..., d_out).

        A token without codes reconstructs to the centre. `norm_stats` overrides what the codes carry; frames other than
        raw and norm-restoring decoders need one or the other. Raises CosaeError where it is missing or widths differ.
        """
        codes = codes if isinstance(codes, Codes) else Codes.from_dense(codes)
        if codes.d_sae != self.d_sae:
            raise CosaeError(f"codes must have this SAE's d_sae = {self.d_sae} features. Got {codes.d_sae} instead.")
        norm_stats = codes.norm_stats if norm_stats is None else norm_stats
        if self.cfg.norm_restoring and norm_stats is None:
            raise CosaeError(
                f"a norm-restoring decoder needs a length that these codes do not carry: {frames.NORMS_HINT}"
            )
        if norm_stats is not None and len(norm_stats.r_B) != codes.n_tokens:
            came = f"{len(norm_stats.r_B)} tokens, the codes of {codes.n_tokens}"
            raise CosaeError(f"norm_stats are of {came}: slice both alike (norm_stats[rows]).")
        entries = Entries(codes.token_E, codes.feature_E)
        kernel = self._kernel()
        value_E = codes.value_E.to(at_least_fp32(self.centre_D).dtype)
        recon = self.decoder.reconstruct(kernel, value_E, entries, codes.n_tokens, norm_stats)[-1]
        if self.target is not None:
            return self.target.denormalize(recon, norm_stats).reshape(*codes.shape, self.d_out)
        x_hat = frames.denormalize(self.cfg.frame, recon, norm_stats, self.centre_D, self.sites)
        return x_hat.reshape(*codes.shape, self.d_in)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) → reconstruction x̂ (..., d_in), or ŷ (..., d_out), at the inference rule."""
        return self.decode(self.encode(x))

    def _checked(self, x: Tensor) -> Tensor:
        return check_activations(x, self.d_in)

    def _framed(self, flat_BD: Tensor, live_B: Tensor | None = None) -> Framed:
        return frames.normalize(self.cfg.frame, flat_BD.to(self.device), self.centre_D, live_B, self.sites)

    def _stats(self, framed: Framed) -> NormStats:
        """What `decode` puts back."""
        return framed.norm_stats if self.target is None else self.target.stats(framed)

    def train_forward(
        self,
        x_BD: Tensor,
        hint: float | None = None,
        live_B: Tensor | None = None,
        cache: StepCache | None = None,
        peers: Peers = ALONE,
        y_BD: Tensor | None = None,
        k: int | None = None,
    ) -> TrainOutput:
        """x (B, d_in) → everything a loss needs, by the training rule; differentiable in all parameters.

        `y_BD` (B, d_out) are a transcoder's targets. Raises CosaeError where they are missing, or not asked for.

        `hint` is `selection.hint` of the batch before: it makes the search faster and changes no result. `live_B` is
        `frame.live_rows(x)`, where arms that share a batch have it already. `cache` is that of the training step.
        `peers` have the rest of the batch, and of the dictionary that this SAE is a part of. `k`: another than the
        SAE's, of a step of a schedule.
        """
        kernel = self._kernel()
        framed = self._framed(x_BD, live_B)
        terms = self.score.terms(framed, self.cfg.frame != "unit" and not x_BD.requires_grad, cache)
        selection = self.selector.train_select(terms, kernel, hint, peers, k)
        entries = selection.entries
        n_tokens = terms.n_tokens
        framed = peers.once(framed)
        recon = self.decoder.reconstruct(kernel, selection.value_E, entries, n_tokens, framed.norm_stats, peers)
        target_BD, stats, centre_only = framed.z_BD, framed.norm_stats, terms.centre_only
        if (self.target is None) != (y_BD is None):
            raise CosaeError(
                "a transcoder, and it alone, learns from targets: give y with x, and build it with d_out=."
            )
        if self.target is not None and y_BD is not None:
            stats = self.target.stats(framed)
            target_BD = self.target.of(y_BD.to(self.device), stats)
            centre_only = self.cfg.target_frame == "raw" and not y_BD.requires_grad
        added_BD = stats.added_BD
        recon = recon if added_BD is None else tuple(part + added_BD for part in recon)
        error = tuple(kernel.squared_errors(target_BD, part, centre_only) for part in recon)
        gate_error = gate = None
        if self.cfg.selector == "gated":
            rows_FD = at_least_fp32(self.decoder.rows_FD).detach()
            gate_E = kernel.entry_values(terms, entries, selection.score_E)
            gate = peers.features(kernel.decode(gate_E, entries, rows_FD, n_tokens))
            gate = gate if added_BD is None else gate + added_BD.detach()
            gate_error = kernel.squared_errors(target_BD, gate, centre_only)
        n_live = peers.tokens(framed.live_B.sum())
        known = (framed, terms, selection, recon, error, n_live, target_BD, stats)
        return TrainOutput(*known, gate_error, gate, self.sites, peers)

    def scores(self, x: Tensor) -> Tensor:
        """Dense (..., d_sae) scores s of the definition, −inf for all-zero rows: for looking, not for speed."""
        terms = self.score.terms(self._framed(self._checked(x)))
        return reference.scores(terms).reshape(*x.shape[:-1], self.d_sae)


@dataclass(frozen=True)
class Calibration:
    """What a calibration found. `l0` is the mean count on the calibration tokens at the new threshold.

    fve  variance explained of the first of them, where that was measured (cosae.sae.calibrate.measure_fve)
    """

    target: float
    l0: float
    tokens: int
    margin: float = 0.0
    fve: float | None = None
