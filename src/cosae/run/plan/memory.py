"""What a run will take, from its recipe: memory by part, and disk. Nothing is loaded or allocated to find out.

B batch, D width, F features, R rows of the buffer, W of the window, H of the held-out tokens; fp32 where not said.

    arm            4 · 2 F D                  parameters, gradients, two Adam moments (each 2 F D: encoder and decoder;
                                              moments in fewer bytes where the optimiser keeps them so)
    buffer         R (s D + 21)               s bytes a value (training.store_dtype); norm, ids and the special mark
    sample         16 384 D                   what weights are initialised on
    model, text    weights; 36 bytes a token  held corpora: ids, offsets, places; and the text itself
    one of these at a time, the largest counts:
      window       4 W (s D + 21)             the first window: in parts, joined, and read
      step         2 F D + B (8 D + F)        gradients and scores, of each arm that steps at the same time; the
                                              reference kernel 9 B F
      refill       2 chunks, and the forward pass of one batch of sequences or the text that is being tokenised
      checkpoint   the live buffer three times, or one arm's parameters and moments twice
      evaluation   4 H D and the codes of all arms, H (12 k) bytes each; labels on the embedded corpus

Measured against peak resident memory in tests/run/test_plan.py, which states the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cosae.activations.store.format import STORE_DTYPES, ShardShape
from cosae.activations.stream import SAMPLE_ROWS
from cosae.evaluate.encoded import BATCH_TOKENS
from cosae.evaluate.geometry import CHUNK_ELEMENTS
from cosae.evaluate.norms.counterfactual import DENSE_ELEMENTS
from cosae.recipe import Recipe
from cosae.run.capture.request import Capture
from cosae.run.dataset.base import Sizes
from cosae.run.plan.resources import Item, human, total
from cosae.sae.model import SAE
from cosae.shown import counted
from cosae.train.checkpoint import KEEP
from cosae.train.side_by_side import n_at_once

FLOAT = 4
IDS_BYTES = 21  # norm, four ids, one mark
LABEL_BYTES = 157  # one byte a concept while measuring
LABELLED_TOKENS = 500_000  # of the documents that labels are looked up in
MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.1}
"""Of one value of Adam's moments; int8 with the scales of its blocks."""
ENTRY_BYTES, SCORE_COPIES = 80, 14
"""Of one firing and what an audit finds of it; and of scores in both readings, with what is sorted and marked."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run: what stays, and the largest of what comes and goes."""

    resident: tuple[Item, ...]
    passing: tuple[Item, ...]

    @property
    def peak(self) -> tuple[Item, ...]:
        """All that is there at the worst moment."""
        return (*self.resident, max(self.passing, key=lambda item: item.n_bytes))

    @property
    def n_bytes(self) -> int:
        return total(self.peak)


def train_memory(recipe: Recipe, sizes: Sizes) -> MemoryPlan:
    """Memory of a run on one device. recipe: resolved, so that every arm has its width."""
    training = recipe.training
    row_values, d = widths(sizes)
    value = STORE_DTYPES[training.store_dtype].itemsize
    row = value * row_values + IDS_BYTES
    rows, batch = training.buffer_tokens, training.batch_tokens
    buffer = Item("the shuffle buffer", rows * row)
    sample = Item("the sample for initialisation", SAMPLE_ROWS * FLOAT * row_values)
    moment = MOMENT_BYTES[training.optimizer.state_dtype]
    arms = [_arm(arm, d, moment, _step(arm, recipe.kernel, batch, d)) for arm in recipe.arms]
    widest = max(map(_width, recipe.arms))
    held_out = recipe.evaluation.held_out_tokens
    probed = recipe.evaluation.probe_tokens if recipe.evaluation.probing and _labelled(recipe) else 0
    labelled = LABELLED_TOKENS if _labelled(recipe) else 0
    codes = sum(12 * (arm.sae.k or 1) for arm in recipe.arms)
    measured = held_out + recipe.evaluation.calibration_tokens + probed
    evaluation = 4 * measured * FLOAT * row_values + (held_out + probed) * codes + LABEL_BYTES * (2 * probed + labelled)
    passing = (
        Item("the first window", 4 * recipe.filter.window_tokens * row),
        _steps(recipe, d),
        Item("a refill of the buffer", 2 * sizes.chunk_rows * row + sizes.chunk_work),
        Item("a checkpoint being written", max(3 * rows * row, int(2 * 2 * widest * d * (FLOAT + 2 * moment)))),
        Item("evaluation", evaluation),
    )
    return MemoryPlan((*sizes.resident, buffer, sample, *arms), passing)


def widths(sizes: Sizes) -> tuple[int, int]:
    """Values of a row, targets included, and the width of an SAE's matrices: of a transcoder's two, the mean."""
    row = sizes.d_in + (sizes.d_out or 0)
    return row, sizes.d_in if sizes.d_out is None else -(-row // 2)


def _arm(arm: Any, d: int, moment: float, work: int) -> Item:
    values = 2 * _width(arm) * d
    weights, moments = values * FLOAT, int(2 * values * moment)
    parts = f"parameters {human(weights)}, gradients {human(weights)}, moments {human(moments)}"
    return Item(f"arm {arm.name}: {parts}; a step works on {human(work)} more", 2 * weights + moments)


def _steps(recipe: Recipe, d: int) -> Item:
    """The widest arms' steps, as many as are taken at the same time on a CPU."""
    widest = sorted(recipe.arms, key=_width, reverse=True)
    kernels = [recipe.kernel, *(arm.kernel for arm in widest if arm.kernel)]
    widest = widest[: n_at_once(len(widest), torch.device(recipe.device).type, kernels)]
    work = sum(_step(arm, recipe.kernel, recipe.training.batch_tokens, d) for arm in widest)
    return Item(f"one step of {' and '.join(arm.name for arm in widest)}", work)


def _step(arm: Any, kernel: str, batch: int, d: int) -> int:
    width = _width(arm)
    dense = 9 * batch * width * FLOAT if "reference" in (kernel, arm.kernel) else batch * width * FLOAT
    return 2 * width * d * FLOAT + 8 * batch * d * FLOAT + dense


def _width(arm: Any) -> int:
    assert arm.sae.d_sae is not None
    return int(arm.sae.d_sae)


def _labelled(recipe: Recipe) -> bool:
    data = recipe.data
    return data.corpus == "pylib" and data.world is None and data.activations is None and data.store is None


def run_disk(recipe: Recipe, sizes: Sizes) -> tuple[Item, ...]:
    """Disk of a run's folder: checkpoints that are kept and the one being written, and the trained SAEs."""
    training = recipe.training
    row_values, d_in = widths(sizes)
    row = STORE_DTYPES[training.store_dtype].itemsize * row_values + IDS_BYTES
    width = sum(_width(arm) for arm in recipe.arms)
    weights = 2 * width * d_in * FLOAT
    moment = MOMENT_BYTES[training.optimizer.state_dtype]
    n = KEEP + 1 if training.checkpoint_every and training.steps > training.checkpoint_every else 1
    return (
        Item(f"{counted(n, 'checkpoint')}: shuffle buffer", n * training.buffer_tokens * row),
        Item(f"{counted(n, 'checkpoint')}: weights and moments", int(n * weights * (1 + 2 * moment / FLOAT))),
        Item("trained SAEs", weights),
    )


def measuring_memory(sae: SAE, tokens: int, l0: float, at_median: bool = True) -> MemoryPlan:
    """Memory of an audit or a measurement beside the SAE and its tokens, of which l0 features fire on each.

    at_median: whether tokens are scored at the median norm as well, and features compared; an audit does both
    """
    features, d = sae.cfg.sizes[1], sae.cfg.sizes[0]
    codes = Item(f"codes of {tokens:,} tokens, {l0:.3g} each, and their firings", int(tokens * l0 * ENTRY_BYTES))
    dense = FLOAT * min(DENSE_ELEMENTS, min(tokens, BATCH_TOKENS) * features)
    encoding = Item("encoding a batch", 2 * dense + 5 * 8 * min(tokens, BATCH_TOKENS) * d)
    more = (
        Item("a batch of scores, as they are and at the median norm", SCORE_COPIES * dense),
        Item("cosines of features", 3 * FLOAT * (min(CHUNK_ELEMENTS, features**2) + features * d)),
    )
    return MemoryPlan((codes,), (encoding, *more) if at_median else (encoding,))


def capture_memory(request: Capture, sizes: Sequence[Sizes], label_bytes: int) -> MemoryPlan:
    """Memory of a capture of one or several sites: two shards' rows of each, one chunk, one forward pass."""
    value = torch.float32.itemsize
    shards = []
    for site, size in zip(request.sites, sizes, strict=True):
        rows = min(request.rows_per_shard(size.d_in, label_bytes), max(request.tokens, request.n_held_out))
        n_bytes = 2 * rows * (value * size.d_in + IDS_BYTES + label_bytes)
        shards.append(Item(f"rows of {site} on their way to a shard, twice", n_bytes))
    chunk = sum(2 * size.chunk_rows * (value * size.d_in + IDS_BYTES) for size in sizes) + sizes[0].chunk_work
    passing = Item("a chunk of sequences in a forward pass", chunk)
    return MemoryPlan((*sizes[0].resident, *shards), (passing,))


def capture_disk(request: Capture, sizes: Sequence[Sizes], label_bytes: int) -> tuple[Item, ...]:
    """Disk of the stores: rows × what a row takes; headers and the index are a few kB."""
    rows, pairs = request.tokens + request.n_held_out, zip(request.sites, sizes, strict=True)
    shapes = {site: ShardShape(1, size.d_in, request.dtype, label_bytes) for site, size in pairs}
    sides = f"{counted(request.tokens, 'training token')} and {request.n_held_out:,} held-out"
    return tuple(Item(f"the store of {site}: {sides}", rows * shape.row_bytes()) for site, shape in shapes.items())
