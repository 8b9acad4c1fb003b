"""`cosae export`: an SAE, the model and text it was trained on → files for readers of features.

    path → read_sae → its data's model and site → packed sequences of its text → interop.neuronpedia or interop.delphi

What the SAE's file does not say must be said: model, site, corpus. Rows that occur twice in the text are read once.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cosae.browse.store.reader import open_store
from cosae.errors import CosaeError, CosaeWarning, check_least
from cosae.interop.delphi import Written, write_cache
from cosae.interop.neuronpedia import upload as uploads
from cosae.interop.neuronpedia.dashboards import MARK, write_dashboards
from cosae.interop.neuronpedia.explanations import EXPLANATIONS, Explained, write_explanations
from cosae.interop.neuronpedia.settings import Dashboard, Options
from cosae.interop.public import NEUTRAL, Public, strings_of_json
from cosae.io.staged import check_place
from cosae.models.sites import resolve_site
from cosae.models.sources import digest_sequences
from cosae.recipe import DataConfig
from cosae.run import provenance
from cosae.run.dataset.corpus import adds_bos, check_corpus, long_enough, pad_id
from cosae.run.dataset.model import batch_size, open_model
from cosae.run.identity import read_elsewhere
from cosae.run.requests import Reading
from cosae.run.saes import read_with_model
from cosae.sae.file import to_disk
from cosae.sae.model import SAE
from cosae.shown import counted
from cosae.text.mixture import Cursor, mix, parse_corpus
from cosae.text.packing import iterate_sequences
from cosae.text.tokenization import tokenize_documents
from cosae.types import Sequences, Site

SET_WORDS = {"resid_post": "res", "resid_pre": "res-pre", "attn_out": "att", "mlp_out": "mlp"}


@dataclass(frozen=True)
class Opened:
    """An SAE with the model, site and sequences it is shown on."""

    sae: SAE
    data: DataConfig
    model: Any
    tokenizer: Any
    site: Site
    sequences: Sequences

    @property
    def written(self) -> Site:
        """Where reconstructions lie: the site, or a transcoder's target."""
        return self.site if self.data.target is None else resolve_site(self.model, self.data.target)

    metadata: dict[str, Any]


def open_reading(path: Path, reading: Reading, log: Callable[[str], None]) -> Opened:
    """Read the SAE and its model, and cut the text. Raises CosaeError for what cannot be read, or may not be."""
    check_least("prompts", reading.prompts, 1)
    check_least("context", reading.context, 3)
    sae, data = read_with_model(path, reading)
    check_corpus(data)
    log("opening the model")
    model, tokenizer = open_model(data, reading.device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and reading.context > limit:
        raise CosaeError(f"context must be at most {limit}, the model's own. Got {reading.context} instead.")
    site = resolve_site(model, data.site)
    if said := read_elsewhere(sae.metadata, data.model, site, model):
        warnings.warn(CosaeWarning(f"{path}: {said}"), stacklevel=2)
    log("reading the text")
    sequences = read_sequences(data, tokenizer, reading)
    known = {
        "sae": str(path),
        "sae_sha256": digest_sae(sae),
        "model_sha256": digest_model(model),
        "sequences_sha256": digest_sequences(sequences),
        "model": data.model,
        "site": site.name,
        "corpus": _corpus_name(data),
        "prompts": len(sequences),
        "context": reading.context,
        "seed": reading.seed,
        "commit": provenance.commit(),
        "packages": provenance.packages(),
    }
    return Opened(sae, data, model, tokenizer, site, sequences, known)


def _corpus_name(data: DataConfig) -> str:
    return data.corpus if isinstance(data.corpus, str) else ", ".join(data.corpus)


def read_sequences(data: DataConfig, tokenizer: Any, reading: Reading) -> Sequences:
    """Up to `prompts` distinct full sequences of the corpus, both sides, documents in a seeded order.

    Of a mixture each source gives its share. Raises CosaeError where there is no full sequence.
    """
    sources = parse_corpus(data.corpus)
    opened = [partial(_documents, data, tokenizer, spec, reading.seed) for spec, _ in sources]
    start, weights = [Cursor()] * len(sources), [weight for _, weight in sources]
    tokenized = (document for _, document in mix(opened, weights, start, reading.seed, endless=False))
    seen: set[bytes] = set()
    chunks = []
    special_ids = tokenizer.all_special_ids
    for chunk in iterate_sequences(tokenized, data.context, pad_id=pad_id(tokenizer), special_ids=special_ids):
        rows = []
        for row, (ids_T, whole) in enumerate(zip(chunk.ids_ST, chunk.mask_ST.all(1).tolist(), strict=True)):
            mark = ids_T.numpy().tobytes()
            if whole and mark not in seen and len(seen) < reading.prompts:
                seen.add(mark)
                rows.append(row)
        chunks.append(chunk[torch.tensor(rows, dtype=torch.int64)])
        if len(seen) == reading.prompts:
            break
    if not seen:
        what = f"the corpus {_corpus_name(data)} has no sequence of {data.context} tokens"
        raise CosaeError(f"{what}: give more text or less context.")
    joined: dict[str, Any] = {name: torch.cat([getattr(c, name) for c in chunks]) for name in Sequences.PLACES}
    return Sequences(**joined)


def _documents(data: DataConfig, tokenizer: Any, spec: str, seed: int, turn: int, skip: int) -> Iterator[Any]:
    """Tokenised documents of one source; one that is streamed keeps its own order."""
    found = long_enough(data, spec, "all", [seed, 77, turn])
    bos = adds_bos(data, tokenizer)
    return tokenize_documents(islice(found, skip, None), tokenizer, add_bos=bos, keep_empty=True, in_parts=True)


def digest_sae(sae: SAE) -> str:
    """SHA-256 of an SAE's configuration and weights."""
    digest = hashlib.sha256(repr(sorted(sae.cfg.to_dict().items())).encode())
    for name, value in sorted(to_disk(sae).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def digest_model(model: nn.Module) -> str:
    """SHA-256 of a model's parameters: names, shapes, and some values of each."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        some = value.detach().flatten()[:64].float().cpu().numpy()
        digest.update(f"{name} {tuple(value.shape)}".encode() + some.tobytes())
    return digest.hexdigest()


def export_neuronpedia(
    path: Path,
    out: Path,
    reading: Reading,
    shown: Options,
    upload: bool = False,
    public_names: Sequence[str] = (),
    log: Callable[[str], None] = lambda _: None,
    explanations: Path | None = None,
) -> tuple[uploads.Plan, list[str]]:
    """Write the dashboards to `out` and, with `upload`, send them. Returns the plan and what was done, line by line.

    An export of the same SAE, text and settings that lies in `out` already is not made again. Models and texts of this
    machine get neutral names, but for `public_names`. explanations: a feature store, whose explanations of this SAE are
    written beside the dashboards. Raises CosaeError as `write_dashboards` and the upload do; what an upload needs is
    looked for before anything is computed.
    """
    if upload:
        uploads.check_ready()
    check_place(out, MARK)
    opened = open_reading(path, reading, log)
    explained = () if explanations is None else _explained(explanations, opened.sae, Public(tuple(public_names)))
    metadata, kind = published(opened, public_names), opened.site.name.split(".")[0]
    named = {
        "model_id": shown.model_id or metadata["model"].rpartition("/")[2].replace(" ", "-"),
        "set_name": shown.set_name or f"cosae-{SET_WORDS.get(kind, 'site')}-{opened.sae.d_sae}",
    }
    about: dict[str, Any] = {"layer": opened.site.block, "dataset": metadata["corpus"], "seed": reading.seed}
    settings = Dashboard(**{**asdict(shown), **named}, **about)
    lines = []
    if uploads.same_export(out, settings, metadata):
        lines.append(f"{out} holds this export already: not made again.")
    else:
        parts = opened.model, opened.tokenizer, opened.site, opened.sae, opened.sequences
        at_once = batch_size(opened.data, opened.model, opened.site, "float32")
        write_dashboards(*parts, out, settings, metadata=metadata, batch_sequences=at_once, log=log)
    (out / EXPLANATIONS).unlink(missing_ok=True)
    if explained:
        lines.append(f"{counted(write_explanations(out, explained, settings), 'explanation')} in {out / EXPLANATIONS}")
    plan = uploads.plan(out)
    if upload:
        lines.append(uploads.upload(out, plan, log))
    return plan, lines


def _explained(folder: Path, sae: SAE, public: Public) -> list[Explained]:
    """Explanations in a feature store of this very SAE. Raises CosaeError where there are none."""
    digest = digest_sae(sae)
    with closing(open_store(folder)) as store:
        name = next((one.name for one in store.saes if one.sha256 == digest), None)
        known = {} if name is None else store.explanations(name)
    if not known:
        what = "holds no such SAE" if name is None else f"has no explanations of {name}"
        raise CosaeError(f"{folder} {what}: name a store of this SAE on which cosae explain has run.")
    found = []
    for feature, one in sorted(known.items()):
        scores = {"detection": one.detection, "fuzzing": one.fuzzing}
        values = {kind: score.value for kind, score in scores.items() if score is not None and score.value is not None}
        found.append(Explained(feature, one.text, public.place("model", one.model), values))
    return found


def published(opened: Opened, public_names: Sequence[str]) -> dict[str, Any]:
    """What an export says of its SAE, model and text."""
    public, data = Public(tuple(public_names)), opened.data
    corpus = data.corpus if isinstance(data.corpus, tuple) else (data.corpus,)
    named = {"sae": NEUTRAL["start"], "corpus": ", ".join(public.place("corpus", entry) for entry in corpus)}
    return {**public.metadata(opened.metadata), **named}


def preview(write: Callable[[Path], Any]) -> Iterator[str]:
    """Every text that an export would write, file by file, each once; nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        yield from str(write(out)).replace(str(out), "OUT").splitlines()
        for file in sorted(path for path in out.rglob("*") if path.is_file()):
            yield f"{file.relative_to(out).as_posix()} ({file.stat().st_size:,} bytes)"
            if file.suffix == ".json":
                yield from (f"    {text}" for text in strings_of_json(file))
            elif file.suffix == ".jsonl":
                yield from (f"    {line}" for line in file.read_text("utf-8").splitlines())
    yield "Nothing was kept or sent."


def export_delphi(
    path: Path,
    out: Path,
    reading: Reading,
    n_splits: int | None = None,
    public_names: Sequence[str] = (),
    log: Callable[[str], None] = lambda _: None,
) -> Written:
    """Write delphi's cache to `out`; names are published as of the dashboards. Raises CosaeError as `write_cache`."""
    check_place(out, "*/cosae_export.json")
    opened = open_reading(path, reading, log)
    metadata = published(opened, public_names)
    return write_cache(
        opened.model,
        opened.site,
        opened.sae,
        opened.sequences,
        out,
        model_name=metadata["model"],
        dataset=metadata["corpus"],
        n_splits=n_splits,
        metadata=metadata,
        batch_sequences=batch_size(opened.data, opened.model, opened.site, "float32"),
        log=log,
    )
