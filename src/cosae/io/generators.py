"""Random generators: cosae's own, one for every choice, keyed by a seed; and those that a process shares.

Nothing of cosae draws from the shared ones while it trains. They are saved all the same, for models, services and arms
of other people's that do. The two families of keyed streams hash their key differently; what 0.1 drew from each is
drawn again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def generator_state() -> dict[str, Tensor]:
    """States of PyTorch's (CPU and each CUDA device), NumPy's and Python's global generators."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  the generator that others draw from
    assert isinstance(numpy, dict)
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]]),
        "numpy_gauss": torch.tensor(numpy["gauss"], dtype=torch.float64),
        "python": torch.tensor([version, *words, gauss is not None]),
        "python_gauss": torch.tensor(gauss or 0.0, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_generators(state: Mapping[str, Tensor]) -> None:
    """Put back what `generator_state` gave."""
    torch.set_rng_state(state["torch"])
    *key, pos, has_gauss = state["numpy"].tolist()
    gauss = float(state["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), pos, has_gauss, gauss))  # noqa: NPY002
    version, *words, drawn = state["python"].tolist()
    random.setstate((version, tuple(words), float(state["python_gauss"]) if drawn else None))
    devices = [state[f"cuda{i}"] for i in range(len(state)) if f"cuda{i}" in state]
    if devices and torch.cuda.device_count() == len(devices):
        torch.cuda.set_rng_state_all(devices)


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """(n,) int64: the order of one epoch, a permutation whose generator is seeded with (seed, epoch)."""
    return torch.randperm(n, generator=seeded("order", seed, epoch))


def seeded(*key: str | int) -> torch.Generator:
    """A CPU generator of its own for each key; hashed, so that neighbouring seeds and epochs share nothing."""
    return _generator(hashlib.sha256(repr(key).encode()).digest())


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """As `seeded`, of another family: perturbations, synthetic worlds, shuffles, input noise."""
    return _generator(hashlib.blake2b("/".join(map(repr, (seed, *key))).encode(), digest_size=8).digest())


def _generator(digest: bytes) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # 63 bits: seeds are signed
