"""Every option of every verb: with it something else is done or said, or it is refused.

The options are those of the verbs' classes: one that is added must be named here, with a value that can be seen.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cosae
from cosae.cli import VERBS, main
from cosae.cli.help import FIELDS
from cosae.presets import preset
from cosae.run.evaluate import evaluate
from cosae.run.requests import EvalRequest
from cosae.sae.calibrate import calibrate
from tests.cli.test_every_field import place as place

BROWSE = (
    "model", "site", "format", "seed", "corpus", "store", "tokens", "context", "window", "out", "rebuild", "static",
    "host", "port", "open", "inject",
)  # fmt: skip
NEEDS = {
    "device": "needs an accelerator",
    "parallel": "needs torchrun: tests/train/parallel",
    "quiet": "what is printed on the side",
    **dict.fromkeys(("train wandb", "train tensorboard"), "tests/run/test_resume.py, with stand-ins"),
    **dict.fromkeys(("plan wandb", "plan tensorboard", "plan show", "plan dry_run"), "plan takes the options of train"),
    **dict.fromkeys(("demo out", "demo real", "demo steps"), "tests/run/test_demo.py"),
    "explain": "asks a chat model: tests/run/explore/test_explain.py and tests/browse/explain, with stand-ins",
    **dict.fromkeys(("resume run", "resume metrics_only", "resume extend_to"), "tests/run/test_resume.py"),
    **dict.fromkeys(("report runs", "report out"), "tests/report"),
    **dict.fromkeys(("inspect source", "verify store", "fetch names"), "what the verb is about"),
    **dict.fromkeys(
        (f"pull {name}" for name in ("source", "out", "revision")), "tests/interop/test_hub.py, a stand-in"
    ),
    **dict.fromkeys(("train out", "plan out"), "where it is written"),
    **dict.fromkeys(("train show", "train dry_run"), "show is in every test of the recipe; tests/cli/test_advice.py"),
    **dict.fromkeys(
        (f"browse {name}" for name in BROWSE), "tests/cli/test_browse.py, tests/run/explore/test_browse.py"
    ),
    "export explanations": "needs a store with explanations: tests/run/test_export.py",
    "export upload": "tests/interop/peers/neuronpedia_checks.py, a stand-in",
    "bench": "needs SAEBench: tests/interop/test_saebench_run.py, a stand-in",
}
"""Options whose effect is not looked for here, and why, or where it is."""
RECIPE = {
    "preset": ["paper"], "recipe": ["recipe.json"], "model": ["model"], "corpus": ["texts"], "dtype": ["bfloat16"],
    "context": ["24"], "seed": ["5"], "device": ["cuda"], "set": ["training.log_every=3"], "site": ["resid_post.0"],
    "inputs": ["ids"], "positions": ["1:"],
}  # fmt: skip
TRAIN = RECIPE | {
    "arms": ["cosine"], "target": ["mlp_out.0"],
    "activations": ["rows.npy"], "store": ["stores/resid_post.0"], "world": ["none:d_in=9"],
    "inject": ["log_normal"], "inject_into": ["training", "--inject", "log_normal"], "filter": ["none"], "d_sae": ["9"],
    "k": ["3"], "steps": ["9"], "batch": ["9"], "lr": ["0.5"], "kernel": ["reference"],
}  # fmt: skip
REQUEST = {
    "model": ["other"], "site": ["resid_post.0"], "seed": ["3"], "corpus": ["mixed"], "tokens": ["192"],
    "context": ["24"], "inject": ["log_normal:sigma=2"], "sink_factor": ["1.2"], "format": ["sparsify"],
    "activations": ["wide.npy"], "store": ["wide"], "store_site": ["x"], "target": ["mlp_out.1"],
}  # fmt: skip
FILE = {"seed": ["3"], "tokens": ["64"], "context": ["8"], "inject": ["log_normal:sigma=2"], "sink_factor": ["1.2"]}
OTHERS = {  # of another measurement
    "texts": ["labels.jsonl"], "top": ["2"],
    "features": ["1"], "pooling": ["last"], "seeds": ["2"], "max_texts": ["50"], "text_column": ["x"],
    "label_column": ["x"],
}  # fmt: skip
READING = {name: REQUEST[name] for name in ("model", "site", "seed", "corpus", "format")} | {
    "prompts": ["9"],
    "context": ["24"],
}
HERE = "--model model --site resid_post.1 --corpus texts --context 32"
STEER = "steer SAE text --model model --site resid_post.1 --feature 3 --new-tokens 5"
EXPORT = f"SAE --out OUT --prompts 8 {HERE}"
CASES: dict[str, dict[str, list[str]]] = {
    f"audit SAE --out OUT --tokens 128 {HERE}": REQUEST,
    f"eval reconstruction SAE --out OUT.json --tokens 128 {HERE}": {**REQUEST, **OTHERS},
    "eval reconstruction BARE --out OUT.json --tokens 128 --activations wide.npy": FILE,
    "eval reconstruction BARE --out OUT.json --tokens 128 --store wide --store-site resid_post.1": {
        **FILE, "store_site": ["resid_post.0"], "activations": ["wide.npy"], "store": ["wide/resid_post.0"],
    },
    "eval geometry BARE --tokens 128 --activations wide.npy": {name: FILE[name] for name in ("inject", "sink_factor")},
    f"eval causal SAE --tokens 128 {HERE}": {"features": ["1"]},
    f"eval probing SAE --texts labels.jsonl {HERE}": {
        "texts": ["others.jsonl"], "text_column": ["other"], "label_column": ["side"], "seeds": ["2"],
        "max_texts": ["50"], "top": ["3"], "pooling": ["last"], "context": ["8"], "inject": ["log_normal:sigma=2"],
    },
    f"calibrate SAE --out OUT --tokens 128 {HERE}": {**REQUEST, "k": ["2"], "jumprelu": []},
    f"features SAE --prompts 16 {HERE}": {
        **READING, "feature": ["3"], "search": ["def return"], "rows": ["2"], "sort": ["norm"],
    },
    f"features SAE --feature 3 --prompts 16 {HERE}": {"examples": ["2"], "rows": ["3"], "sort": ["norm"]},
    f"{STEER} --add 50": {
        "model": ["other"], "site": ["resid_post.0"], "format": ["sparsify"], "feature": ["4"], "add": ["-90"],
        "new_tokens": ["6"],
        "temperature": ["2.0"], "set": ["3"], "scale": ["3"], "ablate": [], "seed": ["1"],
    },
    f"{STEER} --add 5 --temperature 5": {"seed": ["3"]},
    f"{STEER} --set 50": {"set": ["-900"]},
    f"{STEER} --scale 50": {"scale": ["-900"]},
    f"export neuronpedia {EXPORT}": {
        **READING, "model_id": ["mine"], "set_name": ["mine"], "top": ["2"], "n_quantiles": ["2"],
        "per_quantile": ["1"], "ignore_norm_above": ["1.1"], "public_name": ["texts"], "dry_run": [],
    },
    f"export delphi {EXPORT}": {**READING, "n_splits": ["2"], "public_name": ["texts"], "dry_run": []},
    "capture --model model --site resid_post.1 --corpus texts --context 32 --tokens 96 --out OUT": {
        "tokens": ["128"], "held_out_tokens": ["64"], "store_dtype": ["float32"], "shard_tokens": ["50"],
        "site": ["resid_post.0", "resid_post.1"], "dry_run": [],
    },
    "push SAE me/it --dry-run": {
        "license": ["apache-2.0"], "private": [], "revision": ["v2"], "message": ["a word"], "public_name": ["model"],
    },
}  # fmt: skip
"""A command → its options, each with a value beside which the command says something else, or is refused."""


def fields(kind: Any) -> Iterator[str]:
    """Names of a verb's options, those of nested classes too."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        nested = [
            one for one in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(one)
        ]
        if nested:
            for one in nested:
                yield from fields(one)
        else:
            yield field.name


@pytest.fixture(scope="module")
def world(place: Path) -> Path:
    """What `place` has, and an SAE of its model, wide arrays, a wide store, labelled texts."""
    import numpy as np

    from tests.support.small_stores import REQUEST as REQUEST_OF_A_STORE
    from tests.support.small_stores import rows, write_store
    from tests.support.tiny_models import make_model

    d_in = int(make_model("llama").config.hidden_size)
    sae = cosae.SAE.build(d_in=d_in, d_sae=12, score="inner", selector="batch_topk", k=3, seed=0)
    calibrate(sae, torch.randn(500, d_in, generator=torch.Generator().manual_seed(1)))
    cosae.save(sae, place / "BARE")
    sae.metadata = {"model": "model"}
    cosae.save(sae, place / "SAE")
    np.save(place / "wide.npy", np.random.default_rng(0).normal(size=(800, d_in)).astype(np.float32))
    for block in (0, 1):
        site = {"name": f"resid_post.{block}", "hook_name": f"blocks.{block}.hook_resid_post", "block": block}
        request = {**REQUEST_OF_A_STORE, "site": {**site, "module_path": f"model.layers.{block}", "reads": "output"}}
        sides = rows(600, d_in, seed=block), rows(300, d_in, seed=2 + block, document=0)
        write_store(place / "wide" / f"resid_post.{block}", *sides, request=request, shard_tokens=512)
    texts = [path.read_text() for path in sorted((place / "texts").iterdir())]
    for name, part in (("labels", 40), ("others", 30)):
        lines = [
            {"text": text[at : at + part], "other": text[at + 9 : at + 59], "label": at % 2, "side": (at // 3) % 2}
            for text in texts
            for at in range(0, 300, 60 + at_shift(text))
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    preset("embedded").changed({"training.steps": 7}).write(place / "recipe.json")
    return place


def at_shift(text: str) -> int:
    return 1 + len(text) % 2


def said(words: list[str], capsys: pytest.CaptureFixture[str], out: Path) -> tuple[int, str]:
    """What a command prints and writes, times and places left out."""
    torch.manual_seed(0)
    with pytest.raises(SystemExit) as ended:
        main([word.replace("OUT", str(out)) for word in words])
    text = capsys.readouterr()
    status = int(ended.value.code or 0)
    files = []
    for path in sorted(path for path in out.parent.rglob("*") if path.is_file() and str(path).startswith(str(out))):
        files.append(f"{path.relative_to(out.parent).as_posix().removeprefix(out.name)} {path.stat().st_size}")
        if path.suffix == ".json" and path.stat().st_size < 10**6:
            files.append(path.read_text())
    whole = "\n".join([text.out, *files]) if status == 0 else text.err
    return status, re.sub(r'"written_at": "[^"]*"|"started_at": "[^"]*"|\d+(\.\d+)? (s|min|ms)\b', "", whole).replace(
        str(out), "OUT"
    )


pytestmark = pytest.mark.filterwarnings("ignore:.* was trained at .* is read here at:cosae.errors.CosaeWarning")
PAIRS = [(command, name) for command, options in CASES.items() for name in options]


SLOW = [pair for pair in PAIRS if "probing" in pair[0] and pair[1] != "inject"]


@pytest.mark.parametrize(
    ("command", "name"), [pytest.param(*p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PAIRS]
)
def test_an_option_acts_or_is_refused(
    command: str, name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(world)
    base = [*command.split(), "--quiet"]
    flag = f"--{name.replace('_', '-')}"
    changed = list(base)
    if flag in base:
        at = changed.index(flag)
        stop = next((i for i in range(at + 1, len(changed)) if changed[i].startswith("--")), len(changed))
        del changed[at:stop]
    if not (flag in base and not CASES[command][name]):  # a flag that is on is taken away
        changed += [flag, *CASES[command][name]]
    before = said(base, capsys, tmp_path / "before")
    after = said(changed, capsys, tmp_path / "after")
    assert before[0] == 0, before
    assert after[0] == 0 or len(after[1].splitlines()) == 1, after
    assert after != before, "nothing else was done or said"


@pytest.mark.slow
@pytest.mark.parametrize("measurement", ["discovery", "probing"])
def test_an_injection_reaches_measurements_of_token_concepts(measurement: str, tmp_path: Path) -> None:
    for seed, score in enumerate(("inner", "cosine")):
        sae = cosae.SAE.build(d_in=192, d_sae=16, score=score, selector="topk", k=4, seed=seed)
        sae.metadata = {"model": "embedded", "site": "resid_post.3"}
        cosae.save(sae, tmp_path / score)
    found = {}
    for inject in (None, "log_normal:sigma=2", "none"):
        request = EvalRequest(tokens=2000, context=64, inject=inject)
        specs = (f"A={tmp_path / 'inner'}", f"B={tmp_path / 'cosine'}")
        found[inject] = evaluate(measurement, specs, request)["found"]
    assert found[None] == found["none"]
    assert found[None] != found["log_normal:sigma=2"]


@pytest.mark.parametrize("name", TRAIN)
def test_an_option_of_train_changes_the_recipe(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That every field of the recipe acts is seen in test_every_field.py."""
    monkeypatch.chdir(world)
    base = ["train", "--out", "OUT", "--show"]
    before, after = (
        said(base, capsys, world / "no"),
        said([*base, f"--{name.replace('_', '-')}", *TRAIN[name]], capsys, world / "no"),
    )
    assert (before[0], after[0]) == (0, 0)
    was, now = json.loads(before[1]), json.loads(after[1])
    assert was != now
    if path := FIELDS.get(name):
        for part in path.split("."):
            was, now = was[part], now[part]
        assert was != now, path


REFUSED = [
    "train --out OUT --inject-into training",
    "train --out OUT --set perturbation.sigma=2",
    "train --out OUT --inject log_normal --set perturbation.frac=0.5",
    "train --out OUT --filter none --set filter.factor=3",
    "train --out OUT --arms cosine,k=4 --k 5",
    "train --out OUT --set evaluation.max_texts=50",
    "train --out OUT --arms cosine,n_groups=3",
    "train --out OUT --arms standard,a_lr=3",
    "train --out OUT --arms standard,b_init=norm",
    "train --out OUT --arms cosine,bandwidth=0.3",
    "train --out OUT --arms cosine,sparsity_weight=0.3",
    "train --out OUT --preset paper --recipe recipe.json",
    "train --out OUT --store wide/resid_post.1 --context 9",
    "train --out OUT --world none --corpus texts",
    "train --out OUT --activations wide.npy --model other",
    "audit BARE --store-site resid_post.1 --activations wide.npy",
]  # fmt: skip


@pytest.mark.parametrize("command", REFUSED)
def test_an_option_without_a_say_is_refused_in_a_sentence(
    command: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    status, sentence = said(command.split(), capsys, tmp_path / "out")
    assert (status, len(sentence.splitlines())) == (2, 1), sentence
    assert re.search("drop|not from both|taken from one", sentence)
    assert not (tmp_path / "out").exists()


def test_every_option_is_named_here() -> None:
    shown = {(command.split()[0], name) for command, options in CASES.items() for name in options}
    shown |= {
        (verb, name) for verb in ("train", "plan", "capture") for name in (TRAIN if verb != "capture" else RECIPE)
    }
    positional = {"saes", "sae", "source", "measurement", "prompt", "to", "evals", "runs", "run", "store"}
    known = {(verb, word[2:].replace("-", "_")) for command in CASES for verb in [command.split()[0]]
             for word in command.split() if word.startswith("--")}  # fmt: skip
    missing = [
        f"{verb} {name}"
        for verb, (kind, _) in VERBS.items()
        for name in fields(kind)
        if not {verb, name, f"{verb} {name}"} & set(NEEDS)
        and (verb, name) not in shown | known
        and name not in positional
    ]
    assert missing == [], missing
