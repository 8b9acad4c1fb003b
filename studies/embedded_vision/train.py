"""Trains the small vision transformer of the package on scikit-learn's digits: some minutes on one core.

    python -m studies.embedded_vision.train --out src/cosae/embedded_vision

It sees the training side of the corpus `digits` alone, shifted by up to one pixel; the accuracy on the other side goes
into provenance.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosae.media.digits import classes
from cosae.media.files import read_media

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
}
HELD_OUT = 0.1


def sides() -> dict[str, tuple[Tensor, Tensor]]:
    """Pixels and classes of each side."""
    found: dict[str, list[tuple[Any, int]]] = {"train": [], "held_out": []}
    for medium in read_media("digits", "images", "image"):
        number = int(medium.name.split()[1].rstrip(":"))
        found[medium.side(HELD_OUT)].append((medium.content, int(classes()[number])))
    return {
        side: (torch.from_numpy(np.stack([x for x, _ in listed])), torch.tensor([y for _, y in listed]))
        for side, listed in found.items()
    }


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by −1, 0 or 1 pixels in both directions."""
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    dy, dx = (torch.randint(0, 3, (len(x),), generator=generator) for _ in range(2))
    row = (torch.arange(8) + dy[:, None])[:, None, :, None]
    column = (torch.arange(8) + dx[:, None])[:, None, None, :]
    return padded[torch.arange(len(x))[:, None, None, None], 0, row, column]


def train(steps: int, seed: int = 0) -> tuple[Any, float, int]:
    """The model, its held-out accuracy and how many images it was trained on."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.ViTConfig(**SIZES, num_labels=10, id2label={i: str(i) for i in range(10)})
    model = transformers.ViTForImageClassification(config)
    data = sides()
    x, y = data["train"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (128,), generator=generator)
        logits = model(shifted(x[rows], generator)).logits
        loss = torch.nn.functional.cross_entropy(logits, y[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = model(data["held_out"][0]).logits.argmax(1) == data["held_out"][1]
    return model, float(right.double().mean()), len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    model, accuracy, n = train(options.steps)
    model.config._name_or_path = ""
    model.to(torch.bfloat16).save_pretrained(options.out)
    record = {"steps": options.steps, "seed": 0, "images": n, "held_out_accuracy": accuracy, "corpus": "digits"}
    (options.out / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    main()
