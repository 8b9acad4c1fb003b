"""What no SAE accepts, and the sentence it answers with. Every message is one line that says what came."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from cosae import SAE, Codes, CosaeError
from cosae.sae.config import SAEConfig
from cosae.sae.frame import FRAMES
from cosae.sae.selector import SELECTORS


def refused(message: str, call: Any, *arguments: Any, **named: Any) -> str:
    """The one-line message of the CosaeError that the call raises."""
    with pytest.raises(CosaeError, match=message) as caught:
        call(*arguments, **named)
    assert type(caught.value) is CosaeError
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("frame", FRAMES)
def test_non_finite_input_is_named_with_its_position(frame: str, selector: str, value: float) -> None:
    sae = SAE.build(6, 11, "cosine", selector, 3, 0, frame)
    cube = torch.ones(2, 4, 6)
    cube[1, 2, 5] = value
    for x, at in ((cube, r"\[1, 2, 5\]"), (cube.reshape(8, 6), r"\[6, 5\]"), (cube[1, 2], r"\[5\]")):
        for call in (sae.encode, sae, sae.scores):
            refused(f"Got {value} at position {at} \\(1 non-finite", call, x)
    refused("Got inf|Got nan|Got -inf", sae.encode, cube.half())
    cube[0] = math.nan
    refused(r"Got nan at position \[0, 0, 0\] \(25 non-finite", sae.encode, cube)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_row_whose_square_overflows_is_refused_wherever_it_comes_in(frame: str) -> None:
    """Or it would become NaN, or no codes, without a word."""
    sae = SAE.build(6, 11, "cosine", "topk", 3, 0, frame)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.ones(2, 4, 6, dtype=dtype)
        x[1, 2] = 1e19
        for call in (sae.encode, sae, sae.scores):
            refused(r"at most 1.8e\+19, .*Got 2.45e\+19 at row 6 \(1 such", call, x)
        x[1, 2] = 1e18
        assert bool(torch.isfinite(sae(x)).all())


def test_large_finite_values_pass_the_door() -> None:
    """The sum of fp16 values may overflow where no value does."""
    sae = SAE.build(64, 11, "inner", "topk", 3)
    assert bool(torch.isfinite(sae(torch.full((2, 64), 6e4, dtype=torch.float16))).all())


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 5), torch.tensor(1.0), torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.bool),
        torch.zeros(3, 6, dtype=torch.complex64), torch.zeros(3, 6).to(torch.float8_e4m3fn), [[0.0] * 6], None,
    ],
)  # fmt: skip
def test_other_inputs(x: Tensor) -> None:
    text = refused(r"shape \(\.\.\., 6\)", SAE.build(6, 11, k=3).encode, x)
    assert "Got" in text


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"k": 12}, "at most d_sae.*keep 12"),
        ({"k": 0}, "whole number.*Got 0"),
        ({"k": 2.0}, "k must be a whole number"),
        ({"d_in": -1}, "d_in must be a whole number"),
        ({"d_sae": True}, "d_sae must be a whole number"),
        ({"score": "cosin"}, "score .*inner, .*Got 'cosin'"),
        ({"selector": "top_k"}, "selector .*batch_topk, .*Got 'top_k'"),
        ({"frame": "none"}, "frame .*raw, .*Got 'none'"),
        ({"prefixes": (5, 3)}, r"ascending .*Got \[5, 3\]"),
        ({"prefixes": (5, 12)}, "between 1 and d_sae = 11"),
        ({"prefixes": (0, 5)}, "prefixes must be ascending"),
        ({"score": "cosine_grouped", "n_groups": 12}, "n_groups must be at most d_sae = 11"),
        ({"selector": "gated", "bias": False}, "gated selector needs the score's bias"),
        ({"bandwidth": 0.0}, "bandwidth must lie between 0 and 2"),
        ({"bandwidth": math.nan}, "bandwidth must lie between 0 and 2"),
        ({"dtype": torch.bfloat16}, "float32 or torch.float64"),
        ({"kernel": "fast"}, "kernel must be one of .*Got 'fast'"),
        ({"a_init": math.inf}, "a_init must be a finite number"),
        ({"b_init": math.nan}, "b_init must be a finite number"),
        ({"b_init": "sqrt"}, "b_init .*sqrt_d, .*Got 'sqrt'"),
        ({"b_init": "norm"}, "needs a sample"),
        ({"centre": "median"}, "centre .*geometric_median, .*Got 'median'"),
        ({"sample": torch.zeros(3, 5)}, r"sample .*\(n, 6\).*Got \(3, 5\)"),
        ({"sample": torch.zeros(0, 6)}, "sample must have shape"),
        ({"sample": torch.zeros(4, 6)}, "at least one row that is not all zero"),
        ({"sample": torch.full((4, 6), math.nan)}, r"Got nan at position \[0, 0\]"),
    ],
)  # fmt: skip
def test_unbuildable(named: dict[str, Any], message: str) -> None:
    refused(message, SAE.build, **{"d_in": 6, "d_sae": 11, "k": 3, **named})


def test_prefixes_end_at_d_sae() -> None:
    assert SAEConfig(6, 11, k=3, prefixes=(2, 5)).prefixes == (2, 5, 11)
    assert SAEConfig(6, 11, k=3, prefixes=(2, 11)).prefixes == (2, 11)
    assert SAEConfig(6, 11, k=3).prefixes == ()


def test_codes_that_do_not_fit() -> None:
    sae = SAE.build(6, 11, k=3)
    other = SAE.build(6, 12, k=3)
    refused("d_sae = 11 .*Got 12", sae.decode, other.encode(torch.ones(2, 6)))
    unit = SAE.build(6, 11, k=3, frame="unit")
    codes = unit.encode(torch.ones(2, 6))
    refused("'unit' frame puts a norm back", unit.decode, codes.to_dense())
    refused("'unit' frame puts a norm back", unit.decode, Codes.from_dense(codes.to_dense()))
    refused("of 1 tokens, the codes of 2", unit.decode, codes.to_dense(), codes.norm_stats[:1])
    refused("norm-restoring", SAE.build(6, 11, k=3, norm_restoring=True).decode, torch.ones(2, 11))


def test_the_front_door_opens_fast() -> None:
    """`import cosae` costs less than a second of processor time over torch; no warning, no model library."""
    program = (
        "import torch, time; t = time.process_time(); import cosae; t = time.process_time() - t; "
        "import sys; heavy = {'transformers', 'datasets', 'matplotlib', 'pyarrow', 'sklearn'} & set(sys.modules); "
        "assert not heavy, heavy; print(t)"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.0
