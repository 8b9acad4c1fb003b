"""The SAELens plug-in: `import cosae.interop.saelens.plugin` registers cosae's architectures with SAELens.

After it `sae_lens.SAE.load_from_disk` and `from_pretrained` open cosae's own folders and what the training classes
save, and SAELens' trainers and runners take cosine scores. Needs `pip install sae-lens`; no other part of cosae does.
Importing twice changes nothing.

    to_cosae    a SAELens object of these architectures (or one of SAELens' own that cosae reads) → cosae.SAE
    from_cosae  cosae.SAE → SAELens inference object
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosae.errors import CosaeError
from cosae.interop.linear import check_autoencoder
from cosae.interop.public import Public
from cosae.interop.saelens import cosine, files
from cosae.sae import file
from cosae.sae.model import SAE

try:
    import sae_lens  # type: ignore[import-not-found]
    from sae_lens import registry
except ImportError as error:
    raise CosaeError(f"cosae.interop.saelens.plugin needs SAELens 6 ({error}): pip install sae-lens.") from None

try:
    from cosae.interop.saelens.inference import CosaeSAE, CosaeSAEConfig, CosineJumpReLUSAE, CosineJumpReLUSAEConfig
    from cosae.interop.saelens.training import (
        CosineBatchTopKTrainingSAE,
        CosineBatchTopKTrainingSAEConfig,
        CosineJumpReLUTrainingSAE,
        CosineJumpReLUTrainingSAEConfig,
        CosineMatryoshkaBatchTopKTrainingSAE,
        CosineMatryoshkaBatchTopKTrainingSAEConfig,
        CosineTopKTrainingSAE,
        CosineTopKTrainingSAEConfig,
    )

    INFERENCE = registry.SAE_CLASS_REGISTRY
    TRAINING = registry.SAE_TRAINING_CLASS_REGISTRY
except (ImportError, AttributeError) as error:
    version = getattr(sae_lens, "__version__", "of unknown version")
    raise CosaeError(f"this SAELens ({version}) lacks what the plug-in needs ({error}): use sae-lens 6.54.") from None


def register() -> None:
    """Make every architecture of ours known to SAELens; those that are known already are left alone."""
    inference: dict[str, Any] = dict.fromkeys((cosine.GENERIC, *cosine.OWN_ARCHITECTURES), (CosaeSAE, CosaeSAEConfig))
    inference[cosine.JUMPRELU] = (CosineJumpReLUSAE, CosineJumpReLUSAEConfig)
    for name, pair in inference.items():
        if name not in INFERENCE:
            registry.register_sae_class(name, *pair)
    for sae, config in (
        (CosineBatchTopKTrainingSAE, CosineBatchTopKTrainingSAEConfig),
        (CosineMatryoshkaBatchTopKTrainingSAE, CosineMatryoshkaBatchTopKTrainingSAEConfig),
        (CosineTopKTrainingSAE, CosineTopKTrainingSAEConfig),
        (CosineJumpReLUTrainingSAE, CosineJumpReLUTrainingSAEConfig),
    ):
        if config.registered not in TRAINING:
            registry.register_sae_training_class(config.registered, sae, config)


def to_cosae(sae: Any) -> SAE:
    """A SAELens object → cosae.SAE with the same codes, through SAELens' own files. Raises what reading them raises."""
    with tempfile.TemporaryDirectory() as place:
        save = getattr(sae, "save_inference_model", None) or sae.save_model
        save(place)
        return files.read(Path(place))


def from_cosae(sae: SAE, public_names: Sequence[str] = ()) -> Any:
    """A cosae.SAE → SAELens' inference object with the same codes, on the CPU.

    Of its metadata go along what cosae.interop.public lets through, and `public_names`: SAELens uploads what it holds.
    """
    check_autoencoder(sae, "SAELens' inference objects")
    sent = copy.copy(sae)
    sent.metadata = Public(tuple(public_names)).metadata(sae.metadata)
    with tempfile.TemporaryDirectory() as place:
        return sae_lens.SAE.load_from_disk(file.save(sent, Path(place) / "sae"))


register()
