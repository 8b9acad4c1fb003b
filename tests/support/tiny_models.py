"""Small random models of six families, and sequences for them."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from cosae.types import Sequences

D, BLOCKS, VOCABULARY = 32, 4, 97
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BLOCK_PATHS = {
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gemma2": "model.layers",
    "mistral": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
}


def make_config(family: str) -> Any:
    """A configuration of the family: 4 blocks of width 32, 4 heads, 97 tokens, context 64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dependency's deprecations on import are not ours
        import transformers
    if family == "gpt2":
        return transformers.GPT2Config(
            n_embd=D, n_layer=BLOCKS, n_head=4, vocab_size=VOCABULARY, n_positions=64, **SPECIAL
        )
    sizes = {
        "hidden_size": D,
        "intermediate_size": 64,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    if family == "opt":
        return transformers.OPTConfig(**sizes, word_embed_proj_dim=D, ffn_dim=64, **SPECIAL)
    if family == "mamba":
        return transformers.MambaConfig(hidden_size=D, num_hidden_layers=BLOCKS, vocab_size=VOCABULARY, **SPECIAL)
    if family == "gpt_neox":
        return transformers.GPTNeoXConfig(**sizes, **SPECIAL)
    name = {"llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma2", "mistral": "Mistral"}[family]
    window = {"sliding_window": 4} if family in ("gemma2", "mistral") else {}
    head = {} if family == "llama" else {"head_dim": 8}
    return getattr(transformers, f"{name}Config")(**sizes, num_key_value_heads=2, **head, **window, **SPECIAL)


def make_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in eval mode, with weights large enough that every block changes the stream."""
    import transformers

    config = make_config(family)
    torch.manual_seed(seed)
    return with_large_weights(transformers.AutoModelForCausalLM.from_config(config)).to(dtype)


@torch.no_grad()
def with_large_weights(model: Any) -> Any:
    """The model, frozen in eval mode, its weights drawn so large that every block changes the stream."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def make_sequences(
    n_sequences: int = 3,
    n_positions: int = 12,
    lengths: list[int] | None = None,
    padding: str = "right",
    seed: int = 0,
    first_doc: int = 0,
) -> Sequences:
    """One document a row: BOS, random ids, padding on one side where the row is longer."""
    lengths = [n_positions] * n_sequences if lengths is None else lengths
    generator = torch.Generator().manual_seed(seed)
    ids_ST = torch.zeros(len(lengths), n_positions, dtype=torch.int64)
    doc_ST = torch.full((len(lengths), n_positions), -1, dtype=torch.int32)
    index_ST = doc_ST.clone()
    mask_ST = torch.zeros(len(lengths), n_positions, dtype=torch.bool)
    for row, length in enumerate(lengths):
        start = 0 if padding == "right" else n_positions - length
        where = slice(start, start + length)
        ids_ST[row, where] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        ids_ST[row, start] = 1
        doc_ST[row, where] = first_doc + row
        index_ST[row, where] = torch.arange(length, dtype=torch.int32)
        mask_ST[row, where] = True
    names = tuple(f"doc {i}" for i in range(first_doc + len(lengths)))
    return Sequences(ids_ST, doc_ST, index_ST, mask_ST, ids_ST < 3, names)
