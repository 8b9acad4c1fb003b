"""Run by an environment with the real sae-lens and cosae: every architecture, both directions, a training round trip.

    PYTHON tests/interop/peers/saelens_checks.py     prints JSON rows: format, direction, architecture, difference

A difference is the largest over features and reconstructions, relative to the largest value of SAELens' own answer.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import torch
from sae_lens import SAE, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from safetensors.torch import save_file

import cosae
import cosae.interop.saelens.plugin as plugin
from cosae.interop.read import read_sae
from cosae.sae.calibrate import calibrate
from cosae.sae.score import SCORES
from cosae.sae.selector import SELECTORS

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
        "abstopk": sae_lens.AbsTopKSAEConfig(**shape, k=K),
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


def trained_theirs(rows: list[dict[str, Any]]) -> None:
    """SAELens' own architectures trained by its trainer: the inference SAE it saves, and a checkpoint's weights."""
    shape = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    scaled = {**shape, "normalize_activations": "expected_average_only_in"}
    configs = {
        "standard": sae_lens.StandardTrainingSAEConfig(**shape),
        "standard, scaled activations": sae_lens.StandardTrainingSAEConfig(**scaled),
        "topk": sae_lens.TopKTrainingSAEConfig(**shape, k=K),
        "batchtopk → jumprelu": sae_lens.BatchTopKTrainingSAEConfig(**shape, k=K),
        "batchtopk → jumprelu, scaled activations": sae_lens.BatchTopKTrainingSAEConfig(**scaled, k=K),
        "jumprelu": sae_lens.JumpReLUTrainingSAEConfig(**shape),
        "gated": sae_lens.GatedTrainingSAEConfig(**shape),
        "matryoshka_batchtopk → jumprelu": sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
            **shape, k=K, matryoshka_widths=[10, F]
        ),
    }
    for name, config in configs.items():
        trained = train(config)
        with tempfile.TemporaryDirectory() as place:
            trained.save_inference_model(Path(place) / "saved")
            theirs = SAE.load_from_disk(Path(place) / "saved")
            rows.append(row("SAELens", "read, trained there", name, compare(read_sae(Path(place) / "saved"), theirs)))
            if "→" in name:
                trained.save_model(Path(place) / "checkpoint")
                worst = compare(read_sae(Path(place) / "checkpoint"), theirs)
                rows.append(row("SAELens", "read, a checkpoint", name.partition(" →")[0], worst))


def scaled_checkpoint(rows: list[dict[str, Any]]) -> None:
    """A checkpoint in the middle of training on rescaled activations, its scale in a file beside it."""
    config = sae_lens.BatchTopKTrainingSAEConfig(
        d_in=D, d_sae=F, k=K, dtype="float32", device="cpu", normalize_activations="expected_average_only_in"
    )
    theirs = sae_lens.TrainingSAE.from_dict(config.to_dict())
    randomise(theirs)
    theirs.topk_threshold = torch.tensor(0.8, dtype=theirs.topk_threshold.dtype)
    scale, x = 1.7, inputs(9)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        theirs.save_model(place)
        (Path(place) / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
        mine = read_sae(place)
        pre = theirs.encode_with_hidden_pre(scale * x)[1]
        features = pre * (pre > 0.8)
        codes = mine.encode(x)
        recon = theirs.decode(features) / scale
        worst = max(difference(codes.to_dense(), features), difference(mine.decode(codes), recon))
    rows.append(row("SAELens", "read, a checkpoint", "batchtopk, scaled activations", worst))


def gemma_scope(rows: list[dict[str, Any]]) -> None:
    """Files in both of Gemma Scope's forms through SAELens' own loaders, which find them where a hub would put them."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    g = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    state = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    state["threshold"].abs_()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)

        def fetch(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
            return str(root / (subfolder or "") / filename)

        npz = root / "layer_3" / "width_16k" / "average_l0_9"
        later = root / "resid_post" / "layer_3_width_16k_l0_medium"
        embedding = root / "embedding" / "width_4k" / "average_l0_6"
        for folder in (npz, embedding):
            folder.mkdir(parents=True)
            np.savez(folder / "params.npz", **{name: value.numpy() for name, value in state.items()})
        later.mkdir(parents=True)
        save_file({name.lower(): value for name, value in state.items()}, later / "params.safetensors")
        said = {
            "architecture": "jump_relu",
            "model_name": "gemma-v3-1b-pt",
            "hf_hook_point_in": "model.layers.3.output",
        }
        (later / "config.json").write_text(json.dumps({**said, "type": "sae", "l0": 9}))
        kept = loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes
        loaders.hf_hub_download = fetch
        loaders.get_safetensors_tensor_shapes = lambda *_: {name.lower(): list(t.shape) for name, t in state.items()}
        ways = {
            "params.npz": (loaders.gemma_2_sae_huggingface_loader, npz, "google/gemma-scope-2b-pt-res"),
            "params.npz, embedding": (
                loaders.gemma_2_sae_huggingface_loader,
                embedding,
                "google/gemma-scope-2b-pt-res",
            ),
            "params.safetensors": (loaders.gemma_3_sae_huggingface_loader, later, "google/gemma-scope-2-1b-pt"),
        }
        try:
            for name, (loader, folder, repo) in ways.items():
                overrides = {"d_in": D, "d_sae": F}
                config, weights, _ = loader(repo, str(folder.relative_to(root)), "cpu", False, overrides)
                weights = {key: value * 1.0 for key, value in weights.items()}
                if "embedding" in name:  # the loader takes its own table's width for the scale
                    assert config["d_in"] == D
                theirs = SAE.from_dict(loaders.handle_config_defaulting(config))
                theirs.load_state_dict(weights)
                rows.append(row("Gemma Scope", "read", name, compare(read_sae(folder), theirs)))
        finally:
            loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = kept


def from_pretrained(rows: list[dict[str, Any]]) -> None:
    """SAE.from_pretrained on a repository that lies on disk; the fold that it offers keeps the outputs."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    x = inputs()
    sae = cosae.SAE.build(d_in=D, d_sae=F, score="cosine", selector="batch_topk", k=K, seed=0, sample=x)
    calibrate(sae, x)
    with tempfile.TemporaryDirectory() as scratch:
        cosae.save(sae, Path(scratch) / "layer_3")

        def fetch(repo_id: str, filename: str, **_: Any) -> str:
            place = Path(scratch) / filename
            if not place.exists():
                raise loaders.EntryNotFoundError(filename)
            return str(place)

        kept, loaders.hf_hub_download = loaders.hf_hub_download, fetch
        try:
            theirs = SAE.from_pretrained("someone/some-saes", "layer_3")
            assert type(theirs).__name__ == "CosaeSAE"
            worst = compare(sae, theirs)
            folded = SAE.from_pretrained_with_cfg_and_sparsity("someone/some-saes", "layer_3", fold_W_dec_norm=True)[0]
            with torch.no_grad():
                worst = max(worst, difference(folded(x), theirs(x)))
        finally:
            loaders.hf_hub_download = kept
    rows.append(row("SAELens", "from_pretrained", "cosine × batch_topk", worst))


TEXTS = [Path(json.__file__).read_text()[i : i + 4000] for i in range(0, 12000, 2000)] * 20
READING: dict[str, Any] = {
    "model_name": "embedded",
    "model_class_name": "AutoModelForCausalLM",
    "training_tokens": 4096,
    "train_batch_size_tokens": 256,
    "context_size": 64,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 8,
    "dataset_path": "local",
    "streaming": False,
    "prepend_bos": True,
    "lr": 1e-3,
    "device": "cpu",
    "dtype": "float32",
    "logger": LoggingConfig(log_to_wandb=False),
    "checkpoint_path": None,
}
"""What the runners on the embedded model share."""


def language_model_runner(rows: list[dict[str, Any]]) -> None:
    """LanguageModelSAETrainingRunner on the embedded model: activations, training, checkpoint, reading, run_evals."""
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activation_scaler import ActivationScaler

    from cosae.models import embedded

    model, tokenizer = embedded.load()
    with tempfile.TemporaryDirectory() as place:
        config = LanguageModelSAERunnerConfig(
            sae=plugin.CosineBatchTopKTrainingSAEConfig(
                d_in=model.config.hidden_size, d_sae=256, k=8.0, dtype="float32", device="cpu"
            ),
            hook_name="model.layers.3",
            is_dataset_tokenized=False,
            output_path=str(Path(place) / "out"),
            **READING,
        )
        runner = LanguageModelSAETrainingRunner(
            config, override_dataset=Dataset.from_dict({"text": TEXTS}), override_model=HookedProxyLM(model, tokenizer)
        )
        trained = runner.run()
        there = SAE.load_from_disk(Path(place) / "out")
        x = 3 * torch.randn(200, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
        here = read_sae(Path(place) / "out")
        with torch.no_grad():
            worst = difference(here(x), there(x))
    assert here.metadata["hook_name"] == "model.layers.3"
    assert trained.cfg.d_sae == 256
    rows.append(row("SAELens", "LanguageModelSAETrainingRunner", "cosine_batchtopk", worst))
    everything = get_eval_everything_config(4, 2, 2)
    found, of_features = run_evals(there, runner.activations_store, runner.model, ActivationScaler(), everything)
    assert 0 < found["sparsity"]["l0"] < 256
    assert -1 < found["reconstruction_quality"]["explained_variance"] < 1
    assert 0 < found["model_performance_preservation"]["ce_loss_with_sae"] < 100
    assert all(len(values) == 256 for values in of_features.values())
    rows.append(row("SAELens", "run_evals runs", "cosine_batchtopk", 0.0))


def several_runner(rows: list[dict[str, Any]]) -> None:
    """MultiSAETrainingRunner: two cosine architectures and one of SAELens' own on one stream of the embedded model."""
    from datasets import Dataset
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig

    from cosae.models import embedded

    model, tokenizer = embedded.load()
    d_in = model.config.hidden_size
    shape = {"d_in": d_in, "d_sae": 256, "dtype": "float32", "device": "cpu"}
    saes = {
        "cosine_batchtopk": plugin.CosineBatchTopKTrainingSAEConfig(**shape, k=8.0, score="cosine_per_feature"),
        "cosine_jumprelu": plugin.CosineJumpReLUTrainingSAEConfig(**shape),
        "batchtopk": sae_lens.BatchTopKTrainingSAEConfig(**shape, k=8.0),
    }
    with tempfile.TemporaryDirectory() as place:
        config = MultiSAETrainingRunnerConfig(saes=saes, hook_names="model.layers.3", output_path=place, **READING)
        MultiSAETrainingRunner(
            config, override_dataset=Dataset.from_dict({"text": TEXTS}), override_model=HookedProxyLM(model, tokenizer)
        ).run()
        x = 3 * torch.randn(200, d_in, generator=torch.Generator().manual_seed(1))
        for name in saes:
            there, here = SAE.load_from_disk(Path(place) / name), read_sae(Path(place) / name)
            with torch.no_grad():
                worst = max(difference(here(x), there(x)), difference(here.encode(x).to_dense(), there.encode(x)))
            rows.append(row("SAELens", "MultiSAETrainingRunner", name, worst))


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
    trained_theirs(found)
    scaled_checkpoint(found)
    gemma_scope(found)
    from_pretrained(found)
    language_model_runner(found)
    several_runner(found)
    plugin.register()  # twice: harmless
    print(json.dumps({"package": f"sae-lens {sae_lens.__version__}", "rows": found}))
