"""`cosae browse`: plain files from a run in one command, and what it refuses before anything is built."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra browse is not installed")

from cosae.cli import main
from cosae.models.embedded import load
from cosae.sae.calibrate import calibrate
from cosae.sae.file import save
from cosae.sae.model import SAE

TEXT = "def f(x):\n    return x + 1\n\nclass A:\n    def g(self, other):\n        return [self, other]\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "corpus").mkdir()
    for i in range(6):
        (folder / "corpus" / f"{i}.py").write_text(TEXT.replace("f", f"f{i}") * 4)
    model, tokenizer = load()
    ids = tokenizer(TEXT * 4, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :120]
    x_ND = model(ids, output_hidden_states=True).hidden_states[4][0].detach()
    for name, seed in (("one", 0), ("two", 1)):
        sae = SAE.build(192, 48, "cosine", k=6, seed=seed, sample=x_ND)
        calibrate(sae, x_ND)
        sae.metadata = {"model": "embedded", "site": "resid_post.3"}
        save(sae, folder / "run" / "arms" / name)
    return folder / "run"


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def test_one_command_from_a_run_to_pages(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = ["--corpus", str(run.parent / "corpus"), "--context", "32", "--tokens", "400", "--window", "9"]
    site = tmp_path / "site"
    status, out, _ = ended(["browse", str(run), *corpus, "--static", str(site), "--quiet"], capsys)
    assert (status, out) == (0, f"Pages: {site / 'index.html'}\n")
    about = json.loads((site / "data" / "about.js").read_text("utf-8").partition(",")[2].removesuffix(");\n"))
    assert [one["name"] for one in about["saes"]] == ["one", "two"]
    assert (about["read"]["context"], about["read"]["window"]) == (32, 9)
    written = (run / "features" / "store.json").stat().st_mtime_ns
    command = ["browse", str(run), *corpus, "--static", str(site), "--quiet"]
    assert ended(command, capsys)[0] == 0
    assert (run / "features" / "store.json").stat().st_mtime_ns == written, "what is there is taken as it is"
    assert ended([*command, "--rebuild"], capsys)[0] == 0
    assert (run / "features" / "store.json").stat().st_mtime_ns != written
    named = ["browse", str(run / "features"), "--static", str(tmp_path / "again"), "--quiet"]
    assert ended(named, capsys)[0] == 0
    again = (tmp_path / "again" / "data" / "table" / "1.js").read_bytes()
    assert again == (site / "data" / "table" / "1.js").read_bytes()


def test_what_is_refused_before_anything_is_built(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "store")]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        refused = {
            "cannot be had": ["browse", str(run), *out, "--port", port],
            "no address": ["browse", str(run), *out, "--host", "not an address"],
            "drop one": ["browse", str(run), *out, "--static", str(tmp_path / "site"), "--port", "9"],
            "is not empty": ["browse", str(run), *out, "--static", str(run)],
            "a folder of a run|at least one": ["browse", *out],
        }
        for words, command in refused.items():
            status, _, sentence = ended(command, capsys)
            assert status == 2, words
            if "|" not in words:
                assert words in sentence
                assert len(sentence.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
