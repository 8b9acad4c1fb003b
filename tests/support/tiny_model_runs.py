"""A language model made on disk, texts for it, and a small recipe on both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cosae.recipe import Recipe
from cosae.train.arm import ARMS
from tests.support.tiny_models import make_model

WORDS = ("def return import class self the of in for if not is x y z ( ) : = . , + 0 1 \" '").split()  # noqa: SIM905


def save_tokenizer(folder: Path) -> None:
    """Whole words and punctuation; everything else is one unknown token: as many ids as the tiny models have."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    for code in range(33, 127):
        if len(vocabulary) < 97:
            vocabulary.setdefault(chr(code), len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def write_texts(folder: Path) -> Path:
    """40 files, each of its own mixture of words."""
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        share = torch.rand(len(WORDS), generator=generator) ** 3
        draw = torch.multinomial(share, 150, replacement=True, generator=generator)
        (folder / f"{i:02d}.txt").write_text(" ".join(WORDS[int(j)] for j in draw), encoding="utf-8")
    return folder


def recipe(model: Path, corpus: Path | str, **changes: Any) -> Recipe:
    small = {
        "data.model": str(model),
        "data.site": "resid_post.2",
        "data.corpus": str(corpus),
        "data.context": 32,
        "data.add_bos": True,
        "data.held_out_frac": 0.3,
        "data.chunk_sequences": 16,
        "filter.window_tokens": 512,
        "training.steps": 12,
        "training.batch_tokens": 64,
        "training.buffer_tokens": 512,
        "training.dead_after_tokens": 300,
        "training.log_every": 3,
        "training.checkpoint_every": 5,
        "training.optimizer.warmup_steps": 2,
        "evaluation.held_out_tokens": 600,
        "evaluation.calibration_tokens": 400,
        "evaluation.probe_tokens": 600,
        "evaluation.min_positives": 8,
        "evaluation.resamples": 20,
    }
    arms = (ARMS["standard"], ARMS["cosine"])
    return replace(Recipe(name="tiny"), arms=arms, d_sae=48, k=4).changed({**small, **changes})


def one_arm(model: Path, texts: Path, **changes: Any) -> Recipe:
    """A recipe of one SAE on a tiny llama and texts, both made in these folders."""
    make_model("llama").save_pretrained(model)
    save_tokenizer(model)
    both = recipe(model, write_texts(texts), **changes)
    return replace(both, arms=both.arms[:1])
