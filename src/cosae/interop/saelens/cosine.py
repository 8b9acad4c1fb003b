"""What SAELens writes for cosae's architectures → `cosae.SAE` with the codes of the SAELens object. Needs no SAELens.

Enters SAELens' configuration and tensors of an inference model or of a training checkpoint (`files` reads them).

    architecture                  written by                                     becomes
    cosine_jumprelu               inference models, and checkpoints of it        batch_topk, threshold per feature
    cosine_batchtopk              checkpoints                                    batch_topk, topk_threshold if set
    cosine_matryoshka_batchtopk   checkpoints                                    the same with prefixes
    cosine_topk                   checkpoints                                    topk
    cosae, cosae_SCORE_SELECTOR   cosae's own SAEs, saved by either library      as they were
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cosae.errors import CosaeError, check_choice, short
from cosae.interop.linear import MOST_LOG, MOST_VALUE
from cosae.interop.saelens.folds import fold_decoder_norm, fold_input_scale
from cosae.io.legacy import upgrade
from cosae.io.untrusted import one_line
from cosae.sae import file
from cosae.sae.config import SAEConfig
from cosae.sae.model import SAE
from cosae.sae.score import SCORES
from cosae.sae.selector import SELECTORS

GENERIC = "cosae"
JUMPRELU = "cosine_jumprelu"
BATCHTOPK = "cosine_batchtopk"
MATRYOSHKA = "cosine_matryoshka_batchtopk"
TOPK = "cosine_topk"
OWN_ARCHITECTURES = tuple(f"cosae_{score}_{selector}" for score in SCORES for selector in SELECTORS)
"""What cosae's own cfg.json files carry (cosae.sae.file.saelens_architecture)."""
JUMPRELU_SCORES = tuple(name for name, family in SCORES.items() if family.value_owner is None)
"""Scores of the architectures cosine_…: what fires there is worth its score. Other scores are kept as cosae's own."""
ARCHITECTURES = (JUMPRELU, BATCHTOPK, MATRYOSHKA, TOPK, GENERIC, *OWN_ARCHITECTURES)
"""Architectures that `assemble` takes."""
SCALER = "activation_scaler.json"
EXPONENTIALS = ("scale_a", "scale_a_base", "scale_a_delta", "scale_b", "value_exponent", "r_mag")
"""Tensors of which an exponential is taken."""
OUR_NAMES = {
    "model_name": "model",
    "hook_name": "hook_name",
    "hf_hook_name": "hf_hook_name",
    "dataset_path": "dataset",
    "context_size": "context_size",
}
"""SAELens' names of metadata → cosae's."""


def assemble(
    config: Mapping[str, Any], state: Mapping[str, Tensor], source: str, scaling_factor: float | None = None
) -> SAE:
    """A SAELens configuration and state dict of one of ARCHITECTURES → SAE; `source` names them in errors.

    scaling_factor: what activations were multiplied by in training, where that is not folded in yet. On the CPU,
    float32 (float64 where the file is). Raises CosaeError for a damaged configuration, tensors that do not fit, and a
    convention (whitening, runtime normalisation, no centre) that cosae cannot represent.
    """
    dtype = torch.float64 if getattr(state.get("W_dec"), "dtype", None) == torch.float64 else torch.float32
    weights = {n: value.detach().cpu().to(dtype) if value.is_floating_point() else value for n, value in state.items()}
    for name, value in weights.items():
        most = MOST_LOG if name in EXPONENTIALS else MOST_VALUE
        if "threshold" not in name and not bool((value.abs() <= most).all()):  # NaN is not
            raise CosaeError(f"{source}: {name[:60]} holds NaN, infinity or more than {most:g}; the file is damaged.")
    try:
        if config["architecture"] == GENERIC or config["architecture"] in OWN_ARCHITECTURES:
            cfg = own_config(config)
        else:
            cfg, weights = _cosine(config, weights, scaling_factor)
    except CosaeError as error:
        raise CosaeError(f"{source}: {error}") from None
    except Exception as error:  # a setting of another kind fails wherever it is first used
        raise CosaeError(f"{source}: the configuration beside it is damaged ({one_line(error)}).") from None
    sae = file.from_disk(cfg, weights, source)
    sae.metadata = _metadata(config)
    return sae


def own_config(config: Mapping[str, Any]) -> SAEConfig:
    """The SAEConfig in section `sae` of a cfg.json. Raises CosaeError or TypeError on a damaged one."""
    section = config.get("sae")
    if not isinstance(section, Mapping) or not section:
        raise CosaeError(
            f"architecture {short(config.get('architecture'))} needs its section 'sae', which is not there."
        )
    cfg = SAEConfig(**{**section, "prefixes": tuple(section.get("prefixes", ()))})
    if (cfg.d_in, cfg.d_sae) != (config.get("d_in"), config.get("d_sae")):
        got = f"{short(config.get('d_in'))} and {short(config.get('d_sae'))}"
        raise CosaeError(f"d_in and d_sae must be section 'sae''s {cfg.d_in} and {cfg.d_sae}. Got {got} instead.")
    return cfg


def check_conventions(config: Mapping[str, Any], allowed: tuple[str, ...] = ("none",)) -> None:
    """Raises CosaeError where SAELens' fields ask for what a cosine score cannot express."""
    kind = config.get("architecture")
    check_choice(f"normalize_activations of {kind}", config.get("normalize_activations", "none"), allowed)
    if not config.get("apply_b_dec_to_input", True):
        raise CosaeError(f"apply_b_dec_to_input must be true for {kind}: its cosine is around b_dec. Got false.")


def _cosine(
    config: Mapping[str, Any], weights: dict[str, Tensor], scaling_factor: float | None
) -> tuple[SAEConfig, dict[str, Tensor]]:
    architecture = config["architecture"]
    check_conventions(config, ("none", "expected_average_only_in"))
    score = config.get("score", "")
    check_choice(f"the score of {architecture}", score, JUMPRELU_SCORES)
    _check_names(architecture, score, weights)
    if config.get("rescale_acts_by_decoder_norm", False):
        kept = {name: value for name, value in weights.items() if name != "threshold"}
        weights = {**weights, **fold_decoder_norm(kept, score)}  # thresholds are in units of the scaled scores already
    if config.get("normalize_activations") == "expected_average_only_in":
        if scaling_factor is None:
            raise CosaeError(f"activations were rescaled, and {SCALER} does not say by how much: copy all of it.")
        weights = {**weights, **fold_input_scale(weights, score, scaling_factor)}
    d_sae = weights["W_dec"].shape[0]
    step = weights.pop("topk_threshold", None)
    if architecture != TOPK and step is not None and float(step) > 0:
        weights["threshold"] = step.expand(d_sae)
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].clamp_min(0.0)  # SAELens' JumpReLU lets no negative score pass
    score, weights = _owners(score, weights, config)
    cfg = SAEConfig(
        d_in=config["d_in"],
        d_sae=config["d_sae"],
        score=score,
        selector="topk" if architecture == TOPK else "batch_topk",
        k=_k(config),
        prefixes=tuple(config.get("matryoshka_widths", ())) if architecture == MATRYOSHKA else (),
        n_groups=config.get("n_groups", 4),
    )
    return cfg, weights


def _check_names(architecture: str, score: str, weights: Mapping[str, Tensor]) -> None:
    """Names and ranks that the folds rely on; shapes are checked when the SAE is made."""
    needed: dict[str, tuple[int, ...]] = {"W_enc": (2,), "W_dec": (2,), "b_enc": (1,), "b_dec": (1,)}
    if score != "inner":
        needed |= {"scale_a": (0, 1), "scale_b": (0, 1)}
    if architecture == JUMPRELU:
        needed["threshold"] = (1,)
    if architecture in (BATCHTOPK, MATRYOSHKA):
        needed["topk_threshold"] = (0,)
    if missing := sorted(set(needed) - set(weights)):
        raise CosaeError(f"{architecture} needs the tensors {', '.join(missing)}, which are not there.")
    d_in, d_sae = (*weights["W_enc"].shape, 0)[:2]
    for name, ranks in needed.items():
        shape = tuple(weights[name].shape)
        fits = name in ("W_enc", "W_dec") or shape in ((), (d_in,) if name == "b_dec" else (d_sae,))
        if len(shape) not in ranks or not fits or not weights[name].is_floating_point():
            raise CosaeError(f"tensor {name} of {architecture} has a shape that does not fit: {shape}.")
    if tuple(weights["W_dec"].shape) != (d_sae, d_in):
        raise CosaeError(f"W_dec must have shape {(d_sae, d_in)}. Got {tuple(weights['W_dec'].shape)} instead.")


def _owners(score: str, weights: dict[str, Tensor], config: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Shapes of a and b as the named score owns them; one per feature where the file has them so."""
    if score == "inner":
        return score, weights
    a, b, d_sae = weights["scale_a"], weights["scale_b"], weights["W_dec"].shape[0]
    owner = SCORES[score].exponent_owner
    if owner in ("fixed", "shared") and a.ndim == 1:
        score, owner = "cosine_per_feature", "feature"
    if owner in ("feature", "base_delta", "group"):
        a, b = a.expand(d_sae), b.expand(d_sae)
    if owner == "group":
        groups = int(config.get("n_groups", 4))
        size = max(d_sae // max(groups, 1), 1)
        group_F = (torch.arange(d_sae) // size).clamp_max(groups - 1)
        if not bool((a[group_F * size] == a).all()):
            score = "cosine_per_feature"
    weights = {**weights, "scale_a": a, "scale_b": b}
    if score == "cosine_base_delta":
        weights |= {"scale_a_base": a.new_zeros(()), "scale_a_delta": a}
    return score, weights


def _k(config: Mapping[str, Any]) -> int:
    """k as a whole number between 1 and d_sae: the file's own, else what training says, else its measured L0."""
    metadata = config.get("metadata") or {}
    details = metadata.get("training_architecture_details") or {}
    for value in (config.get("k"), details.get("k"), details.get("target_l0"), metadata.get("l0")):
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return min(max(1, round(value)), int(config["d_sae"]))
    return min(32, int(config["d_sae"]))


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """cosae's own metadata where the file carries it, else SAELens' metadata, the known under our names."""
    own, metadata = config.get("provenance") or upgrade(config.get("facts")), config.get("metadata")
    if isinstance(own, Mapping) and own:
        return dict(own)
    metadata = dict(metadata) if isinstance(metadata, Mapping) else {}
    known = {ours: metadata[name] for name, ours in OUR_NAMES.items() if metadata.get(name) is not None}
    return {**known, "format": "saelens", "architecture": config["architecture"], "saelens": metadata}
