"""A feature store on disk, read a few features at a time.

    store = open_store(folder)
    store.table("cosine", sort="norm_driven", limit=50).rows
    store.feature("cosine", 7).group("top")

Methods may be called from several threads. Arguments that come from a browser are checked here: an SAE, a feature, a
column or a filter that does not exist raises CosaeError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.browse.store import format as files
from cosae.browse.store.explained import read_explanations
from cosae.browse.store.format import Array, RowReader
from cosae.browse.store.pairs import compare_features, compare_saes
from cosae.browse.store.records import (
    NUMBERS,
    Columns,
    Comparison,
    Example,
    Explanation,
    Feature,
    Match,
    Norms,
    Overview,
    Pairing,
    Pass,
    Row,
    SAEComparison,
    SAEInfo,
    TablePage,
    Texts,
)
from cosae.browse.store.rows import example, histogram, ids_with_values, known, neighbours, score_of
from cosae.browse.store.table import SEARCHES, Filters, filtered, searched
from cosae.errors import CosaeError, check_choice, check_least
from cosae.io.digest import file_digest
from cosae.io.records import read_record
from cosae.io.values import from_plain
from cosae.shown import counted

SCALARS = ("firings", "largest", "mean", "norm_driven", "firing_norm", "pair_firings")
MOST_ROWS = 1000
MOST_OPEN = 6
"""Files of a store that are open at once."""


class FeatureStore:
    """A store, opened: `open_store` does it. saes: its SAEs, in order; read: the pass it was built from."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self._record, self._lock = record, RLock()
        self._readers: dict[str, RowReader] = {}
        self._tables: dict[str, dict[str, Array]] = {}
        self._explained: dict[str, tuple[float, dict[int, Explanation]]] = {}
        self._folders = {one["name"]: one["folder"] for one in record["saes"]}
        self._place = {name: place for place, name in enumerate(self._folders)}
        self._texts: Texts | None = None
        self._pictures: dict[int, bytes] | None = None
        self._spelled: dict[int, str] | None = None
        self._lower: tuple[NDArray[np.int64], list[str]] | None = None
        self.read = from_plain(Pass, record["read"], "the store's record")

    @property
    def saes(self) -> tuple[SAEInfo, ...]:
        """The SAEs in order."""
        return tuple(self.sae(name) for name in self._folders)

    @property
    def concepts(self) -> tuple[tuple[str, str], ...]:
        """(name, description) of the labels; empty where tokens have none."""
        return tuple((name, text) for name, text in self._record["concepts"])

    def overview(self) -> Overview:
        """What the store holds."""
        record = self._record
        pairings = tuple(from_plain(Pairing, one, "the store's record") for one in record["pairings"])
        norms = from_plain(Norms, record["norms"], "the store's record")
        return Overview(self.read, norms, self.saes, pairings, self.concepts, record["labelled"], record["pair_tokens"])

    def sae(self, name: str) -> SAEInfo:
        """Raises CosaeError for a name there is not."""
        known = self._known(name)
        plain = {key: value for key, value in self._record["saes"][known].items() if key != "folder"}
        return from_plain(SAEInfo, {**plain, "explained": len(self.explanations(name))}, "the store's record")

    def explanations(self, sae: str) -> Mapping[int, Explanation]:
        """Feature → its explanation, as `cosae explain` last wrote them."""
        path = self.folder / self._folder(sae) / files.EXPLANATIONS
        changed = path.stat().st_mtime if path.is_file() else 0.0
        with self._lock:
            known = self._explained.get(sae)
            if known is None or known[0] != changed:
                known = self._explained[sae] = changed, read_explanations(path)
        return known[1]

    def spell(self, token: int) -> str:
        """The text of a token id with its spaces, as it is: not escaped, may hold line breaks, NUL or marks. "" for −1,
        and for any id where the store knows no tokenizer."""
        return self._vocabulary.get(int(token), "")

    def picture(self, sequence: int) -> bytes | None:
        """PNG of the image that a sequence is; None where the store is of no images."""
        with self._lock:
            if self._pictures is None:
                self._pictures = {}
                if (self.folder / files.PICTURES).is_file():
                    reader = RowReader(self.folder / files.PICTURES)
                    found = reader.all()
                    reader.close()
                    self._pictures = dict(zip(found["sequence"].tolist(), found["png"].tolist(), strict=True))
            return self._pictures.get(sequence)

    def columns(self, sae: str) -> Columns:
        """(F,) float64 of every column of NUMBERS, by name; NaN where there is none. The arrays are the store's own."""
        table = self._table(sae)
        found = {name: table[name] for name in NUMBERS if name != "score"}
        found["score"] = np.full(len(table["id"]), np.nan)
        for id, one in self.explanations(sae).items():
            if id < len(found["score"]):
                found["score"][id] = score_of(one) if score_of(one) is not None else np.nan
        return found

    def table(
        self,
        sae: str,
        sort: str = "density",
        descending: bool = True,
        filters: Filters | None = None,
        search: str | None = None,
        search_in: str = "any",
        offset: int = 0,
        limit: int = 50,
    ) -> TablePage:
        """Rows sorted by a column of NUMBERS (features without that number last), filtered and searched.

        search   looked for in what `search_in` says: the spelling of a top token, case ignored; the explanation; the
                 name of its best concept; its id, exactly; or any of them
        limit    rows at most, up to 1000
        """
        check_choice("sort", sort, NUMBERS)
        check_choice("search_in", search_in, SEARCHES)
        check_least("offset", offset, 0)
        check_least("limit", limit, 1)
        columns = self.columns(sae)
        keep_F = filtered(columns, list(self.explanations(sae)), filters or {})
        if search is not None and search.strip():
            keep_F &= self._found(sae, search.strip().lower(), search_in)
        value_F = columns[sort]
        key_F = np.where(np.isnan(value_F), np.inf, -value_F if descending else value_F)
        id_f = np.flatnonzero(keep_F)
        order = id_f[np.argsort(key_F[id_f], kind="stable")]
        shown = order[offset : offset + min(limit, MOST_ROWS)]
        return TablePage(tuple(self._row(sae, int(id)) for id in shown), len(order), offset)

    def row(self, sae: str, id: int) -> Row:
        """One row of the table, without reading the feature's examples: for its name beside others."""
        self._check(sae, id)
        return self._row(sae, id)

    def features(self, sae: str, first: int, end: int) -> Iterator[Feature]:
        """Features first … end − 1 in order, each row group read once: for whoever writes all of them."""
        return (self.feature(sae, id) for id in range(first, end))

    def feature(self, sae: str, id: int) -> Feature:
        """Everything about one feature. Raises CosaeError for one that is not there."""
        self._check(sae, id)
        one = self._numbers_of(sae, id)
        plain = self._record["saes"][self._known(sae)]
        auroc_C = one.get("aurocs", np.zeros(0))
        names = [name for name, _ in self.concepts]
        best = [int(c) for c in np.argsort(-auroc_C, kind="stable") if not math.isnan(auroc_C[c])]
        edges, counts = histogram(one)
        fires = one["firings"] > 0
        return Feature(
            row=self._row(sae, id),
            sae=sae,
            quantiles=tuple(one["quantiles"].tolist()) if fires else None,
            edges=edges,
            counts=counts,
            negative=float(one["negatives"] / one["firings"]) if plain["signed"] and fires else None,
            promoted=ids_with_values(one, "promoted"),
            suppressed=ids_with_values(one, "suppressed"),
            quartile_share=tuple((one["quartiles"] / one["firings"]).tolist()) if fires else None,
            vanished=int(one["vanished"]),
            appeared=int(one["appeared"]),
            aurocs=tuple((names[c], float(auroc_C[c])) for c in best),
            exponent=float(one["exponent"]),
            value_exponent=known(one["value_exponent"]) if "value_exponent" in one else None,
            log_gain=float(one["log_gain"]),
            bias=known(one["bias"]),
            threshold=known(one["threshold"]),
            decoder_norm=float(one["decoder_norm"]),
            encoder_norm=float(one["encoder_norm"]),
            examples=self._examples(sae, id),
            by_cosine=neighbours(one, "by_cosine"),
            by_cofiring=neighbours(one, "by_cofiring"),
            matches=tuple(self._matches(sae, one)),
            explanation=self.explanations(sae).get(id),
        )

    def texts(self) -> Texts:
        """The tokens of the sample: the first ones of the pass."""
        with self._lock:
            if self._texts is None:
                reader = RowReader(self.folder / files.TEXTS)
                found = reader.all()
                reader.close()
                self._texts = Texts(found["id"], found["sequence"], found["pair"])
            return self._texts

    def codes(self, sae: str, id: int) -> tuple[Array, Array]:
        """(n,) tokens of the sample on which a feature fires, ascending, and its values there."""
        self._check(sae, id)
        with self._lock:
            one = self._numbers_of(sae, id)
            first, end = int(one["code_first"]), int(one["code_first"] + one["code_count"])
            if first == end:
                return np.zeros(0, np.int64), np.zeros(0, np.float32)
            reader = self._reader(sae, files.CODES)
            groups = range(first // files.CODE_ROWS, (end - 1) // files.CODE_ROWS + 1)
            parts = [reader.group(number) for number in groups]
        within = slice(first - groups.start * files.CODE_ROWS, end - groups.start * files.CODE_ROWS)
        token, value = (np.concatenate([part[name] for part in parts])[within] for name in ("token", "value"))
        return token.astype(np.int64), value

    def folder_of(self, sae: str) -> str:
        """The folder of an SAE's files, in the store's."""
        return self._folder(sae)

    def compare(self, sae_a: str, id_a: int, sae_b: str, id_b: int) -> Comparison:
        """Two features, of one SAE or of two."""
        return compare_features(self.feature(sae_a, id_a), self.feature(sae_b, id_b))

    def compare_saes(self, sae_a: str, sae_b: str) -> SAEComparison:
        """Two SAEs of the store. Raises CosaeError for one and the same."""
        if sae_a == sae_b:
            raise CosaeError(f"two SAEs are compared. Got {sae_a} twice: choose another one.")
        other = self._others(sae_a).index(sae_b) if sae_b in self._others(sae_a) else self._known(sae_b)
        reads = ["match_id", "match_correlation", "match_cosine"]
        with self._lock:
            found = self._reader(sae_a, files.FEATURES).all(reads)
            both = [self._reader(sae, files.FEATURES) for sae in (sae_a, sae_b)]
            aurocs = [one.all(["aurocs"])["aurocs"] if self.concepts else None for one in both]
        match = {name: value[:, other] for name, value in found.items()}
        tables = self._table(sae_a), self._table(sae_b)
        return compare_saes((self.sae(sae_a), self.sae(sae_b)), tables, match, aurocs, self.concepts)

    def verify(self) -> None:
        """Read every file whole. Raises CosaeError for one that is not to the bit what was written."""
        for name, (_, sha256) in self._record["files"].items():
            if file_digest(self.folder / name) != sha256:
                raise CosaeError(f"{self.folder / name} is damaged: build the store again.")

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    # reading

    def _known(self, sae: str) -> int:
        if sae not in self._place:
            raise CosaeError(f"the store has no SAE {sae!r}: choose from {', '.join(self._place)}.")
        return self._place[sae]

    def _check(self, sae: str, id: int) -> None:
        n = len(self._table(sae)["id"])
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < n:
            raise CosaeError(f"Feature {id!r} is out of range: {sae} has {counted(n, 'feature')}, 0 to {n - 1}.")

    def _folder(self, sae: str) -> str:
        self._known(sae)
        return str(self._folders[sae])

    def _others(self, sae: str) -> list[str]:
        return [name for name in self._folders if name != sae]

    def _reader(self, sae: str, name: str) -> RowReader:
        """The files that were asked for last stay open: a footer takes 3 MB, and opening some milliseconds."""
        key = f"{self._folder(sae)}/{name}"
        reader = self._readers.pop(key, None) or RowReader(self.folder / key)
        self._readers[key] = reader
        while len(self._readers) > MOST_OPEN:
            self._readers.pop(next(iter(self._readers))).close()
        return reader

    def _table(self, sae: str) -> dict[str, Array]:
        """The numbers of all features: what stays in memory of an SAE."""
        with self._lock:
            if sae not in self._tables:
                wanted = [*SCALARS, "top_tokens", *(["match_id"] if len(self._folders) > 1 else [])]
                labels = ["best_auroc", "best_concept"] if self.concepts else []
                found = self._reader(sae, files.FEATURES).all([*wanted, *labels])
                table = {name: found[name].astype(np.float64) for name in SCALARS}
                n = len(table["firings"])
                table["id"] = np.arange(n, dtype=np.float64)
                table["density"] = table["firings"] / max(self._record["saes"][self._place[sae]]["tokens"], 1)
                table["matched"] = (found.get("match_id", np.zeros((n, 0))) >= 0).sum(1).astype(np.float64)
                table["auroc"] = found.get("best_auroc", np.full(n, np.nan)).astype(np.float64)
                table["concept"] = found.get("best_concept", np.full(n, -1))
                table["top_tokens"] = found["top_tokens"]
                self._tables[sae] = table
            return self._tables[sae]

    @property
    def _vocabulary(self) -> dict[int, str]:
        with self._lock:
            if self._spelled is None:
                reader = RowReader(self.folder / files.VOCABULARY)
                found = reader.all()
                reader.close()
                self._spelled = dict(zip(found["id"].tolist(), found["text"].tolist(), strict=True))
            return self._spelled

    def _row(self, sae: str, id: int) -> Row:
        table, told = self._table(sae), self.explanations(sae).get(id)
        concept = int(table["concept"][id])
        return Row(
            id=id,
            density=float(table["density"][id]),
            firings=int(table["firings"][id]),
            largest=known(table["largest"][id]),
            mean=known(table["mean"][id]),
            norm_driven=known(table["norm_driven"][id]),
            firing_norm=known(table["firing_norm"][id]),
            auroc=known(table["auroc"][id]),
            concept=self.concepts[concept][0] if concept >= 0 else None,
            matched=int(table["matched"][id]),
            tokens=tuple(token for token in table["top_tokens"][id].tolist() if token >= 0),
            label=None if told is None else told.text,
            score=None if told is None else score_of(told),
        )

    def _found(self, sae: str, text: str, where: str) -> NDArray[np.bool_]:
        with self._lock:
            if self._lower is None:
                spelled = self._vocabulary
                self._lower = np.fromiter(spelled, np.int64, len(spelled)), [one.lower() for one in spelled.values()]
        names = [name for name, _ in self.concepts]
        return searched(self._table(sae), self._lower, self.explanations(sae), names, text, where)

    def _numbers_of(self, sae: str, id: int) -> dict[str, Any]:
        with self._lock:
            many = self._reader(sae, files.FEATURES).group(id // files.TABLE_ROWS)
        return {name: value[id % files.TABLE_ROWS] for name, value in many.items()}

    def _examples(self, sae: str, id: int) -> tuple[Example, ...]:
        name = files.example_file(id)
        with self._lock:
            if f"{self._folder(sae)}/{name}" not in self._record["files"]:
                return ()
            rows = self._reader(sae, name).group(id % files.FILE_FEATURES // files.GROUP_FEATURES)
        return tuple(example(rows, int(row)) for row in np.flatnonzero(rows["feature"] == id))

    def _matches(self, sae: str, one: Mapping[str, Any]) -> list[Match]:
        found = []
        for place, other in enumerate(self._others(sae)):
            id = int(one["match_id"][place])
            if id < 0:
                found.append(Match(other, None, None, None, False))
                continue
            correlation, cosine = float(one["match_correlation"][place]), float(one["match_cosine"][place])
            found.append(Match(other, id, correlation, cosine, correlation >= 0.7 and cosine > 0.7))
        return found


def open_store(folder: Path | str) -> FeatureStore:
    """Raises CosaeError for a folder without a complete store, and for one that is damaged as far as sizes tell."""
    folder = Path(folder)
    if not (folder / files.RECORD).is_file():
        raise CosaeError(f"{folder} holds no feature store: build one with cosae browse.")
    record = read_record(folder / files.RECORD)
    if (record.get("format"), record.get("version")) != (files.FORMAT, files.VERSION):
        raise CosaeError(f"{folder} is a store of another version of cosae: build it again.")
    for name, (size, _) in record["files"].items():
        place = folder / name
        if not place.is_file() or place.stat().st_size != size:
            raise CosaeError(f"{place} is damaged or gone: build the store again.")
    return FeatureStore(folder, record)
