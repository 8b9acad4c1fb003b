"""SAEs put into a Hugging Face causal model, for as long as a `with` block lasts.

While the block is open every forward pass (inside `generate` too) runs on x′ instead of x at those sites, and the run
holds the features of each token. What x′ is: cosae.models.intervene.replacement. `hook` is the same as a plain function
x → x′, for nnsight, TransformerLens and hooks of one's own.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cosae.activations.filter import Filter
from cosae.errors import CosaeError, CosaeWarning, check_choice
from cosae.models.intervene.edits import Edit
from cosae.models.intervene.hooks import Intervention, Rule
from cosae.models.intervene.replacement import Replaced, Replacement, SplicedSAE, Transcoding
from cosae.models.intervene.window import Policy, Window
from cosae.models.parts import text_config
from cosae.models.sites import resolve_site
from cosae.shown import Shown
from cosae.types import Codes, Site

KEEP = ("latest", "history", "none")

Key = str | Site | tuple[str | Site, str | Site]
"""Of an SAE: its site; of a transcoder its target, or (input, target)."""
Edits = Edit | Sequence[Edit] | Mapping[str | Site, Edit | Sequence[Edit]]


@dataclass(frozen=True)
class Step:
    """One forward pass: its tokens, and by site the codes of what came in and those that were decoded.

    Codes have shape (S, T); padding and tokens the SAE does not stand in for have none. `edited` is `codes` where
    nothing was edited.
    """

    window: Window
    codes: dict[str, Codes] = field(default_factory=dict)
    edited: dict[str, Codes] = field(default_factory=dict)


class Spliced(Shown, Intervention):
    """An open (or not yet open) splice; made by `spliced`.

    codes, edited  by site: features of the latest pass, before and after the edits
    history        with keep="history": one Step for each pass since the block was entered, in order
    """

    def __init__(
        self,
        model: nn.Module,
        replacements: Mapping[str, tuple[Site, Replacement]],
        keep: str,
        on_step: Callable[[Step], None] | None,
        inputs: Mapping[str, Site],
    ) -> None:
        super().__init__(model, self._rules(replacements, inputs), self._start, self._finish)
        self.history: list[Step] = []
        self._keep, self._on_step = keep, on_step
        self._replacements = {name: replacement for name, (_, replacement) in replacements.items()}
        self._step: Step | None = None

    def __enter__(self) -> Spliced:
        super().__enter__()
        self.history, self._step = [], None
        return self

    @property
    def codes(self) -> Mapping[str, Codes]:
        """By site, the features of the latest pass as they came in. Raises CosaeError before the first pass."""
        return self._latest().codes

    @property
    def edited(self) -> Mapping[str, Codes]:
        """By site, the features of the latest pass after the edits. Raises CosaeError before the first pass."""
        return self._latest().edited

    def joined(self, site: str, edited: bool = False) -> Codes:
        """Codes (S, T of all passes) of the history at one site: a prompt and what was generated after it, say.

        Raises CosaeError without a history, and where passes had different numbers of sequences.
        """
        if not self.history or self._keep != "history":
            raise CosaeError('there is no history to join: open the splice with keep="history" and run the model.')
        if site not in self.history[0].codes:
            raise CosaeError(f"no SAE was spliced in at {site!r}: choose from {', '.join(self.history[0].codes)}.")
        return _join([step.edited[site] if edited else step.codes[site] for step in self.history])

    def _summary(self) -> dict[str, object]:
        sites = {name: replacement.describe() for name, replacement in self._replacements.items()}
        return {"model": type(self.model).__name__, **sites, "open": self.is_open, "keep": self._keep}

    def _latest(self) -> Step:
        if self._step is None:
            raise CosaeError("there are no codes yet: run the model inside the with block first.")
        if self._keep == "none":
            raise CosaeError('this splice keeps no codes: open it with keep="latest" or "history".')
        return self._step

    def _rules(
        self, replacements: Mapping[str, tuple[Site, Replacement]], inputs: Mapping[str, Site]
    ) -> dict[Site, Rule]:
        """What happens at each site: SAEs stand in for it, then transcoders that read it note it."""
        acting: dict[Site, list[Rule]] = {}
        noting: list[tuple[Site, Rule]] = []
        for name, (site, replacement) in replacements.items():
            use = partial(self._keep_codes, name)
            if name in inputs:
                pair = Transcoding(replacement, use)
                noting.append((inputs[name], pair.note))
                acting.setdefault(site, []).append(pair.replace)
            else:
                acting.setdefault(site, []).append(lambda x, w, r=replacement, use=use: use(r(x, w)))  # type: ignore[misc]
        for site, rule in noting:
            acting.setdefault(site, []).append(rule)
        return {site: _in_turn(rules) for site, rules in acting.items()}

    def _keep_codes(self, name: str, found: Replaced) -> Tensor:
        if self._keep != "none" and self._step is not None and found.codes is not None and found.edited is not None:
            self._step.codes[name], self._step.edited[name] = found.codes, found.edited
        return found.x

    def _start(self, window: Window) -> None:
        self._step = Step(window)

    def _finish(self, window: Window) -> None:
        assert self._step is not None
        if self._keep == "history":
            self.history.append(self._step)
        if self._on_step is not None:
            self._on_step(self._step)


def spliced(
    model: nn.Module,
    saes: Mapping[Any, SplicedSAE],
    *,
    error_term: bool = False,
    edits: Edits = (),
    tokens: Policy | None = None,
    keep: str = "latest",
    on_step: Callable[[Step], None] | None = None,
    grad: bool = False,
    special_ids: Sequence[int] | None = None,
) -> Spliced:
    """`with spliced(model, {"resid_post.3": sae}) as run:` the model runs on the SAE's reconstruction there.

    model        a transformers causal language model, or its body
    saes         SAE by site: short name, module path (its output), either followed by ":input" (what goes into that
                 module), or a Site. A transcoder stands in for its target: the site is the target's, or a pair (input,
                 target); without a pair its file says where its input is read
    error_term   put back what each SAE misses: without edits the outputs are the model's own, to the bit
    edits        from cosae.models.intervene.edits: a list for the only site, or a mapping from sites to lists
    tokens       tokens the SAEs stand in for; all others pass as they are, padding always. None: what the filter each
                 SAE was trained with keeps, by the threshold of its training, and every token (with a warning) for an
                 SAE that does not say; "filter": the same, and no SAE without one; "sinks_out": no position 0, special
                 ids or norms at or above its factor (10) times its median; "all", with a warning where training left
                 tokens out; a Filter; an (S, T) boolean tensor over the padded columns; or a function
                 Activations → (N,) bool
    keep         "latest": `run.codes`; "history": `run.history` too, every pass of `generate`; "none": encode only
                 where an edit or a reconstruction needs it
    on_step      called with each pass's Step when it ends
    grad         let gradients through the SAEs (codes are then differentiable); the error term is a constant
    special_ids  what counts as special for filters and sinks; None: the model's own bos, eos and pad ids

    Nothing of the model changes but for its hooks, and those are gone after the block, whatever ended it. Raises
    CosaeError at once for an unknown site, one named twice, a width that does not fit, an SAE without a threshold, an
    edit of a feature or site that is not there; and in a pass for shapes or widths that only show then.
    """
    check_choice("keep", keep, KEEP)
    if not isinstance(saes, Mapping) or not saes:
        raise CosaeError("spliced needs at least one SAE by site, as in {'resid_post.3': sae}.")
    ids = special_ids_of(model) if special_ids is None else tuple(special_ids)
    named = {_name(key): sae for key, sae in saes.items()}
    sites = {_name(key): resolve_site(model, key[1] if isinstance(key, tuple) else key) for key in saes}
    inputs = {_name(key): resolve_site(model, _input_of(key, sae)) for key, sae in saes.items() if transcodes(sae)}
    _check_sites(model, sites, named, inputs)
    by_site = _edits_by_site(edits, tuple(sites))
    shared: dict[str, Any] = {"error_term": error_term, "tokens": tokens, "grad": grad, "special_ids": ids}
    shared["read"] = keep != "none"
    replacements = {
        name: (sites[name], Replacement(sae, edits=by_site.get(name, ()), name=name, **shared))
        for name, sae in named.items()
    }
    _check_filter(tokens, named, error_term and not any(by_site.values()))
    return Spliced(model, replacements, keep, on_step, inputs)


def hook(
    sae: SplicedSAE,
    *,
    error_term: bool = False,
    edits: Edit | Sequence[Edit] = (),
    tokens: Policy | None = None,
    special_ids: Sequence[int] = (),
) -> Callable[..., Tensor]:
    """A function x → x′ to hang wherever a library lets functions change tensors.

    It takes x (S, T, D) and, by name, mask_ST (S, T) bool, the real tokens, position_ST (S, T), how many come before
    each, and ids_ST. Without a mask every token is real; without positions they count from the first column, and a
    single column, which may be a step of generation, is refused where it matters at which position it stands. What
    else a library passes by name (TransformerLens: `hook`) is passed over. Options as in `spliced`. Raises CosaeError
    as `Replacement` does.
    """
    replacement = Replacement(
        sae, error_term=error_term, edits=edits, tokens=tokens, read=False, special_ids=special_ids, name="this hook"
    )
    _check_filter(tokens, {"this hook": sae}, error_term and not edits)
    fitted = replacement.policy if isinstance(replacement.policy, Filter) else None
    by_position = (
        (fitted is not None and fitted.policy.kind == "position_0")
        or (isinstance(tokens, str) and tokens == "sinks_out")
        or isinstance(tokens, Tensor)
        or any(not isinstance(edit.at, str) for edit in replacement.edits)
    )

    def replace_with_sae(
        x: Tensor,
        mask_ST: Tensor | None = None,
        ids_ST: Tensor | None = None,
        position_ST: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if mask_ST is None:
            if not isinstance(x, Tensor) or x.ndim != 3:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise CosaeError(f"x must be a tensor of shape (sequences, tokens, width). Got {got} instead.")
            mask_ST = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        window = Window.of(mask_ST, ids_ST)
        if position_ST is not None:
            window = replace(window, position_ST=position_ST, start=int(position_ST[:, 0].max()))
        elif by_position and mask_ST.shape[1] == 1:
            raise CosaeError("x holds one token of each sequence: give position_ST, how many tokens come before it.")
        return replacement(x, window)[0]

    return replace_with_sae


def _name(key: Key) -> str:
    key = key[1] if isinstance(key, tuple) else key
    return key.name if isinstance(key, Site) else key


def transcodes(sae: object) -> bool:
    """Whether an SAE stands in for another site than it reads."""
    return getattr(sae, "target", None) is not None


def _input_of(key: Key, sae: SplicedSAE) -> str | Site:
    if isinstance(key, tuple):
        return key[0]
    known = getattr(sae, "metadata", {}).get("site")
    if not isinstance(known, str):
        pair = f"{{('mlp_in.3', {_name(key)!r}): sae}}"
        raise CosaeError(f"the transcoder at {_name(key)} does not say where its input is read: give both, {pair}.")
    return known


def _in_turn(rules: Sequence[Rule]) -> Rule:
    def rule(x: Tensor, window: Window) -> Tensor:
        for one in rules:
            x = one(x, window)
        return x

    return rule


def _check_sites(
    model: nn.Module, sites: Mapping[str, Site], saes: Mapping[str, SplicedSAE], inputs: Mapping[str, Site]
) -> None:
    """One SAE for one tensor, and of the width of the stream where the site's is known before any pass."""
    taken: dict[tuple[int, str, int], str] = {}
    for name, site in sites.items():
        module = model.get_submodule(site.module_path)
        other = taken.setdefault((id(module), site.reads, site.call), name)
        if other != name:
            raise CosaeError(f"'{other}' and '{name}' are the same place in this model: give one SAE for it.")
    width = getattr(text_config(model), "hidden_size", None)
    for name, site in sites.items():
        on_stream = site.hook_name.startswith("blocks.") and not site.joined
        d_in = getattr(saes[name], "d_out" if name in inputs else "d_in", width)
        if on_stream and width is not None and d_in != width:
            raise CosaeError(
                f"Site '{name}' has width {width}, but the SAE was made for d_in = {d_in}: choose the site and the "
                "model it was trained on."
            )


def _check_filter(tokens: Policy | None, saes: Mapping[str, SplicedSAE], changes_nothing: bool) -> None:
    """Says what is assumed of SAEs that do not know which tokens they were trained on."""
    unknown = [name for name, sae in saes.items() if "filter" not in getattr(sae, "metadata", {})]
    if tokens is None and unknown and not changes_nothing:
        warnings.warn(
            f"The SAE at {unknown[0]} does not say which tokens it was trained on, so it stands in for all, attention "
            "sinks included. tokens='all' says that it should; a Filter as tokens leaves tokens out.",
            CosaeWarning,
            stacklevel=3,
        )


def _edits_by_site(edits: Edits, names: Sequence[str]) -> dict[str, Edit | Sequence[Edit]]:
    if not isinstance(edits, Mapping):
        if len(names) == 1:
            return {names[0]: edits}
        if isinstance(edits, Edit) or len(edits):
            raise CosaeError(
                f"with SAEs at {', '.join(names)} edits must say at which site, as in {{{names[0]!r}: [...]}}."
            )
        return {}
    by_site = {_name(key): listed for key, listed in edits.items()}
    for name in by_site:
        if name not in names:
            raise CosaeError(f"there are edits for '{name}', but SAEs are spliced in at {', '.join(names)} only.")
    return by_site


def special_ids_of(model: nn.Module) -> tuple[int, ...]:
    """The model's own bos, eos and pad ids."""
    config = getattr(model, "config", None)
    found: list[int] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(found)


def _join(parts: Sequence[Codes]) -> Codes:
    """Codes (S, T₁), (S, T₂) … → (S, T₁ + T₂ …)."""
    n_sequences = parts[0].shape[0]
    if any(part.shape[0] != n_sequences for part in parts):
        raise CosaeError("passes of different numbers of sequences cannot be joined: read run.history one by one.")
    n_tokens = sum(part.shape[1] for part in parts)
    starts = itertools.accumulate((part.shape[1] for part in parts), initial=0)
    moved = []  # flat tokens of each part as flat tokens of the whole
    for part, start in zip(parts, starts, strict=False):
        row_E = torch.div(part.token_E, part.shape[1], rounding_mode="floor")
        moved.append(row_E * n_tokens + part.token_E % part.shape[1] + start)
    token_E = torch.cat(moved)
    feature_E = torch.cat([part.feature_E for part in parts])
    order = torch.argsort(token_E, stable=True)
    value_E = torch.cat([part.value_E for part in parts])[order]
    return Codes.from_entries(token_E[order], feature_E[order], value_E, parts[0].d_sae, (n_sequences, n_tokens))
