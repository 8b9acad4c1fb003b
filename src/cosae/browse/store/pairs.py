"""Two features, or two SAEs, side by side: from what the store knows of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cosae.browse.store.format import Array
from cosae.browse.store.records import Comparison, Example, Feature, SAEComparison, SAEInfo, SharedText

MIN_FIRINGS = 10
"""Features that fire on fewer of the tokens that features are paired on take no part, as in evaluate.matching."""


def compare_features(a: Feature, b: Feature) -> Comparison:
    """What is known of the pair, texts in which both have an example, and concepts by difference."""
    match = next((one for one in a.matches if (one.sae, one.id) == (b.sae, b.row.id)), None)
    near = [
        one
        for x, y in ((a, b), (b, a))
        if a.sae == b.sae
        for one in (*x.by_cosine, *x.by_cofiring)
        if one.id == y.row.id
    ]
    cosine = match.cosine if match is not None else next((one.cosine for one in near if one.cosine is not None), None)
    jaccard = next((one.jaccard for one in near if one.jaccard is not None), None)
    of_b = dict(b.aurocs)
    concepts = [(name, value, of_b[name]) for name, value in a.aurocs if name in of_b]
    concepts.sort(key=lambda one: -abs(one[1] - one[2]))
    correlation = None if match is None else match.correlation
    return Comparison(a, b, correlation, cosine, jaccard, shared_texts(a.examples, b.examples), tuple(concepts))


def shared_texts(a: Sequence[Example], b: Sequence[Example]) -> tuple[SharedText, ...]:
    """One text for each sequence in which both have an example and whose windows overlap, the most different first."""
    of_b: dict[int, list[Example]] = {}
    for one in b:
        of_b.setdefault(one.sequence, []).append(one)
    found: dict[int, SharedText] = {}
    for one in a:
        for other in of_b.get(one.sequence, ()):
            start = max(_start(one), _start(other))
            stop = min(_start(one) + len(one.ids_W), _start(other) + len(other.ids_W))
            if stop <= start or stop - start <= len(known.ids_W if (known := found.get(one.sequence)) else ()):
                continue
            own, its = (slice(start - _start(x), stop - _start(x)) for x in (one, other))
            found[one.sequence] = SharedText(
                one.ids_W[own], one.value_W[own], other.value_W[its], one.sink_W[own], one.document, one.sequence, start
            )
    largest = [max((abs(x.value) for x in side), default=0.0) or 1.0 for side in (a, b)]

    def difference(text: SharedText) -> float:
        return float(np.abs(text.a_W / largest[0] - text.b_W / largest[1]).max())

    return tuple(sorted(found.values(), key=lambda text: (-difference(text), text.sequence)))


def _start(example: Example) -> int:
    return example.position - example.at


def compare_saes(
    infos: tuple[SAEInfo, SAEInfo],
    tables: tuple[Mapping[str, Array], Mapping[str, Array]],
    match: Mapping[str, Array],
    aurocs: Sequence[Array | None],
    concepts: Sequence[tuple[str, str]],
) -> SAEComparison:
    """From both tables, the matches of a in b, and where known the AUROCs (F, C) of both."""
    id_P = np.flatnonzero(match["match_id"] >= 0)
    order = id_P[np.argsort(-match["match_correlation"][id_P], kind="stable")]
    columns = (match["match_id"], match["match_correlation"], match["match_cosine"])
    shared = tuple((int(i), *(column[i].item() for column in columns)) for i in order)
    paired = (set(id_P.tolist()), set(match["match_id"][id_P].tolist()))
    own = []
    for table, taken in zip(tables, paired, strict=True):
        alive = np.flatnonzero(table["pair_firings"] >= MIN_FIRINGS)
        alone = [int(i) for i in alive[np.argsort(-table["firings"][alive], kind="stable")] if int(i) not in taken]
        own.append(tuple(alone))
    gaps = []
    if aurocs[0] is not None and aurocs[1] is not None:
        areas = [np.nan_to_num(value_FC, nan=0.0) for value_FC in (aurocs[0], aurocs[1])]
        best = [(area_FC.argmax(0), area_FC.max(0)) for area_FC in areas]
        known_C = np.isfinite(aurocs[0]).any(0) & np.isfinite(aurocs[1]).any(0)
        for c in np.flatnonzero(known_C).tolist():
            (of_a, area_a), (of_b, area_b) = ((int(i[c]), float(v[c])) for i, v in best)
            gaps.append((concepts[c][0], of_a, area_a, of_b, area_b))
        gaps.sort(key=lambda one: -abs(one[2] - one[4]))
    return SAEComparison(infos[0], infos[1], shared, own[0], own[1], tuple(gaps))
