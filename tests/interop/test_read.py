"""SAEs of other libraries: outputs as theirs, formats told apart, malformed and hostile files refused."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import cosae
from cosae.errors import CosaeError
from cosae.interop.dictionary_learning.drop_in import load_dictionary
from cosae.interop.dictionary_learning.write import write as write_dictionary
from cosae.interop.read import FORMATS, detect, read_sae
from tests.support.foreign_files import CASES, D, F, K, dictionary_learning, inputs, saelens, weights, write


@pytest.mark.parametrize(("format_", "kind"), CASES)
def test_outputs_are_the_source_s_own(format_: str, kind: str, tmp_path: Path) -> None:
    written = write(format_, kind, tmp_path / "sae")
    assert detect(written.folder) == format_
    sae = read_sae(written.folder)
    x = inputs()
    features, recon = written.answer(x)
    with torch.no_grad():
        codes = sae.encode(x)
        mine = codes.to_dense().double()
        assert float((mine - features).abs().max()) <= 1e-5 * float(features.abs().max())
        assert float((sae.decode(codes).double() - recon).abs().max()) <= 1e-5 * float(recon.abs().max())
    assert int((features != 0).sum()) > 100
    assert sae.metadata["format"] == format_


@pytest.mark.parametrize(("format_", "kind"), CASES)
def test_what_was_read_is_saved_and_loaded_as_cosae_s_own(format_: str, kind: str, tmp_path: Path) -> None:
    sae = read_sae(write(format_, kind, tmp_path / "sae").folder)
    again = read_sae(cosae.save(sae, tmp_path / "own", probes=inputs()[:4]))
    assert detect(tmp_path / "own") == "cosae"
    with torch.no_grad():
        assert torch.allclose(again(inputs()), sae(inputs()), rtol=1e-5, atol=1e-5)
    assert again.metadata["format"] == format_


def test_half_precision_files_are_read_as_they_are(tmp_path: Path) -> None:
    written = saelens(tmp_path / "sae", "jumprelu", torch.bfloat16)
    with torch.no_grad():
        mine = read_sae(written.folder).encode(inputs()).to_dense().double()
    features = written.answer(inputs())[0]
    assert float((mine - features).abs().max()) <= 1e-5 * float(features.abs().max())


def test_facts_come_under_our_names(tmp_path: Path) -> None:
    metadata = read_sae(write("dictionary_learning", "BatchTopKSAE", tmp_path / "a").folder).metadata
    assert (metadata["model"], metadata["site"], metadata["context"]) == ("a/model", "resid_post.3", 64)
    metadata = read_sae(write("saelens", "topk", tmp_path / "b").folder).metadata
    assert (metadata["model"], metadata["hook_name"]) == ("a/model", "blocks.3.hook_resid_post")
    folder = tmp_path / "layer_20" / "width_16k" / "average_l0_5"
    sae = read_sae(write("gemma_scope", "npz", folder).folder)
    assert (sae.k, sae.metadata["layer"], "k_guessed" in sae.metadata) == (5, 20, False)
    assert read_sae(write("saelens", "standard", tmp_path / "c").folder).metadata["k_guessed"]


@pytest.mark.parametrize(
    ("said", "policy"),
    [
        ({"exclude_special_tokens": True}, ("none", True)),
        ({"exclude_special_tokens": [1, 2], "seqpos_slice": [None]}, ("none", True)),
        ({"seqpos_slice": [1, None]}, ("position_0", False)),
        ({"exclude_special_tokens": False}, ("none", False)),
        ({}, None),
    ],
)
def test_saelens_files_say_which_tokens_training_left_out(
    tmp_path: Path, said: dict[str, Any], policy: tuple[str, bool] | None
) -> None:
    folder = write("saelens", "topk", tmp_path / "sae").folder
    config = json.loads((folder / "cfg.json").read_text())
    config.setdefault("metadata", {}).update(said)
    (folder / "cfg.json").write_text(json.dumps(config))
    metadata = read_sae(folder).metadata
    found = metadata["filter"]["policy"] if "filter" in metadata else None
    assert (found and (found["kind"], found["drop_special"])) == policy


# ------------------------------------------------------------------------------- dictionary_learning, written


SELECTORS = ("batch_topk", "topk", "jumprelu", "gated")


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_written_dictionary_reads_back_the_same(selector: str, tmp_path: Path) -> None:
    sae = cosae.SAE.build(d_in=D, d_sae=F, score="inner", selector=selector, k=K, seed=0, sample=inputs())
    from cosae.sae.calibrate import calibrate

    calibrate(sae, inputs())
    write_dictionary(sae, tmp_path / "out", layer=2, model="m")
    again = read_sae(tmp_path / "out")
    with torch.no_grad():
        mine, theirs = sae.encode(inputs()).to_dense(), again.encode(inputs()).to_dense()
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(CosaeError, match="not an empty folder"):
        write_dictionary(sae, tmp_path / "out")


@settings(max_examples=15)
@given(
    d_in=st.integers(1, 9), d_sae=st.integers(1, 30), seed=st.integers(0, 2**31), selector=st.sampled_from(SELECTORS)
)
def test_any_inner_product_sae_survives_the_round_trip(
    d_in: int, d_sae: int, seed: int, selector: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sample, x = torch.randn(2, 50, d_in, generator=torch.Generator().manual_seed(seed))
    k = 1 + seed % d_sae  # jumprelu begins with θ at a score of its sample, which rounding may push over: x is another
    sae = cosae.SAE.build(d_in=d_in, d_sae=d_sae, score="inner", selector=selector, k=k, seed=seed, sample=sample)
    if selector == "batch_topk":
        sae.selector.threshold = torch.tensor(0.1)
    place = tmp_path_factory.mktemp("trip")
    again = read_sae(write_dictionary(sae, place / "sae"))
    with torch.no_grad():
        assert torch.allclose(sae(x), again(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        *({"score": "cosine"}, {"frame": "unit"}, {"selector": "abs_topk"}),
        {"score": "cosine_two_exponents", "a_init": 1.0, "value_exponent_init": 0.5},
    ],
)
def test_what_their_classes_cannot_hold_is_not_written(changes: dict[str, Any], tmp_path: Path) -> None:
    make = {"score": "inner", "selector": "topk", **changes}
    sae = cosae.SAE.build(d_in=D, d_sae=F, k=K, seed=0, sample=inputs(), **make)  # type: ignore[arg-type]
    with pytest.raises(CosaeError, match="classes for inner-product SAEs"):
        write_dictionary(sae, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_exponents_of_an_inner_product_are_written(tmp_path: Path) -> None:
    """a = 1, δ = 0: nothing is lost."""
    sae = cosae.SAE.build(D, F, "cosine_two_exponents", "topk", K, a_init=1.0, value_exponent_init=0.0)
    again = read_sae(write_dictionary(sae, tmp_path / "sae"))
    assert torch.allclose(sae(inputs()), again(inputs()), rtol=1e-4, atol=1e-5)


def test_a_drop_in_with_a_value_exponent_says_what_it_cannot_answer(tmp_path: Path) -> None:
    sae = cosae.SAE.build(D, F, "cosine_two_exponents", "topk", K)
    dictionary, _ = load_dictionary(cosae.save(sae, tmp_path / "ours"))
    assert torch.equal(dictionary.encode(inputs()), sae.encode(inputs()).to_dense())
    for option in ({"return_topk": True}, {"output_pre_jump": True}, {"use_threshold": True}):
        with pytest.raises(CosaeError, match="value exponent chooses features by other numbers"):
            dictionary.encode(inputs(), **option)


def test_load_dictionary_is_a_drop_in(tmp_path: Path) -> None:
    written = write("dictionary_learning", "BatchTopKSAE", tmp_path / "theirs")
    dictionary, config = load_dictionary(str(written.folder), device="cpu")
    features, recon = written.answer(inputs())
    x_hat, f = dictionary(inputs(), output_features=True)
    assert torch.allclose(f.double(), features, atol=1e-5)
    assert torch.allclose(x_hat.double(), recon, atol=1e-4)
    assert torch.equal(dictionary(inputs()), x_hat)
    assert (dictionary.dict_size, dictionary.activation_dim, config["trainer"]["k"]) == (F, D, K)
    assert torch.allclose(dictionary.decode(dictionary.encode(inputs())), x_hat, atol=1e-5)
    cosae.save(dictionary.sae, tmp_path / "ours")
    ours, config = load_dictionary(tmp_path / "ours")
    assert torch.equal(ours(inputs()), x_hat)
    assert config["trainer"]["activation_dim"] == D


# ------------------------------------------------------------------------------- refused


def refused(path: Path, **options: str) -> str:
    with pytest.raises(CosaeError) as caught:
        read_sae(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_paths_and_formats_that_are_none(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "no SAE of a known format" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "no known format" in refused(tmp_path / "notes.txt")
    assert ", ".join(FORMATS) in refused(tmp_path, format="onnx")


WEIGHT_FILES = {
    "dictionary_learning": "ae.pt",
    "saelens": "sae_weights.safetensors",
    "gemma_scope": "params.npz",
    "sparsify": "sae.safetensors",
    "llama_scope": "checkpoints/final.safetensors",
    "goodfire": "Llama-SAE-l19.pth",
    "cosine_paper": "sae_final.pt",
}
ONE_OF_EACH = [
    ("dictionary_learning", "BatchTopKSAE"),
    ("saelens", "topk"),
    ("gemma_scope", "npz"),
    ("sparsify", "topk"),
    ("llama_scope", "jumprelu"),
    ("goodfire", "relu"),
    ("cosine_paper", "global-a"),
]


@pytest.mark.parametrize(("format_", "kind"), ONE_OF_EACH)
@pytest.mark.parametrize("damage", ["empty", "truncated", "noise", "missing key", "wrong shape", "nan", "integers"])
def test_malformed_weights_get_one_sentence(format_: str, kind: str, damage: str, tmp_path: Path) -> None:
    folder = write(format_, kind, tmp_path / "sae").folder
    file = folder / WEIGHT_FILES[format_]
    whole = file.read_bytes()
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "noise":
        file.write_bytes(bytes(range(256)) * 8)
    else:
        state = _load(file)
        name = next(n for n in state if n.lower() in ("w_dec", "decoder.weight", "decoder_linear.weight"))
        if damage == "missing key":
            del state[name]
        elif damage == "wrong shape":
            state[name] = state[name][:, :-1].contiguous()
        elif damage == "nan":
            state[name] = state[name].clone()
            state[name][0, 0] = float("nan")
        else:
            state[name] = state[name].int()
        _store(file, state)
    said = refused(folder)
    assert str(file.name) in said


def _load(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix in (".pt", ".pth"):
        state = torch.load(file, weights_only=True)
        return dict(state.get("state_dict", state))
    if file.suffix == ".npz":
        with np.load(file) as archive:
            return {n: torch.from_numpy(archive[n]) for n in archive.files}
    return load_file(file)


def _store(file: Path, state: dict[str, torch.Tensor]) -> None:
    if file.suffix in (".pt", ".pth"):
        torch.save(state, file)
    elif file.suffix == ".npz":
        np.savez(file, **{n: t.numpy() for n, t in state.items()})
    else:
        save_file(state, file)


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(("format_", "kind"), [("dictionary_learning", "BatchTopKSAE"), ("cosine_paper", "standard")])
@pytest.mark.parametrize("archive", [True, False])
def test_pickled_code_is_not_run(format_: str, kind: str, archive: bool, tmp_path: Path) -> None:
    folder = write(format_, kind, tmp_path / "sae").folder
    mark = tmp_path / "ran"
    state = {"W_enc": torch.zeros(2, 2), "x": Payload(mark)}
    file = folder / WEIGHT_FILES[format_]
    if archive:
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state))
    assert "holds code" in refused(folder)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_pickled_objects_in_an_archive_of_arrays_are_not_run(tmp_path: Path) -> None:
    folder = write("gemma_scope", "npz", tmp_path / "sae").folder
    mark = tmp_path / "ran"
    evil = np.empty(1, dtype=object)
    evil[0] = Payload(mark)
    np.savez(folder / "params.npz", W_enc=evil)
    assert "plain number arrays" in refused(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("format_", "name"),
    [("gemma_scope", "params.npz"), ("cosine_paper", "sae_final.pt"), ("dictionary_learning", "ae.pt")],
)
def test_a_bomb_is_not_unpacked(format_: str, name: str, tmp_path: Path) -> None:
    kind = {"gemma_scope": "npz", "cosine_paper": "standard", "dictionary_learning": "BatchTopKSAE"}[format_]
    folder = write(format_, kind, tmp_path / "sae").folder
    with zipfile.ZipFile(folder / WEIGHT_FILES[format_], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", b"\0" * 50_000_000)
    assert "would unpack" in refused(folder)


@pytest.mark.parametrize(
    ("format_", "kind", "change", "says"),
    [
        ("sparsify", "topk", {"skip_connection": True}, "skip connection"),
        ("sparsify", "topk", {"activation": "groupmax"}, "'groupmax'"),
        ("sparsify", "topk", {"k": 0}, "k must be a whole number"),
        ("sparsify", "topk", {"k": 10_000}, "k must lie between 1 and the 20"),
        ("saelens", "topk", {"architecture": "temporal"}, "'temporal'"),
        ("saelens", "standard", {"normalize_activations": "layer_norm"}, "'layer_norm'"),
        ("saelens", "standard", {"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale'"),
        ("saelens", "standard", {"activation_fn": "tanh-relu"}, "'tanh-relu'"),
        ("saelens", "standard", {"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
    ],
)
def test_what_cosae_cannot_express_is_named(
    format_: str, kind: str, change: dict[str, object], says: str, tmp_path: Path
) -> None:
    folder = write(format_, kind, tmp_path / "sae").folder
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **change}))
    assert says in refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architecture": 3}', "\u0000", "[" * 100_000])
def test_malformed_configurations(text: str, tmp_path: Path) -> None:
    for number, (format_, kind, name) in enumerate(
        (
            ("saelens", "topk", "cfg.json"),
            ("dictionary_learning", "BatchTopKSAE", "config.json"),
            ("sparsify", "topk", "cfg.json"),
        )
    ):
        folder = write(format_, kind, tmp_path / str(number)).folder
        (folder / name).write_text(text)
        refused(folder)


def test_a_k_that_disagrees_with_the_weights(tmp_path: Path) -> None:
    folder = dictionary_learning(tmp_path / "sae", "AutoEncoderTopK").folder
    config = json.loads((folder / "config.json").read_text())
    config["trainer"]["k"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    assert "do not belong together" in refused(folder)


def test_exponents_of_the_wrong_shape(tmp_path: Path) -> None:
    folder = write("cosine_paper", "global-a", tmp_path / "sae").folder
    state = _load(folder / "sae_final.pt")
    torch.save({**state, "scale_a": torch.zeros(3)}, folder / "sae_final.pt")
    assert "scale_a" in refused(folder)
    assert weights().rows_FD.shape == (F, D)


def test_names_of_0_1_still_work_or_say_what_replaced_them(tmp_path: Path) -> None:
    folder = write("cosine_paper", "standard", tmp_path / "sae").folder
    assert read_sae(folder, format="authors").metadata["format"] == "cosine_paper"
    for name in ("cosae.share", "cosae.share.saelens"):
        with pytest.raises(ModuleNotFoundError, match=r"cosae\.interop\.read"):
            importlib.import_module(name)


def test_a_threshold_of_the_paper_that_was_never_set_is_batch_top_k(tmp_path: Path) -> None:
    """The paper's code, threshold < 0: the k · B largest of ReLU(scores) of the whole batch; k is 80 (paper §3)."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (300, 16), "b_enc": (300,), "W_dec": (300, 16), "b_dec": (16,)}
    state = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    torch.save({"state_dict": {**state, "threshold": torch.tensor(-1.0)}}, tmp_path / "sae_final.pt")
    sae = read_sae(tmp_path)
    x_BD = torch.randn(6, 16, generator=draw)
    score_BF = ((x_BD - state["b_dec"]) @ state["W_enc"].T + state["b_enc"]).relu()
    least = score_BF.flatten().topk(80 * 6).values[-1]
    assert int((score_BF > 0).sum()) > 80 * 6
    assert not sae.calibrated
    assert torch.allclose(sae.encode(x_BD).to_dense(), score_BF.where(score_BF >= least, 0), atol=1e-5)
