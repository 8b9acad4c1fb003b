"""What each format of the screen lets pass and takes: `python -m benchmarks.screen`.

For shapes A, B and the demo's, with an arm trained for some steps: the formats' errors, the exact scores that each
takes for every entry kept, its time from the rows to the survivors by turns, and how many would pass at a part of
int8's margin (the curve): what a sharper bound could save. All formats must find the same survivors, or nothing is
printed.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from benchmarks.cosae_steps import NEVER, make_arm, make_product
from benchmarks.shapes import SHAPES, Shape, draw_batches
from benchmarks.timing import CLOCKS, describe_machine, interleave
from cosae.kernels import ScoreTerms, StepCache, keep_memory, reference
from cosae.kernels.select import screen
from cosae.kernels.select.pick import FORMATS, exact_int8
from cosae.kernels.select.search import HINT_SHARE
from cosae.kernels.select.survivors import screened
from cosae.train.step import train_step

PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLE = 256
"""Tokens of the curve."""


def trained_terms(score: str, shape: Shape, steps: int, batches: list[Tensor]) -> tuple[ScoreTerms, float]:
    """Terms of one batch after some steps, and the smallest score kept of the last."""
    state = make_arm(score, shape, batches[0])
    for step in range(steps):
        train_step(state, batches[step % len(batches)], step, 1.0, NEVER)
    with torch.no_grad():
        terms = state.sae.score.terms(state.sae._framed(batches[steps % len(batches)]), cache=StepCache())
    assert state.hint is not None
    return terms.detached(), state.hint


def curve(terms: ScoreTerms, threshold: float, n_kept: int) -> list[float]:
    """Entries of some tokens above the threshold less each of PARTS of int8's margin, for every entry kept."""
    some = terms.of_tokens(torch.arange(0, terms.n_tokens, max(1, terms.n_tokens // SAMPLE)))
    score_BF = reference.scores(some)
    norm_B, norm_F = screen.norms(some.z_BD, 1e-8), screen.norms(some.rows_FD, 1e-12)
    cosine_BF = (some.z_BD @ some.rows_FD.T) / norm_B[:, None] / norm_F
    error_B = screen.rounded(some.z_BD, 1.0 / norm_B, torch.int8)[1]
    error_F = screen.rounded(some.rows_FD, 1.0 / norm_F, torch.int8)[1]
    gain_BF = (score_BF - (0.0 if some.bias_F is None else some.bias_F)) / cosine_BF
    margin_BF = (error_B[:, None] + error_F) * gain_BF
    kept = n_kept * some.n_tokens / terms.n_tokens
    return [float((score_BF > threshold - part * margin_BF).sum()) / kept for part in PARTS]


def show(label: str, score: str, args: argparse.Namespace) -> None:
    """One table: a line for each format, and the curve."""
    shape = SHAPES[label]
    terms, hint = trained_terms(score, shape, args.steps, draw_batches(shape))
    n_kept = shape.n * shape.k
    threshold_F = torch.full((shape.m,), HINT_SHARE * hint)
    names = [name for name in FORMATS if name != "int8" or exact_int8(shape.d)]
    answers = {name: screened(terms, threshold_F, 3 * n_kept + 4096, FORMATS[name]) for name in names}
    found = {name: answer for name, (answer, _) in answers.items()}
    first = found[names[0]]
    assert first is not None
    for name, one in found.items():
        if one is None or not (torch.equal(one.token_S, first.token_S) and torch.equal(one.score_S, first.score_S)):
            raise SystemExit(f"shape {label}, {score}: not reported, {name} finds other survivors")
    calls = {name: (lambda n=name: screened(terms, threshold_F, 3 * n_kept + 4096, FORMATS[n])) for name in names}
    product = make_product(shape)
    seconds = interleave({**calls, "product": lambda: product(terms.z_BD)}, args.rounds, args.clock)
    ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    print(f"\n**Shape {label}** ({shape}), {score}, after {args.steps} steps, ms by {args.clock}\n")
    print("| screen | error of tokens | of rows | exact scores ÷ kept | ms | × fp32 product |")
    print("|---|---|---|---|---|---|")
    for name in names:
        error_B = screen.rounded(terms.z_BD, 1.0 / screen.norms(terms.z_BD, 1e-8), FORMATS[name])[1]
        error_F = screen.rounded(terms.rows_FD, 1.0 / screen.norms(terms.rows_FD, 1e-12), FORMATS[name])[1]
        errors = [f"{100 * float(e.median()):.2f} %" for e in (error_B, error_F)]
        tested, slower = f"{answers[name][1] / n_kept:.2f}", f"{ms[name] / ms['product']:.2f}"
        print("| " + " | ".join([name, *errors, tested, f"{ms[name]:.1f}", slower]) + " |")
    print(f"| bare fp32 product | | | | {ms['product']:.1f} | 1.00 |")
    parts = zip(PARTS, curve(terms, HINT_SHARE * hint, n_kept), strict=True)
    passed = ", ".join(f"{part:g}: {x:.2f}" for part, x in parts)
    print(f"\npassing ÷ kept at a part of int8's margin: {passed}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["A", "B", "demo"])
    parser.add_argument("--scores", nargs="+", default=["inner", "cosine"])
    parser.add_argument("--steps", type=int, default=30, help="training steps before the screen is looked at")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    print(describe_machine())
    for label in args.shapes:
        for score in args.scores:
            show(label, score, args)


if __name__ == "__main__":
    main()
