from __future__ import annotations

import numpy as np
import pytest

from cosae.media import digits


def label(image: list[list[float]], name: str) -> np.ndarray:
    names = [concept.name for concept in digits.CONCEPTS]
    return digits.label_patches(np.array(image, np.float32), 7)[:, names.index(name)]


@pytest.fixture
def stroke() -> list[list[float]]:
    """A vertical line in the second column of pixels, rows 2 to 5."""
    return [[float(c == 1 and 2 <= r < 6) for c in range(8)] for r in range(8)]


def test_labels_of_a_stroke_are_those_seen(stroke: list[list[float]]) -> None:
    def patches(name: str) -> list[int]:
        return np.flatnonzero(label(stroke, name)[1:]).tolist()

    assert patches("ink") == [4, 8]  # rows 1 and 2, column 0
    assert patches("edge_right") == [4, 8]
    assert patches("edge_left") == []
    assert len(patches("blank")) == 14
    assert patches("ink_above") == [8, 12]
    assert patches("stroke_above") == [4]
    assert patches("stroke_below") == [8]
    assert patches("row_1") == [4, 5, 6, 7]
    assert patches("column_3") == [3, 7, 11, 15]
    assert label(stroke, "digit_7").all()
    assert not label(stroke, "digit_1").any()
    assert not label(stroke, "blank")[0]  # the class token is of no patch


def test_the_images_and_their_names_belong_together() -> None:
    pixels, names = digits.pixels(), digits.names()
    assert pixels.shape == (1797, 1, 8, 8)
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert names[17] == f"digit 17: {digits.classes()[17]}"
    concepts = [concept.name for concept in digits.CONCEPTS]
    assert len({*concepts}) == len(concepts) == 29
