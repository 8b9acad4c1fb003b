"""What features fire on, against direct computation on the embedded model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cosae.activations.filter import Filter, FilterPolicy
from cosae.browse import top
from cosae.browse.top import read_features
from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.models.embedded import load
from cosae.models.sites import resolve_site
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.types import Sequences

N = 4
"""Examples kept."""


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """An untrained SAE on 12 sequences of random tokens, some of them padded, with BOS first."""
    model, tokenizer = load()
    generator = torch.Generator().manual_seed(0)
    ids_ST = torch.randint(10, len(tokenizer), (12, 20), generator=generator)
    ids_ST[:, 0] = tokenizer.bos_token_id
    mask_ST = torch.ones_like(ids_ST, dtype=torch.bool)
    mask_ST[3, 11:] = False
    index_ST = torch.arange(20, dtype=torch.int32).expand(12, 20)
    special_ST = torch.isin(ids_ST, torch.tensor(tokenizer.all_special_ids))
    sequences = Sequences(ids_ST, torch.zeros_like(index_ST), index_ST, mask_ST, special_ST, ("one",))
    site = resolve_site(model, "resid_post.3")
    x_ND = capture(model, sequences, site)[site.name].x_ND
    sae = SAE.build(192, 64, "inner", k=6, sample=x_ND)
    calibrate(sae, x_ND)
    return {"model": model, "site": site, "sae": sae, "sequences": sequences}


def direct(parts: dict[str, Any]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Activations, dense codes, and the tokens that count: no special ones, none of the longest."""
    found = capture(parts["model"], parts["sequences"], parts["site"])[parts["site"].name]
    with torch.no_grad():
        return found, parts["sae"].encode(found.x_ND).to_dense(), ~found.special_N


@pytest.mark.parametrize("chunk", [8192, 60])
def test_counts_largest_values_and_examples_are_those_of_all_codes(
    chunk: int, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top, "CHUNK_TOKENS", chunk)
    fitted = Filter(FilterPolicy(factor=1.2), float(direct(parts)[0].norm_N.median()), 100)
    found = read_features(**parts, fitted=fitted, n_examples=N)
    activations, code_NF, counted_N = direct(parts)
    counted_N = counted_N & fitted.keep(activations)
    assert 0 < int(counted_N.sum()) < len(counted_N) - 12, "the filter leaves some out"
    assert (found.n_tokens, found.n_left_out) == (int(counted_N.sum()), int((~counted_N).sum()))
    code_NF = torch.where(counted_N[:, None], code_NF, 0.0)
    np.testing.assert_array_equal(found.count_F, (code_NF != 0).sum(0))
    np.testing.assert_allclose(found.density_F, (code_NF != 0).sum(0) / counted_N.sum())
    np.testing.assert_allclose(found.largest_F, code_NF.abs().amax(0), rtol=1e-6)
    row_N = parts["sequences"].mask_ST.nonzero()[:, 0]
    for feature in range(64):
        best = sorted((float(code_NF[row_N == row, feature].amax()) for row in range(12)), reverse=True)
        examples = found.examples(feature)
        assert [e.value for e in examples] == pytest.approx([value for value in best if value > 0][:N])
        for example in examples:
            at = (code_NF[:, feature] - example.value).abs().argmin()
            row = parts["sequences"].ids_ST[row_N[at]][parts["sequences"].mask_ST[row_N[at]]]
            assert example.ids_T == tuple(row.tolist())
            assert example.ids_T[example.at] == int(activations.token_N[at])


def test_the_share_of_firings_by_norm_is_the_jaccard_distance_to_equal_lengths(parts: dict[str, Any]) -> None:
    found = read_features(**parts)
    activations, code_NF, counted_N = direct(parts)
    sae = parts["sae"]
    from_centre_ND = activations.x_ND[counted_N] - sae.centre_D.detach()
    length_N = from_centre_ND.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        then_NF = sae.encode(sae.centre_D + from_centre_ND / length_N * length_N.median()).to_dense() != 0
    now_NF = code_NF[counted_N] != 0
    either_F, both_F = (now_NF | then_NF).sum(0).double(), (now_NF & then_NF).sum(0).double()
    assert float((1 - both_F / either_F).nanmean()) > 0.05
    np.testing.assert_allclose(found.driven_F, torch.where(either_F > 0, 1 - both_F / either_F, torch.nan), atol=1e-12)
    unit = SAE.build(192, 64, "inner", "topk", k=6, frame="unit")
    assert np.nanmax(read_features(**{**parts, "sae": unit}).driven_F) == 0


def test_signed_codes_are_ranked_by_size(parts: dict[str, Any]) -> None:
    signed = SAE.build(192, 32, "inner", "abs_topk", k=6)
    found = read_features(**{**parts, "sae": signed})
    _, code_NF, counted_N = direct({**parts, "sae": signed})
    np.testing.assert_allclose(found.largest_F, code_NF[counted_N].abs().amax(0), rtol=1e-6)
    assert (found.value_Fn < 0).any()


def test_what_it_refuses(parts: dict[str, Any]) -> None:
    with pytest.raises(CosaeError, match="no inference threshold"):
        read_features(**{**parts, "sae": SAE.build(192, 32, k=4)})
    with pytest.raises(CosaeError, match="has width 192"):
        read_features(**{**parts, "sae": SAE.build(16, 32, "inner", "topk", k=4)})
    with pytest.raises(CosaeError, match="Feature 64 is out of range"):
        read_features(**parts).examples(64)
    alone = parts["sequences"]
    nothing = read_features(**{**parts, "sequences": replace(alone, special_ST=torch.ones_like(alone.special_ST))})
    assert (nothing.n_tokens, nothing.examples(3)) == (0, [])
    assert np.isnan(nothing.driven_F).all()
