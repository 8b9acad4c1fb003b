"""An export for Neuronpedia → its server, through the `neuronpedia` client (1.2); planned first, sent only if asked.

The server takes (checked here, before anything is sent): up to 128 features a batch, each with at least one
activation, up to 1,024 tokens with as many values, a density of 0 to 1, up to 20 logits a side. Dead features have no
activation and are left out. Batches that arrived are written down in upload.json: an interrupted upload goes on there.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.interop.neuronpedia.dashboards import FORMAT, MARK
from cosae.interop.neuronpedia.settings import Dashboard
from cosae.io.atomic import write_text
from cosae.io.untrusted import one_line, parse_json, read_json, read_text
from cosae.shown import counted

SENT = "upload.json"
KEY = "NEURONPEDIA_API_KEY"
MAX_FEATURES, MAX_TOKENS, MAX_LOGITS = 128, 1024, 20
MAX_BATCH_BYTES = 2**31


@dataclass(frozen=True)
class Plan:
    """What an upload sends: batches are file names with their numbers of features; dead features are left out."""

    model_id: str
    set_name: str
    layer: int
    batches: tuple[tuple[str, int], ...]
    dead: int

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.set_name}"

    @property
    def features(self) -> int:
        return sum(n for _, n in self.batches)

    def __str__(self) -> str:
        left_out = f"; {counted(self.dead, 'dead feature')} left out: nothing to show" if self.dead else ""
        to = f"source {self.source} of model {self.model_id}"
        return f"{counted(self.features, 'feature')} in {counted(len(self.batches), 'batch')} for {to}{left_out}"


def check_ready() -> None:
    """Raises CosaeError unless the client is installed and a key is set."""
    _client()
    if not os.environ.get(KEY):
        raise CosaeError(f"uploading needs your Neuronpedia API key in the environment variable {KEY}: set it first.")


def same_export(out: Path, settings: Dashboard, metadata: Mapping[str, Any]) -> bool:
    """Whether `out` holds the export of these settings, SAE and text."""
    if not (out / MARK).is_file():
        return False
    mark = read_json(out / MARK)
    names = ("sae_sha256", "model_sha256", "sequences_sha256", "model", "site", "corpus", "context", "seed")
    return mark.get("settings") == asdict(settings) and all(mark.get(name) == metadata.get(name) for name in names)


def plan(out: Path) -> Plan:
    """Read the export in `out` and check it against the server's limits. Raises CosaeError naming what breaks one."""
    mark = read_json(out / MARK)
    if mark.get("format") != FORMAT or not isinstance(mark.get("settings"), dict):
        raise CosaeError(f"{out} holds no export for Neuronpedia: make one with `cosae export neuronpedia`.")
    settings = mark["settings"]
    paths = sorted(out.glob("batch-*.json"), key=lambda path: int(path.stem.split("-")[1]))
    found, dead = [], 0
    for path in paths:
        batch = _read_batch(path)
        living = [feature for feature in batch["features"] if feature["activations"]]
        for feature in living:
            check_feature(feature, path)
        if len(living) > MAX_FEATURES:
            raise CosaeError(f"{path} has {len(living)} features; Neuronpedia takes up to {MAX_FEATURES} at once.")
        dead += len(batch["features"]) - len(living)
        if living:
            found.append((path.name, len(living)))
    if not found:
        raise CosaeError(f"{out}: every feature is dead on this text: there is nothing to upload, read more text.")
    return Plan(settings["model_id"], settings["set_name"], settings["layer"], tuple(found), dead)


def check_feature(feature: Mapping[str, Any], path: Path) -> None:
    """Raises CosaeError where one feature breaks the server's limits."""
    where = f"{path}, feature {feature['feature_index']}"
    if not 0 <= feature["frac_nonzero"] <= 1:
        raise CosaeError(f"{where}: the density must lie between 0 and 1. Got {feature['frac_nonzero']} instead.")
    for side in ("pos", "neg"):
        if len(feature[f"{side}_str"]) != len(feature[f"{side}_values"]) or len(feature[f"{side}_str"]) > MAX_LOGITS:
            raise CosaeError(f"{where}: up to {MAX_LOGITS} logits a side, each with its token, are allowed.")
    for one in feature["activations"]:
        n, values = len(one["tokens"]), len(one["values"])
        if n != values or not 1 <= n <= MAX_TOKENS:
            needs = f"1 to {MAX_TOKENS} tokens and as many values"
            raise CosaeError(f"{where}: an activation must have {needs}. Got {n} tokens and {values} values instead.")
        if not all(math.isfinite(value) for value in one["values"]):
            raise CosaeError(f"{where}: an activation holds a value that is not a finite number.")


def upload(out: Path, plan: Plan, log: Callable[[str], None] = lambda _: None) -> str:
    """Send what `plan` says, batch by batch, and say what was done.

    Raises CosaeError without the client or a key, and where the server refuses or cannot be reached; batches that
    arrived are not sent again.
    """
    check_ready()
    client, place = _client(), out / SENT
    target, sent = [plan.model_id, plan.source], list[str]()
    if place.is_file():
        before = read_json(place)
        sent = list(before.get("batches", [])) if before.get("target") == target else []
    todo = [(name, n) for name, n in plan.batches if name not in sent]
    source: Any = _source(client, plan) if todo else None
    for done, (name, _) in enumerate(todo):
        features = [_feature(client, one, plan) for one in _read_batch(out / name)["features"] if one["activations"]]
        _ask(partial(source.upload_batch, features), f"{done} of {counted(len(todo), 'batch')} arrived")
        sent.append(name)
        write_text(place, json.dumps({"target": target, "batches": sent}))
        log(f"sent {done + 1} of {counted(len(todo), 'batch')}")
    return f"sent {counted(sum(n for _, n in todo), 'feature')} to source {plan.source} of model {plan.model_id}"


def _client() -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for name in ("np_activation", "np_feature", "np_source_set", "requests.source_set_request"):
                importlib.import_module(f"neuronpedia.{name}")
            return importlib.import_module("neuronpedia")
    except ImportError:
        raise CosaeError("uploading needs Neuronpedia's client: pip install neuronpedia.") from None


def _source(client: Any, plan: Plan) -> Any:
    """The source to upload to; its set is made where there is none yet."""
    sets = client.np_source_set.SourceSet

    def find() -> Any:
        try:
            found = sets.get(plan.model_id, plan.set_name)
        except Exception as error:  # an HTTPError of requests, told from others by its words
            if "not found" not in str(error).lower():
                raise
            found = sets.new(plan.set_name, plan.model_id)
        return found.get_source_for_layer_number(plan.layer)

    return _ask(find, "nothing was sent")


def _feature(client: Any, feature: Mapping[str, Any], plan: Plan) -> Any:
    """A feature of a batch file as the client's object. The top group has no interval: its −1 stay here."""
    logit, activation = client.np_feature.Logit, client.np_activation.Activation
    where = {"modelId": plan.model_id, "source": plan.source, "index": feature["feature_index"]}
    keys, shown = {"quantileMin": "bin_min", "quantileMax": "bin_max", "quantileFraction": "bin_contains"}, []
    for one in feature["activations"]:
        interval = {theirs: one[ours] if one["bin_contains"] >= 0 else None for theirs, ours in keys.items()}
        shown.append(activation(**where, tokens=one["tokens"], values=one["values"], **interval))
    return client.np_feature.Feature(
        **where,
        density=feature["frac_nonzero"],
        top_logits=[logit(t, v) for t, v in zip(feature["pos_str"], feature["pos_values"], strict=True)],
        bottom_logits=[logit(t, v) for t, v in zip(feature["neg_str"], feature["neg_values"], strict=True)],
        activations=shown,
    )


def _ask(question: Callable[[], Any], progress: str) -> Any:
    """The client's answer; it prints as it goes, and raises what requests raises."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return question()
    except Exception as error:  # the client and requests raise errors of many kinds
        told = {"NPUnauthorizedError": "the key is not accepted", "ConnectionError": "the server could not be reached"}
        words = told.get(type(error).__name__, one_line(error, 200))
        raise CosaeError(f"Neuronpedia did not take the upload ({words}); {progress}: run the command again.") from None


def _read_batch(path: Path) -> dict[str, Any]:
    try:
        batch: dict[str, Any] = parse_json(read_text(path, MAX_BATCH_BYTES), finite=False)
        batch["features"][0]["activations"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise CosaeError(f"{path} is not a batch of features: make the export again.") from None
    return batch
