"""Free memory: limits of nested control groups, the page cache that a group's use counts, machines without any."""

from __future__ import annotations

from pathlib import Path

import psutil

from cosae.io.memory import available_memory, groups, total_memory

GB = 2**30


def _group(folder: Path, limit: object, used: int, v1: bool = False, **stat: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))


def _in(root: Path, line: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"9:name=systemd:/\n{line}\n")


def test_page_cache_is_free(tmp_path: Path) -> None:
    _in(tmp_path, "0::/")
    cache = {"file": 14 * GB, "inactive_file": 9 * GB, "active_file": 4 * GB, "shmem": GB}
    _group(tmp_path / "sys/fs/cgroup", 16 * GB, 15 * GB, **cache)
    (group,) = groups(tmp_path)
    assert (group.limit, group.used) == (16 * GB, 2 * GB)  # shared memory is not the kernel's to drop
    assert total_memory(tmp_path) == min(16 * GB, psutil.virtual_memory().total)


def test_the_tightest_of_nested_groups_binds(tmp_path: Path) -> None:
    _in(tmp_path, "0::/slurm/job_7/step_0")
    outer = tmp_path / "sys/fs/cgroup/slurm"
    _group(outer, "max", 9 * GB)
    _group(outer / "job_7", 2 * GB, GB, inactive_file=GB // 2)
    _group(outer / "job_7/step_0", 3 * GB, GB)
    assert [group.limit for group in groups(tmp_path)] == [3 * GB, 2 * GB]
    assert available_memory(tmp_path) == 3 * GB // 2


def test_version_1_and_a_path_that_only_the_host_knows(tmp_path: Path) -> None:
    _in(tmp_path, "4:memory:/docker/0123")
    _group(tmp_path / "sys/fs/cgroup/memory", GB, GB // 2, v1=True, inactive_file=0, total_inactive_file=GB // 4)
    assert available_memory(tmp_path) == 3 * GB // 4
    _group(tmp_path / "sys/fs/cgroup/memory/docker/0123", GB // 2, 0, v1=True)
    assert available_memory(tmp_path) == GB // 2


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    _in(tmp_path, "0::/")
    _group(tmp_path / "sys/fs/cgroup", 1000, 2000)
    assert available_memory(tmp_path) == 0


def test_without_control_groups_the_machine_answers(tmp_path: Path) -> None:
    """As on macOS, where there is no /proc either."""
    assert list(groups(tmp_path)) == []
    assert 0 < available_memory(tmp_path) < total_memory(tmp_path) == psutil.virtual_memory().total
