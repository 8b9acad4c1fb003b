"""Named sets of runs that the claims share: a recipe and at least three seeds each, kept in a folder by recipe digest.

    python -m studies.runsets natural injected ...      (no name: all but the real model's)

A seed sets the order of the data and every arm's initial weights; arms of one run see the same batches. A set that was
interrupted goes on where it stopped; one whose recipe changed is made anew beside the old one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cosae.activations.filter import FilterPolicy
from cosae.activations.perturbation import Perturbation
from cosae.activations.synthetic import World
from cosae.recipe import DataConfig, EvaluationConfig, Recipe
from cosae.run.execute import Logs, execute, resume
from cosae.run.folder import RUN, read_json
from cosae.train.arm import Arm, parse_arm
from cosae.train.checkpoint import checkpoints
from cosae.train.loop import TrainingConfig
from cosae.train.step import OptimizerConfig

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "runs" / "studies"
TWIN = ROOT / "studies" / "layer_norm_twin" / "model"
SEEDS = (0, 1, 2)
STEPS = 1000
NATURAL = "{natural}"
"""In an arm's start: the folder of the natural run of the same seed."""
FEWER_STEPS = 500
"""Of the sets that ask one more question each: contestants are compared within a set, never across."""

STANDARD = ("standard", "standard_unit_frame", "standard_layer_norm", "unit_rows")
COSINES = (
    "cosine_fixed",
    "cosine",
    "cosine,name=cosine_from_1,a_init=1",
    "cosine,name=cosine_fast,a_lr=10,b_lr=10",
    "cosine,name=cosine_fast_from_1,a_init=1,a_lr=10,b_lr=10",
    "cosine_per_feature",
    "cosine_base_delta",
)
MAIN = ("standard", "standard_unit_frame", "cosine", "cosine,name=cosine_fast,a_lr=10,b_lr=10", "cosine_per_feature")
FIXED_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SELECTORS = ("batch_topk", "topk", "abs_topk", "jumprelu", "gated")


def base(name: str, *arms: str, steps: int = STEPS) -> Recipe:
    """The studies' common recipe: the embedded model's last block, 3072 features, k 32, 1000 steps of 1024 tokens."""
    return Recipe(
        name=name,
        arms=tuple(parse_arm(text) for text in arms),
        training=TrainingConfig(
            steps=steps,
            optimizer=OptimizerConfig(lr=4e-3, warmup_steps=50),
            dead_after_tokens=150_000,
            checkpoint_every=500,
        ),
        evaluation=EvaluationConfig(held_out_tokens=65_536, calibration_tokens=65_536, probe_tokens=65_536),
    )


def smaller(name: str, *arms: str) -> Recipe:
    """The common recipe with fewer steps and held-out tokens, for the sets that vary one thing more."""
    evaluation = EvaluationConfig(held_out_tokens=32_768, calibration_tokens=32_768, probe_tokens=49_152)
    return base(name, *arms, steps=FEWER_STEPS).changed({"evaluation": evaluation})


def _pair(name: str, arms: tuple[str, ...], **sites: str) -> Recipe:
    """Transcoders and crosscoders of the embedded model: the common recipe, a short run."""
    changes = {f"data.{key}": value for key, value in sites.items()} | {
        "d_sae": 1024,
        "k": 32,
        "training.steps": 300,
        "training.batch_tokens": 512,
        "training.buffer_tokens": 32_768,
        "filter.window_tokens": 16_384,
        "evaluation.held_out_tokens": 16_384,
        "evaluation.calibration_tokens": 16_384,
        "evaluation.probing": False,
    }
    return base(name, *arms).changed(changes)


def _natural() -> Recipe:
    noisy = ("standard,name=standard_noise,input_noise=2", "cosine,name=cosine_noise,input_noise=2")
    return base("natural", *STANDARD, *COSINES, *noisy)


def _injected() -> Recipe:
    from_1 = "cosine,name=cosine_fast_from_1,a_init=1,a_lr=10,b_lr=10"
    return base("injected", *MAIN, "unit_rows", from_1).changed(
        {"perturbation": Perturbation(kind="log_normal", sigma=0.5)}
    )


def _sinks() -> Recipe:
    """Massive sinks at position 0, filtered in training: the paper's situation (paper §9 A1)."""
    sinks = Perturbation(kind="sinks", position=0, factor=120.0, direction="massive")
    return smaller("sinks", *MAIN).changed({"perturbation": sinks, "filter": FilterPolicy(kind="norm")})


def _reweighted(name: str, perturbation: Perturbation | None = None) -> Recipe:
    """1/r and 1/r² for both scores (paper §5.3; its own cosine arm never trained: §9 B6)."""
    arms = [
        f"{score},name={score}{label},loss.reweight={power}"
        for score in ("standard", "cosine")
        for power, label in ((0, ""), (1, "_over_r"), (2, "_over_r2"))
    ]
    recipe = smaller(name, *arms, "standard_unit_frame")
    return recipe if perturbation is None else recipe.changed({"perturbation": perturbation})


def _selectors() -> Recipe:
    arms = [
        f"{score},name={score}_{selector},selector={selector}"
        for selector in SELECTORS
        for score in ("standard", "cosine")
    ]
    return smaller("selectors", *arms)


def _shape(name: str, d_sae: int, k: int) -> Recipe:
    return smaller(name, "standard", "standard_unit_frame", "cosine").changed({"d_sae": d_sae, "k": k})


def _twin() -> Recipe:
    arms = (*MAIN, "standard_layer_norm", "cosine,name=cosine_from_1,a_init=1")
    return base("twin", *arms).changed({"data.model": str(TWIN), "data.site": "resid_post.5", "data.add_bos": True})


def _world(norm: str, **settings: float) -> Recipe:
    """512 true features in 128 dimensions, 8 active; the norm law is what differs."""
    world = World(d_in=128, n_features=512, l0=8, norm=norm, **settings)  # type: ignore[arg-type]
    recipe = base(f"world_{norm}", *STANDARD[:2], *COSINES)
    return recipe.changed({"data": DataConfig(world=world), "d_sae": 512, "k": 8, "training.optimizer.lr": 2e-3})


def _fixed_exponents(name: str, sigma: float | None) -> Recipe:
    """The same cosine score with its exponent held at one value per arm: which value leaves the least error?"""
    arms = [f"cosine,name=a_{a:g},a_init={a:g},a_lr=0" for a in FIXED_EXPONENTS]
    if sigma is None:
        return smaller(name, *arms).changed({"evaluation.probing": False})
    world = World(d_in=128, n_features=512, l0=8, norm="log_normal", sigma=sigma)
    changes = {"data": DataConfig(world=world), "d_sae": 512, "k": 8, "training.optimizer.lr": 2e-3}
    return base(name, *arms).changed(changes)


TWO = "cosine_two_exponents,name=two_{}_{},a_init={},value_exponent_init={},a_lr=0,value_exponent_lr=0,b_lr=10"
FAST = "a_lr=10,b_lr=10"
CORNERS = ((1, 0), (0, 1), (0, 0), (1, -1))
"""(a, δ) of every pair of what fires (by inner product or cosine) and what it is worth (in proportion to r or not)."""


def _held(*pairs: tuple[float, float]) -> list[str]:
    """Arms whose two exponents stay as they are."""
    return [TWO.format(a, delta, a, delta) for a, delta in pairs]


def _two_learned() -> list[str]:
    """Cosines that learn one exponent and two, from several starts, without the window of a and with it."""
    two = "cosine_two_exponents,name=two{}_from_{}_{},a_init={},value_exponent_init={},value_exponent_lr=10," + FAST
    one = "cosine,name=one{}_from_{},a_init={}," + FAST
    arms = []
    for label, more in (("", ""), ("_window", ",a_window=0.2")):
        arms += [one.format(label, a, a) + more for a in (0, 1)]
        arms += [two.format(label, a, d, a, d) + more for a, d in ((0, 1), (0, 0))]
    return arms


def _two_exponents(name: str, sigma: float | None, arms: list[str]) -> Recipe:
    """One exponent for firing and another for value; norms of a world, or the embedded model's own."""
    if sigma is None:
        return smaller(name, *arms).changed({"evaluation.probing": False, "d_sae": 768})
    world = World(d_in=128, n_features=512, l0=8, norm="log_normal", sigma=sigma)
    changes = {"data": DataConfig(world=world), "d_sae": 512, "k": 8, "training.optimizer.lr": 2e-3}
    return (base if sigma == 0.5 else smaller)(name, *arms).changed(changes)


def _two_main() -> list[str]:
    over_r2 = TWO.replace("two_{}_{}", "two_{}_{}_over_r2") + ",loss.reweight=2"
    return ["standard", "standard_unit_frame", *_held(*CORNERS), over_r2.format(0, 1, 0, 1), *_two_learned()]


def _two_few() -> list[str]:
    """Those of them that the other comparisons rest on."""
    few = ("one_from_0", "two_from_0_1", "two_window_from_0_1")
    return [arm for arm in _two_main() if "_from_" not in arm or any(f"name={name}," in arm for name in few)]


GRID = tuple((a, delta) for a in (0, 0.25, 0.5) for delta in (0, 0.5, 1))
"""(a, δ) held fixed, to see which pair leaves the least error."""


def _continued() -> Recipe:
    """The natural runs' SAEs for 300 steps more, under their own score and under the other's (paper §5.2)."""
    pairs = (("standard", "standard"), ("standard", "cosine"), ("cosine", "cosine"), ("cosine", "standard"))
    arms = [f"{to},name={start}_as_{to},start={NATURAL}/arms/{start}" for start, to in pairs]
    return smaller("continued", *arms).changed({"training.steps": 300})


def _real(name: str, block: int, *arms: str, d_sae: int = 2304, kind: Literal["norm", "none"] = "norm") -> Recipe:
    """SmolLM2 at the output of one block (studies.real_model): four passes over the store."""
    return Recipe(
        name=name,
        data=DataConfig(store=str(CACHE / "real_model" / "stores"), store_site=f"resid_post.{block}"),
        filter=FilterPolicy(kind=kind),
        d_sae=d_sae,
        arms=tuple(parse_arm(text) for text in arms),
        training=TrainingConfig(
            steps=2000,
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=100),
            dead_after_tokens=300_000,
            checkpoint_every=500,
        ),
        evaluation=EvaluationConfig(held_out_tokens=32_768, calibration_tokens=32_768, probing=False),
    )


TWO_UNIT = "cosine_two_exponents,name=two_unit,a_owner=fixed,value_exponent_owner=fixed,a_init=0,value_exponent_init=1"
REAL_FEW = ("standard", "standard_unit_frame", "cosine")
REAL_MORE = (*REAL_FEW, "cosine_per_feature", "cosine_base_delta", TWO_UNIT)
REAL_ALL = (
    *(*REAL_MORE[:-1], *COSINES[3:5], TWO_UNIT),
    "cosine_two_exponents,name=two_learned,a_init=0,value_exponent_init=1,a_lr=10,value_exponent_lr=10",
)
"""Arms on the real model: where only the gain is asked, at the blocks looked at closely, and at block 14."""
REAL_CLOSELY = (10, 14, 24)
REAL_REWEIGHTED = (
    "standard",
    "cosine",
    *("standard,name=standard_over_r,loss.reweight=1", "standard,name=standard_over_r2,loss.reweight=2"),
)


TRANSCODERS = (
    *("standard", "standard_unit_frame", "standard_unit_frame,name=standard_unit_frame_input,target_frame=input"),
    *("cosine", "standard,name=standard_skip,skip=true", "cosine,name=cosine_skip,skip=true"),
)
CROSSCODER_SITES = ("attn_out.1", "mlp_out.3", "resid_post.5")
CROSSCODERS = (
    *("standard", "cosine"),
    *(f"{arm},name={arm}_balanced,balanced=true,loss.space=frame" for arm in ("standard", "cosine")),
    "standard,name=standard_unit_frame,frame=unit,loss.space=frame",
)


RUNSETS: dict[str, Callable[[], Recipe]] = {
    "natural": _natural,
    "injected": _injected,
    "sinks": _sinks,
    "reweighted": lambda: _reweighted("reweighted"),
    "reweighted_injected": lambda: _reweighted("reweighted_injected", Perturbation(kind="log_normal", sigma=0.5)),
    "selectors": _selectors,
    "k_8": lambda: _shape("k_8", 3072, 8),
    "k_64": lambda: _shape("k_64", 3072, 64),
    "width_768": lambda: _shape("width_768", 768, 32),
    "width_6144": lambda: _shape("width_6144", 6144, 32),
    "world_none": lambda: _world("none"),
    "world_log_normal": lambda: _world("log_normal", sigma=0.5),
    "world_log_normal_1": lambda: _world("log_normal", sigma=1.0).changed({"name": "world_log_normal_1"}),
    "twin": _twin,
    "continued": _continued,
    "world_fixed_a": lambda: _fixed_exponents("world_fixed_a", 0.5),
    "world_fixed_a_1": lambda: _fixed_exponents("world_fixed_a_1", 1.0),
    "two_exponents": lambda: _two_exponents("two_exponents", 0.5, _two_main()),
    "two_exponents_1": lambda: _two_exponents("two_exponents_1", 1.0, _two_main()),
    "two_exponents_natural": lambda: _two_exponents("two_exponents_natural", None, _two_few()),
    "two_exponents_grid": lambda: _two_exponents("two_exponents_grid", 0.5, _held(*GRID)).changed(
        {"training.steps": FEWER_STEPS}
    ),
    "transcoders": lambda: _pair("transcoders", TRANSCODERS, site="mlp_in.3", target="mlp_out.3"),
    "crosscoders": lambda: _pair("crosscoders", CROSSCODERS, site="+".join(CROSSCODER_SITES)),
    "natural_fixed_a": lambda: _fixed_exponents("natural_fixed_a", None),
    **{
        f"real_{b}": partial(
            _real, f"real_{b}", b, *(REAL_ALL if b == 14 else REAL_MORE if b in REAL_CLOSELY else REAL_FEW)
        )
        for b in (10, 11, 12, 14, 18, 24, 28)
    },
    "real_14_unfiltered": lambda: _real("real_14_unfiltered", 14, *REAL_FEW, kind="none"),
    "real_14_reweighted": lambda: _real("real_14_reweighted", 14, *REAL_REWEIGHTED),
    "real_14_wide": lambda: _real("real_14_wide", 14, *REAL_FEW, d_sae=9216),
}
"""Every set of runs by name."""


def recipe_of(name: str, seed: int) -> Recipe:
    """The recipe of one run of a set."""
    recipe = RUNSETS[name]().changed({"training.seed": seed})
    if not any(arm.start for arm in recipe.arms):
        return recipe
    natural = str(folder_of("natural", seed))
    arms = tuple(replace(arm, start=arm.start and arm.start.replace(NATURAL, natural)) for arm in recipe.arms)
    return replace(recipe, arms=arms)


def folder_of(name: str, seed: int) -> Path:
    """Where that run is kept: its recipe's digest is in the name, so that no result outlives its recipe."""
    text = json.dumps(_chosen(recipe_of(name, seed)), sort_keys=True).replace(str(ROOT), "")
    return CACHE / name / f"seed_{seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _chosen(value: Any) -> Any:
    """What a recipe says beyond the defaults: an option that is added later and left alone changes no digest."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = {f.name: (getattr(value, f.name), _default(f)) for f in fields(value)}
        return {k: _chosen(mine) for k, (mine, default) in pairs.items() if mine != default}
    return [_chosen(item) for item in value] if isinstance(value, tuple | list) else value


def _default(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default


def finished(folder: Path) -> bool:
    """Whether a run's folder holds a whole run."""
    return (folder / RUN).is_file() and read_json(folder / RUN).get("status") == "finished"


def ensure(name: str, seeds: tuple[int, ...] = SEEDS, progress: bool = True) -> list[Path]:
    """The folders of a set, one per seed, trained where they are not there yet."""
    folders = []
    for seed in seeds:
        folder = folder_of(name, seed)
        folders.append(folder)
        if finished(folder):
            continue
        print(f"{name}, seed {seed} → {folder}", file=sys.stderr, flush=True)
        if folder.exists() and checkpoints(folder):
            resume(folder, Logs(progress))
            continue
        shutil.rmtree(folder, ignore_errors=True)
        execute(recipe_of(name, seed), folder, logs=Logs(progress))
    return folders


def arm_names(name: str) -> list[str]:
    """The arms of a set, in order."""
    arms: tuple[Arm, ...] = RUNSETS[name]().arms
    return [arm.name for arm in arms]


if __name__ == "__main__":
    asked = sys.argv[1:] or [name for name in RUNSETS if not name.startswith("real")]
    if unknown := [name for name in asked if name not in RUNSETS]:
        sys.exit(f"studies: a set of runs must be one of {', '.join(RUNSETS)}. Got {', '.join(unknown)} instead.")
    for asked_name in asked:
        ensure(asked_name, progress=sys.stderr.isatty())
