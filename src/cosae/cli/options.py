"""Options that several commands share, and what they do with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosae.cli.help import FIELDS
from cosae.errors import CosaeError
from cosae.io.escape import printable
from cosae.io.values import literal

if TYPE_CHECKING:
    from cosae.io.progress import Progress
    from cosae.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """A recipe to start from, and what is most often changed in it; the fields themselves are those of cosae.recipe."""

    preset: str = "embedded"
    """Preset to start from: embedded, demo, demo-injected, demo-real or paper."""
    recipe: Path | None = None
    """Recipe file (.json, .yaml) to start from, instead of a preset."""
    model: str | None = None
    """Model: embedded, a folder with a Hugging Face model, a GGUF file, smollm2 or minilm (see `cosae fetch`), or
    a repository of the hub."""
    corpus: tuple[str, ...] = ()
    """Text: pylib, a folder, a .txt, .jsonl or .parquet file, wiki:en, wiki:fr or wiki:es (see `cosae fetch`), or
    hf:DATASET[:CONFIG][:SPLIT]. Several are mixed by weight: code/:0.7 notes.jsonl:0.3."""
    inputs: str | None = None
    """What the corpus holds: text, chat, ids (token ids), images or audio."""
    positions: str | None = None
    """Which places of a sequence become rows: all, cls, tokens, patches, frames, last, mean, or a slice such as 1:."""
    dtype: str | None = None
    """Precision in which the model runs: float32, bfloat16 or float16. SAEs are always float32."""
    context: int | None = None
    """Tokens per sequence."""
    seed: int | None = None
    """Seed of the data order, and of arms that have none of their own."""
    device: str | None = None
    """Device: cpu, cuda or cuda:N."""
    set: tuple[str, ...] = ()
    """Any other field of the recipe, by dotted path: training.log_every=50 data.packing=document."""
    quiet: bool = False
    """Do not print progress."""
    dry_run: bool = False
    """Print the memory, disk and time that this needs, as `cosae plan` does, and stop."""

    def changed_recipe(self, more: Mapping[str, Any]) -> Recipe:
        """The recipe with the options given, `more` by dotted path, and --set on it. Raises CosaeError."""
        from cosae.io.legacy import upgrade_path
        from cosae.presets import preset
        from cosae.recipe import ORIGINS, Recipe

        if self.recipe is not None and self.preset != RecipeOptions.preset:
            raise CosaeError("a run starts from a preset or from a recipe file, not from both: drop one of them.")
        recipe = Recipe.read(self.recipe) if self.recipe is not None else preset(self.preset)
        given = {path: getattr(self, name) for name, path in FIELDS.items() if hasattr(self, name)}
        given["data.corpus"] = self.corpus[0] if len(self.corpus) == 1 else self.corpus or None
        named = {path: value for path, value in {**given, **more}.items() if value is not None} | settings(self.set)
        if origin := next((name for name in ORIGINS if f"data.{name}" in named), None):
            recipe = replace(recipe, data=recipe.data.from_origin(origin))
        if (origin or recipe.data.origin) == "store" and "data.site" in named:
            named["data.store_site"] = named.pop("data.site")  # which of the stores in a folder
        recipe = recipe.changed(named)
        recipe.check_applies(map(upgrade_path, named))
        return recipe


def settings(texts: Sequence[str]) -> dict[str, Any]:
    """Dotted path → value of PATH=VALUE texts. Raises CosaeError for a text without the sign."""
    changes = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals:
            raise CosaeError(f"--set takes field=value, with a dotted path for the field. Got {text!r} instead.")
        changes[path] = literal(value)
    return changes


def progress(quiet: bool) -> Progress:
    """What shows the phases of a command on standard error, or keeps quiet."""
    from cosae.io.progress import Progress

    return Progress(not quiet)


def logger(quiet: bool) -> Callable[[str], None]:
    """What prints progress on standard error, or keeps quiet."""
    return (lambda _: None) if quiet else (lambda text: print(printable(text, keep="\n"), file=sys.stderr, flush=True))
