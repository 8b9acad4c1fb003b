"""How much memory this process may use: what the machine has, and what the control groups around it allow.

A process can sit several groups deep (systemd, Slurm, a container), and each group on its path has a limit of its own.
A group's use counts the pages of files that it has read; the kernel drops those when memory is wanted: they are free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")
_DROPPABLE = ("inactive_file", "active_file", "slab_reclaimable")
"""Lines of memory.stat. `file` itself would count shared memory and tmpfs too, which no one can drop."""


@dataclass(frozen=True)
class Group:
    """One control group with a limit, in bytes. used: without what the kernel would drop."""

    limit: int
    used: int


def available_memory(root: Path = ROOT) -> int:
    """Bytes that can still be had: the machine's available memory, or less where a control group allows less.

    root: where /proc and /sys lie, for tests.
    """
    left = (group.limit - group.used for group in groups(root))
    return max(0, min([int(psutil.virtual_memory().available), *left]))


def total_memory(root: Path = ROOT) -> int:
    """Bytes of the machine's memory, or the smallest limit of a control group."""
    return min([int(psutil.virtual_memory().total), *(group.limit for group in groups(root))])


def groups(root: Path = ROOT) -> Iterator[Group]:
    """The control groups (version 2, then 1) around this process that limit its memory, the innermost first."""
    mounts = {"": "sys/fs/cgroup", "memory": "sys/fs/cgroup/memory"}
    names = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    for version, own in _paths(root).items():
        mount = root / mounts[version]
        # inside a container the path is often the host's, which is not there: then the mount itself is the group
        inner = mount / own.lstrip("/")
        place = inner if inner.is_dir() else mount
        for folder in (place, *place.parents):
            if (group := _group(folder, *names[version])) is not None:
                yield group
            if folder == mount:
                break


def _paths(root: Path) -> dict[str, str]:
    """This process' group by interface: "" is version 2, "memory" version 1's controller."""
    found = {"": "/", "memory": "/"}
    with suppress(OSError, UnicodeDecodeError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                found["memory" if controllers else ""] = path
    return found


def _group(folder: Path, limit: str, used: str) -> Group | None:
    """None where there is no limit: no such file, or the word `max`."""
    try:
        allowed, taken = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
    except (OSError, ValueError):
        return None
    return Group(allowed, max(0, taken - _droppable(folder)))


def _droppable(folder: Path) -> int:
    """Version 1 counts a group alone under the plain names and with those below it under `total_`: take the larger."""
    try:
        lines = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return sum(max(int(lines.get(name, 0)), int(lines.get(f"total_{name}", 0))) for name in _DROPPABLE)
    except (OSError, ValueError):
        return 0
