"""Does a model read a token's direction or its norm? Perturbations of equal size, where the token stands.

In: a causal language model, a site, sequences. Out: plain numbers. For a token with z = x − c, r = |z|, and a size ε,
four changes with the same |Δx| = ε r:

    norm_up, norm_down   z (1 ± ε)
    direction            z turned by θ towards another token's direction, its length kept; 2 sin(θ/2) = ε
    random               z turned by the same θ towards a random direction

KL(model ‖ changed) at that token (`here`) and summed over the later tokens of its sequence (`after`), float64. The
paper (§5.8, E8) swapped the whole direction against the whole norm, so that its ratios of 87 to 2560 are mostly the
ratio of the changes' sizes, and did so on a sequence of one token, at the attention sink (audit §9 #10). Here sizes are
equal, the token is in its context, and sinks take no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cosae.activations.sample import Sample, SinkRule
from cosae.activations.sinks import FACTOR
from cosae.errors import CosaeError
from cosae.evaluate.model.predictions import divergence, logits_at, predicting
from cosae.evaluate.statistics import RESAMPLES, Array, ratio_interval, resample_counts
from cosae.models.capture import capture
from cosae.models.intervene.hooks import Intervention
from cosae.models.intervene.window import Window
from cosae.models.sites import resolve_site
from cosae.types import Sequences, Site

KINDS = ("norm_up", "norm_down", "direction", "random")
SIZES = (0.05, 0.1, 0.2)


def perturb(z_nD: Tensor, towards_nD: Tensor, kind: str, size: float) -> Tensor:
    """z (n, D) changed by |Δz| = size · |z|, float64; `towards` (n, D), not parallel to z, is read for turns only."""
    z_nD, towards_nD = z_nD.double(), towards_nD.double()
    if kind in ("norm_up", "norm_down"):
        return z_nD * (1 + size if kind == "norm_up" else 1 - size)
    angle = 2 * math.asin(size / 2)
    length_n1 = z_nD.norm(dim=-1, keepdim=True)
    unit_nD = z_nD / length_n1
    across_nD = towards_nD - (towards_nD * unit_nD).sum(-1, keepdim=True) * unit_nD
    across_nD = across_nD / across_nD.norm(dim=-1, keepdim=True)
    turned_nD: Tensor = length_n1 * (math.cos(angle) * unit_nD + math.sin(angle) * across_nD)
    return turned_nD


@dataclass(frozen=True)
class _Pairs:
    """P tokens to change and what each is turned towards. flat (P,) into the (S, T) grid."""

    flat_P: Tensor
    z_PD: Tensor
    towards_PD: Tensor
    random_PD: Tensor
    too_near: int


def measure_patching(
    model: nn.Module,
    site: str | Site,
    sequences: Sequences,
    *,
    sizes: Sequence[float] = SIZES,
    n_pairs: int = 200,
    centre_D: Tensor | None = None,
    median_norm: float | None = None,
    factor: float = FACTOR,
    batch_sequences: int = 8,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Direction against norm at equal size, as plain numbers.

    sizes     ε, each above 0 and below 1
    n_pairs   tokens that are changed, one of a sequence at a time, each with another token (of another document where
              there is one) whose direction it is turned towards
    centre_D  c, (D,); 0 by default, as in the paper

    Returns site, pairs, too_near (draws passed over because the other direction was nearer than the largest turn) and
    by size: kinds[kind] with kl_here (mean), kl_here_median, kl_after, size (|Δx|/|z| as it went into the model, after
    rounding to its dtype); degrees (θ); direction_over_norm and direction_over_random: ratios of mean kl_here (norm:
    the mean of up and down) with 95 % intervals by bootstrap over pairs. Raises CosaeError as `capture` does, for
    sizes out of range, and where fewer than two tokens can be paired.
    """
    sizes = tuple(float(size) for size in sizes)
    if not sizes or not all(0 < size < 1 for size in sizes) or n_pairs < 1:
        raise CosaeError(f"sizes must lie between 0 and 1 and n_pairs be at least 1. Got {sizes} and {n_pairs}.")
    found = resolve_site(model, site)
    activations = capture(model, sequences, found, batch_sequences)[found.name]
    sample = Sample.of(activations, SinkRule(factor, median_norm))
    pairs = _draw(sample, sequences, max(sizes), n_pairs, centre_D, seed)
    # by pair: KL at the token, KL summed after it, |Δx|/|z| as made
    found_by = {
        (size, kind): torch.zeros(3, len(pairs.flat_P), dtype=torch.float64) for size in sizes for kind in KINDS
    }
    for rows, members in _rounds(pairs.flat_P, sequences.ids_ST.shape[1], batch_sequences):
        batch = sequences[rows]
        at_ST = predicting(batch)
        own_nV = logits_at(model, batch, at_ST)
        column_P = pairs.flat_P[members] % batch.ids_ST.shape[1]
        for (size, kind), found_3P in found_by.items():
            z_PD, target_PD = pairs.z_PD[members], (pairs.random_PD if kind == "random" else pairs.towards_PD)[members]
            shift = _Shift(perturb(z_PD, target_PD, kind, size) - z_PD, column_P)
            with Intervention(model, {found: shift}):
                kl_n = divergence(own_nV, logits_at(model, batch, at_ST))
            kl_ST = torch.zeros(at_ST.shape, dtype=torch.float64).masked_scatter(at_ST, kl_n)
            here_P = kl_ST.gather(1, column_P[:, None])[:, 0]
            moved_P = shift.moved_P / z_PD.norm(dim=-1)
            found_3P[:, members] = torch.stack([here_P, kl_ST.sum(1) - here_P, moved_P])
    drawn_RU = resample_counts(len(pairs.flat_P), seed, n_resamples)
    return {
        "site": found.name,
        "pairs": len(pairs.flat_P),
        "too_near": pairs.too_near,
        "centred": centre_D is not None,
        "seed": seed,
        "resamples": n_resamples,
        "by_size": [_numbers(size, {kind: found_by[size, kind] for kind in KINDS}, drawn_RU) for size in sizes],
    }


class _Shift:
    """Adds one vector to one token of each sequence, and notes how far that token really moved."""

    def __init__(self, change_PD: Tensor, column_P: Tensor) -> None:
        self.change_PD, self.column_P = change_PD, column_P
        self.moved_P = torch.zeros(len(column_P), dtype=torch.float64)

    def __call__(self, x: Tensor, window: Window) -> Tensor:
        grid = x.reshape(*window.shape, -1).clone()
        row_P, column_P = torch.arange(len(self.column_P), device=x.device), self.column_P.to(x.device)
        old_PD = grid[row_P, column_P].double()
        grid[row_P, column_P] = (old_PD + self.change_PD.to(x.device)).to(x.dtype)
        self.moved_P = (grid[row_P, column_P].double() - old_PD).norm(dim=-1).cpu()
        return grid.reshape(x.shape)


def _draw(
    sample: Sample, sequences: Sequences, largest: float, n_pairs: int, centre_D: Tensor | None, seed: int
) -> _Pairs:
    """Tokens without replacement as long as there are any, each with a partner farther than the largest turn."""
    z_ND = sample.activations.x_ND.double() - (0.0 if centre_D is None else centre_D.double())
    doc_N, mask_ST = sample.activations.doc_N, sequences.mask_ST
    usable_N = predicting(sequences)[mask_ST] & ~sample.sink_N & (z_ND.norm(dim=-1) > 0)
    candidate_n = usable_N.nonzero()[:, 0]
    if len(candidate_n) < 2:
        raise CosaeError("patching needs at least two tokens that are no sinks and predict another. Give more text.")
    random = np.random.default_rng(seed)
    unit_ND = z_ND / z_ND.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    several = len(set(doc_N[candidate_n].tolist())) > 1
    order = [int(i) for _ in range(-(-n_pairs // len(candidate_n))) for i in random.permutation(candidate_n.numpy())]
    chosen: list[tuple[int, int]] = []
    too_near = 0
    for token in order[:n_pairs]:
        for partner in random.choice(candidate_n.numpy(), size=50):
            if partner == token or (several and doc_N[partner] == doc_N[token]):
                continue
            cosine = float(unit_ND[token] @ unit_ND[int(partner)])
            if abs(cosine) < math.cos(2 * math.asin(largest / 2)):
                chosen.append((token, int(partner)))
                break
            too_near += 1
    if not chosen:
        raise CosaeError(
            "no two tokens differ enough in direction to be turned towards each other: ask for smaller sizes."
        )
    token_P, partner_P = (torch.tensor(column) for column in zip(*chosen, strict=True))
    noise_PD = torch.from_numpy(random.standard_normal((len(chosen), z_ND.shape[1])))
    flat_P = mask_ST.reshape(-1).nonzero()[:, 0][token_P]
    return _Pairs(flat_P, z_ND[token_P], z_ND[partner_P], noise_PD, too_near)


def _rounds(flat_P: Tensor, n_positions: int, batch_sequences: int) -> list[tuple[Tensor, Tensor]]:
    """Passes: which sequences, and which pair is changed in each; a sequence holds one change at a time."""
    row_P = torch.div(flat_P, n_positions, rounding_mode="floor")
    waiting = list(range(len(flat_P)))
    rounds = []
    while waiting:
        taken: dict[int, int] = {}
        for pair in waiting:
            if len(taken) < batch_sequences:
                taken.setdefault(int(row_P[pair]), pair)
        rounds.append((torch.tensor(list(taken)), torch.tensor(list(taken.values()))))
        now = set(taken.values())
        waiting = [pair for pair in waiting if pair not in now]
    return rounds


def _numbers(size: float, found: dict[str, Tensor], drawn_RU: Array) -> dict[str, Any]:
    here = {kind: found_3P[0].numpy() for kind, found_3P in found.items()}
    return {
        "size": size,
        "degrees": math.degrees(2 * math.asin(size / 2)),
        "kinds": {
            kind: {
                "kl_here": float(here_P.mean()),
                "kl_here_median": float(np.median(here_P.numpy())),
                "kl_after": float(after_P.mean()),
                "size": float(moved_P.mean()),
            }
            for kind, (here_P, after_P, moved_P) in found.items()
        },
        "direction_over_norm": _ratio(here["direction"], (here["norm_up"] + here["norm_down"]) / 2, drawn_RU),
        "direction_over_random": _ratio(here["direction"], here["random"], drawn_RU),
    }


def _ratio(above_P: Array, below_P: Array, drawn_RU: Array) -> dict[str, float] | None:
    found = ratio_interval(above_P, below_P, drawn_RU)
    return found and {"ratio": found.value, "low": found.low, "high": found.high}
