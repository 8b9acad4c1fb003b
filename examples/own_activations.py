"""Your own vectors (vision, audio, embeddings): write a file, train on it, load the SAE, encode.

python examples/own_activations.py [--steps 200] [--folder FOLDER]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import cosae

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--folder", type=Path, default=None)
arguments = parser.parse_args()
folder = arguments.folder or Path(tempfile.mkdtemp())

# in place of your encoder: 20 000 embeddings of width 48, each a sum of a few of 150 directions
random = np.random.default_rng(0)
directions = random.normal(size=(150, 48)) / np.sqrt(48)
embeddings = (random.random((20_000, 150)) < 0.03) @ directions + 0.05 * random.normal(size=(20_000, 48))
np.save(folder / "embeddings.npy", embeddings.astype(np.float32))

arms = ["standard", "standard,frame=layer_norm,name=layer_norm", "cosine,k=12", "cosine,selector=topk"]
small = {"training__buffer_tokens": 8192, "training__optimizer__warmup_steps": 20}
run = cosae.fit(
    folder / "embeddings.npy", arms, out=folder / "run", d_sae=256, k=6,
    steps=arguments.steps, batch_tokens=512, lr=3e-3, **small,
)  # fmt: skip
for name in run.saes:
    sae = cosae.load(folder / "run" / "arms" / name)  # checked against codes stored with the weights
    codes = sae.encode(torch.from_numpy(embeddings[:1]))
    found = run.evaluation["reconstruction"][name]["sinks_out"]
    print(f"{name:<22} FVE {found['fve']:.3f}  L0 {found['l0']:5.2f}  row 0: {codes.feature_E.tolist()}")
print(f"page: cosae report {folder / 'run'}")
