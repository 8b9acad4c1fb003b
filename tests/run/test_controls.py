"""Every line of the table of controls in docs/evaluate.md trains, and does what its row says."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch
import tyro

import cosae
from cosae.activations.synthetic import SyntheticSource, World
from cosae.cli.training import Train, build_recipe
from cosae.recipe import Recipe
from cosae.run.dataset.open import dataset_of
from cosae.run.execute import Logs, execute
from cosae.sae.calibrate import calibrate
from cosae.sae.frame import FRAMES
from cosae.sae.model import SAE
from cosae.sae.score import SCORES
from cosae.sae.swap import swap_score
from cosae.train.arm import Arm

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
WORLD = "log_normal:sigma=0.5,d_in=12,n_features=24,l0=2"
SMALL = ["--d-sae", "24", "--k", "3", "--batch", "32", "--quiet", "--set"]
SETTINGS = {
    "filter.window_tokens": 200,
    "training.buffer_tokens": 128,
    "evaluation.held_out_tokens": 200,
    "evaluation.calibration_tokens": 200,
}


def table() -> dict[str, list[str]]:
    """Row → its code spans."""
    part = PAGE.read_text(encoding="utf-8").split("## Controls as training options")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| ")][1:]
    return {row[0].strip(): re.findall(r"`([^`]+)`", row[1]) for row in rows}


def recipe_of(line: str, steps: int = 2) -> Recipe:
    world = [] if "--world" in line else ["--world", WORLD]
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    return build_recipe(
        tyro.cli(Train, args=["--out", "-", *line.split(), *world, "--steps", str(steps), *SMALL, *settings])
    )


def trained(line: str, steps: int = 2) -> dict[str, SAE]:
    saes = execute(recipe_of(line, steps), None, logs=Logs(progress=False), measured=False).saes
    for sae in saes.values():
        assert all(bool(torch.isfinite(value).all()) for value in sae.state_dict().values())
    return saes


def spans(start: str) -> list[str]:
    found = [span for name, listed in table().items() if name.startswith(start) for span in listed]
    assert found, f"no row starts with {start!r}"
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained standard SAE to start from."""
    return Path(cosae.save(trained("--arms standard")["standard"], tmp_path_factory.mktemp("first") / "standard"))


def test_every_row_of_the_table_is_tried_here() -> None:
    swaps, noise = "score swap at|score swap, t", "norm noise in|norm noise at"
    tried = f"loss|unit and|{swaps}|{noise}|free|a from|a held|firing and|worlds|norm per"
    assert [row for row in table() if not re.match(tried, row)] == []
    assert len(table()) == len(tried.split("|"))


def test_reweighting_changes_what_is_learned() -> None:
    (line,) = spans("loss")
    plain, weighted = trained("--arms standard")["standard"], trained(line)
    assert len(weighted) == 2
    assert all(not torch.equal(sae.W_dec, plain.W_dec) for sae in weighted.values())


@pytest.mark.parametrize(("score", "frame"), list(product(SCORES, FRAMES)))
def test_every_score_in_every_frame(score: str, frame: str) -> None:
    recipe = recipe_of("--arms standard")
    arm = Arm.of("arm", score, frame=frame)
    (sae,) = execute(recipe.changed({"arms": (arm,)}), None, logs=Logs(progress=False), measured=False).saes.values()
    assert (sae.cfg.score, sae.cfg.frame) == (score, frame)


def test_the_frames_line() -> None:
    (line,) = spans("unit and")
    assert [sae.cfg.frame for sae in trained(line).values()] == ["unit", "layer_norm"]


def test_score_swap_with_and_without_refit(first: Path) -> None:
    call, bare = spans("score swap at")
    x_ND = SyntheticSource(World.parse(WORLD)).sample(500, "train")[0].x_ND
    sae = cosae.load(first)
    calibrate(sae, x_ND)
    refitted = eval(call.removeprefix("cosae.sae.swap."), {"swap_score": swap_score, "sae": sae, "x": x_ND})
    kept = swap_score(sae, "cosine", **eval(f"dict({bare})"))
    assert refitted.cfg.score == kept.cfg.score == "cosine"
    assert torch.equal(kept.threshold, sae.threshold)
    l0 = [float(one.encode(x_ND).count_B.double().mean()) for one in (sae, refitted)]
    assert l0[1] == pytest.approx(l0[0], rel=0.1)


def test_score_swap_with_training_continued(first: Path) -> None:
    (line,) = spans("score swap, t")
    (sae,) = trained(line.replace("runs/first/arms/standard", str(first))).values()
    start = cosae.load(first)
    assert sae.cfg.score == "cosine"
    assert 0 < float((sae.W_dec - start.W_dec).detach().abs().max()) < 0.05


def test_norm_noise_in_training_and_at_deployment_only() -> None:
    (line,) = spans("norm noise in")
    assert not torch.equal(next(iter(trained(line).values())).W_enc, trained("--arms standard")["standard"].W_enc)
    (line,) = spans("norm noise at")
    plain, shifted = (dataset_of(recipe_of(text)) for text in ("", line))
    train, held_out = (
        [data.sample(side, 100).activations.x_ND for data in (plain, shifted)] for side in ("train", "held_out")
    )
    assert torch.equal(*train)
    ratio_N = held_out[1].norm(dim=1) / held_out[0].norm(dim=1)
    assert float(ratio_N.std()) > 0.1
    assert torch.nn.functional.cosine_similarity(*held_out).min() > 0.999


def test_free_rows_and_unit_rows() -> None:
    (line,) = spans("free")
    free, unit = trained(line, 4).values()
    assert float((free.W_enc.detach().norm(dim=1) - 1).abs().max()) > 1e-4
    x_ND = torch.randn(50, unit.d_in, generator=torch.Generator().manual_seed(0))
    before = unit.encode(x_ND).to_dense()
    with torch.no_grad():
        unit.score.rows_FD *= 3.0  # unit rows are part of the formula, whatever the stored lengths
    assert torch.allclose(unit.encode(x_ND).to_dense(), before, atol=1e-5)


def test_a_from_both_ends_and_held() -> None:
    (line,) = spans("a from")
    low, high = (float(sae.scale_a.detach().mean()) for sae in trained(line).values())
    assert abs(low) < 0.2 < 0.8 < high
    assert low != 0
    assert high != 1
    (line,) = spans("a held")
    assert all(float(sae.scale_a.detach().mean()) == 0.5 for sae in trained(line, 4).values())


def test_firing_and_value_apart() -> None:
    (line,) = spans("firing and")
    saes = [sae.requires_grad_(False) for sae in trained(line).values()]
    assert [(float(sae.scale_a.mean()), float(sae.value_exponent.mean())) for sae in saes] == [(1, 0), (0, 1), (0, 0)]


@pytest.mark.parametrize("row", ["worlds", "norm per"])
def test_worlds_and_nuisances(row: str) -> None:
    for span in spans(row):
        text = span.removeprefix("--world ")
        text = text if not text.partition(":")[0].count("=") else f"none:{text}"
        joined = f"{text}{',' if ':' in text else ':'}d_in=12,n_features=24,l0=2"
        assert trained(f"--world {joined} --arms standard")
