"""The handwritten digits that are part of scikit-learn, and exact labels of every patch of them.

1 797 images of 8 × 8 pixels (the test set of Alpaydin and Kaynak, 1998), taken because they come with a package of the
usual index and need no download of their own. A patch is 2 × 2 pixels; the class token stands for the whole image.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.errors import CosaeError
from cosae.text.concepts.table import Concept

SIDE, PATCH = 8, 2
GRID = SIDE // PATCH
INK = 4 / 16
"""A patch has ink where it is at least so bright on average; an edge is a difference of as much."""


@cache
def _read() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise CosaeError("The corpus digits is part of scikit-learn: pip install 'cosae[vision]'.") from None
    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target.astype(np.int64)


def pixels() -> NDArray[np.float32]:
    """(1797, 1, 8, 8), from 0 to 1."""
    return _read()[0][:, None]


def classes() -> NDArray[np.int64]:
    """(1797,) which digit each is."""
    return _read()[1]


def names() -> list[str]:
    """ "digit 17: 7" and so on."""
    return [f"digit {number}: {digit}" for number, digit in enumerate(classes())]


def _concepts() -> tuple[Concept, ...]:
    digits = [Concept(f"digit_{i}", f"in an image of the digit {i}", "contextual") for i in range(10)]
    places = [Concept(f"row_{i}", f"in row {i} of the patches", "contextual") for i in range(GRID)]
    places += [Concept(f"column_{i}", f"in column {i} of the patches", "contextual") for i in range(GRID)]
    strokes = [
        Concept("blank", "a patch without ink", "lexical"),
        Concept("ink", "a patch with ink", "lexical"),
        Concept("filled", "a patch that is nearly all ink", "lexical"),
        *(Concept(f"edge_{side}", f"brighter at its {side}", "lexical") for side in ("left", "right", "top", "bottom")),
        *(Concept(f"ink_{side}", f"the patch {side} has ink", "contextual") for side in ("above", "below")),
    ]
    ends = [Concept(f"stroke_{end}", f"ink that ends {end}", "contextual") for end in ("above", "below")]
    return (*digits, *places, *strokes, *ends)


CONCEPTS = _concepts()


def label_patches(image: NDArray[np.float32], digit: int) -> NDArray[np.bool_]:
    """(1 + 16, C) labels of the class token and of the patches, row by row, of one image (8, 8)."""
    patch_RCHW = image.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3)
    mean_RC = patch_RCHW.mean((2, 3))
    ink_RC = mean_RC >= INK
    across_RC = patch_RCHW[..., 0].mean(2) - patch_RCHW[..., 1].mean(2)  # left less right
    down_RC = patch_RCHW[:, :, 0].mean(2) - patch_RCHW[:, :, 1].mean(2)  # top less bottom
    none = np.zeros((1, GRID), dtype=bool)
    above_RC, below_RC = np.vstack([none, ink_RC[:-1]]), np.vstack([ink_RC[1:], none])
    row_RC, column_RC = np.indices((GRID, GRID))
    of_patch: dict[str, Any] = {
        **{f"row_{i}": row_RC == i for i in range(GRID)},
        **{f"column_{i}": column_RC == i for i in range(GRID)},
        "blank": mean_RC == 0,
        "ink": ink_RC,
        "filled": mean_RC >= 13 / 16,
        "edge_left": across_RC >= INK,
        "edge_right": across_RC <= -INK,
        "edge_top": down_RC >= INK,
        "edge_bottom": down_RC <= -INK,
        "ink_above": above_RC,
        "ink_below": below_RC,
        "stroke_above": ink_RC & ~above_RC,
        "stroke_below": ink_RC & ~below_RC,
    }
    found = np.zeros((1 + GRID * GRID, len(CONCEPTS)), dtype=bool)
    for column, concept in enumerate(CONCEPTS):
        if concept.name.startswith("digit_"):
            found[:, column] = concept.name == f"digit_{digit}"
        else:
            found[1:, column] = of_patch[concept.name].ravel()
    return found
