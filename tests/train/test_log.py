"""Loggers: lines that are JSON whatever the numbers, kept to the step resumed from; scalars; what a person sees."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from cosae.errors import CosaeError
from cosae.io.lines import finite
from cosae.io.progress import Progress
from cosae.train.log import JsonLines, TensorBoard, TrainingDisplay, WandB, describe, scalars
from cosae.train.loop import TrainingConfig
from tests.support.clock import FakeClock


def record(step: int, **numbers: Any) -> dict[str, Any]:
    arm = {"loss": 0.5, "fve": 0.25, "l0": 4.0, "dead_frac": 0.125, "a": None, "a_quantiles": None, **numbers}
    return {"step": step, "tokens": step * 8, "seconds": step / 10, "arms": {"standard": arm}}


def bare(*records: dict[str, Any]) -> list[dict[str, Any]]:
    """Without the time, which lies in another file."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_flushed_line_a_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonLines(path)
    for step in (1, 10):
        logger.log(record(step))
        assert lines_of(path)[-1:] == bare(record(step))  # on disk before it is closed
    logger.close()
    assert lines_of(path) == bare(record(1), record(10))
    assert lines_of(tmp_path / "timing.jsonl") == [{"step": 1, "seconds": 0.1}, {"step": 10, "seconds": 1.0}]


def test_what_json_has_not_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonLines(path)
    logger.log(record(1, loss=math.nan, grad_norm=math.inf, a_quantiles=[0.1, -math.inf]))
    logger.close()

    def refuse(text: str) -> None:
        raise AssertionError(text)

    parsed = json.loads(path.read_text(), parse_constant=refuse)["arms"]["standard"]
    assert (parsed["loss"], parsed["grad_norm"], parsed["a_quantiles"]) == (None, None, [0.1, None])


def test_finite_leaves_everything_else() -> None:
    plain = {"a": [1, 2.5, "x", None, True], "b": {"c": (1.0, math.nan)}}
    assert finite(plain) == {"a": [1, 2.5, "x", None, True], "b": {"c": [1.0, None]}}


def test_resuming_drops_later_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps(record(step)) + "\n" for step in (1, 10, 20, 30))
    path.write_text(text + '{"step": 31, "arms": {"stan', encoding="utf-8")
    logger = JsonLines(path, resume_step=20)
    logger.log(record(30, loss=9.0))
    logger.close()
    assert [line["step"] for line in lines_of(path)] == [1, 10, 20, 30]
    assert lines_of(path)[-1]["arms"]["standard"]["loss"] == 9.0


@pytest.mark.parametrize(
    "torn", [b'{"step": 1', b"\xff\xfe\x00", b"null\n", b"[]\n", b"\x00" * 50, b'{"step": "x"}\n', b"\n\n"]
)
def test_any_torn_end_is_survived(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(record(1)).encode() + b"\n" + torn)
    logger = JsonLines(path, resume_step=5)
    logger.log(record(6))
    logger.close()
    assert [line["step"] for line in lines_of(path)] == [1, 6]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = JsonLines(tmp_path / "metrics.jsonl")

    class Full:
        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        def flush(self) -> None: ...

        def close(self) -> None: ...

    logger.close()
    monkeypatch.setattr(logger.metrics, "_file", Full())
    with pytest.raises(CosaeError, match=r"metrics.jsonl .*No space left"):
        logger.log(record(1))


def test_scalars_are_the_plain_numbers() -> None:
    found = scalars(record(3, a_quantiles=[0.1, 0.2], flag=True, b=1))
    assert ("standard", "loss", 0.5) in found
    assert ("standard", "b", 1.0) in found
    assert {metric for _, metric, _ in found} == {"loss", "fve", "l0", "dead_frac", "b"}


def test_tensorboard_gets_every_scalar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            assert (Path(folder), purge_step) == (tmp_path / "tensorboard", None)

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            seen.append((tag, value, step))

        def close(self) -> None:
            seen.append(("closed", 0.0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    logger = TensorBoard(tmp_path)
    logger.log(record(3))
    logger.close()
    assert ("standard/loss", 0.5, 3) in seen
    assert seen[-1][0] == "closed"
    assert len(seen) == 5


def test_absent_services_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(CosaeError, match=r"pip install 'cosae\[tensorboard\]'"):
        TensorBoard(tmp_path)
    with pytest.raises(CosaeError, match=r"pip install 'cosae\[wandb\]'"):
        WandB(tmp_path, "p", {}, "id")


def test_wandb_gets_scalars_and_recipe_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            seen.append((numbers, step))

        def finish(self) -> None:
            seen.append("finished")

    module = types.ModuleType("wandb")
    module.init = lambda **named: (seen.append(named), Run())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    logger = WandB(tmp_path, "project", {"k": 4}, "1f", {"standard": "arm_1"})
    logger.log(record(3))
    logger.close()
    off = dict.fromkeys(("x_disable_meta", "x_disable_machine_info", "x_disable_stats", "disable_git"), True)
    off |= {
        "x_save_requirements": False,
        "save_code": False,
        "console": "off",
        "host": "",
        "disable_job_creation": True,
    }
    known = {"project": "project", "id": "1f", "resume": "allow", "settings": off}
    assert seen[0] == {**known, "dir": str(tmp_path), "config": {"k": 4}}
    assert seen[1] == ({f"arm_1/{m}": v for _, m, v in scalars(record(3))}, 3)
    assert seen[2] == "finished"

    def refuse(**named: Any) -> Run:
        raise RuntimeError("no network")

    module.init = refuse  # type: ignore[attr-defined]
    with pytest.raises(CosaeError, match=r"W&B could not start \(no network\)"):
        WandB(tmp_path, "project", {}, "id")


def test_description_of_an_arm() -> None:
    assert describe(record(1)["arms"]["standard"]) == "loss 0.5000  FVE 0.250  L0   4.0  dead 12.5 %"
    assert describe(record(1, a=-0.25)["arms"]["standard"]).endswith("a -0.250")


def display(progress: Progress, *arms: str, steps: int = 100, start: int = 0) -> TrainingDisplay:
    return TrainingDisplay(progress, TrainingConfig(steps=steps, batch_tokens=8), arms, start)


def test_training_writes_plain_lines_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    clock = FakeClock()
    with display(Progress(clock=clock), "standard", "x") as shown:
        for step, now in ((1, 400.0), (2, 401.0), (30, 429.0)):  # the first carries a wait of 400 s, compiling and all
            clock.now = now
            while shown._phase.done < step:
                shown.step()
            shown.log(record(step))
    lines = capsys.readouterr().err.splitlines()
    heads = [line for line in lines if line.startswith("step ")]
    assert heads == ["step 1/100", "step 30/100  8 tokens/s, about 70 s left"]
    assert "  standard  loss 0.5000" in lines[2]
    assert lines[0] == "training (0 of 100 steps)"


def test_training_says_nothing_when_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    with display(Progress(shown=False), "standard") as shown:
        shown.step()
        shown.log(record(1))
        shown.event({"step": 1, "arm": None, "kind": "norm_shift", "text": "norms shifted"})
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_training_on_a_terminal_shows_each_arm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with display(Progress(), "standard", "gone", steps=10, start=3) as shown:
        shown.step()
        shown.log(record(4, a=0.5))
    seen = capsys.readouterr().err
    assert "standard  loss 0.5000" in seen
    assert "a +0.500" in seen
    assert "gone: stopped" in seen
