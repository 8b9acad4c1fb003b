"""One library's ways of harvesting activations, in a process of its own: started by `benchmarks.harvest`.

    PYTHON -m benchmarks.harvest_worker JOB.json     and lines on standard input, each answered by a line of JSON:
    first WAY   activations of the first batch, written to the job's folder as WAY.npy
    go WAY      harvest all sequences once: seconds of wall and processor time

Only the library of the job is imported. Whatever else it prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Way = Callable[[Tensor], Tensor]
"""Token ids (S, T) → activations (S · T, D), or for a way that ends on disk those that were read back from there."""


def cosae_ways(job: dict[str, Any]) -> dict[str, Way]:
    """`capture`, and `capture` into a store with one shard a call."""
    from cosae.activations.store.shards import ShardRows
    from cosae.activations.store.writer import StoreWriter
    from cosae.models.capture import capture
    from cosae.models.load import load_model
    from cosae.types import Activations, Sequences

    model, _ = load_model(job["model"])
    folder = Path(job["folder"]) / "cosae"

    def harvest(ids_ST: Tensor) -> Activations:
        whole = torch.ones_like(ids_ST, dtype=torch.bool)
        index_ST = torch.arange(ids_ST.shape[1], dtype=torch.int32).expand_as(ids_ST)
        doc_ST = torch.arange(len(ids_ST), dtype=torch.int32)[:, None].expand_as(ids_ST)
        rows = Sequences(ids_ST, doc_ST, index_ST, whole, ~whole)
        return capture(model, rows, job["site"], batch_sequences=job["batch"])[job["site"]]

    def to_disk(ids_ST: Tensor) -> Tensor:
        shutil.rmtree(folder, ignore_errors=True)
        writer = StoreWriter(folder, {}, {}, d_in=job["d_in"], dtype="float32", shard_tokens=ids_ST.numel())
        found = harvest(ids_ST)
        writer.append("train", 0, ShardRows(found))
        writer.finish({"train": [str(i) for i in range(len(ids_ST))], "held_out": []})
        return found.x_ND

    return {"memory": lambda ids_ST: harvest(ids_ST).x_ND, "disk": to_disk}


def saelens_ways(job: dict[str, Any]) -> dict[str, Way]:
    """`ActivationsStore.get_raw_llm_batch`, and `CacheActivationsRunner.run`, on Hugging Face's own model class."""
    from datasets import Dataset
    from sae_lens.cache_activations_runner import CacheActivationsRunner
    from sae_lens.config import CacheActivationsRunnerConfig

    folder = Path(job["folder"]) / "saelens"

    def make(ids_ST: Tensor) -> Any:
        config = CacheActivationsRunnerConfig(
            dataset_path="none",
            model_name=job["model"],
            model_class_name="AutoModelForCausalLM",
            model_batch_size=job["batch"],
            hook_name=job["module_path"],
            d_in=job["d_in"],
            training_tokens=ids_ST.numel(),
            context_size=ids_ST.shape[1],
            new_cached_activations_path=str(folder),
            shuffle=False,
            streaming=False,
            prepend_bos=False,
            device="cpu",
            buffer_size_gb=ids_ST.numel() * job["d_in"] * 4 * 1.01 / 1e9,  # one shard
            model_from_pretrained_kwargs={"dtype": "float32"},
        )
        return CacheActivationsRunner(config, Dataset.from_dict({"input_ids": ids_ST.tolist()}))

    runners: dict[int, Any] = {}

    def runner_of(ids_ST: Tensor) -> Any:
        if len(ids_ST) not in runners:
            runners[len(ids_ST)] = make(ids_ST)
        return runners[len(ids_ST)]

    @torch.no_grad()
    def to_memory(ids_ST: Tensor) -> Tensor:
        store = runner_of(ids_ST).activations_store
        return torch.cat([store.get_raw_llm_batch()[0] for _ in range(len(ids_ST) // job["batch"])])

    def to_disk(ids_ST: Tensor) -> Tensor:
        shutil.rmtree(folder, ignore_errors=True)
        saved = runner_of(ids_ST).run()
        if len(ids_ST) > job["batch"]:
            return torch.empty(0)
        rows = [np.asarray(row[job["module_path"]], dtype=np.float32) for row in saved]
        return torch.from_numpy(np.concatenate(rows))

    return {"memory": to_memory, "disk": to_disk}


def sparsify_ways(job: dict[str, Any]) -> dict[str, Way]:
    """The forward of sparsify's trainer: the whole base model with a hook for the batch. It keeps nothing on disk.

    Its trainer trains inside the hook; here the hook copies the rows, as that one does first.
    """
    import sparsify
    from transformers import AutoModel

    assert sparsify.SparseCoder is not None
    model = AutoModel.from_pretrained(job["model"], dtype=torch.float32)
    model.requires_grad_(False)
    module = model.get_submodule(job["module_path"].removeprefix("model."))

    def harvest(ids_ST: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def hook(_: Any, __: Any, outputs: Any) -> None:
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            kept.append(outputs.flatten(0, 1).detach().clone())

        for batch_ST in ids_ST.split(job["batch"]):
            handle = module.register_forward_hook(hook)
            try:
                model(batch_ST)
            finally:
                handle.remove()
        return torch.cat(kept)

    return {"memory": harvest}


WAYS = {"cosae": cosae_ways, "SAELens": saelens_ways, "sparsify": sparsify_ways}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # standard output for answers alone
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(job["threads"])
    ids_ST = torch.from_numpy(np.load(job["ids"]))
    ways = WAYS[job["library"]](job)
    for line in sys.stdin:
        word, way = line.split()
        answer: dict[str, float] = {}
        if word == "first":
            np.save(Path(job["folder"]) / f"{way}.npy", ways[way](ids_ST[: job["batch"]]).numpy())
        else:
            wall, cpu = time.perf_counter(), time.process_time()
            ways[way](ids_ST)
            answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
