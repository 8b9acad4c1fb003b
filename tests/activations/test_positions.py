from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosae.activations.positions import check_positions, choose_positions
from cosae.errors import CosaeError
from tests.support.tiny_models import make_sequences


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("positions", "kept"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("cls", [0]),
        ("tokens", [1, 2, 3, 4]),
        ("patches", [1, 2, 3, 4]),
        ("last", [4]),
        ("2", [2]),
        ("-1", [4]),
        ("1:", [1, 2, 3, 4]),
        (":2", [0, 1]),
        ("-2:", [3, 4]),
        ("1:-1", [1, 2, 3]),
        ("mean", [0, 1, 2, 3, 4]),
    ],
)
def test_places_are_counted_in_real_tokens(positions: str, kept: list[int], padding: str) -> None:
    sequences = make_sequences(n_positions=8, lengths=[8, 5], padding=padding)
    chosen = choose_positions(sequences, positions)
    place_T = sequences.mask_ST.long().cumsum(1)[1] - 1
    assert place_T[chosen.rows_ST[1]].tolist() == kept
    assert chosen.n_rows == (2 if positions == "mean" else int(chosen.rows_ST.sum()))
    assert chosen[1:].rows_S.tolist() == [1 if positions == "mean" else len(kept)]
    assert torch.equal(chosen.columns(4).rows_ST, chosen.rows_ST[:, :4])


@pytest.mark.parametrize("positions", ["", "first", "1:2:3", "x:", "--1", "1.5"])
def test_other_words_are_refused(positions: str) -> None:
    with pytest.raises(CosaeError, match="positions must be one of all, cls"):
        check_positions(positions)


def test_no_place_at_all_is_said() -> None:
    sequences = make_sequences(n_positions=8, lengths=[8, 5])
    with pytest.raises(CosaeError, match="leaves no place"):
        choose_positions(sequences, "9:")
    ordinary = replace(sequences, special_ST=torch.zeros_like(sequences.mask_ST))
    with pytest.raises(CosaeError, match="no class token"):
        choose_positions(ordinary, "cls")
