"""What is worth a line of its own while an arm trains: loss spikes and jumps of the dead share. Reads, changes nothing.

    loss spike  ln of the reconstruction loss above its running mean by more than ln SPIKE and by more than ERRORS
                running standard deviations; an event when it begins
    dead jump   the dead share above its running mean by more than JUMP; the mean then begins again from there

Running means weigh the last 1 / (1 − MEMORY) steps; there are no events in an arm's first WARM steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SPIKE = 1.5
ERRORS = 6.0
JUMP = 0.05
MEMORY = 0.98
WARM = 50


@dataclass
class LossMonitor:
    """What one arm's numbers have been lately: plain numbers, all of them in a checkpoint."""

    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0
    dead: float = 0.0
    high: bool = False

    def look(self, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Events of one more step, whose numbers `train_step` returned: plain mappings with "kind" and "text"."""
        found = [self._loss(float(measured["loss_reconstruction"])), self._dead(float(measured["dead_frac"]))]
        self.seen += 1
        return [event for event in found if event is not None]

    def _loss(self, loss: float) -> dict[str, Any] | None:
        level = math.log(max(loss, 1e-30))
        limit = self.mean + max(math.log(SPIKE), ERRORS * math.sqrt(self.variance))
        usual, was_high = math.exp(self.mean), self.high
        if self.seen >= WARM:
            self.high = level > limit
            level = min(level, limit)
        weight = max(1 - MEMORY, 1 / (self.seen + 1))
        apart = level - self.mean
        self.mean += weight * apart
        self.variance = (1 - weight) * (self.variance + weight * apart * apart)
        if not self.high or was_high:
            return None
        text = f"loss spike: reconstruction loss {loss:.4g}, {loss / usual:.3g} × what it was lately"
        return {"kind": "loss_spike", "loss": loss, "usual": usual, "text": text}

    def _dead(self, dead: float) -> dict[str, Any] | None:
        before = self.dead
        if self.seen >= WARM and dead - before > JUMP:
            self.dead = dead
            text = f"dead features jumped from {100 * before:.1f} to {100 * dead:.1f} %"
            return {"kind": "dead_jump", "dead_frac": dead, "usual": before, "text": text}
        self.dead += (1 - MEMORY if self.seen else 1.0) * (dead - before)
        return None
