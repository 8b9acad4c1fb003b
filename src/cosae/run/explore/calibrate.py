"""`cosae calibrate`: an SAE's threshold set anew, on the text that it is to be used on, and written as a new SAE.

SAE, text → activations of its site → one half sets the threshold, the other measures before and after → a new folder
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cosae.activations.sample import SINKS, Sample
from cosae.errors import CosaeError
from cosae.evaluate import reconstruction
from cosae.evaluate.encoded import encode_sample, target_of
from cosae.interop.read import read_sae
from cosae.io.progress import SILENT, Progress
from cosae.report.terminal import text_table
from cosae.run import provenance
from cosae.run.identity import warn_elsewhere
from cosae.run.requests import EvalRequest
from cosae.run.saes import TOKENS, Datasets, describe, saes_in
from cosae.sae.calibrate import calibrate, measure_fve, measure_l0, to_jumprelu
from cosae.sae.file import save
from cosae.sae.model import SAE, Calibration
from cosae.sae.selector import CALIBRATED_SELECTORS


@dataclass(frozen=True)
class Recalibrated:
    """What a recalibration did. before, after: L0 and FVE by sinks on tokens that set no threshold; before is None for
    an SAE that had none."""

    out: Path
    calibration: Calibration
    before: dict[str, dict[str, Any]] | None
    after: dict[str, dict[str, Any]]


def recalibrate(
    path: Path,
    request: EvalRequest,
    out: Path,
    k: float | None = None,
    progress: Progress = SILENT,
    jumprelu: bool = False,
) -> Recalibrated:
    """Write the SAE at `path`, of any format, to `out` as one of cosae's with a threshold for the text asked for.

    k: the mean number of features that shall fire per token, sinks left out; by default what the file was calibrated
    to, else its own k. jumprelu: write a topk or batch_topk SAE as jumprelu, with thresholds per feature by which each
    fires as often on the text as before. Raises CosaeError for an SAE without a threshold (but for jumprelu), or that
    names no k, an `out` that is there, and all that `audit` refuses. The SAE at `path` is left as it is.
    """
    request.check()
    if request.inject is not None:
        raise CosaeError("a threshold is set on activations as they are: drop --inject.")
    if out.exists():
        raise CosaeError(f"{out} is there already, and calibrate replaces nothing: choose another --out.")
    if inside := saes_in(path):
        listed = ", ".join(map(str, inside.values()))
        raise CosaeError(f"one SAE at a time. Got the folder of a run, {path}: name one of {listed}.")
    with progress.phase("reading the SAE"):
        sae = read_sae(path, format=request.format, device=request.device)
    if jumprelu and k is not None:
        raise CosaeError("k has no say in thresholds by which each feature fires as often as before: drop --k.")
    target = None if jumprelu else _target(sae, path, k)
    tokens = request.tokens or TOKENS
    opened = Datasets(request, tokens, progress, calibration_tokens=tokens)
    with progress.phase("activations"), opened as datasets:
        dataset, measured = datasets.of(sae, path)
        sample = dataset.sample("calibration", tokens, request.rule)
    warn_elsewhere(str(path), sae.metadata, dataset)
    calm = sample.activations[~sample.sink_N]
    x_ND = calm.x_ND.float().to(request.device)
    wanted_ND = target_of(sae, calm).float().to(request.device)
    if not len(x_ND):
        raise CosaeError("all tokens given are sinks: there is none to set a threshold on; raise the sink factor.")
    new = copy.deepcopy(sae)
    with progress.phase("calibrating the threshold", 2 * len(x_ND)):
        if jumprelu:
            new = to_jumprelu(sae, x_ND, on_rows=progress.rows)
            found = Calibration(measure_l0(sae, x_ND), measure_l0(new, x_ND, progress.rows), len(x_ND))
        else:
            found = calibrate(new, x_ND, target, on_rows=progress.rows)
    with progress.phase("measuring before and after"):
        before = _measure(sae, measured) if sae.calibrated else None
        after = _measure(new, measured)
    kept = {name: value for name, value in new.metadata.items() if name != "k_guessed"}
    new.metadata = {
        **kept,
        "l0_target": found.target,
        "l0_calibrated": found.l0,
        "calibration_tokens": found.tokens,
        "fve": measure_fve(new, x_ND, y_ND=wanted_ND),
        "calibrated_on": {**describe(dataset, sample, request), **provenance.stamp(), "seed": request.seed},
    }
    save(new, out, probes=x_ND[:8])
    return Recalibrated(out, found, before, after)


def _target(sae: SAE, path: Path, k: float | None) -> float:
    """The L0 that is wanted. Raises CosaeError."""
    if sae.cfg.selector not in CALIBRATED_SELECTORS:
        what = f"{path} keeps the {sae.k} largest of every token ({sae.cfg.selector}), whatever the text"
        raise CosaeError(f"{what}: it has no threshold to calibrate.")
    known = sae.metadata.get("l0_target", sae.metadata.get("l0_calibrated"))
    if k is None and isinstance(known, int | float):
        k = float(known)
    if k is None and "k_guessed" in sae.metadata:
        raise CosaeError(f"{path} does not say how many features shall fire per token: give --k.")
    target = float(sae.k if k is None else k)
    if not 0 < target <= sae.d_sae:
        raise CosaeError(f"k must lie above 0 and at most d_sae = {sae.d_sae}. Got {k} instead.")
    return target


@torch.no_grad()
def _measure(sae: SAE, sample: Sample) -> dict[str, dict[str, Any]]:
    encoded = encode_sample(sae, sample)
    found = {which: reconstruction.summarise(encoded, which) for which in SINKS}
    return {which: {name: one[name] for name in ("l0", "fve", "median_token_fve")} for which, one in found.items()}


def screen(found: Recalibrated) -> str:
    """Before and after as a table."""
    keys = ("l0", "fve", "median_token_fve")
    rows = [
        (which.replace("_", " "), name, *(None if one is None else one[which][key] for key in keys))
        for which in SINKS
        for name, one in (("before", found.before), ("after", found.after))
    ]
    set_on = found.calibration
    title = (
        f"{found.out}: {set_on.l0:.2f} features per token on the {set_on.tokens:,} tokens that set the threshold",
        "Measured on other tokens of the same text:",
    )
    formats = ("", "", ".1f", ".3f", ".3f")
    return text_table(("", "", "L0", "FVE", "median token FVE"), rows, title=title, formats=formats, align="llrrr")
