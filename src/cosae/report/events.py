"""Section "Events" of a run's page: what the monitors of the stream and of the arms noticed while it trained."""

from __future__ import annotations

from cosae.report.format import count
from cosae.report.markup import tag
from cosae.report.records import RunRecord, number
from cosae.report.tables import table

SHOWN = 40


def events_section(record: RunRecord) -> list[object]:
    """Heading and table; nothing where nothing happened. Texts are escaped: a document's name may stand in them."""
    if not record.events:
        return []
    rows: list[list[object]] = [
        [count(number(event.get("step"))), str(event.get("arm") or "stream"), str(event.get("text") or "")]
        for event in record.events[:SHOWN]
    ]
    left = len(record.events) - len(rows)
    more = [tag("p", f"… and {left} more in events.jsonl.", class_="muted")] if left else []
    return [tag("h3", "Events"), table(["step", "who", "what"], rows), *more]
