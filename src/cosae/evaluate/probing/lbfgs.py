"""L-BFGS for many smooth convex functions at once, each column of a matrix its own problem.

Columns share the passes over the data that their losses need, and nothing else: each has its own curvature and step,
and one that has arrived is left out of what follows. (scipy's takes all columns for one problem of their joint size,
and needs several times as many passes.) Two-loop recursion: Nocedal & Wright, Numerical Optimization, algorithm 7.4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MEMORY = 20
"""Steps whose curvature is remembered."""
ENOUGH = 1e-4
"""Share of the decrease that the slope promises with which a step is taken."""
HALVINGS = 20
STALLED = 1e-10
"""A step that lowers a loss by a smaller share of it is the last."""

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def minimise(evaluate: Evaluate, n_rows: int, n_columns: int, small: float, max_iterations: int) -> Tensor:
    """(V, C) float64 points at which each column's loss is least, from 0.

    evaluate  (points (V, c), columns (c,) int64) → losses (c,), slopes (V, c), float64
    small     a column has arrived where no slope is larger
    """
    found_VC = torch.zeros(n_rows, n_columns, dtype=torch.float64)
    columns = torch.arange(n_columns)
    point = found_VC.clone()
    loss, slope = evaluate(point, columns)
    moves: list[tuple[Tensor, Tensor, Tensor]] = []
    going = slope.abs().amax(0) > small
    for turn in range(max_iterations):
        if not bool(going.all()):
            columns, loss = columns[going], loss[going]
            point, slope = point[:, going], slope[:, going]
            moves = [(step[:, going], bend[:, going], weight[going]) for step, bend, weight in moves]
        if not len(columns):
            break
        heading = _heading(slope, moves)
        if turn == 0:
            heading = heading / slope.norm(dim=0).clamp_min(1.0)
        step, next_loss, next_slope = _search(evaluate, columns, point, loss, slope, heading)
        bend = next_slope - slope
        along = (step * bend).sum(0)
        weight = torch.where(along > 0, 1 / along, 0.0)
        moves = [*moves[1 - MEMORY :], (step, bend, weight)]
        gained = loss - next_loss
        point, slope = point + step, next_slope
        found_VC[:, columns] = point
        going = (slope.abs().amax(0) > small) & (gained > STALLED * loss.abs())
        loss = next_loss
    return found_VC


def _heading(slope: Tensor, moves: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """(V, c) minus the slope over the curvature that the moves have seen."""
    heading = -slope
    shares = []
    for step, bend, weight in reversed(moves):
        share = weight * (step * heading).sum(0)
        heading = heading - share * bend
        shares.append(share)
    if moves:
        step, bend, weight = moves[-1]
        size = bend.square().sum(0)
        heading = heading * torch.where(weight > 0, 1 / (weight * size).clamp_min(1e-300), 1.0)
    for (step, bend, weight), share in zip(moves, reversed(shares), strict=True):
        heading = heading + (share - weight * (bend * heading).sum(0)) * step
    return heading


def _search(
    evaluate: Evaluate, columns: Tensor, point: Tensor, loss: Tensor, slope: Tensor, heading: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The step of each column, halved until its loss falls enough, with loss and slope there; 0 where none does."""
    promised = (slope * heading).sum(0)
    step, next_loss, next_slope = heading.clone(), loss.clone(), slope.clone()
    length = torch.ones_like(loss)
    trying = torch.arange(len(columns))
    for _ in range(HALVINGS):
        step[:, trying] = length[trying] * heading[:, trying]
        found, found_slope = evaluate(point[:, trying] + step[:, trying], columns[trying])
        good = found <= loss[trying] + ENOUGH * length[trying] * promised[trying]
        next_loss[trying[good]], next_slope[:, trying[good]] = found[good], found_slope[:, good]
        trying = trying[~good]
        if not len(trying):
            break
        length[trying] /= 2
    step[:, trying] = 0.0
    return step, next_loss, next_slope
