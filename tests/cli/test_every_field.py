"""Every field of a recipe: changing it changes the record and what is computed, or it is refused.

The fields are those of the dataclasses: one that is added must be named here, with a value that can be seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import cosae
from cosae.activations.synthetic import World
from cosae.errors import CosaeError
from cosae.io.values import to_plain
from cosae.recipe import Recipe
from cosae.run.execute import Logs, execute
from cosae.train.arm import Arm
from tests.support.small_stores import REQUEST, write_store
from tests.support.small_stores import rows as small_rows
from tests.support.tiny_model_runs import save_tokenizer, write_texts
from tests.support.tiny_models import make_model

NOT_SEEN = {
    "device": "needs an accelerator",
    **dict.fromkeys(
        ("parallel.data", "parallel.feature", "parallel.arm", "parallel.timeout"),
        "needs torchrun, and results are the same: tests/train/parallel",
    ),
    "kernel": "which code computes; results are the same",
    "arms.kernel": "which code computes; results are the same",
    "data.n_workers": "how fast text is read; results are the same",
    "data.prefetch_chunks": "how fast text is read; results are the same",
    "data.batch_sequences": "sequences at once; results are the same",
    "data.revision": "needs the hub: refused of all else",
    "name": "a title in the record and the report",
    "arms.name": "a title, and the name of a folder",
}
WORLD: dict[str, Any] = {
    "data.world": World.parse("log_normal:n_features=24,d_in=8,l0=3"), "d_sae": 16, "k": 3, "name": "world",
    "filter.window_tokens": 256, "training.steps": 6, "training.batch_tokens": 32, "training.buffer_tokens": 256,
    "training.optimizer.warmup_steps": 2, "training.dead_after_tokens": 64, "training.log_every": 2,
    "evaluation.held_out_tokens": 128, "evaluation.calibration_tokens": 64, "evaluation.resamples": 5,
}  # fmt: skip
SINKS = {"data.world.norm": "sinks", "data.world.sink_frac": 0.1}
HELD = {"filter.kind": "none", **SINKS}
JUMP, GATED = {"arms.sae.selector": "jumprelu"}, {"arms.sae.selector": "gated"}
LEARNED = {"arms.sae.score": "cosine"}
TWO = {"arms.sae.score": "cosine_two_exponents"}
DEAD = {"d_sae": 64, "k": 1, "training.dead_after_tokens": 32}
PAIR = {"pair": True}
TEXTS = {"evaluation.texts": ("labels.jsonl",), "evaluation.max_texts": 60, "evaluation.text_splits": 1}
LOG_NORMAL = {"perturbation.kind": "log_normal"}
INJECTED = {"perturbation.kind": "sinks", "perturbation.frac": 0.2, "perturbation.factor": 4.0}
MODEL = {"data.world": None, "data.model": "model", "data.site": "resid_post.2", "data.corpus": "texts",
         "data.context": 32, "data.chunk_sequences": 16, "data.add_bos": True, "data.held_out_frac": 0.3}  # fmt: skip
ARRAY = {"data.world": None, "data.activations": "rows.npy", "data.non_finite": "fatal"}
STORE = {"data.world": None, "data.store": "stores/resid_post.0", "data.store_site": None}
CODE = {**MODEL, "data.model": "embedded", "data.corpus": "pylib", "data.add_bos": None, "evaluation.probe_tokens": 256,
        "evaluation.held_out_tokens": 256, "evaluation.min_positives": 30}  # fmt: skip
SEEN: dict[str, tuple[Any, dict[str, Any]]] = {
    # path → (another value, what must be so for it to have a say)
    "data.model": ("other", MODEL),
    "data.model_dtype": ("bfloat16", MODEL),
    "data.attention": ("eager", MODEL),
    "data.site": ("resid_post.0", MODEL),
    "data.target": ("mlp_out.2", MODEL),
    "arms.sae.skip": (True, {**MODEL, "data.target": "mlp_out.2"}),
    "arms.sae.target_frame": ("input", {**MODEL, "data.target": "mlp_out.2", "arms.sae.frame": "unit"}),
    "arms.sae.sites": ((3, 5), {"arms.sae.frame": "unit"}),
    "arms.sae.balanced": (True, {"arms.sae.sites": (3, 5)}),
    "data.corpus": (("texts:0.5", "rows.jsonl:0.5"), MODEL),
    "data.inputs": ("ids", {**MODEL, "data.corpus": "rows.jsonl"}),
    "data.positions": ("1:", MODEL),
    "data.text_field": ("other", {**MODEL, "data.corpus": "rows.jsonl"}),
    "data.suffixes": ((".txt",), {**MODEL, "data.corpus": "mixed"}),
    "data.txt_unit": ("line", {**MODEL, "data.corpus": "lines.txt", "data.txt_unit": "paragraph"}),
    "data.context": (24, MODEL),
    "data.packing": ("document", MODEL),
    "data.add_bos": (False, MODEL),
    "data.max_chars": (40, MODEL),
    "data.min_chars": (200, {**MODEL, "data.corpus": "rows.jsonl"}),
    "data.chunk_sequences": (8, {**MODEL, **LOG_NORMAL}),
    "data.held_out_frac": (0.4, ARRAY),
    "data.non_finite": ("drop", {**ARRAY, "data.activations": "holed.npy"}),
    "data.order": ("v0.1", STORE),
    "data.activations": ("other.npy", ARRAY),
    "data.activations_key": ("b", {**ARRAY, "data.activations": "two.safetensors", "data.activations_key": "a"}),
    "data.store": ("stores/resid_post.1", STORE),
    "data.store_site": ("resid_post.1", {**STORE, "data.store": "stores", "data.store_site": "resid_post.0"}),
    "evaluation.probing": (False, CODE),
    "evaluation.probe_tokens": (200, CODE),
    "evaluation.min_positives": (36, CODE),
    "evaluation.texts": (("labels.jsonl",), MODEL),
    "evaluation.max_texts": (50, {**MODEL, **TEXTS}),
    "evaluation.max_classes": (1, {**MODEL, **TEXTS}),
    "evaluation.text_splits": (2, {**MODEL, **TEXTS}),
    "data.world.d_in": (9, {}),
    "data.world.n_features": (30, {}),
    "data.world.l0": (2.0, {}),
    "data.world.frequencies": ("power", {}),
    "data.world.correlation": (0.5, {}),
    "data.world.hierarchy": (2, {}),
    "data.world.magnitude_std": (0.5, {}),
    "data.world.spread_steps": (2, {}),
    "data.world.norm": ("none", {}),
    "data.world.sigma": (1.0, {}),
    "data.world.sink_frac": (0.2, HELD),
    "data.world.sink_factor": (9.0, HELD),
    "data.world.norm_median": (5.0, {}),
    "data.world.seed": (1, {}),
    "filter.kind": ("none", SINKS),
    "filter.factor": (100.0, SINKS),
    "filter.window_tokens": (300, {}),
    "filter.drop_special": (True, MODEL),
    "perturbation.kind": ("log_normal", {}),
    "perturbation.sigma": (0.5, LOG_NORMAL),
    "perturbation.frac": (0.3, INJECTED),
    "perturbation.factor": (5.0, INJECTED),
    "perturbation.position": (1, {**MODEL, **INJECTED}),
    "perturbation.direction": ("massive", INJECTED),
    "perturbation.seed": (1, LOG_NORMAL),
    "inject_into": ("training", LOG_NORMAL),
    "d_sae": (17, {}),
    "k": (4, {}),
    "arms.sae.d_sae": (17, {}),
    "arms.sae.score": ("cosine", {}),
    "arms.sae.selector": ("topk", {}),
    "arms.sae.k": (4, {}),
    "arms.sae.frame": ("unit", {}),
    "arms.sae.prefixes": ((8,), {}),
    "arms.sae.norm_restoring": (True, {}),
    "arms.sae.n_groups": (2, {"arms.sae.score": "cosine_grouped"}),
    "arms.sae.bias": (False, {}),
    "arms.sae.bandwidth": (0.2, JUMP),
    "arms.sae.a_owner": ("feature", TWO),
    "arms.sae.value_exponent_owner": ("feature", TWO),
    "arms.sae.a_window": (0.5, LEARNED),
    "arms.init.a_init": (0.5, LEARNED),
    "arms.init.value_exponent_init": (0.5, TWO),
    "arms.init.b_init": ("norm", LEARNED),
    "arms.init.centre": ("zero", {}),
    "arms.seed": (5, {}),
    "arms.lr": (5e-3, {}),
    "arms.a_lr": (3.0, LEARNED),
    "arms.value_exponent_lr": (3.0, TWO),
    "arms.b_lr": (3.0, LEARNED),
    "arms.threshold_lr": (3.0, JUMP),
    "arms.sparsity_weight": (0.5, JUMP),
    "arms.k_start": (6, {"arms.k_start": 9, "arms.k_steps": 4}),
    "arms.k_steps": (5, {"arms.k_start": 9, "arms.k_steps": 3}),
    "arms.start": ("start", {}),
    "arms.input_noise": (2.0, LEARNED),
    "arms.loss.space": ("frame", {"arms.sae.frame": "unit"}),
    "arms.loss.reweight": (1.0, {}),
    "arms.loss.normalise": ("none", {}),
    "arms.loss.aux_k": (1, DEAD),
    "arms.loss.aux_coefficient": (0.5, DEAD),
    "training.steps": (7, {}),
    "training.extended_from": ((3,), {}),
    "training.batch_tokens": (40, {}),
    "training.buffer_tokens": (300, {}),
    "training.store_dtype": ("bfloat16", {}),
    "training.seed": (1, {}),
    "training.optimizer.lr": (2e-3, {}),
    "training.optimizer.beta1": (0.8, {}),
    "training.optimizer.beta2": (0.99, {}),
    "training.optimizer.eps": (1e-3, {}),
    "training.optimizer.clip": (1e-3, {}),
    "training.optimizer.warmup_steps": (3, {}),
    "training.optimizer.decay_frac": (0.6, {}),
    "training.optimizer.state_dtype": ("bfloat16", {}),
    "training.dead_after_tokens": (64, DEAD),
    "training.log_every": (3, {}),
    "training.checkpoint_every": (2, {}),
    "evaluation.held_out_tokens": (96, {}),
    "evaluation.calibration_tokens": (96, {}),
    "evaluation.resamples": (6, PAIR),
    "evaluation.seed": (1, PAIR),
}


def leaves(kind: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of all fields; those of every arm, and of a world, once."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        nested = [
            one for one in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(one)
        ]
        if nested:
            yield from leaves(nested[0], f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}"


def made(changes: Mapping[str, Any]) -> Recipe:
    """A small recipe with one arm; `arms.…` is of that arm."""
    own = {path.removeprefix("arms."): value for path, value in changes.items() if path.startswith("arms.")}
    arm = Arm.of("standard")
    for section in ("sae", "init", "loss"):
        part = {p.removeprefix(f"{section}."): own.pop(p) for p in list(own) if p.startswith(f"{section}.")}
        arm = dataclasses.replace(arm, **{section: dataclasses.replace(getattr(arm, section), **part)})
    arm = dataclasses.replace(arm, **own)
    rest = {path: value for path, value in changes.items() if not path.startswith("arms.")}
    arms = (arm, Arm.of("cosine", "cosine")) if rest.pop("pair", False) else (arm,)
    world = {path.removeprefix("data.world."): rest.pop(path) for path in list(rest) if path.startswith("data.world.")}
    recipe = dataclasses.replace(Recipe(), arms=arms).changed(rest)
    if world:
        assert recipe.data.world is not None
        recipe = recipe.changed({"data.world": dataclasses.replace(recipe.data.world, **world)})
    return recipe


def behaviour(recipe: Recipe, out: Path) -> str:
    """Digest of all that a run computed, without what it says of itself."""
    execute(recipe, out, logs=Logs(False))
    digest = hashlib.sha256()
    for place in ("metrics.jsonl", "arms/standard/sae_weights.safetensors"):
        digest.update((out / place).read_bytes())
    evaluation = json.loads((out / "evaluation.json").read_text())
    digest.update(json.dumps(evaluation, sort_keys=True).encode())
    digest.update("".join(sorted(path.name for path in (out / "checkpoints").glob("*"))).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a recipe can name: models, texts, arrays, stores, an SAE."""
    place = tmp_path_factory.mktemp("place")
    for name, kind in (("model", "llama"), ("other", "qwen3")):
        make_model(kind).save_pretrained(place / name)
        save_tokenizer(place / name)
    for name in ("texts", "mixed"):
        (place / name).mkdir()
        write_texts(place / name)
    (place / "mixed" / "more.py").write_text("x = 1 . y = 2 . " * 200)
    texts = [path.read_text() for path in sorted((place / "texts").iterdir())]
    rows: list[dict[str, Any]] = [{"text": text[: 80 + 10 * i], "other": text[::-1]} for i, text in enumerate(texts)]
    for i, row in enumerate(rows):
        row["input_ids"] = [3 + (7 * i + j * j) % 90 for j in range(32)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = [{"text": text[at : at + 40], "label": at // 45 % 3} for text in texts for at in range(0, 450, 45)]
    (place / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    (place / "lines.txt").write_text("".join(text + "\n" * (1 + i % 2) for i, text in enumerate(texts)))
    generator = np.random.default_rng(0)
    for name in ("rows", "other"):
        np.save(place / f"{name}.npy", generator.normal(size=(800, 8)).astype(np.float32))
    holed = generator.normal(size=(800, 8)).astype(np.float32)
    holed[::100] = np.nan
    np.save(place / "holed.npy", holed)
    save_file({name: generator.normal(size=(800, 8)).astype(np.float32) for name in "ab"}, place / "two.safetensors")
    for block in (0, 1):
        site = {"name": f"resid_post.{block}", "hook_name": f"blocks.{block}.hook_resid_post", "block": block}
        request = {**REQUEST, "site": {**site, "module_path": f"model.layers.{block}", "reads": "output"}}
        sides = small_rows(900, seed=block), small_rows(300, seed=2 + block, document=0)
        write_store(place / "stores" / site["name"], *sides, request=request, shard_tokens=512)
    cosae.save(cosae.SAE.build(d_in=8, d_sae=16, score="inner", selector="batch_topk", k=3), place / "start")
    return place


SLOW = [path for path, (_, needed) in SEEN.items() if needed == CODE]


@pytest.mark.parametrize("path", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in SEEN])
def test_a_field_is_recorded_and_acts(path: str, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value, needed = SEEN[path]
    monkeypatch.chdir(place)
    before, after = made({**WORLD, **needed}), made({**WORLD, **needed, path: value})
    assert to_plain(before) != to_plain(after), "not recorded"
    if path == "data.non_finite":  # which says what refuses
        with pytest.raises(CosaeError, match="must be finite"):
            behaviour(before, tmp_path / "before")
        assert behaviour(after, tmp_path / "after")
        return
    assert behaviour(before, tmp_path / "before") != behaviour(after, tmp_path / "after"), "without a say"


def test_every_field_is_named_here() -> None:
    assert sorted([*SEEN, *NOT_SEEN, "arms.sae.d_in", "arms.sae.d_out"]) == sorted(leaves(Recipe))


def test_a_width_that_is_not_the_datas_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CosaeError, match=r"d_in 9; .* width 8"):
        execute(made({**WORLD, "arms.sae.d_in": 9}), tmp_path / "run", logs=Logs(False))
