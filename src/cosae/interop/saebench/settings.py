"""What SAEBench's evals are asked with: the settings of a call, and the job that one eval is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How SAEs are evaluated; paths may be given as text."""

    python: Path | None = None
    """Python of an environment with sae-bench 0.6. Default: this one."""
    model_name: str | None = None
    """Model: embedded, a folder, or a name that TransformerLens knows. Default: from the SAEs' files. Results name a
    folder local-model."""
    model_path: Path | None = None
    """Folder of a Hugging Face model, called --model-name in results; the model is then not downloaded."""
    hook_name: str | None = None
    """Hook at which the SAEs read. Default: from their files."""
    hook_layer: int | None = None
    """Block of the hook. Default: the number in its name."""
    data: Path | None = None
    """Folder with copies of data sets of the hub, under their names: LabHC/bias_in_bios/train.jsonl. Other data sets
    are downloaded."""
    dtype: str = "float32"
    """Precision of the model and of the SAEs' inputs and outputs: float32, bfloat16, float16, float64."""
    llm_batch_size: int = 32
    """Sequences per forward pass of the model."""
    device: str = "cpu"
    """Device: cpu, cuda or cuda:N."""
    seed: int = 42
    """Seed of SAEBench's evals."""
    force: bool = False
    """Replace existing results."""

    def __post_init__(self) -> None:
        for name in ("python", "model_path", "data"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))


@dataclass(frozen=True)
class Job:
    """One eval of a call.

    out        SAEBench's results go to out/{eval}; absolute, like every path here
    artifacts  folder for activations and the like; it is there, and goes when the eval is done
    settings   with the model's name as the results call it
    options    by eval: fields of its SAEBench configuration (core: arguments of its multiple_evals)
    """

    out: Path
    artifacts: Path
    settings: Settings
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def result_file(self, eval_name: str, sae_name: str) -> Path:
        """Where SAEBench puts the result of an SAE that was handed in as an object."""
        return self.out / eval_name / f"{sae_name}_custom_sae_eval_results.json"
