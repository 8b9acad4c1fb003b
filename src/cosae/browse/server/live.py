"""What the pages ask of a running model; `cosae.run` implements it, as it knows how models are opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Live(Protocol):
    """A model with the SAEs of the store. One call at a time; both raise CosaeError for what they cannot do."""

    def activations(self, text: str) -> Mapping[str, Any]:
        """tokens: [{text, norm, sink}]; saes: [{name, entries: [[token, feature, value], …]}], all that fires."""

    def steer(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """given: sae, feature, action (add, set, scale, ablate), amount, prompt, new_tokens, temperature, seed.

        Returns what: the change in words; without, changed: both texts; notes: warnings.
        """

    def stop(self, wait: float = 0.0) -> bool:
        """End the call in progress soon, and refuse later ones. Returns whether none is in progress, after as many
        seconds at most."""
