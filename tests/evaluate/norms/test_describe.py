"""Norm facts on sets whose norms are planted."""

import json

import numpy as np
import pytest
import torch

from cosae.errors import CosaeError
from cosae.evaluate.norms.describe import describe_norms, predict_log_norm
from cosae.types import Activations


def planted(log_norm_N, token_N, n_docs=20, dim=8):
    """Activations of random directions with the given log-norms."""
    n = len(log_norm_N)
    direction_ND = torch.randn(n, dim, generator=torch.Generator().manual_seed(1))
    x_ND = direction_ND / direction_ND.norm(dim=1, keepdim=True) * log_norm_N.exp()[:, None]
    doc_N = torch.arange(n) * n_docs // n
    return Activations(
        x_ND=x_ND,
        norm_N=x_ND.norm(dim=1),
        token_N=token_N.int(),
        doc_N=doc_N.int(),
        position_N=(torch.arange(n) % (n // n_docs)).int(),
        index_N=torch.arange(n).int(),
        special_N=torch.zeros(n, dtype=torch.bool),
    )


def random(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_token_identity_predicts_a_norm_made_of_it():
    token_N = torch.arange(4000) % 40
    r2 = predict_log_norm(planted(token_N / 20.0, token_N))["r2"]
    assert r2 == pytest.approx(1.0, abs=1e-3)


def test_token_identity_predicts_the_planted_share():
    token_N = torch.arange(20_000) % 40
    by_token = random(40)
    log_norm_N = by_token[token_N] + by_token.std(correction=0) * random(20_000, seed=2)
    assert predict_log_norm(planted(log_norm_N, token_N))["r2"] == pytest.approx(0.5, abs=0.02)


def test_rare_tokens_do_not_inflate_the_share():
    token_N = torch.arange(4000) // 2  # each id twice, one document holding both or its neighbour
    metadata = predict_log_norm(planted(random(4000), token_N, n_docs=2000))
    assert metadata["r2"] < 0.01
    assert (metadata["split_by"], metadata["folds"], metadata["ids"]) == ("document", 5, 2000)


def test_sinks_are_counted_and_set_apart():
    log_norm_N = 0.1 * random(2000)
    log_norm_N[::100] = float(np.log(50.0))
    activations = planted(log_norm_N, torch.zeros(2000))
    sink_N = activations.position_N == 0
    metadata = describe_norms(activations, sink_N)
    assert metadata["median"] == pytest.approx(1.0, abs=0.02)
    assert metadata["largest_over_median"] == pytest.approx(50.0, rel=0.02)
    assert metadata["position_0_over_median"] == pytest.approx(50.0, rel=0.02)
    assert metadata["position_0_tokens"] == metadata["filter"]["removed_tokens"] == 20
    assert metadata["filter"]["removed_frac"] == pytest.approx(0.01)
    assert metadata["filter"]["variance_frac"] > 0.95
    assert metadata["sinks_out"]["largest_over_median"] < 1.6
    assert metadata["sinks_out"]["cv"] == pytest.approx(0.1, rel=0.1)
    json.dumps(metadata, allow_nan=False)


def test_histogram_counts_every_token_once_and_marks_the_sinks():
    log_norm_N = random(1000)
    activations = planted(log_norm_N, torch.zeros(1000))
    sink_N = activations.norm_N > 5.0
    histogram = describe_norms(activations, sink_N)["histogram"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert sum(histogram["counts"]) == 1000
    assert sum(histogram["sink_counts"]) == int(sink_N.sum()) > 0
    ratios = np.diff(np.log(histogram["edges"]))
    assert ratios == pytest.approx(ratios[0])


def test_sinks_need_not_be_what_the_filter_removes():
    log_norm_N = 0.1 * random(2000)
    log_norm_N[::100] = float(np.log(50.0))
    activations = planted(log_norm_N, torch.zeros(2000))
    metadata = describe_norms(activations, torch.zeros(2000, dtype=torch.bool), sink_N=activations.position_N == 0)
    assert metadata["filter"]["removed_tokens"] == 0
    assert metadata["sinks"] == sum(metadata["histogram"]["sink_counts"]) == 20
    assert metadata["sinks_out"]["largest_over_median"] < 1.6


def test_bare_vectors_have_norms_but_no_tokens_or_positions():
    metadata = describe_norms(Activations.bare(torch.eye(16)))
    assert metadata["log_norm_by_token"] is None
    assert metadata["position_0_over_median"] is None
    assert metadata["cv"] == 0
    assert sum(metadata["histogram"]["counts"]) == 16


def test_padding_enters_nothing():
    plain = planted(random(200), torch.arange(200) % 7)
    padded = Activations.cat([Activations.bare(torch.zeros(3, 8)), plain])
    sink_N = plain.norm_N > 2
    more_N = torch.cat([torch.ones(3, dtype=torch.bool), sink_N])
    assert describe_norms(padded, more_N) == describe_norms(plain, sink_N)
    json.dumps(describe_norms(padded), allow_nan=False)


def test_mistakes_are_named():
    with pytest.raises(CosaeError, match="got none"):
        describe_norms(Activations.bare(torch.zeros(0, 4)))
    with pytest.raises(CosaeError, match="got none"):
        describe_norms(Activations.bare(torch.zeros(3, 4)))
    with pytest.raises(CosaeError, match="got 3 instead"):
        describe_norms(Activations.bare(torch.eye(4)), torch.zeros(3, dtype=torch.bool))
