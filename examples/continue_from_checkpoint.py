"""Interrupt a run, continue it from its checkpoint, and get the same weights as in a run that was not interrupted."""

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import cosae
from cosae.activations.synthetic import World
from cosae.recipe import Recipe
from cosae.run.execute import Logs, resume
from cosae.train.checkpoint import checkpoints
from cosae.train.loop import Interrupted

out = Path(tempfile.mkdtemp()) / "run"
small = {"filter.window_tokens": 8192, "training.batch_tokens": 256, "training.buffer_tokens": 8192, "k": 4,
         "training.steps": 240, "training.checkpoint_every": 40, "d_sae": 128}  # fmt: skip
recipe = Recipe(name="small").changed({"data.world": World(d_in=32, n_features=64, l0=4), **small})


def press_ctrl_c() -> None:
    while not checkpoints(out):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


threading.Thread(target=press_ctrl_c, daemon=True).start()
try:
    cosae.fit(recipe, ["cosine"], out=out, evaluate=False)
except Interrupted as stop:
    print(f"stopped after step {stop.step}; checkpoints: {[c.name for c in checkpoints(out)]}")
runs = {"continued": resume(out, Logs(progress=False)), "uninterrupted": cosae.fit(recipe, ["cosine"])}
for name, run in runs.items():
    rows = run.saes["cosine"].W_dec.detach()
    print(f"{name:<13} batches {run.run['stream_digest'][:12]}, sum of decoder {float(rows.double().sum()):.12f}")
