"""Readers, writers and the plug-in against the real packages, each in an environment of its own ($COSAE_PEERS)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.interop.peers import all as peers

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


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is not None, reason="sae-lens is here")
def test_without_sae_lens_the_plug_in_says_what_to_install() -> None:
    code = (
        "import cosae, sys\ntry:\n    import cosae.interop.saelens.plugin\n"
        "except cosae.CosaeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip().endswith("pip install sae-lens.")
