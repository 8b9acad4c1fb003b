"""What `cosae capture` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from cosae.activations.store.format import ShardShape, store_dtype
from cosae.errors import CosaeError, check_least
from cosae.recipe import DataConfig

SHARD_BYTES = 128 * 2**20
"""A shard that nobody gave a size is about this large."""


@dataclass(frozen=True)
class Capture:
    """What to capture. Raises CosaeError on a value that is not allowed.

    data             model and corpus, as a recipe names them
    sites            one or several; several make one store each, below the folder
    tokens           rows of the train side; fewer where the corpus ends before
    held_out_tokens  rows of the held-out side, at least
    dtype            of the rows on disk: float32, bfloat16, float16 or int8
    shard_tokens     rows per shard; None: about 128 MB
    seed             of the order of documents
    """

    data: DataConfig
    sites: tuple[str, ...]
    tokens: int
    held_out_tokens: int = 196_608
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

    def rows_per_shard(self, d_in: int, label_bytes: int) -> int:
        """`shard_tokens`, or what fills about SHARD_BYTES."""
        return self.shard_tokens or max(1024, SHARD_BYTES // ShardShape(1, d_in, self.dtype, label_bytes).row_bytes())
