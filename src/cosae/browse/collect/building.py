"""A pass over tokens as it goes: the state of every SAE and of their pairs, its checkpoints, and going on from one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosae.activations.sinks import FACTOR, median_norm, quantiles, sink_mask
from cosae.browse.collect.chunks import SAMPLE_TOKENS, Chunk, Source
from cosae.browse.collect.state import Pairs, Probe, SAEState, sinks_of
from cosae.browse.collect.tokens import Tokens
from cosae.browse.store.format import COUNTED, SINK
from cosae.errors import CosaeError, check_least
from cosae.evaluate.norms.counterfactual import lengths
from cosae.io.atomic import replaced
from cosae.io.digest import value_digest
from cosae.kernels.cpu.native import each
from cosae.models.intervene.window import own_filter
from cosae.sae.model import SAE
from cosae.types import Activations

Array = NDArray[Any]
PROBE_TOKENS = 16_384
"""First tokens of the pass, from which medians and quartiles are taken before anything is counted."""
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
NORM_EDGES = np.linspace(-4, 6, 201)
"""Of the histogram of log10 |x|."""
CHECKPOINT, CHECKPOINT_SECONDS = 2, 120.0
"""Version of a checkpoint's arrays, and how often one is written."""


@dataclass(frozen=True)
class BuildOptions:
    """What of a pass is kept.

    window  tokens around an example that are kept with it, its own included
    seed    of what is drawn among the tokens on which a feature fires
    commit  of cosae, noted in the store; decides nothing
    """

    window: int = 48
    seed: int = 0
    commit: str | None = None

    def check(self) -> None:
        """Raises CosaeError for values that are not allowed."""
        check_least("window", self.window, 1)


@dataclass(frozen=True)
class Listed:
    """One SAE to build for: where it came from and what its run measured, for the pages."""

    sae: SAE
    sha256: str
    path: str | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)


def identity_of(source: Mapping[str, Any], saes: Mapping[str, Listed], options: BuildOptions) -> str:
    """Of everything that decides a store, as far as it has a name: SAEs by their digests, the tokens by their source's
    identity."""
    known = {name: one.sha256 for name, one in saes.items()}
    return value_digest({"source": dict(source), "saes": known, "options": [options.window, options.seed]})


class Building:
    """The pass so far, and its working folder."""

    def __init__(self, work: Path, source: Source, saes: Mapping[str, Listed], options: BuildOptions) -> None:
        self.work, self.source, self.saes, self.options = work, source, saes, options
        self.probe: Probe | None = None
        self.left_out = self.sinks = self.done_chunks = self.labelled = 0
        self.norm_counts = np.zeros((2, len(NORM_EDGES) - 1), np.int64)
        self.sample_pair: list[Array] = []
        self.sample_labels: list[tuple[Array, Array]] = []
        self.pair_tokens = 0
        self.identity = identity_of(source.identity, saes, options)
        self._saved_at = time.monotonic()
        found = self._checkpoint()
        if found is None:
            for path in work.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.states = [
            SAEState.new(name, one.sae, own_filter(one.sae.metadata), work / f"sae{i}", options.window, options.seed)
            for i, (name, one) in enumerate(saes.items())
        ]
        self.pairs = Pairs(self.states)
        self.tokens = Tokens(work / "tokens", len(saes), *((0, 0) if found is None else found[0]["there"]))
        if found is not None:
            self._restore(*found)

    # the pass

    def chunks(self) -> Iterator[Chunk]:
        """The chunks that are still to be read; the probe is taken of the first ones before any is given."""
        chunks = (self._checked(chunk) for chunk in self.source.chunks(self.done_chunks))
        if self.probe is None:
            first: list[Chunk] = []
            for chunk in chunks:
                first.append(chunk)
                if sum(map(len, first)) >= PROBE_TOKENS:
                    break
            if not first:
                return
            self.probe = self._probe(Activations.cat([one.activations for one in first])[:PROBE_TOKENS])
            yield from first
        yield from chunks

    def _checked(self, chunk: Chunk) -> Chunk:
        width, wanted = chunk.activations.x_ND.shape[1], self.states[0].sae.d_in
        if width != wanted:
            raise CosaeError(f"the activations have width {width}, the SAEs d_in = {wanted}: name their own site.")
        return chunk

    def _probe(self, activations: Activations) -> Probe:
        live_N = (activations.x_ND != 0).any(-1)
        median = median_norm(activations.norm_N)
        kept_N = live_N & ~sink_mask(activations, median, FACTOR)
        if not bool(kept_N.any()):
            kept_N = live_N
        if not bool(kept_N.any()):
            raise CosaeError("the first tokens are all zero, which is how padding looks: there is nothing to read.")
        some = activations[kept_N]
        medians = {one.name: float(np.median(lengths(one.sae, some).numpy())) for one in self.states}
        low, middle, high = quantiles(some.norm_N, (0.25, 0.5, 0.75))
        marks = quantiles(activations.norm_N, QUANTILES)
        return Probe(len(activations), median, FACTOR, marks, (low, middle, high), medians)

    def read(self, chunk: Chunk) -> None:
        """Count one chunk."""
        assert self.probe is not None
        activations = chunk.activations
        sink_N = sinks_of(activations, self.probe)
        counted = [one.counted(activations) for one in self.states]
        pair_N = np.all(counted, axis=0) & ~sink_N
        self.left_out += int((~np.any(counted, axis=0)).sum())
        self.sinks += int(sink_N.sum())
        self.pair_tokens += int(pair_N.sum())
        log_N = np.log10(np.maximum(activations.norm_N.cpu().double().numpy(), 1e-4))
        for row, some in enumerate((np.ones_like(sink_N), sink_N)):
            self.norm_counts[row] += np.histogram(log_N[some], NORM_EDGES)[0]
        columns: dict[str, Array] = {
            "id": activations.token_N.cpu().numpy(),
            "document": activations.doc_N.cpu().numpy(),
        }
        probe = self.probe
        r = each(lambda i: self.states[i].read(chunk, probe, counted[i], pair_N), range(len(counted)))
        for i, counted_N in enumerate(counted):
            columns[f"r{i}"] = r[i]
            columns[f"flags{i}"] = (sink_N * SINK | counted_N * COUNTED).astype(np.uint8)
        self._sample(chunk, pair_N)
        self.tokens.add(columns, chunk.start_S1[:-1] + chunk.first, chunk.documents)
        self.done_chunks += 1
        if self.pairs.due:
            self.pairs.count_waiting()
        if time.monotonic() - self._saved_at > CHECKPOINT_SECONDS:
            self.save()

    def _sample(self, chunk: Chunk, pair_N: Array) -> None:
        if chunk.first >= SAMPLE_TOKENS:
            return
        n = min(SAMPLE_TOKENS - chunk.first, len(chunk))
        self.sample_pair.append(pair_N[:n])
        if chunk.labels_NC is not None and chunk.labelled_N is not None:
            self.sample_labels.append((chunk.labels_NC[:n], chunk.labelled_N[:n] & pair_N[:n]))
        if chunk.first + len(chunk) >= SAMPLE_TOKENS:
            self.pairs.choose(np.concatenate(self.sample_pair))

    def complete(self) -> None:
        """What is left to count when all tokens were read."""
        if not self.pairs.sums:
            self.pairs.choose(np.concatenate(self.sample_pair))
        self.pairs.count_waiting()
        for one in self.states:
            one.windows.flush()

    # going on

    def save(self) -> None:
        """A checkpoint: whoever goes on from it does so after the chunks that were read."""
        if self.pairs.sums:
            self.pairs.count_waiting()
        arrays = {f"sae{i}/{name}": value for i, one in enumerate(self.states) for name, value in one.arrays().items()}
        arrays |= {f"pairs/{name}": value for name, value in self.pairs.arrays().items()}
        arrays["norms"] = self.norm_counts
        if self.sample_pair:
            arrays["sample_pair"] = np.concatenate(self.sample_pair)
        if self.sample_labels:
            labels, labelled = (np.concatenate(one) for one in zip(*self.sample_labels, strict=True))
            arrays |= {"labels": labels, "labelled": labelled}
        counts = {name: getattr(self, name) for name in ("left_out", "sinks", "done_chunks", "pair_tokens")}
        assert self.probe is not None
        record = {
            "identity": [self.identity, CHECKPOINT],
            "counts": counts,
            "probe": {**asdict(self.probe), "median_r": dict(self.probe.median_r)},
            "there": [self.tokens.count, self.tokens.sequences],
        }
        for one in self.states:
            one.windows.flush()
        arrays["record"] = np.frombuffer(json.dumps(record).encode(), np.uint8)
        with replaced(self.work / "checkpoint.npz") as staged, staged.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        self._saved_at = time.monotonic()

    def _checkpoint(self) -> tuple[dict[str, Any], dict[str, Array]] | None:
        path = self.work / "checkpoint.npz"
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        record = json.loads(arrays["record"].tobytes())
        return (record, arrays) if record["identity"] == [self.identity, CHECKPOINT] else None

    def _restore(self, record: dict[str, Any], arrays: dict[str, Array]) -> None:
        for name, value in record["counts"].items():
            setattr(self, name, value)
        known = record["probe"]
        self.probe = Probe(**{**known, "quantiles": tuple(known["quantiles"]), "cuts": tuple(known["cuts"])})
        self.norm_counts = arrays["norms"]
        if "sample_pair" in arrays:
            self.sample_pair = [arrays["sample_pair"]]
        if "labels" in arrays:
            self.sample_labels = [(arrays["labels"], arrays["labelled"])]

        def part(start: str) -> dict[str, Array]:
            return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}

        for i, one in enumerate(self.states):
            one.restore(part(f"sae{i}/"))
        self.pairs.restore(part("pairs/"))

    @property
    def labels(self) -> tuple[Array, Array] | None:
        """(n, C) bool labels and (n,) which of the sample's tokens AUROCs are measured on; None without labels."""
        if not self.sample_labels:
            return None
        labels, labelled = (np.concatenate(one) for one in zip(*self.sample_labels, strict=True))
        return labels, labelled
