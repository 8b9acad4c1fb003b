"""The whole training step on the sparse path beside the dense definition: every gradient, a hundred steps, the cost of
the dead, and what arms in lockstep share and hold."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cosae.activations.digest import chain, fingerprint
from cosae.kernels import Workspace
from cosae.kernels.cpu import native
from cosae.kernels.select import search
from cosae.sae import loss as losses
from cosae.sae.model import SAE
from cosae.sae.score import SCORES
from cosae.sae.selector import SELECTORS
from cosae.train.arm import Arm
from cosae.train.step import ArmState, Batch, OptimizerConfig, train_step
from cosae.types import Activations

D, F, K, B = 16, 72, 4, 64
DEAD = 9
NEVER = 10**9


def drawn(seed: int, n: int = B) -> Tensor:
    """(n, D) sparse sums of a planted dictionary, log-normal norms, off the origin."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(48, D, generator=torch.Generator().manual_seed(5)), dim=-1)
    code = torch.relu(torch.randn(n, 48, generator=draw) - 1.0)
    return 0.5 + code @ directions * torch.exp(0.4 * torch.randn(n, 1, generator=draw))


def build(score: str, selector: str, kernel: str = "auto", sunk: float = 50.0) -> SAE:
    """An SAE whose parameters are nowhere at their special values; the last DEAD features' biases are sunk."""
    sae = SAE.build(d_in=D, d_sae=F, score=score, selector=selector, k=K, seed=3, sample=drawn(99, 400), kernel=kernel)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            size = 0.02 if name == "selector.log_threshold_F" else 0.05
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))
        sae.score.bias_F[F - DEAD :] -= sunk
        if selector == "gated":
            sae.selector.b_mag_F.add_(0.3)
    return sae


@pytest.fixture(params=["compiled", "plain"])
def _loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "DENSE_SHARE", 1)
    if request.param == "plain":
        monkeypatch.setattr(native, "AVAILABLE", False)
    elif not native.AVAILABLE:
        pytest.skip("numba is not installed")


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a path asks for holds NaN (or a far index) until it writes there."""

    def poison(make):  # type: ignore[no-untyped-def]
        def made(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = make(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(torch.nan)
            return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).max // 2)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def all_gradients(sae: SAE, x_BD: Tensor, sparse: bool = False) -> dict[str, Tensor]:
    """Gradients of the sum of all terms, aux-k and penalties included."""
    dead_F = torch.arange(F) >= F - DEAD
    config = losses.LossConfig(aux_k=5, aux_coefficient=0.5)
    output = sae.train_forward(x_BD)
    terms = losses.terms_of(
        sae, output, config, variance=3.0, dead_F=dead_F, sparsity_weight=0.3, sparse_gradients=sparse
    )
    assert "aux_k" in terms
    torch.stack(list(terms.values())).sum().backward()
    return {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("_loops", "_poisoned")
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("score", SCORES)
def test_every_gradient_matches_dense_float64(score: str, selector: str) -> None:
    """Rows, bias, a, b, centre, decoder, thresholds and gates, with aux-k: within 1e-4 of each tensor's length."""
    x_BD = drawn(1)
    sunk = 0.1 if score == "cosine_two_exponents" else 0.5  # its scores begin as cosines
    found = all_gradients(build(score, selector, sunk=sunk), x_BD, sparse=True)
    wanted = all_gradients(build(score, selector, "reference", sunk).double(), x_BD.double())
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name
    for name in ("score.rows_FD", "decoder.rows_FD"):
        assert bool(wanted[name][F - DEAD :].any()), "aux-k must reach the dead"


def run_steps(score: str, selector: str, kernel: str, steps: int = 100) -> tuple[float, float]:
    """Last loss, and the share of features that were dead at the end, of `steps` steps from one start."""
    arm = Arm.of("arm", score, selector, d_sae=F, k=K, seed=3, kernel=kernel)
    sae = build(score, selector, kernel)
    state = ArmState.start(arm, sae, 3.0, OptimizerConfig(lr=1e-3, warmup_steps=0))
    numbers = {}
    for step in range(steps):
        numbers = train_step(state, drawn(1000 + step), step, 1.0, 40 * B)
    return float(numbers["loss"]), float(numbers["dead_frac"])


@pytest.mark.parametrize(
    ("score", "selector"),
    [
        ("inner", "batch_topk"),
        ("cosine", "batch_topk"),
        ("cosine_per_feature", "topk"),
        *(
            pytest.param(score, selector, marks=pytest.mark.slow)
            for score in SCORES
            for selector in ("batch_topk", "topk", "abs_topk")
        ),
    ],
)
def test_a_hundred_steps_stay_together(score: str, selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse path and definition from one start, aux-k running: final losses within 1e-4 relative."""
    monkeypatch.setattr(search, "DENSE_SHARE", 1)
    (fast, dead), (slow, _) = (run_steps(score, selector, kernel) for kernel in ("auto", "reference"))
    assert fast == pytest.approx(slow, rel=1e-4)
    assert dead > 0, "aux-k must have run"


def flops(n_dead: int) -> int:
    """Multiply-adds × 2 in dense products of aux-k and its gradients."""
    sae = build("cosine", "batch_topk")
    output = sae.train_forward(drawn(1))
    dead_F = torch.arange(F) >= F - n_dead
    with FlopCounterMode(display=False) as counter:
        losses.aux_k(sae, output, dead_F, losses.LossConfig(), sparse_gradients=True).backward()
    return int(counter.get_total_flops())


def test_aux_k_costs_what_its_dead_features_cost() -> None:
    """Scores, reconstructing and two gradients each: at most six products with the dead rows, none with the living."""
    per_feature = 2 * B * D
    assert 2 * per_feature <= flops(1) <= 6 * per_feature
    assert flops(30) <= 30 * 6 * per_feature


def test_gradients_of_the_dead_come_back_as_their_rows() -> None:
    """Alone aux-k's are sparse; in the sum of all terms they are the dense ones, to the bit of an addition."""
    sae, x_BD = build("cosine", "batch_topk"), drawn(1)
    dead_F = torch.arange(F) >= F - DEAD
    alone = losses.aux_k(sae, sae.train_forward(x_BD), dead_F, losses.LossConfig(), sparse_gradients=True)
    for gradient in torch.autograd.grad(alone, [sae.score.rows_FD, sae.decoder.rows_FD]):
        assert gradient.is_sparse
        assert gradient.coalesce().indices().unique().tolist() == list(range(F - DEAD, F))
    sparse = all_gradients(build("cosine", "batch_topk"), x_BD, sparse=True)
    dense = all_gradients(build("cosine", "batch_topk"), x_BD, sparse=False)
    for name, gradient in dense.items():
        torch.testing.assert_close(sparse[name], gradient, rtol=1e-6, atol=1e-9)


def test_the_batchs_facts_are_those_of_each_arm() -> None:
    """A step on shared facts is the step on x, to the bit; padding is left out of the spread."""
    x_BD = drawn(1)
    x_BD[7] = 0.0
    both = []
    for rows in (x_BD, Batch.of(x_BD)):
        arm = Arm.of("arm", "cosine", d_sae=F, k=K, seed=3, input_noise=1.0)
        state = ArmState.start(arm, build("cosine", "batch_topk"), 3.0, OptimizerConfig(lr=1e-3))
        both.append((train_step(state, rows, 0, 1.0, NEVER), state.sae.state_dict()))
    assert {k: float(v) for k, v in both[0][0].items()} == {k: float(v) for k, v in both[1][0].items()}
    for name, value in both[0][1].items():
        assert torch.equal(value.nan_to_num(nan=5.0), both[1][1][name].nan_to_num(nan=5.0))
    live_BD = x_BD[x_BD.any(-1)]
    wanted = (live_BD - live_BD.mean(0)).square().sum()
    assert float(Batch.of(x_BD).spread) == pytest.approx(float(wanted), rel=1e-5)


def test_a_fingerprint_chains_as_its_batch_does() -> None:
    batch = Activations.bare(drawn(1))
    assert chain(bytes(32), batch) == chain(bytes(32), fingerprint(batch))
    other = replace(batch, doc_N=batch.doc_N + 1)
    assert fingerprint(other) != fingerprint(batch)


def held_bytes() -> int:
    """Bytes of all storages that tensors known to the garbage collector hold."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # only these have memory of their own: tracers leave fake tensors about, and isinstance would ask lazy proxies
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type != "meta" and not thing.is_sparse:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_between_steps_an_arm_holds_its_parameters_and_moments_alone() -> None:
    """No gradient, graph or work buffer of its own outlives a step: lockstep needs one arm's of those."""
    x_BD = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    before, n_arms, states, workspace = held_bytes(), 3, [], Workspace()
    for seed in range(n_arms):
        sae = SAE.build(d_in=32, d_sae=2048, score="cosine", k=4, seed=seed, sample=x_BD)
        states.append(ArmState.start(Arm.of("arm", seed=seed), sae, 1.0, OptimizerConfig()))
        states[-1].cache.workspace = workspace
    built = held_bytes() - before
    for step in range(2):
        for state in states:
            train_step(state, x_BD, step, 1.0, NEVER)
            assert all(p.grad is None for p in state.sae.parameters())
    matrix = 2048 * 32 * 4
    assert built >= n_arms * 6 * matrix
    work = 64 * 2048 * 4 + 2 * matrix  # the search's buffer and the last arm's gradients, for the next to write over
    assert held_bytes() - before - built < work + matrix
    workspace.clear()
    assert held_bytes() - before - built < matrix
