"""What a step's cache tells of a tensor holds as long as its numbers do, and parts of a step talk in no other way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import cosae
from cosae.kernels import StepCache, Workspace
from cosae.kernels.cache import Seen


def test_facts_are_found_until_the_rows_are_written_to() -> None:
    cache, x = StepCache(), torch.nn.Parameter(torch.randn(4, 3))
    assert cache.rows(x) is None
    cache.leave_rows(x.detach(), "facts")
    assert cache.rows(x) == cache.rows(x.detach()) == "facts"
    for other in (x.detach()[:2], x.detach().T, x.detach().clone()):
        assert cache.rows(other) is None
        assert cache.rows(other, stale=True) is None
    with torch.no_grad():
        x.add_(1.0)
    assert cache.rows(x) is None
    assert cache.rows(x, stale=True) == "facts"
    cache.leave_rows(x, "new facts")
    assert cache.rows(x) == "new facts"


def test_other_memory_tells_nothing() -> None:
    """Neither a parameter that was given other data, nor a tensor that comes to lie where another one was."""
    cache, x = StepCache(), torch.nn.Parameter(torch.ones(4, 3))
    cache.leave_rows(x, "facts")
    x.data = torch.zeros(4, 3)
    assert cache.rows(x, stale=True) is None
    for _ in range(200):
        y = torch.empty(64, 64)
        assert cache.rows(y, stale=True) is None
        cache.leave_rows(y, "of a tensor that is gone")
        del y


def test_inference_tensors_tell_nothing() -> None:
    cache = StepCache()
    with torch.inference_mode():
        x = torch.ones(3, 2)
        cache.leave_rows(x, "facts")
        assert cache.rows(x) is None
        assert not Seen(torch.ones(3, 2)).holds(x)


@pytest.mark.parametrize("touched", ["nothing", "gradient", "rows"])
def test_a_measured_gradient_is_forgotten_when_it_or_its_rows_change(touched: str) -> None:
    cache, grad, rows = StepCache(), torch.ones(4, 3), torch.ones(4, 3)
    cache.leave_measured(grad, rows, torch.zeros(4), torch.ones(4, dtype=torch.float64))
    cache.leave_measured(rows, grad, None, torch.zeros(4, dtype=torch.float64))
    {"gradient": grad, "rows": rows, "nothing": torch.ones(1)}[touched].mul_(2.0)
    found = cache.measured_of(grad, rows, unit=True)
    assert (found is not None) == (touched == "nothing")
    assert found is None or float(found.square) == 4.0
    assert cache.measured_of(grad, rows, unit=False) is None
    cache.end_step([])
    assert cache.measured_of(grad, rows, unit=True) is None


def test_spares_are_written_over_only_where_they_fit() -> None:
    workspace, a, b = Workspace(), torch.ones(3, 4), torch.ones(5, 4)
    workspace.keep([a, b[1:], torch.ones(3), torch.ones(4, 3).T])
    place = a.data_ptr()
    assert workspace.spare_like(torch.zeros(3, 4, dtype=torch.float64)).dtype == torch.float64
    assert workspace.spare_like(torch.zeros(4, 4)).data_ptr() != b[1:].data_ptr()
    assert workspace.spare_like(torch.zeros(3, 4)).data_ptr() == place
    assert workspace.spare_like(torch.zeros(3, 4)).data_ptr() != place


def test_work_buffers_are_the_same_memory_until_they_must_grow() -> None:
    workspace = Workspace()
    place = workspace.product(100, torch.float32).data_ptr()
    assert workspace.product(60, torch.float32).data_ptr() == place
    assert workspace.product(60, torch.bfloat16).data_ptr() != place
    assert len(workspace.product(101, torch.float32)) == 101
    workspace.clear()
    assert not workspace.products


ROOMS = ("kernels", "sae", "train")


@pytest.mark.parametrize("room", ROOMS)
def test_no_part_talks_to_another_behind_the_steps_back(room: str) -> None:
    """No thread-local, no memo on entries, no module-level dict, list or set that a function writes to."""
    for file in (Path(cosae.__file__).parent / room).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "threading.local" not in text, file
        assert not re.search(r"\.memo\b", text), file
        tree = ast.parse(text)
        names = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name) and isinstance(node.value, ast.Dict | ast.List | ast.Set | ast.Call)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                pytest.fail(f"{file}: global {node.names}")
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                assert not (isinstance(node.value, ast.Name) and node.value.id in names), (file, ast.unparse(node))
            if isinstance(node, ast.Attribute) and node.attr in ("append", "add", "update", "setdefault", "extend"):
                assert not (isinstance(node.value, ast.Name) and node.value.id in names), (file, ast.unparse(node))
