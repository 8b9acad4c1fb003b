"""SIGKILL at twenty moments of one run, resumed after each: it ends as the run that nobody touched, to the bit.

The child tells what it is about to do; the parent waits for the wanted thing and kills it a random while later. Seeded.
`pytest -m slow tests/run/test_kill.py -s` shows where each kill fell.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosae.activations.perturbation import Perturbation
from cosae.activations.synthetic import World
from cosae.recipe import Recipe
from cosae.train.arm import Arm
from tests.support.tiny_runs import ARMS, assert_same_run

SEED = 20261124
CHILD = """
import sys
from pathlib import Path

def told(owner, name, word, after=False):
    plain = getattr(owner, name)
    def loud(*args, **named):
        if not after:
            print(word, flush=True)
        result = plain(*args, **named)
        if after:
            print(word, flush=True)
        return result
    setattr(owner, name, loud)

print("opening", flush=True)
from cosae.activations.stream import ActivationStream
from cosae.recipe import Recipe
from cosae.run import execute as run
from cosae.io import lines, staged
from cosae.train import checkpoint

told(ActivationStream, "_begin_round", "refill")
told(ActivationStream, "next_batch", "step")
told(run, "write_checkpoint", "checkpoint")
told(checkpoint, "save_file", "checkpoint file", after=True)
told(staged, "sync_folder", "checkpoint flushed", after=True)
told(run, "calibrate", "calibration")
told(run, "save", "sae")
told(run, "evaluate", "evaluation")
told(run, "write_json", "record")
told(lines.Lines, "__init__", "lines")
logs = run.Logs(progress=False)
out = Path(sys.argv[2])
if out.exists():
    run.resume(out, logs)
else:
    run.execute(Recipe.read(sys.argv[1]), out, logs=logs)
"""
KILLS = (
    "lines", "refill", "step", "checkpoint", "refill", "checkpoint file", "step", "checkpoint flushed", "opening",
    "refill", "step", "checkpoint file", "record", "refill", "calibration", "sae", "evaluation", "evaluation", "sae",
    "evaluation",
)  # fmt: skip
TIMES = {"step": (9, 25), "refill": (2, 4), "checkpoint": (2, 3), "checkpoint file": (3, 9)}
"""How often a thing is waited for: more than one checkpoint's worth, so that the run gets on."""
LATER = {"opening": 2.0, "evaluation": 0.08, "calibration": 0.05}
"""Seconds within which the kill falls after it; 0.02 for the others."""


def recipe(data: str, texts: Path) -> Recipe:
    arms = (
        *ARMS,
        Arm.of("topk", "inner_unit", selector="topk"),
        Arm.of("abs", "cosine_grouped", selector="abs_topk", frame="layer_norm"),
    )
    small = {
        "d_sae": 96,
        "k": 4,
        "perturbation": Perturbation("log_normal", sigma=0.5),
        "filter.window_tokens": 1024,
        "training.steps": 90,
        "training.batch_tokens": 128,
        "training.buffer_tokens": 1024,
        "training.store_dtype": "bfloat16",
        "training.dead_after_tokens": 3000,
        "training.log_every": 1,
        "training.checkpoint_every": 6,
        "training.optimizer.warmup_steps": 5,
        "evaluation.held_out_tokens": 1500,
        "evaluation.calibration_tokens": 1500,
        "evaluation.resamples": 50,
        "evaluation.probing": False,
    }
    if data == "world":
        small["data.world"] = World(d_in=16, n_features=32, l0=3, norm="log_normal+sinks", sink_frac=0.02)
    else:
        for number, file in enumerate(sorted(Path(json.__file__).parent.parent.glob("[a-e]*.py"))[:24]):
            texts.mkdir(exist_ok=True)
            (texts / f"{number}.txt").write_text(file.read_text(encoding="utf-8")[:6000], encoding="utf-8")
        small |= {"data.corpus": str(texts), "data.context": 64, "data.chunk_sequences": 4, "data.batch_sequences": 4}
    return Recipe(name="kill", arms=arms).changed(small)


def start(file: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("data", ["world", "embedded"])
def test_killed_twenty_times(tmp_path: Path, data: str) -> None:
    file, whole, out = tmp_path / "recipe.json", tmp_path / "whole", tmp_path / "killed"
    recipe(data, tmp_path / "texts").write(file)
    untouched = start(file, whole)
    _, said = untouched.communicate(timeout=600)
    assert untouched.returncode == 0, said
    draw = random.Random(SEED)
    for number, word in enumerate(KILLS, 1):
        times, later = draw.randint(*TIMES.get(word, (1, 1))), draw.uniform(0, LATER.get(word, 0.02))
        child = start(file, out)
        assert child.stdout is not None
        assert child.stderr is not None
        seen = 0
        for line in child.stdout:
            seen += line.strip() == word
            if seen == times:
                time.sleep(later)
                child.send_signal(signal.SIGKILL)
                break
        child.wait(60)
        told = child.stderr.read()
        child.stdout.close()
        child.stderr.close()
        assert child.returncode == -signal.SIGKILL, f"{word} never came {times} times: {told}"
        kept = sorted(p.name for p in (out / "checkpoints").glob("step_*")) if out.exists() else []
        status = json.loads((out / "run.json").read_text())["status"] if (out / "run.json").exists() else "no record"
        print(f"{number:2d} {word} × {times} + {1000 * later:.0f} ms: {status}, {', '.join(kept) or 'no checkpoint'}")
    last = start(file, out)
    _, said = last.communicate(timeout=600)
    assert last.returncode == 0, said
    assert_same_run(whole, out)
    assert json.loads((out / "run.json").read_text())["started_at"]
    for one in sorted(whole.glob("arms/*/*")):
        assert (out / one.relative_to(whole)).read_bytes() == one.read_bytes(), one.name
    assert not list(out.rglob("*.partial"))
