"""RESULT.md, numbers.json and figure.svg of the study, all from its files and none by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from cosae.io.lines import finite
from cosae.report.figures.svg import INK, Panel, drawing, label, marker, style_of, tag
from cosae.run.folder import read_json
from studies.real_model.claims import ORDINARY
from studies.real_model.design import FOLDER, LIKE_THE_PAPER, OTHERS, TRAIN_TOKENS, WIKI
from studies.real_model.judge import judge, shown
from studies.real_model.numbers import STANDARD, Numbers, collect
from studies.real_model.texts import PRECISION
from studies.runsets import REAL_CLOSELY, folder_of

NAMES = (
    *("real_10", "real_11", "real_12", "real_14", "real_18", "real_24", "real_28"),
    *("real_14_unfiltered", "real_14_reweighted", "real_14_wide"),
)
RULES = ("mean_difference", "standardised_difference", "auroc")
WAYS = {"paper": "the paper's protocol", "masked": "position 0 left out", "masked_auroc": "left out, latents by AUROC"}


def write() -> None:
    """Everything that the study leaves in its folder."""
    numbers = collect(NAMES)
    numbers["predictions"] = judge(numbers)
    text = json.dumps(finite(numbers), indent=1, ensure_ascii=False, allow_nan=False)
    (FOLDER / "numbers.json").write_text(text + "\n", encoding="utf-8")
    (FOLDER / "figure.svg").write_text(figure(numbers["dose"]) + "\n", encoding="utf-8")
    (FOLDER / "RESULT.md").write_text(page(numbers), encoding="utf-8")
    for name, (verdict, figures) in numbers["predictions"].items():
        print(f"{name} {verdict}: {figures}")


def page(numbers: Numbers) -> str:
    """RESULT.md."""
    runs = numbers["runs"]
    parts = [
        "# Is the paper's gain the attention sink? A pretrained model",
        *_answer(numbers),
        "## Predictions, made before the runs\n\nThe file [PREDICTIONS.md](PREDICTIONS.md) says each in full.",
        _table(["", "verdict", "our figures"], ([n, f"**{v}**", f] for n, (v, f) in numbers["predictions"].items())),
        *_mistaken(numbers),
        "## Dose and response\n\nSink: norm of position 0 over the median. On: latents that fire on it, of 2304 "
        "(k = 32). Gains are cosine − standard, top-1, in points.",
        _table(_DOSE_HEAD, (_dose_row(row) for row in numbers["dose"])),
        "![gain by block](figure.svg)",
    ]
    parts += _saebench(numbers["saebench"]) + _second_sink(numbers["second_sink"])
    for name in NAMES:
        if name in runs and len(runs[name]["arms"]) > 1:
            parts += _section(name, runs[name])
    parts += ["## How it was done", _method(runs), _missing(runs)]
    return "\n\n".join(part for part in parts if part) + "\n"


_DOSE_HEAD = ["block", "sink", "standard on", "cosine on", *WAYS.values(), "every token, by AUROC", "last token"]


def _dose_row(row: Numbers) -> list[str]:
    gains = [shown(row[way]) for way in (*WAYS, "in_auroc", "last")]
    return [str(row["block"]), f"{row['strength']:.1f} ×", *(f"{row['on'][a]:.0f}" for a in row["on"]), *gains]


def _answer(numbers: Numbers) -> list[str]:
    """The first paragraph: the gain at block 14 by three ways of reading the same SAEs."""
    rows = {row["block"]: row for row in numbers["dose"]}
    if 14 not in rows:
        return ["Not run yet."]
    at, one = rows[14], numbers["runs"]["real_14"]
    read = one["arms"][STANDARD]["readings"]
    mask = 100 * (read["out/mean_difference/top_1"]["accuracy"] - read["in/mean_difference/top_1"]["accuracy"])
    both = 100 * (read["out/auroc/top_1"]["accuracy"] - read["in/mean_difference/top_1"]["accuracy"])
    return [
        f"At block 14 of SmolLM2-135M position 0 of a text has {at['strength']:.0f} times the median norm. By the "
        f"paper's protocol cosine SAEs beat standard ones there by **{shown(at['paper'])} points** of top-1 probing "
        f"accuracy; with this one token left out of the pooling by **{shown(at['masked'])}**, and with latents chosen "
        f"by AUROC as well by **{shown(at['masked_auroc'])}**. The standard SAEs gain {mask:+.1f} points from the mask "
        f"and {both:+.1f} from mask and rule, with the same weights. ({one['sets']} labelled sets, "
        f"{len(one['seeds'])} seeds, 95 % intervals over both.)"
    ]


def _mistaken(numbers: Numbers) -> list[str]:
    """What the predictions assumed and the model does not do."""
    at = {row["block"]: row for row in numbers["dose"]}.get(11)
    if at is None or at["strength"] < ORDINARY:
        return []
    return [
        f"P4 took block 11 for a site without a sink: its output has one of {at['strength']:.0f} times the median norm "
        "(hidden state 11, which was looked at, is the output of block 10). So P4 is refuted as it was written, and "
        "block 11 joins the sink sites, where its gain belongs; block 10 is the one site without a sink. P1 and P11 "
        "expected more of a weak sink and less of the unit frame than there is."
    ]


def _section(name: str, one: Numbers) -> list[str]:
    """Tables of one set of runs."""
    arms = one["arms"]
    title = name.removeprefix("real_").replace("_", ", ")
    readings = [f"{p}/{r}/top_1" for p in ("in", "out") for r in RULES]
    if "in/mean_difference/top_5" in arms[STANDARD]["readings"]:
        readings += [f"out/auroc/top_{k}" for k in (2, 5)] + ["in/mean_difference/top_5", "in/full", "out/full"]
    if name.startswith("real_14"):
        readings += [
            r for r in ("in/raw/mean_difference/top_1", "out/raw/mean_difference/top_1") if r in _readings(arms)
        ]
    for control in ("random", "clipped", "last", "planted"):
        readings += [r for r in (f"{control}/mean_difference/top_1",) if r in _readings(arms)]
    parts = [f"## Block {title} (seeds {', '.join(map(str, one['seeds']))})"]
    head = ["pooled / latents by / number", *arms]
    parts.append("Accuracy of probing, and in brackets the difference from standard in points.")
    parts.append(_table(head, ([r.replace("_", " "), *(_cell(arms[a], r) for a in arms)] for r in readings)))
    trained = [arm for arm in arms if "exponent" in arms[arm]]
    parts.append("Held-out tokens of Wikipedia.")
    parts.append(_table(["", *trained], ([words, *(_known(arms[a], key) for a in trained)] for key, words in _FACTS)))
    if one["sharing"]:
        parts.append(
            "Features shared (correlation and cosine of .7 or more, one to one; sinks out), by seed. Arms of one seed "
            "start from the same weights, other seeds do not."
        )
        parts.append(
            _table(["", "share"], ([p, ", ".join(f"{v:.3f}" for v in by)] for p, by in one["sharing"].items()))
        )
    if one["discovery"]:
        parts += _discovery(one["discovery"])
    if one["splice"]:
        parts.append(
            f"In the model's place ({one['splice']['tokens']} tokens, {one['splice']['seeds']} seeds): loss recovered "
            "against the mean ablation, its difference from standard, KL in nats."
        )
        rows = ([p.replace("_", " "), *(_spliced(row[a]) for a in row)] for p, row in _places(one["splice"]))
        parts.append(_table(["replaced / counted", *next(iter(dict(_places(one["splice"])).values()))], rows))
    return parts


def _discovery(pairs: Numbers) -> list[str]:
    """Where the gap lies: in features that both have, or in those of one alone."""
    head = ["pair, features chosen", "all features", "shared ones alone", "as many at random", "separability", "shared"]
    rows = [
        [
            f"{pair}, {WAYS[way]}",
            *(shown(one[key]) for key in ("full", "shared")),
            f"{one['random']:+.1f}",
            "" if one["separability"] is None else f"{one['separability']:.0%}",
            ", ".join(map(str, one["shared_features"])),
        ]
        for pair, ways in pairs.items()
        for way, one in ways.items()
    ]
    words = (
        "Discovery or separability (paper §6): gap in held-out AUROC, in points, of the second SAE over the first by "
        "the one feature chosen for each question, among all features, among those that both have, and among as many "
        "drawn at random. Separability: the share of the gap that shared features have too; none where it may be 0."
    )
    return [words, _table(head, rows)]


def _saebench(found: Numbers) -> list[str]:
    """The same SAEs through SAEBench's code."""
    if not found:
        return []
    words = (
        "## SAEBench's own code\n\nsparse_probing of SAEBench 0.6 through `cosae bench`, sets of four classes in the "
        "place of its AG News (Wikipedia's topics, news, code, help-desk tickets), 64 tokens a text. SAEBench leaves a "
        "BOS out of the pooling. With SmolLM2's tokenizer as it is, a BOS takes the sink; without one, as in Qwen3, "
        "the first word does and is pooled. Accuracy by standard → cosine, and the difference in points over questions "
        "and seeds."
    )
    rows = [
        [f"{run.removeprefix('real_')}, {bos}", *(_accuracies(one[f"sae_top_{top}"]) for top in (1, 2, 5))]
        for run, by in found.items()
        for bos, one in by.items()
    ]
    return [words, _table(["block, tokenizer", "top 1", "top 2", "top 5"], rows)]


def _second_sink(found: Numbers) -> list[str]:
    """What is left of the gain with a BOS, and why."""
    if not found:
        return []
    by = {first: _accuracies(found[first]) for first in ("1", "2")}
    return [
        f"A BOS does not take the whole sink: in {found['second_sinks']:.1%} of these {found['texts']} texts the word "
        "after it has ten times the median norm or more, and SAEBench pools it. By SAEBench's rule and regression, "
        f"read by us, top 1: {by['1']} pooled from position 1, as SAEBench does, and {by['2']} from position 2."
    ]


def _accuracies(one: Numbers) -> str:
    return f"{one['standard']:.3f} → {one['cosine']:.3f} ({shown(one['gain'])})"


_FACTS = (
    ("fve/sinks_out", "FVE, sinks out"),
    ("fve/sinks_out/difference", "− standard"),
    ("fve/sinks_in", "FVE, sinks in"),
    ("l0/sinks_out", "L0, sinks out"),
    ("dead_frac/sinks_out", "dead"),
    ("at_position_0", "latents on at position 0 of labelled texts"),
    ("elsewhere", "latents on elsewhere in them"),
    ("exponent", "a at the end, by seed"),
    ("norm_driven/sinks_out", "firings that the norm decides, sinks out"),
    ("top_quartile/sinks_out", "firings in the top norm quartile, sinks out"),
    ("top_quartile/sinks_in", "the same, sinks in"),
    ("sinks/sink_features", "features with most of their firings on sinks"),
    ("sinks/norm_ratio_on", "norm of the reconstruction over the sink's"),
)


def _places(splice: Numbers) -> Iterable[tuple[str, Numbers]]:
    return ((key, row) for key, row in splice.items() if isinstance(row, dict))


def _spliced(one: Numbers) -> str:
    gap = (
        f" ({one['difference'][0]:+.3f} ± {one['difference'][2] - one['difference'][0]:.3f})"
        if one["difference"]
        else ""
    )
    return f"{one['recovered']:.3f}{gap}, KL {one['kl']:.3f}"


def _readings(arms: Numbers) -> Numbers:
    found: Numbers = arms[STANDARD]["readings"]
    return found


def _cell(arm: Numbers, reading: str) -> str:
    one = arm["readings"].get(reading)
    if one is None:
        return ""
    return f"{one['accuracy']:.3f}" + (f" ({shown(one['gain'])})" if one["gain"] else "")


def _known(arm: Numbers, key: str) -> str:
    value = arm.get(key)
    if isinstance(value, list) and key.endswith("difference"):
        return f"{value[0]:+.4f} [{value[1]:+.4f}, {value[2]:+.4f}]" if None not in value else ""
    if isinstance(value, list):
        return ", ".join(f"{v:.2f}" for v in value)
    return "" if value is None else f"{value:.0f}" if key in _WHOLE else f"{value:.3f}"


_WHOLE = ("at_position_0", "sinks/sink_features")


def _method(runs: Numbers) -> str:
    first = next(iter(runs))
    record = read_json(folder_of(first, runs[first]["seeds"][0]) / "run.json")
    made = f"{str(record['commit'])[:12]}, torch {record['packages']['torch']}, {record['hardware']['processor']}"
    n_probes = len(LIKE_THE_PAPER) + len(OTHERS)
    return (
        "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised to float32), documents of at most 128 tokens of Wikipedia "
        "introductions in English, French and Spanish, a document a sequence. Every arm: 2000 steps of 1024 tokens, "
        f"four passes over {TRAIN_TOKENS:,} tokens, lr 1e-3, batch_topk, k 32, 2304 features (`wide`: 9216), filter "
        "norm (tokens of 10 × the median norm or more are left out of training; `unfiltered`: none are). Thresholds "
        "are calibrated to L0 32 on held-out tokens without sinks. Probing: "
        f"{n_probes} sets of sae-probes and {' and '.join(WIKI)}, 200 texts of at most 128 tokens a question (topic: "
        f"100), four fifths for choosing and fitting, read in {PRECISION}. The texts' split is one; seeds are those of "
        "the SAEs' weights and data order. Wikipedia's own two sets are made of the text that SAEs were trained on. "
        f"Runs of commit {made}. Try it: `python -m studies.real_model`."
    )


def _missing(runs: Numbers) -> str:
    """What is not there: said, not dropped."""
    lacking = [name for name in NAMES if name not in runs]
    few = [f"{name} ({len(one['seeds'])})" for name, one in runs.items() if len(one["seeds"]) < 3]
    spliced = [f"real_{b}" for b in REAL_CLOSELY if f"real_{b}" in runs and not runs[f"real_{b}"]["splice"]]
    said = [("Not run yet", lacking), ("Fewer than three seeds", few), ("Not spliced yet", spliced)]
    return " ".join(f"{words}: {', '.join(names)}." for words, names in said if names)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows)])


def figure(dose: Sequence[Numbers]) -> Markup:
    """Gain by block, three ways of reading, each with its interval."""
    if not dose:
        return drawing(40, [], "nothing run yet")
    ends = [v for row in dose for way in WAYS for v in row[way][1:]] + [0.0]
    room = 0.08 * (max(ends) - min(ends))
    panel = Panel.at((70, 20, 600, 330), (-0.5, len(dose) - 0.5), (min(ends) - room, max(ends) + room))
    names = [(float(at), f"{row['block']}: {row['strength']:.0f} ×") for at, row in enumerate(dose)]
    words = "block: norm of position 0 over the median"
    parts: list[Any] = [
        panel.axes(x_label=words, y_label="cosine − standard, points", x_ticks=names),
        panel.row(0.0, ""),
    ]
    for number, (way, name) in enumerate(WAYS.items()):
        style, shift = style_of(number), 11.0 * (number - 1)
        for at, row in enumerate(dose):
            middle, low, high = row[way]
            x = panel.x(at) + shift
            line = {"x1": x, "x2": x, "y1": panel.y(low), "y2": panel.y(high)}
            parts.append(tag("line", **line, stroke=style.colour, stroke_width=2))
            parts.append(panel.mark(at, middle, style, f"block {row['block']}, {name}: {shown(row[way])}", shift))
        parts += [marker(692, 40 + 22 * number, style), label(704, 44 + 22 * number, name, "start", INK, 13)]
    told = "; ".join(f"block {row['block']}: {shown(row['paper'])}, {shown(row['masked'])}" for row in dose)
    return drawing(410, parts, "Gain of cosine over standard by block", width=900, told=told)
