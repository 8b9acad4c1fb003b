"""`cosae steer`: a model's text with and without a change to features of an SAE.

Only the change acts: what the SAE misses is put back, so that without a change the text is the model's own. Tokens that
the SAE's training left out are not changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosae.errors import CosaeError, CosaeWarning
from cosae.models.intervene import edits
from cosae.models.intervene.splice import spliced
from cosae.models.intervene.window import own_filter
from cosae.models.sites import resolve_site
from cosae.recipe import DataConfig
from cosae.run.dataset.corpus import adds_bos, pad_id
from cosae.run.dataset.model import open_model
from cosae.run.identity import read_elsewhere
from cosae.run.requests import Place, SteerOptions
from cosae.run.saes import read_with_model
from cosae.sae.model import SAE
from cosae.text.pylib import Document
from cosae.text.tokenization import tokenize_documents


@dataclass(frozen=True)
class Steered:
    """The prompt with its continuation, by the model alone and with the change; ids as they were generated."""

    what: str
    without: str
    changed: str
    without_T: tuple[int, ...]
    changed_T: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        same = ["The change made no difference."] if self.without_T == self.changed_T else []
        return "\n".join([self.what, *self.notes, "", "without:", self.without, "", "with:", self.changed, *same])


@dataclass(frozen=True)
class Steerable:
    """An SAE with its model. elsewhere: a warning where the SAE was trained on another model or site."""

    sae: SAE
    data: DataConfig
    model: Any
    tokenizer: Any
    elsewhere: str | None = None


def steer(
    path: Path, prompt: str, place: Place, options: SteerOptions, log: Callable[[str], None] = lambda _: None
) -> Steered:
    """Generate twice from a prompt. Raises CosaeError for what cannot be read, for a feature that is not there, and for
    a prompt that is empty or too long."""
    options.check()
    sae, data = read_with_model(path, place)
    edits.check_edits(edit_of(options), sae.d_sae, data.site)
    log("opening the model")
    model, tokenizer = open_model(data, place.device)
    elsewhere = read_elsewhere(sae.metadata, data.model, resolve_site(model, data.site), model)
    return continued(Steerable(sae, data, model, tokenizer, elsewhere), prompt, options, place.seed)


def continued(
    parts: Steerable, prompt: str, options: SteerOptions, seed: int, stopped: Callable[[], bool] = lambda: False
) -> Steered:
    """Generate twice from a prompt with what is open already; no further token once it is `stopped`.

    Raises CosaeError as `steer` does.
    """
    sae, data, model, tokenizer = parts.sae, parts.data, parts.model, parts.tokenizer
    edit = edit_of(options)
    edits.check_edits(edit, sae.d_sae, data.site)
    read = tokenize_documents([Document("prompt", prompt)], tokenizer, add_bos=adds_bos(data, tokenizer))
    ids_T = next((one.ids_T for one in read), None)
    if ids_T is None or not len(ids_T):
        raise CosaeError("the prompt has no token: give some text to go on from.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(ids_T) + options.new_tokens > limit:
        raise CosaeError(
            f"prompt and new tokens must fit in {limit} tokens, the model's own context. Got {len(ids_T)} and "
            f"{options.new_tokens}: shorten the prompt, or give fewer --new-tokens."
        )
    ids_ST = torch.from_numpy(ids_T).long()[None].to(model.device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", CosaeWarning)
        where = data.site if data.target is None else (data.site, data.target)
        splice = spliced(model, {where: sae}, edits=edit, error_term=True, keep="none")
        without = generate(model, tokenizer, ids_ST, options, seed, stopped)
        with splice:
            changed = generate(model, tokenizer, ids_ST, options, seed, stopped)
    ours = [str(one.message) for one in said if issubclass(one.category, CosaeWarning)]
    notes = tuple(dict.fromkeys([*([f"warning: {parts.elsewhere}"] if parts.elsewhere else []), *ours]))
    for one in said:
        if not issubclass(one.category, CosaeWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    before, after = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (without, changed))
    fitted = own_filter(sae.metadata)
    left_out = "nothing" if fitted is None else fitted.policy.left_out
    what = f"{edit} at {data.site} of {data.model}, at all tokens{'' if left_out == 'nothing' else f' but {left_out}'}"
    return Steered(what, before, after, tuple(without.tolist()), tuple(changed.tolist()), notes)


def edit_of(options: SteerOptions) -> edits.Edit:
    """The change that was asked for."""
    if options.ablate:
        return edits.ablate(options.feature)
    if options.set is not None:
        return edits.set_to(options.feature, options.set)
    if options.scale is not None:
        return edits.scale(options.feature, options.scale)
    return edits.steer(options.feature, options.add or 0.0)


def generate(
    model: Any, tokenizer: Any, ids_ST: Tensor, options: SteerOptions, seed: int, stopped: Callable[[], bool]
) -> Tensor:
    """(T,) prompt and new tokens; the process' own generators are left as they were."""
    from transformers import GenerationConfig

    def enough(ids_ST: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids_ST),), stopped(), dtype=torch.bool, device=ids_ST.device)

    drawn: dict[str, Any] = {"do_sample": True, "temperature": options.temperature} if options.temperature else {}
    ends = model.generation_config.eos_token_id
    fixed = {"max_new_tokens": options.new_tokens, "pad_token_id": pad_id(tokenizer), "eos_token_id": ends}
    config = GenerationConfig(**fixed, **drawn)  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        asked = {"attention_mask": torch.ones_like(ids_ST), "generation_config": config}
        found: Tensor = model.generate(ids_ST, **asked, stopping_criteria=[enough])
    return found[0].cpu()
