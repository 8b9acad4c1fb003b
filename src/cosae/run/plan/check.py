"""`cosae plan`: what a run or a capture will take, before anything is spent; what cannot fit is refused.

recipe → sizes (configurations, headers) → memory, disk → refused? → a short measured sample → time
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from cosae.activations.sample import Sample
from cosae.errors import advises_to_drop
from cosae.io.progress import SILENT, Progress, duration
from cosae.recipe import Recipe
from cosae.report.terminal import text_table
from cosae.run.capture.request import Capture
from cosae.run.dataset.base import Dataset, DataUse, Sizes
from cosae.run.dataset.open import dataset_of, open_dataset
from cosae.run.plan.memory import MemoryPlan, capture_disk, capture_memory, measuring_memory, run_disk, train_memory
from cosae.run.plan.resources import Choice, Item, check_fits, free_disk, free_memory, human, total
from cosae.run.plan.time import TimePlan, capture_time, train_time
from cosae.sae.model import SAE


@dataclass(frozen=True)
class Plan:
    """Memory and disk by part, what is free of both, and the time where it was sampled."""

    memory: MemoryPlan
    disk: tuple[Item, ...]
    free_memory: int
    free_disk: int
    time: TimePlan | None = None


def check_run(recipe: Recipe, data: Dataset, out: Path | None, *, begun: bool = False) -> Plan:
    """The plan of a run without its time. Raises CosaeError, saying what to lower to what, where it cannot fit.

    begun: of a run that lies in `out` and is gone on with. Its checkpoints take no further room, and only what has no
    say in the weights can be lowered.
    """
    sizes = data.sizes()

    def memory(changed: Recipe) -> MemoryPlan:
        return train_memory(changed.resolved(sizes.d_in, sizes.d_out, sizes.site_widths), sizes)

    def disk(changed: Recipe) -> tuple[Item, ...]:
        return run_disk(changed.resolved(sizes.d_in, sizes.d_out, sizes.site_widths), sizes) if out is not None else ()

    recipe = recipe.changed({"d_sae": recipe.d_sae or 16 * sizes.d_in})
    plan = Plan(memory(recipe), disk(recipe), free_memory(recipe.device), free_disk(out or Path()))
    in_memory = _choices(recipe, lambda changed: memory(changed).n_bytes, begun)
    otherwise = "a machine or a moment with more memory free" if begun else "a smaller model"
    check_fits(plan.memory.peak, in_memory, plan.free_memory, f"the memory of {recipe.device}", otherwise)
    if out is not None:
        there = sum(p.stat().st_size for p in (out / "checkpoints").rglob("*.safetensors")) if begun else 0
        single = recipe.changed({"training.checkpoint_every": 0})
        fewer = not begun and total(disk(single)) <= plan.free_disk + there
        hint = "another place with --out" + (", or one checkpoint with training.checkpoint_every=0" if fewer else "")
        check_fits(plan.disk, [], plan.free_disk + there, f"the disk at {out}", hint)
    return plan


def _choices(recipe: Recipe, needed: Callable[[Recipe], int], begun: bool) -> Iterator[Choice]:
    """The numbers of a recipe that decide how much it takes, as far as they can still be changed; found when asked."""
    batch, k = recipe.training.batch_tokens, max(recipe.k, *(arm.k_start or arm.sae.k or 0 for arm in recipe.arms))
    now = {
        "d_sae": (recipe.d_sae or 0, 2 * k),
        "training.buffer_tokens": (recipe.training.buffer_tokens, 2 * batch),
        "training.batch_tokens": (batch, 64),
        "filter.window_tokens": (recipe.filter.window_tokens, 4096),
        "evaluation.held_out_tokens": (recipe.evaluation.held_out_tokens, 4096),
    }

    def with_value(setting: str, value: int) -> int:
        return needed(recipe.changed({setting: value}))

    for setting, (value, least) in now.items():
        choice = Choice(setting, value, least, partial(with_value, setting))
        if (not begun or setting.startswith("evaluation.")) and choice.needed(least) < needed(recipe):
            yield choice


def check_capture(request: Capture, out: Path) -> Plan:
    """The plan of a capture without its time. Raises CosaeError where it cannot fit; rows already on disk count."""
    sizes, label_bytes = _capture_sizes(request)

    def memory(changed: Capture) -> int:
        return capture_memory(changed, sizes, label_bytes).n_bytes

    def on_disk(changed: Capture) -> int:
        return total(capture_disk(changed, sizes, label_bytes))

    rows = max(request.rows_per_shard(size.d_in, label_bytes) for size in sizes)
    needed = capture_memory(request, sizes, label_bytes), capture_disk(request, sizes, label_bytes)
    plan = Plan(*needed, free_memory(request.device), free_disk(out))
    shards = Choice("--shard-tokens", rows, 1024, lambda value: memory(replace(request, shard_tokens=value)))
    tokens = Choice("--tokens", request.tokens, 1024, lambda value: on_disk(replace(request, tokens=value)))
    there = sum(path.stat().st_size for path in out.rglob("*.safetensors")) if out.is_dir() else 0
    check_fits(plan.memory.peak, [shards], plan.free_memory, f"the memory of {request.device}", "a smaller model")
    check_fits(plan.disk, [tokens], plan.free_disk + there, f"the disk at {out}", "another place")
    return plan


def check_measuring(saes: Sequence[SAE], sample: Sample, device: str, at_median: bool = True) -> int:
    """Bytes that measuring SAEs will take beside them and their tokens. Raises CosaeError where they are not free.

    How many features fire is seen on a few tokens. at_median: see `measuring_memory`
    """
    n = len(sample)
    few = sample.activations.x_ND[:: max(1, n // 64)].float()
    fired = [len(sae.encode(few).value_E) / len(few) for sae in saes]

    def memory(tokens: int) -> MemoryPlan:
        plans = [measuring_memory(sae, tokens, l0, at_median) for sae, l0 in zip(saes, fired, strict=True)]
        every = chain.from_iterable
        return MemoryPlan(tuple(every(p.resident for p in plans)), tuple(every(p.passing for p in plans)))

    needed = memory(n)
    tokens = Choice("--tokens", n, 64, lambda value: memory(value).n_bytes)
    otherwise = "a machine or a moment with more memory free"
    check_fits(needed.peak, [tokens], free_memory(device), f"the memory of {device}", otherwise)
    return needed.n_bytes


@advises_to_drop()
def plan_run(recipe: Recipe, out: Path | None, progress: Progress = SILENT) -> Plan:
    """The plan of a run, with its time from a sample. Raises CosaeError where it cannot fit, before the sample."""
    with dataset_of(recipe) as data:
        checked = check_run(recipe, data, out)
        data.progress = progress
        return replace(checked, time=train_time(recipe, data))


def plan_capture(request: Capture, out: Path, progress: Progress = SILENT) -> Plan:
    """The plan of a capture, with its time from a sample. Raises CosaeError where it cannot fit, before the sample."""
    request = request.as_begun(out)
    checked = check_capture(request, out)
    return replace(checked, time=capture_time(request, progress))


def _capture_sizes(request: Capture) -> tuple[list[Sizes], int]:
    from cosae.text.concepts.table import CONCEPTS
    from cosae.text.mixture import parse_corpus

    n_labels = len(CONCEPTS) if [s.spec for s in parse_corpus(request.data.corpus)] == ["pylib"] else 0
    use = DataUse(device=request.device, train_tokens=request.data.chunk_sequences * request.data.context)
    sizes = [open_dataset(replace(request.data, site=site), use).sizes() for site in request.sites]
    return sizes, -(-n_labels // 8)


def screen(plan: Plan) -> str:
    """A plan as text for a terminal."""

    def sizes(title: str, items: Iterable[Item]) -> str:
        return text_table((), [(human(item.n_bytes), item.what) for item in items], title=title, align="rl")

    memory = plan.memory
    needed = f"about {human(memory.n_bytes)} beside the program itself; {human(plan.free_memory)} are free"
    shown = [sizes(f"memory: {needed}", memory.resident)]
    shown.append(sizes(f"one at a time, the largest counts ({human(memory.peak[-1].n_bytes)}):", memory.passing))
    if plan.disk:
        shown.append(sizes(f"disk: about {human(total(plan.disk))}; {human(plan.free_disk)} are free", plan.disk))
    if plan.time is not None:
        title = f"time: about {duration(plan.time.seconds)}, by a short sample on this machine as it is now"
        rates = ", ".join(f"{what} {rate:.0f}" for what, rate in plan.time.tokens_per_second.items())
        rows = [(duration(seconds), what) for what, seconds in plan.time.parts.items()]
        shown.append(text_table((), rows, title=title, notes=[f"tokens a second: {rates}"], align="rl"))
    return "\n".join(shown)
