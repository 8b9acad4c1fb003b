"""Tokens → activations at one or many sites of a frozen Hugging Face model.

In: a model and `Sequences`. Out: `Activations` per site, one row per real token (or chosen place), padding dropped, in
the order of the sequences. Hooks sit on the asked modules for one forward pass of the model's body (the head is never
run), and the pass is cut short by a private exception as soon as the last site has been read.

Captured residuals equal the model's own `output_hidden_states` to the bit, with one exception that is not
ours: its last entry has the final norm applied, `resid_post` of the last block has not. Documents packed into
one sequence attend to one another, as they do wherever sequences are packed without a block mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError, NotFiniteError, check_choice, check_least
from cosae.models.hooks import positions, read_sites
from cosae.models.parts import context_of, vocabulary_of
from cosae.models.sites import resolve_site
from cosae.types import Activations, Sequences, Site

STORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def capture(
    model: nn.Module,
    sequences: Sequences,
    sites: str | Site | Sequence[str | Site],
    batch_sequences: int = 8,
    store_dtype: torch.dtype = torch.float32,
    store_device: str = "cpu",
    allow_non_finite: bool = False,
    on_rows: Callable[[int], None] = lambda n: None,
) -> dict[str, Activations]:
    """Activations of every real token of `sequences`, by site, all sites from the same forward passes.

    model            any model of transformers (or a part of one) in eval mode
    sequences        (S, T) token sequences; padding may be left, right or anywhere
    sites            names for `resolve_site`; the result's keys are the names as given, or a `Site`'s own
    batch_sequences  sequences per forward pass; it may change the last bits, as any batching does
    store_dtype      float32, bfloat16 or float16 for `x_ND`; `norm_N` is fp32, from before that rounding
    store_device     where the activations are kept
    allow_non_finite leave rows that are not finite to the caller (cosae.activations.monitor)
    on_rows          gets the number of tokens after each forward pass

    `position_N` counts real tokens from 0, and is the position the model was told. The tensors are ordinary ones,
    usable in autograd even when the caller is under `torch.inference_mode`. Hooks are removed whatever happens.

    Raises `CosaeError` for an unknown site, a model in training mode, no tokens, a token id outside the
    model's vocabulary, sequences longer than the model's context, an unsupported `store_dtype`, activations
    that are not finite (naming site, sequence and position), and a site that the forward pass never reaches.
    """
    asked = (sites,) if isinstance(sites, str | Site) else tuple(sites)
    if not asked:
        raise CosaeError("No site was given to capture; name at least one, such as 'resid_post.3'.")
    by_name = {site.name if isinstance(site, Site) else site: resolve_site(model, site) for site in asked}
    check_request(model, sequences, batch_sequences, store_dtype)
    # Whatever the caller's mode: inference tensors cannot be trained on afterwards.
    with torch.inference_mode(False):
        parts: dict[Site, list[Activations]] = {place: [] for site in by_name.values() for place in site.places}
        for start in range(0, len(sequences), batch_sequences):
            batch = sequences[start : start + batch_sequences]
            if not batch.n_rows:
                continue
            found = read_sites(model, batch, list(parts), store_dtype, store_device)
            for site, (x_ND, norm_N) in found.items():
                part = _annotate(x_ND, norm_N, batch)
                if not allow_non_finite:
                    _check_finite(part, batch, site, store_dtype)
                parts[site].append(part)
            on_rows(batch.n_rows)
        return {name: _join([Activations.cat(parts[p]) for p in site.places]) for name, site in by_name.items()}


def _join(places: list[Activations]) -> Activations:
    """The same tokens at several sites: vectors one behind the other, and the lengths of those."""
    if len(places) == 1:
        return places[0]
    norm_N = torch.stack([one.norm_N for one in places]).square().sum(0).sqrt()
    return replace(places[0], x_ND=torch.cat([one.x_ND for one in places], dim=-1), norm_N=norm_N)


def capture_pair(
    model: nn.Module, sequences: Sequences, site: Site, target: Site | None = None, **options: Any
) -> Activations:
    """Activations of one site, and beside them, row by row of the same passes, those of a target. Options of `capture`.

    Raises CosaeError as `capture` does, and for a target that is the site.
    """
    if target is None:
        return capture(model, sequences, site, **options)[site.name]
    if target == site:
        raise CosaeError(f"the target must be another site than {site.name}, which an SAE reconstructs without one.")
    found = capture(model, sequences, (site, target), **options)
    return replace(found[site.name], y_ND=found[target.name].x_ND)


def check_request(model: nn.Module, sequences: Sequences, batch_sequences: int, store_dtype: torch.dtype) -> None:
    """Raises CosaeError for what `capture` would refuse before a forward pass."""
    if model.training:
        raise CosaeError("The model is in training mode, where dropout is on; call model.eval() first.")
    check_least("batch_sequences", batch_sequences, 1)
    check_choice("store_dtype", store_dtype, STORE_DTYPES)
    real = sequences.ids_ST[sequences.mask_ST]
    if real.numel() == 0 or not sequences.n_rows:
        raise CosaeError("There are no tokens to capture: the corpus is empty.")
    if sequences.inputs is not None:
        return
    n_vocabulary = vocabulary_of(model)
    lowest, highest = int(real.min()), int(real.max())
    if lowest < 0 or highest >= n_vocabulary:
        worst = lowest if lowest < 0 else highest
        raise CosaeError(
            f"Token id {worst} is outside the model's vocabulary of {n_vocabulary}; "
            "use the tokenizer that belongs to the model."
        )
    longest = int(sequences.mask_ST.sum(dim=1).max())
    context = context_of(model)
    if context is not None and longest > context:
        raise CosaeError(
            f"Sequences have up to {longest} tokens, but the model's context is {context}; cut them shorter."
        )


def _annotate(x_ND: Tensor, norm_N: Tensor, batch: Sequences) -> Activations:
    """The rows with where each came from."""
    rows_ST, device = batch.rows_ST, x_ND.device
    if batch.pooled:  # a row is of no token: only its document is known
        bare = Activations.bare(x_ND, norm_N)
        first_S1 = rows_ST.int().argmax(1, keepdim=True)
        doc_N = batch.doc_ST.gather(1, first_S1)[:, 0][rows_ST.any(1)]
        return replace(bare, doc_N=doc_N.to(device, torch.int32))
    return Activations(
        x_ND=x_ND,
        norm_N=norm_N,
        token_N=batch.ids_ST[rows_ST].to(device, torch.int32),
        doc_N=batch.doc_ST[rows_ST].to(device, torch.int32),
        position_N=positions(batch.mask_ST)[rows_ST].to(device, torch.int32),
        index_N=batch.index_ST[rows_ST].to(device, torch.int32),
        special_N=batch.special_ST[rows_ST].to(device),
    )


def _check_finite(part: Activations, batch: Sequences, site: Site, store_dtype: torch.dtype) -> None:
    bad_N = ~part.norm_N.isfinite()
    if store_dtype == torch.float16:  # its largest value is 65504, which attention sinks exceed
        bad_N |= ~part.x_ND.isfinite().all(dim=-1)
    if not bool(bad_N.any()):
        return
    row = int(bad_N.nonzero()[0, 0])
    doc = int(part.doc_N[row])
    name = name_in(batch, doc)
    raise NotFiniteError(
        f"Activations at {site.name} are not finite, first in document {doc}{f' ({name})' if name else ''}, position "
        f"{int(part.position_N[row])}, stored as {str(store_dtype).removeprefix('torch.')} ({int(bad_N.sum())} such "
        "tokens in the batch); run and store the model in bfloat16 or float32."
    )


def name_in(sequences: Sequences, doc: int) -> str | None:
    """The document's name, None where the sequences hold none."""
    place = doc - sequences.first_doc
    return sequences.doc_names[place] if 0 <= place < len(sequences.doc_names) else None
