"""Which tokens take part: one declared policy, shared by training and evaluation.

    norm:        drop tokens with |x| >= factor · median |x|        (paper §3: factor 10)
    position_0:  drop the first token of every sequence, where attention sinks sit
    none:        keep everything

The median is taken once, over a stated window at the head of the stream, never per batch: a median of each
batch would make what is kept depend on the batch size. Source: paper §3 and its audit in §9 A (training
filtered sinks, most analyses did not).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cosae.activations.sinks import median_norm, quantiles
from cosae.errors import CosaeError, check_choice, check_least, check_range
from cosae.types import Activations, NormSummary

FilterKind = Literal["none", "position_0", "norm"]
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class FilterPolicy:
    """What to drop, before it is known how large norms are.

    kind           none, position_0 or norm
    factor         norm: drop tokens at or above this multiple of the median norm
    window_tokens  how many tokens at the head of the stream the median is taken over
    drop_special   drop the tokenizer's special ids (BOS, EOS ...) as well, under any kind

    Raises CosaeError for an unknown kind, a factor not above 1 or an empty window.
    """

    kind: FilterKind = "norm"
    factor: float = 10.0
    window_tokens: int = 65536
    drop_special: bool = False

    def __post_init__(self) -> None:
        check_choice("filter kind", self.kind, get_args(FilterKind))
        check_range("filter factor", self.factor, "(1, inf)")
        check_least("filter window_tokens", self.window_tokens, 1)

    @property
    def left_out(self) -> str:
        """What is dropped, in words."""
        kinds = {"norm": [f"norms of at least {self.factor:g} × the median"], "position_0": ["position 0"], "none": []}
        special = ["special tokens"] if self.drop_special else []
        return " and ".join(kinds[self.kind] + special) or "nothing"


@dataclass(frozen=True)
class Filter:
    """A policy and the median it was fitted to; small enough to be written into every file.

    policy       what was declared
    median_norm  median |x| of the window, raw units
    seen_tokens  how many tokens the median was really taken over
    """

    policy: FilterPolicy
    median_norm: float
    seen_tokens: int

    @property
    def threshold(self) -> float:
        """Norm at and above which a token is dropped; infinite unless the policy is `norm`."""
        return self.policy.factor * self.median_norm if self.policy.kind == "norm" else float("inf")

    def keep(self, activations: Activations) -> Tensor:
        """(N,) bool: the tokens that take part. Tokens without a position are never at position 0."""
        if self.policy.kind == "norm":
            keep_N = activations.norm_N < self.threshold
        elif self.policy.kind == "position_0":
            keep_N = activations.position_N != 0
        else:
            keep_N = torch.ones_like(activations.special_N)
        return keep_N & ~activations.special_N if self.policy.drop_special else keep_N


def fit(policy: FilterPolicy, norm_N: Tensor) -> Filter:
    """The policy fitted to the norms of a stream's first tokens.

    norm_N: (N,) |x| of the window before any filtering; only the first `policy.window_tokens` are read.
    Raises CosaeError if there are none, if one is not finite, or if the median is 0 under the kind `norm`.
    """
    window_N = norm_N[: policy.window_tokens]
    if len(window_N) == 0:
        raise CosaeError("the filter needs at least one token to find the median norm; the stream gave none.")
    if not bool(torch.isfinite(window_N).all()):
        raise CosaeError("norms must be finite to fit a filter; check the activations for NaN or infinity.")
    median = median_norm(window_N)
    if policy.kind == "norm" and median == 0:
        raise CosaeError(
            f"the median norm of the first {len(window_N)} tokens is 0, so the filter `norm` would drop "
            "everything; check the activations or use the filter `none`."
        )
    return Filter(policy, median, len(window_N))


def norm_summary(window: Activations, filter: Filter) -> NormSummary:
    """What a run's page begins with: the norms of a window before filtering, and what the filter removes.

    total_variance is the mean of |x - mean x|² over the kept tokens, in float64, two passes.
    Raises CosaeError if the filter keeps nothing of the window.
    """
    keep_N = filter.keep(window)
    if not bool(keep_N.any()):
        raise CosaeError(
            f"the filter {filter.policy.kind!r} drops all {len(window)} tokens of the first window; "
            "choose another filter or check the activations."
        )
    norm_N = window.norm_N.double()
    marks = quantiles(norm_N, QUANTILES)
    median = median_norm(window.norm_N)
    return NormSummary(
        window_tokens=len(window),
        median_norm=median,
        mean_norm=float(norm_N.mean()),
        max_over_median=float(norm_N.max()) / median if median > 0 else float("inf"),
        quantiles=marks,
        total_variance=total_variance(window.x_ND, keep_N),
        filtered_frac=1.0 - float(keep_N.double().mean()),
    )


def describe_sinks(window: Activations, filter: Filter) -> dict[str, Any]:
    """The tokens of a window with at least `factor` × its median norm, as an event: numbers, and "text", a sentence.

    share, kept  of all tokens, before and after the filter;  energy  their share of the kept tokens' summed |x|²
    """
    policy, median = filter.policy, median_norm(window.norm_N)
    large_N, keep_N = window.norm_N >= policy.factor * median, filter.keep(window)
    over = float(window.norm_N.max()) / median if median > 0 else 1.0
    large_N &= torch.tensor(median > 0, device=large_N.device)
    square_N = window.norm_N.double().square() * keep_N
    numbers = {
        "share": float(large_N.double().mean()),
        "largest_over_median": over,
        "kept": float((large_N & keep_N).double().mean()),
        "energy": float(square_N[large_N].sum() / square_N.sum().clamp_min(1e-300)),
    }
    if not numbers["share"]:
        return {"kind": "sinks", **numbers, "text": f"no attention sinks: the largest norm is {over:.3g} × the median"}
    text = f"{100 * numbers['share']:.2g} % of tokens are attention sinks, up to {over:.3g} × the median norm"
    if not numbers["kept"]:
        return {"kind": "sinks", **numbers, "text": f"{text}; the filter {policy.kind} leaves them out of training"}
    which = "they" if numbers["kept"] == numbers["share"] else f"those it keeps ({100 * numbers['kept']:.2g} %)"
    what = f"with filter {policy.kind} {which} {'dominate' if numbers['energy'] > 0.5 else 'weigh on'} loss and FVE"
    return {"kind": "sinks", **numbers, "text": f"{text}; {what} ({100 * numbers['energy']:.2g} % of the squared norm)"}


def total_variance(x_ND: Tensor, keep_N: Tensor, rows: int = 8192) -> float:
    """Mean of |x - mean x|² over the rows where keep_N (N,) is True, in float64, two passes.

    In blocks of rows: a float64 copy of the whole window would double or quadruple its memory.
    """
    row_slices = [slice(first, first + rows) for first in range(0, len(x_ND), rows)]
    blocks = [x_ND[row][keep_N[row]] for row in row_slices]
    n_kept = int(keep_N.sum())
    mean_D = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / n_kept
    return sum(float((block.double() - mean_D).square().sum()) for block in blocks) / n_kept
