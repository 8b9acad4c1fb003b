"""What a stream looks out for while it reads: values that are not finite, and norms unlike those it began with.

Looking changes nothing that is handed out; the policy `drop` leaves out rows that are not finite, and nothing else.

    non-finite   a row holds NaN or infinity, or its norm does: counted and located, then an error or left out
    norm shift   of the tokens read for one refill, before the filter, a quantile (5, 25, 50, 75 or 95 %) lies beyond a
                 factor SHIFT of the reference's, and the share of tokens below the reference's differs from the
                 quantile's own by more than MARGIN + ERRORS standard errors √(q (1 − q) (1/n + 1/n_reference))

The reference is the first window, or what a source knows of itself (`norm_reference`). Tokens of one document are
alike, so that standard errors of independent tokens are too small: the factor is what keeps a steady stream silent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cosae.activations.sinks import quantiles
from cosae.errors import CosaeError, NotFiniteError, check_choice
from cosae.shown import counted
from cosae.types import Activations

NonFinite = Literal["fatal", "drop"]
MARKS = (0.05, 0.25, 0.5, 0.75, 0.95)
SHIFT = 1.25
MARGIN = 0.02
ERRORS = 6.0
LOCATED = 20  # rows kept by place; all are counted
MAX_EMPTY_CHUNKS = 1000  # so many chunks in a row without one finite token: the model is broken, not a row


@dataclass(frozen=True)
class NormReference:
    """Quantiles MARKS of |x| over `tokens` tokens, before any filter."""

    quantiles: tuple[float, ...]
    tokens: int
    what: str = "the first window"


def check_policy(non_finite: str) -> None:
    """Raises CosaeError for a policy that does not exist."""
    check_choice("non_finite", non_finite, get_args(NonFinite))


class StreamMonitor:
    """Counts and events of one stream.

    non_finite  fatal or drop
    name_of     document index → its name, where the source knows names
    row_of      (chunk, row in it) → row of the file or array that it is, where the source is one

    Events are plain mappings with "kind", numbers, and "text", a sentence; they come when a refill is complete, so
    that a stream restored from a checkpoint gives the same ones in the same places, none twice.
    """

    def __init__(
        self,
        non_finite: str = "fatal",
        name_of: Callable[[int], str | None] | None = None,
        row_of: Callable[[int, int], int] | None = None,
    ) -> None:
        check_policy(non_finite)
        self.non_finite = non_finite
        self._name_of = name_of or (lambda doc: None)
        self._row_of = row_of
        self._n_chunks = 0  # looked at; a chunk that is read again after a resumption is not counted again
        self._empty_chunks = 0
        self._dropped = 0
        self._located: list[dict[str, Any]] = []
        self._new: list[dict[str, Any]] = []  # rows of this refill, located
        self._n_new = 0
        self._norms: list[Tensor] = []
        self._reference: NormReference | None = None
        self._shifted = False
        self._events: list[dict[str, Any]] = []

    def check(self, chunk: Activations, index: int) -> Activations:
        """The chunk's finite rows: the very same object where all are. Raises CosaeError for others under `fatal`."""
        bad_N = _not_finite(chunk)
        fresh = index >= self._n_chunks
        if bad_N is None:
            self._empty_chunks = 0 if fresh else self._empty_chunks
            return chunk
        rows = bad_N.nonzero().flatten()
        if self.non_finite == "fatal":
            first = self._place(chunk, int(rows[0]), index)
            raise NotFiniteError(
                f"activations must be finite. Got {first['what']} at {first['where']} ({len(rows)} such rows in the "
                "chunk) instead; run and store the model in float32 or bfloat16."
            )
        if fresh:
            self._count(chunk, rows, index)
            self._empty_chunks = self._empty_chunks + 1 if len(rows) == len(chunk) else 0
        if self._empty_chunks > MAX_EMPTY_CHUNKS:
            raise CosaeError(
                f"none of {MAX_EMPTY_CHUNKS} chunks in a row held a finite token: the model or the data is broken."
            )
        return chunk[~bad_N]

    def see(self, norm_N: Tensor, index: int) -> None:
        """Take note of the norms of chunk `index`, perturbation on, before the filter."""
        if index >= self._n_chunks:
            self._n_chunks = index + 1
            self._norms.append(norm_N)

    def begin(self, given: NormReference | None = None) -> None:
        """The first window is read: it is the reference from now on, or is held against the one that is given."""
        self._report_dropped()
        norm_N = torch.cat(self._norms)
        self._reference = given or NormReference(quantiles(norm_N, MARKS), len(norm_N))
        self.refilled()

    def refilled(self) -> None:
        """A refill is complete: make its events."""
        self._report_dropped()
        if not self._norms or self._reference is None:
            return
        norm_N, self._norms = torch.cat(self._norms), []
        if len(norm_N) == 0:
            return
        moved = shift(norm_N, self._reference)
        if moved is not None and not self._shifted:
            mark, ratio = moved
            numbers = {"quantile": mark, "ratio": ratio, "tokens": len(norm_N), "chunk": self._n_chunks - 1}
            text = f"norms shifted: the {100 * mark:g} % quantile of the last {len(norm_N)} tokens is {ratio:.3g} × "
            self._events.append({"kind": "norm_shift", **numbers, "text": f"{text}that of {self._reference.what}"})
        elif moved is None and self._shifted:
            back = f"norms are back to those of {self._reference.what}"
            self._events.append({"kind": "norm_shift_over", "chunk": self._n_chunks - 1, "text": back})
        self._shifted = moved is not None

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since it was last asked, in order."""
        events, self._events = self._events, []
        return events

    def metadata(self) -> dict[str, Any]:
        """Policy, tokens dropped, and where the first LOCATED of them were; plain values, for records."""
        return {"policy": self.non_finite, "dropped_tokens": self._dropped, "first": list(self._located)}

    def state(self) -> str:
        """All that is needed to go on: JSON. Taken between refills, when nothing is under way."""
        kept = {"chunks": self._n_chunks, "dropped": self._dropped, "located": self._located, "shifted": self._shifted}
        return json.dumps({**kept, "barren": self._empty_chunks})

    def restore(self, state: str) -> None:
        """Go on where `state` was taken; events of what was read before were given before."""
        kept = json.loads(state)
        self._n_chunks, self._dropped, self._empty_chunks = kept["chunks"], kept["dropped"], kept["barren"]
        self._located, self._shifted = kept["located"], kept["shifted"]
        self._events, self._norms, self._new, self._n_new = [], [], [], 0

    def _count(self, chunk: Activations, rows: Tensor, index: int) -> None:
        self._n_new += len(rows)
        room = LOCATED - len(self._located)
        listed = rows[: max(room, 0 if self._new else 1)].tolist()
        self._new += [self._place(chunk, row, index) for row in listed]

    def _report_dropped(self) -> None:
        if not self._n_new:
            return
        self._dropped += self._n_new
        self._located += [{k: v for k, v in row.items() if k != "where"} for row in self._new]
        del self._located[LOCATED:]
        first, tokens = self._new[0], self._n_new
        numbers = {"tokens": tokens, **{k: v for k, v in first.items() if k not in ("where", "row")}}
        text = f"dropped {counted(tokens, 'token')} not finite, the first ({first['what']}) at {first['where']}"
        self._events.append({"kind": "non_finite", **numbers, "text": text})
        self._new, self._n_new = [], 0

    def _place(self, chunk: Activations, row: int, index: int) -> dict[str, Any]:
        """Where a row is, what is wrong with it, and the place in words."""
        doc, position = int(chunk.doc_N[row]), int(chunk.position_N[row])
        name = self._name_of(doc) if doc >= 0 else None
        known = f"document {doc}" + ("" if name is None else f" ({name})")
        where = f"{known}, position {position}" if doc >= 0 else f"row {row} of chunk {index}"
        place = {"chunk": index, "row": row, "document": doc, "name": name, "position": position}
        if self._row_of is not None:
            place["own_row"] = own_row = self._row_of(index, row)
            where = f"row {own_row} (counted from 0)"
        return {**place, "what": _what(chunk, row), "where": where}


def shift(norm_N: Tensor, reference: NormReference) -> tuple[float, float] | None:
    """(mark, ratio to the reference) of the quantile that moved farthest, None where none moved (above)."""
    found = quantiles(norm_N, MARKS)
    moved = []
    for mark, now, then in zip(MARKS, found, reference.quantiles, strict=True):
        ratio = now / then if then > 0 else float("inf") if now > 0 else 1.0
        below, at_most = float((norm_N < then).double().mean()), float((norm_N <= then).double().mean())
        off = max(below - mark, mark - at_most, 0.0)
        error = (mark * (1 - mark) * (1 / len(norm_N) + 1 / reference.tokens)) ** 0.5
        if max(ratio, 1 / max(ratio, 1e-30)) > SHIFT and off > MARGIN + ERRORS * error:
            moved.append((mark, ratio))
    return max(moved, key=lambda pair: max(pair[1], 1 / max(pair[1], 1e-30)), default=None)


def finite_rows(activations: Activations) -> Activations:
    """The rows whose values and norm are finite: the very same object where all are."""
    bad_N = _not_finite(activations)
    return activations if bad_N is None else activations[~bad_N]


def _not_finite(chunk: Activations) -> Tensor | None:
    """(N,) bool, None where every row is finite. One pass: NaN and infinity survive a sum."""
    fine_N = torch.isfinite(chunk.x_ND.sum(-1, dtype=torch.float32)) & torch.isfinite(chunk.norm_N)
    if chunk.y_ND is not None:
        fine_N &= torch.isfinite(chunk.y_ND.sum(-1, dtype=torch.float32)).to(fine_N.device)
    if bool(fine_N.all()):
        return None
    bad_N = ~torch.isfinite(chunk.x_ND).all(-1) | ~torch.isfinite(chunk.norm_N)  # a finite row's sum may overflow
    if chunk.y_ND is not None:
        bad_N |= ~torch.isfinite(chunk.y_ND).all(-1).to(bad_N.device)
    return bad_N if bool(bad_N.any()) else None


def _what(chunk: Activations, row: int) -> str:
    vectors = [part[row] for part in (chunk.x_ND, chunk.y_ND) if part is not None]
    if any(bool(part.isnan().any()) for part in vectors) or bool(chunk.norm_N[row].isnan()):
        return "NaN"
    return "an infinity" if not all(bool(part.isfinite().all()) for part in vectors) else "a norm beyond float32"
