"""What every feature fires on: how often, how strongly, and where most; one pass over the text, codes are not kept.

In: a model, an SAE at a site of it, and token sequences. Out: for each feature the share of tokens on which it fires,
its largest code, and its largest examples, each of another sequence. Special tokens and what the filter leaves out are
read by the model, but not counted. Memory holds one chunk of tokens, and F × examples numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cosae.activations.filter import Filter
from cosae.errors import CosaeError, check_least
from cosae.models.capture import capture
from cosae.sae.model import SAE
from cosae.shown import counted
from cosae.types import Activations, Codes, Sequences, Site

CHUNK_TOKENS = 8192

Array = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """One token on which a feature fires: ids_T[at] with value, in its sequence (real tokens only)."""

    value: float
    ids_T: tuple[int, ...]
    at: int


@dataclass(frozen=True)
class Features:
    """What was found, by feature.

    n_tokens     tokens that were counted; n_left_out: special ones, and those the filter leaves out
    count_F      (F,) int64: tokens on which it fires
    largest_F    (F,) float64: its largest |code|, 0 where it never fires
    driven_F     (F,) float64: share of its firings that the token's norm decides: 1 − |A ∩ M| / |A ∪ M| with A the
                 tokens on which it fires and M those on which it would if all had the median |x − c|; NaN where it
                 never fires. Exactly 0 in the unit and layer_norm frames
    value_Fn, place_Fn   (F, n): codes of the largest examples, and row · T + column of each in `sequences`; place −1
                 where there are fewer
    """

    sequences: Sequences
    n_tokens: int
    n_left_out: int
    count_F: Ids
    largest_F: Array
    driven_F: Array
    value_Fn: Array
    place_Fn: Ids

    @property
    def density_F(self) -> Array:
        """(F,) share of tokens on which each feature fires."""
        density_F: Array = self.count_F / max(self.n_tokens, 1)
        return density_F

    def examples(self, feature: int) -> list[Example]:
        """The largest examples of a feature, the largest first. Raises CosaeError for a feature there is not."""
        n = len(self.count_F)
        if not 0 <= feature < n:
            raise CosaeError(f"Feature {feature} is out of range: the SAE has {counted(n, 'feature')}, 0 to {n - 1}.")
        width = self.sequences.ids_ST.shape[1]
        found = []
        for value, place in zip(self.value_Fn[feature], self.place_Fn[feature].tolist(), strict=True):
            if place < 0:
                break
            row, column = divmod(place, width)
            real_T = self.sequences.mask_ST[row]
            ids_T = self.sequences.ids_ST[row][real_T].tolist()
            found.append(Example(float(value), tuple(ids_T), int(real_T[:column].sum())))
        return found


@torch.no_grad()
def read_features(
    model: nn.Module,
    site: Site,
    sae: SAE,
    sequences: Sequences,
    *,
    fitted: Filter | None = None,
    n_examples: int = 10,
    batch_sequences: int = 16,
    log: Callable[[str], None] = lambda _: None,
) -> Features:
    """Run the model over `sequences` once. fitted: the filter, by default that of nobody: all but special tokens count.

    Raises CosaeError for an SAE without a threshold or of another width, and as `capture` does.
    """
    check_least("n_examples", n_examples, 1)
    if not sae.calibrated:
        raise CosaeError("this SAE has no inference threshold yet: calibrate it (cosae.sae.calibrate) and save it.")
    n_rows, width = sequences.ids_ST.shape
    count_F, union_F, both_F = (np.zeros(sae.d_sae, np.int64) for _ in range(3))
    value_Fn, place_Fn = np.zeros((sae.d_sae, n_examples)), np.full((sae.d_sae, n_examples), -1, np.int64)
    n_tokens = n_left_out = 0
    median_r: Tensor | None = None
    step = max(1, CHUNK_TOKENS // width)
    for first in range(0, n_rows, step):
        part = sequences[first : first + step]
        found = capture(model, part, site, batch_sequences=batch_sequences)[site.name]
        if (d_in := found.x_ND.shape[1]) != sae.d_in:
            raise CosaeError(f"{site.name} has width {d_in}, the SAE d_in = {sae.d_in}: name its own model and site.")
        kept_N = kept(found, fitted).cpu()
        place_N = part.mask_ST.reshape(-1).nonzero()[:, 0][kept_N].numpy() + first * width
        x_ND = found.x_ND[kept_N.to(found.x_ND.device)]
        n_tokens, n_left_out = n_tokens + len(x_ND), n_left_out + len(found) - len(x_ND)
        if len(x_ND):
            token_E, feature_E, value_E = _entries(sae.encode(x_ND))
            median_r = _length(sae, x_ND).median() if median_r is None else median_r
            count_F += np.bincount(feature_E, minlength=sae.d_sae)
            both, union = _at_median(sae, x_ND, median_r, token_E, feature_E)
            both_F, union_F = both_F + both, union_F + union
            _merge(value_Fn, place_Fn, feature_E, value_E, place_N[token_E], width)
        log(f"read {min(first + step, n_rows):,} of {counted(n_rows, 'sequence')}")
    driven_F = np.where(union_F > 0, 1 - both_F / np.maximum(union_F, 1), np.nan)
    largest_F = np.abs(value_Fn[:, 0])
    return Features(sequences, n_tokens, n_left_out, count_F, largest_F, driven_F, value_Fn, place_Fn)


def kept(activations: Activations, fitted: Filter | None) -> Tensor:
    """(N,) bool: tokens that count."""
    ordinary_N = ~activations.special_N
    return ordinary_N if fitted is None else ordinary_N & fitted.keep(activations)


def _entries(codes: Codes) -> tuple[Ids, Ids, Array]:
    on_E = codes.value_E != 0
    found = (codes.token_E[on_E], codes.feature_E[on_E], codes.value_E[on_E].double())
    token_E, feature_E, value_E = (one.cpu().numpy() for one in found)
    return token_E, feature_E, value_E


def _length(sae: SAE, x_ND: Tensor) -> Tensor:
    """(N,) |x − c|."""
    length_N: Tensor = torch.linalg.vector_norm(x_ND.to(sae.device, sae.dtype) - sae.centre_D, dim=-1)
    return length_N


def _at_median(sae: SAE, x_ND: Tensor, median_r: Tensor, token_E: Ids, feature_E: Ids) -> tuple[Ids, Ids]:
    """(F,) on how many tokens a feature fires in both readings, and in either."""
    now_E = token_E * sae.d_sae + feature_E
    then_E = now_E
    if sae.cfg.frame == "raw":  # the others take the length out themselves
        stretch_N = median_r / _length(sae, x_ND).clamp_min(1e-30)
        moved_ND = sae.centre_D + stretch_N[:, None] * (x_ND.to(sae.device, sae.dtype) - sae.centre_D)
        token_E, feature_E, _ = _entries(sae.encode(moved_ND))
        then_E = token_E * sae.d_sae + feature_E
    both_F = np.bincount(np.intersect1d(now_E, then_E, assume_unique=True) % sae.d_sae, minlength=sae.d_sae)
    either_F = np.bincount(np.concatenate([now_E, then_E]) % sae.d_sae, minlength=sae.d_sae) - both_F
    return both_F, either_F


def _merge(value_Fn: Array, place_Fn: Ids, feature_E: Ids, value_E: Array, place_E: Ids, width: int) -> None:
    """Put a chunk's entries among the largest, in place; of a sequence, which lies in one chunk, the largest only."""
    fired_f, n = np.unique(feature_E), value_Fn.shape[1]
    known = place_Fn[fired_f] >= 0
    feature_E = np.concatenate([np.repeat(fired_f, known.sum(1)), feature_E])
    value_E = np.concatenate([value_Fn[fired_f][known], value_E])
    place_E = np.concatenate([place_Fn[fired_f][known], place_E])
    order = np.lexsort((place_E, -np.abs(value_E)))
    once = np.unique(feature_E[order] * (place_E.max() // width + 1) + place_E[order] // width, return_index=True)[1]
    order = order[np.sort(once)]
    order = order[np.argsort(feature_E[order], kind="stable")]
    feature_E, value_E, place_E = feature_E[order], value_E[order], place_E[order]
    rank_E = np.arange(len(feature_E)) - np.searchsorted(feature_E, feature_E)
    kept_E = rank_E < n
    value_Fn[feature_E[kept_E], rank_E[kept_E]] = value_E[kept_E]
    place_Fn[feature_E[kept_E], rank_E[kept_E]] = place_E[kept_E]
