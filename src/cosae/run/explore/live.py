"""The model behind the browser's live pages: what fires on a text, and the model's text with a feature changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch

from cosae.activations.sinks import sink_mask
from cosae.browse.store.reader import FeatureStore
from cosae.browse.top import kept
from cosae.errors import CosaeError, check_choice
from cosae.models.intervene.window import own_filter
from cosae.models.sites import resolve_site
from cosae.models.unembed import spelling
from cosae.run.dataset.model import open_model
from cosae.run.explore.steer import Steerable, continued
from cosae.run.explore.text import read_text
from cosae.run.requests import Place, SteerOptions
from cosae.run.saes import read_with_model
from cosae.sae.model import SAE
from cosae.types import Activations

MOST_TOKENS, MOST_NEW_TOKENS = 1024, 200
ACTIONS = ("add", "set", "scale", "ablate")


@dataclass(frozen=True)
class _Opened:
    """The model, and the SAEs of the store by name."""

    model: Any
    tokenizer: Any
    saes: Mapping[str, SAE]
    data: Any


def live_model(store: FeatureStore, place: Place, log: Callable[[str], None] = lambda _: None) -> LiveModel | None:
    """The model behind the pages of a store; None where the files of its SAEs are not at hand."""
    at_hand = all(one.path is not None and Path(one.path).exists() for one in store.saes)
    return LiveModel(store, place, log) if at_hand else None


class LiveModel:
    """The model of a store with its SAEs (`cosae.browse.server.live.Live`): opened when it is first asked, one call at
    a time."""

    def __init__(self, store: FeatureStore, place: Place, log: Callable[[str], None] = lambda _: None) -> None:
        self._store, self._place, self._log = store, place, log
        self._lock, self._stopped = Lock(), Event()
        self._held: _Opened | None = None

    def activations(self, text: str) -> dict[str, Any]:
        """Everything that fires on a text. Raises CosaeError for one that is empty or too long."""
        if not text.strip():
            raise CosaeError("there is no text to read: type some.")
        with self._lock:
            opened = self._opened()
            site = resolve_site(opened.model, opened.data.site)
            found = read_text(opened.model, opened.tokenizer, site, opened.data, text, MOST_TOKENS)
            norms = self._store.overview().norms
            sink_N = sink_mask(found, norms.median, norms.factor).tolist()
            spelled = [spelling(opened.tokenizer, token) for token in found.token_N.tolist()]
            rows = zip(spelled, found.norm_N.tolist(), sink_N, strict=True)
            tokens = [{"text": text, "norm": norm, "sink": sink} for text, norm, sink in rows]
            saes = [self._under(name, sae, found) for name, sae in opened.saes.items()]
        return {"tokens": tokens, "saes": saes}

    def _under(self, name: str, sae: SAE, found: Activations) -> dict[str, Any]:
        """The entries of one SAE, tokens that its filter leaves out, and what fires there at most in the store."""
        with torch.no_grad():
            codes = sae.encode(found.x_ND.to(sae.device))
        entries = zip(codes.token_E.tolist(), codes.feature_E.tolist(), codes.value_E.tolist(), strict=True)
        shown = [entry for entry in entries if entry[2] != 0]
        largest_F = self._store.columns(name)["largest"]
        largest = {feature: float(largest_F[feature]) for feature in sorted({feature for _, feature, _ in shown})}
        left_out = (~kept(found, own_filter(sae.metadata))).nonzero()[:, 0].tolist()
        return {"name": name, "entries": shown, "left_out": left_out, "largest": largest}

    def steer(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A continuation with and without a change. Raises CosaeError for what cannot be asked."""
        sae, prompt, action = (_text(given, name) for name in ("sae", "prompt", "action"))
        check_choice("action", action, ACTIONS)
        change: dict[str, Any] = {"ablate": True} if action == "ablate" else {action: _number(given, "amount")}
        options = SteerOptions(
            (_whole(given, "feature", 2**31),),
            new_tokens=_whole(given, "new_tokens", MOST_NEW_TOKENS),
            temperature=_number(given, "temperature"),
            **change,
        )
        options.check()
        seed = _whole(given, "seed", 2**63 - 1)
        self._store.sae(sae)
        with self._lock:
            opened = self._opened()
            parts = Steerable(opened.saes[sae], opened.data, opened.model, opened.tokenizer)
            found = continued(parts, prompt, options, seed, self._stopped.is_set)
            self._check_wanted()
        return {"what": found.what, "without": found.without, "changed": found.changed, "notes": list(found.notes)}

    def stop(self, wait: float = 0.0) -> bool:
        """End the call in progress after its current token, and refuse later ones. A model that is being loaded, or
        reads a text, cannot be stopped. Returns whether none is in progress, after as many seconds at most."""
        self._stopped.set()
        ended = self._lock.acquire(timeout=wait)
        if ended:
            self._lock.release()
        return ended

    def _check_wanted(self) -> None:
        if self._stopped.is_set():
            raise CosaeError("the server is stopping.")

    def _opened(self) -> _Opened:
        self._check_wanted()
        if self._held is None:
            self._log("opening the model")
            read = {one.name: read_with_model(Path(one.path or ""), self._place) for one in self._store.saes}
            data = next(iter(read.values()))[1]
            model, tokenizer = open_model(data, self._place.device)
            self._held = _Opened(model, tokenizer, {name: sae for name, (sae, _) in read.items()}, data)
        return self._held


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise CosaeError(f"{name} must be text. Got {str(value)[:80]!r} instead.")
    return value


def _number(given: Mapping[str, Any], name: str) -> float:
    value = given.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CosaeError(f"{name} must be a number. Got {str(value)[:80]!r} instead.")
    return float(value)


def _whole(given: Mapping[str, Any], name: str, most: int) -> int:
    value = given.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise CosaeError(f"{name} must be a whole number from 0 to {most:,}. Got {str(value)[:80]!r} instead.")
    return value
