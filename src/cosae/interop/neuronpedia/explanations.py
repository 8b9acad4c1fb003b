"""Explanations of features as Neuronpedia's public exports hold them: one object a line, a feature each.

An upload does not send them: the server takes only explanations of methods that it knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosae.interop.neuronpedia.settings import Dashboard
from cosae.io.atomic import write_text

EXPLANATIONS = "explanations.jsonl"
METHOD = "cosae"


@dataclass(frozen=True)
class Explained:
    """What `model` says of a feature, and its scores by name (balanced accuracy)."""

    feature: int
    text: str
    model: str
    scores: Mapping[str, float]


def write_explanations(out: Path, explained: Iterable[Explained], settings: Dashboard) -> int:
    """Write them beside the dashboards in `out`; returns how many. Raises OSError."""
    source = f"{settings.layer}-{settings.set_name}"
    lines: list[dict[str, Any]] = [
        {
            "modelId": settings.model_id,
            "layer": source,
            "index": str(one.feature),
            "description": one.text,
            "typeName": METHOD,
            "explanationModelName": one.model,
            "scores": [{"name": name, "value": value} for name, value in one.scores.items()],
        }
        for one in explained
    ]
    write_text(out / EXPLANATIONS, "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines))
    return len(lines)
