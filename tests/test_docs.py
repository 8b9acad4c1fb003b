"""What README.md and docs/ name exists: modules, functions, files, commands, options, fields of a recipe."""

from __future__ import annotations

import importlib
import re
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

import cosae
from cosae.cli import VERBS, main
from cosae.errors import CosaeError
from cosae.models.intervene.splice import Spliced
from cosae.recipe import Recipe
from cosae.sae.loss import LossConfig
from cosae.sae.model import SAE
from cosae.train.arm import parse_arm
from cosae.types import Codes

ROOT = Path(__file__).parents[1]
HISTORY = {"LOG.md", "CLAIMS.md", "INTEROP.md", "from-0.1.md"}
"""Pages that programs write, or that are about names of earlier versions."""
PAGES = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name not in HISTORY)]
SPAN = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```[^\n]*\n.*?^```", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"(?:data|filter|perturbation|training|evaluation)\.[a-z_0-9.]*[a-z_0-9]")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")

of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def found(pattern: str, text: str) -> list[str]:
    return list(dict.fromkeys(re.findall(pattern, text, re.MULTILINE)))


def spans(page: Path) -> list[str]:
    """What a page sets in `code` within its sentences and tables."""
    return [span.replace("\\|", "|") for span in SPAN.findall(FENCE.sub("", page.read_text("utf-8")))]


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or an attribute of one; where a package is missing, its file is enough."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        path = ROOT / "src" / Path(*parts[:n])
        if not (path.is_dir() or path.with_suffix(".py").is_file()):
            continue
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except (ImportError, CosaeError):
            return True
        for part in parts[n:]:
            if not hasattr(value, part) and part not in getattr(value, "__dataclass_fields__", {}):
                return False
            value = getattr(value, part, None)
        return True
    return False


@of_every_page
def test_dotted_names_can_be_imported(page: Path) -> None:
    names = found(r"(?<![\w./-])cosae(?:\.\w+)+(?<!\.json)(?<!\.html)", page.read_text("utf-8"))
    assert [name for name in names if not resolves(name)] == []


@of_every_page
def test_imports_of_a_page_exist(page: Path) -> None:
    lines = found(r"^ *from (cosae[\w.]*) import ([\w, ]+)$", page.read_text("utf-8"))
    names = [f"{module}.{name.split()[0]}" for module, listed in lines for name in listed.split(",")]
    assert [name for name in names if not resolves(name)] == []


@of_every_page
def test_files_and_programs_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    files = found(r"(?<![\w./])(?:src|tests|benchmarks|studies|examples)/[\w./-]*\w", text)
    programs = found(r"python -m ((?:benchmarks|studies|tests)[\w.]*)", text)
    places = [ROOT / name.replace(".", "/") for name in programs]
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert [place for place in places if not (place.is_dir() or place.with_suffix(".py").is_file())] == []


@of_every_page
def test_fields_of_a_recipe_exist(page: Path) -> None:
    """Dotted fields, named alone or in `--set FIELD=VALUE`."""
    named = [span.partition("=")[0].partition(":")[0] for span in spans(page)]
    named += found(rf"--set ({FIELD.pattern})=", page.read_text("utf-8"))
    unknown = []
    for path in (name for name in named if FIELD.fullmatch(name) and not name.endswith(".json")):
        node: object = Recipe()
        for part in path.split("."):
            if not hasattr(node, part):
                unknown.append(path)
            node = getattr(node, part, None)
    assert unknown == []


@cache
def options(verb: str) -> frozenset[str]:
    """Options that `cosae VERB --help` lists."""
    shown = StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit):
        main([*verb.split(), "--help"])
    return frozenset(re.findall(r"--[a-z][\w-]*", shown.getvalue()))


@of_every_page
def test_commands_have_the_options_that_a_page_names(page: Path) -> None:
    text = page.read_text("utf-8")
    verbs = sorted([*VERBS, "plan capture", "export neuronpedia", "export delphi"], key=len, reverse=True)
    unknown = []
    for words in found(r"(?:^|[`./ ])cosae ((?:[a-z]+ )?[a-z]+ [^`|#\n]*)", text):
        verb = next((verb for verb in verbs if f"{words} ".startswith(f"{verb} ")), None)
        if verb is None:
            unknown += [words] if words.split()[0] not in {"COMMAND", *VERBS} and "--" in words else []
            continue
        unknown += [f"{verb} {option}" for option in found(r"--[a-z][\w-]*", words) if option not in options(verb)]
    known = frozenset().union(*map(options, verbs))
    alone = [option for span in spans(page) if span.startswith("--") for option in found(r"--[a-z][\w-]*", span)]
    assert unknown == []
    assert set(alone) - known - {"--quick", "--peers"} == set()


@of_every_page
def test_links_lead_to_pages_and_their_headings(page: Path) -> None:
    broken = []
    for name, heading in LINK.findall(page.read_text("utf-8")):
        target = page.parent / name if name else page
        if not target.exists():
            broken.append(name)
        elif heading:
            titles = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text("utf-8")), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles]
            broken += [f"{name}#{heading}"] if heading not in slugs else []
    assert broken == []


def test_the_index_names_every_page_and_the_front_door() -> None:
    folder = ROOT / "docs"
    index = (folder / "README.md").read_text("utf-8")
    others = {path.name for path in folder.glob("*.md")} - {"README.md"}
    assert others - set(re.findall(r"\]\(([\w.-]+\.md)", index)) == set()
    assert [name for name in cosae.__all__ if f"`cosae.{name}`" not in index] == []
    inside = (folder / "interop" / "README.md").read_text("utf-8")
    assert [path.name for path in (folder / "interop").glob("*.md") if path.name not in inside + "README.md"] == []


@of_every_page
def test_arms_of_a_command_can_be_parsed(page: Path) -> None:
    for listed in found(r"--arms ((?:[a-z_]+[\w=+,.]*(?: |(?=[`\n])))+)", page.read_text("utf-8")):
        for text in listed.split():
            parse_arm(text.replace("start=FOLDER", "seed=1"))


def test_what_our_objects_are_said_to_have_is_there() -> None:
    """In the last column of coming-from.md: `sae.W_enc`, `codes.value_E`, `run.codes`, fields of an arm's loss."""
    sae = SAE.build(4, 8, score="inner", selector="topk", k=2, seed=0)
    owners = {"sae": sae, "codes": Codes, "run": Spliced, "loss": LossConfig}
    rows = re.findall(r"^\|.+\|(.+)\|$", (ROOT / "docs" / "coming-from.md").read_text("utf-8"), re.MULTILINE)
    named = re.findall(rf"(?<![\w.])({'|'.join(owners)})\.(\w+)", " ".join(rows))
    assert len(named) > 10
    assert [f"{owner}.{name}" for owner, name in named if not has(owners[owner], name)] == []


def has(owner: object, name: str) -> bool:
    return hasattr(owner, name) or name in getattr(owner, "__dataclass_fields__", {})


def test_the_new_names_of_modules_exist() -> None:
    """In the last column of from-0.1.md; `.name` is a sibling of the module before it."""
    rows = re.findall(r"^\|(.+)\|(.+)\|$", (ROOT / "docs" / "from-0.1.md").read_text("utf-8"), re.MULTILINE)
    new = []
    for old, now in rows:
        for name in re.findall(r"`(cosae[.\w]+|\.\w+)`", now if "cosae" in old else ""):
            new.append(f"{new[-1].rpartition('.')[0]}{name}" if name.startswith(".") else name)
    assert len(new) > 60
    assert [name for name in new if not resolves(name.removesuffix(".NAME"))] == []


def test_old_names_of_formats_and_modules_say_what_replaced_them() -> None:
    from cosae.interop.read import read_sae

    with pytest.raises(CosaeError, match="does not exist"):
        read_sae("nowhere", format="authors")
    with pytest.raises(ModuleNotFoundError, match=r"cosae\.interop"):
        importlib.import_module("cosae.share")
