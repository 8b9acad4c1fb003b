"""`cosae browse`: SAEs, the model and text of their site → a feature store, built where there is none of them yet.

path, … → SAEs of one site → ModelText or StoredRows → cosae.browse.collect.build → the store's folder
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosae.activations.perturbation import Perturbation
from cosae.activations.store.reader import Store, open_store
from cosae.browse.collect.build import build_store, planned_bytes
from cosae.browse.collect.building import BuildOptions, Listed, identity_of
from cosae.browse.collect.chunks import Source
from cosae.browse.store.format import FORMAT, RECORD
from cosae.errors import CosaeError
from cosae.interop.public import of_the_hub
from cosae.interop.read import read_sae
from cosae.io.progress import SILENT, Progress
from cosae.io.records import read_record
from cosae.io.values import from_plain
from cosae.recipe import DataConfig
from cosae.run import provenance
from cosae.run.dataset.model import open_model
from cosae.run.explore.media import ModelMedia
from cosae.run.explore.sources import ModelText, StoredRows, identity_of_text, injected
from cosae.run.export import digest_sae
from cosae.run.folder import ARMS, EVALUATION, RECIPE, read_json
from cosae.run.identity import read_elsewhere
from cosae.run.requests import BrowseRequest
from cosae.run.saes import every_sae, names_of, read_with_model, saes_in
from cosae.shown import counted

FOLDER = "features"
NUMBERS = ("fve", "median_token_fve", "l0")


def is_store(path: Path) -> bool:
    """Whether a folder holds a feature store."""
    return (path / RECORD).is_file() and read_record(path / RECORD).get("format") == FORMAT


def prepare(
    paths: Sequence[Path],
    request: BrowseRequest,
    out: Path | None = None,
    rebuild: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """The folder of a feature store of the SAEs at `paths`: the one that is named, the one that is there, or a new one.

    out  by default RUN/features for one run, else NAME.features beside the first SAE, or in its run
    A store in `out` of the same SAEs, model, text and options is taken as it is, unless it is to be rebuilt.
    Raises CosaeError for SAEs of different sites, without a threshold, and what cannot be read.
    """
    request.check()
    if len(paths) == 1 and is_store(paths[0]):
        if rebuild or out is not None:
            raise CosaeError(f"{paths[0]} is a feature store already: name SAEs to build another one.")
        return paths[0]
    places = every_sae(paths)
    out = _place(paths, places) if out is None else out
    with progress.phase("reading SAEs"):
        listed, data, store = _read(paths, places, request)
    media = None
    if data is not None and data.inputs in ("images", "audio"):
        with progress.phase("loading model"):
            media = ModelMedia(data, request.tokens, request.seed, request.device, request.perturbation)
    window = request.window if media is None or media.layout.grid is None else media.layout.n_places  # the whole image
    options = BuildOptions(window, request.seed, provenance.commit())
    known = _identity(request, data, store)
    if not rebuild and (out / RECORD).is_file() and is_store(out):
        if read_record(out / RECORD).get("identity") == identity_of(known, listed, options):
            progress.note(f"{out} holds these features already")
            return out
        progress.note(f"{out} holds features of other SAEs, text or options: they are made again")
    memory, disk = planned_bytes({name: one.sae for name, one in listed.items()}, window)
    features = counted(sum(one.sae.d_sae for one in listed.values()), "feature")
    progress.note(f"{features}: {memory / 2**20:,.0f} MB of memory, up to {disk / 2**20:,.0f} MB of disk meanwhile")
    source = media or _source(request, data, store, progress, listed, places)
    return build_store(out, source, listed, options, progress)


def _place(paths: Sequence[Path], places: Sequence[Path]) -> Path:
    if len(paths) == 1 and saes_in(paths[0]):
        return paths[0] / FOLDER
    first = places[0].absolute()
    beside = first.parent.parent if first.parent.name == ARMS else first.parent  # what lies in arms is an SAE
    return beside / f"{first.name}.{FOLDER}"


def _read(
    paths: Sequence[Path], places: Sequence[Path], request: BrowseRequest
) -> tuple[dict[str, Listed], DataConfig | None, Store | None]:
    """The SAEs by name, and the data or the store of their one site."""
    names = list(saes_in(paths[0])) if len(paths) == 1 and saes_in(paths[0]) else names_of(places)
    listed, known = {}, {}
    for name, path in zip(names, places, strict=True):
        if request.store is None:
            sae, known[name] = read_with_model(path, request)
        else:
            sae = read_sae(path, format=request.format, device=request.device)
        listed[name] = Listed(sae, digest_sae(sae), str(path), _evaluation(path))
    if request.store is not None:
        return listed, None, open_store(request.store, request.site)
    first, data = next(iter(known.items()))
    for name, other in known.items():
        if (other.model, other.site) != (data.model, data.site):
            got = f"{first} reads {data.site} of {data.model}, {name} {other.site} of {other.model}"
            raise CosaeError(f"the SAEs of one browser read one site of one model. Got others: {got}.")
    return listed, data, None


def _evaluation(path: Path) -> dict[str, float]:
    """What an SAE's run measured of it, where it lies in one."""
    run = path.absolute().parent.parent
    if path.absolute().parent.name != ARMS or not ((run / EVALUATION).is_file() and (run / RECIPE).is_file()):
        return {}
    found: Any = read_json(run / EVALUATION)
    for key in ("reconstruction", path.name, "sinks_out"):
        found = found.get(key) if isinstance(found, dict) else None
    known = found if isinstance(found, dict) else {}
    return {name: float(value) for name in NUMBERS if isinstance(value := known.get(name), int | float)}


def _identity(request: BrowseRequest, data: DataConfig | None, store: Store | None) -> dict[str, Any]:
    if store is not None:
        known = {"store": store.identity, "tokens": request.tokens, "spelled": _model_of(request, store) is not None}
        return {**known, **injected(request.perturbation)}
    assert data is not None
    return identity_of_text(data, request.tokens, request.seed, request.perturbation)


def _model_of(request: BrowseRequest, store: Store) -> str | None:
    """The model whose tokenizer spells a store's tokens: as asked, else the store's if packaged or of the hub."""
    named = store.record["request"].get("model")
    if request.model is not None:
        return request.model
    return named if named == "embedded" or (isinstance(named, str) and of_the_hub(named)) else None


def _source(
    request: BrowseRequest,
    data: DataConfig | None,
    store: Store | None,
    progress: Progress,
    listed: dict[str, Listed],
    places: Sequence[Path],
) -> Source:
    if store is not None:
        name = _model_of(request, store)
        with progress.phase("loading model"):
            opened = None if name is None else open_model(DataConfig(model=name), request.device)
        return StoredRows(store, request.tokens, opened, request.perturbation)
    assert data is not None
    with progress.phase("loading model"):
        source = ModelText(data, request.tokens, request.seed, request.device, request.perturbation)
    for (name, one), path in zip(listed.items(), places, strict=True):
        trained = one.sae.metadata.get("perturbation")
        if request.inject is None and isinstance(trained, dict) and trained.get("kind", "none") != "none":
            how = from_plain(Perturbation, trained, f"the perturbation of {name}")
            progress.note(
                f"{name} was trained on perturbed norms, and reads natural ones here: --inject {how} adds them"
            )
        if said := read_elsewhere(one.sae.metadata, data.model, source.where, source.opened[0]):
            progress.note(f"{name} ({path}): {said}")
    return source
