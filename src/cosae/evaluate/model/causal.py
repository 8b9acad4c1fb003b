"""What features do to the model's predictions: ablating and steering them, where their concept holds and elsewhere.

In: a causal language model, an SAE at a site, sequences, named edits. Out: plain numbers, nats per token:

    kl                    KL(reference ‖ edited), float64
    cross_entropy_change  of the next token, edited minus reference
    on, off               tokens where the concept (by default: any of the edit's features) holds, and all others
    off_reached           those of `off` that an edit could reach: edited themselves, or later in their sequence
    precision             mean KL on / mean KL off     (paper §6, concept control)
    on_share              Σ KL on / Σ KL               free of how many tokens are off, and never undefined by a 0
    size, relative_size   mean |Δx| and |Δx|/|x| over edited tokens: effects of edits of unequal size do not compare

The reference is the model itself: the SAE's error stays in (`error_term=True`), so that an effect is the edit's alone.
With error_term=False it is the model on the unedited reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.evaluate.model.predictions import cross_entropy, divergence, logits_at, next_ids, scored_batches
from cosae.evaluate.statistics import RESAMPLES, mean_interval, mean_or_none, ratio_interval, resample_counts
from cosae.io.progress import SILENT, Progress
from cosae.models.capture import capture
from cosae.models.intervene.edits import Edit, ablate, check_edits, steer
from cosae.models.intervene.hooks import Intervention
from cosae.models.intervene.replacement import Replacement, SplicedSAE
from cosae.models.intervene.splice import special_ids_of, transcodes
from cosae.models.intervene.window import Policy, Window
from cosae.models.sites import resolve_site
from cosae.types import Codes, Sequences, Site

Holds = Tensor | Mapping[str, Tensor] | None
"""(S, T) bool, for all edits or by name: where the concept holds; None: where any of an edit's features fires."""


class Effect(TypedDict):
    """Effect of one edit on one set of tokens; means are None of no tokens."""

    tokens: int
    kl: float | None
    cross_entropy_change: float | None


def measure_ablation(
    model: nn.Module,
    site: str | Site,
    sae: SplicedSAE,
    sequences: Sequences,
    features: Sequence[int | Sequence[int]],
    **options: Any,
) -> dict[str, Any]:
    """`measure_edits` of taking out each feature, or each set of them: named "7" and "7+9". Options as there."""
    return measure_edits(model, site, sae, sequences, _by_name(features, ablate), **options)


def measure_steering(
    model: nn.Module,
    site: str | Site,
    sae: SplicedSAE,
    sequences: Sequences,
    features: Sequence[int | Sequence[int]],
    amount: float = 0.1,
    relative: bool = True,
    at: Any = "all",
    **options: Any,
) -> dict[str, Any]:
    """`measure_edits` of adding amount · decoder row of each feature, or set. Other options as there.

    By default a tenth of each token's own |x|, which makes the push of every feature with a unit row the same size.
    """
    edits = _by_name(features, partial(steer, amount=amount, at=at, relative=relative))
    return measure_edits(model, site, sae, sequences, edits, **options)


def _by_name(features: Sequence[int | Sequence[int]], edit: Callable[[Any], Edit]) -> dict[str, Edit]:
    sets = [(one,) if isinstance(one, int) else tuple(one) for one in features]
    return {"+".join(map(str, ids)): edit(ids) for ids in sets}


def measure_edits(
    model: nn.Module,
    site: str | Site,
    sae: SplicedSAE,
    sequences: Sequences,
    edits: Mapping[str, Edit | Sequence[Edit]],
    *,
    holds: Holds = None,
    error_term: bool = True,
    tokens: Policy | None = None,
    batch_sequences: int = 8,
    seed: int = 0,
    n_resamples: int = RESAMPLES,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Effects of named edits, each alone, on the predictions of `sequences`.

    holds   where the concept behind an edit holds, over the columns of `sequences`: one (S, T) boolean tensor, or one
            by name; by default where any of the edit's features fires
    tokens  tokens that may be edited, as in `spliced`: by default what the filter of the SAE's training keeps

    Returns site, tokens (scored ones), edits[name] (features, edited_tokens, size, relative_size, on, off, off_reached,
    precision, on_share) and `pooled` over the edits (mean KL on and off, precision = their ratio, with 95 % intervals
    by bootstrap over edits; None where nothing was measured). Changes no SAE. Raises CosaeError as `spliced` does, for
    no edits, and for `holds` of another shape or name.
    """
    if not edits:
        raise CosaeError("measure_edits needs at least one named edit, as in {'quotes': ablate(7)}. Got none.")
    if transcodes(sae):
        raise CosaeError("the effect of single features is measured for SAEs, and this is a transcoder: splice it.")
    found = resolve_site(model, site)
    listed = {name: check_edits(one, sae.d_sae, found.name) for name, one in edits.items()}
    capture(model, sequences[:1], found)  # refuses what no pass should begin with
    special = special_ids_of(model)
    replaced = partial(Replacement, sae, error_term=error_term, tokens=tokens, special_ids=special, name=found.name)
    rules, reference = {name: replaced(edits=one) for name, one in listed.items()}, replaced(edits=())
    held = _check_holds(holds, list(edits), sequences)
    gathered: dict[str, list[_Tokens]] = {name: [] for name in edits}
    for rows, batch, at_ST in scored_batches(sequences, batch_sequences, progress):
        pass_ = _Pass(model, found, batch, at_ST, reference)
        for name, rule in rules.items():
            on_ST = held[name][rows] if held is not None else pass_.fires(listed[name])
            gathered[name].append(pass_.effect(rule, listed[name], on_ST))
    table = {name: _summary(listed[name], parts) for name, parts in gathered.items()}
    return {
        "site": found.name,
        "tokens": sum(len(part.kl_n) for part in next(iter(gathered.values()))),
        "edits": table,
        "pooled": _pooled(list(table.values()), seed, n_resamples),
    }


class _Tokens(NamedTuple):
    """One edit on one batch: by scored token (n) what it changed, and by edited token (e) how far it moved."""

    kl_n: Tensor
    change_n: Tensor
    on_n: Tensor
    reached_n: Tensor
    size_e: Tensor
    norm_e: Tensor


class _Pass:
    """One batch: its reference predictions and codes, against which edits are held."""

    def __init__(self, model: nn.Module, site: Site, batch: Sequences, at_ST: Tensor, reference: Replacement) -> None:
        self.model, self.site, self.batch, self.at_ST, self.reference = model, site, batch, at_ST, reference
        self.next_n = next_ids(batch, at_ST)
        self.seen: list[Codes] = []

        def read(x: Tensor, window: Window) -> Tensor:
            replaced = reference(x, window)
            assert replaced.codes is not None
            self.seen.append(replaced.codes)
            return replaced.x

        with Intervention(model, {site: read}):
            self.logits_nV = logits_at(model, batch, self.at_ST)
        self.surprise_n = cross_entropy(self.logits_nV, self.next_n)

    def fires(self, edits: Sequence[Edit]) -> Tensor:
        """(S, T) bool: tokens where any feature of the edits fires before them."""
        codes = self.seen[0]
        ids = torch.tensor([i for edit in edits for i in edit.features], device=codes.feature_E.device)
        on_N = torch.zeros(codes.n_tokens, dtype=torch.bool)
        on_N[codes.token_E[torch.isin(codes.feature_E, ids)].cpu()] = True
        return on_N.reshape(codes.shape)

    def effect(self, rule: Replacement, edits: Sequence[Edit], on_ST: Tensor) -> _Tokens:
        idle = all(edit.kind in ("ablate", "scale") for edit in edits) and not bool(self.fires(edits).any())
        if idle:  # nothing to take out of this batch: every number is 0 without a pass
            zero_n, none = torch.zeros(len(self.next_n), dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
            return _Tokens(zero_n, zero_n, on_ST[self.at_ST], zero_n.bool(), none, none)
        sizes: list[Tensor] = []

        def act(x: Tensor, window: Window) -> Tensor:
            new = rule(x, window).x
            change = (new.double() - self.reference(x, window).x.double()).norm(dim=-1)
            sizes.extend([change.reshape(on_ST.shape).cpu(), x.double().norm(dim=-1).reshape(on_ST.shape).cpu()])
            return new

        with Intervention(self.model, {self.site: act}):
            logits_nV = logits_at(self.model, self.batch, self.at_ST)
        size_ST, norm_ST = sizes
        edited_ST = (size_ST > 0) & self.batch.mask_ST
        return _Tokens(
            divergence(self.logits_nV, logits_nV),
            cross_entropy(logits_nV, self.next_n) - self.surprise_n,
            on_ST[self.at_ST],
            (edited_ST.cumsum(1) > 0)[self.at_ST],
            size_ST[edited_ST],
            norm_ST[edited_ST],
        )


def _summary(edits: Sequence[Edit], parts: Sequence[_Tokens]) -> dict[str, Any]:
    kl_n, change_n, on_n, reached_n, size_e, norm_e = (torch.cat(column) for column in zip(*parts, strict=True))
    on, off = _effect(kl_n, change_n, on_n), _effect(kl_n, change_n, ~on_n)
    # summed apart: where nothing moves off the feature, the share is 1 to the last bit
    kl_on, kl_off = float(kl_n[on_n].sum()), float(kl_n[~on_n].sum())
    return {
        "features": sorted({i for edit in edits for i in edit.features}),
        "kinds": sorted({edit.kind for edit in edits}),
        "edited_tokens": len(size_e),
        "size": mean_or_none(size_e),
        "relative_size": mean_or_none(size_e / norm_e),
        "on": on,
        "off": off,
        "off_reached": _effect(kl_n, change_n, ~on_n & reached_n),
        "precision": on["kl"] / off["kl"] if on["kl"] is not None and off["kl"] else None,
        "on_share": kl_on / (kl_on + kl_off) if kl_on + kl_off > 0 else None,
    }


def _effect(kl_n: Tensor, change_n: Tensor, in_n: Tensor) -> Effect:
    kl, change = mean_or_none(kl_n[in_n]), mean_or_none(change_n[in_n])
    return {"tokens": int(in_n.sum()), "kl": kl, "cross_entropy_change": change}


def _pooled(rows: Sequence[Mapping[str, Any]], seed: int, n_resamples: int) -> dict[str, Any]:
    """Means over the edits that have tokens of both kinds, every edit counting once."""
    both = [row for row in rows if row["on"]["tokens"] and row["off"]["tokens"]]
    pooled: dict[str, Any] = {"edits": len(both), "edits_left_out": len(rows) - len(both)}
    if not both:
        return {**pooled, "on_kl": None, "off_kl": None, "precision": None, "seed": seed}
    on_U, off_U = (np.array([row[side]["kl"] for row in both]) for side in ("on", "off"))
    ratio = ratio_interval(on_U, off_U, resample_counts(len(both), seed, n_resamples))
    return {
        **pooled,
        "on_kl": mean_interval(on_U, seed, n_resamples),
        "off_kl": mean_interval(off_U, seed, n_resamples),
        "precision": ratio and {"mean": ratio.value, "low": ratio.low, "high": ratio.high},
        "seed": seed,
        "resamples": n_resamples,
    }


def _check_holds(holds: Holds, names: Sequence[str], sequences: Sequences) -> dict[str, Tensor] | None:
    if holds is None:
        return None
    by_name = dict(holds) if isinstance(holds, Mapping) else dict.fromkeys(names, holds)
    if set(by_name) != set(names):
        raise CosaeError(f"holds must be given for every edit ({', '.join(names)}). Got {', '.join(by_name)} instead.")
    shape = tuple(sequences.ids_ST.shape)
    for name, mask in by_name.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise CosaeError(f"holds of '{name}' must be a boolean tensor of shape {shape}, one entry per token.")
    return {name: mask.cpu() for name, mask in by_name.items()}
