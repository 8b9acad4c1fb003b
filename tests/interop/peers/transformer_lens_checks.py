"""Runs where transformer-lens 4 is installed beside what cosae needs: the plain hook in a TransformerBridge against
cosae.spliced on the same weights.

    PYTHONPATH=src python transformer_lens_checks.py

Prints one JSON object of largest differences.
"""

from __future__ import annotations

import json
import warnings
from functools import partial
from typing import Any

import torch

import cosae
from cosae.models import embedded
from cosae.models.intervene.edits import ablate, steer
from cosae.models.intervene.splice import hook, spliced

SITES = {
    "resid_post.3": "blocks.3.hook_resid_post",
    "resid_pre.2": "blocks.2.hook_resid_pre",
    "mlp_out.4": "blocks.4.hook_mlp_out",
    "attn_out.1": "blocks.1.hook_attn_out",
}


def main() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge import TransformerBridge

    model, tokenizer = embedded.load()
    bridge = TransformerBridge.boot_transformers(str(embedded.model_path()))
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("def add(a, b):\n    return a")["input_ids"]]])
    sae = cosae.SAE.build(d_in=192, d_sae=64, score="cosine", selector="topk", k=8, seed=0)
    found: dict[str, Any] = {"sites": {}}
    with torch.no_grad():
        own = model(ids).logits
        found["own"] = float((bridge(ids) - own).abs().max())
        for site, theirs in SITES.items():
            with spliced(model, {site: sae}) as run:
                recon = model(ids).logits
            logits = bridge.run_with_hooks(ids, fwd_hooks=[(theirs, hook(sae))])
            found["sites"][theirs] = [float((logits - recon).abs().max()), float((logits - own).abs().max())]
        edits = [ablate(int(run.codes[site].feature_E[0])), steer(5, 20.0)]
        with spliced(model, {"resid_post.3": sae}, error_term=True, edits=edits):
            edited = model(ids).logits
        change = hook(sae, error_term=True, edits=edits)
        logits = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.3.hook_resid_post", change)])
        found["edited"] = float((logits - edited).abs().max())
        pair, mask = ids.repeat(2, 1), torch.ones(2, ids.shape[1], dtype=torch.bool)
        mask[1, -3:] = False  # right padding: real tokens come first
        with spliced(model, {"resid_post.3": sae}):
            padded = model(pair, attention_mask=mask.long()).logits
        masked = partial(hook(sae), mask_ST=mask)
        fwd_hooks = [("blocks.3.hook_resid_post", masked)]
        logits = bridge.run_with_hooks(pair, attention_mask=mask.long(), fwd_hooks=fwd_hooks)
        found["padded"] = float((logits - padded)[mask].abs().max())
        with spliced(model, {"resid_post.3": sae}):
            recon = model(ids).logits
        with bridge.hooks(fwd_hooks=[("blocks.3.hook_resid_post", hook(sae))]):
            logits, cache = bridge.run_with_cache(ids)
        found["hooks"] = float((logits - recon).abs().max())
        found["cached"] = sorted(name for name in cache if name == "blocks.4.hook_resid_pre")
        found["afterwards"] = float((bridge(ids) - own).abs().max())
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
