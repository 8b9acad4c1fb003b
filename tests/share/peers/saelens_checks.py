"""Run by an environment with the real sae-lens and cosae: every architecture, both directions, a training round trip.

    PYTHON tests/share/peers/saelens_checks.py     prints JSON rows: format, direction, architecture, difference

A difference is the largest over features and reconstructions, relative to the largest value of SAELens' own answer.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import sae_lens
import torch
from sae_lens import SAE, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig

import cosae
import cosae.share.saelens as plugin
from cosae.sae.calibrate import calibrate
from cosae.sae.score import SCORES
from cosae.sae.selector import SELECTORS
from cosae.share.read import read_sae

D, F, K = 12, 40, 4


def inputs(seed: int = 0, n: int = 400) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g) * (0.5 * torch.randn(n, 1, generator=g)).exp()


def difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@torch.no_grad()
def compare(mine: cosae.SAE, theirs: Any) -> float:
    x = inputs(9)
    codes, features = mine.encode(x), theirs.encode(x)
    return max(difference(codes.to_dense(), features), difference(mine.decode(codes), theirs.decode(features)))


def randomise(sae: Any, seed: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else 1.0
        parameter.data = scale * torch.randn(parameter.shape, generator=g)
        if name == "threshold":
            parameter.data.abs_()


def inference_architectures() -> dict[str, Any]:
    shape = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    return {
        "standard": sae_lens.StandardSAEConfig(**shape),
        "standard, no centre": sae_lens.StandardSAEConfig(**shape, apply_b_dec_to_input=False),
        "jumprelu": sae_lens.JumpReLUSAEConfig(**shape),
        "jumprelu, no centre": sae_lens.JumpReLUSAEConfig(**shape, apply_b_dec_to_input=False),
        "topk": sae_lens.TopKSAEConfig(**shape, k=K),
        "topk, rescaled": sae_lens.TopKSAEConfig(**shape, k=K, rescale_acts_by_decoder_norm=True),
        "gated": sae_lens.GatedSAEConfig(**shape),
    }


def read_theirs(rows: list[dict[str, Any]]) -> None:
    """SAEs that SAELens writes, read by cosae."""
    for name, config in inference_architectures().items():
        theirs = SAE.from_dict(config.to_dict())
        randomise(theirs)
        with tempfile.TemporaryDirectory() as place:
            theirs.save_model(place)
            rows.append(row("SAELens", "read", name, compare(read_sae(place), theirs)))


def write_ours(rows: list[dict[str, Any]]) -> None:
    """cosae's own folders opened by SAELens, saved there, and read back."""
    x = inputs()
    for frame in ("raw", "unit", "layer_norm"):
        for selector in SELECTORS:
            worst, back = 0.0, 0.0
            for score in SCORES:
                sae = cosae.SAE.build(
                    d_in=D, d_sae=F, score=score, selector=selector, k=K, seed=0, frame=frame, sample=x
                )
                calibrate(sae, x)
                with tempfile.TemporaryDirectory() as place:
                    theirs = SAE.load_from_disk(cosae.save(sae, Path(place) / "ours", probes=x[:4]))
                    worst = max(worst, compare(sae, theirs))
                    theirs.save_model(Path(place) / "again")
                    back = max(back, compare(read_sae(Path(place) / "again"), theirs))
            rows.append(row("SAELens", "opens cosae's folder", f"{len(SCORES)} scores × {selector}, {frame}", worst))
            rows.append(row("SAELens", "saves it, cosae reads", f"{len(SCORES)} scores × {selector}, {frame}", back))


def round_trip(rows: list[dict[str, Any]]) -> None:
    """Train there with the plug-in → save → load here → save → load there: identical codes at every stop."""
    shape = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    configs = {
        "cosine_batchtopk": plugin.CosineBatchTopKTrainingSAEConfig(**shape, k=K, score="cosine"),
        "cosine_batchtopk, per feature": plugin.CosineBatchTopKTrainingSAEConfig(
            **shape, k=K, score="cosine_per_feature"
        ),
        "cosine_batchtopk, rescaled": plugin.CosineBatchTopKTrainingSAEConfig(
            **shape, k=K, rescale_acts_by_decoder_norm=True, decoder_init_norm=0.3
        ),
        "cosine_matryoshka_batchtopk": plugin.CosineMatryoshkaBatchTopKTrainingSAEConfig(
            **shape, k=K, matryoshka_widths=[10, F]
        ),
        "cosine_topk": plugin.CosineTopKTrainingSAEConfig(**shape, k=K),
        "cosine_jumprelu": plugin.CosineJumpReLUTrainingSAEConfig(**shape),
    }
    for name, config in configs.items():
        trained = train(config)
        with tempfile.TemporaryDirectory() as place:
            trained.save_inference_model(Path(place) / "a")
            there = SAE.load_from_disk(Path(place) / "a")
            here = read_sae(Path(place) / "a")
            first = compare(here, there)
            again = SAE.load_from_disk(cosae.save(here, Path(place) / "b"))
            second = compare(here, again)
            with torch.no_grad():
                same = difference(again.encode(inputs(9)), there.encode(inputs(9)))
                zeros = float(there.encode(torch.zeros(3, D)).abs().max())
                half = there.to(dtype=torch.bfloat16).encode(inputs(9).bfloat16())
            assert zeros == 0.0, name
            assert bool(half.isfinite().all()), name
            assert float((there.encode(inputs(9)) != 0).float().mean()) > 0, name
        rows.append(row("SAELens", "trained there, and back", name, max(first, second, same)))


def train(config: Any) -> Any:
    sae = sae_lens.TrainingSAE.from_dict(config.to_dict())

    def batches() -> Any:
        seed = 0
        while True:
            seed += 1
            yield inputs(seed, 256)

    settings = SAETrainerConfig(
        total_training_samples=256 * 60,
        train_batch_size_samples=256,
        lr=3e-3,
        lr_end=3e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(settings, sae, batches()).fit()


def synthetic_runner(rows: list[dict[str, Any]]) -> None:
    """SAELens' runner on its own synthetic model, with its evaluation."""
    config = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=16, hidden_dim=D, seed=0),
        sae=plugin.CosineBatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=2.0, dtype="float32", device="cpu"),
        training_samples=256 * 40,
        batch_size=256,
        lr=3e-3,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        output_path=None,
    )
    result = SyntheticSAERunner(config).run()
    assert result.final_eval is not None
    assert 0 <= result.final_eval.mcc <= 1
    rows.append(row("SAELens", "SyntheticSAERunner runs", "cosine_batchtopk", 0.0))


def row(format_: str, direction: str, architecture: str, worst: float) -> dict[str, Any]:
    return {"format": format_, "direction": direction, "architecture": architecture, "difference": worst}


if __name__ == "__main__":
    found: list[dict[str, Any]] = []
    read_theirs(found)
    write_ours(found)
    round_trip(found)
    synthetic_runner(found)
    plugin.register()  # twice: harmless
    print(json.dumps({"package": f"sae-lens {sae_lens.__version__}", "rows": found}))
