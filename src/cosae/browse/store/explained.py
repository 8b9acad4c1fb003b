"""Explanations of an SAE's features beside its store: one record, replaced in one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cosae.browse.store.records import Explanation, Score
from cosae.io.records import read_record, write_record
from cosae.io.values import from_plain, to_plain


def read_explanations(path: Path) -> dict[int, Explanation]:
    """Feature → explanation; empty where there is no file. Raises CosaeError for one that is damaged."""
    if not path.is_file():
        return {}
    return {int(id): _explanation(one) for id, one in read_record(path)["features"].items()}


def write_explanations(path: Path, found: Mapping[int, Explanation]) -> None:
    """Replace the file. Raises OSError."""
    write_record(path, {"features": {str(id): _plain(found[id]) for id in sorted(found)}})


def _explanation(one: Mapping[str, Any]) -> Explanation:
    baselines = {name: from_plain(Score, score, "a score") for name, score in one["baselines"].items()}
    return replace(from_plain(Explanation, one, "an explanation"), baselines=baselines)


def _plain(one: Explanation) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(replace(one, baselines={}))
    return {**plain, "baselines": {name: to_plain(score) for name, score in one.baselines.items()}}
