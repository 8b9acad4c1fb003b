"""`cosae audit`: SAEs that people already have, of any format that cosae.interop reads, on activations of their site.

Nothing is trained. Where a file holds no inference threshold (an uncalibrated batch_topk), one is found on half of the
sample, for the audit only, and the audit says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.evaluate.audit import audit
from cosae.evaluate.verdict import worse_than_mean
from cosae.interop.read import read_sae
from cosae.io.atomic import written
from cosae.io.progress import SILENT, Progress
from cosae.report.audit import write_audit_page
from cosae.run import provenance
from cosae.run.folder import write_json
from cosae.run.identity import warn_elsewhere
from cosae.run.plan.check import check_measuring
from cosae.run.plan.resources import human
from cosae.run.requests import EvalRequest
from cosae.run.saes import TOKENS, Datasets, calibrated, describe, every_sae, names_of

FORMAT, VERSION = "cosae-audit", 2
SHOWN_METADATA = ("format", "model", "site", "hook_name", "tokens", "filter", "norm_summary")


def run_audit(
    paths: Sequence[Path], request: EvalRequest, out: Path | None = None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Audit the SAEs at `paths`; returns what audit.json holds, and writes it with audit.html into `out` if given.

    A run's folder stands for all of its SAEs.

    Raises CosaeError for a path that holds no SAE, a model, site, corpus or file that cannot be read, widths that do
    not fit, and a place that cannot be written.
    """
    request.check()
    if not paths:
        raise CosaeError("audit needs at least one SAE: cosae audit SAE…")
    if out is not None and out.exists() and not out.is_dir():
        raise CosaeError(f"{out} is a file; give a folder for the audit with --out.")
    paths = every_sae(paths)
    with progress.phase("reading SAEs"):
        saes = [read_sae(path, format=request.format, device=request.device) for path in paths]
    found = []
    with Datasets(request, request.tokens or TOKENS, progress) as datasets:
        for name, path, sae in zip(names_of(paths), paths, saes, strict=True):
            with progress.phase(f"activations for {name}"):
                dataset, sample = datasets.of(sae, path)
                elsewhere = warn_elsewhere(name, sae.metadata, dataset)
                sae, warning = calibrated(sae, sample)
            about = {
                "name": name,
                "path": str(path),
                "sae": sae.cfg.to_dict(),
                "source": describe(dataset, sample, request),
                "provenance": {key: sae.metadata.get(key) for key in SHOWN_METADATA},
                "warning": warning,
                "elsewhere": elsewhere or None,
            }
            needed = human(check_measuring([sae], sample, request.device))
            with progress.phase(f"auditing {name}, which takes about {needed} of memory"):
                numbers = audit(sae, sample, spell=dataset.spell, seed=request.seed, progress=progress)
            if elsewhere and worse_than_mean(numbers):
                numbers["verdict"]["because"] += f"; {elsewhere}"
            found.append({**about, **numbers})
    result = {"format": FORMAT, "version": VERSION, **provenance.stamp(), "seed": request.seed, "saes": found}
    if out is not None:
        with written(out, "choose another --out"):
            out.mkdir(parents=True, exist_ok=True)
        write_json(out / "audit.json", result, "make room, or choose another --out")
        write_audit_page(result, out / "audit.html")
    return result
