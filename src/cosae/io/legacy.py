"""Names that files and commands of earlier versions carry, and what they are called now."""

from __future__ import annotations

from typing import Any

RENAMED = {
    "nuisance": "perturbation",
    "ahead_chunks": "prefetch_chunks",
    "norm_facts": "norm_summary",
    "facts": "provenance",
    "began": "started_at",
    "written": "written_at",
    "remark": "warning",
    "remarks": "warnings",
    "guard": "monitor",
    "watch": "monitor",
}
"""0.1's name of a field → its name since 0.2."""
_SAE = "d_sae k score selector frame prefixes norm_restoring n_groups bias bandwidth"
ARM_FIELDS = {**dict.fromkeys(_SAE.split(), "sae"), **dict.fromkeys(("a_init", "b_init", "centre"), "init")}
"""Field of an arm in 0.1 → the section of it that holds the field since 0.2."""


DATA_FIELDS = frozenset(("model", "corpus", "world", "activations", "store", "store_site", "prefetch_chunks"))
"""Fields of a recipe's data in every record; people who write a recipe leave some out."""
V01_ORDER = "v0.1"
"""The order of documents and rows in a record that names none."""


def upgrade(value: Any) -> Any:
    """A JSON value that 0.1 wrote, with today's names for its fields; a value with today's names as it is."""
    if isinstance(value, dict):
        renamed = {RENAMED.get(key, key): upgrade(item) for key, item in value.items()}
        if renamed.keys() >= DATA_FIELDS:
            renamed.setdefault("order", V01_ORDER)
        if isinstance(arms := renamed.get("arms"), list | tuple):
            renamed["arms"] = [_upgrade_arm(arm) if isinstance(arm, dict) else arm for arm in arms]
        return renamed
    return [upgrade(item) for item in value] if isinstance(value, list) else value


def upgrade_evaluation(value: Any) -> Any:
    """An evaluation.json that 0.1 wrote, with today's names and one spelling of sinks: "sinks_in" and "sinks_out"."""
    value = upgrade(value)
    if not isinstance(value, dict):
        return value
    probing, paired = value.get("probing"), value.get("paired_fve")
    if isinstance(probing, dict) and not {"sinks_in", "sinks_out"} & set(probing):
        value["probing"] = {"sinks_out": probing, "sinks_in": value.pop("probing_sinks_in", None)}
    for row in paired if isinstance(paired, list) else ():
        if isinstance(row, dict) and row.get("sinks") in ("in", "out"):
            row["sinks"] = f"sinks_{row['sinks']}"
    return value


def _upgrade_arm(arm: dict[str, Any]) -> dict[str, Any]:
    """A recipe's arm with what the SAE is made of, and what it starts from, in sections of their own."""
    nested = {key: item for key, item in arm.items() if key not in ARM_FIELDS}
    for key in arm.keys() & ARM_FIELDS.keys():
        section = nested.get(ARM_FIELDS[key], {})
        if isinstance(section, dict):
            nested[ARM_FIELDS[key]] = {**section, key: arm[key]}
    return nested


def upgrade_path(path: str) -> str:
    """A dotted path of fields, such as nuisance.sigma, with today's names."""
    return ".".join(RENAMED.get(part, part) for part in path.split("."))
