"""The whole SAE once more, in dense numpy float64 from the formulas of the paper: shares no code with the package.

x → z = frame(x) → s_i = exp(b_i) |z|^{a_i} |w_i|^u cos(z, w_i) + β_i → codes, |z|^δ times s → ẑ_p = Σ_{i<p} f_i d_i → x̂
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def read(sae: Any) -> dict[str, Array]:
    """Raw parameters and buffers by name, float64."""
    return {name: value.detach().double().numpy() for name, value in sae.state_dict().items()}


def frame(kind: str, x: Array, c: Array) -> tuple[Array, Array, Array]:
    """z, and the scale and shift that a reconstruction gets back."""
    nothing = np.zeros(len(x))
    if kind == "raw":
        return x - c, nothing + 1, nothing
    if kind == "unit":
        r = np.linalg.norm(x - c, axis=1)
        return (x - c) / r[:, None], r, nothing
    mean, std = x.mean(1), np.maximum(x.std(1), 1e-8)
    return (x - mean[:, None]) / std[:, None] - c, std, mean


def exponent_and_gain(score: str, p: dict[str, Array], n_features: int, n_groups: int) -> tuple[Array, Array]:
    """a and b of every feature."""
    group = np.minimum(np.arange(n_features) // (n_features // n_groups), n_groups - 1)
    ones = np.ones(n_features)
    a, b = {
        "inner": lambda: (ones, 0 * ones),
        "inner_unit": lambda: (ones, 0 * ones),
        "cosine_fixed": lambda: (0 * ones, p["score.log_gain"] * ones),
        "cosine": lambda: (p["score.exponent"] * ones, p["score.log_gain"] * ones),
        "cosine_per_feature": lambda: (p["score.exponent"], p["score.log_gain"]),
        "cosine_base_delta": lambda: (p["score.exponent_base"] + p["score.exponent_delta_F"], p["score.log_gain"]),
        "cosine_grouped": lambda: (p["score.exponent"][group], p["score.log_gain"][group]),
        "cosine_two_exponents": lambda: (p["score.exponent"] * ones, p["score.log_gain"] * ones),
    }[score]()
    return a, b


def content(score: str, z: Array, rows: Array, a: Array, b: Array) -> Array:
    r, w = np.linalg.norm(z, axis=1)[:, None], np.linalg.norm(rows, axis=1)
    cosine = (z @ rows.T) / (r * w)
    length = w if score == "inner" else 1.0
    return np.exp(b) * r**a * length * cosine


def largest(flat: Array, k: int) -> NDArray[np.bool_]:
    """Mask of the k largest positive values of the last axis."""
    rank = np.argsort(np.argsort(-flat, axis=-1, kind="stable"), axis=-1, kind="stable")
    return (rank < k) & (flat > 0)


def encode(sae: Any, x: Array, training: bool) -> tuple[Array, Array, Array, Array]:
    """Dense codes (B, F), and z, scale, shift."""
    cfg, p = sae.cfg, read(sae)
    z, scale, shift = frame(cfg.frame, x, p["centre_D"])
    a, b = exponent_and_gain(cfg.score, p, cfg.d_sae, cfg.n_groups)
    part = content(cfg.score, z, p["score.rows_FD"], a, b)
    live = (x != 0).any(1)
    s = np.where(live[:, None], part + p["score.bias_F"], -np.inf)
    if cfg.selector == "topk":
        on = largest(s, cfg.k)
    elif cfg.selector == "abs_topk":
        on = largest(np.where(live[:, None], np.abs(s), 0), cfg.k)
    elif cfg.selector == "jumprelu":
        on = s > np.exp(p["selector.log_threshold_F"])
    elif cfg.selector == "gated":
        cut = 0.0 if training or np.isnan(p["selector.threshold"]) else p["selector.threshold"]
        on = s > cut
        s = np.maximum(np.exp(p["selector.r_mag_F"]) * part + p["selector.b_mag_F"], 0)
    elif training or np.isnan(p["selector.threshold"]):
        on = largest(s.reshape(-1), cfg.k * int(live.sum())).reshape(s.shape)
    else:
        on = s > p["selector.threshold"]
    growth = np.linalg.norm(z, axis=1)[:, None] ** p["score.value_exponent"] if "score.value_exponent" in p else 1.0
    return np.where(on, s * growth, 0.0), z, scale, shift


def reconstruct(sae: Any, codes: Array, z: Array) -> list[Array]:
    """Reconstructions of z, one for each prefix."""
    rows = read(sae)["decoder.rows_FD"]
    if not sae.cfg.norm_restoring:
        return [codes[:, :p] @ rows[:p] for p in sae.cfg.prefixes or (sae.d_sae,)]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    out = []
    for p in sae.cfg.prefixes or (sae.d_sae,):
        u = codes[:, :p] @ rows[:p]
        length = np.linalg.norm(u, axis=1, keepdims=True)
        out.append(np.linalg.norm(z, axis=1, keepdims=True) * np.divide(u, length, out=0 * u, where=length > 0))
    return out


def denormalize(sae: Any, z_hat: Array, scale: Array, shift: Array) -> Array:
    c = read(sae)["centre_D"]
    if sae.cfg.frame == "layer_norm":
        return scale[:, None] * (z_hat + c) + shift[:, None]
    return scale[:, None] * z_hat + c
