"""SAEBench's runner against a stand-in for the package: what is called, what is written, what is said when it fails."""

import importlib.machinery
import importlib.util
import json
import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch

import cosae
from cosae.cli import main
from cosae.errors import CosaeError
from cosae.interop.dictionary_learning.write import write
from cosae.interop.saebench import run as saebench
from cosae.interop.saebench.evals import known_model, model_digest
from cosae.interop.saebench.reasons import chain, errors_logged, one_sentence
from cosae.interop.saebench.run import EVALS, run, run_evals
from cosae.interop.saebench.settings import Job, Settings
from cosae.sae.model import SAE

PLACE = {"model_name": "some-model", "hook_name": "blocks.1.hook_resid_post"}


def make(**options):
    return SAE.build(8, 16, "cosine", "topk", 3, sample=torch.randn(64, 8), **options)


@dataclass
class Config:
    """A stand-in for an eval's configuration dataclass."""

    random_seed: int = 0
    train_steps: int = 10
    model_name: str = ""
    llm_batch_size: int = 0
    llm_dtype: str = ""
    dataset_names: list = field(default_factory=list)

    def __post_init__(self):
        if not isinstance(self.train_steps, int):
            raise ValueError("1 validation error for Config\ntrain_steps\n  Input should be a valid integer")


@pytest.fixture
def bench(monkeypatch):
    """Modules of a sae_bench whose meta_structure works and whose sparse_probing fails as `bench["failure"]` says."""
    calls = {"failure": ConnectionError("Couldn't reach 'LabHC/bias_in_bios' on the Hub"), "configs": []}

    def meta_structure(config, selected_saes, device, output_path, force_rerun=False):
        calls["configs"].append(config)
        calls["drawn"] = torch.rand(1).item()
        torch.set_grad_enabled(False)
        print("their output")
        print(f"into {output_path}")
        for name, sae in selected_saes:
            Path(output_path).mkdir(parents=True, exist_ok=True)
            metrics = {"meta_structure": {"fraction": float(sae.W_dec.norm(dim=1).mean()), "unknown": None}}
            (Path(output_path) / f"{name}_custom_sae_eval_results.json").write_text(
                json.dumps({"eval_result_metrics": metrics, "sae_cfg_dict": sae.cfg.to_dict()})
            )

    def sparse_probing(config, selected_saes, device, output_path, force_rerun=False, artifacts_path="artifacts"):
        calls["where"], calls["artifacts"] = Path.cwd(), Path(artifacts_path)
        if calls["failure"] is not None:
            raise calls["failure"]
        logging.getLogger("sae_bench.evals").error("Failed to load model: no space")

    def module(name, **content):
        made = ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    for name in ("sae_bench", "sae_probes", "transformer_lens"):
        module(name)
    module("jaxtyping", config=type("Config", (), {"update": lambda self, key, value: None})())
    module("sae_bench.evals.meta_structure.main", run_eval=meta_structure)
    module("sae_bench.evals.meta_structure.eval_config", MetaStructureEvalConfig=Config)
    module("sae_bench.evals.sparse_probing.main", run_eval=sparse_probing)
    module("sae_bench.evals.sparse_probing.eval_config", SparseProbingEvalConfig=Config)
    module("transformer_lens.supported_models", OFFICIAL_MODEL_NAMES=["gpt2"], MODEL_ALIASES={})
    return calls


class TestResults:
    def test_their_file_with_one_key_more_and_a_summary(self, bench, tmp_path):
        found = run_evals({"one": make(), "two": make(seed=1)}, ["meta_structure"], tmp_path / "out", **PLACE)
        file = tmp_path / "out" / "meta_structure" / "one_custom_sae_eval_results.json"
        assert found["results"]["meta_structure"]["one"] == str(file)
        assert found["numbers"]["meta_structure"]["one"] == {"fraction": pytest.approx(1.0)}
        assert found["failed"] == {}
        result = json.loads(file.read_text())
        assert result["cosae"]["sae"]["score"] == "cosine"
        assert result["sae_cfg_dict"]["hook_name"] == "blocks.1.hook_resid_post"
        files = {name: f"meta_structure/{name}_custom_sae_eval_results.json" for name in ("one", "two")}
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary == {**found, "results": {"meta_structure": files}}
        log = (tmp_path / "out" / "saebench.log").read_text()
        assert "their output" in log
        assert "into meta_structure\n" in log
        assert str(tmp_path) not in log
        names = sorted(file.name for file in (tmp_path / "out").iterdir())
        assert names == ["meta_structure", "saebench.log", "summary.json"], "nothing else is left behind"

    def test_the_command_reads_any_format_and_prints_the_table(self, bench, tmp_path, capsys):
        linear = SAE.build(8, 16, "inner", "topk", 3, sample=torch.randn(64, 8))
        write(linear, tmp_path / "theirs")  # as dictionary_learning writes it
        cosae.save(make(), tmp_path / "mine")
        place = ["--model-name", "some-model", "--hook-name", PLACE["hook_name"]]
        saes = [str(tmp_path / "mine"), str(tmp_path / "theirs")]
        with pytest.raises(SystemExit) as ended:
            main(["bench", *saes, "--evals", "meta_structure", "--out", str(tmp_path / "out"), *place])
        assert ended.value.code == 0
        shown = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in shown] == [["meta_structure", "mine"], ["meta_structure", "theirs"]]

    def test_the_command_says_what_failed(self, bench, tmp_path, capsys):
        cosae.save(make(), tmp_path / "mine")
        place = ["--model-name", "some-model", "--hook-name", PLACE["hook_name"]]
        with pytest.raises(SystemExit) as ended:
            main(["bench", str(tmp_path / "mine"), "--evals", "sparse_probing", "--out", str(tmp_path / "out"), *place])
        assert ended.value.code == 2
        assert "could not be downloaded" in capsys.readouterr().err

    def test_saved_saes_and_a_table(self, bench, tmp_path, capsys):
        cosae.save(make(), tmp_path / "mine")
        table = run([tmp_path / "mine"], ["meta_structure"], tmp_path / "out", **PLACE)
        assert table.split() == ["meta_structure", "mine", "fraction", "=", "1"]
        assert capsys.readouterr().out == ""

    def test_options_and_seed_reach_the_eval(self, bench, tmp_path):
        options = {"meta_structure": {"train_steps": 3}}
        before = torch.is_grad_enabled()
        for out, seed in (("a", 7), ("b", 7), ("c", 8)):
            run_evals({"one": make()}, "meta_structure", tmp_path / out, seed=seed, options=options, **PLACE)
            bench[out] = bench["drawn"]
        assert [(c.train_steps, c.random_seed) for c in bench["configs"]] == [(3, 7), (3, 7), (3, 8)]
        assert bench["a"] == bench["b"] != bench["c"]
        assert torch.is_grad_enabled() == before

    def test_results_that_are_there_stay_unless_forced(self, bench, tmp_path):
        saes = {"one": make()}
        run_evals(saes, ["meta_structure"], tmp_path, **PLACE)
        with pytest.raises(CosaeError, match="exists already"):
            run_evals(saes, ["meta_structure"], tmp_path, **PLACE)
        assert run_evals(saes, ["meta_structure"], tmp_path, force=True, **PLACE)["failed"] == {}

    def test_forced_results_stay_until_new_ones_are_there(self, bench, tmp_path, monkeypatch):
        saes = {"one": make()}
        kept = Path(run_evals(saes, ["meta_structure"], tmp_path, **PLACE)["results"]["meta_structure"]["one"])
        before = kept.read_bytes()

        def fails(config, selected_saes, device, output_path, force_rerun=False):
            kept.write_text("{")
            raise RuntimeError("out of memory")

        monkeypatch.setattr(sys.modules["sae_bench.evals.meta_structure.main"], "run_eval", fails)
        found = run_evals(saes, ["meta_structure"], tmp_path, force=True, **PLACE)
        assert "out of memory" in found["failed"]["meta_structure"]
        assert kept.read_bytes() == before

    def test_data_sets_are_looked_for_in_the_given_folder_first(self, bench, tmp_path):
        (tmp_path / "data").mkdir()
        here = Path.cwd()
        run_evals({"one": make()}, ["sparse_probing"], tmp_path / "out", data=tmp_path / "data", **PLACE)
        assert bench["where"] == (tmp_path / "data").resolve()
        assert Path.cwd() == here
        assert not bench["artifacts"].exists(), "activations of an eval go with it"


class TestFailures:
    def test_a_download_that_fails_is_one_sentence_and_stops_nothing_else(self, bench, tmp_path):
        found = run_evals({"one": make()}, ["sparse_probing", "meta_structure"], tmp_path, **PLACE)
        assert list(found["results"]) == ["meta_structure"]
        sentence = found["failed"]["sparse_probing"]
        assert sentence.startswith(
            "sparse_probing needs the model some-model and eight data sets such as LabHC/bias_in_bios"
        )
        assert "could not be downloaded here (Couldn't reach 'LabHC/bias_in_bios' on the Hub)" in sentence
        assert "\n" not in sentence
        with pytest.raises(CosaeError, match=r"^1 other eval done, in .*\. sparse_probing needs"):
            run({"one": make()}, ["sparse_probing", "meta_structure"], tmp_path, force=True, **PLACE)

    def test_anything_else_is_no_download(self, bench, tmp_path):
        bench["failure"] = RuntimeError("CUDA out of memory\nand more")
        sentence = run_evals({"one": make()}, ["sparse_probing"], tmp_path, **PLACE)["failed"]["sparse_probing"]
        assert sentence.startswith("sparse_probing failed in SAEBench: CUDA out of memory; the whole story is in ")
        assert "Traceback" in (tmp_path / "saebench.log").read_text()

    def test_what_saebench_only_logs_is_said(self, bench, tmp_path):
        bench["failure"] = None
        sentence = run_evals({"one": make()}, ["sparse_probing"], tmp_path, **PLACE)["failed"]["sparse_probing"]
        assert "Failed to load model: no space" in sentence

    def test_what_was_logged_comes_before_what_it_led_to(self, bench, tmp_path, monkeypatch):
        def fails_later(config, saes, device, out, force, artifacts_path):
            logging.getLogger("sae_bench.evals").error("Failed to load model m: We couldn't connect")
            raise UnboundLocalError("cannot access local variable")

        monkeypatch.setattr(sys.modules["sae_bench.evals.sparse_probing.main"], "run_eval", fails_later)
        sentence = run_evals({"one": make()}, ["sparse_probing"], tmp_path, **PLACE)["failed"]["sparse_probing"]
        assert "could not be downloaded here (Failed to load model m: We couldn't connect)" in sentence

    def test_options_that_do_not_fit(self, bench, tmp_path):
        for options, said in (
            ({"steps": 3}, "Got 'steps'"),
            ({"train_steps": "x"}, "Input should be a valid"),
        ):
            found = run_evals(
                {"one": make()}, ["meta_structure"], tmp_path, options={"meta_structure": options}, **PLACE
            )
            assert said in found["failed"]["meta_structure"]

    def test_saes_that_codes_alone_cannot_decode(self, bench, tmp_path):
        saes = {"one": make(frame="unit")}
        found = run_evals(saes, ["tpp", "meta_structure"], tmp_path, **PLACE)
        assert "leave tpp out for one" in found["failed"]["tpp"]
        assert "meta_structure" in found["results"]

    def test_absorption_reads_one_kind_of_hook(self, bench, tmp_path):
        place = {"model_name": "some-model", "hook_name": "mlp_out.1"}
        found = run_evals({"one": make()}, ["absorption"], tmp_path, **place)
        assert found["failed"]["absorption"] == (
            "absorption only reads blocks.N.hook_resid_post. Got blocks.1.hook_mlp_out for one."
        )


class TestAtTheDoor:
    @pytest.mark.parametrize(
        ("evals", "changes", "said"),
        [
            (["cores"], {}, "evals .*core, sparse_probing"),
            ([], {}, "Got 'none' instead"),
            (["core"], {"dtype": "int8"}, "dtype must be one of float32"),
            (["core"], {"options": {"cores": {}}}, "options must be a mapping for each eval"),
            (["core"], {"options": {"core": {"dataset": object()}}}, "options must be plain numbers"),
            (["core"], {"model_name": None}, "model_name"),
            (["core"], {"model_path": "nowhere"}, "model_path .*folder"),
            (["core"], {"data": "nowhere"}, "data must be a folder"),
            (["core"], {"python": "/nowhere/python"}, "python .*interpreter"),
        ],
    )
    def test_refused_in_one_sentence(self, tmp_path, evals, changes, said):
        with pytest.raises(CosaeError, match=said):
            run_evals({"one": make()}, evals, tmp_path / "out", **{**PLACE, **changes})
        assert not list(tmp_path.glob("out/*/*")), "no results"

    @pytest.mark.parametrize("name", ["a/b", "..", "", "a b"])
    def test_names_that_cannot_be_file_names(self, tmp_path, name):
        with pytest.raises(CosaeError, match="names of SAEs become file names"):
            run_evals({name: make()}, ["core"], tmp_path, **PLACE)

    def test_no_saes(self, tmp_path):
        with pytest.raises(CosaeError, match="at least one SAE"):
            run_evals({}, ["core"], tmp_path, **PLACE)

    def test_an_uncalibrated_sae_by_its_name(self, tmp_path):
        with pytest.raises(CosaeError, match=r"^raw: SAEBench encodes token by token"):
            run_evals({"raw": SAE.build(8, 16, "cosine", "batch_topk", 3)}, ["core"], tmp_path, **PLACE)

    def test_two_folders_of_one_name(self, tmp_path):
        with pytest.raises(CosaeError, match="two folders of SAEs have the same name"):
            run([tmp_path / "a" / "sae", tmp_path / "b" / "sae"], ["core"], tmp_path, **PLACE)

    def test_saebench_absent(self, tmp_path, monkeypatch):
        monkeypatch.setattr(saebench.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(CosaeError, match=r"pip install sae-bench==0.6.0"):
            run_evals({"one": make()}, ["core"], tmp_path, **PLACE)

    def test_every_eval_says_what_it_reads(self):
        assert list(EVALS) == [
            "core",
            "sparse_probing",
            "sparse_probing_sae_probes",
            "scr",
            "tpp",
            "absorption",
            "meta_structure",
        ]
        assert {name for name, one in EVALS.items() if one.decodes} == {"core", "scr", "tpp"}


class TestElsewhere:
    @pytest.mark.long
    def test_the_same_sentence_from_another_interpreter(self, tmp_path):
        """An interpreter with cosae but, as in the default environment, without SAEBench."""
        if saebench.importlib.util.find_spec("sae_bench"):
            pytest.skip("this environment has SAEBench")
        with pytest.raises(CosaeError, match=r"sae_bench, .*not installed"):
            run_evals({"one": make()}, ["meta_structure"], tmp_path, python=sys.executable, **PLACE)
        assert [file.name for file in tmp_path.iterdir()] == ["saebench.log"]

    def test_an_interpreter_that_dies_is_quoted(self, tmp_path):
        fake = tmp_path / "python"
        fake.write_text("#!/bin/sh\necho first\necho no such module >&2\nexit 3\n")
        fake.chmod(0o755)
        with pytest.raises(CosaeError, match=r"status 3 .*no such module"):
            run_evals({"one": make()}, ["meta_structure"], tmp_path / "out", python=fake, **PLACE)


class TestModels:
    def test_a_local_model_is_known_while_open(self, bench, tmp_path):
        models = sys.modules["transformer_lens.supported_models"]
        folder = tmp_path / "llama-like"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        with known_model(Job(tmp_path, tmp_path, Settings(model_name="mine", model_path=folder))):
            (link,) = models.OFFICIAL_MODEL_NAMES[1:]
            assert {link: ["mine"]} == models.MODEL_ALIASES
            assert Path(link).resolve() == folder.resolve()
            assert Path(link).name == f"model-{model_digest(folder)}"
        assert models.OFFICIAL_MODEL_NAMES == ["gpt2"]
        assert models.MODEL_ALIASES == {}

    def test_digests_tell_weights_apart(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(b"1")
        first = model_digest(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"2")
        assert model_digest(tmp_path) != first


class TestReasons:
    def test_a_chain_is_followed_to_the_network(self, tmp_path):
        class ConnectError(Exception):
            __module__ = "httpx"

        try:
            try:
                raise ConnectError("Name or service not known")
            except ConnectError as inner:
                raise OSError("file not found") from inner
        except OSError as error:
            sentence = one_sentence("meta_structure", Job(tmp_path, tmp_path, Settings(model_name="m")), chain(error))
        assert sentence.startswith("meta_structure needs files, which could not be downloaded here (file not found)")

    def test_only_errors_of_saebench_are_listened_to(self):
        with errors_logged() as said:
            logging.getLogger("sae_bench.evals.core.main").error("Failed %s", "here")
            logging.getLogger("sae_bench").warning("slow")
            logging.getLogger("elsewhere").error("other")
        logging.getLogger("sae_bench").error("later")
        assert said == ["Failed here"]


class TestCommand:
    @pytest.fixture
    def command(self, tmp_path, capsys):
        cosae.save(make(), tmp_path / "mine")

        def call(*arguments):
            place = ("--model-name", "some-model", "--hook-name", PLACE["hook_name"], "--out", str(tmp_path / "out"))
            with pytest.raises(SystemExit) as ended:
                main(["bench", str(tmp_path / "mine"), "--evals", *arguments, *place])
            return ended.value.code, capsys.readouterr()

        return call

    def test_options_of_evals_and_force(self, bench, command):
        code, said = command("meta_structure", "--set", "meta_structure.train_steps=4", "--seed", "7")
        assert code == 0
        assert said.out.split() == ["meta_structure", "mine", "fraction", "=", "1"]
        assert [(one.train_steps, one.random_seed) for one in bench["configs"]] == [(4, 7)]
        assert command("meta_structure")[0] == 2
        assert command("meta_structure", "--force")[0] == 0

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (["nothing"], "evals .*core, "),
            (["core", "--python", "/nowhere/python"], "python .*interpreter"),
            (["core", "--data", "/nowhere"], "data .*folder"),
            (["core", "--dtype", "int8"], "dtype .*float32, "),
            (["core", "--set", "train_steps=4"], "--set takes EVAL.FIELD=VALUE"),
            (["core", "--set", "cores.train_steps=4"], "options .*mapping .*core, "),
            (["core"], "sae_bench, .*not installed"),
        ],
    )
    def test_mistakes_are_one_sentence(self, command, given, words):
        if given == ["core"] and importlib.util.find_spec("sae_bench"):
            pytest.skip("sae-bench is here")
        code, said = command(*given)
        assert code == 2
        assert re.match(f"cosae: .*{words}", said.err)
        assert said.err.count("\n") == 1
