"""`cosae audit`: SAEs that people already have, of any format that cosae.share reads, on activations of their site.

    paths → read_sae → one sample per (model, site) or file → evaluate.audit → screen, audit.json, audit.html

Nothing is trained. Where a file holds no inference threshold (an uncalibrated batch_topk), one is found on half of the
sample, for the audit only, and the audit says so.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosae.activations import filter as filters
from cosae.activations import nuisance as nuisances
from cosae.activations.arrays import ArraySource
from cosae.activations.nuisance import Nuisance
from cosae.evaluate.audit import audit
from cosae.evaluate.audit_page import audit_page
from cosae.evaluate.report import write_page
from cosae.recipe import DataConfig, Recipe, from_plain
from cosae.run import facts
from cosae.run.data import ModelData
from cosae.run.folder import write_json
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.share.read import read_sae
from cosae.types import Activations, CosaeError

FORMAT, VERSION = "cosae-audit", 1
SHOWN_FACTS = ("format", "model", "site", "hook_name", "tokens", "filter", "norm_facts")


@dataclass(frozen=True)
class Wanted:
    """What to audit on. Fields left None are taken from each SAE's own facts, then from DataConfig's defaults."""

    tokens: int = 32_768
    model: str | None = None
    site: str | None = None
    corpus: str | None = None
    activations: str | None = None
    """A file of N × d vectors instead of a model on a corpus."""
    context: int | None = None
    inject: str | None = None
    """Norm nuisance put on the activations first, such as log_normal:sigma=0.5: what if norms varied so?"""
    sink_factor: float = 10.0
    """Tokens of at least this multiple of the median norm are sinks, beside position 0 and special ids."""
    format: str = "auto"
    """Format of the SAE files; auto looks at them."""
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 64:
            raise CosaeError(f"an audit needs at least 64 tokens to say anything. Got {self.tokens} instead.")
        if not self.sink_factor > 1:
            raise CosaeError(f"sink_factor must be above 1 (a multiple of the median). Got {self.sink_factor} instead.")
        if self.inject is not None:
            Nuisance.parse(self.inject)
        if self.activations is not None and (self.model or self.site or self.corpus):
            raise CosaeError("an audit takes activations from a file or from a model, not from both: drop one.")


@dataclass(frozen=True)
class Sampled:
    """Activations to audit on, where they come from in plain values, and how to spell a token id."""

    activations: Activations
    source: dict[str, Any]
    spell: Callable[[int], str] | None = None


@dataclass
class _Samples:
    """Samples by what they are of: SAEs of one site share theirs, so that they are audited on the same tokens."""

    wanted: Wanted
    made: dict[tuple[Any, ...], Sampled] = field(default_factory=dict)

    def of(self, sae: SAE, path: Path) -> Sampled:
        if self.wanted.activations is not None:
            key: tuple[Any, ...] = ("file", self.wanted.activations)
            if key not in self.made:
                self.made[key] = _from_file(self.wanted)
        else:
            data = data_of(sae, path, self.wanted)
            key = ("model", repr(data))
            if key not in self.made:
                self.made[key] = _from_model(data, self.wanted)
        found = self.made[key]
        if self.wanted.inject is not None:
            injected = nuisances.apply(found.activations, Nuisance.parse(self.wanted.inject), 0, "held_out")
            found = replace(found, activations=injected, source={**found.source, "inject": self.wanted.inject})
        width = found.activations.x_ND.shape[1]
        if width != sae.d_in:
            raise CosaeError(
                f"{path} reads activations of width {sae.d_in}; those given have width {width}: "
                "name the model and site, or the file, that it was trained on."
            )
        return found


@torch.no_grad()
def run_audit(
    paths: Sequence[Path], wanted: Wanted, out: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Audit the SAEs at `paths`; returns what audit.json holds, and writes it with audit.html into `out` if given.

    Raises CosaeError for a path that holds no SAE, a model, site, corpus or file that cannot be read, widths that do
    not fit, and a place that cannot be written.
    """
    if not paths:
        raise CosaeError("audit needs at least one SAE: cosae audit SAE…")
    if out is not None:
        _check_place(out)
    saes = [read_sae(path, format=wanted.format, device=wanted.device) for path in paths]
    samples = _Samples(wanted)
    found = []
    for name, path, sae in zip(_names(paths), paths, saes, strict=True):
        say(f"activations for {name}")
        sample = samples.of(sae, path)
        say(f"auditing {name}")
        found.append({"name": name, "path": str(path), **_audit_one(sae, sample, wanted)})
    result = {
        "format": FORMAT,
        "version": VERSION,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": facts.commit(),
        "packages": facts.packages(),
        "seed": wanted.seed,
        "saes": found,
    }
    if out is not None:
        _write(out, result)
    return result


def _audit_one(sae: SAE, sample: Sampled, wanted: Wanted) -> dict[str, Any]:
    activations = sample.activations
    median = float(np.median(activations.norm_N.cpu().double().numpy()))
    sink_N = filters.sinks(activations, median, wanted.sink_factor)
    remark = None
    if not sae.calibrated:
        sae = copy.deepcopy(sae)
        first = torch.arange(len(activations)) % 2 == 0
        kept_N = first & ~sink_N.cpu()
        calibration = calibrate(sae, activations.x_ND[kept_N].float())
        remark = (
            f"the file holds no inference threshold; for this audit one was set so that {calibration.l0:.1f} features "
            f"fire per token (its k is {sae.k}) on every second token, sinks left out"
        )
    found = audit(sae, activations, sink_N, median_norm=median, spell=sample.spell, seed=wanted.seed)
    return {
        "sae": sae.cfg.to_dict(),
        "source": sample.source,
        "facts": {key: sae.facts.get(key) for key in SHOWN_FACTS},
        "remark": remark,
        **found,
    }


def data_of(sae: SAE, path: Path, wanted: Wanted) -> DataConfig:
    """The data an SAE was trained on, as far as its file says, with what was asked for in its place."""
    known = sae.facts
    recorded = known.get("recipe", {}).get("data") if isinstance(known.get("recipe"), dict) else None
    data = from_plain(DataConfig, recorded, "recipe.data") if isinstance(recorded, dict) else DataConfig()
    if data.world is not None or data.activations is not None:
        if wanted.model is None:
            what = "a synthetic world" if data.world is not None else f"the file {data.activations}"
            raise CosaeError(f"{path} was trained on {what}: give its activations with --activations FILE.")
        data = DataConfig()
    model = wanted.model or known.get("model")
    site = wanted.site or known.get("site") or known.get("hook_name") or known.get("hf_hook_name")
    if model is None:
        raise CosaeError(
            f"{path} does not say which model it was trained on: give --model and --site, or --activations FILE."
        )
    if site is None:
        raise CosaeError(f"{path} does not say which site it reads: give --site, for instance resid_post.3.")
    changes = {"model": model, "site": site, "corpus": wanted.corpus, "context": wanted.context}
    return replace(data, **{k: v for k, v in changes.items() if v is not None})


def _from_model(data: DataConfig, wanted: Wanted) -> Sampled:
    recipe = Recipe(data=data, device=wanted.device).changed(
        {
            "training.steps": 1,
            "training.batch_tokens": 1,
            "training.buffer_tokens": 2,
            "filter.window_tokens": 1,
            "evaluation.held_out_tokens": wanted.tokens,
            "evaluation.calibration_tokens": 1,
        }
    )
    opened = ModelData(recipe)
    sample = opened.sample("held_out", wanted.tokens)
    tokenizer = opened.tokenizer
    return Sampled(
        sample.activations,
        {
            "model": data.model,
            "site": opened.site.name,
            "corpus": data.corpus,
            "documents": len(sample.documents),
            "tokens": len(sample.activations),
        },
        lambda token: str(tokenizer.decode([token])),
    )


def _from_file(wanted: Wanted) -> Sampled:
    assert wanted.activations is not None
    source = ArraySource(wanted.activations, chunk_tokens=wanted.tokens, seed=wanted.seed, held_out_frac=0.0)
    activations = next(source.chunks())
    return Sampled(
        activations, {"activations": wanted.activations, "sha256": source.sha256, "tokens": len(activations)}
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    parts = [Path(p).absolute().parts for p in paths]
    for length in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-2:])} ({i + 1})" for i, p in enumerate(parts)]


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise CosaeError(f"{out} is a file; give a folder for the audit with --out.")


def _write(out: Path, result: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CosaeError(f"{out} cannot be written ({error.strerror}); choose another --out.") from None
    write_json(out / "audit.json", result)
    write_page(out / "audit.html", "audit", audit_page(result))


def screen(result: Mapping[str, Any]) -> str:
    """The answers as text for a terminal."""
    return "\n\n".join(_screen_of(found) for found in result["saes"])


def _screen_of(found: Mapping[str, Any]) -> str:
    made, said = found["sae"], found["verdict"]
    make = f"{made['score']} × {made['selector']}, frame {made['frame']}"
    head = f"{found['name']}: {make}, {made['d_sae']} features, k {made['k']}"
    lines = [head, f"fooled by norm: {said['fooled']}: {said['because']}"]
    lines += [f"note: {found['remark']}"] if found["remark"] else []
    width = max(len(line["topic"]) for line in found["lines"])
    for line in found["lines"]:
        mark = "!" if line["level"] == "look" else " "
        lines += [f"{mark} {line['topic'].ljust(width)}  {line['sentence']}", f"  {' ' * width}  {line['evidence']}"]
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)
