"""A run from recipe to folder: what it writes, what it refuses before it writes, what logging may not change."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cosae
from cosae.activations.filter import Filter
from cosae.activations.perturbation import Perturbation
from cosae.activations.synthetic import World
from cosae.errors import CosaeError
from cosae.io.values import from_plain
from cosae.recipe import Recipe
from cosae.report.read import read_run
from cosae.run import measure
from cosae.run.dataset.open import dataset_of
from cosae.run.execute import Logs, execute
from cosae.run.finished import Finished
from cosae.run.record import describe_setting
from cosae.train.arm import Arm
from tests.support.tiny_runs import ARMS, QUIET, assert_same_run, metrics, recipe


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return execute(recipe(), tmp_path_factory.mktemp("ran") / "run", logs=QUIET)


def test_the_folder_holds_what_is_promised(ran: Any) -> None:
    assert {p.name for p in ran.out.iterdir()} == {
        "recipe.json", "run.json", "metrics.jsonl", "timing.jsonl", "events.jsonl", "evaluation.json", "checkpoints",
        "arms", ".lock",
    }  # fmt: skip
    assert {p.name for p in (ran.out / "arms").iterdir()} == {arm.name for arm in ARMS}
    assert Recipe.read(ran.out / "recipe.json") == recipe().resolved(16)
    record = json.loads((ran.out / "run.json").read_text())
    assert record == json.loads(json.dumps(ran.run))
    assert (record["format"], record["status"], record["tokens"]) == ("cosae-run", "finished", 40 * 64)
    assert {"recipe", "seed", "commit", "packages", "hardware", "norm_summary", "filter", "source"} <= set(record)


def test_every_arm_saw_the_stream(ran: Any) -> None:
    assert {arm["stream_digest"] for arm in ran.run["arms"].values()} == {ran.run["stream_digest"]}
    assert len(ran.run["stream_digest"]) == 64


def test_saved_saes_are_the_finished_ones_and_carry_their_facts(ran: Any) -> None:
    x_BD = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    for name, sae in ran.saes.items():
        loaded = cosae.load(ran.out / "arms" / name)
        for key, value in sae.state_dict().items():
            assert torch.equal(value.nan_to_num(nan=7.0), loaded.state_dict()[key].nan_to_num(nan=7.0)), key
        assert torch.equal(sae.encode(x_BD).to_dense(), loaded.encode(x_BD).to_dense())
        metadata = loaded.metadata
        assert (metadata["arm"], metadata["tokens"], metadata["seed"]) == (name, 40 * 64, 0)
        assert metadata["stream_digest"] == ran.run["stream_digest"]
        assert metadata["l0_target"] == 4.0
        assert [arm["name"] for arm in metadata["recipe"]["arms"]] == [name]


def test_inference_l0_is_calibrated_and_holds_on_held_out_tokens(ran: Any) -> None:
    for name, calibration in ran.calibrations.items():
        assert calibration.l0 == pytest.approx(4.0, rel=0.005), name
        assert ran.evaluation["reconstruction"][name]["sinks_out"]["l0"] == pytest.approx(4.0, rel=0.2), name


def test_metrics_are_lines_of_json_at_the_logged_steps(ran: Any) -> None:
    lines = metrics(ran.out)
    assert [line["step"] for line in lines] == [1, *range(2, 41, 2)]
    assert all(list(line["arms"]) == [arm.name for arm in ARMS] for line in lines)
    path = [line["arms"]["cosine"]["a"] for line in lines]
    assert len(set(path)) == len(path)
    assert lines[0]["arms"]["cosine"]["b"] != lines[-1]["arms"]["cosine"]["b"]


def test_how_far_an_exponent_moved_is_recorded(ran: Any) -> None:
    moved = {name: arm["a_change"] for name, arm in ran.run["arms"].items()}
    assert moved["standard"] is None
    assert isinstance(moved["cosine"], float)


def test_auto_b_fits_itself_to_norms_far_from_root_d() -> None:
    """½ ln d where mean |x − c| is within a factor 2 of √d, else its logarithm."""
    for length, expected in ((4.0, 4.0), (40.0, 40.0)):
        world = World(d_in=16, n_features=32, l0=3, norm_median=length)
        small = recipe(**{"data.world": world, "training.steps": 1, "training.optimizer.lr": 1e-9})
        sae = execute(replace(small, arms=(ARMS[1],)), None, logs=QUIET, measured=False).saes["cosine"]
        assert float(sae.scale_b.detach().exp()) == pytest.approx(expected, rel=0.15)


# --------------------------------------------------------------------------------- logging changes nothing


class FakeWriter:
    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        Path(folder).mkdir(exist_ok=True)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        torch.rand(3)  # a careless service may draw from the global generator

    def close(self) -> None: ...


@pytest.mark.parametrize("how", ["progress", "tensorboard", "log_every", "memory"])
def test_logging_leaves_the_run_bit_identical(
    ran: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    out = None if how == "memory" else tmp_path / "run"
    small = recipe(**{"training.log_every": 40}) if how == "log_every" else recipe()
    again = execute(
        small, out, logs=Logs(progress=how == "progress", tensorboard=how == "tensorboard"), measured=how != "memory"
    )
    if out is not None and how != "log_every":
        assert_same_run(ran.out, out)
    for name, sae in ran.saes.items():
        for key, value in sae.state_dict().items():
            assert torch.equal(value.nan_to_num(nan=7.0), again.saes[name].state_dict()[key].nan_to_num(nan=7.0)), key
    assert ("calibrating" in capsys.readouterr().err) == (how == "progress")


def test_an_arm_alone_equals_itself_in_company(ran: Any) -> None:
    alone = execute(replace(recipe(), arms=(ARMS[2],)), None, logs=QUIET, measured=False)
    for key, value in alone.saes["delta"].state_dict().items():
        assert torch.equal(value.nan_to_num(nan=7.0), ran.saes["delta"].state_dict()[key].nan_to_num(nan=7.0)), key
    assert alone.run["stream_digest"] == ran.run["stream_digest"]


def test_seeds_decide_weights_and_order() -> None:
    small = replace(recipe(**{"training.steps": 5}), arms=(ARMS[0],))
    one, same, other = (
        execute(small.changed({"training.seed": seed}), None, logs=QUIET, measured=False) for seed in (0, 0, 1)
    )
    assert torch.equal(one.saes["standard"].W_dec, same.saes["standard"].W_dec)
    assert not torch.equal(one.saes["standard"].W_dec, other.saes["standard"].W_dec)
    assert one.run["stream_digest"] == same.run["stream_digest"] != other.run["stream_digest"]
    reseeded = execute(replace(small, arms=(Arm.of("standard", seed=1),)), None, logs=QUIET, measured=False)
    assert reseeded.run["stream_digest"] == one.run["stream_digest"]  # an arm's own seed leaves the data alone
    assert not torch.equal(reseeded.saes["standard"].W_dec, one.saes["standard"].W_dec)


# --------------------------------------------------------------------------------- refused before anything is written


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_folder_that_holds_a_run_is_refused_untouched(ran: Any) -> None:
    before = everything(ran.out)
    with pytest.raises(CosaeError, match="already holds a run"):
        execute(recipe(), ran.out, logs=QUIET)
    assert everything(ran.out) == before


def test_other_places_that_will_not_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    before = everything(tmp_path)
    for place, says in (
        ("file", "is a file; give a folder"),
        ("full", "is not empty and holds no run"),
        ("file/run", "cannot be written"),
        ("x" * 300, "cannot be written"),
    ):
        with pytest.raises(CosaeError, match=says) as caught:
            execute(recipe(), tmp_path / place, logs=QUIET)
        assert "\n" not in str(caught.value)
    assert everything(tmp_path) == before


def test_a_disk_that_fills_is_one_sentence_about_what_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_text

    def write_text(self: Path, *args: Any, **named: Any) -> int:
        if (tmp_path / "run" / "checkpoints").exists():
            raise OSError(28, "No space left on device")
        return real(self, *args, **named)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(CosaeError, match="step 10 could not be written"):
        execute(recipe(), tmp_path / "run", logs=QUIET)


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    small = replace(recipe(**{"training.steps": 1}), arms=(ARMS[0],))
    assert execute(small, tmp_path, logs=QUIET, measured=False).out == tmp_path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": 49}, "k must be at most d_sae"),
        ({"k": 0}, "k must be a whole number"),
        ({"device": "tpu9"}, "device must be cpu, cuda"),
        ({"device": "meta"}, "device must be cpu, cuda"),
        ({"kernel": "magic"}, "kernel must be"),
        ({"training.buffer_tokens": 100}, "buffer_tokens .*two batches"),
        ({"filter.kind": "position_0"}, "know their positions"),
        ({"perturbation.kind": "sinks", "perturbation.position": 0}, "know their positions"),
        ({"data.activations": "x.npy"}, "not from both"),
        ({"data.world": None, "data.activations": "nowhere.npy"}, "nowhere.npy"),
        ({"data.world": None, "data.model": "embedded", "data.site": "attic.3"}, "attic.3"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_before_the_folder_is_made(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(CosaeError, match=says) as caught:
        execute(recipe(**change), tmp_path / "run", logs=QUIET)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_arms_that_no_sae_can_be_are_refused_before_the_data_are_read(tmp_path: Path) -> None:
    unread = recipe(**{"data.world": None, "data.activations": "nowhere.npy", "d_sae": 16, "k": 17})
    with pytest.raises(CosaeError, match=r"at most d_sae.*keep 17"):
        execute(unread, tmp_path / "run", logs=QUIET)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that is asked for")
def test_a_device_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(CosaeError, match="no CUDA device"):
        execute(recipe(device="cuda"), tmp_path / "run", logs=QUIET)


# --------------------------------------------------------------------------------- arms that stop


def test_a_stopped_arm_is_told_apart_and_the_others_finish(tmp_path: Path) -> None:
    small = replace(recipe(**{"training.steps": 12}), arms=(ARMS[1], Arm.of("wild", lr=1e25)))
    ran = execute(small, tmp_path / "run", logs=QUIET)
    assert ran.run["arms"]["cosine"]["stopped"] is None
    assert "the loss became" in ran.run["arms"]["wild"]["stopped"]
    alone = execute(replace(small, arms=(ARMS[1],)), None, logs=QUIET, measured=False)
    assert torch.equal(alone.saes["cosine"].W_dec, ran.saes["cosine"].W_dec)
    assert all(bool(torch.isfinite(p).all()) for p in ran.saes["wild"].parameters())
    assert "wild" not in metrics(tmp_path / "run")[-1]["arms"]


def test_all_arms_stopped_is_an_error_and_a_failed_run(tmp_path: Path) -> None:
    small = replace(recipe(), arms=(Arm.of("wild", lr=1e25),))
    with pytest.raises(CosaeError, match="every arm stopped: wild: the loss became"):
        execute(small, tmp_path / "run", logs=QUIET)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["arms"]["wild"]["stopped"]


# --------------------------------------------------------------------------------- measuring


def test_measuring_changes_no_sae(ran: Any) -> None:
    before = {name: {k: v.clone() for k, v in sae.state_dict().items()} for name, sae in ran.saes.items()}
    files = everything(ran.out)
    small = recipe()
    data = dataset_of(small)
    fitted = from_plain(Filter, ran.run["filter"], "the filter")
    again = measure.evaluate(ran.saes, small, data, fitted)
    assert json.dumps(again, sort_keys=True) == json.dumps(ran.evaluation, sort_keys=True)
    assert everything(ran.out) == files
    for name, sae in ran.saes.items():
        for key, value in sae.state_dict().items():
            assert torch.equal(value.nan_to_num(nan=7.0), before[name][key].nan_to_num(nan=7.0)), key


def test_a_world_reports_recovery_sinks_and_paired_differences(ran: Any) -> None:
    evaluation = ran.evaluation
    assert evaluation["tokens"] == 600
    assert set(evaluation["recovery"]) == {arm.name for arm in ARMS}
    assert evaluation["probing"] is None
    assert 0 < evaluation["norms"]["sinks"] < 60
    for row in evaluation["reconstruction"].values():
        assert row["sinks_out"]["fve"] > 0.2
        assert row["sinks_in"]["tokens"] > row["sinks_out"]["tokens"]
    assert {(row["sinks"]) for row in evaluation["paired_fve"]} == {"sinks_in", "sinks_out"}


def test_a_planted_dictionary_scores_perfectly(ran: Any) -> None:
    """The true features as decoder rows recover themselves: the measurement that the arms are judged by."""
    held_out = dataset_of(recipe()).sample("held_out", 400)
    truth_FD = held_out.feature_FD
    assert truth_FD is not None
    from cosae.evaluate.recovery import recovery

    perfect = recovery(truth_FD, held_out.truth, truth_FD, held_out.truth)
    assert perfect["f1"] == pytest.approx(1.0)
    assert all(result["f1"] < 0.999 for result in ran.evaluation["recovery"].values())


@pytest.mark.slow
def test_cosine_detects_better_where_norms_are_a_nuisance() -> None:
    """Log-normal norms drawn apart from content (σ = 0.5): the regime the cosine score is for."""
    world = World(d_in=64, n_features=256, l0=8, norm="log_normal", sigma=0.5)
    big = recipe(**{
        "data.world": world, "training.steps": 3000, "training.batch_tokens": 512, "training.buffer_tokens": 4096,
        "training.optimizer.lr": 1e-3, "training.dead_after_tokens": 100_000, "evaluation.held_out_tokens": 8192,
        "evaluation.calibration_tokens": 8192, "training.log_every": 500, "d_sae": 256, "k": 8,
    })  # fmt: skip
    ran = execute(replace(big, arms=ARMS[:2]), None, logs=QUIET)
    f1 = {name: result["f1"] for name, result in ran.evaluation["recovery"].items()}
    assert f1["cosine"] >= f1["standard"], f1


@pytest.mark.parametrize("where", ["both", "training", "evaluation"])
def test_a_nuisance_goes_where_it_is_asked_to(where: str) -> None:
    """Training, calibration and held-out tokens carry it or not; an unknown place is refused."""
    shift = Perturbation(kind="sinks", frac=1.0, factor=3.0)  # every token three times as long
    plain, asked = recipe(), recipe(perturbation=shift, inject_into=where)
    data, shifted = dataset_of(plain), dataset_of(asked)
    for split in ("train", "calibration", "held_out"):
        ratio = float(shifted.sample(split, 100).activations.norm_N[0] / data.sample(split, 100).activations.norm_N[0])
        expected = 3.0 if where == "both" or (where == "evaluation" and split == "held_out") else 1.0
        assert ratio == pytest.approx(expected, rel=1e-5), split
    assert asked.training_perturbation.kind == ("none" if where == "evaluation" else "sinks")
    with pytest.raises(CosaeError, match="inject_into must be one of"):
        recipe(inject_into="elsewhere")


def test_a_shift_at_deployment_only_is_met_by_thresholds_set_without_it() -> None:
    shift = Perturbation(kind="sinks", frac=1.0, factor=3.0)
    calm = execute(recipe(), None, logs=QUIET)
    shifted = execute(recipe(perturbation=shift, inject_into="evaluation"), None, logs=QUIET)
    for name, sae in calm.saes.items():
        other = shifted.saes[name]
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), other.parameters(), strict=True)), name

    def l0(done: Finished, arm: str) -> float:
        return done.evaluation["reconstruction"][arm]["sinks_in"]["l0"]

    assert l0(shifted, "standard") > 1.5 * l0(calm, "standard")
    # the unit frame sees a threefold x only through the centre, which stays where it was
    assert l0(shifted, "gated") == pytest.approx(l0(calm, "gated"), rel=0.15)
    on_a_model = recipe(perturbation=shift, inject_into="training").changed({"data.world": None})
    assert describe_setting(on_a_model).endswith("in training only")


@pytest.mark.parametrize("kind", ["none", "norm"])
def test_sinks_are_said_after_the_first_window_and_both_fves_while_they_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "run"
    execute(replace(recipe(**{"filter.kind": kind}), arms=ARMS[:1]), out, logs=Logs(progress=True))
    shown, events = capsys.readouterr().err, (out / "events.jsonl").read_text().splitlines()
    text = json.loads((out / "run.json").read_text())["sinks"]["text"]
    assert "% of tokens are attention sinks, up to" in text
    assert ("with filter none they dominate loss and FVE" in text) == (kind == "none")
    assert ("the filter norm leaves them out of training" in text) == (kind == "norm")
    assert shown.count(text) == 1
    assert shown.index(text) < shown.index("step 1/40")
    assert (json.loads(events[0])["step"], json.loads(events[0])["text"]) == (0, text)
    assert text in read_run(out).warnings
    assert ("(sinks out " in shown) == (kind == "none")
    last = metrics(out)[-1]["arms"]["standard"]
    assert ("fve_sinks_out" in last) == (kind == "none")
    assert kind == "norm" or last["fve_sinks_out"] < last["fve"] - 0.05


def test_without_sinks_no_record_or_event_of_them(tmp_path: Path) -> None:
    calm = World(d_in=16, n_features=32, l0=3, norm="none")
    small = replace(recipe(**{"data.world": calm, "training.steps": 4, "filter.kind": "none"}), arms=ARMS[:1])
    execute(small, tmp_path / "run", logs=QUIET)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["sinks"] is None
    assert (tmp_path / "run" / "events.jsonl").read_text() == ""
