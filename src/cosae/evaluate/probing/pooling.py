"""Codes of tokens → codes of texts: what document-level probing looks at (paper §6).

In: codes of tokens, the text each token belongs to, the tokens that count. Out: `Codes` with one row a text, so that
every selection rule for tokens works on texts:

    mean   Σ over the text's counted tokens of f_i / their number      (SAEBench's)
    last   the codes of the text's last counted token                 (sae-probes')

A sink that counts enters the mean with codes of a hundred times the usual size where codes grow with the norm (paper
§9 A5): hence pooled with and without. A text without a counted token has no codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from cosae.errors import CosaeError
from cosae.types import Codes

POOLINGS = ("mean", "last")


def pool(codes: Codes, text_N: NDArray[np.int64], n_texts: int, keep_N: NDArray[np.bool_], how: str = "mean") -> Codes:
    """Codes of n_texts texts.

    text_N (N,) the text of each token, ascending; keep_N (N,) the tokens that count. Raises CosaeError for sizes
    that do not fit and an unknown pooling.
    """
    weight_SN = weights(text_N, n_texts, keep_N, how)
    if codes.n_tokens != len(text_N):
        raise CosaeError(f"every token needs its text; got {codes.n_tokens} tokens and {len(text_N)} texts of tokens.")
    pooled = (weight_SN @ codes.to_scipy()).tocsr()
    pooled.sort_indices()
    return Codes(
        torch.from_numpy(pooled.indptr.astype(np.int64)),
        torch.from_numpy(pooled.indices.astype(np.int64)),
        torch.from_numpy(pooled.data.astype(np.float32)),
        codes.d_sae,
        (n_texts,),
    )


def pool_vectors(
    x_ND: Tensor, text_N: NDArray[np.int64], n_texts: int, keep_N: NDArray[np.bool_], how: str = "mean"
) -> NDArray[np.float32]:
    """(S, D) fp32: the same of dense vectors; 0 for a text without a counted token."""
    pooled: NDArray[np.float32] = (weights(text_N, n_texts, keep_N, how) @ x_ND.float().cpu().numpy()).astype(
        np.float32
    )
    return pooled


def weights(text_N: NDArray[np.int64], n_texts: int, keep_N: NDArray[np.bool_], how: str) -> Any:
    """(S, N) sparse: what each token counts in its text; rows sum to 1, or to 0 where no token counts."""
    if how not in POOLINGS:
        raise CosaeError(f"pooling must be one of {', '.join(POOLINGS)}. Got {how!r} instead.")
    if keep_N.dtype != np.bool_ or keep_N.shape != text_N.shape or (len(text_N) and int(text_N.max()) >= n_texts):
        raise CosaeError(
            f"pooling needs a text below {n_texts} and a boolean for each token. Got shapes {text_N.shape} and "
            f"{keep_N.shape} of {keep_N.dtype} instead."
        )
    token_E = np.flatnonzero(keep_N)
    text_E = text_N[token_E]
    if how == "last":
        last_E = np.append(text_E[1:] != text_E[:-1], True)[: len(text_E)]
        token_E, text_E = token_E[last_E], text_E[last_E]
    count_S = np.bincount(text_E, minlength=n_texts)
    return sparse.csr_matrix((1.0 / count_S[text_E], (text_E, token_E)), shape=(n_texts, len(text_N)))
