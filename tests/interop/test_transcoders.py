"""Transcoders of sparsify, SAELens and circuit-tracer: written, read again, refused where that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.interop import transcoders
from cosae.interop.read import read_sae
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from tests.interop.peers.environments import find_python

D, F, K = 12, 40, 4
HERE = Path(__file__).parent
FITTING = {"sparsify": ("topk",), "saelens": ("batch_topk", "jumprelu"), "circuit_tracer": ("batch_topk", "jumprelu")}
PAIRS = [(format, selector) for format, selectors in FITTING.items() for selector in selectors]


def drawn(n: int = 400) -> Tensor:
    return 0.7 + torch.randn(n, D, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def made(selector: str, skip: bool, score: str = "inner", **more: Any) -> SAE:
    """Random weights off every special value: a centre, a constant, decoder rows of any length."""
    x = drawn()
    sae = SAE.build(D, F, score, selector, K, 0, d_out=D, skip=skip, sample=x, target=3 * x.flip(-1).relu(), **more)
    draw = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    calibrate(sae, x)
    sae.metadata = {"model": "gpt2", "hook_name": "blocks.3.mlp.hook_in", "target_hook_name": "blocks.3.hook_mlp_out"}
    return sae


def close(one: SAE, two: SAE) -> None:
    x = drawn()
    with torch.no_grad():
        codes, again, wanted, found = one.encode(x), two.encode(x), one(x), two(x)
    assert torch.equal(codes.to_dense() != 0, again.to_dense() != 0)
    torch.testing.assert_close(again.to_dense(), codes.to_dense(), rtol=1e-4, atol=1e-5)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("score", ["inner", "inner_unit"])
@pytest.mark.parametrize(("format", "selector"), PAIRS)
def test_what_is_written_is_read_again(format: str, selector: str, score: str, skip: bool, tmp_path: Path) -> None:
    sae = made(selector, skip, score)
    back = read_sae(transcoders.write(sae, tmp_path / "out", format))
    close(sae, back)
    assert (back.target is not None, back.cfg.skip) == (True, skip)
    if format != "sparsify":
        assert back.metadata["hook_name"] == "blocks.3.mlp.hook_in"
        assert back.metadata["target"] == "blocks.3.hook_mlp_out"


def test_circuit_tracers_layers_lie_beside_one_configuration(tmp_path: Path) -> None:
    sae = made("jumprelu", False)
    assert transcoders.write(sae, tmp_path / "set", "circuit_tracer").name == "layer_3.safetensors"
    transcoders.write(sae, tmp_path / "set", "circuit_tracer", layer=0)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "config.yaml",
        "layer_0.safetensors",
        "layer_3.safetensors",
    ]
    assert 'feature_input_hook: "mlp.hook_in"' in (tmp_path / "set" / "config.yaml").read_text()
    assert read_sae(tmp_path / "set" / "layer_0.safetensors").metadata["target"] == "blocks.0.hook_mlp_out"


@pytest.mark.parametrize(
    ("sae", "format", "words"),
    [
        (lambda: made("topk", False, "cosine"), "sparsify", "score cosine cannot be written"),
        (lambda: made("topk", False, frame="unit"), "sparsify", "frame unit cannot"),
        (lambda: made("topk", False, norm_restoring=True), "sparsify", "restores norms cannot"),
        (lambda: made("topk", False), "saelens", "thresholds, no top-k"),
        (lambda: made("jumprelu", False), "sparsify", "top-k alone"),
        (lambda: made("gated", False), "saelens", "gated cannot be written"),
        (lambda: SAE.build(D, F, "inner", "topk", K), "sparsify", "is no transcoder"),
        (lambda: made("topk", False), "npz", "format of a transcoder must be"),
    ],
)
def test_what_their_loaders_cannot_compute_is_refused(sae: Any, format: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CosaeError, match=words):
        transcoders.write(sae(), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


PEERS = {"sparsify": "sparsify", "saelens": "saelens", "circuit_tracer": "circuit_tracer"}


@pytest.mark.slow
@pytest.mark.parametrize("format", FITTING)
def test_the_real_package_computes_the_same(format: str, tmp_path: Path) -> None:
    """Both ways: what it saves is read here, what is written here it loads; 1e-5 of the largest value."""
    python = find_python(PEERS[format])
    if python is None:
        pytest.skip(f"build it with tests/interop/peers/environments.py {PEERS[format]}")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    for selector in FITTING[format]:
        for skip in (False, True):
            place = tmp_path / f"{selector}-{skip}"
            sae = made(selector, skip)
            transcoders.write(sae, place / "ours", format)
            command = [python, HERE / "peers" / "transcoder_checks.py", format, place, str(int(skip))]
            done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            found = json.loads(done.stdout.strip().splitlines()[-1])
            assert found["read"] < 1e-5
            y = torch.tensor(found["written"])
            wanted = sae(drawn()[:64]).detach()
            assert float((y - wanted).abs().max() / wanted.abs().max()) < 1e-5
