"""Runs where eai-delphi is installed: delphi's own loader on a cache of ours. Prints one JSON object.

    python delphi_checks.py CACHE MODULE

delphi asks for vllm, faiss, bitsandbytes and sentence_transformers as it is imported; none has a part in loading a
cache, so that empty modules stand in for those that are not installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType
from typing import Any

import torch

HEAVY = ("faiss", "sentence_transformers", "vllm", "bitsandbytes", "sparsify", "flask", "aiofiles", "fire")


class Words:
    """Enough of a tokenizer for delphi's constructors."""

    padding_side = "right"
    pad_token_id = 0

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(f"w{int(i)}" for i in torch.as_tensor(ids).reshape(-1))

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        return [self.decode(i) for i in ids]


def stand_in(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        module = ModuleType(name)

        def attribute(wanted: str) -> Any:
            if wanted.startswith("__"):
                raise AttributeError(wanted)
            return type(wanted, (), {})

        module.__getattr__ = attribute  # type: ignore[method-assign]
        sys.modules[name] = module


def main(cache: str, module: str) -> dict[str, Any]:
    from transformers import PreTrainedModel  # noqa: F401  # looks at what is installed: before the stand-ins

    for name in HEAVY:
        stand_in(name)
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset

    def dataset(**options: Any) -> Any:
        return LatentDataset(
            cache,
            SamplerConfig(n_examples_train=4, n_examples_test=4, n_quantiles=2),
            ConstructorConfig(example_ctx_len=4, min_examples=1, n_non_activating=2),
            tokenizer=Words(),
            **options,
        )

    whole = dataset()
    activations: dict[str, float] = {}
    for buffer in whole.buffers:
        for data in buffer:
            found = data.activation_data
            for (row, position, latent), value in zip(
                found.locations.tolist(), found.activations.tolist(), strict=True
            ):
                assert latent == data.latent.latent_index
                activations[f"{row},{position},{latent}"] = value
    chosen = sorted({int(key.split(",")[2]) for key in activations})[:3]
    selected = dataset(modules=[module], latents={module: torch.tensor(chosen)})
    records = list(selected)
    return {
        "modules": whole.modules,
        "tokens": whole.tokens.tolist(),
        "activations": activations,
        "chosen": chosen,
        "records": [record.latent.latent_index for record in records],
        "examples": [len(record.examples) for record in records],
        "largest": [float(record.max_activation) for record in records],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
