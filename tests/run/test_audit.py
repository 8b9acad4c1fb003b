"""`cosae audit` from files to page: own and foreign SAEs, a model or a file of vectors, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import cosae
from cosae.cli import main
from cosae.errors import CosaeError
from cosae.interop.dictionary_learning.write import write as write_dictionary
from cosae.io.progress import Progress
from cosae.report.audit import audit_text
from cosae.run.audit import run_audit
from cosae.run.evaluate import evaluate
from cosae.run.plan import check
from cosae.run.plan.memory import measuring_memory
from cosae.run.requests import EvalRequest
from cosae.sae.calibrate import calibrate

D = 12


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of vectors whose lengths vary."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(900, D, generator=generator) * (0.6 * torch.randn(900, generator=generator)).exp()[:, None]
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, x_ND.numpy())
    return path


def sae_on(vectors: Path, score: str = "inner", calibrated: bool = True, d_in: int = D) -> cosae.SAE:
    x_ND = torch.from_numpy(np.load(vectors))
    sample = x_ND if d_in == D else None
    sae = cosae.SAE.build(d_in=d_in, d_sae=30, score=score, selector="batch_topk", k=4, seed=0, sample=sample)
    if calibrated:
        calibrate(sae, x_ND)
    return sae


def test_own_and_foreign_saes_on_one_file(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three formats, one command; the same SAE answers alike whoever wrote it."""
    sae = sae_on(vectors)
    own = cosae.save(sae, tmp_path / "own", probes=torch.from_numpy(np.load(vectors))[:4])
    theirs = write_dictionary(sae, tmp_path / "theirs")
    saelens = _as_saelens(sae, tmp_path / "saelens")
    cosine = cosae.save(sae_on(vectors, "cosine_fixed"), tmp_path / "cosine")
    out = tmp_path / "audit"
    arguments = ["audit", str(own), str(theirs), str(saelens), str(cosine), "--activations", str(vectors), "--quiet"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--tokens", "800", "--out", str(out)])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert printed.count("fooled by norm: yes") == 3
    assert printed.count("fooled by norm: no") == 1
    result = json.loads((out / "audit.json").read_text())
    assert [one["name"] for one in result["saes"]] == ["own", "theirs", "saelens", "cosine"]
    shares = [one["norm_driven"]["sinks_out"]["share"] for one in result["saes"]]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    assert shares[0] == pytest.approx(shares[2], abs=1e-3)
    assert shares[3] == 0.0
    page = (out / "audit.html").read_text()
    assert "Is this SAE fooled by norm?" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def _as_saelens(sae: cosae.SAE, folder: Path) -> Path:
    """The same SAE as a JumpReLU folder of SAELens'."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"architecture": "jumprelu", "d_in": D, "d_sae": 30, "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    state = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    state["threshold"] = sae.threshold.expand(30)
    save_file({n: t.detach().contiguous().clone() for n, t in state.items()}, folder / "sae_weights.safetensors")
    return folder


def test_the_embedded_model_is_found_from_the_sae_s_own_facts(tmp_path: Path) -> None:
    x_ND = torch.randn(400, 192, generator=torch.Generator().manual_seed(0)) * 5
    sae = cosae.SAE.build(d_in=192, d_sae=64, score="inner", selector="batch_topk", k=4, seed=0, sample=x_ND)
    calibrate(sae, x_ND)
    sae.metadata = {"model": "embedded", "site": "resid_post.2"}
    cosae.save(sae, tmp_path / "sae")
    found = run_audit([tmp_path / "sae"], EvalRequest(tokens=600))["saes"][0]
    assert found["source"]["site"] == "resid_post.2"
    assert found["tokens"] == 600
    assert "position 0" in audit_text({"saes": [found]}) or found["sinks"]["n_sinks"] == 0


def test_an_sae_without_a_threshold_gets_one_for_the_audit_only(vectors: Path, tmp_path: Path) -> None:
    folder = cosae.save(sae_on(vectors, calibrated=False), tmp_path / "sae")
    found = run_audit([folder], EvalRequest(tokens=800, activations=str(vectors)))["saes"][0]
    assert "no inference threshold" in found["warning"]
    assert found["reconstruction"]["sinks_out"]["l0"] == pytest.approx(4, rel=0.25)
    assert not cosae.load(folder).calibrated


def test_injected_norms_show_what_would_happen(vectors: Path, tmp_path: Path) -> None:
    folder = cosae.save(sae_on(vectors), tmp_path / "sae")
    calm = run_audit([folder], EvalRequest(tokens=800, activations=str(vectors)))["saes"][0]
    wild = run_audit([folder], EvalRequest(tokens=800, activations=str(vectors), inject="log_normal:sigma=2"))["saes"][
        0
    ]
    assert wild["norms"]["cv"] > 2 * calm["norms"]["cv"]
    assert wild["source"]["inject"] == "log_normal:sigma=2"


def says(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as done:
        main(["audit", *arguments, "--quiet"])
    assert done.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "Traceback" not in said
    return said


def test_mistakes_get_one_sentence(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = str(cosae.save(sae_on(vectors), tmp_path / "own"))
    narrow = str(cosae.save(cosae.SAE.build(d_in=5, d_sae=9, k=2, seed=0), tmp_path / "narrow"))
    data = ["--activations", str(vectors)]
    assert "does not exist" in says([str(tmp_path / "nowhere"), *data], capsys)
    assert "does not say which model" in says([own], capsys)
    assert "of width 5; those given have width 12" in says([narrow, *data], capsys)
    assert "from a file or store, or from a model" in says([own, *data, "--model", "embedded"], capsys)
    assert "at least 64 tokens" in says([own, *data, "--tokens", "3"], capsys)
    assert "perturbation must be one of" in says([own, *data, "--inject", "earthquake"], capsys)
    assert "is a file" in says([own, *data, "--out", str(vectors)], capsys)
    assert "format must be one of auto" in says([own, *data, "--format", "onnx"], capsys)
    assert "sink_factor" in says([own, *data, "--sink-factor", "0.5"], capsys)


def test_no_sae_at_all() -> None:
    with pytest.raises(CosaeError, match="at least one SAE"):
        run_audit([], EvalRequest())


def test_an_audit_that_does_not_fit_is_refused_before_it_starts(
    vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = cosae.save(sae_on(vectors), tmp_path / "own")
    run_audit([own], EvalRequest(activations=str(vectors)), progress=Progress())
    assert re.search(r"auditing own, which takes about [\d.]+ MB of memory", capsys.readouterr().err)
    monkeypatch.setattr(check, "free_memory", lambda _: 1_000_000)
    with pytest.raises(CosaeError, match=r"the memory of cpu.* Lower --tokens from 900 to") as refusal:
        run_audit([own], EvalRequest(activations=str(vectors)), tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
    file = EvalRequest(activations=str(vectors))
    with pytest.raises(CosaeError, match=r"the memory of cpu.* Lower --tokens from 900 to"):
        evaluate("norms", [str(own)], file, out=tmp_path / "found.json")
    assert evaluate("reconstruction", [str(own)], file)["found"]  # which takes less
    monkeypatch.setattr(check, "free_memory", lambda _: 1000)
    with pytest.raises(CosaeError, match="the memory of cpu"):
        evaluate("reconstruction", [str(own)], file, out=tmp_path / "found.json")
    assert not (tmp_path / "found.json").exists()
    assert evaluate("geometry", [str(own)], file)["found"]  # which encodes nothing


def test_an_audit_of_a_wide_sae_is_known_to_fit_in_little() -> None:
    with torch.device("meta"):
        sae = cosae.SAE(cosae.SAEConfig(d_in=768, d_sae=32_768, score="inner", k=32))
    assert measuring_memory(sae, 32_768, 32.0).n_bytes < 2.5e9
