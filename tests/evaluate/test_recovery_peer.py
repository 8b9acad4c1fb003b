"""Recovery's metrics against the real sae_lens.synthetic, in an environment of its own ($COSAE_PEERS/saelens)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from cosae.evaluate.recovery import recovery
from cosae.types import Codes

PYTHON = Path(os.environ.get("COSAE_PEERS", "/nonexistent")) / "saelens" / "bin" / "python"
THEIRS = """
import json, sys, torch
from sae_lens.synthetic.evals import ClassificationMetricsCalculator, feature_uniqueness, mean_correlation_coefficient
given = torch.load(sys.argv[1], weights_only=True)
calculator = ClassificationMetricsCalculator(given["decoder"], given["features"])
calculator.add_batch(given["codes"], given["truth"])
found = calculator.compute()
print(json.dumps({
    "mcc": mean_correlation_coefficient(given["decoder"], given["features"]),
    "uniqueness": feature_uniqueness(given["decoder"], given["features"]),
    "precision_argmax": found.precision, "recall_argmax": found.recall, "f1_argmax": found.f1_score,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="set COSAE_PEERS to a folder whose saelens/ has sae-lens")
def test_the_shared_metrics_are_theirs(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 12, generator=generator)
    decoder = torch.cat([features[:20] + 0.3 * torch.randn(20, 12, generator=generator), features[:6]])
    truth = torch.rand(500, 30, generator=generator) * (torch.rand(500, 30, generator=generator) < 0.1)
    codes = torch.cat([truth[:, :20], truth[:, :6]], 1) * (torch.rand(500, 26, generator=generator) < 0.8)
    codes = codes + 0.5 * (torch.rand(500, 26, generator=generator) < 0.03)
    given = {"decoder": decoder, "features": features, "codes": codes, "truth": truth}
    torch.save(given, tmp_path / "given.pt")
    command = [str(PYTHON), "-c", THEIRS, str(tmp_path / "given.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = recovery(decoder, Codes.from_dense(codes), features, Codes.from_dense(truth))
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-5)
