"""An audit's answers as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cosae.report.terminal import text_table


def audit_text(result: Mapping[str, Any]) -> str:
    """Of each SAE, what it is, whether it is fooled by norm, and every answer with its evidence; "!" marks those that
    are worth a look. `result` is what audit.json holds."""
    return "\n\n".join(_answers(found) for found in result["saes"])


def _answers(found: Mapping[str, Any]) -> str:
    made, verdict = found["sae"], found["verdict"]
    make = f"{made['score']} × {made['selector']}, frame {made['frame']}"
    said = [f"{found['name']}: {make}, {made['d_sae']} features, k {made['k']}"]
    said += [f"fooled by norm: {verdict['fooled']}: {verdict['because']}"]
    said += [f"note: {found['warning']}"] if found["warning"] else []
    rows = []
    for line in found["lines"]:
        rows.append(["!" if line["level"] == "look" else "", line["topic"], line["sentence"]])
        rows.append(["", "", line["evidence"]])
    return text_table((), rows, title=said, align="lll")
