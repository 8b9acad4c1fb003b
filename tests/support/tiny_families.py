"""Small random models of one family each, the arguments they are called with, and what their blocks return."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from cosae.types import Sequences
from tests.support.tiny_models import SPECIAL, VOCABULARY, make_sequences, with_large_weights

WIDTH, LAYERS = 16, 3
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
_IMAGE = {"image_size": 8, "patch_size": 4}
_TEXT = {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64, **SPECIAL}
_HEADS = {"num_key_value_heads": 1, "head_dim": 8}
_SPEECH = {"encoder_layers": LAYERS, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_SPEECH |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 6, "max_source_positions": 9}
_CONV = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
_CONV |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Family:
    """A family's configuration class and what is special of it.

    stack   the beginning of its sites' short names where it has several stacks of blocks
    own     path of the module that is called for that stack
    reads   text, images or audio
    adds    whether a block's output is its input plus what its two sublayers add
    """

    config: str
    options: dict[str, Any]
    stack: str = ""
    own: str = ""
    reads: str = "text"
    adds: bool = True
    n_positions: int = 12


_PAIR = {"text_config": _TEXT, "vision_config": {**_SIZES, **_IMAGE}}
_IMAGES = {"reads": "images", "n_positions": 5}
FAMILIES = {
    "gemma2": Family("Gemma2Config", {**_TEXT, **_HEADS}),
    "gemma3": Family("Gemma3TextConfig", {**_TEXT, **_HEADS}),
    "mixtral": Family("MixtralConfig", {**_TEXT, **_HEADS, "num_local_experts": 4}),
    "qwen3_moe": Family("Qwen3MoeConfig", {**_TEXT, **_HEADS, **_EXPERTS}),
    "phi": Family("PhiConfig", _TEXT),
    "falcon": Family("FalconConfig", {**_TEXT, "ffn_hidden_size": 24}),
    "opt": Family("OPTConfig", {**_TEXT, "ffn_dim": 24, "word_embed_proj_dim": WIDTH}),
    "mamba": Family("MambaConfig", _TEXT, adds=False),
    "modernbert": Family("ModernBertConfig", {**_TEXT, "cls_token_id": 1, "sep_token_id": 2}),
    "bert": Family("BertConfig", _TEXT, adds=False),
    "roberta": Family("RobertaConfig", {**_TEXT, "pad_token_id": 1}, adds=False),
    "esm": Family("EsmConfig", {**_TEXT, "mask_token_id": 3, "position_embedding_type": "rotary"}),
    "albert": Family("AlbertConfig", {**_TEXT, "embedding_size": 8}, adds=False),
    "t5 encoder": Family("T5Config", {**_TEXT, "d_kv": 8}, "encoder.", "encoder"),
    "t5 decoder": Family("T5Config", {**_TEXT, "d_kv": 8}, "decoder.", adds=False),
    "vit": Family("ViTConfig", {**_SIZES, **_IMAGE}, **_IMAGES),
    "dinov2": Family("Dinov2Config", {**_SIZES, **_IMAGE}, **_IMAGES),
    "dinov3": Family("DINOv3ViTConfig", {**_SIZES, **_IMAGE, "num_register_tokens": 2}, reads="images", n_positions=7),
    "clip vision": Family("CLIPConfig", _PAIR, "vision.", "vision_model", **_IMAGES),
    "clip text": Family("CLIPConfig", _PAIR, "text.", "text_model"),
    "siglip": Family("SiglipConfig", _PAIR, "vision.", "vision_model", reads="images", n_positions=4),
    "whisper": Family("WhisperConfig", {**_SPEECH, **SPECIAL, "d_model": WIDTH, "vocab_size": VOCABULARY,
                      "max_target_positions": 20, "decoder_start_token_id": 1}, "encoder.", "encoder", "audio",
                      n_positions=9),
    "wav2vec2": Family("Wav2Vec2Config", {**_SIZES, **_CONV}, reads="audio", n_positions=19, adds=False),
    "llava text": Family("LlavaConfig", _PAIR, own="model.language_model"),
    "llava vision": Family("LlavaConfig", _PAIR, "vision.", "model.vision_tower", **_IMAGES),
}  # fmt: skip


def make_family(name: str) -> Any:
    """A random model as `load_model` would load it, in eval mode, with weights that change the stream."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dependency's deprecations on import are not ours
        import transformers

        from cosae.models.load import classes_of

    family = FAMILIES[name]
    options = dict(family.options)
    if "T5" in family.config:
        options |= {"d_model": WIDTH, "num_layers": LAYERS, "num_heads": 2, "d_ff": 24}
    if "Llava" in family.config:
        options = {
            "text_config": transformers.LlamaConfig(**_TEXT),
            "vision_config": transformers.CLIPVisionConfig(**_SIZES, **_IMAGE),
        }
    config = getattr(transformers, family.config)(**options)
    torch.manual_seed(0)
    return with_large_weights(classes_of(transformers, config, name)[0].from_config(config))


def family_inputs(name: str, n_sequences: int = 3) -> Sequences:
    """Something for a family to read: random tokens, or random pixels or sound with as many places as it makes of
    them."""
    family = FAMILIES[name]
    if family.reads == "text":
        return make_sequences(n_sequences)
    generator = torch.Generator().manual_seed(0)
    n_places = family.n_positions
    shapes = {"images": ("pixel_values", (3, 8, 8)), "audio": ("input_features", (6, 18))}
    argument, shape = shapes[family.reads] if name != "wav2vec2" else ("input_values", (200,))
    index_ST = torch.arange(n_places, dtype=torch.int32).expand(n_sequences, n_places)
    return Sequences(
        ids_ST=torch.full((n_sequences, n_places), -1),
        doc_ST=torch.arange(n_sequences, dtype=torch.int32)[:, None].expand(n_sequences, n_places),
        index_ST=index_ST,
        mask_ST=torch.ones(n_sequences, n_places, dtype=torch.bool),
        special_ST=torch.zeros(n_sequences, n_places, dtype=torch.bool),
        doc_names=tuple(f"thing {i}" for i in range(n_sequences)),
        inputs={argument: torch.randn(n_sequences, *shape, generator=generator)},
    )
