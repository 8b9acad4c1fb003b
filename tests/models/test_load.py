from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.models.load import load_model
from tests.support.tiny_models import make_config, make_model, make_sequences


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama and its tokenizer in a directory."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(folder)
    words = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1").save_pretrained(folder)
    return folder


def copy(saved: Path, to: Path, without: str = "") -> Path:
    for file in saved.iterdir():
        if file.name != without:
            (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_saved_model_comes_back_frozen(saved: Path, dtype: str) -> None:
    model, tokenizer = load_model(saved, dtype=dtype)
    assert tokenizer.bos_token_id == 1
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    original = make_model("llama")
    for parameter in original.parameters():  # not `.to(dtype)`, which would round the rotary frequencies too
        parameter.data = parameter.data.to(getattr(torch, dtype))
    sequences = make_sequences()
    a, b = (capture(m, sequences, "resid_post.3")["resid_post.3"] for m in (model, original))
    assert torch.equal(a.x_ND, b.x_ND)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"dtype": "float64"}])
def test_unsupported_dtypes_name_the_supported(saved: Path, options: dict[str, Any]) -> None:
    with pytest.raises(CosaeError, match=r"dtype .*bfloat16.*Got"):
        load_model(saved, **options)


def test_unknown_devices_are_refused(saved: Path) -> None:
    with pytest.raises(CosaeError, match="Got 'abacus' instead"):
        load_model(saved, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(CosaeError, match="sees no CUDA device"):
            load_model(saved, device="cuda")


def test_missing_paths_never_ask_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    for path in ("./nothing/here", str(tmp_path / "nothing"), "~/nothing/at/all", "a/b/c", tmp_path / "x"):
        with pytest.raises(CosaeError, match="does not exist"):
            load_model(path)
    with pytest.raises(CosaeError, match=r"no config\.json"):
        load_model(tmp_path)


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection\nor read the manual.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(CosaeError, match=r"'some/model'.*hub") as e:
        load_model("some/model")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("config.json", "{not json", "No model could be read"),
        ("config.json", '{"model_type": "abacus"}', "No model could be read"),
        ("config.json", '{"model_type": "t5"}', "is a t5, not a causal language model"),
        (
            "config.json",
            '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}',
            "BertForMaskedLM, not a causal",
        ),
        ("model.safetensors", "junk", "The weights of '.*' could not be read"),
        ("model.safetensors", None, "The weights of '.*' could not be read"),
    ],
)
def test_damaged_and_foreign_directories_are_one_sentence(
    saved: Path, tmp_path: Path, file: str, content: str | None, match: str
) -> None:
    folder = copy(saved, tmp_path, without=file)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(CosaeError, match=match) as e:
        load_model(folder)
    assert "\n" not in str(e.value)


def test_cut_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CosaeError, match="could not be read"):
        load_model(folder)


def test_missing_tensors_are_refused_instead_of_drawn_at_random(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(saved, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CosaeError, match=r"incomplete: 1 tensors .* model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(CosaeError, match="No tokenizer could be read"):
        load_model(tmp_path)


def test_configurations_of_all_families_are_causal(tmp_path: Path) -> None:
    import transformers

    from cosae.models.load import _check_causal

    for family in ("llama", "qwen3", "gemma2", "mistral", "gpt2", "gpt_neox"):
        _check_causal(transformers, make_config(family), family)
