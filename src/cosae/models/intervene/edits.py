"""Changes to an SAE's features at chosen tokens: ablate, set, scale, steer.

    ablate   f_i ← 0                    scale   f_i ← factor · f_i, where it fires
    set_to   f_i ← value, at every chosen token, whether it fires or not
    steer    x′ += amount · d_i         along the decoder row, past the codes: neither a frame nor a norm-restoring
                                        decoder rescales it (there, raising one code shrinks all others: paper §9 D)

Edits are made in the order given; those on codes first change codes, steering is added to the vector at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.models.intervene.window import Where, Window, check_where, chosen
from cosae.shown import counted
from cosae.types import Codes

Features = int | Sequence[int] | Tensor
Amount = float | Sequence[float]


@dataclass(frozen=True)
class Edit:
    """One change to a set of features. Make one with `ablate`, `set_to`, `scale` or `steer`.

    kind      ablate, set, scale or steer
    features  feature ids, each once
    amounts   one number per feature
    at        the tokens: "all", "last", positions in real tokens from 0, or an (S, T) boolean tensor
    relative  steer: amounts are shares of each token's own |x|
    """

    kind: str
    features: tuple[int, ...]
    amounts: tuple[float, ...]
    at: Where
    relative: bool = False

    def __str__(self) -> str:
        """Such as "set 7 to 5" or "steer 7 by 0.5 |x| at (0, 1)"."""
        amounts = self.amounts[:1] if len(set(self.amounts)) == 1 else self.amounts
        joint = {"set": " to ", "scale": " by ", "steer": " by "}.get(self.kind)
        how = "" if joint is None else joint + ", ".join(f"{amount:g}" for amount in amounts)
        where = "a mask" if isinstance(self.at, Tensor) else self.at
        at = "" if where == "all" else f" at {where}"
        return f"{self.kind} {', '.join(map(str, self.features))}{how}{' |x|' if self.relative else ''}{at}"


def ablate(features: Features, at: Any = "all") -> Edit:
    """Take features out of the codes at the chosen tokens. Raises CosaeError for what is no set of feature ids."""
    return _edit("ablate", features, 0.0, at)


def set_to(features: Features, value: Amount, at: Any = "all") -> Edit:
    """Give features this code value (one, or one each) at every chosen token, whether they fire there or not."""
    return _edit("set", features, value, at)


def scale(features: Features, factor: Amount, at: Any = "all") -> Edit:
    """Multiply the codes of features where they fire; 0 takes them out."""
    return _edit("scale", features, factor, at)


def steer(features: Features, amount: Amount, at: Any = "all", relative: bool = False) -> Edit:
    """Add amount · decoder row to the vectors of the chosen tokens, in units of x.

    With relative=True the amount is a share of each token's |x|, so that long and short tokens are pushed alike.
    """
    return _edit("steer", features, amount, at, relative)


def _edit(kind: str, features: Features, amount: Amount, at: Any, relative: bool = False) -> Edit:
    wanted, given = _listed(features), _listed(amount)
    ids = tuple(i.__index__() for i in wanted if hasattr(i, "__index__") and not isinstance(i, bool))
    if not ids or len(ids) != len(wanted) or min(ids) < 0 or len(set(ids)) != len(ids):
        raise CosaeError(
            f"features must be feature ids of at least 0, each once, in whole numbers. Got {features!r} instead."
        )
    try:
        amounts = tuple(float(value) for value in given) * (len(ids) if len(given) == 1 else 1)
    except (TypeError, ValueError):
        raise CosaeError(f"an edit's amount must be a number. Got {amount!r} instead.") from None
    if len(amounts) != len(ids) or not all(math.isfinite(value) for value in amounts):
        each = counted(len(ids), "feature")
        raise CosaeError(f"an edit needs one finite number, or one for each of its {each}. Got {amount!r} instead.")
    return Edit(kind, ids, amounts, check_where(at), relative)


def _listed(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        value = value.reshape(-1).tolist()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def check_edits(edits: Any, d_sae: int, name: str) -> tuple[Edit, ...]:
    """The edits of one SAE. Raises CosaeError for what is no edit and for a feature the SAE does not have."""
    listed = (edits,) if isinstance(edits, Edit) else tuple(edits)
    for edit in listed:
        if not isinstance(edit, Edit):
            raise CosaeError(f"edits must be made with ablate, set_to, scale or steer. Got {edit!r} instead.")
        if max(edit.features) >= d_sae:
            worst = max(edit.features)
            raise CosaeError(
                f"Feature {worst} is out of range: the SAE at {name} has {counted(d_sae, 'feature')}, 0 to {d_sae - 1}."
            )
    return listed


def edit_codes(codes: Codes, edits: Sequence[Edit], window: Window, covered_N: Tensor) -> tuple[Codes, Tensor]:
    """Codes of S·T tokens with the edits on codes made, and (N,) bool: the tokens where one was made.

    covered_N (N,) bool: tokens the SAE stands in for; no other is edited. Differentiable in the values.
    """
    touched_N = torch.zeros_like(covered_N)
    token_E, feature_E, value_E = codes.token_E, codes.feature_E, codes.value_E
    before = codes
    for edit in edits:
        if edit.kind == "steer":
            continue
        at_N = chosen(edit.at, window).reshape(-1).to(covered_N.device) & covered_N
        id_n = torch.tensor(edit.features, device=feature_E.device)
        amount_n = torch.tensor(edit.amounts, device=value_E.device, dtype=value_E.dtype)
        on_E = at_N.to(token_E.device)[token_E] & torch.isin(feature_E, id_n)
        if edit.kind == "set":
            touched_N |= at_N
        else:
            touched_N[token_E[on_E].to(touched_N.device)] = True
        if edit.kind == "scale":
            factor_E = torch.ones_like(value_E).masked_scatter(on_E, _amount_of(feature_E[on_E], id_n, amount_n))
            value_E = value_E * factor_E
        else:
            token_E, feature_E, value_E = token_E[~on_E], feature_E[~on_E], value_E[~on_E]
        if edit.kind == "set":
            added_n = at_N.nonzero()[:, 0].to(token_E.device)
            token_E = torch.cat([token_E, added_n.repeat_interleave(len(id_n))])
            feature_E = torch.cat([feature_E, id_n.repeat(len(added_n))])
            value_E = torch.cat([value_E, amount_n.repeat(len(added_n))])
    if not bool(touched_N.any()):
        return before, touched_N
    kept = (value_E != 0).nonzero()[:, 0]
    kept = kept[torch.argsort(token_E[kept] * codes.d_sae + feature_E[kept])]
    edited = Codes.from_entries(
        token_E[kept], feature_E[kept], value_E[kept], codes.d_sae, codes.shape, codes.norm_stats
    )
    return edited, touched_N


def _amount_of(feature_E: Tensor, id_n: Tensor, amount_n: Tensor) -> Tensor:
    order = id_n.argsort()
    return amount_n[order][torch.searchsorted(id_n[order], feature_E)]


def steering(edits: Sequence[Edit], rows_FD: Tensor, x_ND: Tensor, window: Window, covered_N: Tensor) -> Tensor | None:
    """(N, D) what steering adds, in x's dtype; None where nothing steers."""
    total_ND: Tensor | None = None
    for edit in edits:
        if edit.kind != "steer":
            continue
        at_N = chosen(edit.at, window).reshape(-1).to(covered_N.device) & covered_N
        rows_nD = rows_FD[list(edit.features)].detach().to(x_ND.device, x_ND.dtype)
        direction_D = torch.tensor(edit.amounts, device=x_ND.device, dtype=x_ND.dtype) @ rows_nD
        amount_N = torch.linalg.vector_norm(x_ND.detach(), dim=-1) if edit.relative else torch.ones_like(x_ND[:, 0])
        added_ND = torch.where(at_N[:, None], amount_N[:, None] * direction_D, 0.0)
        total_ND = added_ND if total_ND is None else total_ND + added_ND
    return total_ND
