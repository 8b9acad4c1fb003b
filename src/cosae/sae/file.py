"""Our one format: a directory with cfg.json, sae_weights.safetensors and self_check.safetensors.

SAELens' names and layouts on disk: W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc, b_dec, threshold (d_sae,), and the
paper's scale_a, scale_b; b_gate, r_mag, b_mag for gated; value_exponent for scores that have one; of transcoders
b_dec_out (d_out,), target_size and W_skip (d_out, d_in), and a W_dec (d_sae, d_out). Weights are only
ever read through safetensors. Writing is atomic: a directory is complete or absent. Reading checks format, version,
digest, names, shapes, finiteness, and that stored probe activations still give their stored codes.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cosae.errors import CosaeError, short
from cosae.io.digest import file_digest, value_digest
from cosae.io.legacy import upgrade
from cosae.io.staged import staged
from cosae.io.untrusted import one_line, one_sentence, read_json, read_safetensors
from cosae.io.values import from_plain
from cosae.kernels import Entries
from cosae.sae.config import SAEConfig
from cosae.sae.model import SAE

FORMAT = "cosae-sae"
VERSION = 3
"""3: cfg.json has a digest of its own, under DIGEST."""
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SELF_CHECK = "self_check.safetensors"
DIGEST = "cfg_sha256"
PROBE_ROWS = 8
MOST_PROBES = 64


def to_disk(sae: SAE) -> dict[str, Tensor]:
    """All state by on-disk name, contiguous fp32 (or float64) CPU tensors that share no memory."""
    state = _own_tensors(sae)
    if not sae.score.is_plain:
        state |= {"scale_a": sae.score.a, "scale_b": sae.score.b}
    if sae.score.delta is not None:
        state["value_exponent"] = sae.score.delta
    if not bool(sae.threshold.isnan().any()):
        state["threshold"] = sae.threshold.expand(sae.d_sae)
    if not bool((sae.selector.rank_gain_F == 1).all()):
        state["rank_gain"] = sae.selector.rank_gain_F
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def _own_tensors(sae: SAE) -> dict[str, Tensor]:
    """The SAE's own tensors (or views of them) that are always kept, and just as they are, by on-disk name."""
    score, selector = sae.score, sae.selector
    own: dict[str, Tensor] = {"W_enc": score.rows_FD.T, "W_dec": sae.decoder.rows_FD, "b_dec": sae.centre_D}
    if score.bias_F is not None:
        own["b_gate" if sae.cfg.selector == "gated" else "b_enc"] = score.bias_F
    if score.family.exponent_owner == "base_delta":
        own |= {"scale_a_base": score.exponent_base, "scale_a_delta": score.exponent_delta_F}
    if sae.cfg.selector == "jumprelu":
        own["log_threshold"] = selector.log_threshold_F
    if sae.cfg.selector == "gated":
        own |= {"r_mag": selector.r_mag_F, "b_mag": selector.b_mag_F}
    if sae.cfg.sites:
        own["site_scale"] = sae.site_scale_P
    if sae.target is not None:
        own |= {"b_dec_out": sae.target.centre_O, "target_size": sae.target.size}
        own |= {} if sae.target.skip_OD is None else {"W_skip": sae.target.skip_OD}
    return own


@torch.no_grad()
def from_disk(cfg: SAEConfig, state: dict[str, Tensor], source: str) -> SAE:
    """The inverse of `to_disk`. Raises CosaeError naming `source` on missing, unknown or ill-shaped tensors."""
    with one_sentence(f"{source}: no SAE has such sizes"), torch.device("meta"):
        wanted = shapes(SAE(cfg))  # before memory is taken for the SAE
    missing = sorted(name for name, (_, needed) in wanted.items() if needed and name not in state)
    unknown = sorted(set(state) - set(wanted))
    if missing or unknown:
        raise CosaeError(
            f"{source} is not a complete cosae SAE of this kind: its tensors do not fit the configuration "
            f"(missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'})."
        )
    for name, value in state.items():
        if tuple(value.shape) not in wanted[name][0]:
            allowed = " or ".join(str(s) for s in wanted[name][0])
            raise CosaeError(f"{source}: {name} must have shape {allowed}. Got {tuple(value.shape)} instead.")
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise CosaeError(f"{source}: {name} holds values that are not finite numbers; the file is damaged.")
    sae = SAE(cfg).to(state["W_dec"].dtype)
    for name, tensor in _own_tensors(sae).items():
        tensor.copy_(state[name])
    if not sae.score.is_plain:
        _load_score(sae, state["scale_a"], state["scale_b"], state.get("value_exponent"))
    if cfg.selector != "jumprelu" and "threshold" in state:
        value = state["threshold"]
        sae.selector.threshold = value[0].clone() if bool((value == value[0]).all()) else value.clone()
    if "rank_gain" in state:
        sae.selector.rank_gain_F = state["rank_gain"].clone()
    return sae


def _load_score(sae: SAE, exponent: Tensor, gain: Tensor, value_exponent: Tensor | None) -> None:
    score = sae.score
    if score.family.exponent_owner != "base_delta":
        by_group = score.family.exponent_owner == "group"
        score.exponent.copy_(_group_values(sae, exponent) if by_group else exponent)
    if score.family.gain_owner == "group":
        per_group = _group_values(sae, gain)
        if bool((per_group[score.group_F] == gain).all()):
            gain = per_group
    score._replace("log_gain", gain.clone())
    if value_exponent is not None:
        by_group = score.family.value_owner == "group"
        score.value_exponent.copy_(_group_values(sae, value_exponent) if by_group else value_exponent)


def _group_values(sae: SAE, value_F: Tensor) -> Tensor:
    """(F,) that is constant within groups → (G,)."""
    first = torch.searchsorted(sae.score.group_F, torch.arange(sae.cfg.n_groups, device=sae.device))
    return value_F[first]


def shapes(sae: SAE) -> dict[str, tuple[tuple[tuple[int, ...], ...], bool]]:
    """On-disk name → (allowed shapes, whether it must be there)."""
    found: dict[str, tuple[tuple[tuple[int, ...], ...], bool]]
    found = {name: ((tuple(tensor.shape),), True) for name, tensor in _own_tensors(sae).items()}
    wide = (sae.d_sae,)
    found |= {"threshold": ((wide,), sae.cfg.selector == "jumprelu"), "rank_gain": ((wide,), False)}
    if not sae.score.is_plain:
        scalar_a = sae.score.family.exponent_owner in ("fixed", "shared")
        found |= {"scale_a": (((),) if scalar_a else (wide,), True), "scale_b": (((), wide), True)}
    if sae.score.delta is not None:
        found["value_exponent"] = ((tuple(sae.score.delta.shape),), True)
    return found


def save(sae: SAE, path: str | Path, probes: Tensor | None = None) -> Path:
    """Write `sae` to the directory `path`, atomically; an SAE that was there is replaced.

    probes (n, d_in): activations whose codes are stored for the check on loading; drawn at random around the centre
    where none are given. Raises CosaeError where `path` holds something that is not an SAE, or cannot be written.
    """
    path = Path(path)
    if not _replaceable(path):
        raise CosaeError(f"{path} holds something that is not a cosae SAE; choose another path or remove it.")
    with staged(path) as folder:
        _write(sae, folder, probes)
    return path


def _replaceable(path: Path) -> bool:
    """True where nothing is lost but an SAE of ours: other libraries' folders have a cfg.json too."""
    if not path.is_dir():
        return not path.exists()
    there = {file.name for file in path.iterdir()}
    if not there or there - {CONFIG, WEIGHTS, SELF_CHECK}:
        return not there
    with suppress(CosaeError):
        return bool(read_config(path))
    return False


def _write(sae: SAE, folder: Path, probes: Tensor | None) -> None:
    save_file(to_disk(sae), folder / WEIGHTS, metadata={"format": FORMAT})
    save_file(_probe(sae, probes), folder / SELF_CHECK, metadata={"format": FORMAT})
    config = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": saelens_architecture(sae),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        **saelens_fields(sae),
        "sae": sae.cfg.to_dict(),
        "provenance": sae.metadata,
        "sha256": {name: file_digest(folder / name) for name in (WEIGHTS, SELF_CHECK)},
    }
    try:
        config = json.loads(json.dumps(config, allow_nan=False, default=_jsonable))
        text = json.dumps({**config, DIGEST: value_digest(config)}, indent=2)
    except (TypeError, ValueError) as error:
        raise CosaeError(f"sae.metadata must be plain finite numbers, texts, lists and mappings: {error}.") from None
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _jsonable(value: object) -> object:
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"got {type(value).__name__}")


def saelens_architecture(sae: SAE) -> str:
    """SAELens' name where its own class computes the same function, else a name of ours."""
    plain = (
        sae.score.is_plain
        and sae.cfg.frame == "raw"
        and not sae.cfg.sites
        and not sae.cfg.norm_restoring
        and sae.cfg.bias
    )
    if sae.target is not None:
        return f"cosae_transcoder_{sae.cfg.score}_{sae.cfg.selector}"
    if plain and not sae.cfg.sites and sae.cfg.selector == "batch_topk" and sae.calibrated:
        return "jumprelu"
    return f"cosae_{sae.cfg.score}_{sae.cfg.selector}"


def saelens_fields(sae: SAE) -> dict[str, Any]:
    """What SAELens 6 asks of a cfg.json beside the architecture; cosae itself reads none of it."""
    names = {"model": "model_name", "hook_name": "hook_name", "hf_hook_name": "hf_hook_name", "dataset": "dataset_path"}
    known = {theirs: sae.metadata.get(ours) for ours, theirs in names.items()}
    return {
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", **{k: v for k, v in known.items() if isinstance(v, str)}},
    }


@torch.no_grad()
def _probe(sae: SAE, probes: Tensor | None) -> dict[str, Tensor]:
    if probes is None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(PROBE_ROWS, sae.d_in, generator=generator)
        length = float(sae.metadata.get("norm_summary", {}).get("median_norm") or sae.d_in**0.5)
        probes = sae.centre_D.cpu() + noise * (length / sae.d_in**0.5)
    x = probes[:PROBE_ROWS].detach().to(sae.device, sae.dtype)
    codes = sae.encode(x)
    stored = {"x": x, "token": codes.token_E, "feature": codes.feature_E, "value": codes.value_E}
    stored["x_hat"] = sae.decode(codes)
    return {name: value.cpu().contiguous() for name, value in stored.items()}


def load(path: str | Path, device: str | torch.device = "cpu", kernel: str = "auto") -> SAE:
    """The SAE in directory `path`.

    Raises CosaeError, in one sentence, for a path that is missing, not an SAE of ours, of a later version, truncated,
    altered, ill-shaped, or whose stored probes no longer give their codes. Nothing in the file is executed.
    """
    path = Path(path)
    config = read_config(path)
    for name in (WEIGHTS, SELF_CHECK):
        if not (path / name).is_file():
            raise CosaeError(f"{path} lacks {name}: the SAE is incomplete, copy the whole folder again.")
        if file_digest(path / name) != config["sha256"].get(name):
            raise CosaeError(f"{path / name} was truncated or altered since it was saved (its digest differs).")
    state = read_safetensors(path / WEIGHTS)
    probe = read_safetensors(path / SELF_CHECK)
    try:
        cfg = from_plain(SAEConfig, config["sae"], "sae")
        cfg.sizes  # noqa: B018 (an SAE leaves none open)
    except CosaeError as error:
        raise CosaeError(f"{path / CONFIG}: {error}") from None
    metadata = config["provenance"] if "provenance" in config else upgrade(config.get("facts", {}))
    if not isinstance(metadata, dict):
        got = type(metadata).__name__
        raise CosaeError(f"{path / CONFIG}: provenance must be a mapping. Got {got} instead: the file is damaged.")
    sae = from_disk(cfg, state, str(path / WEIGHTS))
    sae.metadata = metadata
    sae.kernel = "auto" if kernel == "triton" else kernel  # the probes are encoded on the CPU
    _check_probe(sae, probe, path)
    sae.kernel = kernel
    return sae.to(device)


def read_config(path: Path) -> dict[str, Any]:
    """cfg.json of an SAE directory, checked for format and version. Raises CosaeError."""
    if not path.exists():
        raise CosaeError(f"{path} does not exist: give the folder of a saved SAE (the one that holds {CONFIG}).")
    if not path.is_dir() or not (path / CONFIG).is_file():
        raise CosaeError(f"{path} is not a saved SAE: a cosae SAE is a folder with {CONFIG} and {WEIGHTS}.")
    config = read_json(path / CONFIG)
    if config.get("format") != FORMAT:
        raise CosaeError(f"{path} was not written by cosae (its {CONFIG} has no format {FORMAT!r}).")
    version = config.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CosaeError(
            f"{path} has format version {short(version)}; this cosae reads up to {VERSION}: upgrade cosae."
        )
    if version >= 3 or DIGEST in config:
        own = {name: value for name, value in config.items() if name != DIGEST}
        if value_digest(own) != config.get(DIGEST):
            raise CosaeError(f"{path / CONFIG} was altered since it was saved (its digest differs): copy it again.")
    if not isinstance(config.get("sae"), dict) or not isinstance(config.get("sha256"), dict):
        raise CosaeError(f"{path / CONFIG} lacks its sections 'sae' and 'sha256': the file is damaged.")
    return config


@torch.no_grad()
def _check_probe(sae: SAE, probe: dict[str, Tensor], path: Path) -> None:
    """Stored probes must give their stored values again (0.1 % of the largest), with nearly the same entries, and the
    stored entries their stored reconstruction."""
    try:
        if not len(probe["x"]) == len(probe["x_hat"]) <= MOST_PROBES:
            raise IndexError(f"{len(probe['x'])} activations, {len(probe['x_hat'])} reconstructions")
        entries = Entries(probe["token"], probe["feature"])
        _check_entries(entries, probe["value"], len(probe["x"]), sae.d_sae)
        framed = sae._framed(sae._checked(probe["x"]))
        terms = sae.score.terms(framed)
        got = sae.selector._evaluate(terms, sae._kernel(), entries).value_E
        want = probe["value"]
        codes = sae.encode(probe["x"])
        dense = codes.to_dense()
        stored = torch.zeros_like(dense).index_put((entries.token_E, entries.feature_E), want)
        x_hat, kept = sae.decode(stored, codes.norm_stats), probe["x_hat"]
        apart = float((x_hat - kept).abs().max()) if len(kept) else 0.0
        span = float((kept - sae.out_centre).abs().max()) if len(kept) else 1.0
    except (KeyError, IndexError, RuntimeError, TypeError, CosaeError) as error:
        reason = one_line(error)
        raise CosaeError(f"{path / SELF_CHECK} does not fit the SAE ({reason}): the folder mixes two SAEs.") from None
    largest = float(want.abs().max()) if len(want) else 1.0
    off = float((got - want).abs().max()) if len(want) else 0.0
    flipped = int(((dense != 0) != (stored != 0)).sum())
    if not off <= 1e-3 * largest or flipped > max(2, len(want) // 20):  # NaN is off, too
        raise CosaeError(
            f"{path}: the stored probe activations no longer give their stored codes (off by {off:.3g}, {flipped} "
            "entries differ): the weights or this version's formula changed."
        )
    if not apart <= 1e-3 * max(span, 1e-30):
        raise CosaeError(
            f"{path}: the stored codes no longer give their stored reconstruction (off by {apart:.3g}): the weights, "
            "the settings of the decoder or this version's formula changed."
        )


def _check_entries(entries: Entries, value_E: Tensor, n_tokens: int, n_features: int) -> None:
    """Compiled loops read where indices point: they must lie inside. Raises IndexError."""
    for name, index_E, high in (("token", entries.token_E, n_tokens), ("feature", entries.feature_E, n_features)):
        if index_E.dtype != torch.int64 or index_E.shape != value_E.shape or index_E.dim() != 1:
            raise IndexError(f"{name} indices of the wrong type or number")
        if len(index_E) and not 0 <= int(index_E.min()) <= int(index_E.max()) < high:
            raise IndexError(f"{name} indices outside 0 to {high - 1}")
