"""Feature dashboards as SAEDashboard 0.8 writes them for Neuronpedia: `batch-{i}.json`, one feature an object.

What SAEDashboard does and this repeats: a window is a whole sequence without its first token; the top group holds the
largest activations (bin_min = bin_contains = −1, bin_max the largest of all); intervals cut 0 … max into equal
lengths, both ends in, bin_contains being the share of all tokens in one, silent tokens counted in the lowest; values
are rounded to three decimals; dead features have no windows. What is done better: windows of a group are of different
sequences, top windows all fire, an interval's windows are drawn from tokens that fire first, and partners are sought
among all features, not among the 128 of a batch. Signed codes are ranked by size and written with their sign.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cosae.errors import CosaeError
from cosae.interop.cached_codes import Array, CachedCodes, cache_codes
from cosae.interop.neuronpedia.correlations import correlated_features, correlated_neurons
from cosae.interop.neuronpedia.settings import Dashboard
from cosae.interop.neuronpedia.windows import histogram, rounded, windows
from cosae.io.staged import filled
from cosae.models.sources import digest_sequences
from cosae.models.unembed import head_shares, residual_directions, spellings, unembedding
from cosae.sae.model import SAE
from cosae.types import Sequences, Site

MARK, SETTINGS, SKIPPED = "cosae_export.json", "run_settings.json", "skipped_indexes.json"
FORMAT, VERSION = "cosae-neuronpedia", 1
LOGITS, PARTNERS = 10, 3
BLOCK_ENTRIES = 2**23
"""Entries of a block of features held at once: 16 bytes each, and as many again while they are sorted."""


def write_dashboards(
    model: nn.Module,
    tokenizer: Any,
    site: Site,
    sae: SAE,
    sequences: Sequences,
    out: Path,
    settings: Dashboard,
    *,
    metadata: Mapping[str, Any] | None = None,
    batch_sequences: int = 16,
    log: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the export to the folder `out`, whole or not at all; an earlier export of this kind there is replaced.

    sequences  (S, T) without padding, 3 ≤ T ≤ 1025; metadata: plain values kept in cosae_export.json
    Raises CosaeError as `cache_codes` does, for T out of range, and where `out` holds something else.
    """
    context = int(sequences.ids_ST.shape[1])
    if not 3 <= context <= 1025:
        raise CosaeError(f"sequences must have 3 to 1025 tokens (Neuronpedia shows 1024). Got {context} instead.")
    with filled(out, MARK) as staged, tempfile.TemporaryDirectory(prefix=".codes.", dir=staged) as work:
        factor = settings.ignore_norm_above
        ignored = None if factor is None else lambda norm_N: norm_N > factor * norm_N.median()
        options: dict[str, Any] = {"ignored": ignored, "batch_sequences": batch_sequences, "log": log}
        codes = cache_codes(model, site, sae, sequences, Path(work), **options)
        log("correlations")
        tables = _Tables(model, tokenizer, site, sae, codes)
        ranges = batches(sae.d_sae, settings.features_per_batch)
        named = {"model_id": settings.model_id, "layer": settings.layer, "sae_set": settings.set_name}
        for number, (first, stop) in enumerate(ranges):
            features = list(_features(codes, tables, settings, first, stop))
            batch = {**named, "sae_id_suffix": None, "features": features}
            (staged / f"batch-{number}.json").write_text(json.dumps(batch, allow_nan=False), encoding="utf-8")
            log(f"wrote {number + 1} of {len(ranges)} batches")
        _write_settings(staged, settings, sequences, codes, metadata or {})
    return out


def batches(d_sae: int, size: int) -> list[tuple[int, int]]:
    """Ranges of features, of at most `size` and nearly equal, in order."""
    edges = np.linspace(0, d_sae, -(-d_sae // size) + 1).round().astype(int).tolist()
    return list(itertools.pairwise(edges))


class _Tables:
    """What is known of all features before any window is looked for."""

    def __init__(self, model: nn.Module, tokenizer: Any, site: Site, sae: SAE, codes: CachedCodes) -> None:
        self.unembedding_VD = unembedding(model)
        n_spelled = max(int(codes.ids_ST.max()) + 1, 0 if self.unembedding_VD is None else len(self.unembedding_VD))
        self.spelled = spellings(tokenizer, n_spelled)
        self.row_tokens = [[self.spelled[i] for i in row] for row in codes.ids_ST[:, 1:].tolist()]
        self.partners = {
            "neurons": correlated_neurons(codes, PARTNERS),
            "features": correlated_features(codes, PARTNERS),
        }
        self.decoder_FD: Array = sae.W_dec.detach().float().cpu().numpy().astype(np.float64)
        self.direction_FD = residual_directions(model, site, sae.W_dec)
        shares = head_shares(model, site, sae.W_dec)
        self.heads_FH: Array | None = None if shares is None else shares.double().numpy()


def _features(
    codes: CachedCodes, tables: _Tables, settings: Dashboard, first: int, stop: int
) -> Iterator[dict[str, Any]]:
    """Features first … stop − 1, in order; their entries are read in blocks that fit in memory."""
    start = first
    while start < stop:
        held = np.cumsum(codes.sums.count_F[start:stop])
        end = start + max(1, int(np.searchsorted(held, BLOCK_ENTRIES, "right")))
        offset, token_E, value_E = codes.entries(start, min(end, stop))
        for i, feature in enumerate(range(start, min(end, stop))):
            span = slice(int(offset[i]), int(offset[i + 1]))
            yield _feature(feature, token_E[span], value_E[span].astype(np.float64), codes, tables, settings)
        start = end


def _feature(
    feature: int, token_e: Array, value_e: Array, codes: CachedCodes, tables: _Tables, settings: Dashboard
) -> dict[str, Any]:
    """One feature under SAEDashboard's keys; token_e ascending, value_e its codes there."""
    heights, centres = histogram(value_e)
    row_D, logits = tables.decoder_FD[feature], _logits(feature, tables)
    aligned = np.argsort(-row_D, kind="stable")[:PARTNERS]
    correlated: dict[str, Any] = {}
    for kind, found in tables.partners.items():
        correlated[f"correlated_{kind}_indices"] = found.id_Fk[feature].tolist()
        correlated[f"correlated_{kind}_l1"] = rounded(found.cosine_Fk[feature])
        correlated[f"correlated_{kind}_pearson"] = rounded(found.pearson_Fk[feature])
    return {
        "feature_index": feature,
        "neuron_alignment_indices": aligned.tolist(),
        "neuron_alignment_values": rounded(row_D[aligned]),
        "neuron_alignment_l1": rounded(np.abs(row_D[aligned]) / max(np.abs(row_D).sum(), 1e-30)),
        **correlated,
        **{name: value for name, value in logits.items() if "hist" not in name},
        "frac_nonzero": len(token_e) / codes.n_tokens,
        "freq_hist_data_bar_values": rounded(centres),
        "freq_hist_data_bar_heights": heights,
        **{name: value for name, value in logits.items() if "hist" in name},
        "n_prompts_total": len(codes.ids_ST),
        "n_tokens_in_prompt": int(codes.ids_ST.shape[1]),
        "dataset": settings.dataset,
        "decoder_weights_dist": [] if tables.heads_FH is None else tables.heads_FH[feature].tolist(),
        "activations": list(windows(token_e, value_e, codes, tables.row_tokens, settings, (settings.seed, feature))),
        "vector": [],
    }


def _logits(feature: int, tables: _Tables) -> dict[str, Any]:
    """The tokens the direction raises and lowers most; empty where it does not lie in the residual stream."""
    logit_V = np.zeros(0)
    if tables.direction_FD is not None and tables.unembedding_VD is not None:
        logit_V = (tables.unembedding_VD @ tables.direction_FD[feature]).double().numpy()
    order = np.argsort(logit_V, kind="stable")
    low, high = order[:LOGITS], order[::-1][:LOGITS]
    heights, centres = histogram(logit_V)
    return {
        "neg_str": [tables.spelled[i] for i in low],
        "neg_values": rounded(logit_V[low]),
        "pos_str": [tables.spelled[i] for i in high],
        "pos_values": rounded(logit_V[high]),
        "logits_hist_data_bar_heights": heights,
        "logits_hist_data_bar_values": rounded(centres),
    }


def _write_settings(
    folder: Path, settings: Dashboard, sequences: Sequences, codes: CachedCodes, metadata: Mapping[str, Any]
) -> None:
    n_rows, context = sequences.ids_ST.shape
    run = {
        "sae_set": settings.set_name,
        "np_set_name": settings.set_name,
        "model_id": settings.model_id,
        "layer": settings.layer,
        "huggingface_dataset_path": settings.dataset,
        "n_prompts_total": n_rows,
        "n_tokens_in_prompt": context,
        "n_features_at_a_time": settings.features_per_batch,
        "n_quantiles": settings.n_quantiles,
        "top_acts_group_size": settings.top,
        "quantile_group_size": settings.per_quantile,
        "ignore_high_activation_norm_multiple": settings.ignore_norm_above,
    }
    skipped: dict[str, Any] = {"model_id": settings.model_id, "layer": str(settings.layer)}
    skipped |= {"sae_set": settings.set_name, "log_sparsity": None, "skipped_indexes": []}
    mark = {
        "format": FORMAT,
        "version": VERSION,
        "settings": asdict(settings),
        "sequences_sha256": digest_sequences(sequences),
        "features": codes.d_sae,
        "dead_features": int((codes.sums.count_F == 0).sum()),
        "tokens_read": codes.sums.n,
        **metadata,
    }
    for name, value in ((SETTINGS, run), (SKIPPED, skipped), (MARK, mark)):
        (folder / name).write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
