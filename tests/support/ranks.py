"""Several processes on this machine, as torchrun would start them; each runs one function."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch.distributed import TCPStore


def _work(rank: int, n: int, port: int, folder: str, call: Callable[..., Any], args: Sequence[Any]) -> None:
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in known.items()}, TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    answer: tuple[bool, Any]
    try:
        answer = True, call(*args)
    except BaseException as error:
        answer = False, (type(error).__name__, str(error), traceback.format_exc())
    (Path(folder) / f"{rank}.part").write_bytes(pickle.dumps(answer))
    (Path(folder) / f"{rank}.part").rename(Path(folder) / str(rank))


def start_ranks(n: int, folder: Path, call: Callable[..., Any], *args: Any) -> Any:
    """The processes, and the store they meet at: both have to be kept."""
    folder.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = (n, store.port, str(folder), call, args)
    return multiprocessing.start_processes(_work, common, n, join=False, start_method="spawn"), store


def answers(context: Any, n: int, folder: Path, timeout: float = 300) -> list[tuple[bool, Any] | None]:
    """(whether it returned, what) of each rank once all have ended; None of one that was killed."""
    for process in context.processes:
        process.join(timeout)
    assert all(process.exitcode is not None for process in context.processes), "a rank still waits"
    return [pickle.loads((folder / str(r)).read_bytes()) if (folder / str(r)).exists() else None for r in range(n)]


def run_ranks(n: int, folder: Path, call: Callable[..., Any], *args: Any) -> list[Any]:
    """What `call(*args)` returns on each of n ranks; fails with the traceback of one that raises."""
    context, _store = start_ranks(n, folder, call, *args)
    found = answers(context, n, folder)
    for one in found:
        assert one is not None, "a rank was killed"
        assert one[0], one[1][2]
    return [one[1] for one in found if one is not None]
