"""Small recipes and comparisons that the tests of runs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cosae.activations.synthetic import World
from cosae.recipe import Recipe
from cosae.run.execute import Logs
from cosae.train.arm import Arm

QUIET = Logs(progress=False)
ARMS = (
    Arm.of("standard", "inner"),
    Arm.of("cosine", "cosine"),
    Arm.of("delta", "cosine_base_delta", selector="jumprelu", input_noise=2.0),
    Arm.of("gated", "cosine_per_feature", selector="gated", frame="unit"),
)


def recipe(**changes: Any) -> Recipe:
    """40 steps of 64 tokens on a world of 32 features in 16 dimensions."""
    small = {
        "data.world": World(d_in=16, n_features=32, l0=3, norm="log_normal+sinks", sink_frac=0.02),
        "filter.window_tokens": 2000,
        "training.steps": 40,
        "training.batch_tokens": 64,
        "training.buffer_tokens": 512,
        "training.dead_after_tokens": 500,
        "training.log_every": 2,
        "training.checkpoint_every": 10,
        "training.optimizer.warmup_steps": 5,
        "training.optimizer.lr": 5e-3,
        "evaluation.held_out_tokens": 600,
        "evaluation.calibration_tokens": 600,
        "evaluation.resamples": 20,
    }
    return Recipe(name="small", arms=ARMS, d_sae=48, k=4).changed({**small, **changes})


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint and of the saved SAEs, by file and name; but for the process' own generators,
    which the tests before have drawn from."""
    files = [*sorted((run / "checkpoints").iterdir())[-1].glob("*.safetensors"), *run.glob("arms/[!.]*/*.safetensors")]
    files = [file for file in files if file.stem != "random"]
    return {f"{f.parent.name}/{f.name}:{name}": t for f in files for name, t in load_file(f).items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, buffer, saved SAEs, metrics, events and digests equal to the bit; evaluation equal."""
    a, b = final_tensors(one), final_tensors(other)
    assert a.keys() == b.keys()
    assert any(name.startswith("standard/") for name in a)
    for name, value in a.items():
        mine, theirs = (t.nan_to_num(nan=1234.5) if t.is_floating_point() else t for t in (value, b[name]))
        assert torch.equal(mine, theirs), name
    for file in ("metrics.jsonl", "events.jsonl"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    runs = [json.loads((run / "run.json").read_text()) for run in (one, other)]
    for record in runs:
        assert record["status"] == "finished"
        assert {arm["stream_digest"] for arm in record["arms"].values()} == {record["stream_digest"]}
    assert runs[0]["stream_digest"] == runs[1]["stream_digest"]
    assert (one / "evaluation.json").read_text() == (other / "evaluation.json").read_text()
