"""What a run writes of itself: run.json, and the provenance in each SAE's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cosae import kernels
from cosae.activations.stream import ActivationStream
from cosae.interop.public import LOCAL
from cosae.io.untrusted import parse_json
from cosae.io.values import to_plain
from cosae.recipe import Recipe
from cosae.run import provenance
from cosae.run.dataset.base import Dataset
from cosae.run.folder import FORMAT, METRICS, VERSION
from cosae.sae.model import Calibration
from cosae.text.mixture import parse_corpus
from cosae.train.loop import MOVING, exponent_moving
from cosae.train.step import ArmState


def run_record(
    status: str,
    recipe: Recipe,
    data: Dataset,
    stream: ActivationStream,
    states: Sequence[ArmState],
    calibrations: Mapping[str, Calibration],
    moving: Mapping[str, float | None],
) -> dict[str, Any]:
    """run.json, but for when the run started, was resumed and how long it trained.

    calibrations, moving  by arm; empty while the run goes on (see `exponent_changes`)
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "status": status,
        "name": recipe.name,
        "setting": describe_setting(recipe),
        **provenance.stamp(),
        "hardware": provenance.hardware(recipe.device),
        "recipe": to_plain(recipe),
        "seed": recipe.training.seed,
        "stream_digest": stream.digest,
        "tokens": stream.n_tokens,
        "norm_summary": asdict(stream.norm_summary),
        "sinks": stream.sinks if stream.sinks["share"] else None,
        "filter": to_plain(stream.filter),
        "non_finite": stream.monitor.metadata(),
        "source": data.describe(),
        "arms": {s.arm.name: _arm_record(s, stream.n_tokens, calibrations, moving) for s in states},
    }


def _arm_record(
    state: ArmState, done: int, calibrations: Mapping[str, Calibration], moving: Mapping[str, float | None]
) -> dict[str, Any]:
    sae, name = state.sae, state.arm.name
    change = moving.get(name)
    return {
        "score": sae.cfg.score,
        "selector": sae.cfg.selector,
        "frame": sae.cfg.frame,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "seed": state.arm.seed,
        "kernel": kernels.describe(sae.kernel, sae.device, state.cache.choices),
        "stream_digest": state.digest.hex(),
        "tokens_per_second": done / state.seconds if state.seconds else None,
        "a_change": change,
        "a_moving": None if change is None else abs(change) > MOVING,
        "stopped": state.stopped,
        "l0_target": sae.k,
        "l0_calibrated": calibrations[name].l0 if calibrations else None,
    }


def sae_provenance(
    name: str, recipe: Recipe, data: Dataset, stream: ActivationStream, calibration: Calibration
) -> dict[str, Any]:
    """What an SAE's file says of where it comes from."""
    site = data.site
    (own,) = (arm for arm in recipe.arms if arm.name == name)
    return {
        "arm": name,
        "run": recipe.name,
        "model": data.model_name,
        "site": None if site is None else site.name,
        "hook_name": None if site is None else site.hook_name,
        "hf_hook_name": None if site is None else site.module_path,
        **({} if data.target is None else {"target": data.target.name, "target_hook_name": data.target.hook_name}),
        "source": data.describe(),
        LOCAL: names_of_here(recipe),
        "tokens": recipe.training.steps * recipe.training.batch_tokens,
        "seed": own.seed,
        "filter": to_plain(stream.filter),
        "perturbation": to_plain(recipe.perturbation),
        "inject_into": recipe.inject_into,
        "norm_summary": asdict(stream.norm_summary),
        "l0_target": calibration.target,
        "l0_calibrated": calibration.l0,
        "calibration_tokens": calibration.tokens,
        "fve": calibration.fve,
        "stream_digest": stream.digest,
        "recipe": to_plain(replace(recipe, arms=(own,))),
        "commit": provenance.commit(),
        "packages": provenance.packages(),
    }


def names_of_here(recipe: Recipe) -> list[str]:
    """The model, texts and files of a recipe that lie on this machine: a name alone may look like one of the hub."""
    data = recipe.data
    texts = (source.spec.removeprefix("hf:") for source in parse_corpus(data.corpus))
    places = [data.model, *(part for text in texts for part in (text, text.partition(":")[0]))]
    return sorted({place for place in places if place not in ("embedded", "pylib") and Path(place).exists()})


def exponent_changes(recipe: Recipe, logged: Sequence[Mapping[str, Any]], out: Path | None) -> dict[str, float | None]:
    """Change of each arm's mean a late at full rate, from what was logged, in memory or to metrics.jsonl."""
    if out is not None and (out / METRICS).exists():
        logged = [parse_json(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]
    paths: dict[str, list[tuple[int, float]]] = {}
    for record in logged:
        for name, numbers in record["arms"].items():
            if numbers.get("a") is not None:
                paths.setdefault(name, []).append((record["step"], numbers["a"]))
    return {name: exponent_moving(path, recipe.training) for name, path in paths.items()}


def describe_setting(recipe: Recipe) -> str:
    """What was done to the norms, in words."""
    if recipe.data.world is not None:
        return f"synthetic world, norm {recipe.data.world.norm}"
    if recipe.perturbation.kind == "none":
        return "natural"
    where = "" if recipe.inject_into == "both" else f" in {recipe.inject_into} only"
    return f"injected {recipe.perturbation}{where}"
