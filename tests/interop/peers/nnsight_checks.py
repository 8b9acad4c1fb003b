"""Runs where nnsight is installed beside what cosae needs: the plain hook in its traces against cosae.spliced.

    PYTHONPATH=src python nnsight_checks.py

Prints one JSON object of largest differences.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch

import cosae
from cosae.models import embedded
from cosae.models.intervene.edits import ablate, steer
from cosae.models.intervene.splice import hook, spliced


def main() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nnsight

    model, tokenizer = embedded.load()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("def add(a, b):\n    return a")["input_ids"]]])
    sae = cosae.SAE.build(d_in=192, d_sae=64, score="cosine", selector="topk", k=8, seed=0)
    with torch.no_grad():
        own = model(ids).logits
        with spliced(model, {"resid_post.3": sae}) as run:
            recon = model(ids).logits
        feature = int(run.codes["resid_post.3"].feature_E[0])
        edits = [ablate(feature), steer(5, 20.0)]
        with spliced(model, {"resid_post.3": sae}, error_term=True, edits=edits):
            edited = model(ids).logits
            said = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2)

    wrap = getattr(nnsight, "TransformersModel", None)
    wrapped = (
        wrap(model, tokenizer=tokenizer, task="text-generation")
        if wrap
        else nnsight.LanguageModel(model, tokenizer=tokenizer)
    )
    change = hook(sae)
    with torch.no_grad(), wrapped.trace(ids):
        wrapped.model.layers[3].output = change(wrapped.model.layers[3].output)
        logits = wrapped.lm_head.output.save()
    found = {"reconstructed": float((logits - recon).abs().max()), "moved": float((logits - own).abs().max())}
    change = hook(sae, error_term=True, edits=edits)
    with torch.no_grad(), wrapped.trace(ids):
        wrapped.model.layers[3].output = change(wrapped.model.layers[3].output)
        logits = wrapped.lm_head.output.save()
    found["edited"] = float((logits - edited).abs().max())
    with torch.no_grad(), wrapped.generate(max_new_tokens=4, do_sample=False, pad_token_id=2) as tracer:
        with tracer.invoke(ids):
            for _ in tracer.iter[:]:
                wrapped.model.layers[3].output = change(wrapped.model.layers[3].output)
        with tracer.invoke():  # what follows a loop over tokens in the same invoke is never run
            tokens = tracer.result.save()
    found["generated"] = torch.as_tensor(tokens).tolist()
    found["wanted"] = said.tolist()
    with torch.no_grad():
        found["afterwards"] = float((model(ids).logits - own).abs().max())
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
