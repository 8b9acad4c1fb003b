"""The registry of measurements: every row sees the perturbation, and encodes a sample's tokens at most twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cosae
from cosae.activations.perturbation import Perturbation
from cosae.activations.perturbation import apply as perturb
from cosae.activations.sample import Sample, SinkRule
from cosae.errors import CosaeError
from cosae.evaluate.audit import audit
from cosae.evaluate.context import Context, TextProbes
from cosae.evaluate.registry import REGISTRY
from cosae.kernels import reference
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.text.concepts.table import CONCEPTS
from cosae.text.labelled import LabelledTexts
from cosae.types import Activations, Codes

N, D, F = 600, 12, 24


class Planted:
    """A dataset in memory: directions that carry labels, norms that may be perturbed."""

    has_concepts = True
    site = None
    vocabulary = 50
    concepts = CONCEPTS

    def __init__(self, sigma: float = 0.0) -> None:
        self.perturbation = Perturbation(kind="log_normal", sigma=sigma) if sigma else Perturbation()
        self.feature_FD = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5)))[0]

    @property
    def model(self) -> Any:
        raise CosaeError("no model here")

    def _rows(self, seed: int, n: int) -> tuple[Activations, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        truth = torch.rand(n, D, generator=generator) * (torch.rand(n, D, generator=generator) < 0.3)
        x_ND = truth @ self.feature_FD + 0.05 * torch.randn(n, D, generator=generator)
        whole = torch.arange(n, dtype=torch.int32)
        bare = Activations.bare(x_ND)
        known = {"doc_N": whole // 50, "position_N": whole % 50, "token_N": whole % 37}
        return Activations(**{**vars(bare), **known}), truth

    def sample(self, split: str, n_tokens: int, rule: SinkRule | None = None) -> Sample:
        activations, truth = self._rows(1 + (split == "train"), n_tokens)
        labels_NC = np.zeros((n_tokens, len(CONCEPTS)), dtype=bool)
        labels_NC[:, :D] = (truth > 0.2).numpy()
        perturbed = perturb(activations, self.perturbation, 0, "train" if split == "train" else "held_out")
        return Sample.of(
            perturbed,
            rule,
            labels_NC=labels_NC,
            labelled_N=np.ones(n_tokens, dtype=bool),
            truth=Codes.from_dense(truth),
            feature_FD=self.feature_FD,
        )

    def sequences(self, side: str, n_tokens: int) -> Any:
        raise CosaeError("no model here")

    def read_texts(self, texts: Any, context: int) -> Iterator[tuple[list[int], Activations]]:
        activations, _ = self._rows(9, 4 * len(texts))
        at = torch.arange(4 * len(texts), dtype=torch.int32)
        placed = Activations(**{**vars(activations), "doc_N": at // 4, "position_N": at % 4})
        yield list(range(len(texts))), perturb(placed, self.perturbation, 0, "held_out")


def sae_of(score: str, seed: int) -> SAE:
    x_ND = Planted().sample("train", N).activations.x_ND
    sae = SAE.build(d_in=D, d_sae=F, k=4, score=score, seed=seed, sample=x_ND)
    calibrate(sae, x_ND)
    return sae


def context_of(data: Planted, **options: Any) -> Context:
    arms = {"A": [sae_of("inner", 0), sae_of("inner", 1)], "B": [sae_of("cosine_fixed", 0)]}
    return Context(arms, data, tokens=N, resamples=50, min_positives=20, **options)


ON_TOKENS = [name for name, row in REGISTRY.items() if row.reads == "tokens"]
TEXTS = TextProbes(sets=[LabelledTexts.of("set", ["a"] * 80, [i % 2 for i in range(80)])], seeds=1, max_texts=80)


@pytest.mark.parametrize("name", ON_TOKENS)
def test_a_perturbation_reaches_every_measurement(name: str) -> None:
    plain, loud = (REGISTRY[name].measure(context_of(Planted(sigma))) for sigma in (0.0, 2.0))
    assert json.dumps(plain, default=str) != json.dumps(loud, default=str)
    again = REGISTRY[name].measure(context_of(Planted(2.0)))
    assert json.dumps(again, default=str) == json.dumps(loud, default=str)


def test_a_perturbation_reaches_probes_of_texts() -> None:
    plain, loud = (REGISTRY["probing"].measure(context_of(Planted(sigma), texts=TEXTS)) for sigma in (0.0, 2.0))
    assert plain["kind"] == "texts"
    assert plain["summary"] != loud["summary"]


@pytest.mark.parametrize("name", [name for name, row in REGISTRY.items() if row.reads != "tokens"])
def test_the_others_read_no_tokens(name: str) -> None:
    """Weights alone give the same whatever the tokens; what runs the model asks for one."""
    if REGISTRY[name].reads == "model":
        with pytest.raises(CosaeError, match="no model"):
            REGISTRY[name].measure(context_of(Planted()))
    else:
        plain, loud = (REGISTRY[name].measure(context_of(Planted(sigma))) for sigma in (0.0, 2.0))
        assert plain == loud


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Rows that went through `SAE.encode`, and through the scores of all features at once."""
    rows = {"encode": 0, "scores": 0}
    encode, content = SAE.encode, reference.content
    inside = [False]

    def encoding(self: SAE, x: torch.Tensor, *more: Any, **named: Any) -> Codes:
        rows["encode"] += x.reshape(-1, x.shape[-1]).shape[0]
        inside[0] = True
        try:
            return encode(self, x, *more, **named)
        finally:
            inside[0] = False

    def scoring(terms: Any, *more: Any) -> torch.Tensor:
        rows["scores"] += 0 if inside[0] else terms.z_BD.shape[0]
        return content(terms, *more)

    monkeypatch.setattr(SAE, "encode", encoding)
    monkeypatch.setattr(reference, "content", scoring)
    return rows


def test_an_audit_passes_over_its_tokens_twice(counted: dict[str, int]) -> None:
    sae = sae_of("inner", 0)
    counted.update(encode=0, scores=0)
    found = audit(sae, Planted().sample("held_out", N))
    assert counted == {"encode": N, "scores": N}
    assert 0 < found["norm_driven"]["sinks_out"]["share"] < 1


@pytest.mark.parametrize("name", [n for n in ON_TOKENS if n not in ("gradients",)])
def test_a_measurement_passes_over_each_sample_at_most_twice(name: str, counted: dict[str, int]) -> None:
    context = context_of(Planted())
    counted.update(encode=0, scores=0)
    REGISTRY[name].measure(context)
    saes, samples = sum(map(len, context.arms.values())), 2 if REGISTRY[name].needs & {"concepts"} else 1
    assert counted["encode"] <= N * saes * samples
    assert counted["scores"] <= N * saes


def test_sinks_of_both_samples_are_held_against_one_median() -> None:
    context = context_of(Planted(), rule=SinkRule(factor=1.5))
    held_out, train = context.sample(), context.sample("train")
    assert held_out.median_norm == train.median_norm
    assert held_out.sink_N.sum() > N // 50  # position 0 of 12 documents, and long tokens
    assert torch.equal(
        train.sink_N, (train.activations.norm_N >= 1.5 * train.median_norm) | (train.activations.position_N == 0)
    )
    assert cosae.Activations is Activations
