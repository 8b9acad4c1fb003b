"""Capture two sites of any causal language model, train on one of them, and print what fires on a line of code.

python examples/hugging_face_model.py [--model FOLDER_OR_HUB_NAME] [--block 4] [--steps 150]
"""

import argparse

import cosae
from cosae.models.capture import capture
from cosae.models.embedded import model_path
from cosae.models.load import load_model
from cosae.text import Document, read_documents, sequences, tokenize_documents

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(model_path()), help="default: the model that comes with cosae")
parser.add_argument("--block", type=int, default=4)
parser.add_argument("--steps", type=int, default=150)
arguments = parser.parse_args()
model, tokenizer = load_model(arguments.model)
special = {"special_ids": tokenizer.all_special_ids, "pad_id": tokenizer.pad_token_id or 0}  # padding is masked


def pack(documents, max_tokens=None):
    bos = tokenizer.bos_token_id is not None
    return sequences(tokenize_documents(documents, tokenizer, add_bos=bos, max_tokens=max_tokens), 256, **special)


sites = [f"resid_post.{arguments.block}", f"mlp_out.{arguments.block}"]
found = capture(model, pack(read_documents("pylib", "train"), 20_000), sites)
for name, activations in found.items():
    print(f"{name}: {tuple(activations.x_ND.shape)}, median norm {float(activations.norm_N.median()):.2f}")
run = cosae.fit(found[sites[0]].x_ND, ["cosine"], d_sae=1024, k=16, steps=arguments.steps, batch_tokens=512, lr=3e-3)

line = Document("one line", "for name in sorted(names):\n    print(name)\n")
sentence = capture(model, pack([line]), sites[0])[sites[0]]
values, features = run.saes["cosine"].encode(sentence.x_ND).to_dense().detach().topk(3)
for token, strongest, value in zip(sentence.token_N, features.tolist(), values.tolist(), strict=True):
    shown = "  ".join(f"{i}: {v:.2f}" for i, v in zip(strongest, value, strict=True) if v > 0)
    print(f"{tokenizer.decode([int(token)])!r:<12} {shown}")
