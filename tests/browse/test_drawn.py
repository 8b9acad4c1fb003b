"""Features for a report: counts, values and examples are those of the codes, from tokens without sinks."""

from __future__ import annotations

import torch

from cosae.activations.sample import Sample, SinkRule
from cosae.browse.drawn import EXAMPLES, FEATURES, drawn_features
from cosae.evaluate.encoded import encode_sample
from cosae.sae.model import SAE
from cosae.types import Activations

N, PER_DOCUMENT = 600, 40


def test_counts_values_and_examples_are_those_of_the_codes() -> None:
    x_ND = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
    place_N = torch.arange(N, dtype=torch.int32)
    activations = Activations(
        x_ND, x_ND.norm(dim=-1), place_N, place_N // PER_DOCUMENT, place_N % PER_DOCUMENT, place_N % PER_DOCUMENT,
        torch.zeros(N, dtype=torch.bool),
    )  # fmt: skip
    sae = SAE.build(8, 32, "inner", "topk", k=3)
    encoded = encode_sample(sae, Sample.of(activations, SinkRule(100.0)))
    keep_N = encoded.keep["sinks_out"]
    assert int(keep_N.sum()) == N - N // PER_DOCUMENT, "position 0 is a sink"

    def around(doc: int, index: int, before: int, after: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        at = doc * PER_DOCUMENT + index
        return tuple(range(max(at - before, 0), at)), tuple(range(at + 1, at + 1 + after))

    found = drawn_features(encoded, around, lambda token: f"<{token}>", seed=3)
    with torch.no_grad():
        code_NF = sae.encode(x_ND).to_dense() * keep_N[:, None]
    assert len({one["feature"] for one in found}) == FEATURES
    for one in found:
        code_N = code_NF[:, one["feature"]]
        assert one["density"] == int((code_N != 0).sum()) / int(keep_N.sum())
        assert one["largest"] == float(code_N.abs().max())
        best = code_N.abs().view(-1, PER_DOCUMENT).amax(1).sort(descending=True).values[:EXAMPLES]
        assert [example["value"] for example in one["examples"]] == best.tolist()
        first = int(code_N.abs().argmax())
        example = one["examples"][0]
        assert example["token"] == f"<{first}>"
        assert example["before"].endswith(f"<{first - 1}>")
        assert example["after"].startswith(f"<{first + 1}>")
    assert [one["density"] for one in found] == sorted((one["density"] for one in found), reverse=True)
    assert found == drawn_features(encoded, around, lambda token: f"<{token}>", seed=3)
    assert found != drawn_features(encoded, around, lambda token: f"<{token}>", seed=4)
