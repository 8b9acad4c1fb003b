"""Named recipes: the embedded model's own, the demo's settings, and the paper's headline run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cosae.activations.filter import FilterPolicy
from cosae.activations.perturbation import Perturbation
from cosae.errors import check_choice
from cosae.recipe import DataConfig, EvaluationConfig, Recipe
from cosae.sae.loss import LossConfig
from cosae.train.arm import ARMS
from cosae.train.loop import TrainingConfig
from cosae.train.step import OptimizerConfig

DEMO_ARMS = ("standard", "standard_unit_frame", "unit_rows", "cosine", "cosine_per_feature", "cosine_base_delta")


def _embedded() -> Recipe:
    """What `cosae train` does where nothing else is said: the two arms that docs/choosing.md leaves to choose from."""
    return Recipe(arms=(ARMS["standard"], ARMS["standard_unit_frame"]))


def _demo() -> Recipe:
    """Six arms on the embedded model, small enough for a few minutes on two cores."""
    return Recipe(
        name="demo",
        arms=tuple(ARMS[name] for name in DEMO_ARMS),
        training=TrainingConfig(
            steps=500,
            buffer_tokens=65_536,
            optimizer=OptimizerConfig(lr=4e-3, warmup_steps=50),
            dead_after_tokens=150_000,
            checkpoint_every=250,
        ),
        evaluation=EvaluationConfig(held_out_tokens=98_304, probe_tokens=65_536),
    )


def _demo_injected() -> Recipe:
    """The demo's arms once more, each token's norm multiplied by an independent log-normal factor (σ = 0.5)."""
    return replace(_demo(), name="demo-injected", perturbation=Perturbation(kind="log_normal", sigma=0.5, seed=0))


REAL_TEXTS = (
    "158_code_C", "161_agnews_0", "163_agnews_2", "157_amazon_5star", "139_news_class_Politics", "105_click_bait",
    "23_headline_ischina", "96_spam_is", "106_hate_hate", "113_movie_sent", "149_twt_emotion_happiness",
    "7_hist_fig_ispolitician", "126_art_type_book",
)  # fmt: skip
"""Sets of sae-probes with texts of many kinds and lengths."""


def _demo_real() -> Recipe:
    """A pretrained model at a site where position 0 of every text has a hundred times the median norm (cosae fetch)."""
    return Recipe(
        name="demo-real",
        data=DataConfig(
            model="smollm2",
            site="resid_post.14",
            corpus=("wiki:en:0.5", "wiki:fr:0.25", "wiki:es:0.25"),
            context=128,
            packing="document",
        ),
        filter=FilterPolicy(kind="norm"),
        d_sae=4608,
        arms=tuple(ARMS[name] for name in ("standard", "standard_unit_frame", "cosine")),
        training=TrainingConfig(
            steps=1000,
            buffer_tokens=65_536,
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=100),
            dead_after_tokens=300_000,
            checkpoint_every=250,
        ),
        evaluation=EvaluationConfig(
            held_out_tokens=24_576,
            calibration_tokens=16_384,
            texts=("wiki:language", "wiki:topic", *(f"sae-probes:{name}" for name in REAL_TEXTS)),
            max_texts=200,
            max_classes=4,
            text_splits=1,
        ),
    )


def _paper() -> Recipe:
    """The paper's headline recipe (§3): Qwen3-8B, block 18, FineWeb, 65 536 features, k 80, 500 M tokens.

    Where the paper takes the ×10 median over each forward batch, the median here is that of the first window; and its
    inference threshold is a running average, ours is calibrated.
    """
    paper_loss = LossConfig(normalise="none")
    names = "standard", "cosine", "cosine_per_feature"
    arms = tuple(ARMS[name].changed({"b_init": "sqrt_d", "loss": paper_loss}) for name in names)
    return Recipe(
        name="paper",
        data=DataConfig(
            model="Qwen/Qwen3-8B",
            model_dtype="bfloat16",
            attention="eager",
            site="resid_post.18",
            corpus="hf:HuggingFaceFW/fineweb:sample-10BT",
            context=2048,
            packing="document",
            max_chars=8192,
            min_chars=51,
            batch_sequences=4,
            chunk_sequences=64,
            held_out_frac=0.05,
        ),
        filter=FilterPolicy(kind="norm", factor=10.0),
        d_sae=65_536,
        k=80,
        arms=arms,
        training=TrainingConfig(
            steps=244_140,
            batch_tokens=2048,
            buffer_tokens=500_000,
            store_dtype="bfloat16",
            seed=42,
            optimizer=OptimizerConfig(lr=5e-5, warmup_steps=1000, decay_frac=0.2, clip=1.0),
            dead_after_tokens=10_000_000,
            log_every=50,
            checkpoint_every=5000,
        ),
        evaluation=EvaluationConfig(held_out_tokens=400_000, calibration_tokens=100_000, probing=False),
        device="cuda",
    )


PRESETS: dict[str, Callable[[], Recipe]] = {
    "embedded": _embedded,
    "demo": _demo,
    "demo-injected": _demo_injected,
    "demo-real": _demo_real,
    "paper": _paper,
}


def preset(name: str) -> Recipe:
    """A named recipe. Raises CosaeError for a name that is not in PRESETS."""
    check_choice("preset", name, PRESETS)
    return PRESETS[name]()
