"""A stand-in for what `cosae fetch` brings: a tiny GGUF model, texts in three languages, two sets of sae-probes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow

from cosae.interop.sae_probes.datasets import MASTER
from cosae.io.fetched.packages import MODELS, folder_of
from tests.support.tiny_gguf import write_gguf

LETTERS = {"en": "thanker", "fr": "bcdfgle", "es": "mopquis"}
TOPICS = ("Arts", "History", "Technology")
SETS = ("158_code_C", "105_click_bait")


def write_fetched() -> None:
    """Into the cache directory that XDG_CACHE_HOME names."""
    model = folder_of("smollm2")
    model.mkdir(parents=True)
    write_gguf(model / MODELS["smollm2"])
    wiki, drawn = folder_of("wiki"), np.random.default_rng(0)
    wiki.mkdir()

    def text(letters: str) -> str:
        return "".join(drawn.choice(list(letters), size=drawn.integers(20, 60)))

    rows = {name: [{"text": text(letters)} for _ in range(120)] for name, letters in LETTERS.items()}
    rows["language"] = [{"text": row["text"], "label": name} for name in LETTERS for row in rows[name]]
    rows["topic"] = [{"text": row["text"], "label": TOPICS[i % 3]} for i, row in enumerate(rows["en"])]
    for name, listed in rows.items():
        (wiki / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    probes = folder_of("sae-probes")
    write_csv(
        probes / MASTER,
        [{"Dataset save name": f"cleaned_data/{s}.csv", "Data type": "Binary Classification"} for s in SETS],
    )
    for name in SETS:
        both = [{"prompt": text(LETTERS["es" if i % 2 else "en"]), "target": str(i % 2)} for i in range(80)]
        write_csv(probes / "cleaned_data" / f"{name}.csv.zst", both)


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(text.getvalue().encode())
