"""A feature store on disk, read a few features at a time.

    store = open_store(folder)
    store.table("cosine", sort="norm_driven", limit=50).rows
    store.feature("cosine", 7).group("top")

Methods may be called from several threads. Arguments that come from a browser are checked here: an SAE, a feature, a
column or a filter that does not exist raises CosaeError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from cosae.browse.store.records import (
    Columns,
    Comparison,
    Feature,
    Overview,
    Row,
    SAEComparison,
    SAEInfo,
    TablePage,
)

Range = tuple[float | None, float | None]
Filters = Mapping[str, Range | bool]
"""By column of NUMBERS the least and largest value (None: no bound), both ends in; features whose number is missing are
left out. And by word: dead, matched, explained: True or False."""
SEARCHES = ("any", "token", "label", "concept", "id")


class FeatureStore:
    """A store, opened. saes: its SAEs in order."""

    folder: Path
    saes: tuple[SAEInfo, ...]

    def overview(self) -> Overview:
        """What the store holds."""
        raise NotImplementedError

    def sae(self, name: str) -> SAEInfo:
        """Raises CosaeError for a name there is not."""
        raise NotImplementedError

    def spell(self, token: int) -> str:
        """The text of a token id with its spaces, as it is: not escaped, may hold line breaks, NUL or marks. "" for −1,
        and for any id where the store knows no tokenizer."""
        raise NotImplementedError

    def columns(self, sae: str) -> Columns:
        """(F,) float64 of every column of NUMBERS, by name."""
        raise NotImplementedError

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
                 name of its best concept; its id; or any of them
        """
        raise NotImplementedError

    def row(self, sae: str, id: int) -> Row:
        """One row of the table, without reading the feature's examples: for its name beside others."""
        raise NotImplementedError

    def features(self, sae: str, first: int, end: int) -> Iterator[Feature]:
        """Features first … end − 1 in order, each row group read once: for whoever writes all of them."""
        raise NotImplementedError

    def feature(self, sae: str, id: int) -> Feature:
        """Everything about one feature. Raises CosaeError for one that is not there."""
        raise NotImplementedError

    def compare(self, sae_a: str, id_a: int, sae_b: str, id_b: int) -> Comparison:
        """Two features, of one SAE or of two."""
        raise NotImplementedError

    def compare_saes(self, sae_a: str, sae_b: str) -> SAEComparison:
        """Two SAEs of the store."""
        raise NotImplementedError

    def close(self) -> None:
        """Close all files."""
        raise NotImplementedError


def open_store(folder: Path | str) -> FeatureStore:
    """Raises CosaeError for a folder without a complete store, and for one that is damaged."""
    raise NotImplementedError
