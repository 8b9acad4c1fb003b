"""The examples and the Python blocks of the pages run as they are."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [path for path in DOCS if "```python\n" in path.read_text(encoding="utf-8")]
LONG_PAGES = ("cli.md",)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SMALL = {
    "fit_tensor": (["--steps", "20"], r"cosine +\d\.\d{3}.*\n.*FVE of cosine − standard: [+-]\d\.\d{3} \["),
    "own_activations": (["--steps", "20"], r"cosine-selector=topk +FVE -?\d\.\d{3}  L0  6\.00"),
    "known_truth": (["--steps", "20"], r"norm log_normal\n[\s\S]*cosine_per_feature +\d\.\d{3}"),
    "hugging_face_model": (["--steps", "10"], r"mlp_out\.4: \(20000, 192\)[\s\S]*' sorted'"),
}
INTERRUPTED = "continue_from_checkpoint"


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES} == {*SMALL, INTERRUPTED}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_stays_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40


@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs_and_prints_what_it_promises(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, promised = SMALL[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(promised, printed), printed


def test_a_run_that_was_stopped_and_continued_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """In a process of its own: the example presses Ctrl-C."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / f"{INTERRUPTED}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"stopped after step \d+", done.stdout), done.stdout
    ends = dict(line.split(" batches ") for line in done.stdout.splitlines() if " batches " in line)
    assert ends["continued    "] == ends["uninterrupted"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    """They would name one machine, and every run would change the file."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (path,) = NOTEBOOKS
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    tables = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    progress = "".join(output.get("text", "") for output in outputs if output.get("name") == "stderr")
    assert re.search(r"'import' +feature +\d+  \d", printed)
    assert re.search(r"fires on \d+\.\d% of tokens; promotes .+\n    .*«.+»", printed)
    plain, steered = re.findall(r"next token, \w+: (.+)", printed)
    assert plain != steered
    assert all(f"<caption>{name}</caption>" in tables for name in ("SAE", "Codes", "Spliced"))
    assert "200/200" in progress


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.long) if page.name in LONG_PAGES else page for page in PAGES],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_the_python_blocks_of_a_page_run_in_order(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One namespace a page; a failure names the page's own line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        above = text[: block.start(1)].count("\n")
        exec(compile("\n" * above + block[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_rows_of_a_table_have_one_number_of_cells(page: Path) -> None:
    """An unescaped | (a norm, say) would split its cell and shift the row."""
    tables = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8") + "\n", re.MULTILINE)
    for rows in map(str.splitlines, tables):
        assert [row for row in rows if cells(row) != cells(rows[0])] == []


def cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row))
