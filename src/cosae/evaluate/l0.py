"""How many features fire on the text at hand, beside how many the threshold was set to.

A threshold fixes L0 on the tokens it was calibrated on; on other text the same threshold lets more or fewer through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cosae.activations.sample import SINKS
from cosae.evaluate.encoded import EncodedPass

DIFFERENCE = 0.2
"""Relative difference from the calibrated L0 beyond which thresholds are said to be another text's."""


def measure(encoded: EncodedPass[Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """L0 with sinks out and in (None without a token), and what the SAE's file says of its calibration."""
    counts = {which: encoded.l0_N[encoded.keep[which]].double() for which in SINKS}
    here = {which: float(found.mean()) if len(found) else None for which, found in counts.items()}
    return beside_calibrated(here, metadata)


def beside_calibrated(here: Mapping[str, float | None], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """L0 by sinks, with the calibrated L0 (None where the file does not know it), and whether the two differ."""
    known = metadata.get("l0_calibrated")
    calibrated = float(known) if isinstance(known, int | float) and known > 0 else None
    out = here.get("sinks_out")
    differs = calibrated is not None and out is not None and abs(out / calibrated - 1) > DIFFERENCE
    return {**here, "calibrated": calibrated, "differs": differs}


def said(found: Mapping[str, Any]) -> str:
    """In words: what fires here, and where the threshold was set."""
    both = [("sinks left out", found["sinks_out"]), ("with sinks", found["sinks_in"])]
    here = ", ".join(f"{value:.1f} {which}" for which, value in both if value is not None)
    return f"L0 here {here}; {found['calibrated']:.1f} on the text that its threshold was set on"
