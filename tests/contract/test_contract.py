"""One contract for every frame × score × selector × decoder.

The quick suite runs combinations in which every two parts meet, `-m slow` the rest of the grid.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cosae import Codes, load, save
from cosae.sae import loss as losses
from cosae.sae.calibrate import calibrate, measure_l0
from cosae.sae.fold import fold_decoder_norm, fold_input_scale
from cosae.sae.frame import FRAMES
from cosae.sae.model import SAE
from cosae.sae.score import SCORES
from cosae.sae.selector import CALIBRATED_SELECTORS, SELECTORS
from cosae.types import Activations
from tests.support import by_hand, passes
from tests.support.combinations import (
    COMBINATIONS,
    D_IN,
    D_SAE,
    DECODERS,
    MASKED,
    TOKENS,
    Combination,
    K,
    every_combination,
    make_sae,
    make_x,
    some_combinations,
)

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of SAEs are saved here; that files reach the disk is for tests/sae/test_file.py."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the SAEs of all combinations, one after the other."""
    return tmp_path_factory.mktemp("shelf") / "sae"


LIVE = [row for row in range(TOKENS) if row not in MASKED]


def state_bytes(sae: SAE) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in sae.state_dict().items()}


def assert_same_codes(one: Codes, two: Codes) -> None:
    """To the bit."""
    for name in ("offset_B1", "feature_E", "value_E"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def assert_near(found: Tensor, wanted: Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    """Largest difference over the largest wanted value."""
    wanted = torch.as_tensor(wanted).double()
    assert found.shape == wanted.shape
    assert float((found.detach().double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max().clamp_min(1.0))


def test_the_grid_is_whole() -> None:
    assert len(set(COMBINATIONS)) == len(FRAMES) * len(SCORES) * len(SELECTORS) * len(DECODERS) == 480


@every_combination
def test_codes_and_reconstructions_by_hand(combination: Combination) -> None:
    """Inference (calibrated and not) and every prefix in training, against numpy float64."""
    x_BD = make_x()
    x = x_BD.double().numpy()
    for calibrated in (True, False):
        sae = make_sae(combination, calibrated=calibrated)
        dense, z, scale, shift = by_hand.encode(sae, x, training=False)
        assert 30 < (dense != 0).sum() < 0.6 * dense.size
        codes = sae.encode(x_BD)
        assert torch.equal(codes.to_dense() != 0, torch.as_tensor(dense != 0))
        assert_near(codes.to_dense(), dense)
        x_hat = by_hand.denormalize(sae, by_hand.reconstruct(sae, dense, z)[-1], scale, shift)
        assert_near(sae.decode(codes)[LIVE], x_hat[LIVE], 3e-5)
        assert_near(sae(x_BD), sae.decode(codes).detach(), 0.0)
    dense, z, _, _ = by_hand.encode(sae, x, training=True)
    output = sae.train_forward(x_BD)
    assert len(output.recon) == len(combination.prefixes)
    for found, wanted in zip(output.recon, by_hand.reconstruct(sae, dense, z), strict=True):
        assert_near(found[LIVE], wanted[LIVE], 3e-5)
        assert not found[list(MASKED)].any()


@every_combination
def test_shapes_and_dtypes(combination: Combination) -> None:
    sae = make_sae(combination)
    x_BD = make_x()
    flat = sae.encode(x_BD)
    assert flat.offset_B1.shape == (TOKENS + 1,)
    assert flat.offset_B1.dtype == flat.feature_E.dtype == torch.int64
    assert flat.value_E.dtype == torch.float32
    assert flat.value_E.shape == flat.feature_E.shape == flat.token_E.shape
    assert bool((flat.value_E != 0).all())
    pairs = flat.token_E * D_SAE + flat.feature_E
    assert bool((pairs[1:] > pairs[:-1]).all()), "sorted by token, then feature"
    cube = sae.encode(x_BD.reshape(2, TOKENS // 2, D_IN))
    assert_same_codes(cube, flat)
    assert cube.to_dense().shape == (2, TOKENS // 2, D_SAE)
    assert torch.equal(sae.decode(cube), sae.decode(flat).reshape(2, TOKENS // 2, D_IN))
    one = sae.encode(x_BD[0])
    assert one.to_dense().shape == (D_SAE,)
    assert sae(x_BD[0]).shape == (D_IN,)
    for shape in ((0, D_IN), (2, 0, D_IN)):
        empty = sae.encode(torch.zeros(shape))
        assert empty.to_dense().shape == (*shape[:-1], D_SAE)
        assert sae.decode(empty).shape == shape
        assert empty.l0 == 0.0
    assert sae.decode(flat).dtype == torch.float32


@every_combination
def test_half_precision_inputs(combination: Combination) -> None:
    """Halves are widened at the door: the same as widening them by hand, to the bit."""
    sae = make_sae(combination)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x_BD = make_x().to(dtype)
        codes = sae.encode(x_BD)
        assert codes.value_E.dtype == torch.float32
        assert_same_codes(codes, sae.encode(x_BD.float()))
        assert sae(x_BD).dtype == torch.float32


def total_loss(sae: SAE, x_BD: Tensor, space: str, reweight: float) -> tuple[Tensor, losses.TrainOutput]:
    config = losses.LossConfig(space=space, reweight=reweight, aux_k=3)
    output = sae.train_forward(x_BD)
    dead_F = torch.arange(D_SAE) % 5 == 2
    terms = losses.terms_of(sae, output, config, variance=7.0, dead_F=dead_F, sparsity_weight=0.3)
    wanted = {"reconstruction", "aux_k"}
    wanted |= {"sparsity"} if sae.cfg.selector in ("jumprelu", "gated") else set()
    wanted |= {"gate"} if sae.cfg.selector == "gated" else set()
    assert set(terms) == wanted
    assert all(bool(t > 0) for t in terms.values())
    return torch.stack(list(terms.values())).sum(), output


@every_combination
def test_gradients_against_dense_float64(combination: Combination) -> None:
    """Every parameter's gradient of the whole loss: fp32 fast path against float64 autograd of the definition."""
    for space, reweight in (("raw", 2.0), ("frame", 1.0)):
        fast = make_sae(combination)
        slow = make_sae(combination, kernel="reference").double()
        loss, output = total_loss(fast, make_x(), space, reweight)
        loss.backward()
        wanted, definition = total_loss(slow, make_x().double(), space, reweight)
        wanted.backward()
        for name in ("token_E", "feature_E"):
            assert torch.equal(getattr(output.selection.entries, name), getattr(definition.selection.entries, name))
        assert float(((loss.double() - wanted) / wanted).abs().detach()) < 1e-5
        for (name, found), (_, truth) in zip(fast.named_parameters(), slow.named_parameters(), strict=True):
            assert truth.grad is not None, name
            if combination.frame == "unit" and "exponent" in name:  # r = 1, ln r = 0: a has no effect
                assert float(found.grad.abs().max()) < 1e-5 * float(fast.score.rows_FD.grad.norm())
                continue
            assert float(truth.grad.norm()) > 0, name
            assert found.grad is not None, name
            assert found.grad.dtype == torch.float32
            size = truth.grad.norm()
            if combination.norm_restoring and truth.ndim == 0:
                # a restored length forgets the codes' common scale: a shared a or b is left with a sum that cancels
                size = size.clamp_min(0.02 * float(slow.score.rows_FD.grad.norm()))
            error = float((found.grad.double() - truth.grad).norm() / size)
            assert error < 1e-4, f"{name}: {error:.2e}"


@every_combination
def test_kernels_agree(combination: Combination) -> None:
    x_BD = make_x(seed=1)
    for calibrated in (True, False):
        fast = make_sae(combination, seed=1, calibrated=calibrated).encode(x_BD)
        slow = make_sae(combination, seed=1, calibrated=calibrated, kernel="reference").encode(x_BD)
        assert torch.equal(fast.offset_B1, slow.offset_B1)
        assert torch.equal(fast.feature_E, slow.feature_E)
        torch.testing.assert_close(fast.value_E, slow.value_E, rtol=2e-5, atol=2e-6)


@every_combination
def test_save_and_load_are_the_identity(combination: Combination, shelf: Path) -> None:
    sae = make_sae(combination)
    sae.metadata = {"site": "resid_post.3", "seed": 1, "nested": {"a": [1.5, None]}}
    back = load(save(sae, shelf))
    assert back.cfg == sae.cfg
    assert back.metadata == sae.metadata
    assert state_bytes(back) == state_bytes(sae)
    x_BD = make_x()
    assert_same_codes(back.encode(x_BD), sae.encode(x_BD))
    assert torch.equal(back(x_BD), sae(x_BD))


@every_combination
def test_folds_leave_outputs(combination: Combination, shelf: Path) -> None:
    """Both folds, in training, at inference and through a file; the original stays as it was."""
    x_BD = make_x()
    for calibrated in (True, False):
        sae = make_sae(combination, calibrated=calibrated)
        before = state_bytes(sae)
        length_F = sae.decoder.rows_FD.detach().norm(dim=-1)
        unit = fold_decoder_norm(sae)
        torch.testing.assert_close(unit.decoder.rows_FD.detach().norm(dim=-1), torch.ones(D_SAE))
        codes_factor_F = torch.ones(D_SAE) if combination.norm_restoring else length_F
        smaller = fold_input_scale(sae, 3.7)
        assert state_bytes(sae) == before
        codes = sae.encode(x_BD)
        wanted, x_hat = codes.to_dense().detach(), sae.decode(codes).detach()
        kept = sae.train_forward(x_BD).selection.fired().entries.feature_E
        for folded, scale, factor in ((unit, 1.0, codes_factor_F), (smaller, 3.7, torch.ones(D_SAE))):
            codes = folded.encode(x_BD / scale)
            assert torch.equal(wanted != 0, codes.to_dense() != 0)
            assert_near(codes.to_dense(), wanted * factor, 2e-5)
            assert_near(folded.decode(codes) * scale, x_hat, 5e-5)
            assert torch.equal(folded.train_forward(x_BD / scale).selection.fired().entries.feature_E, kept)
        if combination.decoder == "plain":
            stored = load(save(unit, shelf))
            assert_same_codes(stored.encode(x_BD), unit.encode(x_BD))
            assert (
                stored.train_forward(x_BD).selection.entries.feature_E.tolist()
                == unit.train_forward(x_BD).selection.entries.feature_E.tolist()
            )
        again = fold_decoder_norm(fold_input_scale(unit, 0.5))
        assert_near(again(x_BD * 2) / 2, x_hat, 5e-5)


@every_combination
def test_evaluation_changes_nothing(combination: Combination) -> None:
    """Not one byte of state, not the training mode, no new attribute, no gradient, not the global random state."""
    sae = make_sae(combination)
    x_BD = make_x()
    before, attributes, random = state_bytes(sae), set(vars(sae)), torch.get_rng_state()
    codes = sae.encode(x_BD)
    sae.decode(codes)
    sae(x_BD)
    sae.scores(x_BD)
    measure_l0(sae, x_BD)
    losses.terms_of(sae, sae.train_forward(x_BD), losses.LossConfig(), variance=1.0)
    passes.measure(sae, Activations.bare(x_BD[LIVE]))
    assert state_bytes(sae) == before
    assert set(vars(sae)) == attributes
    assert sae.training
    assert all(p.grad is None for p in sae.parameters())
    assert torch.equal(random, torch.get_rng_state())


@every_combination
def test_masked_rows_encode_to_nothing(combination: Combination) -> None:
    """Even where −c is a perfect match for a feature and the bias is large; everything stays finite."""
    sae = make_sae(combination)
    with torch.no_grad():
        sae.score.rows_FD[3] = -sae.centre_D
        sae.score.bias_F.fill_(50.0)
    x_BD = make_x()
    codes = sae.encode(x_BD)
    assert not codes.count_B[list(MASKED)].any()
    assert bool(codes.count_B[LIVE].all())
    assert bool(torch.isfinite(codes.value_E).all())
    assert bool(torch.isfinite(sae(x_BD)).all())
    scores = sae.scores(x_BD)
    assert bool((scores[list(MASKED)] == -math.inf).all())
    for rows in (x_BD, torch.zeros(3, D_IN)):
        output = sae.train_forward(rows)
        terms = losses.terms_of(
            sae, output, losses.LossConfig(reweight=2.0), variance=1.0, dead_F=torch.ones(D_SAE) > 0
        )
        torch.stack(list(terms.values())).sum().backward()
        grads = [p.grad for p in sae.parameters() if p.grad is not None]
        assert all(bool(torch.isfinite(g).all()) for g in grads)
        sae.zero_grad(set_to_none=True)
    assert len(sae.encode(torch.zeros(3, D_IN)).feature_E) == 0


@every_combination
def test_masked_rows_change_no_gradient(combination: Combination) -> None:
    """Padding is as good as absent: the loss and its gradients are those of the live rows alone."""
    with_rows, without = make_sae(combination), make_sae(combination)
    one, _ = total_loss(with_rows, make_x(), "raw", 1.0)
    two, _ = total_loss(without, make_x()[LIVE], "raw", 1.0)
    one.backward()
    two.backward()
    assert abs(float((one - two).detach())) < 1e-5 * float(two.detach())
    for (name, p), q in zip(with_rows.named_parameters(), without.parameters(), strict=True):
        if combination.frame == "unit" and "exponent" in name:
            continue
        error = float((p.grad - q.grad).norm() / q.grad.norm())
        assert error < 2e-5, f"{name}: {error:.2e}"


@some_combinations(lambda c: c.selector != "abs_topk" or c.decoder == "plain")
def test_tokens_do_not_see_each_other(combination: Combination) -> None:
    """A calibrated SAE encodes a token alone as it does in a batch."""
    sae = make_sae(combination)
    assert sae.calibrated
    x_BD = make_x()
    whole = sae.encode(x_BD).to_dense()
    parts = torch.cat([sae.encode(rows).to_dense() for rows in x_BD.split([1, 2, 13, 8])])
    assert torch.equal(whole != 0, parts != 0)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


@every_combination
def test_all_features_may_be_kept(combination: Combination) -> None:
    """k = d_sae: top-k keeps every positive score; calibrating at it leaves a usable threshold."""
    prefixes, norm_restoring = DECODERS[combination.decoder]
    sae = SAE.build(
        D_IN, 9, combination.score, combination.selector, 9, 0, combination.frame,
        prefixes=tuple(p for p in prefixes if p < 9), norm_restoring=norm_restoring, sample=make_x(),
    )  # fmt: skip
    x_BD = make_x(seed=2)
    scores = sae.scores(x_BD)[LIVE]
    for _ in range(2):
        found = calibrate(sae, x_BD)
        assert found.l0 == measure_l0(sae, x_BD)
        if combination.selector == "abs_topk":
            assert sae.encode(x_BD).count_B.tolist() == [0 if b in MASKED else 9 for b in range(TOKENS)]
        elif combination.selector != "gated":
            assert torch.equal(sae.encode(x_BD).to_dense()[LIVE] != 0, scores > 0)
        assert combination.selector in ("topk", "abs_topk") or bool(sae.threshold.isfinite().all())
        assert combination.selector != "jumprelu" or bool(sae.selector.log_threshold_F.isfinite().all())


@some_combinations(lambda c: c.selector in CALIBRATED_SELECTORS)
def test_calibration_hits_the_count(combination: Combination) -> None:
    """Exactly round(k · N) entries for k = 4 and for another target, N the live tokens."""
    x_BD = make_x(seed=3, tokens=200)
    live = 200 - len(MASKED)
    sae = make_sae(combination, calibrated=False)
    for target in (None, 2.6, 1.0):
        found = calibrate(sae, x_BD, target)
        wanted = round((K if target is None else target) * live)
        assert len(sae.encode(x_BD).feature_E) == wanted
        assert found.l0 == wanted / live
        assert found.tokens == 200


@some_combinations(lambda c: c.selector in CALIBRATED_SELECTORS and c.decoder == "plain")
def test_calibration_and_folding_commute(combination: Combination) -> None:
    """The threshold found after a fold chooses what the folded threshold chooses."""
    x_BD = make_x(seed=4, tokens=60)
    sae = make_sae(combination, calibrated=False)
    late = fold_decoder_norm(sae)
    calibrate(late, x_BD)
    calibrate(sae, x_BD)
    early = fold_decoder_norm(sae)
    assert torch.equal(early.encode(x_BD).feature_E, late.encode(x_BD).feature_E)
    assert torch.equal(early.encode(x_BD).offset_B1, late.encode(x_BD).offset_B1)


@some_combinations(lambda c: c.selector in CALIBRATED_SELECTORS and c.decoder == "plain")
def test_the_threshold_itself_is_not_above_it(combination: Combination) -> None:
    """Everywhere `>`: a score that equals the threshold does not fire, the next smaller threshold lets it."""
    sae = make_sae(combination, kernel="reference")
    x_BD = make_x()
    scores = sae.scores(x_BD[:1])[0]
    if combination.selector == "gated":
        with torch.no_grad():
            sae.selector.b_mag_F.fill_(100.0)
    feature = int(scores.argmax())
    value = scores[feature].detach()
    assert value > 0
    if combination.selector == "jumprelu":
        # θ = exp φ rounds: take the score to θ instead
        theta = sae.threshold[feature].detach()
        sae.score.bias_F.data[feature] += theta - value
        step = torch.finfo(torch.float32).eps * float(theta)
        bias = sae.score.bias_F.data[feature].clone()
        fired = []
        for ulp in range(-8, 9):
            sae.score.bias_F.data[feature] = bias + ulp * step
            s = float(sae.scores(x_BD[:1])[0, feature].detach())
            fired.append((s > float(theta), bool(sae.encode(x_BD[:1]).to_dense()[0, feature] != 0)))
        assert all(a == b for a, b in fired)
        assert {a for a, _ in fired} == {True, False}
        return
    sae.selector.threshold.copy_(value)
    assert not bool((sae.encode(x_BD[:1]).feature_E == feature).any())
    sae.selector.threshold.copy_(torch.nextafter(value, torch.tensor(0.0)))
    assert bool((sae.encode(x_BD[:1]).feature_E == feature).any())


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("score", SCORES)
def test_every_kernel_is_strict(kernel: str, score: str) -> None:
    """Each path by its own scores: set to a score that it gave, the threshold drops that entry and no smaller one."""
    sae = make_sae(Combination("raw", score, "batch_topk", "plain"), kernel=kernel)
    terms = sae.score.terms(sae._framed(make_x()))
    score_E = sae.selector.infer_select(terms, sae._kernel()).score_E.detach()
    for value in score_E.sort().values[[0, 10, 50]]:
        sae.selector.threshold.copy_(value)
        found = sae.selector.infer_select(terms, sae._kernel()).score_E.detach()
        assert torch.equal(found, score_E[score_E > value])


def content_of(sae: SAE, x_BD: Tensor) -> Tensor:
    """Scores less the bias, read from outside: two SAEs that differ in the bias alone."""
    with torch.no_grad():
        sae.score.bias_F.zero_()
    return sae.scores(x_BD).detach()


@some_combinations(lambda c: c.selector == "topk" and c.decoder == "plain")
@pytest.mark.parametrize("alpha", [0.25, 2.0, 1024.0, 0.37, 51.3])
def test_scaling_the_centred_input(combination: Combination, alpha: float) -> None:
    """content(c + α(x − c)) = α^a · content(x); in frames that divide by the length, α does nothing."""
    sae = make_sae(combination)
    with torch.no_grad():
        sae.centre_D.zero_()  # α · x is then exact in floating point for powers of two
    x_BD = make_x()[LIVE]
    if combination.frame == "layer_norm":
        x_BD = x_BD + 2.0
    once, scaled = content_of(sae, x_BD), content_of(sae, alpha * x_BD)
    exponent = sae.scale_a.detach() if combination.frame == "raw" else torch.zeros(())
    power_of_two = math.log2(alpha) == int(math.log2(alpha))
    if power_of_two and (combination.frame != "raw" or combination.score == "inner"):
        assert torch.equal(scaled, alpha * once if combination.frame == "raw" else once)
    else:
        wanted = once.double() * alpha ** exponent.double()
        # relative to what the score could be at most, since a cosine near 0 has no relative precision
        torch.testing.assert_close(scaled.double(), wanted, rtol=2e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("centre", [0.0, 0.7])
@pytest.mark.parametrize("score", SCORES)
def test_scaling_around_a_centre(score: str, centre: float) -> None:
    """The same in float64 with c ≠ 0: exact to 1e-12."""
    sae = make_sae(Combination("raw", score, "topk", "plain"), kernel="reference").double()
    with torch.no_grad():
        sae.centre_D.fill_(centre)
    x_BD = make_x()[LIVE].double()
    once = content_of(sae, x_BD)
    for alpha in (0.5, 3.3):
        scaled = content_of(sae, sae.centre_D.detach() + alpha * (x_BD - sae.centre_D.detach()))
        torch.testing.assert_close(scaled, once * alpha ** sae.scale_a.detach(), rtol=1e-10, atol=1e-12)


@every_combination
def test_codes_of_any_origin_decode(combination: Combination) -> None:
    """Dense, edited and sliced codes; where the frame took something out, `taken` must come along."""
    sae = make_sae(combination)
    x_BD = make_x()
    codes = sae.encode(x_BD)
    whole = sae.decode(codes)
    dense = codes.to_dense()
    rows = torch.tensor([1, 4, 20])
    needs_taken = combination.frame != "raw" or combination.norm_restoring
    assert codes.norm_stats is not None
    torch.testing.assert_close(sae.decode(dense, norm_stats=codes.norm_stats), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        sae.decode(dense[rows], norm_stats=codes.norm_stats[rows]), whole[rows], rtol=1e-5, atol=1e-5
    )
    if needs_taken:
        with pytest.raises(ValueError, match=r"norm_stats=codes\.norm_stats"):
            sae.decode(dense)
        with pytest.raises(ValueError, match="codes of 3"):
            sae.decode(dense[rows], norm_stats=codes.norm_stats)
    else:
        torch.testing.assert_close(sae.decode(dense), whole, rtol=1e-5, atol=1e-5)
    edited = codes.with_values(codes.value_E * 0)
    nothing = sae.decode(edited)
    assert bool(torch.isfinite(nothing).all())
    if combination.frame == "raw":
        torch.testing.assert_close(nothing, sae.centre_D.expand(TOKENS, -1))
    if not combination.norm_restoring:
        doubled = sae.decode(codes.with_values(codes.value_E * 2))
        torch.testing.assert_close(doubled - whole, whole - nothing, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"d_sae = {D_SAE}"):
        sae.decode(torch.zeros(2, D_SAE + 1))


@some_combinations(lambda c: c.norm_restoring)
def test_norm_restoring_restores(combination: Combination) -> None:
    """|ẑ| = |z| for every prefix of every token that has codes in it."""
    sae = make_sae(combination)
    output = sae.train_forward(make_x())
    lengths_B = output.framed.z_BD.norm(dim=-1)
    entries = output.selection.fired().entries
    for prefix, recon_BD in zip(combination.prefixes, output.recon, strict=True):
        has_B = torch.zeros(TOKENS, dtype=torch.bool)
        has_B[entries.token_E[entries.feature_E < prefix]] = True
        assert int(has_B.sum()) > 2
        torch.testing.assert_close(recon_BD[has_B].norm(dim=-1), lengths_B[has_B], rtol=1e-5, atol=1e-5)
        assert not recon_BD[~has_B].any()
