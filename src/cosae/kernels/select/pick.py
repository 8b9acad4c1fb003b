"""Which screen serves: fp32, bf16 or int8, the one that costs least here. All three give the same entries to the bit.

    cost = seconds of the screen of all rows, by the clock at this shape + survivors tested · seconds of an exact score

The screen is timed whole (rows rounded, product, comparison), at the step's own tokens and width, on a slice of rows;
what a coarser screen costs more in exact scores is known from the arm's own last search in it, so that one whose error
bound lets too much pass here (a wide distribution, outlier dimensions) is left for another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, partial

import torch

from cosae.errors import check_choice
from cosae.kernels.cache import Choices
from cosae.kernels.cpu import native, sums
from cosae.kernels.select.clock import Clock, default_file
from cosae.kernels.terms import Entries, ScoreTerms

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
PRODUCTS = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.int8: torch.int32}
"""What the product of two of a format is."""
SMALL = 1 << 26
"""Multiply-adds below which no clock is asked: the fp32 product takes a millisecond or less."""
ROWS = 1024
"""Encoder rows of a timed screen."""
DOTS = 1 << 14
"""Exact scores that are timed."""
WIDEST_INT8 = 100_000
"""Widest rows whose int8 products fit into 32 bits, with room."""

CLOCK = Clock(file=default_file())

Screen = Callable[[ScoreTerms, str], object]
"""Runs the search's screen of some terms in a format, above a threshold that nothing passes."""


def forced() -> str | None:
    """The format that COSAE_SCREEN names, or None. Raises CosaeError for another word."""
    name = os.environ.get("COSAE_SCREEN") or None
    if name is not None:
        check_choice("COSAE_SCREEN", name, tuple(FORMATS))
    return name


def pick(terms: ScoreTerms, n_wanted: int, screen: Screen, choices: Choices) -> str:
    """The format that a search for about n_wanted entries of these terms takes."""
    n_tokens, width, n_features = terms.n_tokens, terms.z_BD.shape[1], terms.n_features
    name = forced()
    if name is not None and (name != "int8" or exact_int8(width)):
        return name
    if n_tokens * width * n_features < SMALL:
        return "fp32"
    seconds = timed(n_tokens, width, n_features, screen)
    dot = seconds.pop("dot")
    choices.seconds = {name: s * n_features / min(ROWS, n_features) for name, s in seconds.items()}
    cost = {name: s + dot * choices.tested.get(name, n_wanted) for name, s in choices.seconds.items()}
    return min(cost, key=lambda name: cost[name])


def timed(n_tokens: int, width: int, n_features: int, screen: Screen) -> dict[str, float]:
    """Seconds by format of a screen of at most ROWS rows, and of one exact score ("dot"); tokens by powers of two."""
    n_tokens, n_rows = 1 << (n_tokens - 1).bit_length(), min(ROWS, n_features)
    terms = lru_cache(maxsize=1)(lambda: _noise(n_tokens, width, n_rows))
    formats = [name for name in FORMATS if name != "int8" or exact_int8(width)]
    contestants: dict[str, Callable[[], object]] = {name: partial(_run, screen, terms, name) for name in formats}
    entries = lru_cache(maxsize=1)(lambda: _some(terms()))
    contestants["dot"] = lambda: sums.entry_dots(terms().z_BD, terms().rows_FD, entries())
    loops = "numba" if native.serves() else "torch"
    found = CLOCK.seconds(f"screen of {n_tokens} x {width} x {n_rows} by {loops}", contestants)
    found = {name: s for name, s in found.items() if name in contestants}
    return found | {"dot": found.get("dot", 0.0) / DOTS}


def _run(screen: Screen, terms: Callable[[], ScoreTerms], name: str) -> None:
    screen(terms(), name)


@lru_cache(maxsize=64)
def exact_int8(width: int) -> bool:
    """Whether torch multiplies int8 matrices of this width here, without saturating at 16 bits."""
    signs = torch.ones(16, dtype=torch.int8)
    signs[::2] = -1
    full_RD = signs[:, None] * torch.full((16, width), 127, dtype=torch.int8)
    try:
        found = torch._int_mm(full_RD, full_RD.T)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    wanted = torch.outer(signs.long(), signs.long()) * (127 * 127 * width)
    return width <= WIDEST_INT8 and torch.equal(found.long(), wanted)


def _noise(n_tokens: int, width: int, n_rows: int) -> ScoreTerms:
    """Inner products of random tokens and rows."""
    draw = torch.Generator().manual_seed(0)
    z_BD, rows_FD = (torch.randn(n, width, generator=draw) for n in (n_tokens, n_rows))
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    return ScoreTerms(z_BD, rows_FD, None, one, zero, 1, torch.ones(n_tokens, dtype=torch.bool), plain=True)


def _some(terms: ScoreTerms) -> Entries:
    """DOTS random entries."""
    flat_E = torch.randint(terms.n_tokens * terms.n_features, (DOTS,), generator=torch.Generator().manual_seed(0))
    flat_E = flat_E.sort().values
    return sums.grouped(Entries(flat_E // terms.n_features, flat_E % terms.n_features), terms)
