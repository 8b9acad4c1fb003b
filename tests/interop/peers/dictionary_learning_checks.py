"""Run by an environment with the real dictionary-learning: every class, both directions, and the drop-in's options.

    PYTHON tests/interop/peers/dictionary_learning_checks.py     prints JSON rows, as its neighbours do

A difference is the largest over features and reconstructions, relative to the largest value of their own answer.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from dictionary_learning import dictionary as classes
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary as their_load

import cosae
from cosae.interop.dictionary_learning.write import write
from cosae.interop.read import read_sae
from cosae.sae.calibrate import calibrate
from cosae.sae.fold import fold_decoder_norm

D, F, K = 12, 40, 4
Rows = list[dict[str, Any]]


def inputs(seed: int = 9, n: int = 400) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g) * (0.5 * torch.randn(n, 1, generator=g)).exp()


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@torch.no_grad()
def compare(mine: cosae.SAE, theirs: Any) -> float:
    x = inputs()
    codes, features = mine.encode(x), theirs.encode(x)
    assert int((features != 0).sum()) > 50
    return max(apart(codes.to_dense(), features), apart(mine.decode(codes), theirs.decode(features)))


def made() -> dict[str, Any]:
    """One of each class, weights drawn at random, decoder rows of uneven length."""
    found = {
        "AutoEncoder": classes.AutoEncoder(D, F),
        "AutoEncoderNew": classes.AutoEncoderNew(D, F),
        "GatedAutoEncoder": classes.GatedAutoEncoder(D, F),
        "JumpReluAutoEncoder": classes.JumpReluAutoEncoder(D, F),
        "AutoEncoderTopK": AutoEncoderTopK(D, F, K),
        "BatchTopKSAE": BatchTopKSAE(D, F, K),
        "BatchTopKSAE, threshold unset": BatchTopKSAE(D, F, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, F, K, [10, 30]),
    }
    g = torch.Generator().manual_seed(1)
    for name, one in found.items():
        for parameter in one.parameters():
            parameter.data = (0.3 if parameter.ndim == 1 else 1.0) * torch.randn(parameter.shape, generator=g)
        if name == "JumpReluAutoEncoder":
            one.threshold.data.abs_()
        elif "TopK" in name and "unset" not in name:
            one.threshold.fill_(0.8)
    return found


def kept(one: Any, place: Path) -> Path:
    """As their training leaves one: ae.pt and config.json."""
    place.mkdir(parents=True)
    torch.save(one.state_dict(), place / "ae.pt")
    trainer = {"dict_class": type(one).__name__, "activation_dim": D, "dict_size": F, "k": K}
    (place / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}))
    return place


def read_theirs(rows: Rows, place: Path) -> None:
    for name, one in made().items():
        folder = kept(one, place / name)
        theirs, _ = their_load(str(folder), "cpu")
        rows.append(row("read", name, compare(read_sae(folder), theirs)))
        mine, _ = cosae.load_dictionary(str(folder), "cpu")
        rows.append(row("load_dictionary", name, same_options(mine, theirs, name)))


def same_options(mine: Any, theirs: Any, name: str) -> float:
    """forward, output_features, each class's options of encode, scale_biases, and gradients to x."""
    x = inputs(3)
    pairs = [(mine(x), theirs(x)), *zip(mine(x, output_features=True), theirs(x, output_features=True), strict=True)]
    batch = "BatchTopK" in name
    options: list[dict[str, bool]] = [{}]
    if batch:
        options += [{"return_active": True}, {"use_threshold": False}, {"use_threshold": False, "return_active": True}]
    elif name == "AutoEncoderTopK":
        options += [{"use_threshold": True}]
    elif name == "GatedAutoEncoder":
        options += [{"return_gate": True}, {"normalize_decoder": True}]
        pairs.append((mine(x, normalize_decoder=True), theirs(x, normalize_decoder=True)))
    elif name == "JumpReluAutoEncoder":
        options += [{"output_pre_jump": True}]
    for option in options:
        a, b = mine.encode(x, **option), theirs.encode(x, **option)
        pairs += zip(a, b, strict=True) if isinstance(b, tuple) else [(a, b)]
    grown = []
    for one in (mine, theirs):
        leaf = x.clone().requires_grad_()
        one(leaf).square().sum().backward()
        grown.append(leaf.grad)
    pairs.append((grown[0], grown[1]))
    if hasattr(theirs, "scale_biases") and name != "BatchTopKSAE, threshold unset":
        with torch.no_grad():
            mine.scale_biases(3.0)
            theirs.scale_biases(3.0)
        pairs.append((mine(3 * x), theirs(3 * x)))
        if name != "AutoEncoderTopK":
            pairs.append((mine.encode(3 * x), theirs.encode(3 * x)))
    assert (mine.activation_dim, mine.dict_size) == (theirs.activation_dim, theirs.dict_size)
    return max(apart(a.detach(), b.detach()) for a, b in pairs)


def write_ours(rows: Rows, place: Path) -> None:
    """Every selector and affine score of ours, written and opened by them."""
    x = inputs(0)
    arms: list[tuple[str, str, dict[str, Any]]] = [
        ("inner", "batch_topk", {}),
        ("inner", "batch_topk", {"prefixes": (10,)}),
        ("inner", "topk", {}),
        ("inner", "jumprelu", {}),
        ("inner", "gated", {}),
        ("inner_unit", "batch_topk", {}),
        ("cosine", "topk", {"a_init": 1.0}),
    ]
    for number, (score, selector, more) in enumerate(arms):
        sae = cosae.SAE.build(d_in=D, d_sae=F, score=score, selector=selector, k=K, seed=0, sample=x, **more)
        if selector != "topk":
            calibrate(sae, x)
        folder = write(sae, place / str(number))
        theirs, config = their_load(str(folder), "cpu")
        name = f"{score} × {selector}{', prefixes' if sae.cfg.prefixes else ''} → {config['trainer']['dict_class']}"
        rows.append(row("write", name, max(compare(sae, theirs), compare(read_sae(folder), theirs))))
    for name in ("AutoEncoder", "AutoEncoderNew"):  # a plain ReLU there and back
        theirs, _ = their_load(str(kept(made()[name], place / f"{name}-source")), "cpu")
        folder = write(read_sae(place / f"{name}-source"), place / f"{name}-again")
        again, config = their_load(str(folder), "cpu")
        assert config["trainer"]["dict_class"] == name
        rows.append(
            row("write", f"standard → {name}", max(compare(read_sae(folder), again), compare(read_sae(folder), theirs)))
        )
    sae = cosae.SAE.build(d_in=D, d_sae=F, score="inner", selector="batch_topk", k=K, seed=0, sample=x)
    sae.decoder.rows_FD.data *= 1 + torch.rand(F, 1, generator=torch.Generator().manual_seed(2))
    calibrate(sae, x)
    folded = fold_decoder_norm(sae)
    theirs, config = their_load(str(write(folded, place / "folded")), "cpu")
    rows.append(
        row("write", f"inner × batch_topk, folded → {config['trainer']['dict_class']}", compare(folded, theirs))
    )


def trained(rows: Rows, place: Path) -> None:
    """Their trainer for some steps, saved as their training saves, read."""
    settings = {"steps": 60, "layer": 0, "lm_name": "m", "warmup_steps": 5, "threshold_start_step": 10, "lr": 1e-3}
    trainer = BatchTopKTrainer(activation_dim=D, dict_size=F, k=K, seed=0, device="cpu", **settings)
    for step in range(60):
        trainer.update(step, inputs(step, 128))
    place.mkdir()
    torch.save(trainer.ae.state_dict(), place / "ae.pt")
    (place / "config.json").write_text(json.dumps({"trainer": trainer.config}, default=str))
    theirs, _ = their_load(str(place), "cpu")
    assert float(theirs.threshold) > 0
    rows.append(row("read, trained there", "BatchTopKSAE", compare(read_sae(place), theirs)))


def row(direction: str, architecture: str, worst: float) -> dict[str, Any]:
    return {"format": "dictionary_learning", "direction": direction, "architecture": architecture, "difference": worst}


if __name__ == "__main__":
    found: Rows = []
    with tempfile.TemporaryDirectory() as scratch:
        read_theirs(found, Path(scratch) / "theirs")
        write_ours(found, Path(scratch) / "ours")
        trained(found, Path(scratch) / "trained")
    print(json.dumps({"package": f"dictionary-learning {version('dictionary-learning')}", "rows": found}))
