"""Worlds whose true features are known, with a norm perturbation of one's choosing.

    x = |x| · unit(Σ_{i active} m_i f_i),   f_i unit vectors, more of them than dimensions (superposition)

What fires is exactly Bernoulli(p_i) for every token and feature, drawn as points of a Poisson process with
rate -log(1 - p_i) per cell (a cell fires when it holds a point): cost grows with what fires, not with N · F.
The length |x| is drawn apart from what fires, so it is a perturbation by construction, except under `content`.

Every chunk is a function of (seed, split, chunk index), so a stream can start anywhere and repeats itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import sqrt
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cosae.errors import CosaeError, check_choice, check_least, check_range
from cosae.io import values
from cosae.io.generators import keyed_generator
from cosae.types import Activations, Codes

Frequencies = Literal["uniform", "power"]
NormKind = Literal["none", "log_normal", "sinks", "log_normal+sinks", "content"]
Split = Literal["train", "held_out"]

MAX_RATE = 0.5  # no feature fires on more than half of the tokens, however steep the power law
CHILD_SHARE = 0.5  # a child fires on this share of its parent's tokens


@dataclass(frozen=True)
class World:
    """A synthetic world.

    d_in           dimensions
    n_features     true features
    l0             mean number of active features per token, before silent tokens (about e^-l0) get one
    frequencies    uniform, or power: p_i ∝ 1 / rank_i, none above one half
    correlation    0 to 1: features 2j and 2j + 1 share a rate, and their firings correlate by this much
    hierarchy      children per parent: a child fires only with its parent, on half of the parent's tokens
    magnitude_std  active magnitudes are |1 + std · g|, g standard normal
    spread_steps   steps that push the features apart before use; 0 leaves them random
    norm           none        every token has length norm_median
                   log_normal  norm_median · exp(sigma · g)
                   sinks       a share sink_frac of the tokens is sink_factor times longer; or both with +
                   content     log length is a sum over active features of their own gains, spread about sigma
    norm_median    typical length; √d_in when None
    seed           of features, firings and lengths

    Raises CosaeError for values outside these meanings.
    """

    d_in: int = 128
    n_features: int = 512
    l0: float = 8.0
    frequencies: Frequencies = "uniform"
    correlation: float = 0.0
    hierarchy: int = 0
    magnitude_std: float = 0.25
    spread_steps: int = 0
    norm: NormKind = "none"
    sigma: float = 0.5
    sink_frac: float = 0.01
    sink_factor: float = 50.0
    norm_median: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("frequencies", get_args(Frequencies)), ("norm", get_args(NormKind))):
            check_choice(f"world {name}", getattr(self, name), choices)
        for name, low in (("d_in", 1), ("n_features", 2), ("hierarchy", 0), ("spread_steps", 0)):
            check_least(f"world {name}", getattr(self, name), low)
        for name in ("magnitude_std", "sigma"):
            check_range(f"world {name}", getattr(self, name), "[0, inf)")
        for name in ("correlation", "sink_frac"):
            check_range(f"world {name}", getattr(self, name), "[0, 1]")
        check_range("world sink_factor", self.sink_factor, "(0, inf)")
        check_range("world norm_median", self.length, "(0, inf)")
        if not 0 < self.l0 < self.n_features * MAX_RATE:
            raise CosaeError(
                f"world l0 must lie above 0 and below half of n_features ({self.n_features}). Got {self.l0} instead."
            )
        if self.correlation and self.hierarchy:
            raise CosaeError("a world is either correlated or hierarchical; set correlation or hierarchy to 0.")
        if self.l0 > MAX_RATE * (self.n_parents + CHILD_SHARE * (self.n_features - self.n_parents)):
            raise CosaeError(
                f"world l0 {self.l0} is too much for {self.n_parents} parent features; raise n_features or lower l0."
            )

    @property
    def length(self) -> float:
        """The typical length of x."""
        return sqrt(self.d_in) if self.norm_median is None else self.norm_median

    @property
    def n_parents(self) -> int:
        """Features 0 : n_parents stand on their own; feature i ≥ n_parents is a child of (i - n_parents) %
        n_parents."""
        return -(-self.n_features // (1 + self.hierarchy))

    @property
    def rate_F(self) -> Tensor:
        """(F,) float64: how often each feature fires; sums to l0."""
        n_children = self.n_features - self.n_parents
        rank_P = torch.arange(self.n_parents, dtype=torch.float64)
        if self.correlation:
            rank_P = rank_P // 2  # pairs share their rate
        share_P = torch.ones_like(rank_P) if self.frequencies == "uniform" else 1 / (1 + rank_P)
        parent_F = torch.arange(n_children) % self.n_parents
        weight_P = 1 + CHILD_SHARE * torch.bincount(parent_F, minlength=self.n_parents).double()
        rate_P = _capped(share_P, weight_P, self.l0)
        return torch.cat([rate_P, CHILD_SHARE * rate_P[parent_F]])

    @classmethod
    def parse(cls, text: str) -> World:
        """From the command line: `log_normal:sigma=0.5,n_features=1024`; the kind is `norm`.

        Raises CosaeError for anything else.
        """
        names = tuple(f.name for f in fields(cls) if f.name != "norm")
        return values.parse(cls, text, "world", "norm", dict.fromkeys(get_args(NormKind), names))


class SyntheticSource:
    """An endless, repeatable stream from a world (a `Source` of stream.py).

    d_in        dimensions
    feature_FD  (F, D) fp32, unit rows: the true features
    """

    def __init__(self, world: World, chunk_tokens: int = 8192) -> None:
        check_least("chunk_tokens", chunk_tokens, 1)
        self.world = world
        self.chunk_tokens = chunk_tokens
        self.d_in = world.d_in
        self.feature_FD = draw_features(world)
        self._rate_F = world.rate_F
        # gains of `content`: the sum over about l0 active features then has standard deviation about sigma
        gain_F = torch.randn(world.n_features, generator=keyed_generator(world.seed, "gains"))
        self._gain_F = gain_F * (world.sigma / sqrt(world.l0))

    def describe(self) -> dict[str, Any]:
        """What the stream is, for records."""
        return {"kind": "synthetic", "world": values.to_plain(self.world), "chunk_tokens": self.chunk_tokens}

    def chunks(self, start: int = 0) -> Iterator[Activations]:
        """Chunks of `chunk_tokens` activations from number `start` on, without end."""
        index = start
        while True:
            yield self.sample(self.chunk_tokens, "train", index)[0]
            index += 1

    def held_out(self, n_tokens: int) -> tuple[Activations, Codes]:
        """n_tokens activations that no chunk of the training stream shares, and their true codes."""
        return self.sample(n_tokens, "held_out")

    def sample(self, n_tokens: int, split: Split = "held_out", index: int = 0) -> tuple[Activations, Codes]:
        """n_tokens activations and the codes they are made of: x = truth.to_dense() @ feature_FD.

        Activations carry no tokens, documents or positions. The truth's values are in units of x. Every token
        has at least one active feature. The draw depends on (seed, split, index, n_tokens).
        """
        generator = keyed_generator(self.world.seed, split, index)
        fired_E = draw_firings(self.world, self._rate_F, n_tokens, generator)
        token_E, feature_E = fired_E // self.world.n_features, fired_E % self.world.n_features
        noise_E = torch.randn(len(fired_E), generator=generator)
        value_E = (1 + self.world.magnitude_std * noise_E).abs()
        raw = Codes.from_entries(token_E, feature_E, value_E, self.world.n_features, (n_tokens,))
        sum_ND = _decode(raw, self.feature_FD)
        norm_N = self._lengths(raw, generator)
        scale_N = norm_N / sum_ND.norm(dim=-1).clamp_min(1e-20)
        truth = raw.with_values(value_E * scale_N[token_E])
        return Activations.bare(sum_ND * scale_N[:, None]), truth

    def _lengths(self, codes: Codes, generator: torch.Generator) -> Tensor:
        """(N,) fp32: the length of each token, drawn after and apart from what fires."""
        world, n = self.world, codes.n_tokens
        norm_N = torch.full((n,), world.length)
        if "log_normal" in world.norm:
            norm_N = norm_N * torch.exp(world.sigma * torch.randn(n, generator=generator))
        if "sinks" in world.norm:
            sink_N = torch.rand(n, generator=generator) < world.sink_frac
            norm_N = torch.where(sink_N, norm_N * world.sink_factor, norm_N)
        if world.norm == "content":
            log_N = torch.zeros(n).index_add_(0, codes.token_E, self._gain_F[codes.feature_E])
            norm_N = norm_N * torch.exp(log_N)
        return norm_N


def draw_features(world: World) -> Tensor:
    """(F, D) fp32 unit rows, random, pushed apart by `spread_steps` steps against their mutual cosines."""
    feature_FD = torch.randn(world.n_features, world.d_in, generator=keyed_generator(world.seed, "features"))
    feature_FD /= feature_FD.norm(dim=-1, keepdim=True)
    # Σ cos² has gradient 4 (F Fᵀ - 1) F, whose largest eigenvalue grows as F / D: half its inverse is stable
    step = 0.5 / max(1.0, world.n_features / world.d_in)
    for _ in range(world.spread_steps):
        overlap_FF = feature_FD @ feature_FD.T
        overlap_FF.fill_diagonal_(0)
        feature_FD -= step * (overlap_FF @ feature_FD)
        feature_FD /= feature_FD.norm(dim=-1, keepdim=True)
    return feature_FD


def draw_firings(world: World, rate_F: Tensor, n_tokens: int, generator: torch.Generator) -> Tensor:
    """(E,) int64, ascending: token · F + feature of everything that fires."""
    n_features = world.n_features
    own_F = rate_F.clone()
    own_F[world.n_parents :] = 0
    fired_E = _bernoulli_cells(own_F, n_tokens, generator)
    if world.correlation:
        fired_E = _correlate(fired_E, world, generator)
    fired_E = _never_silent(fired_E, own_F, n_tokens, generator)
    if world.hierarchy:
        children = [fired_E]
        for first in range(world.n_parents, n_features, world.n_parents):  # the h-th child of every parent
            child_E = fired_E + first
            real_E = fired_E % n_features + first < n_features
            here_E = torch.rand(len(fired_E), generator=generator) < CHILD_SHARE
            children.append(child_E[real_E & here_E])
        fired_E = torch.cat(children).sort().values
    return fired_E


def _bernoulli_cells(rate_F: Tensor, n_tokens: int, generator: torch.Generator) -> Tensor:
    """Ascending cell numbers token · F + feature, each in with probability rate_F[feature], independently."""
    points_F = torch.poisson(-torch.log1p(-rate_F) * n_tokens, generator=generator).long()
    feature_E = torch.repeat_interleave(torch.arange(len(rate_F)), points_F)
    token_E = torch.randint(n_tokens, (len(feature_E),), generator=generator)
    cell_E: Tensor = torch.unique(token_E * len(rate_F) + feature_E)
    return cell_E


def _correlate(fired_E: Tensor, world: World, generator: torch.Generator) -> Tensor:
    """Feature 2j + 1 copies feature 2j where a coin of probability `correlation` says so, and is itself elsewhere. With
    equal rates the correlation of the two is exactly the coin's probability, and the rates stay as they were."""
    n_features = world.n_features
    feature_E = fired_E % n_features
    leads_E = (feature_E % 2 == 0) & (feature_E + 1 < n_features)
    lead_E = fired_E[leads_E]
    coin_E = torch.rand(len(lead_E), generator=generator) < world.correlation
    follow_E = fired_E[feature_E % 2 == 1]
    own_coin_E = torch.rand(len(follow_E), generator=generator) < world.correlation
    if len(lead_E) and len(follow_E):  # one coin per cell: where both fired, the leader's decides
        place_E = torch.searchsorted(lead_E, follow_E - 1).clamp_max(len(lead_E) - 1)
        own_coin_E = torch.where(lead_E[place_E] == follow_E - 1, coin_E[place_E], own_coin_E)
    rest_E = fired_E[feature_E % 2 == 0]
    fired_E, _ = torch.cat([rest_E, lead_E[coin_E] + 1, follow_E[~own_coin_E]]).sort()
    return fired_E


def _never_silent(fired_E: Tensor, rate_F: Tensor, n_tokens: int, generator: torch.Generator) -> Tensor:
    """Gives every token on which nothing fired one feature, chosen by rate: x needs a direction."""
    n_features = len(rate_F)
    count_N = torch.bincount(fired_E // n_features, minlength=n_tokens)
    silent = (count_N == 0).nonzero().flatten()
    if len(silent) == 0:
        return fired_E
    chosen = torch.multinomial(rate_F, len(silent), replacement=True, generator=generator)
    return torch.cat([fired_E, silent * n_features + chosen]).sort().values


def _capped(share_P: Tensor, weight_P: Tensor, total: float) -> Tensor:
    """Rates in proportion to share_P, none above MAX_RATE, with Σ weight · rate = total."""
    full_P = torch.zeros_like(share_P, dtype=torch.bool)
    while True:
        left = total - MAX_RATE * weight_P[full_P].sum()
        rate_P = share_P * (left / (weight_P * share_P)[~full_P].sum())
        over_P = (rate_P > MAX_RATE) & ~full_P
        if not bool(over_P.any()):
            return torch.where(full_P, MAX_RATE, rate_P)
        full_P |= over_P


def _decode(codes: Codes, feature_FD: Tensor) -> Tensor:
    """(N, D) fp32: Σ value · feature per token."""
    sum_ND: Tensor = torch.nn.functional.embedding_bag(
        codes.feature_E,
        feature_FD,
        codes.offset_B1,
        mode="sum",
        per_sample_weights=codes.value_E,
        include_last_offset=True,
    )
    return sum_ND
