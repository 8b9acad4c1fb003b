"""What a pass has found → the files of a store."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.browse.collect.building import NORM_EDGES, Building
from cosae.browse.collect.columns import of_concepts, of_logits, of_numbers, of_weights
from cosae.browse.collect.matches import matched, neighbours, pairings
from cosae.browse.collect.state import SAEState, joined
from cosae.browse.collect.written import write_examples
from cosae.browse.store.format import CODE_ROWS, CODES, TEXTS, write_rows
from cosae.browse.store.writer import finish, write_features, write_pictures, write_vocabulary
from cosae.io.progress import Progress
from cosae.io.values import to_plain
from cosae.kernels.cpu.native import each

Array = NDArray[Any]
Columns = dict[str, Array]
LOGIT_IDS = ("promoted_id", "suppressed_id")


def write_store(folder: Path, building: Building, progress: Progress) -> None:
    """All files of a store, into a folder that is put in place afterwards."""
    matches = matched(building)
    features = sum(state.sae.d_sae for state in building.states)
    for number in range(len(building.states)):
        (folder / f"sae{number}").mkdir()

    def columns_of(number: int) -> Columns:
        state = building.states[number]
        found = of_numbers(state) | of_weights(state) | of_logits(building, state, progress)
        found |= neighbours(building, number) | matches[number] | of_concepts(building, state)
        return found | _codes(folder / f"sae{number}", state)

    def written(number: int) -> set[int]:
        place, columns = folder / f"sae{number}", every[number]
        columns["top_tokens"], used = write_examples(place, building, number, progress)
        write_features(place, columns)
        return used.union(*(np.unique(columns[name]).tolist() for name in LOGIT_IDS if name in columns))

    places = range(len(building.states))
    with progress.phase("summing up", features, "features"):
        every = each(columns_of, places)
    with progress.phase("writing examples", features, "features"):
        used = set().union(*each(written, places))
    used |= _texts(folder, building)
    if pictures := getattr(building.source, "pictures", None):
        write_pictures(folder, pictures)
    write_vocabulary(folder, {token: building.source.spell(token) or "" for token in sorted(used) if token >= 0})
    described = [_describe(building, number, columns) for number, columns in enumerate(every)]
    finish(folder, _record(building, described, matches))


def _codes(place: Path, state: SAEState) -> Columns:
    """Codes of the sample by feature, and where each feature's begin."""
    by_feature = joined(state.sample, state.sae.d_sae).tocsc()
    by_feature.sort_indices()
    columns = {"token": by_feature.indices.astype(np.int32), "value": by_feature.data.astype(np.float32)}
    write_rows(place / CODES, columns, CODE_ROWS)
    return {
        "code_first": by_feature.indptr[:-1].astype(np.int64),
        "code_count": np.diff(by_feature.indptr).astype(np.int64),
    }


def _texts(folder: Path, building: Building) -> set[int]:
    """The sample's tokens: id, sequence, flags. Returns the ids."""
    n = sum(map(len, building.sample_pair))
    tokens = building.tokens
    ids = np.asarray(tokens.open("id")[:n])
    sequence = np.searchsorted(np.asarray(tokens.open("start")), np.arange(n), side="right") - 1
    pair = np.concatenate(building.sample_pair)
    write_rows(folder / TEXTS, {"id": ids, "sequence": sequence, "pair": pair}, CODE_ROWS)
    return set(np.unique(ids).tolist())


def _describe(building: Building, number: int, columns: Columns) -> dict[str, Any]:
    assert building.probe is not None
    state = building.states[number]
    sae, of, numbers, listed = state.sae, state.numbers.of, state.numbers, building.saes[state.name]
    firings = int(of["firings"].sum())
    changed, union = int((of["vanished"] + of["appeared"]).sum()), int((of["firings"] + of["appeared"]).sum())
    tokens = max(numbers.tokens, 1)
    return {
        "name": state.name,
        "folder": f"sae{number}",
        "path": listed.path,
        "sha256": listed.sha256,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "score": sae.cfg.score,
        "selector": sae.cfg.selector,
        "frame": sae.cfg.frame,
        "k": sae.k,
        "signed": state.examples.negative is not None,
        "exponent": float(sae.scale_a.detach().double().mean()),
        "value_exponent": None if sae.value_exponent is None else float(sae.value_exponent.detach().double().mean()),
        "tokens": numbers.tokens,
        "l0": firings / tokens,
        "dead": int((of["firings"] == 0).sum()),
        "median_r": building.probe.median_r[state.name],
        "norm_driven": changed / union if union else None,
        "quartile_share": (of["quartiles"].sum(0) / firings).tolist() if firings else None,
        "quartile_null": (numbers.quartile_tokens / tokens).tolist(),
        "logits": "promoted_id" in columns,
        "evaluation": dict(listed.evaluation),
        "explained": 0,
    }


def _record(building: Building, saes: list[dict[str, Any]], matches: list[Columns]) -> dict[str, Any]:
    probe, source, tokens = building.probe, building.source, building.tokens
    assert probe is not None
    some = np.flatnonzero(building.norm_counts[0])
    bins = slice(int(some[0]), int(some[-1]) + 1)
    read = {
        "model": source.model,
        "site": source.site,
        "corpus": source.corpus,
        "tokens": tokens.count,
        "left_out": building.left_out,
        "sequences": tokens.sequences,
        "documents": len(tokens.documents()),
        "context": source.context,
        "window": building.options.window,
        "seed": building.options.seed,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": building.options.commit,
    }
    if (layout := getattr(source, "layout", None)) is not None:
        read["layout"] = to_plain(layout)
    norms = {
        "tokens": probe.tokens,
        "median": probe.median,
        "factor": probe.factor,
        "quantiles": list(probe.quantiles),
        "cuts": list(probe.cuts),
        "sinks": building.sinks,
        "edges": NORM_EDGES[bins.start : bins.stop + 1].tolist(),
        "counts": building.norm_counts[0][bins].tolist(),
        "sink_counts": building.norm_counts[1][bins].tolist(),
    }
    return {
        "identity": building.identity,
        "read": read,
        "norms": norms,
        "saes": saes,
        "pairings": list(pairings(building, matches)),
        "concepts": [list(one) for one in source.concepts] if building.labels is not None else [],
        "labelled": 0 if building.labels is None else int(building.labels[1].sum()),
        "pair_tokens": building.pair_tokens,
    }
