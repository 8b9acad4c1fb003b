"""Readers, writers and the plug-in against the real packages, each in an environment of its own ($COSAE_PEERS)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

import cosae
from cosae.interop.saelens import cosine
from cosae.interop.saelens.dense import dense_codes
from cosae.sae import file, frame
from cosae.sae.calibrate import calibrate
from cosae.sae.score import SCORES
from cosae.sae.selector import SELECTORS
from tests.interop.peers import all as peers
from tests.support.foreign_files import inputs

BUILT = [name for name in peers.CHECKS if peers.find_python(name) is not None]


@pytest.mark.slow
@pytest.mark.skipif(not BUILT, reason="build them with tests/interop/peers/environments.py")
@pytest.mark.parametrize("name", BUILT)
def test_every_architecture_agrees_with_the_real_package(name: str) -> None:
    rows = peers.measure(name)
    assert {row["architecture"]: row["difference"] for row in rows if not row["difference"] <= 1e-5} == {}
    written = peers.PAGE.read_text(encoding="utf-8")
    missing = [f"{row['direction']} | {row['architecture']} " for row in rows]
    assert [one for one in missing if one not in written] == [], "write the page again: peers/all.py"


def test_the_paper_s_files_agree_with_its_formulae() -> None:
    rows = peers.paper()
    assert len(rows) == 3
    assert max(row["difference"] for row in rows) <= 1e-5


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("score", SCORES)
def test_dense_codes_are_those_of_encode(score: str, selector: str) -> None:
    """What the plug-in computes, without SAELens; and what its architectures without a value exponent refuse."""
    x_ND = inputs()
    sae = cosae.SAE.build(x_ND.shape[1], 20, score, selector, 3, sample=x_ND)
    calibrate(sae, x_ND)
    weights = file.to_disk(sae)
    framed = frame.normalize(sae.cfg.frame, x_ND, sae.centre_D)
    found, wanted = dense_codes(sae.cfg, framed, weights, lambda s: s), sae.encode(x_ND).to_dense()
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
    if "two" in score:
        with pytest.raises(cosae.CosaeError, match="score of cosine_jumprelu must be one of inner, "):
            cosine.assemble({"architecture": cosine.JUMPRELU, "score": score}, weights, "it")


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is not None, reason="sae-lens is here")
def test_without_sae_lens_the_plug_in_says_what_to_install() -> None:
    code = (
        "import cosae, sys\ntry:\n    import cosae.interop.saelens.plugin\n"
        "except cosae.CosaeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip().endswith("pip install sae-lens.")
