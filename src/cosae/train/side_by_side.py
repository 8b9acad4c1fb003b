"""Arms that step at the same time, each on its share of torch's threads.

A step waits for its slowest thread dozens of times; two arms on one thread each wait for nobody, and the same cores do
more. Bits do not depend on it: no sum or product of a step does on the number of threads
(cosae.kernels.deterministic), so an arm alone, in turn or beside another is the same arm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TypeVar

import torch

from cosae.kernels import Workspace
from cosae.kernels.cpu import native
from cosae.train.step import ArmState

Result = TypeVar("Result")

AT_ONCE = 2
"""Arms that step at the same time; each needs a step's memory of its own."""


def n_at_once(n_arms: int, device: str, kernels: Collection[str]) -> int:
    """How many arms step at the same time: AT_ONCE on a CPU where torch has a thread for each, else 1.

    The reference kernel's dense products do depend on the number of threads.
    """
    return 1 if device != "cpu" or "reference" in kernels else max(1, min(AT_ONCE, n_arms, torch.get_num_threads()))


class SideBySide(AbstractContextManager["SideBySide"]):
    """Runs one function over arms, `n` of them at a time; to be closed."""

    def __init__(self, states: Sequence[ArmState]) -> None:
        device = states[0].sae.device.type if states else "cpu"
        self.n = n_at_once(len(states), device, [state.sae.kernel for state in states])
        if not all(state.peers.alone for state in states):  # what processes say to each other needs one order
            self.n = 1
        self._workspaces = [Workspace() for _ in range(self.n)]
        self._pool: ThreadPoolExecutor | None = None
        if self.n > 1:
            self._pool = native.pool_of(self.n, torch.get_num_threads() // self.n)

    def run(self, step: Callable[[ArmState], Result], states: Sequence[ArmState]) -> list[Result]:
        """step(state) of every state, results in their order. Raises what a step raised, once none runs any more.

        An arm that would be left over steps alone, on all threads.
        """
        beside = 0 if self._pool is None else len(states) // self.n * self.n
        results: dict[int, Result] = {}
        waiting = list(range(beside))[::-1]

        def lane(workspace: Workspace) -> None:
            while waiting:
                try:
                    place = waiting.pop()
                except IndexError:  # another lane took it
                    return
                states[place].cache.workspace = workspace
                results[place] = step(states[place])

        if self._pool is not None and beside:
            futures = [self._pool.submit(lane, workspace) for workspace in self._workspaces]
            wait(futures)
            for future in futures:
                future.result()
        for place in range(beside, len(states)):
            states[place].cache.workspace = self._workspaces[0]
            results[place] = step(states[place])
        return [results[place] for place in range(len(states))]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        for workspace in self._workspaces:
            workspace.clear()
