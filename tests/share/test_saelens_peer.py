"""The plug-in and the readers against the real sae-lens, in an environment of its own ($COSAE_PEERS/saelens)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("COSAE_PEERS", "/nonexistent")) / "saelens" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="set COSAE_PEERS to a folder whose saelens/ has sae-lens and cosae")
def test_every_architecture_agrees_with_the_real_package() -> None:
    spec = importlib.util.spec_from_file_location("peers_interop", HERE / "peers" / "interop.py")
    assert spec is not None
    assert spec.loader is not None
    interop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interop)
    found = interop.measure(str(PYTHON))
    assert len(found["rows"]) > 40
    assert {row["architecture"]: row["difference"] for row in found["rows"] if row["difference"] > 1e-5} == {}
    written = interop.PAGE.read_text(encoding="utf-8")
    assert [row["architecture"] for row in found["rows"] if row["architecture"] not in written] == []


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is not None, reason="sae-lens is here")
def test_without_sae_lens_the_plug_in_says_what_to_install() -> None:
    code = (
        "import cosae, sys\ntry:\n    import cosae.share.saelens\nexcept cosae.CosaeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip().endswith("pip install sae-lens.")
