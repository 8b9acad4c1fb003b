"""One training step of each peer, as its own trainer takes it. Imported in the peers' environment only.

Every function returns a step: activations (n, d) → None. No feature is dead in any of them, so no auxiliary term runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.shapes import Shape

Step = Callable[[Tensor], None]
FOREVER = 10**9
"""Steps no run reaches: schedules stay at their first value."""


def saelens(shape: Shape) -> Step:
    """sae_lens' SAETrainer.step on a BatchTopK SAE with its defaults (clip 1, Adam)."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=shape.d, d_sae=shape.m, k=float(shape.k)))
    samples = {"total_training_samples": FOREVER * shape.n, "train_batch_size_samples": shape.n}
    config = SAETrainerConfig(**samples, lr_end=3e-5)
    trainer = SAETrainer(config, sae, iter(()))

    def step(x_ND: Tensor) -> None:
        trainer.step(x_ND)
        trainer.n_training_steps += 1

    return step


def dictionary_learning(shape: Shape) -> Step:
    """dictionary_learning's BatchTopKTrainer.update (projection, clip 1, Adam, unit rows)."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    trainer = BatchTopKTrainer(FOREVER, shape.d, shape.m, shape.k, layer=0, lm_name="none", seed=0, device="cpu")
    count = 0

    def step(x_ND: Tensor) -> None:
        nonlocal count
        trainer.update(count, x_ND)
        count += 1

    return step


def sparsify(shape: Shape) -> Step:
    """sparsify's SparseCoder under the steps of its trainer with `optimizer="adam"`: per-token top-k, no clip."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(shape.d, SparseCoderConfig(k=shape.k, num_latents=shape.m))
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4 / (shape.m / 2**14) ** 0.5)
    since_fired_F = torch.zeros(shape.m, dtype=torch.long)

    def step(x_ND: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x_ND)
        fired_F = torch.zeros(shape.m, dtype=torch.bool)
        fired_F[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired_F.add_(len(x_ND))
        since_fired_F[fired_F] = 0

    return step


PEERS: dict[str, Callable[[Shape], Step]] = {
    "sae-lens BatchTopK": saelens,
    "dictionary-learning BatchTopK": dictionary_learning,
    "sparsify TopK, Adam": sparsify,
}
