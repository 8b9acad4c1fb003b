"""x → x′ at one site: an SAE's reconstruction, with or without its error, with edits to its features.

    reconstruction       x′ = decode(f′) + s
    with the error term  x′ = x + decode(f′) − decode(f) + s       the same as decode(f′) + (x − x̂) + s

A transcoder's codes are of its input x, and it stands in for y at its target: read y for x on the right, x in f.

f = encode(x), f′ the edited codes, s what steering adds. Where no code is edited the second is x to the bit. Tokens
that the policy leaves out, padding and all-zero rows are x in both. The SAE computes in its own precision, at least
fp32; x′ has the dtype and the device of x.

With gradients (`grad=True`) the error term is a constant: what reaches earlier layers goes through the codes, and
∂loss/∂f is that of decode(f′).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cosae.activations.filter import Filter
from cosae.errors import CosaeError, CosaeWarning
from cosae.models.intervene.edits import Edit, check_edits, edit_codes, steering
from cosae.models.intervene.window import Policy, Window, covered, own_filter, resolve_policy
from cosae.types import Codes, at_least_fp32


class SplicedSAE(Protocol):
    """What is asked of an SAE that stands in for a tensor; `cosae.SAE` is one."""

    @property
    def d_in(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def W_dec(self) -> Tensor: ...
    def encode(self, x: Tensor, /) -> Codes: ...
    def decode(self, codes: Codes, /) -> Tensor: ...


class Replaced(NamedTuple):
    """What one replacement leaves: x′ as it goes on through the model, and the codes before and after the edits.

    Codes are None where the replacement does not read them and needs none.
    """

    x: Tensor
    codes: Codes | None
    edited: Codes | None


class Replacement:
    """The rule x → x′ of one SAE.

    sae   anything with d_in, d_sae, W_dec, encode and decode
    read  encode even where x′ needs no codes
    name  of the site, for messages; all else as in `cosae.models.intervene.splice.spliced`

    Raises CosaeError for an SAE whose codes depend on the batch (no threshold yet), edits of features it does not
    have, and a policy that it cannot follow.
    """

    def __init__(
        self,
        sae: SplicedSAE,
        *,
        error_term: bool = False,
        edits: Edit | Sequence[Edit] = (),
        tokens: Policy | None = None,
        grad: bool = False,
        read: bool = True,
        special_ids: Sequence[int] = (),
        name: str = "this site",
    ) -> None:
        if not all(hasattr(sae, needed) for needed in ("encode", "decode", "d_in", "d_sae", "W_dec")):
            raise CosaeError(f"An SAE must be spliced in at {name}. Got {type(sae).__name__} instead.")
        if not getattr(sae, "calibrated", True):
            raise CosaeError(
                f"The SAE at {name} has no threshold yet, so its codes would depend on which tokens share a pass: "
                "calibrate it first (cosae.sae.calibrate.calibrate(sae, activations))."
            )
        self.sae = sae
        self.error_term = error_term
        self.edits = check_edits(edits, sae.d_sae, name)
        metadata = getattr(sae, "metadata", {})
        self.tokens = tokens
        self.policy = resolve_policy(tokens, metadata)
        self.grad = grad
        self.special_ids = tuple(special_ids)
        self.name = name
        self._changes_codes = any(edit.kind != "steer" for edit in self.edits)
        # with "all", until a warning was given: what training left out
        self._unseen = own_filter(metadata) if isinstance(tokens, str) and tokens == "all" else None
        if error_term and not self.edits:
            self._unseen = None
        self._encodes = read or not error_term or self._changes_codes

    def __call__(self, x: Tensor, window: Window, y: Tensor | None = None) -> Replaced:
        """x (S, T, D), or (S·T, D) from modules that flatten the batch → x′ of the same shape, dtype and device; with y
        (S, T, d_out), what a transcoder stands in for, y′. Raises CosaeError for another width or shape, and for
        non-finite vectors at tokens the SAE stands in for."""
        self._check(x, window, self.sae.d_in)
        out = x if y is None else y
        self._check(out, window, getattr(self.sae, "d_out", self.sae.d_in))
        window = window.to(x.device)
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            x_ND = at_least_fp32(x.reshape(-1, x.shape[-1]))
            out_ND = x_ND if y is None else at_least_fp32(y.reshape(-1, y.shape[-1]))
            covered_N = covered(self.policy, x_ND, window, self.special_ids)
            if self._unseen is not None:
                self._warn_unseen(x_ND, window, covered_N)
            codes = edited = None
            new_ND = out_ND
            if self._encodes:
                seen_ND = torch.where(covered_N[:, None], x_ND, 0.0)  # rows of zeros encode to nothing
                codes = replace(self.sae.encode(seen_ND), shape=window.shape)
                edited, touched_N = edit_codes(codes, self.edits, window, covered_N)
                new_ND = self._recon(out_ND, codes, edited, covered_N, touched_N)
            added_ND = steering(self.edits, self.sae.W_dec, out_ND, window, covered_N)
            if added_ND is not None:
                new_ND = new_ND + added_ND
            new = out if new_ND is out_ND else new_ND.reshape(out.shape).to(out.dtype)
        return Replaced(new, codes, edited)

    def describe(self) -> list[str]:
        """What stands in for what, in a few words each."""
        policy = self.policy
        if isinstance(policy, Filter):
            tokens = "all" if policy.policy.left_out == "nothing" else f"all but {policy.policy.left_out}"
        elif isinstance(policy, Tensor):
            tokens = f"a mask of shape {tuple(policy.shape)}"
        else:
            tokens = self.tokens if isinstance(self.tokens, str) else "all" if policy == "all" else "a function"
        what = f"{type(self.sae).__name__} of {self.sae.d_sae} features"
        error = ["error term kept"] if self.error_term else []
        return [what, f"tokens: {tokens}", *error, *map(str, self.edits)]

    def _warn_unseen(self, x_ND: Tensor, window: Window, covered_N: Tensor) -> None:
        assert self._unseen is not None
        left_N = covered_N & ~covered(self._unseen, x_ND, window, self.special_ids)
        if not bool(left_N.any()):
            return
        n, self._unseen = int(left_N.sum()), None
        warnings.warn(
            f"With tokens='all' the SAE at {self.name} stands in for tokens that its training left out ({n} in this "
            "pass): what it makes of them is arbitrary. Leave tokens out, and they pass as they are.",
            CosaeWarning,
            stacklevel=2,
        )

    def _recon(self, x_ND: Tensor, codes: Codes, edited: Codes, covered_N: Tensor, touched_N: Tensor) -> Tensor:
        if not self.error_term:
            return torch.where(covered_N[:, None], self._decode(edited, x_ND), x_ND)
        passes = torch.is_grad_enabled() and edited.value_E.requires_grad
        if not passes and not bool(touched_N.any()):
            return x_ND
        new_ND = self._decode(edited, x_ND)
        with torch.no_grad():
            change_ND = new_ND - self._decode(codes, x_ND)
            value_ND = x_ND + torch.where(touched_N[:, None], change_ND, 0.0)
        if not passes:
            return value_ND
        # value_ND in value, new_ND in gradient: v − v is exactly 0
        through_ND = value_ND + (new_ND - new_ND.detach())
        return torch.where(covered_N[:, None], through_ND, x_ND)

    def _decode(self, codes: Codes, like_ND: Tensor) -> Tensor:
        return self.sae.decode(codes).reshape(like_ND.shape).to(like_ND.device, like_ND.dtype)

    def _check(self, x: Any, window: Window, width: int) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise CosaeError(f"Site '{self.name}' gives no vectors but {type(x).__name__}; choose another module.")
        if x.shape[-1] != width:
            raise CosaeError(
                f"Site '{self.name}' has width {x.shape[-1]}, but the SAE was made for d_in = {width}: choose "
                "the site and the model it was trained on."
            )
        n_sequences, n_tokens = window.shape
        if tuple(x.shape[:-1]) not in ((n_sequences, n_tokens), (n_sequences * n_tokens,)):
            raise CosaeError(
                f"Site '{self.name}' gives a tensor of shape {tuple(x.shape)}, not ({n_sequences} sequences, "
                f"{n_tokens} positions, width); choose another module."
            )


class Transcoding:
    """The two rules of a transcoder: one notes the input, one stands in for the target with what it becomes."""

    def __init__(self, replacement: Replacement, use: Callable[[Replaced], Tensor] = lambda found: found.x) -> None:
        self._replacement, self._use = replacement, use
        self._input: Tensor | None = None

    def note(self, x: Tensor, window: Window) -> Tensor:
        """x as it is."""
        self._input = x
        return x

    def replace(self, y: Tensor, window: Window) -> Tensor:
        """y′. Raises CosaeError where no input came before it."""
        x, self._input = self._input, None
        if x is None:
            name = self._replacement.name
            raise CosaeError(f"the transcoder at {name} needs its input before its target: its two sites are swapped.")
        return self._use(self._replacement(x, window, y))
