"""The paper's checkpoints, `{standard, global-a, perfeature}/sae_final.pt` (paper §4).

A pickled mapping {state_dict, num_tokens_since_fired, step}, or the state dict alone: W_enc and W_dec (F, D), b_enc,
b_dec, threshold (), and for cosine scores scale_a, scale_b, () (global) or (F,) (per feature; direct, no base). Stored
lengths of W_enc mean nothing under a cosine score. Fires where the score exceeds the threshold; below 0 (−1) it was
never set, and the paper's code takes the k largest scores a token of the batch: the SAE that is read has no threshold.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cosae.errors import CosaeError
from cosae.interop.linear import MOST_LOG, Linear, linear_sae
from cosae.io.untrusted import number, read_pickled, take, tensors
from cosae.sae.config import SAEConfig
from cosae.sae.model import SAE

NAME = "sae_final.pt"
KEYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
PAPER_K = 80
"""k of the released SAEs (paper §3); their files do not say it."""


def read(path: str | Path) -> SAE:
    """The SAE in a checkpoint of the paper's, or in the folder that holds it. Raises CosaeError in one sentence."""
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    whole = read_pickled(file)
    stored = whole.get("state_dict", whole) if isinstance(whole, dict) else whole
    state = tensors(stored, file)
    rows_FD, bias_F, decoder_FD, centre_D, threshold = take(state, KEYS, file)
    if threshold.numel() != 1:
        raise CosaeError(f"{file}: the threshold must be one number. Got shape {tuple(threshold.shape)} instead.")
    step = whole.get("step") if isinstance(whole, dict) else None
    metadata = {"format": "cosine_paper", "step": step if isinstance(step, int) else None, "k_guessed": True}
    known = threshold.reshape(()) if number(threshold, "threshold", file) >= 0 else None
    k = min(PAPER_K, max(len(rows_FD), 1)) if rows_FD.ndim else 1
    weights = Linear(rows_FD, bias_F, decoder_FD, centre_D, "batch_topk", k, known)
    sae = linear_sae(weights, str(file), metadata)
    return _cosine(sae, state, file) if "scale_a" in state or "scale_b" in state else sae


@torch.no_grad()
def _cosine(sae: SAE, state: dict[str, Tensor], file: Path) -> SAE:
    """The same weights under a cosine score with the stored exponents and gains."""
    a, b = (t.float() for t in take(state, ("scale_a", "scale_b"), file))
    if a.shape != b.shape or tuple(a.shape) not in ((), (sae.d_sae,)):
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise CosaeError(f"{file}: scale_a and scale_b must both have shape () or ({sae.d_sae},). Got {shapes}.")
    if not bool(((a.abs() <= MOST_LOG) & (b.abs() <= MOST_LOG)).all()):  # NaN is not
        raise CosaeError(f"{file}: scale_a and scale_b hold values beyond {MOST_LOG:g}; the file is damaged.")
    score = "cosine" if a.ndim == 0 else "cosine_per_feature"
    cosine = SAE(SAEConfig(sae.d_in, sae.d_sae, score, "batch_topk", sae.k))
    kept = {name: value for name, value in sae.state_dict().items() if name in cosine.state_dict()}
    cosine.load_state_dict({**kept, "score.exponent": a, "score.log_gain": b})
    cosine.metadata = sae.metadata
    return cosine
