"""What several processes train is what one trains: kept sets, losses and parameters, over scores, selectors, frames."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.kernels import ALONE, Peers
from cosae.sae.model import SAE, TrainOutput
from cosae.sae.parts import cut_, joined, per_feature
from cosae.train.arm import Arm
from cosae.train.parallel.config import ParallelConfig
from cosae.train.parallel.mesh import MeshRanks
from cosae.train.parallel.mesh import joined as joined_ranks
from cosae.train.step import ArmState, Batch, OptimizerConfig, train_step
from tests.support.combinations import D_SAE, Combination, K, make_sae, make_x
from tests.support.ranks import run_ranks

CASES = [
    Combination("raw", "inner", "batch_topk", "plain"),
    Combination("raw", "cosine", "batch_topk", "prefixes_norm_restoring"),
    Combination("layer_norm", "cosine_grouped", "topk", "prefixes"),
    Combination("raw", "cosine_per_feature", "abs_topk", "norm_restoring"),
    Combination("unit", "inner_unit", "jumprelu", "plain"),
    Combination("raw", "cosine_base_delta", "gated", "prefixes"),
    Combination("layer_norm", "cosine_two_exponents", "batch_topk", "plain"),
]
ROWS = 51  # on two and four ranks the parts are uneven
DEAD_AFTER = 100


@dataclass
class Trained:
    """Of one run: losses, digests of the kept sets and norms by step, all tensors at the end."""

    losses: list[dict[str, float]]
    kept: list[str]
    tensors: dict[str, Tensor]


def _kept(output: TrainOutput, peers: Peers) -> Tensor:
    """(E,) int64 of the whole batch's kept entries that are this process'."""
    entries, width = output.selection.entries, peers.feature_ranks * output.terms.n_features
    token_E = entries.token_E + peers.rows(ROWS).start
    return token_E * width + entries.feature_E + peers.feature_rank * output.terms.n_features


def trained(c: Combination, steps: int, kernel: str, peers: Peers = ALONE, ranks: Any = None) -> Trained:
    """One arm for some steps; with noise on the norms, a window where it can be, and features that die."""
    sae = make_sae(c, kernel=kernel)
    sae.decoder.rows_FD.data /= torch.linalg.vector_norm(sae.decoder.rows_FD.data, dim=1, keepdim=True)
    if c.selector == "batch_topk" and c.score == "cosine":
        sae.selector.a_window = 0.2
    asleep = [3, 11, 20, 28]
    scores_BF = sae.scores(torch.cat([make_x(step, ROWS) for step in range(4)]))[:, asleep]
    if c.selector != "jumprelu":  # its thresholds keep some asleep
        sae.score.bias_F.data[asleep] -= 1.05 * scores_BF.amax(0)
    names = [*per_feature(sae), "age_F"]
    if peers.feature_ranks > 1:
        cut_(sae, peers.feature_rank, peers.feature_ranks)
    arm = Arm.of("arm", c.score, c.selector, k=K, seed=1, input_noise=1.2)
    arm = arm.changed({"loss.reweight": 1.0, "loss.aux_k": 3})
    state = ArmState.start(arm, sae, 40.0, OptimizerConfig(lr=3e-3, clip=0.05), peers)
    outputs: list[TrainOutput] = []
    forward = sae.train_forward
    sae.train_forward = lambda *a: outputs.append(forward(*a)) or outputs[-1]  # type: ignore[method-assign,func-returns-value]
    losses, kept = [], []
    for step in range(steps):
        x_BD = make_x(step, ROWS)
        sink_B = torch.linalg.vector_norm(x_BD, dim=1) > 30
        losses.append(
            {k: float(v) for k, v in train_step(state, Batch.of(x_BD, sink_B), step, 1.0, DEAD_AFTER).items()}
        )
        flat_E = _kept(outputs.pop(), peers)
        every = ranks.gather(flat_E) if ranks is not None else [flat_E]
        kept.append(hashlib.sha256(torch.cat(every).unique().numpy().tobytes()).hexdigest())
    tensors = {name: value.detach() for name, value in state.tensors().items()}
    parts = ranks.gather(tensors)[: peers.feature_ranks] if ranks is not None else [tensors]
    return Trained(losses, kept, joined(parts, names))


def on_mesh(config: ParallelConfig, cases: list[Combination], steps: int, kernel: str) -> list[Trained]:
    with joined_ranks(config, "cpu") as ranks:
        assert isinstance(ranks, MeshRanks)
        return [trained(c, steps, kernel, ranks.peers, ranks) for c in cases]


def assert_same(c: Combination, one: Trained, several: Trained) -> None:
    assert several.kept == one.kept, c
    for step, (mine, theirs) in enumerate(zip(several.losses, one.losses, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert math.isclose(mine[name], value, rel_tol=2e-5, abs_tol=2e-6), (str(c), step, name, mine[name], value)
    assert several.tensors.keys() == one.tensors.keys()
    for name, value in one.tensors.items():
        found = several.tensors[name]
        assert found.shape == value.shape, (str(c), name)
        near = torch.allclose(found.double(), value.double(), rtol=1e-4, atol=1e-4, equal_nan=True)
        assert near, (str(c), name, float((found.double() - value.double()).abs().max()))


@pytest.mark.parametrize("mesh", ["data=2", "feature=2"])
def test_two_processes_train_what_one_trains(mesh: str, tmp_path: Path) -> None:
    steps = 10
    answers = run_ranks(2, tmp_path, on_mesh, ParallelConfig.parse(mesh), CASES, steps, "auto")
    for place, c in enumerate(CASES):
        one = trained(c, steps, "auto")
        died = any("loss_aux_k" in losses for losses in one.losses)
        assert died or c.selector == "abs_topk", "nothing died: a part goes untested"
        for answer in answers:
            assert_same(c, one, answer[place])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("mesh", ["data=4", "data=2,feature=2", "feature=3", "data=3,feature=2"])
def test_more_processes_train_what_one_trains(mesh: str, kernel: str, tmp_path: Path) -> None:
    config = ParallelConfig.parse(mesh)
    answers = run_ranks(config.n, tmp_path, on_mesh, config, CASES, 50, kernel)
    for place, c in enumerate(CASES):
        one = trained(c, 50, kernel)
        for answer in answers:
            assert_same(c, one, answer[place])


def test_parts_are_the_whole() -> None:
    for c in CASES:
        whole = make_sae(c)
        names = per_feature(whole)
        parts = [cut_(make_sae(c), place, 3).state_dict() for place in range(3)]
        assert {name for name, value in whole.state_dict().items() if value.shape[:1] == (D_SAE,)} == set(names)
        for name, value in joined(parts, names).items():
            assert torch.equal(value, whole.state_dict()[name]) or bool(value.isnan().all()), name


def test_transcoders_share_batches_alone() -> None:
    sae = SAE.build(4, 8, k=2, d_out=6)
    with pytest.raises(CosaeError, match="not for transcoders"):
        cut_(sae, 0, 2)
