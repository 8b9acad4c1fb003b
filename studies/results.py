"""Numbers of finished runs, arm by arm and seed by seed, and what may be said of their differences.

Arms of one run share data and order, so differences are paired within a seed. Two kinds of interval: over seeds,
Student's t of the per-seed differences (2 degrees of freedom with three seeds: wide, as it should be); for probing over
seeds and concepts together, a bootstrap that draws both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from cosae.run.folder import EVALUATION, RUN, read_json
from studies.measured import extra
from studies.runsets import SEEDS, ensure, finished, folder_of

RESAMPLES = 4000


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def sign(self) -> int:
        """+1 or −1 where the interval excludes 0, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def train(*names: str) -> None:
    """Train every run of these sets that is not there yet."""
    for name in names:
        ensure(name)


def seeds(name: str) -> list[int]:
    """Seeds of a set whose run is finished."""
    return [seed for seed in SEEDS if finished(folder_of(name, seed))]


@lru_cache(maxsize=64)
def evaluation(name: str, seed: int) -> dict[str, Any]:
    """evaluation.json of one run."""
    return read_json(folder_of(name, seed) / EVALUATION)


@lru_cache(maxsize=64)
def record(name: str, seed: int) -> dict[str, Any]:
    """run.json of one run."""
    return read_json(folder_of(name, seed) / RUN)


@lru_cache(maxsize=64)
def more(name: str, seed: int) -> dict[str, Any]:
    """extra.json of one run."""
    return extra(name, seed)


def recon(name: str, arm: str, key: str = "fve", sinks: str = "sinks_out") -> list[float]:
    """A number of the reconstruction of one arm, one value per seed."""
    return [evaluation(name, seed)["reconstruction"][arm][sinks][key] for seed in seeds(name)]


def exponents(name: str, arm: str) -> list[float]:
    """The mean exponent at the end, one value per seed."""
    return [evaluation(name, seed)["exponents"][arm]["mean"] for seed in seeds(name)]


def recovered(name: str, arm: str, key: str) -> list[float]:
    """A number of the recovery of a known dictionary, one value per seed."""
    return [evaluation(name, seed)["recovery"][arm][key] for seed in seeds(name)]


def norm_driven(name: str, arm: str, sinks: str = "sinks_out") -> list[float]:
    """Share of firings that come or go with the length alone, one value per seed."""
    return [more(name, seed)["arms"][arm]["norm_driven"][sinks]["share"] for seed in seeds(name)]


def difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean paired difference over seeds with its t-interval."""
    gaps = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    mean = float(gaps.mean())
    if len(gaps) < 2:
        return Estimate(mean, float("-inf"), float("inf"))
    half = float(stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps)))
    return Estimate(mean, mean - half, mean + half)


def aurocs(name: str, arm: str, rule: str = "auroc", sinks: str = "sinks_out") -> list[Mapping[str, float]]:
    """Held-out AUROC by contextual concept of the latent that the rule chose, one mapping per seed."""
    if rule == "standardised_difference" or arm.startswith("standard, read"):
        return [more(name, seed)[f"probing_{sinks}"][arm][rule] for seed in seeds(name)]
    found = []
    for seed in seeds(name):
        probing = evaluation(name, seed)["probing"][sinks]
        values = probing["arms"][arm][rule]["auroc"]
        listed = zip(probing["concepts"], values, strict=True)
        found.append({concept["name"]: value for concept, value in listed if concept["group"] == "contextual"})
    return found


def alignment(
    name: str, arm: str, baseline: str = "standard", rule: str = "auroc", sinks: str = "sinks_out"
) -> tuple[float, Estimate]:
    """Mean AUROC of an arm over seeds and concepts, and its difference from the baseline, seeds and concepts drawn."""
    mine, theirs = aurocs(name, arm, rule, sinks), aurocs(name, baseline, rule, sinks)
    shared = sorted(set.intersection(*(set(one) for one in (*mine, *theirs))))
    gap_SC = np.array([[a[c] - b[c] for c in shared] for a, b in zip(mine, theirs, strict=True)])
    level = float(np.mean([[a[c] for c in shared] for a in mine]))
    rng = np.random.default_rng(0)
    n_seeds, n_concepts = gap_SC.shape
    drawn = []
    for _ in range(RESAMPLES):
        rows, columns = rng.integers(n_seeds, size=n_seeds), rng.integers(n_concepts, size=n_concepts)
        drawn.append(gap_SC[rows][:, columns].mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return level, Estimate(float(gap_SC.mean()), float(low), float(high))


def mean(values: Sequence[float]) -> float:
    """The mean over seeds."""
    return float(np.mean(list(values)))
