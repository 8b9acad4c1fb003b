"""Recipes: changed, diffed, written and read back as they were; what is no recipe is refused in a sentence."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cosae.activations.filter import FilterPolicy
from cosae.activations.perturbation import Perturbation
from cosae.activations.synthetic import World
from cosae.errors import CosaeError
from cosae.io.values import from_plain, to_plain
from cosae.presets import PRESETS, preset
from cosae.recipe import DataConfig, EvaluationConfig, Recipe
from cosae.sae.config import B_INITS, InitConfig, SAEConfig
from cosae.sae.loss import LossConfig
from cosae.sae.score import SCORES
from cosae.train.arm import ARMS, Arm
from cosae.train.loop import TrainingConfig
from cosae.train.step import OptimizerConfig

FAST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

counts = st.integers(1, 10**9)
rates = st.floats(1e-9, 1e3)
texts = st.text(max_size=20)
arms = st.builds(
    Arm,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,12}", fullmatch=True),
    sae=st.builds(
        SAEConfig,
        score=st.sampled_from(sorted(SCORES)),
        d_sae=st.none() | st.integers(10**6, 10**9),
        k=st.none() | st.integers(1, 10**6),
        prefixes=st.sets(st.integers(1, 10**6), max_size=3).map(sorted).map(tuple),
        norm_restoring=st.booleans(),
    ),
    init=st.builds(InitConfig, a_init=st.floats(-5, 5), b_init=st.sampled_from(B_INITS) | st.floats(-5, 5)),
    seed=st.none() | st.integers(0, 2**31),
    a_lr=rates,
    lr=st.none() | rates,
    input_noise=st.floats(1, 9),
    loss=st.builds(LossConfig, reweight=st.floats(0, 3), aux_k=st.none() | counts, aux_coefficient=rates),
)
recipes = st.builds(
    Recipe,
    name=texts,
    data=st.builds(
        DataConfig,
        model=texts,
        revision=st.none() | texts,
        add_bos=st.none() | st.booleans(),
        held_out_frac=st.floats(0.01, 0.99),
        world=st.none() | st.builds(World, d_in=counts, sigma=st.floats(0, 3), norm_median=st.none() | rates),
    ),
    filter=st.builds(FilterPolicy, factor=st.floats(1.001, 1e6), window_tokens=counts, drop_special=st.booleans()),
    perturbation=st.builds(Perturbation, sigma=st.floats(0, 3), position=st.none() | st.integers(0, 99)),
    d_sae=st.none() | counts,
    k=counts,
    arms=st.lists(arms, min_size=1, max_size=3, unique_by=lambda arm: arm.name).map(tuple),
    training=st.builds(
        TrainingConfig,
        steps=counts,
        seed=st.integers(0, 2**31),
        optimizer=st.builds(OptimizerConfig, lr=rates, clip=st.none() | rates, beta2=st.floats(0, 0.9999)),
    ),
    evaluation=st.builds(EvaluationConfig, probing=st.booleans(), resamples=counts),
)


@FAST
@given(recipes)
def test_any_recipe_is_written_and_read_back_as_it_was(tmp_path: Path, recipe: Recipe) -> None:
    recipe.write(tmp_path / "r.json")
    assert Recipe.read(tmp_path / "r.json") == recipe
    assert from_plain(Recipe, to_plain(recipe), "r") == recipe
    json.loads((tmp_path / "r.json").read_text(), parse_constant=lambda text: pytest.fail(text))


@FAST
@given(recipes, recipes)
def test_a_diff_names_every_difference_and_only_those(one: Recipe, other: Recipe) -> None:
    diff = one.diff(other)
    assert one.diff(one) == {}
    assert (diff == {}) == (one == other)
    assert {path: pair[::-1] for path, pair in diff.items()} == other.diff(one)
    alone = one.changed(k=one.k % 10**9 + 1)
    assert one.diff(alone) == {"k": (one.k, alone.k)}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not is_dataclass(value):
        return {path: value}
    return {
        k: v for f in fields(value) for k, v in leaves(getattr(value, f.name), f"{path}.{f.name}".lstrip(".")).items()
    }


SOURCE = replace(Recipe(), data=replace(DataConfig(), world=World()))


@pytest.mark.parametrize("path", [p for p in leaves(SOURCE) if p not in ("arms", "data.world.spread_steps")])
def test_every_field_can_be_changed_by_its_path_and_only_it_changes(path: str) -> None:
    """Its own value goes in and comes out; a value of another kind is refused with the path in the sentence."""
    value = leaves(SOURCE)[path]
    assert SOURCE.changed({path: value}) == SOURCE
    if isinstance(value, bool):
        changed = SOURCE.changed({path: not value})
        assert SOURCE.diff(changed) == {path: (value, not value)}
    with pytest.raises(CosaeError) as caught:
        SOURCE.changed({path: {"no": "such"}})
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_changes_by_keyword_by_path_and_together() -> None:
    recipe = Recipe().changed({"training.optimizer.lr": 1, "filter.kind": "none"}, k=7, d_sae=99)
    assert recipe.training.optimizer.lr == 1.0
    assert isinstance(recipe.training.optimizer.lr, float)
    assert (recipe.filter.kind, recipe.k, recipe.d_sae) == ("none", 7, 99)
    assert Recipe().k == 32  # the original stays
    assert recipe.changed() == recipe
    assert recipe.changed(k=7.0).k == 7


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 3}, "a recipe has no field 'steps'"),
        ({"training.step": 3}, "no field 'training.step'.* steps"),
        ({"training.steps.more": 3}, "at 'more' it has nothing below it"),
        ({"": 3}, "a recipe has no field ''"),
        ({"data.world.sigma": 1.0}, "nothing below it"),
        ({"k": "many"}, "k must be of type int. Got 'many'"),
        ({"k": True}, "k must be of type int. Got True"),
        ({"k": 2.5}, "k must be of type int"),
        ({"k": None}, "k must be of type int"),
        ({"evaluation.probing": 1}, "must be of type bool"),
        ({"training.optimizer.lr": "fast"}, "training.optimizer.lr must be of type float"),
        ({"training.optimizer.lr": -1.0}, "lr must be a positive number"),
        ({"training.steps": 0}, "steps must be at least 1"),
        ({"training": 3}, "training must be a mapping"),
        ({"d_sae": 0}, "d_sae must be at least 1"),
        ({"arms": ()}, "at least one arm"),
        ({"arms": "cosine"}, "arms must be a list"),
        ({"arms": ["cosine"]}, r"arms\[0\] must be a mapping"),
        ({"arms": [{"name": "a", "width": 3}]}, r"arms\[0\] has no field 'width'"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "different names"),
        ({"filter.kind": "soft"}, "filter.kind .*position_0, .*Got 'soft'"),
        ({"perturbation.kind": "loud"}, "perturbation.kind must be one of"),
        ({"evaluation.resamples": 0}, "resamples must be at least 1"),
    ],
)
def test_bad_changes_are_one_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CosaeError, match=says) as caught:
        Recipe().changed(changes)
    assert "\n" not in str(caught.value)


def test_resolving_fills_what_arms_left_open() -> None:
    recipe = replace(
        Recipe(), arms=(Arm.of("open"), Arm.of("own", d_sae=5, k=2, seed=9, lr=0.5, kernel="reference")), k=3
    )
    one, own = recipe.resolved(8).arms
    assert (one.sae.d_sae, one.sae.k, one.seed, one.lr, one.kernel) == (128, 3, 0, 1e-3, "auto")
    assert (own.sae.d_sae, own.sae.k, own.seed, own.lr, own.kernel) == (5, 2, 9, 0.5, "reference")
    assert recipe.resolved(8).resolved(8) == recipe.resolved(8)
    assert replace(recipe, d_sae=40).resolved(8).arms[0].sae.d_sae == 40


@pytest.mark.parametrize("name", PRESETS)
def test_presets_construct_and_round_trip(name: str, tmp_path: Path) -> None:
    recipe = preset(name)
    assert recipe == preset(name)
    assert recipe.name == name
    recipe.write(tmp_path / "r.json")
    assert Recipe.read(tmp_path / "r.json") == recipe
    assert recipe.resolved(4096).arms[0].sae.d_sae is not None
    with pytest.raises(CosaeError, match="preset must be one of embedded, demo"):
        preset(name.upper())


def test_the_paper_preset_is_the_papers() -> None:
    """Paper §3, line by line."""
    paper = preset("paper").resolved(4096)
    t, o = paper.training, paper.training.optimizer
    assert (paper.d_sae, paper.k, t.batch_tokens, t.steps, t.dead_after_tokens) == (
        65_536,
        80,
        2048,
        244_140,
        10_000_000,
    )
    assert (o.lr, o.beta1, o.beta2, o.eps, o.clip, o.warmup_steps, o.decay_frac) == (
        5e-5,
        0.9,
        0.999,
        1e-8,
        1.0,
        1000,
        0.2,
    )
    assert t.steps * t.batch_tokens == pytest.approx(500e6, rel=1e-4)
    assert t.buffer_tokens == 500_000
    assert (paper.data.model, paper.data.site, paper.data.packing) == ("Qwen/Qwen3-8B", "resid_post.18", "document")
    assert (paper.data.max_chars, paper.data.min_chars, paper.data.context) == (8192, 51, 2048)  # skip ≤ 50 characters
    assert (paper.filter.kind, paper.filter.factor) == ("norm", 10.0)
    for arm in paper.arms:
        assert arm.init == InitConfig(a_init=0.0, b_init="sqrt_d", centre="geometric_median")
        assert arm.sae.selector == "batch_topk"
        assert (arm.loss.normalise, arm.loss.aux_coefficient, arm.loss.aux_k) == ("none", 1 / 32, None)


def test_demo_settings_differ_in_the_nuisance_alone() -> None:
    assert set(preset("demo").diff(preset("demo-injected"))) == {"name", "perturbation.kind", "perturbation.sigma"}
    assert {arm.name for arm in preset("demo").arms} >= {"standard", "standard_unit_frame", "unit_rows", "cosine"}


# --------------------------------------------------------------------------------- files


def test_what_a_file_leaves_out_keeps_its_default(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"k": 5, "training": {"optimizer": {"lr": 1}}, "arms": [{"name": "a", "loss": {"reweight": 1}}]}')
    recipe = Recipe.read(path)
    assert recipe == replace(
        Recipe(),
        k=5,
        training=TrainingConfig(optimizer=OptimizerConfig(lr=1.0)),
        arms=(Arm.of("a", loss=LossConfig(reweight=1.0)),),
    )
    assert Recipe.read(str(path)) == recipe


YAML = """
name: mine
k: 5
data:
  world: {norm: sinks, sigma: 1}   # a comment
training:
  optimizer: {lr: 1e-3, eps: 1E-9, clip: null}
arms:
  - name: a
    prefixes: [4, 8]
  - {name: b, score: cosine, seed: 3}
"""


def test_yaml_says_the_same(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    for suffix in (".yaml", ".yml"):
        path = tmp_path / f"r{suffix}"
        path.write_text(YAML)
        recipe = Recipe.read(path)
        assert recipe.data.world == World(norm="sinks", sigma=1.0)
        assert recipe.training.optimizer == OptimizerConfig(lr=1e-3, eps=1e-9, clip=None)  # 1e-3 is a number here too
        assert recipe.arms == (Arm.of("a", prefixes=(4, 8)), Arm.of("b", "cosine", seed=3))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("r.json", "", "is not well-formed"),
        ("r.json", "{", "is not well-formed"),
        ("r.json", "[]", "must be a mapping of fields. Got list"),
        ("r.json", "null", "mapping .*Got NoneType"),
        ("r.json", '{"steps": 3}', "has no field 'steps'"),
        ("r.json", '{"training": {"steps": "3"}}', "training.steps .*int. Got '3'"),
        ("r.json", '{"training": {"optimizer": {"lr": NaN}}}', "lr must be a positive number"),
        ("r.json", '{"arms": {}}', "arms must be a list"),
        ("r.json", '{"data": {"world": {"d_in": 0}}}', "d_in must be at least 1"),
        ("r.yaml", "a: [", "is not well-formed"),
        ("r.yaml", "", "mapping .*Got NoneType"),
        ("r.yaml", "!!python/object/apply:os.getcwd []", "is not well-formed"),
        ("r.yaml", "k: 3\nk: [1]", "k"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, name: str, text: str, says: str) -> None:
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(CosaeError, match=says) as caught:
        Recipe.read(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "nowhere.json", tmp_path, tmp_path / "latin.json"):
        with pytest.raises(CosaeError, match="cannot be read"):
            Recipe.read(path)


def test_named_arms_are_the_recipes_arms() -> None:
    assert all(arm == ARMS[arm.name] for arm in Recipe().arms)


def test_a_nested_value_in_the_place_of_a_number_is_shown_cut(tmp_path: Path) -> None:
    plain = json.loads(json.dumps(to_plain(preset("demo"))))
    plain["arms"][0]["threshold_lr"] = to_plain(preset("demo").arms) * 2
    (tmp_path / "recipe.json").write_text(json.dumps(plain))
    with pytest.raises(CosaeError, match="threshold_lr must be of type float") as refusal:
        Recipe.read(tmp_path / "recipe.json")
    assert len(str(refusal.value)) < 400 + len(str(tmp_path))
