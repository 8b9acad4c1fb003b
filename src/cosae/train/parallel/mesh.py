"""The processes that torchrun started, as the ranks of one run: a mesh of three axes, `data`, `feature` and `arm`."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cosae.activations.stream import Source
from cosae.errors import CosaeError
from cosae.train.parallel.config import ParallelConfig, started
from cosae.train.parallel.faults import Faults
from cosae.train.parallel.peers import MeshPeers
from cosae.train.parallel.source import SharedSource
from cosae.train.parallel.wire import Wire
from cosae.train.ranks import ONE, Ranks

T = TypeVar("T")
_RUNS = itertools.count()
TORCHRUN = "torchrun --nproc-per-node {n} -m cosae …"


def restarted() -> bool:
    """Whether torchrun started the processes anew after one had failed."""
    return started() > 1 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_world(config: ParallelConfig) -> None:
    """Raises CosaeError where torchrun started another number of processes than the mesh has."""
    if (n := started()) == config.n:
        return
    if n == 1:
        start = TORCHRUN.format(n=config.n)
        raise CosaeError(f"the mesh {config} needs {config.n} processes: start it with `{start}`, or drop --parallel.")
    raise CosaeError(
        f"torchrun started {n} processes, and the mesh {config} has {config.n}: name data, feature and arm whose "
        f"product is {n} (--parallel data={n})."
    )


def local_device(device: str) -> str:
    """This process' device: of several GPUs the one with its number on this machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and started() > 1 else device


@contextmanager
def joined(config: ParallelConfig, device: str) -> Iterator[Ranks]:
    """The ranks of a run, until the block ends; `ONE` where there is but one process. Raises CosaeError where torchrun
    started another number of processes; what ends the block on one rank ends it on all, and is said once."""
    check_world(config)
    if config.n == 1:
        yield ONE
        return
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(local_device("cuda"))
    patience = timedelta(seconds=config.timeout)
    common, rank, n = next(iter(rendezvous("env://", timeout=patience)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"cosae/{attempt}/{next(_RUNS)}", common)  # nothing of an earlier run is found
    faults = Faults(store, rank, n, config.timeout)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=n, timeout=patience
    )
    try:
        yield MeshRanks(config, kind, faults)
    except CosaeError as error:
        faults.leave(str(error))
        if faults.speaks():
            raise
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if rank == 0:
            raise
        raise SystemExit(130) from None
    except BaseException as error:
        faults.leave(f"{type(error).__name__}: {error}")
        faults.speaks()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class MeshRanks(Ranks):
    """One of several processes."""

    def __init__(self, config: ParallelConfig, kind: str, faults: Faults) -> None:
        self.n, self.rank, self.config, self.faults = config.n, dist.get_rank(), config, faults
        self.device = torch.device(local_device("cuda") if kind == "cuda" else "cpu")
        shape, names = (config.arm, config.data, config.feature), ("arm", "data", "feature")
        mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
        self.arm_place = mesh.get_local_rank("arm")
        self.wires = {
            axis: Wire(mesh.get_group(axis), size, mesh.get_local_rank(axis), faults.guard)
            for axis, size in (("data", config.data), ("feature", config.feature))
        }
        self.everyone = Wire(dist.group.WORLD, self.n, self.rank, faults.guard)
        self.peers = MeshPeers(self.wires["data"], self.wires["feature"], self.device)

    def mine(self, arms: Sequence[T]) -> list[T]:
        return list(arms[self.arm_place :: self.config.arm])

    def any(self, flag: bool) -> bool:
        return bool(self.everyone.sum_(torch.tensor([int(flag)], device=self.device)).item())

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.n
        with self.faults.guard():
            dist.all_gather_object(found, value)
        return found

    def first(self, call: Callable[[], T]) -> T | None:
        value, fault = None, None
        if self.leads:
            try:
                value = call()
            except CosaeError as error:
                fault = error
        told = self.gather(None if fault is None else str(fault))[0]
        if fault is not None:
            raise fault
        if told is not None:
            raise CosaeError(told)
        return value

    def agree(self, facts: Mapping[str, Any]) -> None:
        every = self.gather({name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()})
        for rank, theirs in enumerate(every):
            differing = [name for name in sorted({*theirs, *every[0]}) if theirs.get(name) != every[0].get(name)]
            if differing:
                what = ", ".join(differing)
                raise CosaeError(f"rank {rank} of {self.n} differs from rank 0 in {what}: start all ranks alike.")

    def source(self, source: Source, prefetch_chunks: int) -> Source:
        def spread(x: torch.Tensor, rank: int) -> None:
            self.everyone.sent += x.nbytes if rank == self.rank else 0
            with self.faults.guard():
                dist.broadcast(x, src=rank)

        return SharedSource(source, self.rank, self.n, prefetch_chunks, self.gather, spread, self.device)

    def leave(self) -> None:
        dist.destroy_process_group()
