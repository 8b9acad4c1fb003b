"""What one latent is compared with: floors and a ceiling for sparse probing.

In: the train tokens with labels, and the held-out tokens. Out: (N, C) float scores of the held-out
tokens, to be ranked like the codes of a chosen latent. Everything is fitted on the train tokens only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cosae.evaluate.probing.logistic import scores
from cosae.evaluate.probing.ranking import Labels, auroc_of_dimensions
from cosae.evaluate.statistics import Array
from cosae.types import Activations


def token_identity(train: Activations, label_NC: Labels, held_out: Activations, smoothing: float = 1.0) -> Array:
    """How often the token's id had the concept in train: (n₊(id) + s · p) / (n(id) + s).

    p is the concept's share of the train tokens, s (`smoothing`) a number of tokens; an id that train never
    saw scores p.
    """
    id_N, id_M = train.token_N.cpu().numpy(), held_out.token_N.cpu().numpy()
    known_V, row_N, count_V = np.unique(id_N, return_inverse=True, return_counts=True)
    share_C = label_NC.mean(axis=0)
    first_V = np.cumsum(count_V) - count_V
    grouped_NC = label_NC[np.argsort(row_N, kind="stable")]
    positive_VC = np.add.reduceat(grouped_NC, first_V, axis=0, dtype=np.float64)
    score_VC = (positive_VC + smoothing * share_C) / (count_V[:, None] + smoothing)
    row_M = np.minimum(np.searchsorted(known_V, id_M), len(known_V) - 1)
    scores: Array = np.where((known_V[row_M] == id_M)[:, None], score_VC[row_M], share_C)
    return scores


def norm_alone(train: Activations, label_NC: Labels, held_out: Activations) -> Array:
    """|x|, or −|x| where small norms speak for the concept in train."""
    norm_N1 = train.norm_N.float().cpu().numpy()[:, None]
    sign_C = np.where(auroc_of_dimensions(norm_N1, label_NC)[0] < 0.5, -1.0, 1.0)
    scores: Array = held_out.norm_N.double().cpu().numpy()[:, None] * sign_C
    return scores


def best_dimension(train: Activations, label_NC: Labels, held_out: Activations) -> Array:
    """The single dimension of x, of either sign, with the best AUROC in train."""
    area_DC = auroc_of_dimensions(train.x_ND.float().cpu().numpy(), label_NC)
    dimension_C = np.abs(area_DC - 0.5).argmax(axis=0)
    sign_C = np.where(area_DC[dimension_C, np.arange(area_DC.shape[1])] < 0.5, -1.0, 1.0)
    scores: Array = held_out.x_ND.float().cpu().numpy()[:, dimension_C] * sign_C
    return scores


def logistic(
    train: Activations, label_NC: Labels, held_out: Activations, check: Callable[[], None] = lambda: None
) -> Array:
    """Logits of a logistic regression on x, standardised by the mean and deviation of train; check: see `fit`."""
    return scores(train.x_ND.float().cpu().numpy(), label_NC, held_out.x_ND.float().cpu().numpy(), check=check)
