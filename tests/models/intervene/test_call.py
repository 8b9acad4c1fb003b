"""Where the tokens of a call stand: read from whatever says it, refused where it contradicts itself or is not said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cosae.activations.filter import Filter, FilterPolicy
from cosae.errors import CosaeError
from cosae.io.values import to_plain
from cosae.models.intervene.call import read_window
from cosae.models.intervene.splice import Step, spliced
from tests.support.tiny import identity_sae, make_model, mixed_sequences

transformers = pytest.importorskip("transformers")


class Body(nn.Module):
    """Takes whatever a version of transformers might pass."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **rest: Any) -> None:
        pass


class Held:
    def __init__(self, n: int) -> None:
        self.n = n

    def get_seq_length(self) -> int:
        return self.n


def window(shape: tuple[int, int] = (2, 1), body: nn.Module | None = None, **given: Any) -> Any:
    return read_window(body or Body(), (torch.ones(shape, dtype=torch.int64),), given)


def told(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


LEFT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


@pytest.mark.parametrize(
    "given",
    [
        {"past_key_values": Held(7)},
        {"cache": Held(7)},
        {"cache_params": Held(7)},
        {"anything": Held(7)},
        {"cache_position": torch.tensor([7])},
        {"cache": Held(7), "position_ids": told([7])},
        {"cache": Held(7), "position_ids": told([7], [7]), "cache_position": torch.tensor([7])},
        {"attention_mask": torch.ones(2, 8)},
        {"cache": Held(7), "attention_mask": torch.ones(2, 8)},
        {"cache": Held(7), "attention_mask": {"full_attention": None}},
        {"state": [torch.ones(1)], "position_ids": told([7])},
        {"cache": Held(7), "attention_mask": torch.zeros(2, 1, 1, 12).masked_fill(torch.arange(12) > 7, -1e9)},
    ],
)
def test_a_cached_step_stands_after_what_the_cache_holds(given: dict[str, Any]) -> None:
    found = window(**given)
    assert found.position_ST.tolist() == [[7], [7]]
    assert found.start == 7


def test_padding_and_several_counts() -> None:
    mask4 = (torch.arange(8) <= 3) & torch.tensor([[True] * 8, [False] * 2 + [True] * 6])[:, None, None]
    for given in (
        {"attention_mask": LEFT, "cache": Held(3)},
        {"attention_mask": LEFT, "cache": Held(3), "position_ids": told([3], [1])},
        {"attention_mask": LEFT, "cache": Held(3), "position_ids": told([3], [3])},  # padded columns, numbered
        {"attention_mask": mask4, "cache": Held(3)},
        {"attention_mask": mask4, "cache": Held(3), "position_ids": told([3], [1])},
    ):
        assert window(**given).position_ST.tolist() == [[3], [1]]
    assert window((2, 4), attention_mask=LEFT, position_ids=told([0, 1, 2, 3], [1, 1, 0, 1])).position_ST.tolist() == [
        [0, 1, 2, 3],
        [0, 0, 0, 1],
    ]
    rows = told([0, 1, 2, 0, 1])  # two documents in one row
    assert window((1, 5), position_ids=rows).position_ST.tolist() == rows.tolist()
    images = torch.stack([told([3], [3]), told([1], [1]), told([2], [2])])
    assert window(position_ids=images, cache=Held(5)).position_ST.tolist() == [[5], [5]]
    assert window(position_ids=torch.full((3, 2, 1), 5), cache=Held(5)).position_ST.tolist() == [[5], [5]]


@pytest.mark.parametrize(
    "given",
    [
        {"cache": Held(7), "position_ids": told([0])},
        {"cache": Held(0), "position_ids": told([7])},
        {"cache": Held(7), "cache_position": torch.tensor([3])},
        {"cache": Held(7), "past_key_values": Held(3)},
        {"cache": Held(7), "attention_mask": torch.ones(2, 1)},
        {"attention_mask": torch.ones(2, 8), "position_ids": told([0])},
        {"attention_mask": LEFT, "cache": Held(3), "position_ids": told([3], [2])},
        {"cache": Held(3), "attention_mask": torch.ones(2, 1, 1, 3, dtype=torch.bool), "position_ids": told([9])},
    ],
)
def test_a_call_that_contradicts_itself_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(CosaeError, match="contradicts itself"):
        window(**given)


class Recurrent(Held):
    def get_seq_length(self) -> int:
        raise ValueError("only of attention layers")


def test_the_cache_of_a_recurrent_model_tells_nothing() -> None:
    with pytest.raises(CosaeError, match=r"continues from cache .*use_cache=False"):
        window(cache=Recurrent(7))
    assert window(cache=Recurrent(7), attention_mask=torch.ones(2, 8)).position_ST.tolist() == [[7], [7]]


def test_a_mask_padded_for_a_static_cache_ends_where_the_tokens_do() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]])
    assert window(attention_mask=mask, cache=Held(3)).position_ST.tolist() == [[3], [1]]
    found = window((2, 4), attention_mask=mask, cache=Held(0))
    assert found.position_ST.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert torch.equal(found.mask_ST, mask[:, :4].bool())


@pytest.mark.parametrize("name", ["past_key_values", "cache", "state", "mems"])
def test_a_cache_that_does_not_tell_its_length_is_refused(name: str) -> None:
    with pytest.raises(CosaeError, match=f"continues from {name}"):
        window(**{name: ((torch.ones(1), torch.ones(1)),)})
    with pytest.raises(CosaeError, match=f"continues from {name}"):
        window((2, 2), position_ids=told([3, 4], [1, 2]), **{name: object()})
    assert window(attention_mask=torch.ones(2, 4), **{name: object()}).position_ST.tolist() == [[3], [3]]


def test_a_mask_that_shows_no_padding_and_a_sliding_one_without_positions_are_refused() -> None:
    with pytest.raises(CosaeError, match="'sdpa' or 'eager'"):
        window(attention_mask=object())
    body = Body()
    body.config = transformers.MistralConfig(sliding_window=4)  # type: ignore[assignment]
    with pytest.raises(CosaeError, match="sliding"):
        window(body=body, attention_mask=torch.zeros(2, 1, 1, 4), cache=Held(7))
    short = {"cache": Held(4), "cache_position": torch.tensor([7])}  # some tell the length of their window only
    assert window(body=body, **short).position_ST.tolist() == [[7], [7]]
    with pytest.raises(CosaeError, match="contradicts itself"):
        window(**short)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"cache_implementation": "static"}),
        ("llama", {"num_beams": 2}),
        ("opt", {}),  # its head calls its decoder, past the body
    ],
)
def test_sinks_out_reaches_every_generated_token(family: str, padding: str, options: dict[str, Any]) -> None:
    model, sequences = make_model(family), mixed_sequences("left")
    if padding == "none":
        sequences = sequences[:1]
    sae, steps = identity_sae(), []
    sae.metadata["filter"] = to_plain(Filter(FilterPolicy("norm"), median_norm=1e6, seen_tokens=10))

    def note(step: Step) -> None:
        steps.append((step.window.position_ST, step.codes["resid_post.1"].count_B.reshape(step.window.shape) > 0))

    mask = sequences.mask_ST.long()
    with spliced(model, {"resid_post.1": sae}, tokens="sinks_out", on_step=note):
        model.generate(
            sequences.ids_ST, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options
        )
    assert len(steps) == 5
    lengths = mask.sum(1).repeat_interleave(options.get("num_beams", 1))
    for n, (position_ST, used_ST) in enumerate(steps[1:]):
        assert torch.equal(position_ST[:, 0], lengths + n)
        assert used_ST.all() or options.get("num_beams")  # a beam may choose a special token


def test_a_model_that_writes_for_a_smaller_one_says_the_same_and_each_token_is_at_its_place() -> None:
    model, draft, sequences = make_model("llama"), make_model("llama", seed=1), mixed_sequences("left")[:1]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "assistant_model": draft}
    options["attention_mask"] = sequences.mask_ST.long()
    own, steps = model.generate(sequences.ids_ST, **options), []
    with spliced(model, {"resid_post.1": identity_sae()}, error_term=True, on_step=steps.append):
        assert torch.equal(model.generate(sequences.ids_ST, **options), own)
    assert len(steps) > 1
    for step in steps:
        columns = step.window.start + torch.arange(step.window.shape[1])
        assert torch.equal(step.window.position_ST[0], columns)
