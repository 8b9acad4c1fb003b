"""The demo: the same arms on the embedded model's activations as they are, and with injected norms.

One capture serves both runs; the two settings differ in nothing but each token's length.
"""

from __future__ import annotations

from pathlib import Path

from cosae.errors import CosaeError
from cosae.io.progress import Progress
from cosae.presets import preset
from cosae.run.dataset.base import DataUse
from cosae.run.dataset.open import dataset_of
from cosae.run.execute import Logs, execute
from cosae.run.finished import Finished
from cosae.run.folder import RECIPE
from cosae.shown import counted


def demo(out: Path, steps: int | None = None, progress: bool = True) -> list[Finished]:
    """Run both settings into out/natural and out/injected. Raises CosaeError where `out` already holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        held = next((f" (go on with `cosae resume {p.parent}`)" for p in sorted(out.glob(f"*/{RECIPE}"))), "")
        raise CosaeError(f"{out} already holds something{held}: choose another --out or remove it.")
    changes = {} if steps is None else {"training.steps": steps}
    natural, injected = (preset(name).changed(changes) for name in ("demo", "demo-injected"))
    training = natural.training
    keep = training.steps * training.batch_tokens + 2 * training.buffer_tokens + natural.filter.window_tokens
    shown = Progress(progress)
    finished = []
    with dataset_of(natural, keep_tokens=keep) as data:
        data.progress = shown
        for recipe, folder in ((natural, "natural"), (injected, "injected")):
            shown.note(f"{recipe.name}: {counted(len(recipe.arms), 'arm')}, {counted(training.steps, 'step')}")
            mine = data.again(DataUse.of(recipe))
            finished.append(execute(recipe, out / folder, logs=Logs(progress), data=mine, progress=shown))
    return finished
