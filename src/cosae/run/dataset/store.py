"""A store of activations: neither the model nor the text is needed any more."""

from __future__ import annotations

import torch
from torch import Tensor

from cosae.activations.sample import Sample, SinkRule
from cosae.activations.store.reader import open_store
from cosae.activations.store.source import BLOCK_ROWS, StoreSource
from cosae.activations.store.statistics import noise_warning
from cosae.errors import CosaeError
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Dataset, DataUse, Sizes, Split, side_of, split_held_out
from cosae.text.concepts.table import CONCEPTS


class StoreDataset(Dataset):
    """The store that `config.store` names.

    Held-out and calibration tokens are the store's held-out rows, drawn as those of a live capture are; probing has
    labels where the store was captured from the embedded corpus under the same list of concepts. Raises CosaeError for
    a store that cannot be read, is damaged, or has no held-out rows.
    """

    def __init__(self, config: DataConfig, use: DataUse) -> None:
        super().__init__(config, use)
        assert config.store is not None
        self.store = open_store(config.store, config.store_site)
        self.site = self.store.site
        self.model_name = self.store.record["request"].get("model")
        if not self.store.n_rows("held_out"):
            what = f"{self.store.folder} has no held-out rows, on which thresholds are calibrated"
            raise CosaeError(f"{what}: capture a store with --held-out-tokens above 0.")
        self.source: StoreSource = StoreSource(self.store, seed=use.seed)
        self.has_concepts = self.store.concepts == tuple(concept.name for concept in CONCEPTS)

    @property
    def warnings(self) -> list[str]:
        warning = noise_warning(self.store.statistics, self.store.dtype)
        return [] if warning is None else [f"store {self.store.folder.name}: {warning}."]

    def sizes(self) -> Sizes:
        return Sizes(self.source.d_in, (), self.source.chunk_tokens)

    def sample(self, split: Split, n_tokens: int, rule: SinkRule | None = None) -> Sample:
        side = side_of(split)
        held_out = self.store.n_rows("held_out")
        row_N = self._spread(n_tokens) if side == "train" else split_held_out(held_out, split, self.use)
        found = self.store.take(side, row_N)
        first = len(self.store.documents("held_out")) if side == "train" else 0
        names = self.store.documents(side)
        documents = tuple(names[i - first] for i in torch.unique(found.doc_N).tolist() if i >= 0)
        labels_NC, labelled_N = self.store.labels(side, row_N) if self.has_concepts else (None, None)
        return Sample.of(
            self._perturbed(found, split), rule, labels_NC=labels_NC, labelled_N=labelled_N, documents=documents
        )

    def _spread(self, n_tokens: int) -> Tensor:
        """Ascending numbers of about n_tokens train rows: whole blocks drawn from all over the store."""
        n = self.store.n_rows("train")
        first_N = torch.arange(0, n, BLOCK_ROWS)
        order = torch.randperm(len(first_N), generator=torch.Generator().manual_seed(0))
        chosen_N = first_N[order[: -(-n_tokens // BLOCK_ROWS)].sort().values]
        row_N = (chosen_N[:, None] + torch.arange(BLOCK_ROWS)).flatten()
        return row_N[row_N < n]
