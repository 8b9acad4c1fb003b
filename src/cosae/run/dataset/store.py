"""A run's data from a store of activations: neither the model nor the text is needed any more."""

from __future__ import annotations

import torch
from torch import Tensor

from cosae.activations import perturbation as perturbations
from cosae.activations.store.reader import open_store
from cosae.activations.store.source import BLOCK_ROWS, StoreSource
from cosae.errors import CosaeError
from cosae.recipe import Recipe
from cosae.run.dataset.corpus import Side
from cosae.run.dataset.dataset import Sample, Split, split_held_out
from cosae.text.concepts.table import CONCEPTS


class StoreData:
    """What a run needs of its data (cosae.run.dataset.dataset.Data), from the store that `recipe.data.store` names.

    Held-out and calibration tokens are the store's held-out rows, drawn as those of a live capture are; probing has
    labels where the store was captured from the embedded corpus under the same list of concepts. Raises CosaeError for
    a store that cannot be read, is damaged, or has no held-out rows.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.data.store is not None
        self._recipe = recipe
        self.store = open_store(recipe.data.store, recipe.data.store_site)
        self.site = self.store.site
        self.model_name: str | None = self.store.record["request"].get("model")
        if not self.store.n_rows("held_out"):
            raise CosaeError(
                f"{self.store.folder} has no held-out rows, on which thresholds are calibrated: capture a store with "
                "--held-out-tokens above 0."
            )
        self.source = StoreSource(self.store, seed=recipe.training.seed)
        self.has_concepts = self.store.concepts == tuple(concept.name for concept in CONCEPTS)

    def sample(self, split: Split, n_tokens: int) -> Sample:
        """Rows of one split with the run's perturbation on them, labels with them where there are any."""
        side: Side = "train" if split == "train" else "held_out"
        if side == "train":
            row_N = self._spread(n_tokens)
        else:
            row_N = split_held_out(self.store.n_rows("held_out"), split, self._recipe.evaluation)
        found = self.store.take(side, row_N)
        used = torch.unique(found.doc_N).tolist()
        first = len(self.store.documents("held_out")) if side == "train" else 0
        names = self.store.documents(side)
        documents = tuple(names[i - first] for i in used if i >= 0)
        labels_NC, labelled_N = self.store.labels(side, row_N) if self.has_concepts else (None, None)
        perturbation = self._recipe.sample_perturbation(split)
        return Sample(perturbations.apply(found, perturbation, 0, side), labels_NC, labelled_N, documents=documents)

    def _spread(self, n_tokens: int) -> Tensor:
        """Ascending numbers of about n_tokens train rows: whole blocks drawn from all over the store."""
        n = self.store.n_rows("train")
        first_N = torch.arange(0, n, BLOCK_ROWS)
        order = torch.randperm(len(first_N), generator=torch.Generator().manual_seed(0))
        chosen_N = first_N[order[: -(-n_tokens // BLOCK_ROWS)].sort().values]
        row_N = (chosen_N[:, None] + torch.arange(BLOCK_ROWS)).flatten()
        return row_N[row_N < n]
