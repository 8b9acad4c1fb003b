"""What is measured of a finished run, each once, beside the run: texts.json, tokens.json and splice.json.

texts    every arm on every labelled set (`probing`); at block 14 also the standard SAE with its norm read out (its
         firings kept, codes divided by the length) and read by cosine (refitted), and the dimensions of x
tokens   held-out tokens of Wikipedia: features on at sinks, firings that the norm decides, firings by norm quartile
splice   loss and KL with the reconstruction in the model's place, at the blocks looked at closely
sharing  features that two SAEs share by the paper's rule, of two scores and, as the yardstick, of two seeds
discovery  at block 14, whether the cosine SAE's gain in probing comes from features that only it has (`discovery`)
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cosae
from cosae.activations.filter import Filter
from cosae.activations.sample import SINKS, SinkRule
from cosae.evaluate.encoded import Autoencoder, encode_all, encode_sample
from cosae.evaluate.matching.match import Matching, match
from cosae.evaluate.model.splice import measure_splice
from cosae.evaluate.norms.counterfactual import at_median
from cosae.evaluate.norms.driven import firing_norms, norm_driven
from cosae.evaluate.norms.read_time import remove_norm
from cosae.evaluate.norms.sinks import sink_metrics
from cosae.io.values import from_plain
from cosae.recipe import DataConfig, Recipe
from cosae.run.dataset.base import DataUse
from cosae.run.dataset.model import ModelDataset
from cosae.run.dataset.open import open_dataset
from cosae.run.folder import read_json, write_json
from cosae.sae.model import SAE
from cosae.sae.swap import swap_score
from cosae.types import Activations
from studies.real_model import texts
from studies.real_model.design import CONTEXT, CORPUS, LIKE_THE_PAPER, MODEL, WIKI, labelled_sets
from studies.real_model.discovery import decompose
from studies.real_model.probing import probe
from studies.runsets import REAL_CLOSELY, SEEDS, ensure, folder_of

READ_TIME, SWAPPED, DIMENSIONS = "standard, read without its norm", "standard, read by cosine", "dimensions of x"
NORM_TOKENS, SPLICED_TOKENS = 8_192, 4_096
SPLICED = ("standard", "standard_unit_frame", "cosine", "two_unit")
PLANTED_AT = 10
UNREAD = ("cosine_fast", "cosine_fast_from_1")
"""Arms that only ask where a learned exponent ends."""


def block_of(name: str) -> int:
    """The block of a set of runs, which is in its name."""
    return int(name.split("_")[1])


def one(name: str, seed: int, kind: str) -> None:
    """One run of a set, from its training to what its tokens and texts say; or another kind of number."""
    if kind != "run":
        measured(name, seed, kind)
        return
    (folder,) = ensure(name, (seed,), progress=False)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for asked in ("tokens", "texts"):
        measured(name, seed, asked)


def saes_of(folder: Path) -> dict[str, SAE]:
    """The trained SAEs of a run."""
    return {name: cosae.load(folder / "arms" / name) for name in read_json(folder / "run.json")["arms"]}


def measured(name: str, seed: int, kind: str) -> dict[str, Any]:
    """KIND.json of one run, made where it is not there yet."""
    path = folder_of(name, seed) / f"{kind}.json"
    if not path.exists():
        print(f"{kind}: {name}, seed {seed}", file=sys.stderr, flush=True)
        write_json(path, KINDS[kind](name, seed))
    return read_json(path)


@torch.no_grad()
def _texts(name: str, seed: int) -> dict[str, Any]:
    folder, block = folder_of(name, seed), block_of(name)
    median = _median(folder)
    readers: dict[str, Autoencoder | None] = {a: sae for a, sae in saes_of(folder).items() if a not in UNREAD}
    closely = name in {f"real_{b}" for b in REAL_CLOSELY}
    if name == "real_14":
        standard = readers["standard"]
        assert isinstance(standard, SAE)
        calm = _calm(folder)
        readers |= {READ_TIME: remove_norm(standard, calm), DIMENSIONS: None}
        readers[SWAPPED] = swap_score(standard, "cosine", sample=calm.x_ND.float())
    found: dict[str, Any] = {reader: {} for reader in readers}
    for one in labelled_sets():
        at = texts.read(one, block)
        for reader, sae in readers.items():
            full = one.name in (*LIKE_THE_PAPER, *WIKI)
            planted = name == f"real_{PLANTED_AT}"
            found[reader][one.name] = probe(sae, at, median, closely=closely, full=full and closely, planted=planted)
        print(".", end="", file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def _tokens(name: str, seed: int) -> dict[str, Any]:
    folder = folder_of(name, seed)
    recipe, fitted = Recipe.read(folder / "recipe.json"), _filter(folder)
    with open_dataset(recipe.data, DataUse.of(recipe)) as data:
        held_out = data.sample("held_out", recipe.evaluation.held_out_tokens, SinkRule(10.0, fitted.median_norm))
    few = held_out[torch.arange(len(held_out)) < NORM_TOKENS]
    found = {}
    for arm, sae in saes_of(folder).items():
        encoded, some = encode_sample(sae, held_out), encode_sample(sae, few)
        driven = norm_driven(some, at_median(some), seed=seed, n_resamples=200)
        norms = firing_norms(encoded)
        short = {sinks: {k: v for k, v in (norms[sinks] or {}).items() if k != "per_feature"} for sinks in SINKS}
        share = {sinks: (driven[sinks] or {}).get("share") for sinks in SINKS}
        found[arm] = {"sinks": sink_metrics(encoded), "norm_driven": share, "firing_norms": short}
    return found


@torch.no_grad()
def _splice(name: str, seed: int) -> dict[str, Any]:
    folder, block = folder_of(name, seed), block_of(name)
    saes = {arm: sae for arm, sae in saes_of(folder).items() if arm in SPLICED}
    config = DataConfig(model=MODEL, corpus=CORPUS, context=CONTEXT, packing="document", site=f"resid_post.{block}")
    with ModelDataset(config, DataUse(held_out_tokens=SPLICED_TOKENS)) as data:
        sequences = data.sequences("held_out", SPLICED_TOKENS)
        model, median = data.model, _filter(folder).median_norm
        return measure_splice(model, data.site, saes, sequences, median_norm=median, batch_sequences=16)


@torch.no_grad()
def _sharing(name: str, seed: int) -> dict[str, Any]:
    own, others, calm = _two_seeds(name, seed)
    pairs = [(f"standard / {arm}", own["standard"], own[arm]) for arm in SPLICED[1:]]
    pairs += [(f"{arm} / other seed", own[arm], others[arm]) for arm in SPLICED]
    return {words: _matched(a, b, calm).numbers() for words, a, b in pairs}


@torch.no_grad()
def _discovery(name: str, seed: int) -> dict[str, Any]:
    own, others, calm = _two_seeds(name, seed)
    saes = {"standard": own["standard"], "cosine": own["cosine"], "other seed": others["standard"]}
    pairs = {
        ("standard", b): _matched(saes["standard"], saes[b], calm).pairs.shared() for b in ("cosine", "other seed")
    }
    return decompose(saes, pairs, block_of(name), _median(folder_of(name, seed)))


def _matched(a: SAE, b: SAE, calm: Activations) -> Matching:
    return match(encode_all(a, calm), encode_all(b, calm), a.W_dec, b.W_dec)


def _two_seeds(name: str, seed: int) -> tuple[dict[str, SAE], dict[str, SAE], Activations]:
    """A run's SAEs, those of the next seed, and held-out tokens that are no sinks."""
    folder, other = folder_of(name, seed), folder_of(name, SEEDS[(SEEDS.index(seed) + 1) % len(SEEDS)])
    recipe = Recipe.read(folder / "recipe.json")
    with open_dataset(recipe.data, DataUse.of(recipe)) as data:
        rule = SinkRule(10.0, _filter(folder).median_norm)
        held_out = data.sample("held_out", recipe.evaluation.held_out_tokens, rule)
    return saes_of(folder), saes_of(other), held_out.activations[~held_out.sink_N]


KINDS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "texts": _texts,
    "tokens": _tokens,
    "splice": _splice,
    "sharing": _sharing,
    "discovery": _discovery,
}


def _filter(folder: Path) -> Filter:
    return from_plain(Filter, read_json(folder / "run.json")["filter"], "the filter")


def _median(folder: Path) -> float:
    median = _filter(folder).median_norm
    assert median is not None
    return median


def _calm(folder: Path) -> Any:
    """Training activations that are no sinks."""
    recipe = Recipe.read(folder / "recipe.json")
    with open_dataset(recipe.data, DataUse.of(recipe)) as data:
        train = data.sample("train", 32_768, SinkRule(10.0, _filter(folder).median_norm))
    return train.activations[~train.sink_N][:16_384]
