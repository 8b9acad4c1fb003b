"""Where a run's numbers come from: recipe, seed, commit, machine, stream; and whether its arms were paired.

In: a RunRecord. Out: Markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cosae.report.format import count, fixed, shortened
from cosae.report.markup import Markup, join, tag
from cosae.report.records import RunRecord, mapping, number
from cosae.report.tables import table


def digest_sentence(record: RunRecord) -> str:
    """Whether all arms saw the same batches, as far as the run records it."""
    whole = record.run.get("stream_digest")
    by_arm = {arm: metadata["stream_digest"] for arm, metadata in record.arms.items() if metadata.get("stream_digest")}
    stopped = [arm for arm, metadata in record.arms.items() if metadata.get("stopped")]
    cut = f" ({', '.join(stopped)} stopped before its end)" if stopped else ""
    if by_arm:
        whole = whole or next(iter(by_arm.values()))
        odd = [arm for arm in record.arms if str(by_arm.get(arm)) != str(whole) and arm not in stopped]
        if odd:
            return (
                f"The arms did NOT all record the same stream ({', '.join(odd)} differ or recorded none): "
                "do not read them as paired."
            )
        return f"All arms saw identical batches{cut}: each recorded the stream's digest, {whole}."
    if whole:
        return f"All arms were fed from one pass over one stream{cut}, whose digest is {whole}."
    return "The run records no digest of its stream, so it cannot be shown that the arms saw identical batches."


def provenance(record: RunRecord) -> Markup:
    """Recipe, seed, commit, machine and stream of a run, and what each arm was."""
    run = record.run
    metadata = {
        k: run[k]
        for k in ("seed", "commit", "status", "started_at", "written_at", "stream_digest", "tokens", "seconds")
        if run.get(k) is not None
    }
    for key in ("source", "filter", "hardware", "packages"):
        metadata |= flattened(mapping(run.get(key)), key)
    for key in ("tokens", "documents"):
        if (held_out := number(record.evaluation.get(key))) is not None:
            metadata[f"held-out {key}"] = count(held_out)
    for key in ("n_train", "n_held_out", "seed", "min_positives"):
        if record.probing.get(key) is not None:
            metadata[f"probing.{key}"] = record.probing[key]
    metadata["directory"] = record.path
    keys = {
        "d_sae": "d_sae", "k": "k", "score": "score", "selector": "selector", "frame": "frame", "seed": "seed",
        "kernel": "kernel", "L0 target": "l0_target", "L0 calibrated": "l0_calibrated",
        "tokens/s": "tokens_per_second",
    }  # fmt: skip
    rows = [[arm, *(_cell(arm_facts.get(key)) for key in keys.values())] for arm, arm_facts in record.arms.items()]
    recipe = flattened(mapping(run.get("recipe")), "")
    return join(
        [
            tag("p", digest_sentence(record)),
            table(["arm", *keys], rows),
            definitions(metadata),
            *([tag("h4", "Recipe"), definitions(recipe)] if recipe else [tag("p", "The run records no recipe.")]),
        ]
    )


def definitions(metadata: Mapping[str, object]) -> Markup:
    """Names and values in columns."""
    return tag("dl", *(tag("div", tag("dt", k), tag("dd", shortened(str(v), 400))) for k, v in metadata.items()))


def flattened(value: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A tree of mappings as dotted names."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(entry, Mapping) and entry:
            flat |= flattened(entry, name)
        else:
            flat[name] = entry
    return flat


def _cell(value: object) -> str:
    found = number(value)
    if found is None:
        return "–" if value is None else str(value)
    return count(found) if found == int(found) else fixed(found, 2)
