"""The tables of a run's page: arms, paired differences, quartiles, exponents, recovery, probing, provenance.

In: a RunRecord and how its arms look. Out: `Table`s, which templates/macros.html.j2 writes. A plain string in a cell is
escaped there. FVE never stands without the median token's FVE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cosae.io.digest import value_digest
from cosae.report.figures.probing import by_concept, called
from cosae.report.figures.svg import Looks, Style, marker
from cosae.report.format import NONE, count, fixed, percent, shortened
from cosae.report.records import (
    BASELINES,
    RULES,
    SINKS,
    Explanation,
    Explanations,
    Probing,
    Reconstruction,
    RunRecord,
    Score,
)
from cosae.report.texts import Estimate
from cosae.report.verdict import Claim, claims, fve_claims
from cosae.shown import spelled_out

JUDGED = ("detection", "fuzzing", "shuffled", "constant", "unigram")
MOST_EXPLAINED = 200


@dataclass(frozen=True)
class Table:
    """Rows whose first cell names them and whose others are aligned as numbers.

    caption  what it holds
    classes  the rows' CSS classes
    over     headings above the others, each with the number of columns it spans
    """

    caption: str
    head: Sequence[object]
    rows: Sequence[Sequence[object]]
    classes: Sequence[str | None] = ()
    over: Sequence[tuple[str, int]] = ()

    @property
    def first(self) -> set[int]:
        """Columns at which a spanning heading begins, but for the first of them."""
        return {1 + sum(n for _, n in self.over[:i]) for i in range(1, len(self.over))}


def swatch(arm: str, style: Style | None) -> Markup:
    """An arm's name behind its mark."""
    mark = Markup("") if style is None else marker(7, 7, style, size=4.8)
    drawn = Markup('<svg viewBox="0 0 14 14" class="swatch" aria-hidden="true">{}</svg>').format(mark) if mark else ""
    return Markup("<span{}>{}{}</span>").format(Markup(' class="name"') if len(arm) <= 24 else "", drawn, arm)


def estimate(found: Estimate, digits: int = 3, sign: bool = False) -> Markup:
    """A number with its interval in small below it; a dash when there is none."""
    middle = fixed(found.mean, digits, sign)
    if found.mean is None or found.low is None or found.high is None:
        return Markup(middle)
    ends = (fixed(found.low, digits, sign), fixed(found.high, digits, sign))
    return Markup("{}<small>{} to {}</small>").format(middle, *ends)


def _difference(claim: Claim | None) -> Markup:
    if claim is None:
        return Markup(NONE)
    middle, low, high = (fixed(v, claim.digits, True) for v in (claim.difference, claim.low, claim.high))
    apart = claim.verdict != "not told apart"
    form = '<span class="{0}"><{1}>{2}</{1}><small>{3} to {4}</small><small>{5}</small></span>'
    shown = ("apart", "b") if apart else ("level", "span")
    return Markup(form).format(*shown, middle, low, high, claim.verdict)


def arms_by_run(records: Sequence[RunRecord], looks: Looks) -> Table:
    """FVE with the median token's, its paired difference, and probing: a group of columns per run."""
    head: list[object] = ["arm"]
    over, rows = [], []
    for record in records:
        columns = ["FVE", "median token FVE", f"FVE minus {record.baseline}"]
        if record.probing:
            columns += [f"AUROC, {_group(record)}, by {rule}" for rule in ("AUROC", "mean diff.")]
        head += columns
        over.append((record.title, len(columns)))
    for arm in looks:
        if any(arm in record.arms for record in records):
            cells = [cell for record in records for cell in _compared_cells(record, arm)]
            rows.append([swatch(arm, looks[arm]), *cells])
    return Table("FVE and probing of every arm, by run", head, rows, over=over)


def _compared_cells(record: RunRecord, arm: str) -> list[object]:
    out = record.reconstruction(arm) if arm in record.arms else Reconstruction()
    gap = fve_claims(record).get(arm)
    found = Estimate(gap.difference, gap.low, gap.high) if gap else Estimate()
    cells = [fixed(out.fve, 4), fixed(out.median_token_fve, 4)]
    probed = [estimate(record.probing.mean(arm, rule, _group(record))) for rule in RULES] if record.probing else []
    return [*cells, estimate(found, 4, sign=True), *probed]


def _group(record: RunRecord) -> str:
    """The group of concepts that summaries show."""
    return next(iter(record.probing.groups if record.probing else ()), "all")


def summary_text(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the summary on screen."""
    gaps = fve_claims(record)
    head = ["arm", "FVE", "median", "L0", "dead", "a"]
    head += ["AUROC", "by mean"] if record.probing else []
    head += [f"FVE - {record.baseline}"] if gaps else []
    rows = []
    for arm in record.arms:
        out = record.reconstruction(arm)
        cells = [arm, fixed(out.fve, 4), fixed(out.median_token_fve, 4), fixed(out.l0, 2), percent(out.dead_frac)]
        cells.append(fixed(record.exponent(arm).at_end, 3))
        if record.probing:
            cells += [fixed(record.probing.mean(arm, rule, _group(record)).mean) for rule in RULES]
        if gaps:
            gap = gaps.get(arm)
            ends = f" [{fixed(gap.low, 4, True)}, {fixed(gap.high, 4, True)}]" if gap else ""
            cells.append(f"{fixed(gap.difference, 4, True)}{ends}" if gap else NONE)
        rows.append(cells)
    return head, rows


def summary_notes(record: RunRecord) -> list[str]:
    """What the columns on screen are, and what to know before any of the numbers."""
    said = ["Held-out tokens without sinks; median: the median token's FVE; brackets: 95 % paired bootstrap."]
    if record.probing:
        said.append(f"AUROC: {_group(record)} concepts, one latent each, chosen by AUROC, or by mean difference.")
    return [*(said if record.evaluated else []), *record.warnings]


def summary_table(record: RunRecord, looks: Looks) -> Table:
    """Arm by FVE, median token FVE, L0, dead share, a, and probing by both rules; baselines of probing below."""
    probing, group = record.probing, _group(record)
    head = ["arm", "FVE", "median token FVE", "FVE, sinks in", "median token, sinks in", "L0", "dead", "a"]
    head += [f"AUROC, {group}: {words}" for words in RULES.values()] if probing else []
    rows: list[list[object]] = []
    for arm in record.arms:
        both = [record.reconstruction(arm, sinks) for sinks in SINKS]
        cells = [fixed(v, 4) for one in both for v in (one.fve, one.median_token_fve)]
        cells += [fixed(both[0].l0, 2), percent(both[0].dead_frac), _exponent(record, arm)]
        probed = [estimate(probing.mean(arm, rule, group)) for rule in RULES] if probing else []
        rows.append([swatch(arm, looks.get(arm)) + _made(record, arm), *cells, *probed])
    for baseline, words in BASELINES.items():
        found = [probing.mean(baseline, rule, group) for rule in RULES] if probing else []
        if any(one.mean is not None for one in found):
            rows.append([words, *[""] * 7, *map(estimate, found)])
    return Table("Held-out numbers by arm", head, rows, [None] * len(record.arms) + ["floor"] * len(rows))


def _exponent(record: RunRecord, arm: str) -> Markup:
    found = record.exponent(arm)
    words = {"fixed": "fixed", "per_feature": "mean of features"}.get(found.kind)
    if found.value_exponent is not None:
        words = " · ".join(part for part in (words, f"value exponent {fixed(found.value_exponent, 3)}") if part)
    form = "{}<small>{}</small>" if words and found.at_end is not None else "{}"
    return Markup(form).format(fixed(found.at_end, 3), words)


def _made(record: RunRecord, name: str) -> Markup:
    """What the arm is, and what to know of how it ended."""
    arm = record.arms[name]
    made = " · ".join(part for part in (arm.score, arm.selector, arm.frame) if part)
    made += " · baseline" if name == record.baseline else ""
    notes = [f"stopped: {arm.stopped}"] if arm.stopped else []
    notes += ["a still moving at the end"] if arm.a_moving else []
    small = Markup('<small class="note">{}</small>')
    return Markup("<small>{}</small>").format(made) + Markup("").join(small.format(note) for note in notes)


def sparsity(record: RunRecord) -> str:
    """How well the arms' L0 match: without that, FVE compares nothing."""
    reached = {arm: l0 for arm in record.arms if (l0 := record.reconstruction(arm).l0) is not None}
    if not reached:
        return "No inference L0 was measured."
    said = f"Held-out tokens, sinks out unless said otherwise. Inference L0 is {min(reached.values()):.2f}"
    said += f" to {max(reached.values()):.2f}" if len(reached) > 1 else ""
    targets = {arm: record.arms[arm].l0_target for arm in reached}
    away = {arm: reached[arm] / target - 1 for arm, target in targets.items() if target and target > 0}
    if not away:
        return f"{said}."
    worst = max(away, key=lambda arm: abs(away[arm]))
    return f"{said}; the largest deviation from an arm's target is {100 * away[worst]:+.1f} % ({worst})."


def difference_tables(record: RunRecord, looks: Looks) -> list[Table]:
    """Paired differences from the baseline, reconstruction then probing: a row an arm, a column a measure."""
    found, tables = claims(record), []
    for of_fve in (True, False):
        cells = {(claim.arm, claim.measure): claim for claim in found if ("FVE" in claim.measure) == of_fve}
        measures, arms = dict.fromkeys(m for _, m in cells), {arm for arm, _ in cells}
        rows = [
            [swatch(arm, looks.get(arm)), *(_difference(cells.get((arm, m))) for m in measures)]
            for arm in record.arms
            if arm in arms
        ]
        caption = f"Differences from {record.baseline}, {'reconstruction' if of_fve else 'probing'}"
        tables += [Table(caption, [f"minus {record.baseline}", *measures], rows)] if rows else []
    return tables


def quartile_table(record: RunRecord, looks: Looks) -> Table:
    """FVE about the quartile's own mean / median token FVE, per arm and norm quartile, sinks out then in."""
    rows = []
    for sinks, words in SINKS.items():
        for arm in record.arms:
            if quartiles := record.reconstruction(arm, sinks).by_norm_quartile:
                cells = [f"{fixed(q.fve)} / {fixed(q.median_token_fve)}" for q in quartiles]
                cells += [fixed(q.norm_ratio, 2) for q in quartiles]
                rows.append([swatch(arm, looks.get(arm)), words.removeprefix("sinks "), *cells])
    columns = [f"Q{i + 1}: {words}" for words in ("FVE / median token", "|x̂| / |x|") for i in range(4)]
    return Table("Reconstruction by norm quartile", ["arm", "sinks", *columns], rows)


def recovery_table(record: RunRecord, looks: Looks) -> Table:
    """Where the activations come from a known dictionary: what was recovered of it, a row a number."""
    found = {arm: row for arm in record.arms if (row := record.evaluation.recovery.get(arm))}
    keys = dict.fromkeys(key for row in found.values() for key in row)
    rows = [[key.replace("_", " "), *(_recovered(row.get(key)) for row in found.values())] for key in keys]
    return Table("Recovery of the known dictionary", ["number", *(swatch(arm, looks.get(arm)) for arm in found)], rows)


def _recovered(value: float | None) -> str:
    return count(value) if value is not None and abs(value) >= 2 and value == int(value) else fixed(value, 4)


def means_table(probing: Probing, looks: Looks) -> Table:
    """AUROC and average precision with intervals, by rule and group; baselines below the arms."""
    rules = {**{rule: rule.replace("_", " ") for rule in (*RULES, "standardised_difference")}, "auroc": "AUROC"}
    groups = [*probing.groups, "all"]
    metrics = {"auroc": "AUROC", "average_precision": "average precision"}
    rows: list[list[object]] = []
    classes = []
    for name in [*looks, *BASELINES]:
        for rule in rules if name in looks else ["auroc"]:
            found = [probing.mean(name, rule, group, metric) for metric in metrics for group in groups]
            if any(one.mean is not None for one in found):
                rows.append([called(name), rules[rule] if name in looks else NONE, *map(estimate, found)])
                classes.append(None if name in looks else "floor")
    head = ["arm or baseline", "rule", *(f"{words}, {group}" for words in metrics.values() for group in groups)]
    return Table("Mean AUROC and average precision", head, rows, classes)


def concept_table(probing: Probing, looks: Looks, group: str) -> Table | None:
    """AUROC of every concept of a group, best first: of the arms by both rules, and of the baselines."""
    columns: list[tuple[str, Sequence[float | None]]] = []
    over: list[tuple[str, int]] = []
    order: list[int] = []
    for rule, words in RULES.items():
        values, chosen = by_concept(probing, looks, rule, group)
        arms = [(arm, values[arm]) for arm in looks if arm in values]
        columns, order, over = columns + arms, order or chosen, [*over, *([(words, len(arms))] if arms else [])]
    values, _ = by_concept(probing, looks, next(iter(RULES)), group)
    baselines = [(called(name), values[name]) for name in BASELINES if name in values]
    columns, over = columns + baselines, [*over, *([("without a trained SAE", len(baselines))] if baselines else [])]
    rows = [[probing.concepts[i].name, *(fixed(column[i]) for _, column in columns)] for i in order]
    head = ["concept", *(name for name, _ in columns)]
    return Table(f"AUROC of every concept, {group}", head, rows, over=over) if rows else None


def digest_sentence(record: RunRecord) -> str:
    """Whether all arms saw the same batches, as far as the run records it."""
    by_arm = {name: arm.stream_digest for name, arm in record.arms.items() if arm.stream_digest}
    stopped = [name for name, arm in record.arms.items() if arm.stopped]
    cut = f" ({', '.join(stopped)} stopped before its end)" if stopped else ""
    whole = record.run.stream_digest or next(iter(by_arm.values()), None)
    if by_arm:
        odd = [arm for arm in record.arms if by_arm.get(arm) != whole and arm not in stopped]
        if odd:
            differ = f"{', '.join(odd)} differ or recorded none"
            return f"The arms did NOT all record the same stream ({differ}): do not treat them as paired."
        return f"All arms saw identical batches{cut}: each recorded the stream's digest, {whole}."
    if whole:
        return f"All arms were fed from one pass over one stream{cut}, whose digest is {whole}."
    return "The run records no digest of its stream, so it cannot be shown that the arms saw identical batches."


def provenance_table(record: RunRecord) -> Table:
    """Where the numbers come from: versions, commit, device, seeds, digests and times."""
    run, packages, machine = record.run, record.run.packages, record.run.hardware
    data = {key: value for key, value in run.source.items() if key.endswith(("digest", "sha256"))}
    probing, evaluation, site = record.probing or Probing(), record.evaluation, run.source.get("site")
    found = {
        "cosae": packages.get("cosae"),
        "commit": run.commit or "unknown: installed from a package, or recorded by none",
        **{name: packages.get(name) for name in ("python", "torch", "transformers", "numpy")},
        "device": machine.get("accelerator") or machine.get("device"),
        "processor": machine.get("processor") or machine.get("cpu"),
        "cores and threads": " and ".join(str(machine[n]) for n in ("cores", "threads") if n in machine),
        "seed": run.seed,
        "model": run.source.get("model"),
        "site": site.get("name") if isinstance(site, Mapping) else site,
        "text": run.source.get("corpus"),
        **{f"data: {key.replace('_', ' ')}": value for key, value in data.items()},
        "digest of the stream": run.stream_digest,
        "digest of the recipe": _digest(run.recipe) if run.recipe else None,
        "training tokens": None if run.tokens is None else count(run.tokens),
        "held-out tokens": None if evaluation.tokens is None else count(evaluation.tokens),
        "held-out documents": None if evaluation.documents is None else count(evaluation.documents),
        "probing tokens, train and held out": _pair(probing.n_train, probing.n_held_out),
        "started": run.started_at,
        "written": run.written_at,
        "seconds of training": None if run.seconds is None else fixed(run.seconds, 0),
    }
    rows = [[name, shortened(str(value), 200)] for name, value in found.items() if value not in (None, "")]
    return Table("Provenance", ["what", "value"], rows, ["words"] * len(rows))


def _pair(one: int | None, other: int | None) -> str | None:
    return None if one is None or other is None else f"{count(one)} and {count(other)}"


def _digest(recipe: Mapping[str, Any]) -> str | None:
    try:
        return value_digest(recipe)
    except (ValueError, TypeError, RecursionError):  # NaN, say, in a file that was edited
        return None


def metadata(record: RunRecord) -> dict[str, Any]:
    """What else the run records of its data, filter, machine and packages, as names and values."""
    found: dict[str, Any] = {"status": record.run.status, "folder": record.path.name}
    for key in ("source", "filter", "hardware", "packages"):
        found |= flattened(getattr(record.run, key), key)
    for key in ("seed", "min_positives"):
        if record.probing is not None and (value := getattr(record.probing, key)) is not None:
            found[f"probing.{key}"] = value
    return found


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as dotted names."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        flat |= flattened(entry, name) if isinstance(entry, Mapping) and entry else {name: entry}
    return flat


def explained_table(record: RunRecord, looks: Looks) -> Table:
    """Mean scores of each arm's explanations, beside their baselines."""
    names = [name for name in JUDGED if any(name in one.means for one in record.explained.values())]
    rows = [
        [swatch(arm, looks.get(arm)), count(len(one.features)), *(_score(one.means.get(name)) for name in names)]
        for arm, one in record.explained.items()
    ]
    over = [("explanations", 1), ("scores", sum(name in JUDGED[:2] for name in names))]
    over += [("baselines", sum(name in JUDGED[2:] for name in names))]
    return Table("Scores of explanations", ["arm", "features", *names], rows, over=[one for one in over if one[1]])


def explanations_table(arm: str, found: Explanations) -> Table:
    """Every explained feature of an arm, the best explanations first."""

    def rank(item: tuple[str, Explanation]) -> float:
        return -(item[1].detection.value or 0) - (item[1].fuzzing.value or 0)

    rows = [
        [feature, Markup('<span class="context">{}</span>').format(spelled_out(one.text)),
         _score(one.detection), _score(one.fuzzing)]
        for feature, one in sorted(found.features.items(), key=rank)[:MOST_EXPLAINED]
    ]  # fmt: skip
    return Table(
        f"Explanations of {arm}", ["feature", "explanation", "detection", "fuzzing"], rows, ["words"] * len(rows)
    )


def _score(score: Score | None) -> Markup:
    found = Score() if score is None else score
    return estimate(Estimate(found.value, found.low, found.high), 2)
