"""The demos: the embedded model's activations as they are and with injected norms; a pretrained model with real sinks.

Of the first, one capture serves both runs, and the two settings differ in nothing but each token's length. Of the
second, activations are captured once into the user's cache, and every later run reads them there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cosae.activations.store.format import INDEX
from cosae.errors import CosaeError
from cosae.io.digest import value_digest
from cosae.io.fetched.cache import cache_folder
from cosae.io.fetched.packages import PACKAGES, folder_of
from cosae.io.progress import Progress
from cosae.io.values import to_plain
from cosae.presets import preset
from cosae.recipe import Recipe
from cosae.run.capture.request import Capture
from cosae.run.capture.stores import capture_stores
from cosae.run.dataset.base import DataUse
from cosae.run.dataset.open import dataset_of
from cosae.run.execute import Logs, execute
from cosae.run.finished import Finished
from cosae.run.folder import RECIPE, check_free
from cosae.run.plan.check import Plan, plan_capture, plan_run, screen
from cosae.run.plan.time import TimePlan
from cosae.shown import counted

FETCHED = ("smollm2", "wiki", "sae-probes")
"""What the demo on a pretrained model reads."""
CAPTURED_TOKENS = 204_800


def demo(out: Path, steps: int | None = None, progress: bool = True) -> list[Finished]:
    """Run both settings into out/natural and out/injected. Raises CosaeError where `out` already holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        held = next((f" (go on with `cosae resume {p.parent}`)" for p in sorted(out.glob(f"*/{RECIPE}"))), "")
        raise CosaeError(f"{out} already holds something{held}: choose another --out or remove it.")
    natural, injected = (_with_steps(preset(name), steps) for name in ("demo", "demo-injected"))
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


def demo_real(out: Path, steps: int | None = None, progress: bool = True) -> Finished:
    """Run the preset demo-real into `out`, from a store in the user's cache that is captured where it is not complete.

    Raises CosaeError where something has to be fetched first, and where `out` already holds something.
    """
    check_fetched()
    check_free(out)
    recipe = _with_steps(preset("demo-real"), steps)
    evaluation = recipe.evaluation
    held_out = evaluation.held_out_tokens + evaluation.calibration_tokens
    request = Capture(recipe.data, (recipe.data.site,), tokens=CAPTURED_TOKENS, held_out_tokens=held_out)
    store = store_of(request)
    stored = recipe.changed({"data.store": str(store)})
    shown = Progress(progress)
    complete = (store / INDEX).is_file()
    if progress:
        planned = plan_run(stored, out, shown) if complete else _plan_of_both(recipe, out, request, store, shown)
        shown.note(screen(planned))
    shown.note(f"activations {'are read from' if complete else 'are captured, once, into'} {store}")
    if not complete:
        capture_stores(request, store, progress=shown, log=shown.note)
    return execute(stored, out, logs=Logs(progress), progress=shown)


def check_fetched() -> None:
    """Raises CosaeError, with the command that brings it, where something of FETCHED is not on this machine."""
    if missing := [name for name in FETCHED if not folder_of(name).is_dir()]:
        size = sum(PACKAGES[name].mb for name in missing)
        raise CosaeError(
            f"demo --real reads {', '.join(FETCHED)}, and {' and '.join(missing)} is not on this machine yet: cosae "
            f"fetch {' '.join(missing)} brings {'it' if len(missing) == 1 else 'them'} ({size} MB)."
        )


def store_of(request: Capture) -> Path:
    """The folder of these activations in the user's cache, named by all that decides them."""
    packages = {name: PACKAGES[name].sha256 for name in ("smollm2", "wiki")}
    digest = value_digest({"request": to_plain(request), "packages": packages})
    return cache_folder() / "stores" / f"demo-real-{digest[:16]}"


def _plan_of_both(recipe: Recipe, out: Path, request: Capture, store: Path, shown: Progress) -> Plan:
    """The plan of a capture, and of the run that then reads it; recipe: with the model, since the store is not there.

    Raises CosaeError where either cannot fit.
    """
    captured, run = plan_capture(request, store, shown), plan_run(recipe, out, shown)
    assert captured.time is not None
    assert run.time is not None
    stored = run.time.from_store()
    rates = captured.time.tokens_per_second | stored.tokens_per_second
    return replace(run, disk=captured.disk + run.disk, time=TimePlan(captured.time.parts | stored.parts, rates))


def _with_steps(recipe: Recipe, steps: int | None) -> Recipe:
    return recipe if steps is None else recipe.changed({"training.steps": steps})
