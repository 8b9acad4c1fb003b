"""`cosae features`: what the features of an SAE fire on and what they promote, for a terminal and from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.activations.filter import Filter
from cosae.browse.top import Example, Features, kept, read_features
from cosae.errors import CosaeError
from cosae.models.intervene.window import own_filter
from cosae.models.unembed import residual_directions, spelling, unembedding
from cosae.report.terminal import text_table
from cosae.run.dataset.model import batch_size
from cosae.run.explore.text import read_text
from cosae.run.export import Opened, open_reading
from cosae.run.requests import FeatureOptions, Reading
from cosae.shown import counted, spelled_out

BEFORE, AFTER = 12, 6
"""Tokens of context around an example."""
LOGITS = 10
SAMPLES = 4
"""Tokens of a table's cell."""


@dataclass(frozen=True)
class Match:
    """A feature on a text: its largest value there, as a share of that in the corpus too, and on which token."""

    feature: int
    relative: float
    value: float
    token: int


@dataclass(frozen=True)
class Look:
    """An SAE with its model, and what its features fired on in the text."""

    opened: Opened
    found: Features
    fitted: Filter | None

    def spell(self, token: int) -> str:
        """The text of a token id, in one line."""
        return spelled_out(spelling(self.opened.tokenizer, token))

    def in_context(self, example: Example) -> str:
        """An example's text in one line, its own token «marked»."""
        ids_T, at = example.ids_T, example.at
        before = [self.spell(token) for token in ids_T[max(0, at - BEFORE) : at]]
        after = [self.spell(token) for token in ids_T[at + 1 : at + 1 + AFTER]]
        return f"{''.join(before)}«{self.spell(ids_T[at])}»{''.join(after)}"

    def top_tokens(self, feature: int) -> list[str]:
        """The distinct tokens of the largest examples."""
        tokens = (example.ids_T[example.at] for example in self.found.examples(feature))
        return list(dict.fromkeys(self.spell(token) for token in tokens))

    @cached_property
    def _unembedding_VD(self) -> Tensor | None:
        return unembedding(self.opened.model)

    def logits(self, feature: int) -> Tensor | None:
        """(V,) what a feature's decoder row adds to the logits, up to the final norm's scale (cosae.models.unembed).

        None where the row does not lie in the residual stream, or the model has no unembedding.
        """
        opened = self.opened
        direction_1D = residual_directions(opened.model, opened.written, opened.sae.W_dec[feature : feature + 1])
        known = direction_1D is not None and self._unembedding_VD is not None
        return self._unembedding_VD @ direction_1D[0] if known else None  # type: ignore[index, operator]

    def promoted(self, feature: int, n: int = LOGITS, down: bool = False) -> list[tuple[str, float]]:
        """The n tokens whose logits the feature raises most, or lowers; none where its site writes to none."""
        logit_V = self.logits(feature)
        if logit_V is None:
            return []
        top = logit_V.topk(min(n, len(logit_V)), largest=not down)
        return [(self.spell(int(i)), float(v)) for v, i in zip(top.values, top.indices, strict=True)]

    def search(self, text: str, n: int = 20) -> list[Match]:
        """The features that fire most on a text, relative to their largest value in the corpus; the highest first.

        Features that never fired in the corpus are not compared. Raises CosaeError for a text without a token that
        counts.
        """
        opened = self.opened
        found = read_text(opened.model, opened.tokenizer, opened.site, opened.data, text)
        on_N = kept(found, self.fitted)
        if not bool(on_N.any()):
            raise CosaeError(f"the text {text!r} has no token that counts: give a longer one.")
        with torch.no_grad():
            codes = opened.sae.encode(found.x_ND[on_N])
        token_N = found.token_N[on_N].tolist()
        largest_E = self.found.largest_F[codes.feature_E.cpu().numpy()]
        share_E = codes.value_E.abs().double().cpu().numpy() / np.where(largest_E > 0, largest_E, np.inf)
        matches: dict[int, Match] = {}
        for entry in np.argsort(-share_E, kind="stable").tolist():
            feature = int(codes.feature_E[entry])
            if share_E[entry] > 0 and len(matches) < n:
                token = token_N[int(codes.token_E[entry])]
                matches.setdefault(feature, Match(feature, float(share_E[entry]), float(codes.value_E[entry]), token))
        return list(matches.values())


def look(path: Path, reading: Reading, examples: int = 10, log: Callable[[str], None] = lambda _: None) -> Look:
    """Run an SAE's model on its text once, and keep what each of its features fires on most.

    Tokens that the SAE's training left out are not counted. Raises CosaeError for what cannot be read, and for a
    model or text of this machine that only the SAE's file names.
    """
    opened = open_reading(path, reading, log)
    fitted = own_filter(opened.sae.metadata)
    at_once = batch_size(opened.data, opened.model, opened.site, "float32")
    options: dict[str, Any] = {"fitted": fitted, "n_examples": examples, "batch_sequences": at_once, "log": log}
    return Look(opened, read_features(opened.model, opened.site, opened.sae, opened.sequences, **options), fitted)


def screen(looked: Look, options: FeatureOptions) -> str:
    """What was asked for, as text for a terminal: tokens are spelled without characters that a terminal obeys."""
    known = looked.opened.metadata
    found = looked.found
    what = ["special tokens", *([looked.fitted.policy.left_out] if looked.fitted is not None else [])]
    left_out = f" ({found.n_left_out:,} left out: {', '.join(what)})" if found.n_left_out else ""
    where = f"{known['sae']} at {known['site']} of {known['model']}"
    head = f"{where}: {counted(found.n_tokens, 'token')} of {known['corpus']}{left_out}"
    if options.feature:
        return "\n\n".join([spelled_out(head), *(_in_full(looked, feature) for feature in options.feature)])
    if options.search is not None:
        matches = looked.search(options.search, options.rows)
        columns: list[tuple[str, str, list[Any]]] = [
            ("of its largest", ".0%", [match.relative for match in matches]),
            ("value", ".3g", [match.value for match in matches]),
            ("on", "", [f"«{looked.spell(match.token)}»" for match in matches]),
        ]
        return _table(looked, [match.feature for match in matches], columns, [head, f"features on {options.search!r}"])
    dead = int((found.count_F == 0).sum())
    order = np.argsort(-np.nan_to_num(_keys(found)[options.sort], nan=-1.0), kind="stable")[: options.rows]
    n_features = counted(len(found.count_F), "feature")
    title = f"{len(order):,} of {n_features} by {options.sort}; {dead:,} never fire on these tokens"
    return _table(looked, order.tolist(), [], [head, title])


def _keys(found: Features) -> dict[str, NDArray[Any]]:
    return {"density": found.density_F, "largest": found.largest_F, "norm": found.driven_F}


def _table(
    looked: Look, features: Sequence[int], columns: Sequence[tuple[str, str, Sequence[Any]]], title: Sequence[str]
) -> str:
    """A row a feature: its number, the columns given, density, largest value, norm-driven share, top tokens, logits."""
    found = looked.found
    promotes = bool(features) and looked.logits(features[0]) is not None
    names = ["feature", *(name for name, _, _ in columns), "density", "largest", "by norm", "fires most on"]
    rows = []
    for at, feature in enumerate(features):
        driven = None if np.isnan(found.driven_F[feature]) else float(found.driven_F[feature])
        numbers = [float(found.density_F[feature]), float(found.largest_F[feature]), driven]
        shown = "  ".join(f"«{token}»" for token in looked.top_tokens(feature)[:SAMPLES])
        raised = ["  ".join(f"«{text}»" for text, _ in looked.promoted(feature, SAMPLES))] if promotes else []
        rows.append([str(feature), *(values[at] for _, _, values in columns), *numbers, shown, *raised])
    formats = ["", *(form for _, form, _ in columns), ".3%", ".3g", ".0%"]
    align = "r" * (len(columns) + 4) + "ll"
    return text_table(
        [*names, *(["promotes"] if promotes else [])], rows, title=title, formats=formats, align=align,
        notes=["by norm: share of a feature's firings that its token's norm decides", *_hint(features)],
    )  # fmt: skip


def _hint(features: Sequence[int]) -> list[str]:
    return [f"one of them in full: --feature {features[0]}"] if features else []


def _in_full(looked: Look, feature: int) -> str:
    examples = looked.found.examples(feature)
    found = looked.found
    facts = [f"fires on {found.density_F[feature]:.3%} of tokens"]
    if examples:
        facts += [f"largest {found.largest_F[feature]:.3g}", f"{found.driven_F[feature]:.0%} of its firings by norm"]
    rows = [[example.value, looked.in_context(example)] for example in examples]
    shown = text_table(["value", "in context"], rows, title=f"feature {feature}", align="rl", formats=[".3g"], notes=[])
    lines = [f"feature {feature}: {', '.join(facts)}"]
    lines += [shown.partition("\n")[2]] if examples else ["it fires on none of these tokens"]
    for name, down in (("promotes", False), ("suppresses", True)):
        tokens = "  ".join(f"«{text}» {value:+.2f}" for text, value in looked.promoted(feature, down=down))
        lines += [f"{name:<10}  {tokens}"] if tokens else []
    return "\n".join(lines)
