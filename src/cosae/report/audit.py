"""An audit as one self-contained HTML page, and as text for a terminal.

In: what `cosae audit` writes as audit.json. Names, token texts and paths come from files of others: all is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosae.evaluate.verdict import NORM_DRIVEN
from cosae.report.figures import audit as figures
from cosae.report.format import NONE
from cosae.report.lenient import read_record
from cosae.report.page import write_page
from cosae.report.records import ReconstructionBySinks
from cosae.report.terminal import text_table


@dataclass(frozen=True)
class Make:
    score: str = NONE
    selector: str = NONE
    frame: str = NONE
    d_sae: int | None = None
    k: int | None = None


@dataclass(frozen=True)
class Source:
    """Where the activations came from: a file, a store, or a site of a model that read a corpus."""

    activations: str | None = None
    store: str | None = None
    model: str | None = None
    site: str | None = None
    corpus: str | None = None
    inject: str | None = None

    def __str__(self) -> str:
        where = self.activations or ", ".join(part for part in (self.store, self.model, self.site, self.corpus) if part)
        return f"{where}, injected {self.inject}" if self.inject else where


@dataclass(frozen=True)
class Verdict:
    fooled: str = NONE
    because: str = ""


@dataclass(frozen=True)
class Line:
    """One answer; its level is ok, look or note."""

    topic: str = ""
    level: str = ""
    sentence: str = ""
    evidence: str = ""


@dataclass(frozen=True)
class ByFeature:
    share: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class NormDrivenNumbers:
    share: float | None = None
    per_feature: ByFeature = field(default_factory=ByFeature)


@dataclass(frozen=True)
class NormDriven:
    """Firings that appear or disappear with the norm alone; `invariant` scores do not read it."""

    invariant: bool = False
    sinks_out: NormDrivenNumbers = field(default_factory=NormDrivenNumbers)


@dataclass(frozen=True)
class Sinks:
    """Tokens that are sinks: text (None where it is not known), id (-1 likewise) and how many."""

    n_sinks: int = 0
    spelled: tuple[tuple[str | int | None, ...], ...] = ()


@dataclass(frozen=True)
class AuditedSAE:
    name: str = NONE
    sae: Make = field(default_factory=Make)
    source: Source = field(default_factory=Source)
    tokens: float | None = None
    warning: str | None = None
    elsewhere: str | None = None
    verdict: Verdict = field(default_factory=Verdict)
    lines: tuple[Line, ...] = ()
    reconstruction: ReconstructionBySinks = field(default_factory=ReconstructionBySinks)
    norm_driven: NormDriven = field(default_factory=NormDriven)
    sinks: Sinks = field(default_factory=Sinks)


@dataclass(frozen=True)
class AuditRecord:
    """audit.json."""

    written_at: str | None = None
    commit: str | None = None
    packages: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    saes: tuple[AuditedSAE, ...] = ()


def write_audit_page(result: Mapping[str, Any], out: Path) -> Path:
    """The page, written to `out` in one step. Raises CosaeError where it cannot be written."""
    audit = read_record(AuditRecord, result)
    return write_page(out, "audit.html.j2", audit=audit, figures=figures, bound=NORM_DRIVEN)


def audit_text(result: Mapping[str, Any]) -> str:
    """Of each SAE, what it is, whether it is fooled by norm, and every answer with its evidence; "!" marks those that
    are worth a look."""
    return "\n\n".join(_answers(sae) for sae in read_record(AuditRecord, result).saes)


def _answers(found: AuditedSAE) -> str:
    made = found.sae
    make = f"{made.score} × {made.selector}, frame {made.frame}, {made.d_sae or 0:,} features, k {made.k}"
    said = [f"{found.name}: {make}"]
    said += [f"warning: {found.elsewhere}"] if found.elsewhere else []
    said += [f"fooled by norm: {found.verdict.fooled}: {found.verdict.because}"]
    said += [f"note: {found.warning}"] if found.warning else []
    rows = []
    for line in found.lines:
        rows.append(["!" if line.level == "look" else "", line.topic, line.sentence])
        rows.append(["", "", line.evidence])
    return text_table((), rows, title=said, align="lll")
