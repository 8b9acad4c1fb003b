"""Every eval of the real SAEBench 0.6.0 to its end, offline, on cosae SAEs; and to the download where one is needed.

Needs the environment that tests/interop/peers/environments.py builds ($COSAE_PEERS or $COSAE_SAEBENCH_PYTHON).
"""

import json
import os
import random
import string
import subprocess
from pathlib import Path

import pytest
import torch

import cosae
from cosae.errors import CosaeError
from cosae.interop.saebench.run import run, run_evals
from tests.interop.peers.environments import find_python

HERE = Path(__file__).parent
PYTHON = find_python("saebench")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="build it with tests/interop/peers/environments.py saebench"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No waiting for a network that is not there, and the same answer where it is."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def saes():
    """A standard and a cosine SAE of the embedded model, 30 steps."""
    return cosae.fit("embedded", ["standard", "cosine"], d_sae=256, k=16, steps=30).saes


def check(name):
    source = Path(cosae.__file__).resolve().parents[1]
    done = subprocess.run(
        [str(PYTHON), str(HERE / "peers" / "saebench_checks.py"), name],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_sae_probes_data_and_splits_are_the_packages_own():
    assert check("probes") == {"n": 113, "names": 0, "texts": 0, "labels": 0, "splits": 0}


def test_a_local_model_is_the_same_in_transformer_lens():
    found = check("model")
    assert found["logits"] < 1e-4
    assert found["resid_post.3"] < 1e-4


def test_meta_structure_and_sae_probes(saes, tmp_path):
    options = {
        "meta_structure": {"train_steps": 20, "train_batch_size": 64},
        "sparse_probing_sae_probes": {"dataset_names": ["41_truthqa_tf", "24_headline_isiran"], "ks": [1, 5]},
    }
    found = run_evals(saes, list(options), tmp_path, options=options, python=PYTHON)
    assert found["failed"] == {}
    for arm in ("standard", "cosine"):
        meta = json.loads((tmp_path / "meta_structure" / f"{arm}_custom_sae_eval_results.json").read_text())
        assert meta["eval_type_id"] == "meta_structure_decoder_variance"
        assert meta["eval_config"]["train_steps"] == 20
        probes = json.loads(Path(found["results"]["sparse_probing_sae_probes"][arm]).read_text())
        assert [one["dataset_name"] for one in probes["eval_result_details"]] == ["24_headline_isiran", "41_truthqa_tf"]
        by_k = probes["sae_metrics_by_k"]
        assert set(by_k) == {"1", "5"}
        # Headlines that name a country are easy even for a small model of code; a coin gets one half.
        easy = probes["eval_result_details"][0]
        assert easy["llm_test_accuracy"] > 0.6
        assert 0.4 < by_k["1"]["test_accuracy"] <= 1
        assert probes["sae_cfg_dict"]["cosae"]["sae"]["d_sae"] == 256
        assert probes["cosae"]["sae"]["selector"] == "batch_topk"


def test_core_with_our_explained_variance_beside_theirs(saes, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    sources = sorted(Path(random.__file__).parent.glob("*.py"))[:60]
    lines = [json.dumps({"text": file.read_text("utf-8", "replace")}) for file in sources]
    (texts / "train.jsonl").write_text("\n".join(lines))
    core = {
        "dataset": str(texts),
        "n_eval_reconstruction_batches": 2,
        "n_eval_sparsity_variance_batches": 3,
        "eval_batch_size_prompts": 4,
    }
    found = run_evals(saes, ["core"], tmp_path / "out", options={"core": core}, python=PYTHON)
    assert found["failed"] == {}
    for arm in saes:
        result = json.loads(Path(found["results"]["core"][arm]).read_text())
        theirs = result["eval_result_metrics"]["reconstruction_quality"]["explained_variance"]
        ours = result["cosae"]["explained_variance"]
        assert ours["saebench_explained_variance"] == theirs
        assert ours["saebench_formula"] == pytest.approx(theirs, abs=1e-4), "this is what they compute"
        assert abs(ours["fve"] - theirs) > 0.01, "and it is not the variance explained"
        assert 0 < ours["fve"] < ours["uncentred"] < 1
        assert 1000 < ours["tokens"] <= 3 * 4 * 128
        assert 0 < result["eval_result_metrics"]["model_performance_preservation"]["ce_loss_score"] < 1
        assert len(result["eval_result_details"]) == 256


def test_sparse_probing_scr_and_tpp_on_local_copies(saes, tmp_path):
    bios = tmp_path / "data" / "LabHC" / "bias_in_bios"
    bios.mkdir(parents=True)
    draw = random.Random(0)
    for part, n in (("train", 60), ("test", 40)):
        rows = [
            {
                "hard_text": f"def job_{job}_{who}(x): return {job} * x + {draw.randint(0, 999)}",
                "profession": job,
                "gender": who,
            }
            for job in (0, 1, 2, 6, 9, 13, 21)
            for who in (0, 1)
            for _ in range(n)
        ]
        draw.shuffle(rows)
        (bios / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = "LabHC/bias_in_bios_class_set1"
    shared = {"dataset_names": [name], "context_length": 32}
    pair = {"column1_vals_lookup": {name: [["professor", "nurse"]]}}
    ablation = {**shared, **pair, "train_set_size": 40, "test_set_size": 40, "n_values": [2], "probe_epochs": 1}
    options = {
        "sparse_probing": {**shared, "probe_train_set_size": 40, "probe_test_set_size": 40, "k_values": [1]},
        "scr": ablation,
        "tpp": ablation,
    }
    found = run_evals(saes, list(options), tmp_path / "out", data=tmp_path / "data", options=options, python=PYTHON)
    assert found["failed"] == {}
    numbers = {name: found["numbers"][name]["cosine"] for name in options}
    assert numbers["sparse_probing"]["llm_test_accuracy"] > 0.7, "the profession is written in the text"
    assert numbers["sparse_probing"]["sae_top_1_test_accuracy"] > 0.6
    assert "scr_metric_threshold_2" in numbers["scr"]
    assert "tpp_threshold_2_total_metric" in numbers["tpp"]


def test_what_has_to_be_downloaded_is_one_sentence_each(saes, tmp_path):
    evals = ["core", "sparse_probing", "scr", "tpp"]
    found = run_evals(saes, evals, tmp_path, python=PYTHON)
    assert found["results"] == {}
    assert list(found["failed"]) == evals
    for name, sentence in found["failed"].items():
        assert sentence.startswith(f"{name} needs ")
        assert "could not be downloaded here" in sentence
        assert "\n" not in sentence
    hub = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"}
    options = {"core": {"dataset": str(_one_text(tmp_path))}}
    with pytest.raises(CosaeError, match="core needs the model gpt2"):
        run(saes, ["core"], tmp_path / "gpt2", options=options, python=PYTHON, **hub)


def _one_text(folder):
    place = folder / "text"
    place.mkdir()
    (place / "train.jsonl").write_text(json.dumps({"text": "a text"}))
    return place


def test_absorption_needs_a_tokenizer_of_whole_words(saes, tmp_path):
    """A random model whose tokenizer knows 4-letter words: the eval's end, not its numbers, is what is shown."""
    model = _model_of_words(tmp_path / "words")
    sae = cosae.SAE.build(
        32, 64, "cosine", "topk", 8, sample=torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    )
    options = {"min_GT_probe_f1": -1.0, "min_feats_for_eval": 1, "k_sparse_probe_num_epochs": 1, "max_k_value": 1}
    found = run_evals(
        {"words": sae},
        ["absorption"],
        tmp_path / "out",
        model_path=model,
        model_name="words",
        hook_name="resid_post.1",
        options={"absorption": options},
        python=PYTHON,
    )
    assert found["failed"] == {}
    assert 0 <= found["numbers"]["absorption"]["words"]["mean_absorption_fraction_score"] <= 1


def _model_of_words(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    draw = random.Random(0)
    words = {"".join(draw.choices(string.ascii_lowercase, k=4)) for _ in range(780)} | {"has", "the", "first", "letter"}
    vocabulary = {
        token: i for i, token in enumerate(["<bos>", "<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    merges = {}
    for word in sorted(words):
        whole = "Ġ"
        for letter in word:
            merges[whole, letter] = None
            whole += letter
            vocabulary.setdefault(whole, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder
