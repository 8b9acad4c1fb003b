"""Every reader of files that others may have written: a valid file of each, and what reads it."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

import cosae
from cosae.activations.array_files import open_array
from cosae.activations.store.reader import Store
from cosae.errors import CosaeWarning
from cosae.interop.dictionary_learning.drop_in import load_dictionary
from cosae.interop.read import read_sae
from cosae.io.digest import file_digest, value_digest
from cosae.io.records import read_record, write_record
from cosae.recipe import Recipe
from cosae.report.page import write_report
from cosae.run.finished import open_run
from cosae.sae import file as own
from cosae.text.documents import read_documents
from cosae.text.files import Reading
from cosae.text.labelled import read_labelled
from cosae.train.checkpoint import read_latest, write_checkpoint
from tests.support.fake_run import write_run
from tests.support.foreign_files import write as write_foreign
from tests.support.small_stores import rows, write_store

ROWS = [{"text": f"a text, number {i}", "label": i % 3, "name": f"n{i}"} for i in range(40)]


@dataclass(frozen=True)
class Reader:
    """write makes a valid file or folder in an empty folder and returns it; read reads it. seal renews digests that
    stand in the way of what is behind them; None where there are none."""

    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    seal: Callable[[Path], object] | None = None

    def files(self, path: Path) -> list[Path]:
        """What may be damaged."""
        return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _text(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(text, "utf-8")
        return folder / name

    return write


def _recipe(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        Recipe().write(folder / "recipe.json")
        if name.endswith(".json"):
            return folder / "recipe.json"
        import yaml

        plain = json.loads((folder / "recipe.json").read_text("utf-8"))
        (folder / name).write_text(yaml.safe_dump(plain), "utf-8")
        return folder / name

    return write


def _array(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        x_ND, path = np.arange(600, dtype=np.float32).reshape(100, 6), folder / name
        if path.suffix == ".npy":
            np.save(path, x_ND)
        elif path.suffix == ".safetensors":
            save_file({"x": torch.from_numpy(x_ND)}, path)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"x": [row.tolist() for row in x_ND]}), path)
        return path

    return write


def _parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=16)
    return folder / "rows.parquet"


def _saved(folder: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def _store(folder: Path) -> Path:
    return write_store(folder / "store", rows(40, 4), rows(9, 4, 5, 0), dtype="int8")


def _read_store(path: Path) -> None:
    store = Store(path)
    for side in ("train", "held_out"):
        store.take(side, torch.arange(store.n_rows(side)))
        store.documents(side)
    _ = store.statistics
    list(Store(path, check=False).faults())


def _seal_store(path: Path) -> None:
    index = json.loads((path / "index.json").read_text("utf-8"))["record"]
    for shard in index["shards"]:
        there = path / shard["file"]
        shard.update(sha256=file_digest(there), bytes=there.stat().st_size)
    write_record(path / "index.json", index)
    read_record(path / "index.json")


def _own(folder: Path) -> Path:
    sae = cosae.SAE.build(5, 9, "cosine_per_feature", "jumprelu", 3, 4)
    sae.metadata = {"site": "resid_post.3", "tokens": 1000, "recipe": {"data": {"corpus": "pylib"}}}
    return cosae.save(sae, folder / "sae")


def _seal_own(path: Path) -> None:
    config = json.loads((path / own.CONFIG).read_text("utf-8"))
    config["sha256"] = {name: file_digest(path / name) for name in (own.WEIGHTS, own.SELF_CHECK)}
    config[own.DIGEST] = value_digest({name: value for name, value in config.items() if name != own.DIGEST})
    (path / own.CONFIG).write_text(json.dumps(config), "utf-8")


def _saelens_own(folder: Path) -> Path:
    """An SAE of ours as SAELens would have written it."""
    path = _own(folder)
    config = json.loads((path / own.CONFIG).read_text("utf-8"))
    del config["format"]
    (path / own.CONFIG).write_text(json.dumps(config), "utf-8")
    return path


def _saelens_cosine(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path, (d, f) = folder / "sae", (5, 8)
    path.mkdir()
    config = {
        "architecture": "cosine_jumprelu",
        "score": "cosine_grouped",
        "d_in": d,
        "d_sae": f,
        "n_groups": 4,
        "k": 3,
    }
    (path / own.CONFIG).write_text(json.dumps({**config, "metadata": {"l0": 3.0}}), "utf-8")
    shapes = {"W_enc": (d, f), "W_dec": (f, d), "b_enc": (f,), "b_dec": (d,), "scale_a": (f,), "scale_b": (f,)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file({**state, "threshold": torch.rand(f, generator=generator)}, path / own.WEIGHTS)
    return path


def _foreign(format_: str, kind: str) -> Callable[[Path], Path]:
    return lambda folder: Path(write_foreign(format_, kind, folder / "sae").folder)


def _use(path: Path) -> None:
    sae = read_sae(path)
    x = torch.randn(3, sae.d_in, generator=torch.Generator().manual_seed(0))
    assert bool(sae.decode(sae.encode(x)).isfinite().all())
    repr(sae)


def _finished(folder: Path) -> Path:
    run = write_run(folder / "run")
    _own(folder).rename(folder / "run" / "arms")
    (run / "arms").rename(run / "sae")
    (run / "arms").mkdir()
    (run / "sae").rename(run / "arms" / "standard")
    record = json.loads((run / "run.json").read_text("utf-8"))
    record.update(status="finished", arms={"standard": record["arms"]["standard"]})
    (run / "run.json").write_text(json.dumps(record), "utf-8")
    return run


def _open_run(path: Path) -> None:
    run = open_run(path)
    repr(run)
    run._repr_html_()


def _report(path: Path) -> None:
    write_report([path], path.parent / "report.html")


def _checkpoint(folder: Path) -> Path:
    parts = {"stream": {"x": torch.ones(4)}, "arm.a": {"w": torch.ones(2, 3)}}
    write_checkpoint(folder / "run", 5, parts, {"arms": {"a": {"seed": 0}}, "stream": {"n": 3}})
    return folder / "run"


def _model(folder: Path) -> Path:
    from tests.support.tiny_model_runs import save_tokenizer
    from tests.support.tiny_models import make_model

    make_model("gpt2").save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    return folder / "model"


def _load_model(path: Path) -> None:
    from cosae.models.load import load_model

    load_model(path)


def _gguf(folder: Path) -> Path:
    from tests.support.tiny_gguf import write_gguf

    return Path(write_gguf(folder / "tiny.gguf"))


def _load_gguf(path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(path.parent / "cache")}
    with mock.patch.dict(os.environ, cache), warnings.catch_warnings():
        warnings.simplefilter("ignore", CosaeWarning)
        _load_model(path)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
READERS = {
    "recipe.json": Reader(_recipe("recipe.json"), Recipe.read),
    "recipe.yaml": Reader(_recipe("recipe.yaml"), Recipe.read),
    "x.npy": Reader(_array("x.npy"), open_array),
    "x.safetensors": Reader(_array("x.safetensors"), open_array),
    "x.parquet": Reader(_array("x.parquet"), open_array),
    "text.txt": Reader(
        _text("text.txt", "One line.\n\nAnother.\n"),
        lambda path: list(read_documents(str(path), reading=Reading(txt_unit="paragraph"))),
    ),
    "text.jsonl": Reader(_text("rows.jsonl", LINES), lambda path: list(read_documents(str(path)))),
    "text.parquet": Reader(_parquet, lambda path: list(read_documents(str(path)))),
    "saved text": Reader(_saved, lambda path: list(read_documents(str(path), order_key=(1,)))),
    "labels.jsonl": Reader(_text("rows.jsonl", LINES), lambda path: read_labelled(str(path))),
    "labels.parquet": Reader(_parquet, lambda path: read_labelled(str(path))),
    "saved labels": Reader(_saved, lambda path: read_labelled(str(path))),
    "store": Reader(_store, _read_store, _seal_store),
    "checkpoint": Reader(_checkpoint, read_latest),
    "finished run": Reader(_finished, _open_run),
    "report": Reader(_finished, _report),
    "model": Reader(_model, _load_model),
    **({"gguf": Reader(_gguf, _load_gguf)} if importlib.util.find_spec("gguf") else {}),
    "cosae": Reader(_own, _use, _seal_own),
    "saelens cosae": Reader(_saelens_own, _use),
    "saelens cosine_jumprelu": Reader(_saelens_cosine, _use),
    "dictionary": Reader(_foreign("dictionary_learning", "BatchTopKSAE"), load_dictionary),
    **{
        f"{format_} {kind}": Reader(_foreign(format_, kind), _use)
        for format_, kind in (
            ("dictionary_learning", "MatryoshkaBatchTopKSAE"),
            ("dictionary_learning", "GatedAutoEncoder"),
            ("saelens", "jumprelu"),
            ("saelens", "matryoshka_batchtopk_rescaled"),
            ("sparsify", "topk"),
            ("llama_scope", "jumprelu"),
            ("goodfire", "relu"),
            ("gemma_scope", "npz"),
            ("gemma_scope", "safetensors"),
            ("cosine_paper", "standard"),
        )
    },
}

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3.5, 10**30, 2 * 10**10, 1e308, float("nan"), float("inf"), "", "1", "x" * 10**5),
    *([], [1], {}, {"k": []}, [[0]], ["a", None, {}], [float("inf")], {"x" * 10**4: 1}, list(range(3000))),
)
DEEP = "lists in one another"
YAML = (
    *("!!bool abc", "&a [*a]", "*a", "{<<: 3}", "? [1, 2]\n: 3", "2001-13-45", "!!python/name:os.system", "\t"),
    *("1e999", "!!timestamp x", "!!binary 5", "!!int 0x", "!!float z", "---\n---", "[" * 3000),
)


def damage(path: Path, draw: random.Random) -> None:
    """Change a file of a valid one's: bits, a cut, bytes put in or written over; or, in JSON, a value, a key."""
    content = path.read_bytes()
    if path.suffix in (".yaml", ".json", ".jsonl", ".safetensors") and draw.random() < 0.6:
        changed = _changed_text(path.suffix, content, draw)
        if changed is not None:
            replace(path, changed)
            return
    data = bytearray(content)
    at = draw.randrange(len(data) + 1)
    # what matters stands at the beginning and at the end
    at = draw.choice([at, min(at, 200), max(len(data) - 200, 0) + at % 200])
    how = draw.choice(["bits", "bits", "cut", "insert", "overwrite", "number", "remove", "empty", "double"])
    if how == "bits":
        for _ in range(draw.randint(1, 8)):
            data[min(max(at + draw.randint(-40, 40), 0), len(data) - 1)] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = draw.randbytes(draw.randint(1, 60))
    elif how == "overwrite":
        length = draw.randint(1, 60)
        data[at : at + length] = draw.choice([bytes(length), b"\xff" * length, draw.randbytes(length), b"9" * length])
    elif how == "number":
        data[at : at + 8] = draw.choice([2**62, 2**31, 10**9, 2**27, 255]).to_bytes(8, "little")
    elif how == "remove":
        del data[at : at + draw.randint(1, 60)]
    elif how == "double":
        data = data * 2
    replace(path, b"" if how == "empty" else bytes(data))


def replace(path: Path, content: bytes) -> None:
    """Another file in its place: what has the old one mapped keeps it."""
    path.unlink()
    path.write_bytes(content)


def _changed_text(suffix: str, content: bytes, draw: random.Random) -> bytes | None:
    if suffix == ".yaml":
        lines = content.decode("utf-8").splitlines()
        number = draw.randrange(len(lines))
        key, colon, _ = lines[number].partition(":")
        lines[number] = key + colon + " " + draw.choice([*YAML, json.dumps(draw.choice(ODD))])
        return "\n".join(lines).encode()
    try:
        if suffix == ".jsonl":
            lines = content.decode("utf-8").splitlines()
            number = draw.randrange(len(lines))
            lines[number] = _dump(_changed(json.loads(lines[number]), draw), draw)
            return ("\n".join(lines) + "\n").encode()
        if suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            header = _dump(_changed(json.loads(content[8 : 8 + length]), draw), draw).encode()
            return len(header).to_bytes(8, "little") + header + content[8 + length :]
        return _dump(_changed(json.loads(content), draw), draw).encode()
    except ValueError:
        return None


def _dump(value: Any, draw: random.Random) -> str:
    """As JSON, what is deep in it deeper than Python writes."""
    depth = draw.choice([3, 70, 1000, 100_000])
    return json.dumps(value).replace(f'"{DEEP}"', "[" * depth + "]" * depth)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _changed(value: Any, draw: random.Random) -> Any:
    """The value with one or two of the values in it another, gone, doubled or under another name."""
    for _ in range(draw.randint(1, 2)):
        places = list(_places(value))
        if not places or draw.random() < 0.03:
            value = copy.deepcopy(draw.choice(ODD))
            continue
        holder, key = draw.choice(places)
        how = draw.choice(["odd", "odd", "odd", "gone", "other", "deep"])
        if how == "odd":
            holder[key] = copy.deepcopy(draw.choice(ODD))
        elif how == "gone":
            del holder[key]
        elif how == "deep":
            holder[key] = DEEP
        else:
            other, name = draw.choice(places)
            with_other = json.loads(json.dumps(other[name])) if name in _keys(other) else None
            holder[key] = with_other
    return value


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))
