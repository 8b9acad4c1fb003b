"""What holds for every measurement: it never changes an SAE, and any batch size gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

import cosae
from cosae.evaluate import encoded, geometry, gradients
from cosae.evaluate.norms import read_time
from cosae.sae.calibrate import calibrate
from cosae.types import Activations
from tests.support import passes

N, D, F = 700, 12, 36
SAES = (("inner", "batch_topk", "raw"), ("cosine", "jumprelu", "raw"), ("cosine_per_feature", "topk", "unit"))


def activations() -> tuple[Activations, torch.Tensor]:
    """Lengths vary; the first tokens are sinks; one row is padding."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(N, D, generator=generator) * (0.5 * torch.randn(N, 1, generator=generator)).exp()
    x_ND[:6] *= 40
    x_ND[9] = 0
    return Activations.bare(x_ND), torch.arange(N) < 6


def sae_of(score: str, selector: str, frame: str, seed: int = 0) -> cosae.SAE:
    x_ND = activations()[0].x_ND
    options: dict[str, Any] = {"score": score, "selector": selector, "frame": frame, "k": 4, "seed": seed}
    sae = cosae.SAE.build(d_in=D, d_sae=F, sample=x_ND, **options)
    if sae.score.family.exponent_owner != "fixed":
        sae.score.set_exponent(0.4)
    calibrate(sae, x_ND)
    return sae


Measure = Callable[[cosae.SAE, Activations, torch.Tensor, int], Any]
MEASUREMENTS: Mapping[str, Measure] = {
    "reconstruction": lambda s, x, k, b: passes.measure_both(s, x, k, b),
    "norm_driven": lambda s, x, k, b: passes.norm_driven(s, x, k, batch_tokens=b, n_resamples=20),
    "firing_norms": lambda s, x, k, b: passes.firing_norms(s, x, k, batch_tokens=b),
    "sinks": lambda s, x, k, b: passes.sink_metrics(s, x, k, b),
    "read_time": lambda s, x, k, b: passes.measure(read_time.remove_norm(s, x[~k]), x, batch_tokens=b),
    "geometry": lambda s, x, k, b: geometry.geometry(s),
    "matching": lambda s, x, k, b: passes.match_saes(s, sae_of("inner", "batch_topk", "raw", 1), x, k).numbers(),
    "gradients": lambda s, x, k, b: gradients.measure_gradients(s, x, batch_tokens=128, n_batches=2),  # of a batch
    "audit": lambda s, x, k, b: passes.audit(s, x, k, batch_tokens=b),
}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Plain numbers by path, but those named per batch."""
    if isinstance(value, Mapping):
        items = {str(key): one for key, one in value.items() if "per_batch" not in str(key)}.items()
    elif isinstance(value, list | tuple):
        items = {str(i): one for i, one in enumerate(value)}.items()
    elif isinstance(value, np.ndarray):
        return {path: value}
    else:
        return {path: value}
    return {k: v for key, one in items for k, v in leaves(one, f"{path}/{key}").items()}


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("make", SAES, ids="-".join)
def test_no_measurement_changes_an_sae_nor_depends_on_the_batch(
    name: str, make: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, sink_N = activations()
    sae = sae_of(*make)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    kept = x.x_ND.clone()
    found = []
    for size in (N, 64, 7):
        monkeypatch.setattr(encoded, "BATCH_TOKENS", size)
        found.append(leaves(MEASUREMENTS[name](sae, x, sink_N, size)))
    after = sae.state_dict()
    assert before.keys() == after.keys()
    assert all(
        torch.equal(value.view(-1).view(torch.uint8), after[key].view(-1).view(torch.uint8))
        for key, value in before.items()
    )
    assert torch.equal(kept, x.x_ND)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in found[0].items():
            if isinstance(value, int | float | np.ndarray) and not isinstance(value, bool):
                # an audit's numbers have six decimals: the last of them may fall to either side
                close = 1.5e-6 if name == "audit" else 1e-6
                assert other[key] == pytest.approx(value, abs=close, rel=1e-6, nan_ok=True), key
            else:
                assert other[key] == value, key
