"""The contract for crosscoders: several sites in x, a frame for each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cosae import fit, load, save
from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.models.intervene.splice import spliced
from cosae.recipe import Recipe
from cosae.run.execute import Logs, execute
from cosae.sae import loss as losses
from cosae.sae.calibrate import calibrate
from cosae.sae.fold import fold_decoder_norm, fold_input_scale
from cosae.sae.frame import FRAMES, Sites, denormalize, normalize
from cosae.sae.model import SAE
from cosae.sae.selector import SELECTORS
from cosae.train.arm import parse_arm
from tests.support.combinations import D_SAE, MASKED, K, make_x
from tests.support.tiny import make_sequences
from tests.support.tiny_models import make_model

WIDTHS = (5, 7)
KINDS = [(frame, balanced) for frame in FRAMES for balanced in (False, True) if frame == "raw" or not balanced]
LIVE = [row for row in range(24) if row not in MASKED]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def loud(x_BD: Tensor) -> Tensor:
    """The second site forty times as loud as the first."""
    return x_BD * torch.tensor([1.0] * WIDTHS[0] + [40.0] * WIDTHS[1])


@torch.no_grad()
def make(frame: str, balanced: bool, selector: str = "batch_topk", kernel: str = "auto", score: str = "cosine") -> SAE:
    sample = loud(make_x(seed=9, tokens=300))
    sae = SAE.build(
        12, D_SAE, score, selector, K, 0, frame, sites=WIDTHS, balanced=balanced, kernel=kernel, sample=sample
    )
    draw = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return sae


@pytest.mark.parametrize(("frame", "balanced"), KINDS)
def test_each_site_has_its_own_frame(frame: str, balanced: bool) -> None:
    """A site's part of z is what a frame of that site alone makes of it, up to a constant."""
    sae, x_BD = make(frame, balanced), loud(make_x())
    z_BD = sae._framed(x_BD).z_BD.detach()
    parts = [one.split(WIDTHS, -1) for one in (z_BD, x_BD, sae.centre_D.detach())]
    for part, x, c, m in zip(*parts, sae.site_scale_P, strict=True):
        alone = normalize(frame, x, c).z_BD
        factor = {"raw": 1 / m, "unit": 2**-0.5, "layer_norm": 1.0}[frame]
        torch.testing.assert_close(part[LIVE], alone[LIVE] * factor, rtol=1e-4, atol=1e-5)
    lengths = Sites(WIDTHS, sae.site_scale_P).lengths(z_BD[LIVE]).mean(0)
    assert (float(lengths[1] / lengths[0]) < 3) == (frame != "raw" or balanced)


@pytest.mark.parametrize(("frame", "balanced"), KINDS)
def test_reconstruction_save_and_folds(frame: str, balanced: bool, tmp_path: Path) -> None:
    sae, x_BD = make(frame, balanced), loud(make_x())
    calibrate(sae, loud(make_x(seed=9, tokens=300)))
    framed, output = sae._framed(x_BD), sae.train_forward(x_BD)
    assert sae(x_BD).shape == x_BD.shape
    perfect = sae.decode(sae.encode(x_BD).with_values(sae.encode(x_BD).value_E * 0), framed.norm_stats)
    assert bool(perfect.isfinite().all())
    raw = losses.squared_error(output, output.error[0], output.recon[0], "raw")
    x_hat = denormalize(frame, output.recon[0], framed.norm_stats, sae.centre_D, sae.sites)
    torch.testing.assert_close(raw[LIVE], (x_BD - x_hat).square().sum(-1)[LIVE], rtol=1e-3, atol=1e-2)
    back = load(save(sae, tmp_path / "sae"))
    assert back.cfg == sae.cfg
    assert torch.equal(back(x_BD), sae(x_BD))
    for folded, scale in ((fold_decoder_norm(sae), 1.0), (fold_input_scale(sae, 3.7), 3.7)):
        torch.testing.assert_close(folded(x_BD / scale)[LIVE] * scale, sae(x_BD)[LIVE], rtol=1e-3, atol=5e-2)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(("frame", "balanced"), KINDS)
def test_gradients_against_dense_float64(frame: str, balanced: bool, selector: str) -> None:
    x_BD = loud(make_x())
    found = []
    for sae, x in (
        (make(frame, balanced, selector, score="inner"), x_BD),
        (make(frame, balanced, selector, "reference", "inner").double(), x_BD.double()),
    ):
        for space in ("raw", "frame"):
            output = sae.train_forward(x)
            config = losses.LossConfig(space=space, reweight=1.0, aux_k=3)
            dead_F = torch.arange(D_SAE) % 5 == 2
            terms = losses.terms_of(sae, output, config, variance=7.0, dead_F=dead_F, sparsity_weight=0.3)
            torch.stack(list(terms.values())).sum().backward()
        found.append({name: p.grad.double() for name, p in sae.named_parameters()})
    for name, truth in found[1].items():
        assert float((found[0][name] - truth).norm() / truth.norm()) < 2e-4, name


def test_sites_of_a_model_are_joined_in_one_pass() -> None:
    model, sequences = make_model("llama"), make_sequences()
    joined = capture(model, sequences, "resid_post.0+mlp_out.1")["resid_post.0+mlp_out.1"]
    apart = capture(model, sequences, ["resid_post.0", "mlp_out.1"])
    assert torch.equal(joined.x_ND, torch.cat([one.x_ND for one in apart.values()], -1))
    torch.testing.assert_close(joined.norm_N, joined.x_ND.norm(dim=-1))
    with pytest.raises(CosaeError, match="may be named once"):
        capture(model, sequences, "resid_post.0+resid_post.0")
    with pytest.raises(CosaeError, match="crosscoder needs all"):
        spliced(model, {"resid_post.0+mlp_out.1": SAE.build(64, 16, selector="topk", k=2)}, tokens="all")


def test_a_run_on_joined_sites(tmp_path: Path) -> None:
    """Widths come from the model; FVE by site; the file knows its sites."""
    small = {"evaluation.held_out_tokens": 1500, "evaluation.calibration_tokens": 1000, "evaluation.probing": False}
    small |= {"filter.window_tokens": 1500, "training.steps": 6, "training.batch_tokens": 64, "data.context": 64}
    small |= {"training.buffer_tokens": 1024, "d_sae": 64, "k": 4, "evaluation.resamples": 20}
    arms = (parse_arm("standard,balanced=true,name=b,loss.space=frame"), parse_arm("cosine,frame=unit,name=u"))
    recipe = Recipe(arms=arms).changed({**small, "data.site": "resid_post.1+resid_post.4"})
    run = execute(recipe, tmp_path / "run", logs=Logs(progress=False))
    width = run.saes["b"].cfg.sites
    assert len(width) == 2
    assert sum(width) == run.saes["b"].d_in
    assert run.saes["b"].metadata["site"] == "resid_post.1+resid_post.4"
    found = run.evaluation["reconstruction"]["u"]["sinks_out"]["by_site"]
    assert len(found) == 2
    assert all(value < 1 for value in found)


def test_columns_of_a_tensor_are_sites() -> None:
    x_ND = loud(make_x(seed=3, tokens=1000))
    run = fit(x_ND, ["cosine,sites=5+7,frame=unit,name=c"], d_sae=32, k=4, steps=20, batch_tokens=64, progress=False)
    assert run.saes["c"].cfg.sites == (5, 7)
    for text, words in (("sites=5+8", "sum to d_in = 12"), ("balanced=true", "several sites, A")):
        with pytest.raises(CosaeError, match=words):
            fit(x_ND, [f"cosine,{text},name=c"], d_sae=32, k=4, steps=20, batch_tokens=64, progress=False)
