"""What `cosae capture` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cosae.activations.store.format import ShardShape, store_dtype
from cosae.activations.store.reader import find_stores
from cosae.activations.store.writer import started_request
from cosae.errors import CosaeError, check_least
from cosae.io.legacy import V01_ORDER
from cosae.recipe import DataConfig

MOST_HELD_OUT = 196_608
"""Held-out rows that nobody gave a number: enough for a run's thresholds and evaluation by default."""
SHARD_BYTES = 128 * 2**20
"""A shard that nobody gave a size is about this large."""


@dataclass(frozen=True)
class Capture:
    """What to capture. Raises CosaeError on a value that is not allowed.

    data             model and corpus, as a recipe names them
    sites            one or several; several make one store each, below the folder
    tokens           rows of the train side; fewer where the corpus ends before
    held_out_tokens  rows of the held-out side, at least, which come on top; None: as a capture in the folder was begun,
                     else as many as of the train side, 196 608 at most
    dtype            of the rows on disk: float32, bfloat16, float16 or int8
    shard_tokens     rows per shard; None: about 128 MB
    seed             of the order of documents
    """

    data: DataConfig
    sites: tuple[str, ...]
    tokens: int
    held_out_tokens: int | None = None
    dtype: str = "bfloat16"
    shard_tokens: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("held_out_tokens", 0), ("shard_tokens", 1)):
            check_least(name, getattr(self, name), least)
        if not self.sites:
            raise CosaeError("capture needs at least one site, such as resid_post.5.")
        if self.data.activations is not None or self.data.world is not None or self.data.store is not None:
            raise CosaeError("capture runs a model on a corpus; activations in files need no capture.")
        if self.data.non_finite != "fatal":
            raise CosaeError(
                "data.non_finite must be fatal for a capture, since a store holds the row of every token. Got "
                f"{self.data.non_finite!r} instead: run the model in float32 or bfloat16, or train without a store."
            )
        object.__setattr__(self, "dtype", store_dtype(self.dtype))

    @property
    def n_held_out(self) -> int:
        """Rows of the held-out side."""
        return min(self.tokens, MOST_HELD_OUT) if self.held_out_tokens is None else self.held_out_tokens

    def as_begun(self, out: Path) -> Capture:
        """What goes on with a store in `out`: where it does not say how much is held out, how much was when that was
        begun, and the order of documents of the cosae that began it."""
        begun = next((request for place in find_stores(out) if (request := started_request(place))), None)
        if begun is None:
            return self
        held_out = begun.get("held_out_tokens") if self.held_out_tokens is None else self.held_out_tokens
        order = V01_ORDER if "order" not in begun else self.data.order
        return replace(self, held_out_tokens=held_out, data=replace(self.data, order=order))

    def rows_per_shard(self, d_in: int, label_bytes: int) -> int:
        """`shard_tokens`, or what fills about SHARD_BYTES."""
        return self.shard_tokens or max(1024, SHARD_BYTES // ShardShape(1, d_in, self.dtype, label_bytes).row_bytes())
