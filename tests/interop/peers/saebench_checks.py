"""Run inside the SAEBench environment: the packages' own functions beside ours. Prints one JSON object.

python saebench_checks.py CHECK        CHECK: probes | model
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path


def probes() -> dict[str, int]:
    """sae-probes' names, texts, labels and splits, all 113 of them, against ours: counts of differences."""
    from sae_probes import DATASETS
    from sae_probes import utils_data as theirs

    from cosae.interop.sae_probes import datasets as ours

    found = ours.datasets()
    wrong = {
        "n": len(found),
        "names": int([one.name for one in found] != DATASETS),
        "texts": 0,
        "labels": 0,
        "splits": 0,
    }
    for name, texts, labels in found:
        table, their_labels = theirs.read_numbered_dataset_df(name), theirs.get_yvals(name)
        wrong["texts"] += table["prompt"].tolist() != texts
        wrong["labels"] += their_labels.tolist() != labels.tolist()
        used, n_train = their_labels[:5000], min(len(their_labels) - 100, 1024)
        for seed in (42, 3):
            split = theirs.get_train_test_indices(used, n_train, len(used) - n_train - 1, seed=seed)
            mine = ours.split(labels, seed=seed)
            wrong["splits"] += any(a.tolist() != b.tolist() for a, b in zip(split, mine, strict=True))
    return wrong


def model() -> dict[str, float]:
    """The embedded model by TransformerLens, under a name of ours, against transformers: largest differences."""
    import torch
    from transformer_lens import HookedTransformer

    from cosae.interop.saebench.evals import known_model
    from cosae.interop.saebench.settings import Job, Settings
    from cosae.models import embedded

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model_name="embedded", model_path=embedded.model_path())
        job = Job(Path(folder), Path(folder), settings)
        with known_model(job), contextlib.redirect_stdout(sys.stderr):
            hooked = HookedTransformer.from_pretrained_no_processing("embedded", device="cpu", dtype=torch.float32)
    plain, tokenizer = embedded.load()
    ids = tokenizer("def area(width, height):\n    return width * height\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits, cache = hooked.run_with_cache(ids)
        found = plain(ids, output_hidden_states=True)
    residual = (cache["blocks.3.hook_resid_post"] - found.hidden_states[4]).abs().max()
    return {"logits": float((logits - found.logits).abs().max()), "resid_post.3": float(residual)}


if __name__ == "__main__":
    print(json.dumps({"probes": probes, "model": model}[sys.argv[1]]()))
