"""A run's part of the page, section by section; what the run lacks is said in a sentence.

In: a RunRecord and the looks of its arms. Out: pieces of Markup in the order they are read.
"""

from __future__ import annotations

from cosae.report.events import events_section
from cosae.report.format import count
from cosae.report.markup import Markup, join, tag
from cosae.report.probing import RULES, concept_figures, differences_figure, groups_of, means_figure, means_table
from cosae.report.provenance import provenance
from cosae.report.records import RunRecord, number
from cosae.report.run_figures import Looks, exponent_figure, norm_histogram, quartile_figure, training_figure
from cosae.report.tables import (
    difference_tables,
    exponent_table,
    norm_summary,
    quartile_table,
    recovery_table,
    summary_rows,
    summary_table_html,
)
from cosae.report.verdict import by_measure, claims, verdict


def run_section(record: RunRecord, looks: Looks) -> list[object]:
    """Everything about one run, norm facts first, provenance last."""
    looks = {arm: looks[arm] for arm in record.arms}
    parts: list[object] = [_heading(record), *_warnings(record)]
    parts += [
        tag("h3", "Norms of the activations"),
        norm_summary(record),
        *_figure(norm_histogram(record), _NORMS),
    ]
    if not record.arms:
        return [*parts, tag("p", "The run names no arms."), tag("h3", "Provenance"), provenance(record)]
    parts += _summary(record, looks)
    parts += _reconstruction(record, looks)
    parts += _exponents(record, looks)
    parts += _probing(record, looks)
    recovered = recovery_table(record, looks)
    parts += [tag("h3", "Recovery of the known dictionary"), recovered] if recovered else []
    curves = training_figure(record, looks)
    parts.append(tag("h3", "Training"))
    parts += _figure(curves, _CURVES) if curves else [tag("p", "The run logged no training metrics.")]
    return [*parts, *events_section(record), tag("h3", "Provenance"), provenance(record)]


def _heading(record: RunRecord) -> Markup:
    tokens = number(record.run.get("tokens"))
    metadata = [
        f"setting: {record.setting}" if record.setting else "",
        f"{count(tokens)} training tokens" if tokens is not None else "",
        f"{count(number(record.evaluation.get('tokens')))} held-out tokens" if record.evaluation.get("tokens") else "",
        f"seed {record.run['seed']}" if record.run.get("seed") is not None else "",
        f"commit {str(record.run['commit'])[:12]}" if record.run.get("commit") else "",
    ]
    return join([tag("h2", record.name), tag("p", " · ".join(f for f in metadata if f), class_="muted")])


def _warnings(record: RunRecord) -> list[object]:
    said = []
    if record.run.get("status") != "finished":
        said.append(
            f"This run is not finished (status: {record.run.get('status')}); what follows covers what there is so far."
        )
    if not record.evaluation:
        said.append("This run has not been evaluated, so there are no held-out numbers.")
    for arm, metadata in record.arms.items():
        if metadata.get("stopped"):
            said.append(
                f"The arm {arm} stopped before the end ({metadata['stopped']}); its numbers come from its last "
                "good state."
            )
        if metadata.get("a_moving") is True:
            said.append(f"The exponent of {arm} was still moving at the end: a longer run may end elsewhere.")
    return [tag("p", sentence, class_="warn") for sentence in said]


def _summary(record: RunRecord, looks: Looks) -> list[object]:
    parts: list[object] = [tag("h3", "Summary"), summary_table_html(record, looks)]
    parts.append(tag("p", _sparsity(record), class_="muted"))
    parts.append(tag("h4", "Against the baseline arm"))
    parts.append(tag("p", verdict(record), class_="verdict"))
    sentences = by_measure(claims(record))
    parts += difference_tables(record, looks)
    return [*parts, tag("ul", *(tag("li", s) for s in sentences), class_="fine")] if sentences else parts


def _sparsity(record: RunRecord) -> str:
    """How well the arms' L0 match: without that, FVE compares nothing."""
    reached = {row["arm"]: row["l0"] for row in summary_rows(record) if row["l0"] is not None}
    if not reached:
        return "No inference L0 was measured."
    said = f"Held-out tokens, sinks out unless said otherwise. Inference L0 is {min(reached.values()):.2f}"
    said += f" to {max(reached.values()):.2f}" if len(reached) > 1 else ""
    away = {
        arm: l0 / target - 1
        for arm, l0 in reached.items()
        if (target := number(record.arms[arm].get("l0_target"))) and target > 0
    }
    if not away:
        return f"{said}."
    worst = max(away, key=lambda arm: abs(away[arm]))
    return f"{said}; the widest departure from an arm's target is {100 * away[worst]:+.1f} % ({worst})."


def _reconstruction(record: RunRecord, looks: Looks) -> list[object]:
    found = quartile_figure(record, looks)
    parts: list[object] = [tag("h3", "Reconstruction by norm quartile")]
    if found is None:
        return [*parts, tag("p", "The run holds no reconstruction by norm quartile.")]
    numbers = quartile_table(record, looks)
    return [*parts, *_figure(found, _QUARTILES), *([numbers] if numbers else [])]


def _exponents(record: RunRecord, looks: Looks) -> list[object]:
    found, numbers = exponent_figure(record, looks), exponent_table(record, looks)
    parts: list[object] = [tag("h3", "Learned exponents")]
    if found is None and numbers is None:
        return [*parts, tag("p", "No arm of this run learns or records an exponent.")]
    return [*parts, *_figure(found, _EXPONENTS), *([numbers] if numbers else [])]


def _probing(record: RunRecord, looks: Looks) -> list[object]:
    parts: list[object] = [tag("h3", "Sparse probing")]
    if not record.probing:
        return [
            *parts,
            tag(
                "p",
                "This run was not probed: concepts need tokens of the embedded corpus, "
                "which activations from elsewhere do not have.",
            ),
        ]
    parts += _figure(means_figure(record, looks), _MEANS)
    parts += _figure(differences_figure(record, looks), _GAPS)
    parts.append(tag("div", means_table(record, looks), class_="wide"))
    for rule in RULES:
        for group in groups_of(record):
            figures = concept_figures(record, looks, rule, group)
            parts += [part for figure in figures for part in _figure(figure, _CONCEPTS)]
    return [*parts, *_probing_with_sinks(record.with_sinks_in(), looks)]


def _probing_with_sinks(record: RunRecord, looks: Looks) -> list[object]:
    if not record.probing:
        return []
    said = "The same probes with the sinks left among the tokens; everything above has them out."
    parts: list[object] = [tag("h4", "Probing with sinks in"), tag("p", said)]
    parts += _figure(differences_figure(record, looks), _GAPS)
    return [*parts, tag("div", means_table(record, looks), class_="wide")]


def _figure(drawn: Markup | None, caption: str) -> list[object]:
    return [] if drawn is None else [tag("figure", drawn, tag("figcaption", caption))]


_NORMS = "Norms of held-out activations. Both axes are logarithmic."
_QUARTILES = (
    "Quartiles of |x| among the held-out tokens of each setting. FVE is about the quartile's own mean; the median "
    "token's is about the mean of all tokens shown. A mark on the lower edge lies below it; its value is written "
    "beside it."
)
_EXPONENTS = (
    "The exponent over training (mean, and the middle half over features where each has its own), and the "
    "features' exponents at the end."
)
_MEANS = (
    "One latent per concept, chosen on training files and scored on held-out files. Bars are 95 % bootstrap "
    "intervals over concepts. The rows below the arms are floors; the full logistic probe is the ceiling."
)
_GAPS = (
    "Paired by concept: the bootstrap draws the same concepts for both arms. Where a bar crosses 0, the arm "
    "cannot be told from the baseline."
)
_CONCEPTS = (
    "One row a concept, best first. Grey marks are floors, the black bar is the full logistic probe. Right: each "
    "arm minus the baseline arm on the same concept."
)
_CURVES = "Measured on training batches while training; the held-out numbers above are what counts."
_READING = (
    "FVE: 1 − Σ|x − x̂|² / Σ|x − mean x|², about the global mean of the tokens measured, summed in float64.",
    "Median token FVE: the median over tokens of 1 − |x − x̂|² / |x − mean x|²; a few huge tokens cannot carry it.",
    "Sinks: tokens at position 0, special tokens, and those whose norm is at least the filter's factor (10 unless "
    "changed) times the median, whatever training did with them. Out, they are left out of every number, the mean "
    "included.",
    "Dead: features that fired on none of the tokens measured. L0: mean number of codes other than 0.",
    "a: the exponent of the norm in the score exp(b)·|x − c|^a·cos(x − c, w); 0 ignores the norm, 1 is an inner "
    "product.",
    "Intervals: 95 % percentile bootstrap, over documents for FVE and over concepts for probing, the same resamples "
    "for all arms. They say how far other documents or concepts would move a number, not how far another seed would.",
)


def reading() -> Markup:
    """What the words and numbers mean."""
    return tag("section", tag("h3", "How to read the numbers"), tag("ul", *(tag("li", s) for s in _READING)))
