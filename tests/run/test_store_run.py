"""From a model to a store to a run: captured once, killed or not, and trained on without model or text."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from cosae.activations.store import shards
from cosae.activations.store import writer as store_writer
from cosae.activations.store.reader import Store
from cosae.cli import main
from cosae.errors import CosaeError
from cosae.io.lock import hold
from cosae.recipe import DataConfig, Recipe
from cosae.run.capture import stores as captures
from cosae.run.capture.request import Capture
from cosae.run.capture.stores import capture_stores
from cosae.run.dataset.model import open_model
from cosae.run.dataset.open import dataset_of
from cosae.run.execute import Logs, execute, resume
from cosae.run.fit import fit
from cosae.text.documents import split_of
from cosae.text.pylib import Document
from tests.support.small_stores import fingerprint

SMALL = {
    "evaluation.held_out_tokens": 1500,
    "evaluation.calibration_tokens": 1000,
    "evaluation.probe_tokens": 2000,
    "evaluation.min_positives": 20,
    "evaluation.resamples": 20,
    "filter.window_tokens": 1500,
    "training.steps": 12,
    "training.batch_tokens": 64,
    "training.buffer_tokens": 1024,
    "training.checkpoint_every": 6,
    "data.context": 64,
    "data.chunk_sequences": 16,
}


def small_recipe(**changes: Any) -> Recipe:
    return Recipe(d_sae=64, k=4).changed({**SMALL, **changes})


def wanted(corpus: Any = "pylib", **changes: Any) -> Capture:
    data = DataConfig(corpus=str(corpus), context=64, chunk_sequences=16)
    settings: dict[str, Any] = {"tokens": 3000, "held_out_tokens": 2500, "dtype": "float32", "shard_tokens": 700}
    return Capture(**{"data": data, "sites": ("resid_post.1",), **settings, **changes})


@pytest.fixture(scope="module", autouse=True)
def _model_is_opened_once() -> Any:
    from cosae.models import embedded

    model, tokenizer = embedded.load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captures, "open_model", lambda *_: (model, tokenizer))
        yield


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded corpus, with its labels."""
    out = tmp_path_factory.mktemp("stored") / "store"
    capture_stores(wanted(), out)
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 small documents."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for i in range(160):
        lines = [f"value_{i} = {number} + {i}" for number in random.integers(0, 10**6, random.integers(3, 30))]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of those, without labels."""
    out = tmp_path_factory.mktemp("plain") / "store"
    capture_stores(wanted(corpus), out)
    return out


def test_a_folder_takes_one_capture_at_a_time(plain: Path, corpus: Path, tmp_path: Path) -> None:
    with hold(tmp_path / "store"), pytest.raises(CosaeError, match="is being written"):
        capture_stores(wanted(corpus), tmp_path / "store")
    capture_stores(wanted(corpus), tmp_path / "store")
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == sorted(p.name for p in plain.iterdir())


def test_documents_of_a_sorted_data_set_come_mixed(tmp_path: Path) -> None:
    """English documents before French ones: both sides of a short capture have both, unless 0.1's order is asked for.

    A store that 0.1 began goes on in its order."""
    rows = [
        {"id": f"{kind} {i}", "text": f"{kind} text number {i} goes on"} for kind in ("en", "fr") for i in range(300)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "sorted"))
    asked = wanted(tmp_path / "sorted", tokens=600, held_out_tokens=200)
    asked = replace(asked, data=replace(asked.data, held_out_frac=0.3))
    kinds = {}
    for order in ("shuffled", "v0.1"):
        (folder,) = capture_stores(replace(asked, data=replace(asked.data, order=order)), tmp_path / order)
        store = Store(folder)
        kinds[order] = {side: {name[:2] for name in store.documents(side)} for side in ("train", "held_out")}
        assert store.record["request"].get("order") == (None if order == "v0.1" else order)
    assert kinds == {
        "shuffled": {"train": {"en", "fr"}, "held_out": {"en", "fr"}},
        "v0.1": {"train": {"en"}, "held_out": {"en"}},
    }
    (again,) = capture_stores(asked, tmp_path / "v0.1")
    assert {name[:2] for name in Store(again).documents("train")} == {"en"}


def test_a_stream_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps({"text": f"number {i} goes on"}) for i in range(200)))
    said: list[str] = []
    capture_stores(wanted(tmp_path / "s.jsonl", tokens=300, held_out_tokens=50), tmp_path / "held", log=said.append)
    assert not [line for line in said if "own order" in line]
    monkeypatch.setattr("cosae.run.dataset.corpus.STREAM_ABOVE_BYTES", 1000)
    capture_stores(wanted(tmp_path / "s.jsonl", tokens=300, held_out_tokens=50), tmp_path / "streamed", log=said.append)
    assert len([line for line in said if "own order" in line]) == 1


def test_held_out_tokens_are_in_proportion_and_may_be_none(corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    asked = wanted(corpus, tokens=100, held_out_tokens=None)
    (folder,) = capture_stores(asked, tmp_path / "small", log=said.append)
    store = Store(folder)
    assert store.n_rows("train") == 100
    assert 100 <= store.n_rows("held_out") < 100 + asked.data.context
    assert "100 train tokens, and 100 held-out tokens on top" in said[0]
    texts = [f"one document, number {n}, and no other " * 40 for n in range(40)]
    for side in ("train", "held_out"):  # wherever the only document falls
        text = next(t for t in texts if split_of(Document("one.txt", t), 0.3) == side)
        (tmp_path / "one.txt").write_text(text)
        alone = wanted(tmp_path / "one.txt", tokens=100, held_out_tokens=0)
        alone = replace(alone, data=replace(alone.data, held_out_frac=0.3))
        (folder,) = capture_stores(alone, tmp_path / f"alone-{side}")
        assert (Store(folder).n_rows("train"), Store(folder).n_rows("held_out")) == (100, 0)
        with pytest.raises(CosaeError, match=r"held.out|train"):
            capture_stores(replace(alone, held_out_tokens=10), tmp_path / f"both-{side}")


def test_a_batch_that_was_measured_is_not_measured_anew(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = wanted(corpus, data=replace(wanted(corpus).data, batch_sequences="auto"))
    for chosen in (3, 5):  # as on a machine with other memory the second time
        monkeypatch.setattr(captures, "batch_size", lambda *_, n=chosen: n)
        (store,) = capture_stores(asked, tmp_path / "store")
        assert Store(store).record["request"]["batch_sequences"] == 3


def test_the_cpu_captures_and_trains_on_a_model_in_half_precision(
    plain: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captures, "open_model", open_model)
    asked = wanted(corpus, data=replace(wanted(corpus).data, model_dtype="float16"), tokens=1000)
    (folder,) = capture_stores(asked, tmp_path / "store")
    half, full = (Store(place).take("train", torch.arange(1000)) for place in (folder, plain))
    assert torch.equal(half.token_N, full.token_N)
    error = float((half.x_ND - full.x_ND).norm() / full.x_ND.norm())
    assert 0 < error < 0.01  # another precision, the same model
    recipe = small_recipe(**{"data.corpus": str(corpus), "data.model_dtype": "float16", "data.site": "resid_post.1"})
    done = execute(recipe.changed({"filter.window_tokens": 1024}), tmp_path / "run", logs=Logs(False))
    assert all(bool(sae.decoder.rows_FD.isfinite().all()) for sae in done.saes.values())


def test_a_store_holds_what_a_live_run_captures(stored: Path) -> None:
    store = Store(stored)
    live = dataset_of(small_recipe(**{"data.site": "resid_post.1"}))
    held_out = live.sample("held_out", 0)
    from_store = dataset_of(small_recipe(**{"data.store": str(stored)})).sample("held_out", 0)
    assert torch.equal(held_out.activations.x_ND, from_store.activations.x_ND)
    assert torch.equal(held_out.activations.token_N, from_store.activations.token_N)
    assert np.array_equal(held_out.labels_NC, from_store.labels_NC)
    assert np.array_equal(held_out.labelled_N, from_store.labelled_N)
    assert held_out.documents == from_store.documents
    assert store.n_rows("train") == 3000
    assert set(store.documents("train")).isdisjoint(store.documents("held_out"))
    train = store.take("train", torch.arange(3000))
    assert int(train.doc_N.min()) == len(store.documents("held_out"))
    assert store.site is not None
    assert store.site.name == "resid_post.1"


def test_train_labels_are_those_of_the_tokens(stored: Path) -> None:
    """Column by column, a plain concept agrees with the token's own spelling."""
    from cosae.models import embedded
    from cosae.text.concepts.labels import CONCEPTS

    _, tokenizer = embedded.load()
    store = Store(stored)
    rows = torch.arange(3000)
    labels, labelled = store.labels("train", rows)
    tokens = tokenizer.convert_ids_to_tokens(store.take("train", rows).token_N.tolist())
    column = [concept.name for concept in CONCEPTS].index("dot")
    spelled = np.array([token.strip("Ġ") == "." for token in tokens])
    assert spelled.sum() > 20
    assert (labels[:, column] & labelled)[spelled & labelled].mean() > 0.5


@pytest.mark.long
def test_a_run_from_a_store_needs_neither_model_nor_text(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("cosae.run.dataset.model.open_model", never)
    monkeypatch.setattr("cosae.text.documents.read_documents", never)
    recipe = small_recipe(**{"data.store": str(stored)})
    run = execute(recipe, tmp_path / "run", logs=Logs(False))
    assert run.evaluation is not None
    assert run.evaluation["probing"] is not None
    assert run.run["source"]["source"] == "store"
    metadata = run.saes["cosine"].metadata
    assert (metadata["site"], metadata["hook_name"]) == ("resid_post.1", "blocks.1.hook_resid_post")
    assert metadata["model"] == "embedded"


def test_a_run_from_a_store_resumes_to_the_bit_wherever_the_store_is(plain: Path, tmp_path: Path) -> None:
    recipe = small_recipe(**{"data.store": str(plain)})
    whole = execute(recipe, tmp_path / "whole", logs=Logs(False))
    half = shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(sorted((half / "checkpoints").iterdir())[-1])
    moved = shutil.copytree(plain, tmp_path / "moved")
    for name, change in (("recipe.json", str(moved)), ("run.json", None)):
        record = json.loads((half / name).read_text())
        record |= {"status": "interrupted"} if change is None else {"data": {**record["data"], "store": change}}
        (half / name).write_text(json.dumps(record))
    again = resume(half, Logs(False))
    assert again.run["stream_digest"] == whole.run["stream_digest"]
    for name, sae in whole.saes.items():
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), again.saes[name].parameters(), strict=True))


def test_a_run_does_not_resume_on_another_store(plain: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = small_recipe(**{"data.store": str(tmp_path / "store")}).changed({"training.steps": 8})
    shutil.copytree(plain, tmp_path / "store")
    execute(recipe, tmp_path / "run", logs=Logs(False), measured=False)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    shutil.rmtree(tmp_path / "store")
    capture_stores(wanted(corpus, tokens=2900), tmp_path / "store")
    with pytest.raises(CosaeError, match=r"differs from this one in source\.n_tokens, source\.store"):
        resume(tmp_path / "run", Logs(False))


def test_fit_takes_a_store(plain: Path) -> None:
    run = fit(
        str(plain), ["cosine"], **{name.replace(".", "__"): value for name, value in SMALL.items()}, progress=False
    )
    assert run.run["source"]["source"] == "store"


# Going on


def test_several_sites_share_their_forward_passes_and_equal_single_captures(corpus: Path, tmp_path: Path) -> None:
    sites = ("resid_post.1", "mlp_out.0")
    both = capture_stores(wanted(corpus, sites=sites, held_out_tokens=500, tokens=1500), tmp_path / "both")
    assert [place.name for place in both] == list(sites)
    for place in both:
        alone = capture_stores(
            wanted(corpus, sites=(place.name,), held_out_tokens=500, tokens=1500), tmp_path / f"alone {place.name}"
        )[0]
        assert fingerprint(alone) == fingerprint(place)


def test_the_same_command_on_a_finished_store_changes_nothing(plain: Path, corpus: Path) -> None:
    before = fingerprint(plain)
    said: list[str] = []
    capture_stores(wanted(corpus), plain, log=said.append)
    assert fingerprint(plain) == before
    assert any("is complete" in line for line in said)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": 2999}, "tokens is 3000 there, 2999 here"),
        ({"dtype": "bfloat16"}, "'float32' there, 'bfloat16' here"),
        ({"seed": 3}, "seed is 0 there, 3 here"),
        ({"sites": ("resid_post.2",)}, "resid_post.1.* there, .*resid_post.2.* here"),
        (
            {"tokens": 2999, "held_out_tokens": 2},
            "held_out_tokens .*2500.* tokens is 3000",
        ),
    ],
)
def test_another_request_on_a_store_is_refused_and_says_what_differs(
    plain: Path, corpus: Path, change: dict[str, Any], says: str
) -> None:
    before = fingerprint(plain)
    with pytest.raises(CosaeError, match=says):
        capture_stores(wanted(**{"corpus": corpus, **change}), plain)
    assert fingerprint(plain) == before


def test_a_capture_cannot_leave_rows_out() -> None:
    """A store holds the row of every token, so the policy that drops some is refused, not passed over."""
    with pytest.raises(CosaeError, match=r"non_finite must be fatal.*Got 'drop'"):
        wanted(data=DataConfig(corpus="pylib", non_finite="drop"))


def test_a_folder_that_holds_something_else_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(CosaeError, match="is not empty and holds no store"):
        capture_stores(wanted(corpus), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("n_whole", [0, 1, 4])
def test_a_full_disk_keeps_what_is_written_and_the_same_command_goes_on(
    plain: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_whole: int
) -> None:
    count = 0

    def save_file(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > n_whole:
            Path(arguments[1]).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(*arguments)

    real = shards.save_file
    monkeypatch.setattr(shards, "save_file", save_file)
    out = tmp_path / "s"
    with pytest.raises(CosaeError, match=r"No space left on device.*same command"):
        capture_stores(wanted(corpus), out)
    assert len(list(out.glob("*.safetensors"))) == n_whole
    assert list(out.glob(".*")) == []
    with pytest.raises(CosaeError, match="not finished"):
        Store(out)
    monkeypatch.setattr(shards, "save_file", real)
    capture_stores(wanted(corpus), out)
    assert fingerprint(out) == fingerprint(plain)


@pytest.mark.long
def test_shards_that_were_damaged_meanwhile_are_written_again(plain: Path, corpus: Path, tmp_path: Path) -> None:
    """Also a journal whose last line was torn, and a shard that was renamed but not yet listed."""
    out = unfinished(corpus, tmp_path / "s", after=6)
    path = out / "train-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with (out / "journal.jsonl").open("a") as journal:
        journal.write('{"file": "train-000')
    said: list[str] = []
    capture_stores(wanted(corpus), out, log=said.append)
    assert fingerprint(out) == fingerprint(plain)
    assert any("train-00000.safetensors" in line and "written again" in line for line in said)


def unfinished(corpus: Path, out: Path, after: int) -> Path:
    """A store that was stopped once `after` shards were listed."""

    class StopError(Exception):
        pass

    def write(*arguments: Any) -> dict[str, Any]:
        if len(list(out.glob("*.safetensors"))) >= after:
            raise StopError
        return real(*arguments)

    real = store_writer.write_shard
    store_writer.write_shard = write
    try:
        capture_stores(wanted(corpus), out)
    except StopError:
        return out
    finally:
        store_writer.write_shard = real
    raise AssertionError("was finished")


def test_what_changed_of_the_packages_meanwhile_is_written_down(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = unfinished(corpus, tmp_path / "s", after=2)
    monkeypatch.setattr(captures.provenance, "packages", lambda: {"torch": "99"})
    said: list[str] = []
    capture_stores(wanted(corpus), out, log=said.append)
    assert [one["packages"].get("torch") for one in Store(out).record["written_by"]] == [torch.__version__, "99"]
    assert any("other packages" in line for line in said)


COMMAND = [
    *("capture", "--tokens", "6000", "--held-out-tokens", "1200", "--site", "resid_post.0", "--shard-tokens", "700"),
    *("--set", "data.context=64", "data.chunk_sequences=4", "data.batch_sequences=4"),
]


def start(corpus: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "cosae", *COMMAND, "--corpus", str(corpus), "--out", str(out), *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(out: Path, n_shards: int, process: subprocess.Popen[str]) -> None:
    while len(list(out.glob("*.safetensors"))) < n_shards:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_at_random_moments_and_gone_on_with_a_store_is_the_same_to_the_byte(
    corpus: Path, tmp_path: Path
) -> None:
    whole = start(corpus, tmp_path / "whole", "--quiet")
    whole.communicate()
    assert whole.returncode == 0
    random = np.random.default_rng(0)
    out = tmp_path / "killed"
    kills = 0
    while True:
        process = start(corpus, out, "--quiet")
        n_before = len(list(out.glob("*.safetensors")))
        try:
            wait_for(out, n_before + 1 + int(random.integers(3)), process)
            time.sleep(float(random.uniform(0, 0.2)))
        except AssertionError:
            assert process.returncode == 0
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of the system")
def test_a_write_that_the_system_refuses_is_one_sentence_and_the_same_command_goes_on(
    corpus: Path, tmp_path: Path
) -> None:
    import resource

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))

    out = tmp_path / "s"
    command = [sys.executable, "-m", "cosae", *COMMAND, "--corpus", str(corpus), "--out", str(out), "--quiet"]
    done = subprocess.run(command, preexec_fn=no_large_files, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert re.search(r"could not be written .*File too large.*give the same command again", done.stderr), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(out.glob("*.safetensors")) == []
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert list(Store(out).faults()) == []


def test_ctrl_c_ends_at_once_and_says_how_to_go_on(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    process = start(corpus, out)
    while not (out / "journal.jsonl").is_file() or b"\n" not in (out / "journal.jsonl").read_bytes():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 130, said
    assert re.search(r"interrupted. ([\d,]+) tokens are written. Go on with the same command.", said), said
    assert "Traceback" not in said
    listed = (out / "journal.jsonl").read_text().splitlines()
    assert len(list(out.glob("*.safetensors"))) - len(listed) in (0, 1)  # the last may be there and not yet listed


# The command line


def test_the_command_line_from_capture_to_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: Path
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    status, out, error = run("verify", str(plain))
    assert (status, error) == (0, "")
    assert re.fullmatch(
        rf"{plain}: complete; 3,000 train and [\d,]+ held-out tokens, width 192, float32, .* shards\n", out
    )
    status, shown, _ = run("inspect", str(plain))
    assert status == 0
    assert json.loads(shown)[0]["rows"]["train"] == 3000
    status, _, error = run("verify", str(tmp_path / "nowhere"))
    assert (status, "holds no store" in error) == (2, True)
    status, _, error = run("train", "--store", str(plain), "--model", "embedded", "--out", str(tmp_path / "run"))
    assert (status, "Got store and model: drop one" in error) == (2, True)
    bad = shutil.copytree(plain, tmp_path / "bad")
    for name in ("train-00001.safetensors", "held_out-00000.safetensors"):
        content = bytearray((bad / name).read_bytes())
        content[-5] ^= 1
        (bad / name).write_bytes(content)
    status, out, error = run("verify", str(bad))
    assert status == 1
    assert [name in error for name in ("train-00001", "held_out-00000", "train-00000")] == [True, True, False]
    assert "damaged, 2 of its files" in out
    status, _, error = run("train", "--store", str(bad), "--out", str(tmp_path / "run"), "--quiet", "--steps", "2")
    assert (status, "train-00001.safetensors is damaged" in error) == (2, True)
    assert not (tmp_path / "run").exists()


def test_saved_saes_are_judged_on_a_store_alone(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """audit, eval reconstruction, probing and discovery: neither model nor text is opened, the store is not changed."""
    import cosae
    from cosae.run.dataset import model as model_data
    from cosae.sae.calibrate import calibrate

    monkeypatch.setattr(model_data, "open_model", lambda *_: pytest.fail("the model was opened"))
    x_ND = Store(stored).take("train", torch.arange(1000)).x_ND.float()
    paths = []
    for name, score, seed in (("s0", "inner", 0), ("s1", "inner", 1), ("c0", "cosine_fixed", 2)):
        sae = cosae.SAE.build(d_in=x_ND.shape[1], d_sae=64, k=8, score=score, seed=0, sample=x_ND)
        noise_FD = torch.randn(sae.score.rows_FD.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            sae.score.rows_FD += 0.01 * noise_FD  # near enough for features to have a match
        calibrate(sae, x_ND)
        paths.append(str(cosae.save(sae, tmp_path / name)))
    before = fingerprint(stored)
    options = ["--store", str(stored), "--tokens", "2000", "--quiet"]
    pair = [f"A={paths[0]},{paths[1]}", f"B={paths[2]}"]

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as done:
            main([*arguments, *options])
        printed = capsys.readouterr()
        assert done.value.code == 0, printed.err
        return printed.out

    assert "fooled by norm" in said("audit", paths[0], "--out", str(tmp_path / "audit"))
    assert str(stored) in (tmp_path / "audit" / "audit.json").read_text()
    out = tmp_path / "found.json"
    said("eval", "reconstruction", *pair, "--out", str(out))
    assert 0 < json.loads(out.read_text())["found"]["saes"]["A"]["sinks_out"]["fve"] < 1
    assert "auroc, top 2" in said("eval", "probing", *pair, "--top", "1", "2")
    counts = []
    for factor in ("10", "1.2"):
        said("eval", "probing", *pair, "--sink-factor", factor, "--out", str(out))
        probed = json.loads(out.read_text())["found"]
        counts.append((probed["sinks_in"]["n_held_out"], probed["sinks_out"]["n_held_out"]))
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] > counts[1][1], "the factor that was asked for makes the sinks"
    said("eval", "discovery", *pair, "--out", str(out))
    found = json.loads(out.read_text())["found"]
    assert found["concepts"] > 3
    for by in ("correlation", "cosine"):
        (one,), (floor,) = found["by"][by]["pairs"], found["by"][by]["yardsticks"]
        gap_C = np.subtract(one["per_concept"]["full_b"], one["per_concept"]["full_a"])
        assert one["gap_full"]["mean"] == pytest.approx(gap_C.mean())
        assert one["per_concept"]["full_a"] == floor["per_concept"]["full_a"]
    assert fingerprint(stored) == before
