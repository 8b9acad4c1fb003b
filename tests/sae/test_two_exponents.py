"""A value exponent beside the score's own: what it contains, who owns it, what keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cosae
from cosae import SAE, CosaeError
from cosae.sae import loss as losses
from cosae.sae.calibrate import calibrate
from cosae.sae.config import SAEConfig
from cosae.sae.fold import fold_decoder_norm, fold_input_scale
from cosae.sae.score import TWO_EXPONENTS
from cosae.sae.selector import SELECTORS
from cosae.sae.swap import swap_score
from cosae.train.arm import Arm
from cosae.train.step import ArmState, OptimizerConfig, train_step

D, F, K, B = 12, 30, 4, 40


def make_x(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(B, D, generator=draw) * (0.6 * torch.randn(B, 1, generator=draw)).exp() + 0.5


@torch.no_grad()
def make_sae(score: str = TWO_EXPONENTS, selector: str = "batch_topk", frame: str = "raw", **more: object) -> SAE:
    """Rows, biases and gates of its own, the same for every score; exponents as initialised."""
    sae = SAE.build(D, F, score, selector, K, 3, frame, n_groups=3, **more)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(6)
    sae.centre_D.copy_(torch.randn(D, generator=draw))
    sae.score.rows_FD.copy_(torch.randn(F, D, generator=draw))
    sae.decoder.rows_FD.copy_(torch.randn(F, D, generator=draw))
    sae.score.bias_F.copy_(0.05 * torch.randn(F, generator=draw))
    if selector == "jumprelu":
        sae.selector.log_threshold_F.copy_((0.2 + 0.3 * torch.rand(F, generator=draw)).log())
    if selector == "gated":
        sae.selector.r_mag_F.copy_(0.2 * torch.randn(F, generator=draw))
        sae.selector.b_mag_F.copy_(0.1 * torch.randn(F, generator=draw))
    return sae


@torch.no_grad()
def mixed(sae: SAE) -> SAE:
    """Exponents that differ where they can."""
    draw = torch.Generator().manual_seed(8)
    for name, middle in (("exponent", 0.2), ("value_exponent", 0.5), ("log_gain", 1.0)):
        held = getattr(sae.score, name)
        held.copy_(middle + 0.4 * torch.rand(held.shape, generator=draw))
    return sae


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> bool:
    return float((found - wanted).detach().abs().max()) <= tolerance * float(wanted.detach().abs().max())


@pytest.mark.parametrize("selector", SELECTORS)
def test_it_contains_the_inner_product(selector: str) -> None:
    """a = 1, δ = 0, b = 0: codes and gradients of unit rows; with b = ln |w| per feature those of the plain product."""
    x_BD = make_x()
    two = make_sae(selector=selector, a_init=1.0, value_exponent_init=0.0, b_init=0.0, a_owner="feature")
    for score in ("inner_unit", "inner"):
        one = make_sae(score, selector)
        if score == "inner":
            with torch.no_grad():
                two.score.log_gain.copy_(two.score.rows_FD.norm(dim=-1).log())
        assert near(two.encode(x_BD).to_dense(), one.encode(x_BD).to_dense())
        assert near(two(x_BD), one(x_BD))


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("score", ["inner_unit", "inner"])
def test_it_contains_the_unit_frame(selector: str, score: str) -> None:
    """a = 0, δ = 1: the unit frame's scores, its codes times |x − c| (what that frame puts back), its reconstruction,
    its training step on the raw loss, and its threshold."""
    x_BD = make_x()
    two = make_sae(selector=selector, a_init=0.0, value_exponent_init=1.0, b_init=0.0, a_owner="feature")
    one = make_sae(score, selector, frame="unit")
    if score == "inner":
        with torch.no_grad():
            two.score.log_gain.copy_(two.score.rows_FD.norm(dim=-1).log())
    assert near(two.scores(x_BD), one.scores(x_BD))
    for calibrated in (False, True):
        if calibrated:
            assert calibrate(two, x_BD).margin == pytest.approx(calibrate(one, x_BD).margin, rel=1e-5)
        codes, wanted = two.encode(x_BD), one.encode(x_BD)
        length_B1 = (x_BD - one.centre_D).norm(dim=-1)[:, None]
        assert torch.equal(codes.feature_E, wanted.feature_E)
        assert near(codes.to_dense(), wanted.to_dense() * length_B1)
        assert near(two.decode(codes), one.decode(wanted))
    dead_F = torch.arange(F) % 5 == 2
    found, known = (
        losses.terms_of(
            sae,
            sae.train_forward(x_BD),
            losses.LossConfig(space="raw"),
            variance=7.0,
            sparsity_weight=0.3,
            dead_F=dead_F,
        )
        for sae in (two, one)
    )
    for name in found:
        if name != "aux_k":  # its share of the residual's variance is in the frame's units
            assert float(found[name].detach()) == pytest.approx(float(known[name].detach()), rel=1e-5), name
    sum(value for name, value in found.items() if name != "aux_k").backward()
    sum(value for name, value in known.items() if name != "aux_k").backward()
    for name in ("decoder.rows_FD", "score.bias_F", "centre_D"):
        grad, wanted_grad = (dict(sae.named_parameters())[name].grad for sae in (two, one))
        assert near(grad, wanted_grad, 1e-4), name


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(
    "owners", [("feature", "feature"), ("group", "shared"), ("shared", "group"), ("fixed", "fixed")]
)
def test_owners_learn_in_every_selector(selector: str, owners: tuple[str, str], tmp_path: Path) -> None:
    """Gradients of the whole loss against float64 autograd of the definition; file, folds, calibration."""
    x_BD = make_x()
    named = {"a_owner": owners[0], "value_exponent_owner": owners[1]}
    sae = mixed(make_sae(selector=selector, **named))
    slow = mixed(make_sae(selector=selector, kernel="reference", **named)).double()
    dead_F = torch.arange(F) % 5 == 2
    for one, x in ((sae, x_BD), (slow, x_BD.double())):
        terms = losses.terms_of(
            one, one.train_forward(x), losses.LossConfig(), variance=7.0, dead_F=dead_F, sparsity_weight=0.3
        )
        torch.stack(list(terms.values())).sum().backward()
    for (name, found), wanted in zip(sae.named_parameters(), slow.parameters(), strict=True):
        assert float(wanted.grad.norm()) > 0, name
        assert float((found.grad.double() - wanted.grad).norm() / wanted.grad.norm()) < 1e-4, name
    learned = {name for name, _ in sae.score.named_parameters()}
    assert ("exponent" in learned, "value_exponent" in learned) == tuple(owner != "fixed" for owner in owners)
    calibrate(sae, x_BD)
    codes = sae.encode(x_BD)
    back = cosae.load(cosae.save(sae, tmp_path / "sae"))
    assert back.cfg == sae.cfg
    torch.testing.assert_close(back.state_dict(), sae.state_dict(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(back.encode(x_BD).value_E, codes.value_E)
    smaller = cosae.load(cosae.save(fold_decoder_norm(fold_input_scale(sae, 7.3)), tmp_path / "folded"))
    folded = smaller.encode(x_BD / 7.3)
    assert torch.equal(folded.feature_E, codes.feature_E)
    assert near(smaller.decode(folded) * 7.3, sae.decode(codes), 5e-5)


def test_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    """From a checkpoint's tensors and numbers; fixed and learned exponents alike."""
    x_ND = make_x()
    arm = Arm.of("two", TWO_EXPONENTS, d_sae=F, k=K, seed=0, lr=1e-2, a_owner="fixed", value_exponent_owner="feature")

    def fresh() -> ArmState:
        return ArmState.start(arm, arm.build(D, x_ND), 7.0, OptimizerConfig(warmup_steps=0))

    whole, resumed = fresh(), fresh()
    for step in range(6):
        train_step(whole, make_x(step), step, 1.0, 10**6)
        if step == 2:
            save_file({name: value.contiguous() for name, value in whole.tensors().items()}, tmp_path / "arm")
            numbers = json.loads(json.dumps(whole.numbers()))
    resumed.restore(load_file(tmp_path / "arm"), numbers)
    for step in range(3, 6):
        train_step(resumed, make_x(step), step, 1.0, 10**6)
    torch.testing.assert_close(resumed.tensors(), whole.tensors(), rtol=0, atol=0, equal_nan=True)
    assert float(whole.sae.scale_a) == 0.0
    assert float((whole.sae.value_exponent.detach() - 1).abs().max()) > 0


@pytest.mark.parametrize("owner", ["shared", "feature"])
@pytest.mark.parametrize("score", [TWO_EXPONENTS, "cosine"])
def test_a_window_s_gradient_is_that_of_choosing_anew(score: str, owner: str) -> None:
    """Finite differences of the loss that choose anew at each a, against the gradient with the window and without."""
    if score == "cosine" and owner == "feature":
        score = "cosine_per_feature"
    draw = torch.Generator().manual_seed(1)
    n, d, f = 6000, 16, 40
    feature_FD = torch.nn.functional.normalize(torch.randn(f, d, generator=draw), dim=-1)
    code_NF = (torch.rand(n, f, generator=draw) < 0.1) * torch.rand(n, f, generator=draw)
    x_ND = (code_NF @ feature_FD + 0.05 * torch.randn(n, d, generator=draw)) * torch.randn(n, 1, generator=draw).exp()

    def build(a: float, a_window: float = 0.0) -> SAE:
        owners = {"a_owner": owner} if score == TWO_EXPONENTS else {}
        sae = SAE.build(d, f, score, k=4, a_init=a, b_init=0.0, a_window=a_window, centre="zero", **owners).double()
        with torch.no_grad():
            sae.score.rows_FD.copy_(feature_FD)
            sae.decoder.rows_FD.copy_(feature_FD)
            sae.score.set_value_exponent(0.5)
        return sae

    def loss(sae: SAE) -> Tensor:
        return sae.train_forward(x_ND.double()).error[0].sum()

    def slope(sae: SAE) -> float:
        loss(sae).backward()
        grad = sae.score.exponent.grad
        assert grad is not None
        return float(grad.sum())

    a, step = 0.4, 0.02
    with torch.no_grad():
        wanted = float(loss(build(a + step)) - loss(build(a - step))) / (2 * step)
    without, found = slope(build(a)), slope(build(a, 0.1))
    assert abs(found - wanted) < 0.05 * abs(without - wanted)
    plain, windowed = build(a), build(a, 0.1)
    assert torch.equal(windowed.encode(x_ND[:500]).to_dense(), plain.encode(x_ND[:500]).to_dense())
    assert float(loss(windowed).detach()) == pytest.approx(float(loss(plain).detach()), rel=1e-12)


def test_a_plain_start_reconstructs_at_any_size() -> None:
    """By "auto" the gain starts where codes have about the size of what they rebuild, whatever the exponents."""
    for scale in (0.01, 1.0, 100.0):
        x_BD = make_x() * scale
        for a, delta in ((0.0, 1.0), (0.5, 0.5), (0.0, 0.0), (1.0, 0.0)):
            sae = SAE.build(D, F, TWO_EXPONENTS, k=K, a_init=a, value_exponent_init=delta, sample=x_BD)
            recon_BD = sae.train_forward(x_BD).recon[0].detach()
            length = float(recon_BD.norm(dim=-1).mean() / x_BD.norm(dim=-1).mean())
            assert 0.3 < length < 3, (scale, a, delta, length)


def test_files_of_other_scores_say_nothing_of_it(tmp_path: Path) -> None:
    """What older versions read of them has not changed; this one reads theirs."""
    path = cosae.save(make_sae("cosine"), tmp_path / "sae")
    assert not {"a_owner", "value_exponent_owner"} & set(json.loads((path / "cfg.json").read_text())["sae"])
    assert cosae.load(path).value_exponent is None
    chosen = SAEConfig(D, F, TWO_EXPONENTS, k=K, value_exponent_owner="group")
    assert chosen.to_dict()["value_exponent_owner"] == "group"


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"score": "cosine", "a_owner": "feature"}, "a_owner can be chosen for the score cosine_two_exponents alone"),
        ({"score": "inner", "value_exponent_owner": "shared"}, "value_exponent_owner can be chosen"),
        ({"a_owner": "base_delta"}, "a_owner must be one of shared, group, feature, fixed"),
        ({"value_exponent_owner": "global"}, "value_exponent_owner must be one of"),
        ({"value_exponent_owner": "group", "n_groups": F + 1}, "n_groups must be at most"),
        ({"a_window": 2.0}, "a_window must lie between 0"),
        ({"a_window": 0.2, "selector": "topk"}, "a_window needs the selector batch_topk"),
        ({"a_window": 0.2, "selector": "jumprelu"}, "a_window needs the selector batch_topk"),
        ({"a_window": 0.2, "a_owner": "fixed"}, "exponent that learns"),
        ({"a_window": 0.2, "score": "inner"}, "exponent that learns"),
    ],
)
def test_refused(named: dict[str, object], words: str) -> None:
    with pytest.raises(CosaeError, match=words):
        SAEConfig(**{"d_in": D, "d_sae": F, "k": K, "score": TWO_EXPONENTS, **named})  # type: ignore[arg-type]


def test_a_fixed_start_is_kept() -> None:
    sae = make_sae(a_owner="fixed", value_exponent_owner="fixed", a_init=0.25, value_exponent_init=0.5)
    assert float(sae.scale_a) == 0.25
    assert float(sae.value_exponent) == 0.5
    assert sae.scale_b.requires_grad


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_swapped_score_keeps_values_of_the_median_length(selector: str) -> None:
    """The same function where a and δ agree; else values agree at the median length."""
    x_BD = make_x()
    old = make_sae("cosine_per_feature", selector, a_init=0.3, b_init=1.0)
    calibrate(old, x_BD)
    same = swap_score(old, TWO_EXPONENTS, sample=x_BD, a_init=0.3, value_exponent_init=0.0, a_owner="feature")
    assert torch.equal(same.encode(x_BD).feature_E, old.encode(x_BD).feature_E)
    back = swap_score(swap_score(old, TWO_EXPONENTS, sample=x_BD, a_owner="feature"), "cosine", sample=x_BD, a_init=0.4)
    assert back.cfg == replace(old.cfg, score="cosine")
    other = swap_score(old, TWO_EXPONENTS, sample=x_BD, a_init=0.0, a_owner="feature", value_exponent_owner="fixed")
    assert abs(other.encode(x_BD).l0 - old.encode(x_BD).l0) < 0.2
    error, before = (float((x_BD - sae(x_BD)).square().sum().detach()) for sae in (other, old))
    assert error < 2 * before
    with pytest.raises(CosaeError, match="a_owner must be one of"):
        swap_score(old, TWO_EXPONENTS, refit=False, a_owner="mine")
