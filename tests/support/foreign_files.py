"""Folders as other libraries write them, with their outputs worked out by hand in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F, K = 7, 20, 4


class Written(NamedTuple):
    """A folder, and what its library would answer: x → (features, reconstruction)."""

    folder: Path
    answer: Callable[[Tensor], tuple[Tensor, Tensor]]


class Weights(NamedTuple):
    """Random float32 weights, decoder rows of uneven length."""

    rows_FD: Tensor
    bias_F: Tensor
    decoder_FD: Tensor
    centre_D: Tensor
    theta_F: Tensor
    r_mag_F: Tensor
    mag_F: Tensor


def weights(seed: int = 0) -> Weights:
    g = torch.Generator().manual_seed(seed)
    decoder = torch.randn(F, D, generator=g)
    return Weights(
        torch.randn(F, D, generator=g),
        0.3 * torch.randn(F, generator=g),
        decoder,
        torch.randn(D, generator=g),
        torch.rand(F, generator=g),
        0.2 * torch.randn(F, generator=g),
        0.3 * torch.randn(F, generator=g),
    )


def inputs(n: int = 200, seed: int = 9) -> Tensor:
    return 2 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def topk(score: Tensor, k: int) -> Tensor:
    best = score.topk(k, dim=-1)
    return torch.zeros_like(score).scatter(-1, best.indices, best.values.relu())


def linear(
    w: Weights, fire: Callable[[Tensor], Tensor], centred: bool = True
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        z = x.double() - (w.centre_D.double() if centred else 0)
        features = fire(z @ w.rows_FD.double().T + w.bias_F.double())
        return features, features @ w.decoder_FD.double() + w.centre_D.double()

    return answer


def gated(w: Weights) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        content = (x.double() - w.centre_D.double()) @ w.rows_FD.double().T
        magnitude = (w.r_mag_F.double().exp() * content + w.mag_F.double()).relu()
        features = magnitude * (content + w.bias_F.double() > 0)
        return features, features @ w.decoder_FD.double() + w.centre_D.double()

    return answer


def dictionary_learning(folder: Path, kind: str) -> Written:
    w = weights()
    folder.mkdir(parents=True)
    state = {"encoder.weight": w.rows_FD, "encoder.bias": w.bias_F, "decoder.weight": w.decoder_FD.T.contiguous()}
    relu = linear(w, torch.relu)
    answer = relu
    if kind == "AutoEncoder":
        state["bias"] = w.centre_D
        length = w.decoder_FD.double().norm(dim=-1)

        def answer(x: Tensor) -> tuple[Tensor, Tensor]:
            features, recon = relu(x)
            return features * length, recon
    elif kind == "AutoEncoderNew":
        state["decoder.bias"] = w.centre_D
        answer = linear(w, torch.relu, centred=False)
    elif kind == "GatedAutoEncoder":
        del state["encoder.bias"]
        state |= {"decoder_bias": w.centre_D, "gate_bias": w.bias_F, "r_mag": w.r_mag_F, "mag_bias": w.mag_F}
        answer = gated(w)
    elif kind == "JumpReluAutoEncoder":
        state = {"W_enc": w.rows_FD.T.contiguous(), "b_enc": w.bias_F, "W_dec": w.decoder_FD}
        state |= {"b_dec": w.centre_D, "threshold": w.theta_F}
        answer = linear(w, lambda s: s.relu() * (s > w.theta_F), centred=False)
    else:
        state |= {"b_dec": w.centre_D, "k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.8)}
        answer = linear(w, lambda s: topk(s, K) if kind == "AutoEncoderTopK" else s * (s > 0.8))
        if kind == "BatchTopKSAE_unset":
            state["threshold"] = torch.tensor(-1.0)
            answer = relu
        if kind == "MatryoshkaBatchTopKSAE":
            state = {"W_enc": w.rows_FD.T.contiguous(), "b_enc": w.bias_F, "W_dec": w.decoder_FD, "b_dec": w.centre_D}
            state |= {"k": torch.tensor(K), "threshold": torch.tensor(0.8), "group_sizes": torch.tensor([5, 15])}
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": kind.removesuffix("_unset"), "k": K, "layer": 3, "lm_name": "a/model"}
    trainer["submodule_name"] = "resid_post_layer_3"
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}))
    return Written(folder, answer)


def saelens(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Written:
    w = Weights(*(t.to(dtype).float() for t in weights()))
    folder.mkdir(parents=True)
    centred = kind != "jumprelu_uncentred"
    name = kind.partition("_rescaled")[0].partition("_uncentred")[0]
    config = {"architecture": name, "d_in": D, "d_sae": F, "dtype": str(dtype).split(".")[1], "device": "cpu"}
    config |= {"apply_b_dec_to_input": centred, "normalize_activations": "none", "reshape_activations": "none"}
    config["metadata"] = {
        "sae_lens_version": "6.54.12",
        "model_name": "a/model",
        "hook_name": "blocks.3.hook_resid_post",
    }
    state = {"W_enc": w.rows_FD.T, "W_dec": w.decoder_FD, "b_dec": w.centre_D, "b_enc": w.bias_F}
    answer = linear(w, torch.relu, centred)
    if name == "jumprelu":
        state["threshold"] = w.theta_F
        answer = linear(w, lambda s: s.relu() * (s > w.theta_F), centred)
    elif name == "gated":
        del state["b_enc"]
        state |= {"b_gate": w.bias_F, "r_mag": w.r_mag_F, "b_mag": w.mag_F}
        answer = gated(w)
    elif name in ("topk", "batchtopk", "matryoshka_batchtopk"):
        rescaled = "rescaled" in kind
        config |= {"k": K, "rescale_acts_by_decoder_norm": rescaled}
        length = w.decoder_FD.double().norm(dim=-1) if rescaled else torch.ones(F).double()
        if name != "topk":
            state["topk_threshold"] = torch.tensor(0.7)
        if name == "matryoshka_batchtopk":
            config["matryoshka_widths"] = [5, F]
        fire = (lambda s: topk(s * length, K)) if name == "topk" else (lambda s: (s * length) * (s * length > 0.7))
        features_of = linear(w, fire)

        def answer(x: Tensor) -> tuple[Tensor, Tensor]:
            features, _ = features_of(x)
            return features, features / length @ w.decoder_FD.double() + w.centre_D.double()

    save_file({n: t.to(dtype).contiguous() for n, t in state.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return Written(folder, answer)


def gemma_scope(folder: Path, kind: str) -> Written:
    w = weights()
    folder.mkdir(parents=True)
    answer = linear(w, lambda s: s.relu() * (s > w.theta_F), centred=False)
    state = {
        "W_enc": w.rows_FD.T,
        "W_dec": w.decoder_FD,
        "b_enc": w.bias_F,
        "b_dec": w.centre_D,
        "threshold": w.theta_F,
    }
    if kind == "npz":
        np.savez(folder / "params.npz", **{n: t.numpy() for n, t in state.items()})
    else:
        save_file({n.lower(): t.contiguous() for n, t in state.items()}, folder / "params.safetensors")
        config = {"architecture": "jump_relu", "model_name": "google/gemma", "type": "sae", "l0": 10}
        (folder / "config.json").write_text(json.dumps(config))
    return Written(folder, answer)


def sparsify(folder: Path, kind: str) -> Written:
    w = weights()
    folder.mkdir(parents=True)
    state = {"encoder.weight": w.rows_FD, "encoder.bias": w.bias_F, "W_dec": w.decoder_FD, "b_dec": w.centre_D}
    save_file(state, folder / "sae.safetensors")
    config = {"activation": "topk", "k": K, "d_in": D, "num_latents": F, "transcode": False, "skip_connection": False}
    (folder / "cfg.json").write_text(json.dumps(config))
    return Written(folder, linear(w, lambda s: topk(s, K)))


def llama_scope(folder: Path, kind: str) -> Written:
    """Trained on activations of average norm 5, which are brought to √D."""
    w = weights()
    (folder / "checkpoints").mkdir(parents=True)
    state = {"encoder.weight": w.rows_FD, "encoder.bias": w.bias_F, "decoder.weight": w.decoder_FD.T.contiguous()}
    save_file({**state, "decoder.bias": w.centre_D}, folder / "checkpoints" / "final.safetensors")
    config = {
        **{"act_fn": "jumprelu", "jump_relu_threshold": 0.7, "top_k": 8, "sparsity_include_decoder_norm": True},
        **{"norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}},
        **{"hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post"},
        **{"d_model": D, "d_sae": F},
    }
    (folder / "hyperparams.json").write_text(json.dumps(config))
    factor = D**0.5 / 5.0

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        score = factor * x.double() @ w.rows_FD.double().T + w.bias_F.double()
        features = score * (score * w.decoder_FD.double().norm(dim=1) > 0.7 * factor)
        return features, (features @ w.decoder_FD.double() + w.centre_D.double()) / factor

    return Written(folder, answer)


def goodfire(folder: Path, kind: str) -> Written:
    w = weights()
    folder.mkdir(parents=True)
    encoder = {"encoder_linear.weight": w.rows_FD, "encoder_linear.bias": w.bias_F}
    decoder = {"decoder_linear.weight": w.decoder_FD.T.contiguous(), "decoder_linear.bias": w.centre_D}
    torch.save({**encoder, **decoder}, folder / "Llama-SAE-l19.pth")

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        features = (x.double() @ w.rows_FD.double().T + w.bias_F.double()).relu()
        return features, features @ w.decoder_FD.double() + w.centre_D.double()

    return Written(folder, answer)


def cosine_paper(folder: Path, kind: str) -> Written:
    w = weights()
    folder.mkdir(parents=True)
    state = {"W_enc": w.rows_FD, "b_enc": w.bias_F, "W_dec": w.decoder_FD, "b_dec": w.centre_D}
    state["threshold"] = torch.tensor(0.6)
    answer = linear(w, lambda s: s * (s > 0.6))
    if kind != "standard":
        g = torch.Generator().manual_seed(4)
        shape = (F,) if kind == "perfeature" else ()
        a, b = 0.5 * torch.rand(shape, generator=g), torch.rand(shape, generator=g)
        state |= {"scale_a": a, "scale_b": b}

        def answer(x: Tensor) -> tuple[Tensor, Tensor]:
            z = x.double() - w.centre_D.double()
            cosine = torch.nn.functional.cosine_similarity(z[:, None], w.rows_FD.double()[None], dim=-1)
            score = b.double().exp() * z.norm(dim=-1, keepdim=True) ** a.double() * cosine + w.bias_F.double()
            features = score * (score > 0.6)
            return features, features @ w.decoder_FD.double() + w.centre_D.double()

    whole = {"state_dict": state, "num_tokens_since_fired": torch.zeros(F, dtype=torch.int64), "step": 244140}
    torch.save(whole, folder / "sae_final.pt")
    return Written(folder, answer)


WRITERS: dict[str, tuple[Callable[[Path, str], Written], tuple[str, ...]]] = {
    "dictionary_learning": (
        dictionary_learning,
        ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
         "BatchTopKSAE_unset", "MatryoshkaBatchTopKSAE"),
    ),
    "saelens": (
        saelens,
        ("standard", "jumprelu", "jumprelu_uncentred", "gated", "topk", "topk_rescaled", "batchtopk",
         "batchtopk_rescaled", "matryoshka_batchtopk_rescaled"),
    ),
    "gemma_scope": (gemma_scope, ("npz", "safetensors")),
    "sparsify": (sparsify, ("topk",)),
    "llama_scope": (llama_scope, ("jumprelu",)),
    "goodfire": (goodfire, ("relu",)),
    "cosine_paper": (cosine_paper, ("standard", "global-a", "perfeature")),
}  # fmt: skip
CASES = [(format_, kind) for format_, (_, kinds) in WRITERS.items() for kind in kinds]


def write(format_: str, kind: str, folder: Path) -> Written:
    return WRITERS[format_][0](folder, kind)
