"""Selection by several processes: exactly what one would select that had all tokens and all features.

What travels are counts, and per-token top-k's candidates; no scores of what is not selected. The n-th largest number of
all processes is found digit by digit: each counts its own by the digit, the sums say which digit the n-th has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosae.kernels.peers import Peers

DIGIT = 11
"""Bits counted at a time: 2048 counts, 3 rounds for a float32."""
MOST_ROWS = 1 << 24
"""More than any process has of a batch; tokens are numbered by process, then row."""


def nth_largest(key_S: Tensor, n: int, bits: int, peers: Peers) -> tuple[int, int]:
    """(the n-th largest of all processes' keys, n from 1; how many are larger). key_S (S,) int64 in [0, 2^bits)."""
    prefix, larger, left = 0, 0, bits
    while left > 0:
        width = min(DIGIT, left)
        left -= width
        digit_S = (key_S >> left) & ((1 << width) - 1)
        count = peers.bins(torch.bincount(digit_S, minlength=1 << width))
        from_above = count.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_above, n - larger))
        digit = (1 << width) - 1 - place
        larger += int(from_above[place] - count[digit])
        prefix = (prefix << width) | digit
        key_S = key_S[digit_S == digit]
    return prefix, larger


def cut(score_S: Tensor, flat_S: Tensor, n_keep: int, n_features: int, peers: Peers) -> tuple[float, int]:
    """(lowest, last) by which all processes together keep their n_keep largest scores, or all where there are fewer.

    Kept is what lies above `lowest`, or is equal to it with a flat index (token · F + feature, of this process) of at
    most `last`. score_S > 0.
    """
    (n_found,) = peers.counts(len(score_S))
    if n_found == 0:
        return 0.0, -1
    bits, integer = (31, torch.int32) if score_S.dtype == torch.float32 else (63, torch.int64)
    key_S = score_S.contiguous().view(integer).long()  # of positive floats: in their order
    lowest, n_above = nth_largest(key_S, min(n_keep, n_found), bits, peers)
    tied_S = key_S == lowest
    number = float(torch.tensor(lowest, dtype=integer).view(score_S.dtype))
    (n_tied,) = peers.counts(int(tied_S.sum()))
    if n_above + n_tied <= n_keep:
        return number, torch.iinfo(torch.int64).max
    tied = flat_S[tied_S]
    first_token, first_feature = peers.token_rank * MOST_ROWS, peers.feature_rank * n_features
    width, most = peers.feature_ranks * n_features, (1 << 62) - 1
    whole_S = (tied // n_features + first_token) * width + tied % n_features + first_feature
    last = most - nth_largest(most - whole_S, n_keep - n_above, 62, peers)[0]
    token, feature = last // width - first_token, last % width - first_feature
    return number, token * n_features + min(max(feature, -1), n_features - 1)


def merged_topk(token_E: Tensor, rank_E: Tensor, k: int, n_tokens: int, peers: Peers) -> Tensor:
    """(E,) bool: which of this process' k best entries of each token are among all processes' k best.

    Entries are sorted by token, then feature; of equal ones those of smaller features, which earlier processes have,
    are kept first.
    """
    count_B = torch.bincount(token_E, minlength=n_tokens)
    start_B = count_B.cumsum(0) - count_B
    column_E = torch.arange(len(token_E), device=token_E.device) - start_B[token_E]
    own_BK = rank_E.new_full((n_tokens, k), -torch.inf)
    own_BK[token_E, column_E] = rank_E
    all_BC = peers.beside(own_BK)
    lowest_B1 = all_BC.topk(k, dim=1).values[:, -1:]
    n_above_B1 = (all_BC > lowest_B1).sum(1, keepdim=True)
    earlier_BC = all_BC[:, : k * peers.feature_rank]
    n_earlier_B1 = (earlier_BC == lowest_B1).sum(1, keepdim=True)
    tied_BK = own_BK == lowest_B1
    quota_B1 = k - n_above_B1 - n_earlier_B1
    keep_BK = (own_BK > lowest_B1) | (tied_BK & (tied_BK.cumsum(1) <= quota_B1))
    return keep_BK[token_E, column_E]


def among_largest(score_BF: Tensor, k: int, peers: Peers) -> Tensor:
    """(B, F) bool: which of a token's scores are among the k largest of all processes."""
    own_BK = torch.nn.functional.pad(score_BF, (0, max(0, k - score_BF.shape[1])), value=-torch.inf)
    lowest_B1 = peers.beside(own_BK.topk(k, dim=1).values).topk(k, dim=1).values[:, -1:]
    return score_BF >= lowest_B1
