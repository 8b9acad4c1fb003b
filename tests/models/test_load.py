from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cosae.errors import CosaeError
from cosae.models.capture import capture
from cosae.models.load import load_model
from tests.support.tiny_models import BLOCK_PATHS, make_model, make_sequences


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama and its tokenizer in a directory."""
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(folder)
    write_tokenizer(folder, 97)
    return folder


def write_tokenizer(folder: Path, n_entries: int, **special: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(n_entries)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", **special).save_pretrained(folder)


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


def test_a_quantised_folder_is_refused_where_transformers_does_not_serve_it(saved: Path, tmp_path: Path) -> None:
    copy(saved, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CosaeError, match=r"is quantised \(bitsandbytes\), which .* not serve on cpu here: ") as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)


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
        ("config.json", '{"model_type": "encodec"}', "incomplete|could not be read"),
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
    with pytest.raises(CosaeError, match=r"incomplete: 1 tensor missing .* model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(folder)


@pytest.mark.parametrize("family", [*BLOCK_PATHS, "opt", "mamba"])
@pytest.mark.parametrize("rest", [None, "tokenizer_config.json"])
def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path, family: str, rest: str | None) -> None:
    """transformers makes up one of 1 to 5 entries for some of them, with which every text is empty, or one <unk>."""
    make_model(family).save_pretrained(tmp_path)
    if rest is not None:
        (tmp_path / rest).write_text('{"model_max_length": 64}')
    with pytest.raises(CosaeError, match=r"holds no tokenizer: tokenizer\.json"):
        load_model(tmp_path)


def test_the_other_files_of_a_tokenizer_are_named_too(tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(CosaeError, match=r"tokenizer\.json, or merges\.txt and vocab\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt2"])
@pytest.mark.parametrize("n_entries", [5, 98, 500])
def test_a_tokenizer_of_another_size_is_refused(saved: Path, tmp_path: Path, family: str, n_entries: int) -> None:
    make_model(family).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, n_entries)
    with pytest.raises(CosaeError, match=f"does not fit the model: it has {n_entries} .* embedding 97"):
        load_model(tmp_path)


def test_embeddings_rounded_up_and_added_tokens_beyond_them_are_no_mistake(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path, 60)
    assert len(load_model(tmp_path)[1]) == 60
    write_tokenizer(tmp_path, 97, pad_token="<pad>")
    assert len(load_model(tmp_path)[1]) == 98
