"""Exact token-level concepts of Python source: what every model token is, and what it stands in.

One column of labels per concept of `table.CONCEPTS`, from Python's own `tokenize` and `ast`.

Which part of a model token counts. Model tokens and Python tokens need not line up: " return", ".append", "):\\n". A
model token takes its labels from ONE character: its first letter, digit or underscore; without one its first character
that is not white space; without one its first character. So ".append" is the attribute, "):\\n" is the closing
parenthesis, and a run of white space is what stands where the run begins. A token of no characters (BOS) has no label.
"""

from __future__ import annotations

import re
import tokenize
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cosae.errors import CosaeError
from cosae.text.concepts.source import Regions, Source
from cosae.text.concepts.table import COLUMN, CONCEPTS, FAMILIES, Concept
from cosae.text.concepts.tokens import paint_tokens
from cosae.text.concepts.tree import paint_tree
from cosae.types import Activations

__all__ = ["CONCEPTS", "Concept", "Labels", "anchors", "has_labels", "label_activations", "label_document"]

Labels = NDArray[np.bool_]


def label_document(text: str, offset_N2: NDArray[np.integer], name: str = "") -> Labels | None:
    """(N, C) bool labels of one document's tokens, C = len(CONCEPTS); None when the text is not Python.

    text       the document, as it was given to the tokenizer
    offset_N2  (N, 2) integers: start and end of each token in `text`, in characters; (0, 0) for a BOS
    name       path of the file, for the module families ("json/decoder.py")

    Not Python means: the interpreter that runs does not parse it (Python 2 test data, syntax yet to come).
    Raises CosaeError when offsets have another shape or reach outside the text.
    """
    offset_N2 = np.asarray(offset_N2)
    if offset_N2.ndim != 2 or offset_N2.shape[1] != 2:
        raise CosaeError(f"token offsets must have shape (tokens, 2); got {offset_N2.shape} instead")
    if offset_N2.size and (offset_N2.min() < 0 or offset_N2.max() > len(text)):
        raise CosaeError(
            f"token offsets must lie within the {len(text)} characters of the document {name!r}; got "
            f"{offset_N2.min()} to {offset_N2.max()} instead: were they counted in bytes, or of another text?"
        )
    regions: Regions = defaultdict(list)
    try:
        source = Source(text)
        paint_tokens(source, regions)
        paint_tree(source, regions)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    label_NC = _look_up(regions, anchors(text, offset_N2))
    parts = re.split(r"[/\\]", name.removesuffix(".py"))
    label_NC[:, [COLUMN[f"module_{family}"] for family in FAMILIES if family in parts]] = True
    label_NC[offset_N2[:, 0] == offset_N2[:, 1]] = False
    return label_NC


def anchors(text: str, offset_N2: NDArray[np.integer]) -> NDArray[np.int64]:
    """(N,) int64: the character that decides each token's labels (rule at the top of this module)."""
    code_T = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    code_U, which_T = np.unique(code_T, return_inverse=True)
    letters = [chr(code) for code in code_U]
    visible_U = np.array([not letter.isspace() for letter in letters], dtype=bool)
    word_U = np.array([letter.isalnum() or letter == "_" for letter in letters], dtype=bool)
    start_N, end_N = offset_N2[:, 0].astype(np.int64), offset_N2[:, 1].astype(np.int64)
    anchor_N = start_N.copy()
    for wanted_T in (visible_U[which_T], word_U[which_T]):  # the later rule has the last word
        place_T = np.where(wanted_T, np.arange(len(code_T)), len(code_T))
        next_T = np.append(np.minimum.accumulate(place_T[::-1])[::-1], len(code_T))
        anchor_N = np.where(next_T[start_N] < end_N, next_T[start_N], anchor_N)
    return anchor_N


def label_activations(activations: Activations, labels_by_document: Sequence[Labels | None]) -> Labels:
    """(N, C) bool: the labels of each activation, by its document and its index in the document.

    labels_by_document  `label_document` of document i at place i. Activations of a document whose entry is
                        None, and those that come from no document (doc -1), have no label: see `has_labels`

    Raises CosaeError when an activation points outside what was given.
    """
    doc_N, index_N = activations.doc_N.cpu().numpy(), activations.index_N.cpu().numpy()
    count_D = np.array([0 if rows is None else len(rows) for rows in labels_by_document], dtype=np.int64)
    if doc_N.size and doc_N.max() >= len(count_D):
        raise CosaeError(
            f"labels must be given for every document; got those of {len(count_D)}, and activations "
            f"of document number {doc_N.max()} (counted from 0)"
        )
    known_N = has_labels(activations, labels_by_document)
    if (index_N[known_N] >= count_D[doc_N[known_N]]).any() or (index_N[known_N] < 0).any():
        raise CosaeError(
            "labels must be given for every token of a document; got an activation whose token index lies "
            "outside its document's labels: label with the offsets of the tokenizer the activations came from"
        )
    first_D = np.cumsum(count_D) - count_D
    label_NC = np.zeros((len(doc_N), len(CONCEPTS)), dtype=bool)
    if known_N.any():
        stacked = np.concatenate([labels for labels in labels_by_document if labels is not None])
        label_NC[known_N] = stacked[first_D[doc_N[known_N]] + index_N[known_N]]
    return label_NC


def has_labels(activations: Activations, labels_by_document: Sequence[Labels | None]) -> Labels:
    """(N,) bool: whether the activation's document could be labelled. A `keep` mask for probing."""
    known_D = np.array([labels is not None for labels in labels_by_document], dtype=bool)
    doc_N = activations.doc_N.cpu().numpy()
    inside_N = (doc_N >= 0) & (doc_N < len(known_D))
    known_N: Labels = np.append(known_D, False)[np.where(inside_N, doc_N, len(known_D))]
    return known_N


def _look_up(regions: Regions, anchor_N: NDArray[np.int64]) -> Labels:
    """(N, C) bool: whether each anchor lies in a span of each concept's regions.

    In the order of the anchors a span covers a run of tokens, so +1 where the run begins, −1 behind its end
    and a running sum count the spans over every token.
    """
    rows = [(COLUMN[name], *span) for name, spans in regions.items() if name in COLUMN for span in spans]
    column_R, start_R, end_R = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    order_N = np.argsort(anchor_N, kind="stable")
    sorted_N = anchor_N[order_N]
    n, c = len(anchor_N), len(CONCEPTS)
    step = np.zeros((n + 1) * c, dtype=np.int32)
    for place_R, sign in ((start_R, 1), (end_R, -1)):
        flat_R = np.searchsorted(sorted_N, place_R) * c + column_R
        step += sign * np.bincount(flat_R, minlength=(n + 1) * c).astype(np.int32)
    label_NC = np.empty((n, c), dtype=bool)
    label_NC[order_N] = np.cumsum(step.reshape(n + 1, c), axis=0, dtype=np.int32)[:n] > 0
    return label_NC
