"""Measurements of an SAE on activations, sinks given by hand: what the tests of single measurements call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cosae.activations.sample import Sample, SinkRule
from cosae.activations.sinks import median_norm
from cosae.evaluate import audit as audits
from cosae.evaluate import reconstruction
from cosae.evaluate.encoded import BATCH_TOKENS, EncodedPass, encode_sample, resampling_units
from cosae.evaluate.matching import match
from cosae.evaluate.norms import driven, sinks
from cosae.evaluate.norms.counterfactual import at_median
from cosae.types import Activations, Codes


def sample_of(x: Activations, sink_N: Tensor | None = None) -> Sample:
    """A sample with these sinks, none by default."""
    sink_N = torch.zeros(len(x), dtype=torch.bool) if sink_N is None else sink_N
    return Sample(x, sink_N, SinkRule(10.0, median_norm(x.norm_N[x.norm_N > 0]) if bool((x.norm_N > 0).any()) else 0.0))


def encoded(sae: Any, x: Activations, sink_N: Tensor | None = None, batch_tokens: int = BATCH_TOKENS) -> EncodedPass:
    return encode_sample(sae, sample_of(x, sink_N), batch_tokens)


def measure(sae: Any, x: Activations, keep_N: Tensor | None = None, batch_tokens: int = BATCH_TOKENS) -> dict[str, Any]:
    """Reconstruction of the tokens kept."""
    found = encoded(sae, x, None if keep_N is None else ~keep_N, batch_tokens)
    return reconstruction.summarise(found, "sinks_out")


def measure_both(sae: Any, x: Activations, sink_N: Tensor, batch_tokens: int = BATCH_TOKENS) -> dict[str, Any]:
    """Reconstruction with sinks in and out."""
    return reconstruction.measure(encoded(sae, x, sink_N, batch_tokens))


def norm_driven(
    sae: Any,
    x: Activations,
    sink_N: Tensor | None = None,
    *,
    median_r: float | None = None,
    batch_tokens: int = BATCH_TOKENS,
    **options: Any,
) -> dict[str, Any]:
    found = encoded(sae, x, sink_N, batch_tokens)
    return driven.norm_driven(found, at_median(found, median_r), **options)


def paired_norm_differences(saes: Mapping[str, Any], x: Activations, **options: Any) -> list[dict[str, Any]]:
    found = {name: at_median(encoded(sae, x)) for name, sae in saes.items()}
    return driven.paired_norm_differences(found, resampling_units(x.doc_N)[1], **options)


def firing_norms(
    sae: Any, x: Activations, sink_N: Tensor | None = None, *, codes: Codes | None = None, batch_tokens: int = 4096
) -> dict[str, Any]:
    found = encoded(sae, x, sink_N, batch_tokens)
    return driven.firing_norms(found if codes is None else replace(found, codes=codes))


def sink_metrics(sae: Any, x: Activations, sink_N: Tensor, batch_tokens: int = BATCH_TOKENS) -> dict[str, Any]:
    return sinks.sink_metrics(encoded(sae, x, sink_N, batch_tokens))


def match_saes(a: Any, b: Any, x: Activations, sink_N: Tensor | None = None, **options: Any) -> match.Matching:
    sample = sample_of(x, sink_N)
    return match.match_saes(encode_sample(a, sample), encode_sample(b, sample), **options)


def audit(sae: Any, x: Activations, sink_N: Tensor, **options: Any) -> dict[str, Any]:
    return audits.audit(sae, sample_of(x, sink_N), **options)
