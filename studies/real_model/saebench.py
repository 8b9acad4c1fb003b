"""The same SAEs through SAEBench's own code, by `cosae bench`: sparse_probing 0.6, once with a BOS and once without.

SAEBench leaves BOS, padding and EOS out of the pooling by their ids. With SmolLM2's tokenizer as it is a BOS stands at
position 0, takes the sink and is left out. Without one, as Qwen3's tokenizer has none, the first word takes the sink
and is pooled: the paper's case. Nothing else differs; the copy of the model links to the same weights.

Its data sets lie on the hub. Those here are written in the place and format of its AG News, four classes each, texts of
a set from one source: news, help-desk tickets and code of sae-probes, three classes that it labels and the rest as the
fourth, and the four largest topics of Wikipedia's introductions. 100 texts a class for training, 50 for test (SAEBench:
2000 and 500), 64 tokens a text (128), no probe on all latents.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from cosae.interop.sae_probes.datasets import datasets
from cosae.interop.saebench.run import run_evals
from cosae.io.atomic import write_text
from cosae.models.load import place_of
from cosae.run.folder import read_json, write_json
from cosae.text.labelled import read_labelled
from studies.real_model.design import MODEL
from studies.runsets import CACHE, SEEDS, finished, folder_of

PLACE = CACHE / "real_model" / "saebench"
NAME = "fancyzhx/ag_news"
TRAIN, TEST = 100, 50
ARMS = ("standard", "cosine")
RUNS = ("real_14", "real_10")
BOS = {"with a BOS": True, "without": False}
LABELLED = {
    "news": ("139_news_class_Politics", "140_news_class_Technology", "141_news_class_Entertainment"),
    "code": ("158_code_C", "159_code_Python", "160_code_HTML"),
    "tickets": ("151_it_tick_HR Support", "152_it_tick_Hardware", "153_it_tick_Administrative rights"),
}
SETS = ("topic", *LABELLED)
METRICS = ("sae_top_1", "sae_top_2", "sae_top_5")
SIZES = {
    **{"probe_train_set_size": 2 * TRAIN, "probe_test_set_size": 2 * TEST},
    **{"context_length": 64, "lower_vram_usage": True},
}
"""Of a question, which has as many texts of other classes; the last leaves the probe on all latents out."""


def python() -> Path:
    """The Python that has SAEBench: `python -m tests.interop.peers.environments saebench` makes one."""
    peers = Path(os.environ.get("COSAE_PEERS", Path.home() / ".cache" / "cosae-peers"))
    return Path(os.environ.get("COSAE_SAEBENCH_PYTHON", peers / "saebench" / "bin" / "python"))


def ensure() -> None:
    """Every set, with and without a BOS; then at block 10, where there is no sink, without alone."""
    for set_name in SETS:
        _write(PLACE / "data" / set_name / NAME, _classes(set_name))
    for run, words in ((RUNS[0], "without"), (RUNS[0], "with a BOS"), (RUNS[1], "without")):
        for set_name in SETS:
            _evaluate(run, set_name, words, PLACE / "data" / set_name)


def _evaluate(run: str, set_name: str, words: str, data: Path) -> None:
    done = _file(run, set_name, words)
    if done.exists():
        return
    seeds = [seed for seed in SEEDS if finished(folder_of(run, seed))]
    saes = {f"{arm}_{seed}": folder_of(run, seed) / "arms" / arm for seed in seeds for arm in ARMS}
    options = {"sparse_probing": {"dataset_names": [NAME], **SIZES}}
    where = {"python": python(), "model_path": _model(words), "model_name": MODEL, "data": data}
    answer = run_evals(saes, "sparse_probing", done.with_suffix(""), options=options, force=True, **where)
    if answer["failed"]:
        raise SystemExit(f"SAEBench: {answer['failed']}")
    write_json(done, {sae: _accuracies(Path(file)) for sae, file in answer["results"]["sparse_probing"].items()})


def _accuracies(file: Path) -> dict[str, dict[str, float]]:
    """Metric → class → test accuracy, of one SAE's result."""
    by_class = read_json(file)["eval_result_unstructured"][f"{NAME}_results"]
    return {metric: by_class[f"{metric}_test_accuracy"] for metric in METRICS}


def _file(run: str, set_name: str, words: str) -> Path:
    return PLACE / f"{run}-{set_name}-{words.replace(' ', '_')}.json"


def _classes(set_name: str) -> list[list[str]]:
    """The texts of a set's four classes."""
    if set_name not in LABELLED:
        topic = read_labelled("wiki:topic")
        largest = np.argsort(-np.bincount(topic.class_N), kind="stable")[:4]
        return [[topic.texts[row] for row in np.flatnonzero(topic.class_N == one)] for one in largest]
    sets = datasets(only=LABELLED[set_name])
    known = [[text for text, label in zip(one.texts, one.labels, strict=True) if label] for one in sets]
    named = {text for texts in known for text in texts}
    rest = dict.fromkeys(text for one in sets for text in one.texts if text not in named)
    return [*known, list(rest)]


def lines(set_name: str, part: str) -> list[dict[str, Any]]:
    """What was written of a set: {"text", "label"} a line; part is train or test."""
    file = PLACE / "data" / set_name / NAME / f"{part}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write(folder: Path, classes: list[list[str]]) -> None:
    """train.jsonl and test.jsonl as AG News has them; the texts drawn by seed 0."""
    rng = np.random.default_rng(0)
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for label, texts in enumerate(classes):
        drawn = rng.permutation(len(texts))[: TRAIN + TEST]
        for at, row in enumerate(drawn):
            parts["train" if at < TRAIN else "test"].append(json.dumps({"text": texts[row], "label": label}))
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in parts.items():
        write_text(folder / f"{part}.jsonl", "\n".join(lines) + "\n")


def _model(words: str) -> Path:
    """The model in a folder of its own, with a BOS in the tokenizer's settings or without."""
    folder = PLACE / f"model_{words.replace(' ', '_')}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(place_of(MODEL)).iterdir():
        copy = folder / file.name
        if file.name == "config.json":  # TransformerLens asks for the architecture, which a GGUF file doesn't name
            write_json(copy, {"architectures": ["LlamaForCausalLM"], **read_json(file)})
        elif file.name == "tokenizer_config.json":
            write_json(copy, {key: value for key, value in read_json(file).items() if key != "bos_token" or BOS[words]})
        elif not copy.exists():
            copy.symlink_to(file.resolve())
    return folder


def numbers(interval: Any) -> dict[str, Any]:
    """Run → with or without a BOS → metric → mean accuracy of each arm and the cosine arm's gain over questions and
    seeds; what has not been run is not there."""
    found: dict[str, Any] = {}
    for run in RUNS:
        for words in BOS:
            files = [_file(run, name, words) for name in SETS]
            tables = [read_json(file) for file in files if file.exists()]
            if tables:
                found.setdefault(run, {})[words] = {"sets": len(tables), **_gains(tables, interval)}
    return found


def _gains(tables: list[Any], interval: Any) -> dict[str, Any]:
    found = {}
    for metric in METRICS:
        standard_QS, cosine_QS = (_accuracy(tables, arm, metric) for arm in ARMS)
        means = {arm: round(float(of.mean()), 4) for arm, of in zip(ARMS, (standard_QS, cosine_QS), strict=True)}
        found[metric] = {**means, "gain": interval(100 * (cosine_QS - standard_QS))}
    return found


def _accuracy(tables: list[Any], arm: str, metric: str) -> Any:
    """(questions, seeds)."""
    columns = [f"{arm}_{seed}" for seed in SEEDS if f"{arm}_{seed}" in tables[0]]
    rows = [[table[sae][metric][label] for sae in columns] for table in tables for label in table[columns[0]][metric]]
    return np.array(rows)
