"""A GGUF file of a Llama with two blocks and its tokenizer: Q8_0 matrices, float32 norms."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

D, INNER, HEADS, BLOCKS = 32, 64, 4, 2
TOKENS = ["<s>", "</s>", *map(chr, range(33, 127)), "Ġ", "Ċ", "th", "an"]


def write_gguf(path: Path, seed: int = 0) -> Path:
    drawn = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["t h", "a n"])
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = drawn.standard_normal((rows, columns), dtype=np.float32) / columns**0.5
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, Kind.Q8_0), raw_dtype=Kind.Q8_0)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", 1 + drawn.standard_normal(D).astype(np.float32) / 10)

    matrix("token_embd", len(TOKENS), D)
    norm("output_norm")
    for block in range(BLOCKS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{block}.{name}", D, D)
        matrix(f"blk.{block}.ffn_gate", INNER, D)
        matrix(f"blk.{block}.ffn_up", INNER, D)
        matrix(f"blk.{block}.ffn_down", D, INNER)
        norm(f"blk.{block}.attn_norm")
        norm(f"blk.{block}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
