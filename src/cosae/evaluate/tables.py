"""What a measurement found, as tables: the numbers one looks at first. All are in the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cosae.shown import counted

Rows = list[list[str]]
Table = tuple[str, Rows]
"""A caption and rows of cells, the head first."""


def reconstruction(found: Mapping[str, Any]) -> Iterator[Table]:
    for which in ("sinks_out", "sinks_in"):
        rows = [
            ["SAE", "FVE", "per batch", "median token", "cosine", "|x̂|/|x|", "L0", "dead", "rare", "FVE by quartile"]
        ]
        for name, both in found["saes"].items():
            one = both[which]
            keys = ("fve", "fve_per_batch", "median_token_fve", "cosine", "norm_ratio")
            by = " ".join(_n(q["fve"], 2) for q in one["by_norm_quartile"])
            shares = [_n(one["dead_frac"]), _n(one["rare_frac"])]
            rows.append([name, *(_n(one[key]) for key in keys), _n(one["l0"], 1), *shares, by])
        yield f"Reconstruction, {_said(which)}, {counted(one['tokens'], 'token')}", rows
    yield from _paired("FVE", found["paired"])


def norms(found: Mapping[str, Any]) -> Iterator[Table]:
    for which in ("sinks_out", "sinks_in"):
        rows = [
            ["SAE", "norm-driven", "95 %", "features mostly", "of values' variance", "firings by norm quartile (null)"]
        ]
        for name, both in found["saes"].items():
            one, where = both["norm_driven"][which], both["firing_norms"][which]
            if one is None or where is None or one["share"] is None:
                rows.append([name, "–", "–", "–", "–", "–"])
                continue
            pairs = zip(where["quartile_share"], where["quartile_null"], strict=True)
            mostly = f"{one['features_mostly']} of {one['features_counted']}"
            firing = " ".join(f"{_n(a, 2)} ({_n(b, 2)})" for a, b in pairs)
            rows.append(
                [name, _n(one["share"]), _range(*one["share_interval"]), mostly, _n(one["value_norm_frac"]), firing]
            )
        yield f"Driven by norm, {_said(which)}", rows
    yield from _paired("Norm-driven share", found["paired"])


def sinks(found: Mapping[str, Any]) -> Iterator[Table]:
    rows = [["SAE", "sinks", "× median norm", "L0 on / off", "sink features", "of firings", "of error", "FVE on them"]]
    for name, one in found["saes"].items():
        ends = [_n(one["l0_on"], 0) + " / " + _n(one["l0_off"], 0), str(one["sink_features"])]
        shares = [_n(one[key]) for key in ("firing_frac", "error_frac", "fve_on")]
        rows.append([name, str(one["n_sinks"]), _n(one["norm_over_median"], 1), *ends, *shares])
    yield "Sinks", rows


def exponents(found: Mapping[str, Any]) -> Iterator[Table]:
    rows = [["SAE", "a", "mean a", "mean b", "5 % … 95 % of features"]]
    for name, one in found.items():
        ends = one.get("quantiles")
        spread = _range(ends[0], ends[-1]) if ends else ""
        rows.append([name, one["kind"].replace("_", " "), _n(one["mean"]), _n(one["b_mean"]), spread])
    yield "Exponents", rows


def recovery(found: Mapping[str, Any]) -> Iterator[Table]:
    rows = [["SAE", "MCC", "F1", "AUROC", "uniqueness", "L0", "dead"]]
    keys = ("mcc", "f1", "auroc", "uniqueness", "l0", "dead_frac")
    rows += [[name, *(_n(one[key]) for key in keys)] for name, one in found.items()]
    yield "True features of the world that were found", rows


def geometry(found: Mapping[str, Any]) -> Iterator[Table]:
    rows = [["SAE", "mean max cosine", "near duplicates", "participation", "entropy dimension", "encoder · decoder"]]
    for name, one in found["saes"].items():
        decoder = one["decoder"]
        sizes = [_n(decoder["participation_ratio"], 1), _n(decoder["entropy_dimension"], 1)]
        pairs = str(decoder["near_duplicates"]["pairs"])
        rows.append([name, _n(decoder["mean_max_cosine"]), pairs, *sizes, _n((one["alignment"] or {}).get("mean"))])
    yield "Geometry", rows


def probing(found: Mapping[str, Any]) -> Iterator[Table]:
    yield from (_text_probing(found) if found["kind"] == "texts" else _token_probing(found))


def _text_probing(found: Mapping[str, Any]) -> Iterator[Table]:
    listed = ", ".join(
        f"{one['name']} ({len(one['classes'])}; {one['encoded']} of {one['texts']} texts)" for one in found["sets"]
    )
    over = found["interval"]["over"]
    yield f"Accuracy on test texts{f'; 95 % over {over}' if over else ''}; sets (classes asked about): {listed}", [[""]]
    for which in ("sinks_out", "sinks_in"):
        summary = found["summary"][which]
        readings = [reading for reading in summary[found["baseline"]] if "/" in reading]
        for rule in dict.fromkeys(reading.partition("/")[0] for reading in readings):
            mine = [reading for reading in readings if reading.startswith(f"{rule}/")]
            rows = [["", *(reading.partition("/")[2].replace("_", " ") for reading in mine)]]
            rows += [[name, *(_estimate(summary[name][r]["accuracy"]) for r in mine)] for name in found["arms"]]
            yield f"Pooled with {_said(which)}, features chosen by {_said(rule)}", rows
        rows = [
            [name, _estimate(summary[name]["full"]["accuracy"])] for name in found["arms"] if "full" in summary[name]
        ]
        others = {name: by for name, by in summary.items() if name not in found["arms"]}
        rows += [
            [f"{name.replace('_', ' ')} ({kind})", _estimate(by[kind]["accuracy"])]
            for name, by in others.items()
            for kind in by
        ]
        yield f"Pooled with {_said(which)}, all features; floors and ceilings", rows
    shown = [
        row for row in found["paired"] if row["metric"] == "accuracy" and row["reading"].endswith(("top_1", "full"))
    ]
    yield from _paired("Accuracy", shown, ("sinks", "reading"))
    yield "Features chosen on train texts of the first seed, best first, pooled with sinks out", _chosen(found)


NAMED_CLASSES = 5
"""Classes of a set whose features are named on the screen; the file has all."""


def _chosen(found: Mapping[str, Any]) -> list[list[str]]:
    rules = found["latents"]["sinks_out"]
    rows = [["set", "class", "SAE", *(_said(rule) for rule in next(iter(rules.values())))]]
    for one in found["sets"]:
        for kind in one["classes"][:NAMED_CLASSES]:
            for arm, by_rule in rules.items():
                features = [" ".join(map(str, by[one["name"]][kind])) for by in by_rule.values()]
                rows.append([one["name"], kind, arm, *features])
    return rows


def _token_probing(found: Mapping[str, Any]) -> Iterator[Table]:
    for which in ("sinks_out", "sinks_in"):
        summary = found[which]["summary"]
        rules = list(dict.fromkeys(rule for by in summary.values() for rule in by))
        rows = [["AUROC, contextual concepts", *(rule.replace("_", " ").replace("/", ", ") for rule in rules)]]
        for name, by in summary.items():
            rows.append([name, *(_estimate(by[r]["contextual"]["auroc"]) if r in by else "" for r in rules)])
        over = f"95 % over {counted(len(found[which]['concepts']), 'concept')}"
        yield f"One latent per concept, or as many as stand there, {_said(which)}; {over}", rows


def matching(found: Mapping[str, Any]) -> Iterator[Table]:
    rows = [["pairs by", "pairs", "shared", "yardstick", "ratio", "95 %", "paper's rule a, b"]]
    for how, one in found.items():
        if not isinstance(one, Mapping):
            continue
        pair, against = one["pair"], one.get("against_yardstick") or {}
        floor = [_n(against.get("yardstick_frac")), _n(against.get("ratio"))]
        paper = f"{_n(pair['paper_frac_a'])}, {_n(pair['paper_frac_b'])}"
        interval = _range(against.get("low"), against.get("high"))
        rows.append([how, str(pair["pairs"]), _n(pair["shared_frac"]), *floor, interval, paper])
    yield f"Features of {found['a']} that {found['b']} has", rows


def discovery(found: Mapping[str, Any]) -> Iterator[Table]:
    head = ["pairs by", "of", "shared", "gap, all features", "shared ones", "as many at random", "separability"]
    rows = [head]
    names = {"pairs": f"{found['b']} − {found['a']}", "yardsticks": f"{found['a']}, another seed − {found['a']}"}
    for by, both in found["by"].items():
        for kind, name in names.items():
            for one in both[kind]:
                if "none" in one:
                    rows.append([by, name, "0", "-", "-", "-", "-"])
                    continue
                gaps = [_estimate(one[f"gap_{which}"]) for which in ("full", "matched", "random")]
                rows.append([by, name, str(one["matched"]), *gaps, _n(one["separability_frac"])])
    yield f"Gap in AUROC over {found['concepts']} concepts, sinks out; features chosen on training files", rows


def splice(found: Mapping[str, Any]) -> Iterator[Table]:
    for place in ("everywhere", "off_sinks"):
        rows = [["SAE", "KL", "loss increase", "recovered (mean)", "recovered (zero)", "KL by norm quartile"]]
        for name, one in found["saes"].items():
            here = one[place]["sinks_in"]
            keys = ("kl", "increase", "recovered_mean", "recovered_zero")
            rows.append(
                [name, *(_n(here[key]) for key in keys), " ".join(_n(q["kl"]) for q in here["by_norm_quartile"])]
            )
        yield f"Spliced in {place.replace('_', ' ')}; the model's own loss {_n(found['model']['sinks_in'])} nats", rows


def causal(found: Mapping[str, Any]) -> Iterator[Table]:
    for kind in ("ablation", "steering"):
        rows = [["SAE", "feature", "relative size", "KL on", "KL off", "on share"]]
        for name, both in found["saes"].items():
            for feature, one in both[kind]["edits"].items():
                ends = [_n(one["on"]["kl"], 5), _n(one["off"]["kl"], 5), _n(one["on_share"])]
                rows.append([name, feature, _n(one["relative_size"]), *ends])
        yield f"{kind.capitalize()} of single features, on and off the tokens where they fire", rows


def patching(found: Mapping[str, Any]) -> Iterator[Table]:
    rows = [["size", "degrees", "KL of direction", "norm up", "norm down", "direction / norm", "direction / random"]]
    for one in found["by_size"]:
        here = [_n(one["kinds"][kind]["kl_here"], 5) for kind in ("direction", "norm_up", "norm_down")]
        ratios = [_ratio(one["direction_over_norm"]), _ratio(one["direction_over_random"])]
        rows.append([_n(one["size"], 2), _n(one["degrees"], 1), *here, *ratios])
    yield f"Changes of equal size at {found['site']}, {found['pairs']} tokens; no SAE enters", rows


def gradients(found: Mapping[str, Any]) -> Iterator[Table]:
    for which in ("sinks_out", "sinks_in"):
        rows = [["SAE", "competition", "gradient by norm quartile", "loss by norm quartile", "feature's Q4 / Q1"]]
        for name, both in found["saes"].items():
            for how, one in both[which]["selections"].items():
                shares = [" ".join(_n(v, 2) for v in one[key] or ()) for key in ("share", "loss_share")]
                rows.append([name, how.replace("_", " "), *shares, _n(one["feature_ratio"], 2)])
        yield f"Gradient shares, {_said(which)}", rows


def _ratio(one: Mapping[str, float] | None) -> str:
    return "–" if one is None else f"{_n(one['ratio'], 2)} {_range(one['low'], one['high'], 2)}"


def _paired(what: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str] = ("sinks",)) -> Iterator[Table]:
    if rows:
        shown = [["SAE", *keys, "difference", "95 %"]]
        for row in rows:
            where = [str(row.get(key, "")).replace("_", " ") for key in keys]
            ends = [_n(row["difference"], 4, True), _range(row["low"], row["high"], 4)]
            shown.append([row["arm"], *where, *ends])
        yield f"{what}, minus {rows[0]['versus']}'s", shown


def _said(which: str) -> str:
    return which.replace("_", " ")


def _estimate(one: Mapping[str, Any]) -> str:
    if one.get("low") is None:
        return _n(one["mean"])
    return f"{_n(one['mean'])} {_range(one['low'], one['high'])}"


def _range(low: float | None, high: float | None, digits: int = 3) -> str:
    return "–" if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def _n(value: float | None, digits: int = 3, sign: bool = False) -> str:
    return "–" if value is None else f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
