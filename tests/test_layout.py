"""Where files stand and what they import: no circle, no crowded folder, no name that says its package again."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "cosae"
FOLDERS = sorted({path.parent for path in PACKAGE.rglob("*.py")})
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(text: str, names: set[str]) -> set[str]:
    """Those of the modules that a file imports: anywhere in it, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= full if full <= names else full | {str(node.module)}
    return found & names


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    names = sorted(edges)
    matrix = np.array([[other in edges[name] for other in names] for name in names])
    count, group = connected_components(matrix, connection="strong")
    groups = [[name for name, at in zip(names, group, strict=True) if at == g] for g in range(count)]
    return [members for members in groups if len(members) > 1]


def test_a_circle_is_found_where_there_is_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    text = "import p.one\nif TYPE_CHECKING:\n    from p import two\ndef f():\n    from p.three import name\nimport os\n"
    assert imported(text, {"p.one", "p.two", "p.three", "p.four"}) == {"p.one", "p.two", "p.three"}


def test_no_file_imports_itself_through_others() -> None:
    edges = {name: imported(path.read_text("utf-8"), set(MODULES)) - {name} for name, path in MODULES.items()}
    assert sum(map(len, edges.values())) > 300
    assert circles(edges) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE.parent)))
def test_a_folder_is_small_and_its_names_are_short(folder: Path) -> None:
    names = [path.stem for path in folder.glob("*.py")]
    assert len(names) <= 16
    prefixes = Counter(name.partition("_")[0] for name in names if "_" in name and not name.startswith("_"))
    assert [prefix for prefix, files in prefixes.items() if files >= 3] == [], "three files of one prefix are a package"
    packages = set(folder.relative_to(PACKAGE.parent).parts)
    assert [name for name in names if packages & set(name.split("_"))] == [], "the package says this already"


def test_tests_mirror_the_source() -> None:
    """A folder of tests has the name of the package that it tests; four hold what is no package's."""
    own = {"contract", "support", "fixtures/v0_1", "interop/peers"}
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("*.py")} - {"."}
    assert {name for name in folders if name not in own and not (PACKAGE / name).is_dir()} == set()


def test_no_test_edits_the_search_path() -> None:
    marks = ("sys" + ".path", "syspath" + "_prepend")
    texts = {path: path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py")}
    assert [path for path, text in texts.items() if any(mark in text for mark in marks)] == []


def test_every_file_beside_the_code_is_part_of_the_package() -> None:
    """setuptools packs .py files and what pyproject.toml lists; .ci/package looks into the wheel itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["cosae"]
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".py"}
    others = {path for path in others if path.parent.name != "__pycache__"}
    assert {PACKAGE / "py.typed", PACKAGE / "embedded" / "model.safetensors"} <= others == packed
