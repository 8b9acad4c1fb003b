"""The attention sinks of a run, in sentences, tables and a figure: where they are, what fires there, what they do.

In: a RunRecord. The paper's number is the accuracy of one feature, chosen by mean difference, on codes averaged over
all tokens of a text; leaving the sinks out of the average, and choosing by AUROC, are what it is held against.
"""

from __future__ import annotations

from collections.abc import Sequence

from cosae.report.figures.probing import by_panel, called
from cosae.report.figures.svg import MUTED, Figure, Looks, Style
from cosae.report.format import count, fixed, percent, times
from cosae.report.lenient import read_record
from cosae.report.records import SINKS, FilterPolicy, RunRecord
from cosae.report.tables import Table, estimate, swatch
from cosae.report.texts import Estimate, TextProbing
from cosae.shown import counted

PAPER, AUROC = "mean_difference/top_1", "auroc/top_1"
ONE_FEATURE = {PAPER: "feature chosen by mean difference", AUROC: "feature chosen by AUROC"}
POOLED = {"sinks_in": "all tokens", "sinks_out": "without sinks"}
"""With the first of both, a number is the paper's."""
RULES = {
    "mean_difference": "by mean difference",
    "auroc": "by AUROC",
    "standardised_difference": "by standardised diff.",
}
REFERENCES = ("norm", "length", "best_dimension", "logistic", "bag_of_tokens")


def where(record: RunRecord) -> str:
    """Where the sinks are, how large, and what training did with them."""
    first = next(iter(record.evaluation.sinks.values()))
    norms, policy = record.evaluation.norms, read_record(FilterPolicy, record.run.filter.get("policy"))
    bound = f"{times(policy.factor or 10)} the median norm"
    if not first.large:
        return f"No held-out token has {bound} or more."
    said = f"{count(first.large)} of {count(record.evaluation.tokens)} held-out tokens have at least {bound}"
    if first.large_at_0:
        which = "all of them" if first.large_at_0 == first.large else f"{count(first.large_at_0)} of them"
        said += f"; {which} stand at position 0, the first token of their text"
    if norms.position_0_over_median is not None:
        said += f". The median norm at position 0 is {times(norms.position_0_over_median)} that of all tokens"
    if norms.sinks_out.cv is not None:
        said += f"; elsewhere norms vary by {fixed(norms.sinks_out.cv, 2)} (standard deviation over mean)"
    trained = {"norm": "left them out", "position_0": "left out position 0", "none": "saw them all"}.get(policy.kind)
    return said + (f". Training {trained}." if trained else ".")


def firing_table(record: RunRecord, looks: Looks) -> Table:
    """How many features of each arm fire on sinks and elsewhere."""
    rows = [
        [
            swatch(arm, looks.get(arm)),
            count(one.l0_at_0),
            count(one.l0_off),
            count(record.arms[arm].d_sae),
            count(one.features_on),
            percent(one.firing_frac),
            percent(one.error_frac),
        ]
        for arm, one in record.evaluation.sinks.items()
        if arm in record.arms
    ]
    head = [
        "arm",
        "features on at position 0",
        "on elsewhere",
        "of",
        "on at any sink",
        "of all firings",
        "of the error",
    ]
    return Table("Features that fire on sinks (on: of the median token)", head, rows)


def effect_table(texts: TextProbing, looks: Looks) -> Table:
    """Accuracy of one feature, with the sinks in the average and without, by both rules."""
    head: list[object] = ["arm"]
    over, rows = [], []
    for words in ONE_FEATURE.values():
        head += [*POOLED.values(), "change"]
        over.append((words, 3))
    for arm in texts.arms:
        cells = [
            estimate(one, sign=sign)
            for reading in ONE_FEATURE
            for one, sign in (
                *((texts.accuracy(sinks, arm, reading), False) for sinks in POOLED),
                (texts.masking(arm, reading), True),
            )
        ]
        rows.append([swatch(arm, looks.get(arm)), *cells])
    return Table(f"Mean accuracy over {len(texts.sets)} sets of texts, one feature", head, rows, over=over)


def effect_figure(texts: TextProbing, looks: Looks) -> Figure | None:
    """Accuracy of one feature minus the baseline arm's, a panel a rule: filled with the sinks in, hollow without."""
    names = [arm for arm in texts.arms if arm in looks and arm != texts.baseline]
    found = {(a, s, r): texts.difference(a, s, r) for a in names for s in POOLED for r in ONE_FEATURE}
    if all(one.mean is None for one in found.values()):
        return None
    rows, height = {name: 17 + 26.0 * i for i, name in enumerate(names)}, 26 * len(names) + 8
    words = f"accuracy minus that of {called(str(texts.baseline))}"
    panels = by_panel(found, rows, ONE_FEATURE, looks, [0.0], 0.06, height, words, tuple(POOLED))
    keys = [
        ("filled: codes averaged over all tokens", Style(MUTED, "circle")),
        ("hollow: sinks left out", Style(MUTED, "circle", hollow=True)),
    ]
    return Figure(panels, keys)


def texts_table(texts: TextProbing, looks: Looks) -> Table:
    """Accuracy of every arm by rule and number of features, with the sinks in and out; references below."""
    readings = list(dict.fromkeys(r for arm in texts.arms for r in texts.summary.get("sinks_out", {}).get(arm, {})))
    rows: list[list[object]] = []
    classes: list[str | None] = []
    for sinks, words in SINKS.items():
        there = texts.summary.get(sinks, {})
        for arm in texts.arms:
            rows.append(
                [swatch(arm, looks.get(arm)), words, *(estimate(texts.accuracy(sinks, arm, r)) for r in readings)]
            )
            classes.append(None)
        for name in (one for one in REFERENCES if one in there):
            (reading,) = list(there[name])[:1] or [""]
            cells = [estimate(texts.accuracy(sinks, name, reading)), *[""] * (len(readings) - 1)]
            rows.append([f"{name.replace('_', ' ')} ({reading})", words, *cells])
            classes.append("floor")
    return Table("Mean accuracy on test texts", ["arm", "pooled", *map(_reading, readings)], rows, classes)


def _reading(name: str) -> str:
    rule, _, top = name.partition("/")
    return f"{top.removeprefix('top_')} {RULES.get(rule, rule)}" if top else "all features"


def sets_sentence(texts: TextProbing) -> str:
    """The sets that were probed, with how many classes and texts."""
    named = (f"{one.name} ({counted(len(one.classes), 'class')}, {count(one.encoded)} texts)" for one in texts.sets)
    return "; ".join(named)


def sentences(record: RunRecord) -> list[tuple[str, str]]:
    """What the answer says of sinks: what fires there, and what they do to the paper's number."""
    firing = [("Sinks", said)] if record.has_sinks and (said := _firing(record)) else []
    return firing + _effects(record.evaluation.texts or TextProbing())


def _firing(record: RunRecord) -> str:
    place, sinks = record.evaluation.norms.position_0_over_median, record.evaluation.sinks
    listed = [f"{count(one.l0_at_0)} features of {arm}" for arm, one in sinks.items() if one.l0_at_0 is not None]
    if not listed or place is None:
        return ""
    off = [count(one.l0_off) for one in sorted(sinks.values(), key=lambda one: one.l0_off or 0)]
    usual = " to ".join(dict.fromkeys((off[0], off[-1])))
    return f"position 0 of a text has {times(place)} the median norm; {_and(listed)} fire there, {usual} elsewhere."


def _effects(texts: TextProbing) -> list[tuple[str, str]]:
    """The paper's number, the same without the sinks, and by AUROC."""
    found = []
    for title, reading, sinks in (
        ("The paper's probing number", PAPER, "sinks_in"),
        ("The same without the sinks", PAPER, "sinks_out"),
        ("And by AUROC", AUROC, "sinks_out"),
    ):
        gaps = [(arm, texts.difference(arm, sinks, reading)) for arm in texts.arms if arm != texts.baseline]
        if listed := [f"{arm} {_words(gap)}" for arm, gap in gaps if gap.mean is not None]:
            found.append([title, _and(listed)])
    if found:
        how = "one feature chosen by mean difference, codes averaged over all tokens"
        found[0][1] = f"accuracy minus that of {texts.baseline}, {how}: {found[0][1]}"
    masked = texts.masking(str(texts.baseline), PAPER)
    if len(found) > 1 and masked.mean is not None:
        found[1][1] += f"; {texts.baseline} itself changes by {_words(masked)}"
    return [(title, f"{said}.") for title, said in found]


def _words(one: Estimate) -> str:
    if one.low is None or one.high is None:
        return fixed(one.mean, 3, True)
    told = "" if one.low > 0 or one.high < 0 else ", not told from 0"
    return f"{fixed(one.mean, 3, True)} [{fixed(one.low, 3, True)}, {fixed(one.high, 3, True)}{told}]"


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
