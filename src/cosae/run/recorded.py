"""What an SAE's file says of the data it was trained on, and how much of that is believed.

A file may come from a stranger. What it names is read without being asked for only where that is packaged or of the
hub; a folder or file of this machine must be named by the user, unless the SAE lies in the run that trained it: a run's
folder is the user's own, and its recipe says the same as the SAE's file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError, short
from cosae.interop.public import of_the_hub
from cosae.io.values import from_plain
from cosae.recipe import DataConfig, Recipe
from cosae.run.folder import ARMS, RECIPE, RUN
from cosae.run.requests import Origin, Place
from cosae.sae.model import SAE
from cosae.text.mixture import parse_corpus


def data_of(sae: SAE, path: Path, request: Place) -> DataConfig:
    """The data an SAE was trained on, as far as its file says, with what was asked for in its place.

    Raises CosaeError where neither says where its activations come from, and where the file names a model or text of
    this machine.
    """
    known = sae.metadata
    recorded = known.get("recipe", {}).get("data") if isinstance(known.get("recipe"), dict) else None
    data = from_plain(DataConfig, recorded, "recipe.data") if isinstance(recorded, dict) else DataConfig()
    if request.model is not None and (data.store, data.activations, data.world) != (None, None, None):
        data = DataConfig()
    if data.store is not None:
        raise CosaeError(f"{path} was trained on the store {data.store}: name it with --store FOLDER.")
    if data.activations is not None:
        raise CosaeError(f"{path} was trained on the file {data.activations}: name it with --activations FILE.")
    if data.world is not None:
        if data.world.d_in != sae.d_in:
            what = f"{path} reads vectors of width {sae.d_in}, but names a world of width {data.world.d_in}"
            raise CosaeError(f"{what}: the file is damaged; name others with --activations FILE.")
        return data
    model = request.model or known.get("model")
    site = request.site or known.get("site") or known.get("hook_name") or known.get("hf_hook_name")
    if model is None:
        raise CosaeError(f"{path} does not say which model it reads: give --model and --site, or --activations FILE.")
    if site is None:
        raise CosaeError(f"{path} does not say which site it reads: give --site, for instance resid_post.3.")
    if not isinstance(model, str) or not isinstance(site, str):
        raise CosaeError(f"{path} does not name its model and site in text: give --model and --site.")
    target = None if sae.target is None else getattr(request, "target", None) or known.get("target")
    if sae.target is not None and not isinstance(target, str):
        raise CosaeError(f"{path} is a transcoder and does not say of which site: give --target, such as mlp_out.3.")
    data = replace(data, target=target)
    changes: dict[str, Any] = {"model": model, "site": site}
    changes |= {name: getattr(request, name, None) for name in ("corpus", "context")}
    found = replace(data, **{k: v for k, v in changes.items() if v is not None})
    if _is_of_its_run(path, data if request.model is not None else replace(data, model=model)):
        return found
    _check_packaged_or_of_the_hub(found, request, path)
    return replace(found, n_workers=0, prefetch_chunks=0)  # processes and memory here are not a file's to choose


def _is_of_its_run(path: Path, data: DataConfig) -> bool:
    """Whether an SAE lies in a run's folder, whose own recipe names the same model and text.

    `pull` and an export write no such folder; who copies a stranger's run has taken it for their own.
    """
    folder = path.absolute()
    run = folder.parent.parent
    if folder.parent.name != ARMS or not (run / RECIPE).is_file() or not (run / RUN).is_file():
        return False
    own = Recipe.read(run / RECIPE).data
    return all(getattr(own, name) == getattr(data, name) for name in ("model", "revision", "corpus"))


def _check_packaged_or_of_the_hub(data: DataConfig, request: Place, path: Path) -> None:
    if request.model is None and data.model != "embedded" and not of_the_hub(data.model):
        raise CosaeError(f"{path} names the model {short(data.model)}, which is none of the hub: name it with --model.")
    if not isinstance(request, Origin) or request.corpus is not None:
        return  # no text is read, or the user's own
    for source in parse_corpus(data.corpus):
        if source.spec != "pylib" and not of_the_hub(source.spec.removeprefix("hf:").partition(":")[0]):
            what = f"{path} names the text {short(source.spec)}, a place on this machine"
            raise CosaeError(f"{what}: if you want it read, name it with --corpus.")
