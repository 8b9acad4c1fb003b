"""What a dashboard shows of each feature, and under which names: the options, and all settings of an export."""

from __future__ import annotations

from dataclasses import dataclass

from cosae.errors import CosaeError, check_least


@dataclass(frozen=True)
class Options:
    """Names and sizes of the dashboards. Names that are not given come from the model, the site and the SAE."""

    model_id: str | None = None
    """Neuronpedia's name of the model, such as gemma-2-2b. Default: the model's own name."""
    set_name: str | None = None
    """Neuronpedia's name of the source set; the source is LAYER-SET. Default: cosae-PLACE-WIDTH."""
    top: int = 20
    """Number of windows with the largest activations of each feature."""
    n_quantiles: int = 5
    """Number of intervals between 0 and the largest activation of a feature."""
    per_quantile: int = 5
    """Number of windows per interval."""
    ignore_norm_above: float | None = None
    """Leave out tokens (attention sinks) above this multiple of the median norm of their chunk. Default: none."""


@dataclass(frozen=True, kw_only=True)
class Dashboard(Options):
    """Everything settled, `model_id` and `set_name` too. Raises CosaeError on a value that is not allowed."""

    layer: int
    dataset: str = ""
    """Name of the text, shown beside the windows."""
    features_per_batch: int = 128
    """Features of one file; Neuronpedia takes up to 128 in one upload."""
    seed: int = 0
    """Of the windows drawn from the intervals."""

    def __post_init__(self) -> None:
        for name in ("model_id", "set_name"):
            value = getattr(self, name)
            if not value or any(c.isspace() or c in "/\\?#" for c in value):
                raise CosaeError(f"{name} must be a name without spaces or slashes, part of an address. Got {value!r}.")
        for name, least in (("top", 1), ("n_quantiles", 0), ("per_quantile", 1), ("layer", 0)):
            check_least(name, getattr(self, name), least)
        if not 1 <= self.features_per_batch <= 128:
            raise CosaeError(f"features_per_batch must be between 1 and 128. Got {self.features_per_batch} instead.")
        if self.ignore_norm_above is not None and not self.ignore_norm_above > 1:
            raise CosaeError(f"ignore_norm_above must be above 1. Got {self.ignore_norm_above} instead.")
