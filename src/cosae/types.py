"""What one room hands the next.

Everything here is plain data: no parameters, no I/O, nothing that changes after it is made.

Shape suffixes used in the whole package:
B tokens in a batch · D model width (d_in) · F features (d_sae) · K kept per token · S sequences ·
T positions · E active entries · C concepts · N tokens of a whole set · P probe rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from scipy import sparse
from torch import Tensor

from cosae.errors import CosaeError
from cosae.shown import Shown


@dataclass(frozen=True)
class Sequences:
    """Token sequences cut from documents, ready for a model.

    ids_ST    (S, T) int64   token ids; padding where mask_ST is False
    doc_ST    (S, T) int32   index of the document a token comes from: doc_names[index - first_doc]; -1 for padding
    index_ST  (S, T) int32   index of the token in its document's own token list (0 = the BOS when documents
                             start with one); -1 for padding
    mask_ST   (S, T) bool    True for real tokens, False for padding
    special_ST (S, T) bool   True where the id is one of the tokenizer's special ids (BOS, EOS, PAD ...)
    doc_names names of the documents, for records and reports
    first_doc index of the document that doc_names[0] names; not 0 where sequences are one stretch of a longer text
    inputs    what a model that reads no tokens is given instead of ids_ST, by the name of its argument, S of each:
              images, sounds
    keep_ST   (S, T) bool    the places that become rows; None: all real ones
    pooled    one row a sequence, the mean of those places
    """

    PLACES: ClassVar = ("ids_ST", "doc_ST", "index_ST", "mask_ST", "special_ST")  # fields with an entry a token

    ids_ST: Tensor
    doc_ST: Tensor
    index_ST: Tensor
    mask_ST: Tensor
    special_ST: Tensor
    doc_names: tuple[str, ...] = ()
    first_doc: int = 0
    inputs: Mapping[str, Tensor] | None = None
    keep_ST: Tensor | None = None
    pooled: bool = False

    @property
    def rows_ST(self) -> Tensor:
        """(S, T) bool: the real places that become rows, or parts of one."""
        return self.mask_ST if self.keep_ST is None else self.mask_ST & self.keep_ST

    @property
    def rows_S(self) -> Tensor:
        """(S,) int64: rows of activations that each sequence gives."""
        rows_S = self.rows_ST.sum(1)
        return rows_S.clamp(max=1) if self.pooled else rows_S

    @property
    def n_rows(self) -> int:
        """Rows of activations that they give."""
        return int(self.rows_S.sum())

    def __len__(self) -> int:
        return int(self.ids_ST.shape[0])

    def __getitem__(self, rows: slice | Tensor) -> Sequences:
        """The chosen sequences, in the order asked for; all document names are kept."""
        inputs = None if self.inputs is None else {name: value[rows] for name, value in self.inputs.items()}
        keep_ST = None if self.keep_ST is None else self.keep_ST[rows]
        places = {name: getattr(self, name)[rows] for name in self.PLACES}
        return replace(self, inputs=inputs, keep_ST=keep_ST, **places)

    def columns(self, n: int) -> Sequences:
        """The first n places of every sequence."""
        keep_ST = None if self.keep_ST is None else self.keep_ST[:, :n]
        return replace(self, keep_ST=keep_ST, **{name: getattr(self, name)[:, :n] for name in self.PLACES})


@dataclass(frozen=True)
class Site:
    """One place in a model where activations are read.

    name         short name (`resid_post.3`), or the module path where there is no short one
    hook_name    TransformerLens style name, as SAELens writes it to disk, or the module path
    module_path  path as in `model.get_submodule`
    block        index of the block the module is or lies in; -1 outside of blocks
    reads        whether the module's first input or its output is meant
    call         which run of the module in a forward pass is meant, from 0: blocks may share a module
    calls        how many runs of it there must be in a pass; any other number is refused. 0: any above `call`
    joined       sites whose vectors are put behind this one's, for a crosscoder; the name then names all: A+B+C
    """

    name: str
    hook_name: str
    module_path: str
    block: int
    reads: Literal["input", "output"] = "output"
    call: int = 0
    calls: int = 1
    joined: tuple[Site, ...] = ()

    def __post_init__(self) -> None:
        made = tuple(Site(**one) if isinstance(one, Mapping) else one for one in self.joined)
        object.__setattr__(self, "joined", made)

    @property
    def places(self) -> tuple[Site, ...]:
        """The single places that it joins; itself, where it is one."""
        if not self.joined:
            return (self,)
        name, hook_name = (names.partition("+")[0] for names in (self.name, self.hook_name))
        return (replace(self, name=name, hook_name=hook_name, joined=()), *self.joined)

    def is_named(self, name: str) -> bool:
        """Whether a name means this site: short, TransformerLens style, or a module path, with or without its start.

        What goes into a block is what comes out of the block before.
        """
        before, after = ("resid_post", self.block - 1), ("resid_pre", self.block + 1)
        kind, block = {f"resid_pre.{self.block}": before, f"resid_post.{self.block}": after}.get(self.name, ("", 0))
        if name in {self.name, self.hook_name} or (kind and name in {f"{kind}.{block}", f"blocks.{block}.hook_{kind}"}):
            return True
        other, run, reads = split_site(name)
        path, other = f".{self.module_path}", f".{other.removesuffix('.output')}"
        same_run = run is None if self.calls else run == self.call
        return reads == self.reads and same_run and (path.endswith(other) or other.endswith(path))

    def to_record(self) -> dict[str, Any]:
        """Plain values that `Site(**record)` takes; which run is meant only where there are several."""
        several = ("call", "calls") if self.calls != 1 else ()
        own = {name: getattr(self, name) for name in ("name", "hook_name", "module_path", "block", "reads", *several)}
        return own | ({"joined": [one.to_record() for one in self.joined]} if self.joined else {})


def split_site(name: str) -> tuple[str, int | None, Literal["input", "output"]]:
    """PATH#RUN:input in its parts; RUN None where no run is named."""
    place, reads, _ = name.partition(":input")
    path, several, run = place.partition("#")
    if several and not run.isdecimal():
        raise CosaeError(f"a run of a module must be a number from 0, as in layers.0#2. Got {name!r} instead.")
    return path, int(run) if several else None, "input" if reads else "output"


@dataclass(frozen=True)
class Activations:
    """N activation vectors with where each came from. All fields share the leading size N.

    x_ND       (N, D) float32, bfloat16 or float16   the vectors themselves
    norm_N     (N,) float32   Euclidean norm of each row, computed in fp32
    token_N    (N,) int32     token id, -1 where there is none (vision, embeddings, synthetic worlds)
    doc_N      (N,) int32     document index, -1 where there is none
    position_N (N,) int32     position in the sequence the model saw (0 = first), -1 where there is none
    index_N    (N,) int32     index of the token in its document's own token list, -1 where there is none
    special_N  (N,) bool      True where the token id is a special one (BOS, EOS ...)
    y_ND       (N, D_out) as x_ND, or None   the same tokens at the target, where a transcoder is to learn it
    """

    x_ND: Tensor
    norm_N: Tensor
    token_N: Tensor
    doc_N: Tensor
    position_N: Tensor
    index_N: Tensor
    special_N: Tensor
    y_ND: Tensor | None = None

    @classmethod
    def bare(cls, x_ND: Tensor, norm_N: Tensor | None = None) -> Activations:
        """Vectors that come from nowhere in particular: no tokens, documents or positions."""
        n = x_ND.shape[0]
        none = torch.full((n,), -1, dtype=torch.int32, device=x_ND.device)
        norm_N = x_ND.float().norm(dim=-1) if norm_N is None else norm_N
        return cls(x_ND, norm_N, none, none, none, none, special_N=torch.zeros_like(none, dtype=torch.bool))

    @classmethod
    def cat(cls, parts: Sequence[Activations]) -> Activations:
        """Parts one after the other."""
        return cls(**{name: torch.cat([getattr(p, name) for p in parts]) for name in parts[0].columns})

    def __len__(self) -> int:
        return int(self.x_ND.shape[0])

    def __getitem__(self, rows: slice | Tensor) -> Activations:
        """The chosen rows, by slice, index tensor or boolean mask."""
        return Activations(**{name: column[rows] for name, column in self.columns.items()})

    @property
    def columns(self) -> dict[str, Tensor]:
        """Field → tensor, of those that are there."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class NormStats:
    """What a frame took out of each token and a decoder must put back.

    scale_B (B,) fp32   multiplier of the reconstructed vector: 1 in `raw`, |x - c| in `unit`, the standard deviation
                        in `layer_norm`
    shift_B (B,) fp32   added to every coordinate: 0 but in `layer_norm`, where it is the mean of x
    r_B     (B,) fp32   |z|, the length of what is scored; a norm-restoring decoder reads it
    Of a crosscoder scale_B and shift_B are (B, P), a number a site.
    added_BD  (B, D_out) fp32   what a linear skip adds to the decoder's sum; None where there is no skip
    """

    scale_B: Tensor
    shift_B: Tensor
    r_B: Tensor
    added_BD: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> NormStats:
        added_BD = None if self.added_BD is None else self.added_BD[rows]
        return NormStats(self.scale_B[rows], self.shift_B[rows], self.r_B[rows], added_BD)


@dataclass(frozen=True)
class Framed:
    """A batch as a score sees it.

    z_BD    (B, D) fp32  what is scored and reconstructed, centre removed
    norm_stats  what has to be put back
    live_B  (B,) bool    False for masked (all-zero) rows of x, which encode to nothing
    """

    z_BD: Tensor
    norm_stats: NormStats
    live_B: Tensor


@dataclass(frozen=True, repr=False)
class Codes(Shown):
    """Sparse codes, grouped by token (compressed rows), features ascending within a token.

    offset_B1  (B + 1,) int64  entries of token t are offset[t] : offset[t + 1]
    feature_E  (E,) int64      feature ids
    value_E    (E,) fp32       code values; never exactly 0 on selection, signed only for abs_topk
    d_sae      number of features
    shape      leading shape of the input the codes came from; its product is B
    norm_stats what the frame took out of each token; `decode` puts it back. None for codes made by hand, which
               only the raw frame without norm restoring can decode
    """

    offset_B1: Tensor
    feature_E: Tensor
    value_E: Tensor
    d_sae: int
    shape: tuple[int, ...]
    norm_stats: NormStats | None = None

    @property
    def n_tokens(self) -> int:
        return int(self.offset_B1.shape[0]) - 1

    @property
    def count_B(self) -> Tensor:
        """(B,) int64: active entries per token."""
        return self.offset_B1[1:] - self.offset_B1[:-1]

    @property
    def token_E(self) -> Tensor:
        """(E,) int64: the token each entry belongs to."""
        tokens = torch.arange(self.n_tokens, device=self.offset_B1.device)
        return torch.repeat_interleave(tokens, self.count_B, output_size=int(self.feature_E.shape[0]))

    @property
    def l0(self) -> float:
        """Mean number of active features per token."""
        return int(self.feature_E.shape[0]) / max(self.n_tokens, 1)

    def _summary(self) -> dict[str, object]:
        many = len(self.shape) != 1
        return {
            "rows": self.n_tokens,
            "of_shape": tuple(self.shape) if many else None,
            "features": self.d_sae,
            "active_entries": int(self.feature_E.shape[0]),
            "mean_l0": self.l0,
            "device": None if self.value_E.device.type == "cpu" else str(self.value_E.device),
        }

    def to_dense(self) -> Tensor:
        """(*shape, d_sae) fp32, zeros where nothing fired. Gradients flow to value_E."""
        dense = self.value_E.new_zeros(self.n_tokens * self.d_sae)
        flat = self.token_E * self.d_sae + self.feature_E
        return dense.index_put((flat,), self.value_E).reshape(*self.shape, self.d_sae)

    def __getitem__(self, rows: slice) -> Codes:
        """Codes of a stretch of tokens (of the flattened leading shape), with what the frame took out of them."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise CosaeError(f"codes are cut by a plain slice of tokens, codes[3:4] for one. Got {rows!r} instead.")
        start, stop, _ = rows.indices(self.n_tokens)
        stop = max(start, stop)
        offset = self.offset_B1[start : stop + 1]
        inside = slice(int(offset[0]), int(offset[-1]))
        norm_stats = None if self.norm_stats is None else self.norm_stats[start:stop]
        return Codes(
            offset - offset[0], self.feature_E[inside], self.value_E[inside], self.d_sae, (stop - start,), norm_stats
        )

    def take(self, keep_N: Tensor | NDArray[np.bool_]) -> Codes:
        """Codes of the tokens (of the flattened leading shape) where keep_N (N,) bool is True, in order."""
        keep = torch.as_tensor(keep_N, device=self.offset_B1.device)
        if keep.dtype != torch.bool or keep.shape != (self.n_tokens,):
            got = f"{keep.dtype} of shape {tuple(keep.shape)}"
            raise CosaeError(f"a mask must have one boolean for each of {self.n_tokens} tokens. Got {got} instead.")
        keep_E = keep[self.token_E]
        offset = torch.cat([self.offset_B1[:1], torch.cumsum(self.count_B[keep], 0)])
        norm_stats = None if self.norm_stats is None else self.norm_stats[keep]
        shape = (len(offset) - 1,)
        return Codes(offset, self.feature_E[keep_E], self.value_E[keep_E], self.d_sae, shape, norm_stats)

    def to_scipy(self, dtype: DTypeLike = np.float64) -> sparse.csr_matrix:
        """(N, F) sparse matrix of the codes, a copy on the CPU."""
        value_E = at_least_fp32(self.value_E.detach()).cpu().numpy().astype(dtype)
        place = (self.feature_E.cpu().numpy(), self.offset_B1.cpu().numpy())
        return sparse.csr_matrix((value_E, *place), shape=(self.n_tokens, self.d_sae))

    def with_values(self, value_E: Tensor) -> Codes:
        """The same entries with other values."""
        return replace(self, value_E=value_E)

    @classmethod
    def cat(cls, parts: Sequence[Codes]) -> Codes:
        """The parts' tokens one after another, (N,), on the CPU, no `norm_stats` or gradients; one part or more."""
        counts = torch.cat([part.count_B for part in parts]).cpu()
        offset = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        feature_E = torch.cat([part.feature_E for part in parts]).cpu()
        value_E = torch.cat([part.value_E.detach() for part in parts]).cpu()
        return cls(offset, feature_E, value_E, parts[0].d_sae, (len(counts),))

    @classmethod
    def from_dense(cls, dense: Tensor, norm_stats: NormStats | None = None) -> Codes:
        """Codes of a dense (..., d_sae) tensor: its non-zero entries."""
        flat = dense.reshape(-1, dense.shape[-1])
        token_E, feature_E = (flat != 0).nonzero(as_tuple=True)
        return cls.from_entries(
            token_E, feature_E, flat[token_E, feature_E], flat.shape[1], tuple(dense.shape[:-1]), norm_stats
        )

    @classmethod
    def from_entries(
        cls,
        token_E: Tensor,
        feature_E: Tensor,
        value_E: Tensor,
        d_sae: int,
        shape: tuple[int, ...],
        norm_stats: NormStats | None = None,
    ) -> Codes:
        """Codes of entries already sorted by (token, feature)."""
        count_B = torch.bincount(token_E, minlength=math.prod(shape))
        return cls(torch.nn.functional.pad(count_B.cumsum(0), (1, 0)), feature_E, value_E, d_sae, shape, norm_stats)


Metrics = Mapping[str, Any]
"""Plain numbers by name: what a measurement returns and JSON can hold."""


@dataclass(frozen=True)
class NormSummary:
    """Statistics of the first window of a stream, before any filter; written into every SAE's file.

    window_tokens      how many tokens were looked at
    median_norm        their median |x|
    mean_norm          their mean |x|
    max_over_median    largest |x| over the median
    quantiles          |x| at 0, .01, .05, .25, .5, .75, .95, .99, 1
    total_variance     mean of |x - mean x|^2 over the tokens the filter keeps, raw units squared
    filtered_frac      share of the window that the filter drops
    """

    window_tokens: int
    median_norm: float
    mean_norm: float
    max_over_median: float
    quantiles: tuple[float, ...] = field(default_factory=tuple)
    total_variance: float = 0.0
    filtered_frac: float = 0.0


def at_least_fp32(x: Tensor) -> Tensor:
    """Half types become fp32; fp32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
