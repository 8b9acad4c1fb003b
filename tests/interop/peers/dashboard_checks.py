"""Runs where sae-dashboard is installed: its own functions on dense codes, for the numbers of an export to be held
against. Prints one JSON object.

    python dashboard_checks.py NUMBERS.npz

NUMBERS holds codes (S, T, F) with ignored tokens silent, x (S, T, D), read (S, T), decoder (F, D), unembedding (V, D).
SAEDashboard asks for sae_lens and transformer_lens < 3 as it is imported; what is used here needs neither, so that
empty modules stand in.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch


def main(path: str) -> list[Any]:
    origin = importlib.util.find_spec("sae_dashboard")
    assert origin is not None
    assert origin.origin is not None
    folder = Path(origin.origin).parent
    open_stand_ins(folder)
    from sae_dashboard.components_config import SequencesConfig
    from sae_dashboard.data_parsing_fns import get_features_table_data, get_logits_table_data
    from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
    from sae_dashboard.sequence_data_generator import SequenceDataGenerator
    from sae_dashboard.utils_fns import HistogramData, RollingCorrCoef

    numbers = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    codes, x, read = numbers["codes"], numbers["x"], numbers["read"]
    features, neurons = RollingCorrCoef(with_self=True, indices=list(range(codes.shape[2]))), RollingCorrCoef()
    features.update(codes[read].T, codes[read].T)
    neurons.update(codes[read].T, x[read].T)
    tables = get_features_table_data(numbers["decoder"], 3, neurons, features)
    shown = SequencesConfig(buffer=None, n_quantiles=5, top_acts_group_size=20, quantile_group_size=5)
    cfg = SimpleNamespace(feature_centric_layout=SimpleNamespace(seq_cfg=shown))
    generator = SequenceDataGenerator(cfg, torch.zeros(codes.shape[:2], dtype=torch.int64), numbers["unembedding"].T)
    answer = []
    for i in range(codes.shape[2]):
        dense = codes[..., i]
        firing = dense[dense > 0]
        logits = numbers["unembedding"] @ numbers["decoder"][i]
        table = get_logits_table_data(logits, 10)
        titles = generator.get_indices_dict(None, dense)[0]
        freq = HistogramData.from_data(firing, 50, "5 ticks", None)
        hist = HistogramData.from_data(logits, 50, "5 ticks", None)
        answer.append(
            {
                "bins": [NeuronpediaConverter._parse_sequence_group_title(title) for title in titles],
                "freq": [freq.bar_heights, freq.bar_values],
                "logits": [hist.bar_heights, hist.bar_values],
                "pos": table.top_logits,
                "neg": table.bottom_logits,
                **{name: value[i] for name, value in tables.items()},
            }
        )
    return answer


def open_stand_ins(folder: Path) -> None:
    """The package without running its __init__; sae_lens and transformer_lens as empty modules."""

    def anything(wanted: str) -> Any:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return type(wanted, (), {"__class_getitem__": classmethod(lambda cls, _: cls)})

    for name in ("sae_lens", "transformer_lens", "transformer_lens.hook_points"):
        module = ModuleType(name)
        module.__getattr__ = anything  # type: ignore[method-assign]
        sys.modules[name] = module
    lens: Any = sys.modules["transformer_lens"]
    lens.__path__ = []
    lens.utils = SimpleNamespace(to_numpy=lambda tensor: tensor.numpy())
    for name, place in (("sae_dashboard", folder), ("sae_dashboard.neuronpedia", folder / "neuronpedia")):
        package: Any = ModuleType(name)
        package.__path__ = [str(place)]
        sys.modules[name] = package


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
