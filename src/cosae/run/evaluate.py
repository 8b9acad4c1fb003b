"""`cosae eval`: one measurement of SAEs that exist already, on activations of their site. Nothing is trained.

paths → SAEs by arm → one sample of their site → a measurement of cosae.evaluate → plain numbers, and a table of them
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosae.activations.sinks import sink_mask
from cosae.errors import CosaeError
from cosae.evaluate import geometry, gradients, reconstruction
from cosae.evaluate.encoding import encode_all
from cosae.evaluate.matching import match as matching
from cosae.evaluate.model import causal, patching, splice
from cosae.evaluate.norms import driven as norm_driven
from cosae.evaluate.norms import sinks
from cosae.evaluate.probing.texts import TOPS, probe_texts
from cosae.evaluate.reconstruct import reconstruct_with_sinks
from cosae.interop.read import read_sae
from cosae.interop.sae_probes import datasets as sae_probes
from cosae.run import provenance
from cosae.run.dataset.dataset import ModelData
from cosae.run.dataset.existing import EvalRequest, Sampled, Samples, calibrated, names_of
from cosae.run.dataset.labelled import Reading, encode_texts
from cosae.run.discovery import measure_discovery
from cosae.run.folder import write_json
from cosae.run.measure import probe_concepts
from cosae.sae.model import SAE
from cosae.text.labelled import LabelledTexts, read_labelled

FORMAT, VERSION = "cosae-eval", 1
SPLICED_TOKENS = 4096
"""Tokens of splice, causal and patching where none are asked for: each SAE or change costs the model's passes."""
PROBES = "sae-probes"


@dataclass(frozen=True)
class Texts:
    """What probing reads: labelled sets, or none for the exact token-level concepts of the embedded corpus.

    specs: as `cosae.text.labelled.read_labelled`, or sae-probes[:NAME] for the sets that package ships
    """

    specs: tuple[str, ...] = ()
    text: str = "text"
    label: str = "label"
    max_texts: int = 2000
    seeds: int = 3
    tops: tuple[int, ...] = ()
    """Features of a probe; () is 1, 2 and 5 for texts, 1 for tokens (each concept more is a regression more)."""
    reading: Reading = field(default_factory=Reading)


@dataclass(frozen=True)
class Opened:
    """SAEs by arm, calibrated, with the one sample they share and which of its tokens are sinks."""

    arms: dict[str, list[SAE]]
    sample: Sampled
    sink_N: Tensor
    median: float
    warnings: dict[str, str]
    seed: int
    sink_factor: float = 10.0

    @property
    def firsts(self) -> dict[str, SAE]:
        """The first SAE of every arm."""
        return {name: listed[0] for name, listed in self.arms.items()}

    @property
    def model(self) -> ModelData:
        """Raises CosaeError where activations come from a file, or are perturbed, which the model knows nothing of."""
        if not isinstance(self.sample.data, ModelData):
            raise CosaeError(
                "this measurement runs the model itself: give --model and --site, not --activations or --store."
            )
        if "inject" in self.sample.source:
            raise CosaeError("this measurement runs the model itself, in which nothing is injected: drop --inject.")
        return self.sample.data


def tokens_of(measurement: str, sae_specs: int | None) -> int:
    """How many tokens to sample where none were asked for."""
    if sae_specs is not None:
        return sae_specs
    return SPLICED_TOKENS if measurement in ("splice", "causal", "patching") else EvalRequest.tokens


@torch.no_grad()
def judge(
    measurement: str,
    sae_specs: Sequence[str],
    request: EvalRequest,
    *,
    texts: Texts | None = None,
    features: Sequence[int] = (),
    out: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """One measurement of the SAEs asked for; returns what the JSON file `out` holds, and writes it if given.

    asked     [NAME=]PATH[,PATH…] for each arm: several paths are SAEs of several seeds (probing averages over them,
              matching and discovery take the second as the yardstick, all else reads the first)
    features  those that causal ablates; the eight that fire most by default

    Raises CosaeError for an unknown measurement, a path that holds no SAE, SAEs of different sites, a measurement that
    needs the model where there is a file of activations, and a place that cannot be written.
    """
    if measurement not in MEASURES:
        raise CosaeError(f"a measurement must be one of {', '.join(MEASURES)}. Got {measurement!r} instead.")
    if out is not None and (out.is_dir() or not out.parent.exists()):
        raise CosaeError(f"{out} cannot be written: give a file in a folder that exists with --out.")
    opened = _open(sae_specs, request, log)
    log(f"measuring {measurement}")
    found = MEASURES[measurement](opened, texts or Texts(), tuple(features))
    result = {
        "format": FORMAT,
        "version": VERSION,
        "measurement": measurement,
        "written_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": provenance.commit(),
        "packages": provenance.packages(),
        "seed": request.seed,
        "source": opened.sample.source,
        "saes": {name: [sae.cfg.to_dict() for sae in listed] for name, listed in opened.arms.items()},
        "warnings": opened.warnings,
        "found": found,
    }
    if out is not None:
        write_json(out, result)
    return result


def _open(sae_specs: Sequence[str], request: EvalRequest, log: Callable[[str], None]) -> Opened:
    paths = _paths(sae_specs)
    samples, sample = Samples(request), None
    arms: dict[str, list[SAE]] = {}
    warnings: dict[str, str] = {}
    for name, listed in paths.items():
        arms[name] = []
        for path in listed:
            sae = read_sae(path, format=request.format, device=request.device)
            log(f"activations for {name}")
            mine = samples.of(sae, path)
            if sample is not None and mine.activations is not sample.activations:
                raise CosaeError(
                    f"{path} reads another site or corpus than the SAEs before it: measure them apart, or name "
                    "one --model and --site."
                )
            sample = mine
            median = float(sample.activations.norm_N.double().median())
            sae, warning = calibrated(sae, sample.activations, _sinks(sample, median, request))
            arms[name].append(sae)
            if warning is not None:
                warnings[name] = warning
    assert sample is not None
    return Opened(arms, sample, _sinks(sample, median, request), median, warnings, request.seed, request.sink_factor)


def _sinks(sample: Sampled, median: float, request: EvalRequest) -> Tensor:
    return sink_mask(sample.activations, median, request.sink_factor).cpu()


def _paths(sae_specs: Sequence[str]) -> dict[str, list[Path]]:
    """Arms as they were asked for. Raises CosaeError for none, and for one name twice."""
    if not sae_specs:
        raise CosaeError("give at least one SAE: cosae eval MEASUREMENT SAE…")
    named: list[tuple[str | None, list[Path]]] = []
    for text in sae_specs:
        name, equals, rest = text.partition("=")
        plain = not equals or Path(text).exists()
        named.append((None if plain else name, [Path(p) for p in ((text,) if plain else rest.split(","))]))
        if plain and not Path(text).exists() and "," in text:
            named[-1] = (None, [Path(p) for p in text.split(",")])
    shortest = names_of([listed[0] for _, listed in named])
    arms = {given or short: listed for (given, listed), short in zip(named, shortest, strict=True)}
    if len(arms) < len(named):
        raise CosaeError("two SAEs were given one name: name them apart with NAME=PATH.")
    return arms


def _reconstruction(opened: Opened, texts: Texts, features: tuple[int, ...]) -> dict[str, Any]:
    x, sums = opened.sample.activations, {}
    found: dict[str, Any] = {"saes": {}}
    for name, sae in opened.firsts.items():
        recon = reconstruct_with_sinks(sae, x, opened.sink_N)
        found["saes"][name] = reconstruction.measure_with_and_without_sinks(
            sae, x, opened.sink_N, median_norm=opened.median, recon=recon
        )
        sums[name] = reconstruction.per_document(recon, x, "out")
    base = next(iter(sums))
    found["paired_sinks_out"] = reconstruction.paired_fve_differences(sums, base, opened.seed)
    return found


def _norms(opened: Opened, texts: Texts, features: tuple[int, ...]) -> dict[str, Any]:
    x, found = opened.sample.activations, {}
    for name, sae in opened.firsts.items():
        test = norm_driven.norm_driven(sae, x, opened.sink_N, seed=opened.seed)
        where = norm_driven.firing_norms(sae, x, opened.sink_N)
        for which in ("sinks_in", "sinks_out"):
            test[which] = {k: v for k, v in (test[which] or {}).items() if k != "per_feature"} or None
            where[which] = {k: v for k, v in (where[which] or {}).items() if k != "per_feature"} or None
        found[name] = {"norm_driven": test, "firing_norms": where}
    base = next(iter(found))
    rows = norm_driven.paired_norm_differences(opened.firsts, x, opened.sink_N, baseline=base, seed=opened.seed)
    return {"saes": found, "paired": rows}


def _sink_facts(opened: Opened, texts: Texts, features: tuple[int, ...]) -> dict[str, Any]:
    x = opened.sample.activations
    return {"saes": {name: sinks.sink_metrics(sae, x, opened.sink_N) for name, sae in opened.firsts.items()}}


def _geometry(opened: Opened, texts: Texts, features: tuple[int, ...]) -> dict[str, Any]:
    return {"saes": {name: geometry.geometry(sae) for name, sae in opened.firsts.items()}}


def _probing(opened: Opened, texts: Texts, features: tuple[int, ...]) -> dict[str, Any]:
    if texts.specs:
        sets = [one for spec in texts.specs for one in _labelled(spec, texts)]
        pooled = encode_texts(sets, opened.arms, opened.model, texts.reading)
        found = probe_texts(
            pooled, tops=texts.tops or TOPS, seeds=texts.seeds, max_texts=texts.max_texts, seed=opened.seed
        )
        return {"kind": "texts", **found}
    return {"kind": "tokens", **_token_probing(opened, texts.tops or (1,))}


def _labelled(spec: str, texts: Texts) -> list[LabelledTexts]:
    if spec == PROBES or spec.startswith(f"{PROBES}:"):
        name = spec.removeprefix(PROBES).removeprefix(":")
        read = sae_probes.datasets(only=[name] if name else None, n_rows=sae_probes.USED_ROWS)
        return [LabelledTexts.of(one.name, one.texts, (int(label) for label in one.labels)) for one in read]
    return [read_labelled(spec, text=texts.text, label=texts.label)]


def _token_probing(opened: Opened, tops: Sequence[int]) -> dict[str, Any]:
    """Concepts of the embedded corpus: latents chosen on training files, scored on held-out ones."""
    data = opened.sample.data
    if data is None or not data.has_concepts:
        raise CosaeError("token-level concepts are known for the corpus pylib alone: give labelled texts with --texts.")
    n_tokens = len(opened.sample.activations)
    train, held_out = data.sample("train", n_tokens), data.sample("held_out", n_tokens)
    on_train, on_held_out = (
        {name: encode_all(sae, side.activations) for name, sae in opened.firsts.items()} for side in (train, held_out)
    )
    return probe_concepts(
        (on_train, on_held_out),
        (train, held_out),
        opened.median,
        opened.sink_factor,
        baseline_arm=next(iter(opened.arms)),
        tops=tops,
        min_positives=min(200, max(10, n_tokens // 500)),
        seed=opened.seed,
    )


def _matching(opened: Opened, texts: Texts, features: tuple[int, ...]) -> dict[str, Any]:
    names = list(opened.arms)
    if len(names) != 2:
        raise CosaeError(
            "matching takes two arms, the first with another seed of it as the yardstick: cosae eval matching "
            f"A=run0/arms/standard,run1/arms/standard B=run0/arms/cosine. Got {len(names)} instead."
        )
    x, (a, b) = opened.sample.activations, (opened.arms[name] for name in names)
    found: dict[str, Any] = {"a": names[0], "b": names[1]}
    for by in ("correlation", "cosine"):
        for method in ("hungarian", "mutual"):
            if method == "hungarian" and max(a[0].d_sae, b[0].d_sae) > matching.HUNGARIAN_MAX:
                continue
            one = matching.match_saes(a[0], b[0], x, opened.sink_N, by=by, method=method)
            found[f"{by}/{method}"] = {"pair": one.numbers()}
            if len(a) > 1:
                floors = [matching.match_saes(a[0], other, x, opened.sink_N, by=by, method=method) for other in a[1:]]
                found[f"{by}/{method}"] |= {
                    "yardsticks": [floor.numbers() for floor in floors],
                    "against_yardstick": matching.against_yardstick(one, floors, opened.seed),
                }
    return found


def _discovery(opened: Opened, texts: Texts, features: tuple[int, ...]) -> dict[str, Any]:
    sample = opened.sample
    return measure_discovery(
        opened.arms, sample.data, len(sample.activations), opened.median, opened.sink_factor, opened.seed
    )


def _splice(opened: Opened, texts: Texts, features: tuple[int, ...]) -> dict[str, Any]:
    data = opened.model
    batch = data.sequences("held_out", len(opened.sample.activations))
    return splice.measure_splice(
        data.model, data.site, opened.firsts, batch, median_norm=opened.median, seed=opened.seed
    )


def _causal(opened: Opened, texts: Texts, features: tuple[int, ...]) -> dict[str, Any]:
    data = opened.model
    batch = data.sequences("held_out", len(opened.sample.activations))
    found = {}
    for name, sae in opened.firsts.items():
        chosen = features or _most_firing(encode_all(sae, opened.sample.activations))
        found[name] = {
            "ablation": causal.measure_ablation(data.model, data.site, sae, batch, chosen, seed=opened.seed),
            "steering": causal.measure_steering(data.model, data.site, sae, batch, chosen, seed=opened.seed),
        }
    return {"saes": found}


def _patching(opened: Opened, texts: Texts, features: tuple[int, ...]) -> dict[str, Any]:
    """Of the model at the SAEs' site: no SAE enters but for its site."""
    data = opened.model
    options: dict[str, Any] = {"median_norm": opened.median, "factor": opened.sink_factor, "seed": opened.seed}
    batch = data.sequences("held_out", len(opened.sample.activations))
    return patching.measure_patching(data.model, data.site, batch, **options)


def _gradients(opened: Opened, texts: Texts, features: tuple[int, ...]) -> dict[str, Any]:
    x = opened.sample.activations
    sides = {"sinks_in": x, "sinks_out": x[~opened.sink_N]}
    return {
        "saes": {
            name: {which: gradients.measure_gradients(sae, one, seed=opened.seed) for which, one in sides.items()}
            for name, sae in opened.firsts.items()
        }
    }


def _most_firing(codes: Any, n: int = 8) -> list[int]:
    counts = torch.bincount(codes.feature_E, minlength=codes.d_sae)
    return sorted(torch.argsort(counts, descending=True, stable=True)[:n].tolist())


MEASURES: Mapping[str, Callable[[Opened, Texts, tuple[int, ...]], dict[str, Any]]] = {
    "reconstruction": _reconstruction,
    "norms": _norms,
    "sinks": _sink_facts,
    "geometry": _geometry,
    "probing": _probing,
    "matching": _matching,
    "discovery": _discovery,
    "splice": _splice,
    "causal": _causal,
    "patching": _patching,
    "gradients": _gradients,
}
