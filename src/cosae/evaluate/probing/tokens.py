"""Sparse probing of tokens: does one latent know one concept? (paper §6; labels from `text.concepts`)

In: the codes of every arm on the same train and held-out tokens, and the tokens' labels. Out: plain numbers. For each
concept one latent is chosen on train and scored on held-out tokens, by AUROC and average precision: by the highest
AUROC (it must fire FOR the concept), by SAEBench's rule, the largest |mean₊ − mean₋| of raw codes, and by that
difference over the latent's standard deviation; for the last two the held-out score is the code times the sign of the
difference on train. Which arm wins depends on the rule, so all are reported.

Intervals are percentile bootstrap over concepts; all arms share the resamples: differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from cosae.errors import CosaeError
from cosae.evaluate.probing import baselines, logistic
from cosae.evaluate.probing.ranking import (
    RULES,
    Labels,
    Rule,
    columns_of,
    qualities_of_latents,
    rank_quality,
    rank_quality_of_latents,
    select_by,
)
from cosae.evaluate.statistics import RESAMPLES, mean_interval, paired_mean_interval
from cosae.io.progress import SILENT, Progress
from cosae.text.concepts.labels import Concept
from cosae.types import Activations, Codes

GROUPS = ("all", "lexical", "contextual")
METRICS = ("auroc", "average_precision")
RANDOM = "random_sae"
AT_ONCE = 4
"""Arms and baselines that are ranked side by side where there are cores: an arm holds (F, C) values of every rule."""

Table = dict[str, Any]
"""One row of results: "auroc" and "average_precision", a list over concepts each, and "latent" for arms."""


@dataclass(frozen=True)
class Split:
    """The tokens of one side that the caller's mask keeps, with the labels of the concepts that are probed."""

    codes: dict[str, Codes]
    activations: Activations
    label_NC: Labels


def probe(
    train: Mapping[str, Codes],
    held_out: Mapping[str, Codes],
    activations_train: Activations,
    activations_held_out: Activations,
    labels_train_NC: Labels,
    labels_held_out_NC: Labels,
    concepts: Sequence[Concept],
    *,
    random_arm: tuple[Codes, Codes] | None = None,
    baseline_arm: str | None = "standard",
    rules: Sequence[Rule] = RULES,
    tops: Sequence[int] = (1,),
    min_positives: int = 200,
    n_bootstrap: int = RESAMPLES,
    seed: int = 0,
    keep_train: Labels | None = None,
    keep_held_out: Labels | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Sparse probing of every arm, beside its floors and its ceiling; what it returns is ready for JSON.

    train, held_out    codes of each arm by its name, on the same tokens as the activations of that side
    labels_*_NC        (N, C) bool numpy arrays, a column for each of `concepts`
    random_arm         (train, held-out) codes of an SAE with random weights: the baseline "random_sae"
    baseline_arm       the arm that all others are compared with, pair by pair; None for no comparison
    rules              how latents are chosen: those of `ranking`
    tops               latents for each concept: one is scored as it is; n > 1 through a logistic regression, fitted on
                       train, on the rule's n best, and stand under "RULE/top_n"
    min_positives      a concept is probed if it has this many tokens, and this many others, on both sides
    keep_*             (N,) bool masks of tokens to look at (without sinks, say); all by default

    Returns n_train, n_held_out, seed, min_positives; concepts: those probed; arms[arm][rule]: latent, auroc and
    average_precision of each concept; baselines[name]: auroc, average_precision; summary[arm or baseline][rule,
    or "baseline"][all | lexical | contextual][metric]: mean, low, high over concepts (None in a group without
    concepts); paired: differences from the baseline arm with 95 % intervals.

    Raises CosaeError when sides, sizes or names do not fit, or no concept is frequent enough.
    """
    _check_names(train, held_out, baseline_arm)
    if not tops or min(tops) < 1:
        raise CosaeError(f"tops must be counts of latents, each at least 1. Got {list(tops)} instead.")
    names = list(train)
    if random_arm is not None:
        train, held_out = {**train, RANDOM: random_arm[0]}, {**held_out, RANDOM: random_arm[1]}
    sides, probed = _frequent(
        (
            _split(train, activations_train, labels_train_NC, keep_train, len(concepts)),
            _split(held_out, activations_held_out, labels_held_out_NC, keep_held_out, len(concepts)),
        ),
        concepts,
        min_positives,
    )
    readings = {arm: partial(_readings, *sides, arm, rules, tops, progress.check) for arm in names}
    floors: dict[str, Table] = _side_by_side({**_baselines(*sides, progress.check), **readings}, progress)
    arms: dict[str, dict[str, Table]] = {name: floors.pop(name) for name in names}
    rows = arms | {name: {"baseline": row} for name, row in floors.items()}
    return {
        "n_train": len(sides[0].activations),
        "n_held_out": len(sides[1].activations),
        "seed": seed,
        "min_positives": min_positives,
        "concepts": _describe(probed, sides[0].label_NC, sides[1].label_NC),
        "arms": arms,
        "baselines": floors,
        "summary": {
            name: {rule: _summary(row, probed, seed, n_bootstrap) for rule, row in by_rule.items()}
            for name, by_rule in rows.items()
        },
        "paired": [] if baseline_arm is None else _compare(arms, baseline_arm, probed, seed, n_bootstrap),
    }


def _readings(
    train: Split, held_out: Split, arm: str, rules: Sequence[Rule], tops: Sequence[int], check: Callable[[], None]
) -> dict[str, Table]:
    """Under each rule its latent, scored, with its sign, on held-out tokens; under RULE/top_n a regression on n."""
    check()
    quality = qualities_of_latents(train.codes[arm], train.label_NC, rules)
    held_out_NF, label_NC = columns_of(held_out.codes[arm]), held_out.label_NC
    found: dict[str, Table] = {}
    for rule, n in product(rules, tops):
        check()
        value_FC = quality[rule]
        if n == 1:
            chosen = select_by(value_FC, rule)
            ranked = rank_quality_of_latents(held_out_NF, chosen.latent_C, chosen.sign_C, label_NC)
            found[rule] = {"latent": chosen.latent_C.tolist(), **_named(ranked)}
            continue
        best_FC = (-value_FC if rule == "auroc" else -np.abs(value_FC)).argsort(axis=0, kind="stable")[:n]
        train_NF = columns_of(train.codes[arm])
        score_NC = np.empty(label_NC.shape)
        for c, latent_n in enumerate(best_FC.T):
            known = train_NF[:, latent_n].toarray(), train.label_NC[:, [c]]
            score_NC[:, [c]] = logistic.scores(*known, held_out_NF[:, latent_n].toarray(), check=check)
        found[f"{rule}/top_{n}"] = {"latent": best_FC.T.tolist(), **_named(rank_quality(score_NC, label_NC))}
    return found


def _summary(row: Table, concepts: Sequence[Concept], seed: int, n_bootstrap: int) -> dict[str, Any]:
    """Mean over the concepts of each group with its bootstrap interval: [group][metric] → mean, low, high."""
    summary: dict[str, Any] = {}
    for group in GROUPS:
        member_C = _members(concepts, group)
        summary[group] = {
            metric: mean_interval(np.array(row[metric])[member_C], seed, n_bootstrap)
            if member_C.any()
            else {"mean": None, "low": None, "high": None}
            for metric in METRICS
        }
    return summary


def _compare(
    arms: Mapping[str, Mapping[str, Table]],
    baseline_arm: str,
    concepts: Sequence[Concept],
    seed: int,
    n_bootstrap: int,
) -> list[dict[str, Any]]:
    """Every other arm minus the baseline arm, paired by concept, by rule, group with concepts, and metric."""
    rows: list[dict[str, Any]] = []
    for arm in (name for name in arms if name != baseline_arm):
        for rule in arms[arm]:
            for group in GROUPS:
                member_C = _members(concepts, group)
                for metric in METRICS if member_C.any() else ():
                    ours, theirs = (np.array(arms[name][rule][metric])[member_C] for name in (arm, baseline_arm))
                    key = {"arm": arm, "versus": baseline_arm, "rule": rule, "group": group, "metric": metric}
                    rows.append({**key, **paired_mean_interval(ours, theirs, seed, n_bootstrap)})
    return rows


def _baselines(train: Split, held_out: Split, check: Callable[[], None]) -> dict[str, Callable[[], Table]]:
    """What makes the row of each baseline."""

    def scored(scores: Callable[..., Any]) -> Table:
        return _named(rank_quality(scores(train.activations, train.label_NC, held_out.activations), held_out.label_NC))

    def untrained() -> Table:
        row = _readings(train, held_out, RANDOM, ("auroc",), (1,), check)["auroc"]
        return {metric: row[metric] for metric in METRICS}

    return {
        "logistic": partial(scored, partial(baselines.logistic, check=check)),
        "best_dimension": partial(scored, baselines.best_dimension),
        "token_identity": partial(scored, baselines.token_identity),
        "norm": partial(scored, baselines.norm_alone),
        **({RANDOM: untrained} if RANDOM in train.codes else {}),
    }


def _side_by_side(tasks: Mapping[str, Callable[[], Any]], progress: Progress) -> dict[str, Any]:
    """What the tasks return, by name; on several threads, since sorting and sparse sums let go of the lock."""
    pool = ThreadPoolExecutor(max(1, min(AT_ONCE, torch.get_num_threads())))
    try:
        waiting = {name: pool.submit(task) for name, task in tasks.items()}
        for _ in progress.each(as_completed(waiting.values()), "probing", "SAEs and baselines", len(waiting)):
            pass
        return {name: one.result() for name, one in waiting.items()}
    finally:
        pool.shutdown(cancel_futures=True)  # after a fault or Ctrl-C only what is being ranked is waited for


def _named(found: Sequence[Any]) -> Table:
    return {name: column.tolist() for name, column in zip(METRICS, found, strict=True)}


def _describe(concepts: Sequence[Concept], train_NC: Labels, held_out_NC: Labels) -> list[dict[str, Any]]:
    counts = zip(concepts, train_NC.sum(axis=0).tolist(), held_out_NC.sum(axis=0).tolist(), strict=True)
    return [
        {
            "name": concept.name,
            "group": concept.group,
            "description": concept.description,
            "positives_train": in_train,
            "positives_held_out": in_held_out,
        }
        for concept, in_train, in_held_out in counts
    ]


def _members(concepts: Sequence[Concept], group: str) -> Labels:
    return np.array([group in ("all", concept.group) for concept in concepts], dtype=bool)


def _check_names(train: Mapping[str, Codes], held_out: Mapping[str, Codes], baseline_arm: str | None) -> None:
    if set(train) != set(held_out) or not train:
        raise CosaeError(
            f"both sides must hold the same arms, at least one; got {sorted(train)} for train and "
            f"{sorted(held_out)} for held-out"
        )
    taken = {"token_identity", "norm", "best_dimension", "logistic", RANDOM} & set(train)
    if taken:
        raise CosaeError(f"an arm must not have the name of a baseline; got {sorted(taken)}: rename it")
    if baseline_arm is not None and baseline_arm not in train:
        raise CosaeError(f"baseline_arm must be one of {sorted(train)} or None. Got {baseline_arm!r} instead.")


def _split(
    codes: Mapping[str, Codes], activations: Activations, label_NC: Labels, keep_N: Labels | None, n_concepts: int
) -> Split:
    """The tokens of one side that are looked at."""
    if label_NC.ndim != 2 or label_NC.shape[1] != n_concepts:
        raise CosaeError(f"labels must have a column for each of {n_concepts} concepts; got {label_NC.shape}")
    for arm, arm_codes in codes.items():
        if not arm_codes.n_tokens == len(activations) == len(label_NC):
            raise CosaeError(
                f"codes, activations and labels must be of the same tokens; got {arm_codes.n_tokens} (arm {arm!r}), "
                f"{len(activations)} and {len(label_NC)}"
            )
    if keep_N is None:
        return Split(dict(codes), activations, label_NC)
    kept = {arm: arm_codes.take(keep_N) for arm, arm_codes in codes.items()}
    return Split(kept, activations[torch.as_tensor(keep_N, device=activations.x_ND.device)], label_NC[keep_N])


def _frequent(
    sides: tuple[Split, Split], concepts: Sequence[Concept], min_positives: int
) -> tuple[tuple[Split, Split], list[Concept]]:
    """Both sides with the labels, and the concepts, of which each has enough tokens of both kinds."""
    rarer_C = [np.minimum(one.label_NC.sum(axis=0), (~one.label_NC).sum(axis=0)) for one in sides]
    kept = np.flatnonzero(np.minimum(*rarer_C) >= max(min_positives, 1))
    if not len(kept):
        raise CosaeError(
            f"probing needs a concept with {min_positives} tokens on both sides; got none among {len(concepts)}: "
            "give more tokens or lower min_positives"
        )
    train, held_out = (replace(one, label_NC=one.label_NC[:, kept]) for one in sides)
    return (train, held_out), [concepts[c] for c in kept.tolist()]
