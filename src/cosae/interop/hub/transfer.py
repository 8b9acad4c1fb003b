"""The Hugging Face hub: SAEs pushed as SAELens lays them out, with a model card; pulled as data and checked.

    REPO[:PATH]   OWNER/NAME, and a folder in it: me/saes, me/saes:layer_5/cosine

A push is one commit: all of it arrives or none. Of an SAE's metadata only what cosae.interop.public lets through is
pushed; `preview` shows every text that would leave. A pull downloads into a folder of its own, reads the SAE as
`cosae.load` does (digests, shapes, stored probes) and only then puts it in place. Tokens come from the argument,
HF_TOKEN or `hf auth login`; the server from the argument or HF_ENDPOINT.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cosae.errors import CosaeError
from cosae.interop import cosine_paper, gemma_scope, sparsify
from cosae.interop.dictionary_learning import read as dictionary_learning
from cosae.interop.hub import card as cards
from cosae.interop.hub.errors import plainly
from cosae.interop.public import Public, strings_of_json
from cosae.interop.read import read_sae
from cosae.io.staged import filled
from cosae.io.untrusted import read_json
from cosae.sae import file
from cosae.sae.model import SAE
from cosae.shown import counted

CARD, METRICS, EVALUATION = "README.md", "metrics.json", "evaluation.json"
_OTHERS = (gemma_scope.ARCHIVE, gemma_scope.WEIGHTS, cosine_paper.NAME)
WEIGHTS = (file.WEIGHTS, sparsify.WEIGHTS, dictionary_learning.WEIGHTS, *_OTHERS)
BESIDE = ("cfg.json", "config.json", "self_check.safetensors", METRICS, CARD)
"""What a pull takes beside the weights; everything else in a repository stays there."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,95}")
MARK = ".cosae_pull"


@dataclass(frozen=True)
class Place:
    """A folder in a repository of the hub."""

    repo: str
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """REPO[:PATH]. Raises CosaeError for anything else."""
        repo, _, path = text.removeprefix("hf:").partition(":")
        owner, slash, name = repo.partition("/")
        parts = [part for part in path.strip("/").split("/") if part]
        if not slash or not all(NAME.fullmatch(part) and ".." not in part for part in (owner, name)):
            raise CosaeError(f"a place on the hub is OWNER/NAME or OWNER/NAME:FOLDER. Got {text!r} instead.")
        if not all(NAME.fullmatch(part) and ".." not in part for part in parts):
            raise CosaeError(f"a folder on the hub is made of letters, digits, '.', '_' and '-'. Got {path!r} instead.")
        return cls(repo, "/".join(parts))

    def inside(self, *names: str) -> str:
        return "/".join(part for part in (self.path, *names) if part)

    def __str__(self) -> str:
        return f"{self.repo}:{self.path}" if self.path else self.repo


def push(
    source: SAE | str | Path,
    to: str,
    *,
    license: str = "mit",
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    public_names: Sequence[str] = (),
    token: str | None = None,
    endpoint: str | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> str:
    """Push an SAE, an SAE's folder of any format cosae reads, or a run (all its arms); returns the page's address.

    to        REPO[:PATH]; the repository is made (private or public) where there is none. Arms of a run go to
              PATH/ARM. The card is PATH/README.md, and the repository's own README.md where that is none yet or one of
              cosae's.
    license   identifier as the hub knows them, for the card
    revision  an existing branch; None: main
    public_names  names of models, texts and files of this machine that may be published; others become a neutral word

    Raises CosaeError for what cannot be read, without a token, and for whatever the hub refuses.
    """
    place, saes, metrics = _prepared(source, to, license, public := Public(tuple(public_names)))
    hub, api = _api(token, endpoint)
    if (token or hub.get_token()) is None:
        raise CosaeError("pushing needs a token that may write: set HF_TOKEN, run `hf auth login`, or give token=.")
    try:
        with tempfile.TemporaryDirectory() as staged:
            files = _stage(saes, metrics, place, license, Path(staged), public)
            with plainly(hub, f"{place} was not pushed", writing=True):
                log(f"repository {place.repo}")
                api.create_repo(place.repo, private=private, exist_ok=True)
                if place.path and _may_write_root_card(api, hub, place, revision):
                    files.setdefault(CARD, files[place.inside(CARD)])
                log(counted(len(files), "file"))
                added = [hub.CommitOperationAdd(name, str(path)) for name, path in files.items()]
                said = message or _message(saes, place)
                done = api.create_commit(place.repo, added, commit_message=said, revision=revision)
    except OSError as error:
        raise CosaeError(f"{place} was not pushed: a file could not be staged ({error.strerror or error}).") from None
    return str(getattr(done, "commit_url", None) or done)


def preview(
    source: SAE | str | Path,
    to: str,
    *,
    license: str = "mit",
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    public_names: Sequence[str] = (),
) -> str:
    """Every text that `push` with these arguments would send; nothing is sent. Raises CosaeError as it does."""
    place, saes, metrics = _prepared(source, to, license, public := Public(tuple(public_names)))
    with tempfile.TemporaryDirectory() as staged:
        files = _stage(saes, metrics, place, license, Path(staged), public)
        kind = "private" if private else "public"
        lines = [f"to {kind} {place.repo}, {revision or 'main'}: {message or _message(saes, place)}"]
        for name, path in files.items():
            lines.append(f"{name} ({path.stat().st_size:,} bytes)")
            if path.suffix == ".json":
                lines += [f"    {text}" for text in strings_of_json(path)]
            elif path.suffix == ".md":
                lines += [f"    {line}" for line in path.read_text("utf-8").splitlines()]
    return "\n".join([*lines, "Nothing was sent."])


def _prepared(
    source: SAE | str | Path, to: str, license: str, public: Public
) -> tuple[Place, dict[str, SAE], dict[str, Any]]:
    """Where to, the SAEs and their numbers, by names that may be published."""
    place = Place.parse(to)
    if not cards.LICENSE.fullmatch(license):
        raise CosaeError(f"license must be an identifier of the hub's, such as mit. Got {license!r} instead.")
    saes, metrics = _read_source(source)
    shown = {"": ""} | public.arms(filter(None, saes))
    return place, {shown[name]: sae for name, sae in saes.items()}, {shown[name]: m for name, m in metrics.items()}


def _message(saes: Mapping[str, SAE], place: Place) -> str:
    return f"cosae: {', '.join(name or place.path or 'SAE' for name in saes)}"


def pull(
    source: str,
    out: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Path:
    """Pull the SAE at REPO[:PATH] into the folder `out`, which must not hold anything yet; returns it.

    Where the SAEs lie in folders below PATH (a run), they come to folders below `out`. Any format that cosae reads
    will do. revision: branch, tag or commit; the files of one commit are taken. Raises CosaeError, and leaves nothing,
    for whatever the hub refuses, a download that stops short, a full disk, and files that are no sound SAE.
    """
    place, out = Place.parse(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CosaeError(f"{out} already holds something: choose another --out.")
    hub, api = _api(token, endpoint)
    with filled(out, MARK) as staged:
        with plainly(hub, f"{place} was not pulled", writing=False):
            info = api.repo_info(place.repo, revision=revision)
            chosen = _choose(place, [sibling.rfilename for sibling in info.siblings or []])
            for name in chosen:
                log(f"downloading {name}")
                api.hf_hub_download(place.repo, name, revision=info.sha, local_dir=staged / ".download")
        for name, local in chosen.items():
            target = staged / local
            target.parent.mkdir(parents=True, exist_ok=True)
            (staged / ".download" / name).rename(target)
        shutil.rmtree(staged / ".download", ignore_errors=True)
        for folder in sorted(
            {str(path.parent) for path in map(PurePosixPath, chosen.values()) if path.name in WEIGHTS}
        ):
            try:
                read_sae(staged / folder)
            except CosaeError as error:
                said = str(error).replace(str(staged / folder), f"{place}" if folder == "." else f"{place}/{folder}")
                raise CosaeError(f"what was pulled is no sound SAE: {said}") from None
    return out


def _read_source(source: SAE | str | Path) -> tuple[dict[str, SAE], dict[str, Any]]:
    if isinstance(source, SAE):
        return {"": source}, {}
    path = Path(source)
    if not path.exists():
        raise CosaeError(f"{path} does not exist: give the folder of an SAE or of a run.")
    arms = path / "arms"
    if arms.is_dir():
        found = {arm.name: read_sae(arm) for arm in sorted(arms.iterdir()) if (arm / file.CONFIG).is_file()}
        if not found:
            raise CosaeError(f"{path} is a run without finished SAEs: let it finish, or resume it.")
        evaluation = _evaluation(path)
        return found, {name: cards.arm_metrics(evaluation, name) for name in found}
    whole = path.resolve()
    evaluation = _evaluation(whole.parents[1]) if whole.parent.name == "arms" else {}
    return {"": read_sae(path)}, {"": cards.arm_metrics(evaluation, whole.name)}


def _evaluation(run: Path) -> dict[str, Any]:
    return read_json(run / EVALUATION) if (run / EVALUATION).is_file() else {}


def _stage(
    saes: Mapping[str, SAE], metrics: Mapping[str, Any], place: Place, license: str, staged: Path, public: Public
) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, sae in saes.items():
        sent = copy.copy(sae)
        sent.metadata = public.metadata(sae.metadata)
        folder = file.save(sent, staged / "saes" / (name or "sae"))
        for path in sorted(folder.iterdir()):
            files[place.inside(name, path.name)] = path
        if metrics.get(name):
            files[place.inside(name, METRICS)] = path = staged / f"{len(files)}.json"
            path.write_text(json.dumps(public.metadata(metrics[name]), indent=1) + "\n", "utf-8")
    by_folder = {place.inside(name): sae for name, sae in saes.items()}
    measured = {place.inside(name): one for name, one in metrics.items()}
    text = cards.card(place.repo, by_folder, measured, license, title=str(place).replace(":", " "), public=public)
    files[place.inside(CARD)] = staged / CARD
    files[place.inside(CARD)].write_text(text, "utf-8")
    return files


def _may_write_root_card(api: Any, hub: Any, place: Place, revision: str | None) -> bool:
    """Whether the repository's own README.md is not somebody's work: absent, or a card of cosae's."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            there = Path(api.hf_hub_download(place.repo, CARD, revision=revision, local_dir=folder))
        except hub.errors.EntryNotFoundError:
            return True
        head = there.read_text("utf-8", "replace").split("---")[1:2]
        return bool(head) and "library_name: cosae" in head[0]


def _choose(place: Place, names: list[str]) -> dict[str, str]:
    """Files of the repository to take, with their place below `out`. Raises CosaeError where there is no SAE."""
    below: dict[PurePosixPath, list[PurePosixPath]] = {}
    root = PurePosixPath(place.path)
    for path in map(PurePosixPath, names):
        if not path.is_absolute() and ".." not in path.parts and path.is_relative_to(root):
            below.setdefault(path.parent, []).append(path)
    folders = {parent for parent, paths in below.items() if any(path.name in WEIGHTS for path in paths)}
    if root in folders:
        folders = {root}  # an SAE is asked for by name: what lies below it is others' business
    if not folders:
        there = sorted({str(path.parent) for path in map(PurePosixPath, names) if path.name in WEIGHTS})
        hint = f"SAEs lie in {', '.join(there[:8])}" if there else "it holds none at all"
        raise CosaeError(f"{place} holds no SAE of a format that cosae reads: {hint}.")
    paths = (path for parent in sorted(folders | {root}) for path in below.get(parent, []))
    return {str(path): str(path.relative_to(root)) for path in paths if path.name in (*WEIGHTS, *BESIDE)}


def _api(token: str | None, endpoint: str | None) -> tuple[Any, Any]:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise CosaeError("the hub needs the package huggingface_hub: pip install 'cosae[lm]'.") from None
    importlib.import_module("huggingface_hub.utils").disable_progress_bars()
    place = endpoint or os.environ.get("HF_ENDPOINT") or None
    return huggingface_hub, huggingface_hub.HfApi(endpoint=place, token=token, library_name="cosae")
