"""The same pages as plain files: they open from disk and from any web host, without what needs a model or a server.

    index.html features.html …   data/about.js data/table/0.js data/feature/0/17.js data/compare/0-1.js

Pages may not read files from disk, so each piece of data is a script that hands over one value; a page loads those it
shows. Features lie SHARD to a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cosae.browse.server import views
from cosae.browse.server.shell import ASSETS, FROM_DISK, PAGES, asset, render
from cosae.browse.store.reader import FeatureStore
from cosae.io.staged import filled

SHARD = 64
"""Features a file; data.js has the same number."""
ROWS = 1000
"""Rows of a table that are read at once."""
MARK = "data/about.js"


def write_static(store: FeatureStore, out: Path | str, log: Callable[[str], None] = lambda _: None) -> Path:
    """Write the pages of a store to `out`, whole or not at all; an earlier static form there is replaced.

    Raises CosaeError for a folder that holds something else, and where the disk refuses.
    """
    out = Path(out)
    with filled(out, MARK) as folder:
        for page in PAGES:
            html = render(page, ", ".join(info.name for info in store.saes), live=False, policy=FROM_DISK)
            (folder / f"{page}.html").write_text(html, encoding="utf-8")
        (folder / "assets").mkdir()
        for name in ASSETS:
            (folder / "assets" / name).write_bytes(asset(name))
        _put(folder, "about", views.about(store))
        for at, info in enumerate(store.saes):
            _put(folder, f"table/{at}", _table(store, info.name, info.d_sae))
            for first in range(0, info.d_sae, SHARD):
                end = min(first + SHARD, info.d_sae)
                found = store.features(info.name, first, end)
                _put(folder, f"feature/{at}/{first // SHARD}", {one.row.id: views.feature(store, one) for one in found})
                log(f"{info.name}: wrote {end:,} of {info.d_sae:,} features")
            for other, with_ in enumerate(store.saes):
                if other != at:
                    compared = store.compare_saes(info.name, with_.name)
                    _put(folder, f"compare/{at}-{other}", views.sae_comparison(store, compared))
    return out


def _table(store: FeatureStore, sae: str, n: int) -> dict[str, Any]:
    """Every row, by column."""
    pages = (store.table(sae, sort="id", descending=False, offset=at, limit=ROWS).rows for at in range(0, n, ROWS))
    rows = [views.row(store, row) for page in pages for row in page]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _put(folder: Path, key: str, value: Any) -> None:
    path = folder / "data" / f"{key}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    path.write_text(f"cosae.put({json.dumps(key)},{text});\n", encoding="utf-8")
