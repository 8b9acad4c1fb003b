"""A sample of activations that something is measured on: with its perturbation on, and its sinks known.

Both belong to the sample, so that no measurement can lose them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cosae.activations.sinks import FACTOR, median_norm, sink_mask
from cosae.errors import CosaeError
from cosae.types import Activations, Codes

SINKS = ("sinks_out", "sinks_in")
"""Every number is given without the sinks and with them, under these two names."""


@dataclass(frozen=True)
class SinkRule:
    """What makes a token a sink, beside position 0 and special ids: |x| of at least factor · median_norm.

    median_norm  None for the sample's own
    """

    factor: float = FACTOR
    median_norm: float | None = None

    @property
    def median(self) -> float:
        """The median norm of a rule that was applied."""
        assert self.median_norm is not None
        return self.median_norm


@dataclass(frozen=True)
class Sample:
    """N activations of one split, perturbation on, no filter; and what is known about them.

    sink_N       (N,) bool, on the CPU: the sinks among them, by `rule`
    rule         the rule, with the median norm that it was applied with
    labels_NC    (N, C) bool numpy concept labels, None where the corpus has none
    labelled_N   (N,) bool numpy: tokens whose labels are known
    truth        true codes of a synthetic world, None elsewhere
    feature_FD   its true features
    documents    names of the documents
    n_dropped    tokens left out because they were not finite (data.non_finite=drop)
    """

    activations: Activations
    sink_N: Tensor
    rule: SinkRule
    labels_NC: Any = None
    labelled_N: Any = None
    truth: Codes | None = None
    feature_FD: Tensor | None = None
    documents: tuple[str, ...] = ()
    n_dropped: int = 0

    def __post_init__(self) -> None:
        n = len(self.activations)
        if self.sink_N.dtype != torch.bool or tuple(self.sink_N.shape) != (n,):
            raise CosaeError(
                f"sinks must be a boolean tensor with one entry for each of {n} activations. Got "
                f"{self.sink_N.dtype} of shape {tuple(self.sink_N.shape)} instead."
            )

    @classmethod
    def of(cls, activations: Activations, rule: SinkRule | None = None, **known: Any) -> Sample:
        """A sample of these activations, its sinks told by `rule`."""
        rule = rule or SinkRule()
        if rule.median_norm is None:
            rule = replace(rule, median_norm=median_norm(activations.norm_N))
        return cls(activations, sink_mask(activations, rule.median, rule.factor).cpu(), rule, **known)

    @property
    def median_norm(self) -> float:
        """The norm that the sinks were held against."""
        return self.rule.median

    def __len__(self) -> int:
        return len(self.activations)

    def keep(self, sinks: str) -> Tensor:
        """(N,) bool: the tokens that count with "sinks_in", all, or with "sinks_out", those that are none."""
        return torch.ones_like(self.sink_N) if sinks == "sinks_in" else ~self.sink_N

    def __getitem__(self, keep_N: Tensor) -> Sample:
        """The tokens where keep_N (N,) is True, labels with them; sinks stay as they were told."""
        mask_N = keep_N.cpu().numpy()
        return replace(
            self,
            activations=self.activations[keep_N.to(self.activations.x_ND.device)],
            sink_N=self.sink_N[keep_N.cpu()],
            labels_NC=None if self.labels_NC is None else self.labels_NC[mask_N],
            labelled_N=None if self.labelled_N is None else self.labelled_N[mask_N],
            truth=None,
        )
