"""A synthetic world: known features, a chosen law of norms."""

from __future__ import annotations

from cosae.activations.sample import Sample, SinkRule
from cosae.activations.synthetic import SyntheticSource
from cosae.recipe import DataConfig
from cosae.run.dataset.base import Dataset, DataUse, Sizes, Split, side_of
from cosae.run.plan.resources import Item

CHUNK, FLOAT = 8192, 4


class WorldDataset(Dataset):
    """Samples carry the true codes and the true features (F, D)."""

    def __init__(self, config: DataConfig, use: DataUse) -> None:
        super().__init__(config, use)
        assert config.world is not None
        self.source: SyntheticSource = SyntheticSource(config.world)

    def sizes(self) -> Sizes:
        world = self.source.world
        features = Item("true features of the world", FLOAT * world.n_features * world.d_in)
        return Sizes(world.d_in, (features,), CHUNK, 4 * CHUNK * FLOAT * world.d_in)

    def sample(self, split: Split, n_tokens: int, rule: SinkRule | None = None) -> Sample:
        activations, truth = self.source.sample(n_tokens, side_of(split), index=int(split == "calibration"))
        perturbed = self._perturbed(activations, split)
        return Sample.of(perturbed, rule, truth=truth, feature_FD=self.source.feature_FD)
