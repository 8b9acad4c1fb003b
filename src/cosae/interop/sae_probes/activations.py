"""Last-token activations of sae-probes' texts, written where that package looks for them.

Enters: a Hugging Face model, its tokenizer and texts. Leaves: one `.pt` tensor (N, d) a data set, at
`{folder}/model_activations_{model_name}/{dataset}_{hook_name}.pt`. With these in place sae-probes runs without
TransformerLens, hub or network (generate_model_activations.py of 0.4.2). Its rules: padding on the right, what is too
long loses its beginning, at most 1024 tokens, and the vector of the last token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cosae.errors import CosaeError
from cosae.interop.sae_probes.datasets import ProbeDataset
from cosae.io.atomic import replaced
from cosae.models.capture import capture
from cosae.text.tokenization import warn_two_bos
from cosae.types import Sequences

MOST_TOKENS = 1024


def write_activations(
    model: nn.Module,
    tokenizer: Any,
    hook_name: str,
    datasets: Iterable[ProbeDataset],
    folder: str | Path,
    *,
    model_name: str,
    max_tokens: int | None = None,
    batch_texts: int = 16,
) -> list[Path]:
    """One file a data set, float32; a file with the right number of rows is left as it is.

    hook_name   TransformerLens style, which sae-probes uses in the file's name
    model_name  the name sae-probes will be told; not read from the model
    max_tokens  default 1024, or the model's context where that is shorter

    Raises CosaeError for what `capture` refuses, and where the folder cannot be written. Files are never half-written.
    """
    written = []
    for dataset in datasets:
        place = Path(folder) / f"model_activations_{model_name}" / f"{dataset.name}_{hook_name}.pt"
        if not _is_there(place, len(dataset.texts)):
            x_ND = last_token_activations(
                model, tokenizer, hook_name, dataset.texts, max_tokens=max_tokens, batch_texts=batch_texts
            )
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with replaced(place) as staged:
                    torch.save(x_ND, staged)
            except OSError as error:
                raise CosaeError(f"{place} cannot be written ({error.strerror}); choose another folder.") from None
        written.append(place)
    return written


def last_token_activations(
    model: nn.Module,
    tokenizer: Any,
    hook_name: str,
    texts: Sequence[str],
    *,
    max_tokens: int | None = None,
    batch_texts: int = 16,
) -> Tensor:
    """(N, d) float32: the activation at the last token of each text, in the order given.

    Raises CosaeError for a text without tokens, and for what `capture` refuses.
    """
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None) or MOST_TOKENS
    ids = _tokenize(tokenizer, texts, min(MOST_TOKENS, context) if max_tokens is None else max_tokens)
    by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # little padding; the order is put back below
    parts = []
    for start in range(0, len(ids), batch_texts):
        batch = _padded([ids[row] for row in by_length[start : start + batch_texts]])
        x_ND = capture(model, batch, hook_name, batch_sequences=batch_texts)[hook_name].x_ND
        parts.append(x_ND[batch.mask_ST.sum(dim=1).cumsum(0) - 1])
    order = torch.empty(len(ids), dtype=torch.int64)
    order[torch.tensor(by_length)] = torch.arange(len(ids))
    return torch.cat(parts)[order]


def _tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    if not texts or max_tokens < 1:
        raise CosaeError(f"there must be texts and room for a token. Got {len(texts)} texts, max_tokens={max_tokens}.")
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "left"
    try:
        ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    finally:
        tokenizer.truncation_side = side
    if empty := [row for row, tokens in enumerate(ids) if not tokens]:
        raise CosaeError(f"every text must have a token. Text {empty[0]} has none: {texts[empty[0]]!r}; drop it.")
    bos = [tokenizer.bos_token_id]
    twice = [tokens[:1] == tokens[1:2] == bos for tokens in ids]  # the tokenizer's, and the text's own
    if any(twice):
        warn_two_bos(tokenizer)
    return [tokens[1:] if both else tokens for tokens, both in zip(ids, twice, strict=True)]


def _padded(ids: list[list[int]]) -> Sequences:
    """Right-padded (S, T) sequences, a document each."""
    ids_ST = pad_sequence([torch.tensor(tokens) for tokens in ids], batch_first=True)
    longest = ids_ST.shape[1]
    mask_ST = torch.arange(longest) < torch.tensor([len(tokens) for tokens in ids])[:, None]
    doc_ST = torch.arange(len(ids), dtype=torch.int32)[:, None].expand(-1, longest)
    index_ST = torch.arange(longest, dtype=torch.int32).expand(len(ids), -1)
    return Sequences(
        ids_ST=ids_ST,
        doc_ST=doc_ST.masked_fill(~mask_ST, -1),
        index_ST=index_ST.masked_fill(~mask_ST, -1),
        mask_ST=mask_ST,
        special_ST=torch.zeros_like(mask_ST),
    )


def _is_there(place: Path, n_rows: int) -> bool:
    try:
        found = torch.load(place, weights_only=True)
    except Exception:  # absent, or whatever is wrong with it: it is written
        return False
    return isinstance(found, Tensor) and found.ndim == 2 and len(found) == n_rows
