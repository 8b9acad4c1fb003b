from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.io.generators import epoch_order
from cosae.models.capture import capture
from cosae.models.sources import ModelSource, StreamedModelSource, digest_sequences
from cosae.types import Activations, Sequences
from tests.support.tiny_models import BLOCK_PATHS, BLOCKS, VOCABULARY, D, make_model, make_sequences

FAMILIES = tuple(BLOCK_PATHS)
RESIDUALS = [f"resid_pre.{i}" for i in range(BLOCKS)] + [f"resid_post.{i}" for i in range(BLOCKS)]


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            made[family] = make_model(family)
        return made[family]

    return get


def hidden_states(model: Any, sequences: Sequences, **inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        output = model(sequences.ids_ST, output_hidden_states=True, use_cache=False, **inputs)
    return tuple(output.hidden_states)


def final_norm(model: Any) -> nn.Module:
    body = model.base_model
    return next(m for m in (getattr(body, n, None) for n in ("norm", "ln_f", "final_layer_norm")) if m)


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def equal(a: Activations, b: Activations) -> bool:
    return all(torch.equal(column, b.columns[name]) for name, column in a.columns.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_equal_the_models_own_hidden_states_to_the_bit(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype=dtype)
    sequences = make_sequences()
    expected = hidden_states(model, sequences)
    assert (expected[1] != expected[2]).any()
    captured = capture(model, sequences, RESIDUALS, store_dtype=dtype)
    for block in range(BLOCKS):
        assert torch.equal(captured[f"resid_pre.{block}"].x_ND, expected[block].reshape(-1, D))
    for block in range(BLOCKS - 1):
        assert torch.equal(captured[f"resid_post.{block}"].x_ND, expected[block + 1].reshape(-1, D))
    last = captured[f"resid_post.{BLOCKS - 1}"].x_ND
    assert not torch.equal(last, expected[-1].reshape(-1, D))
    with torch.no_grad():
        assert torch.equal(final_norm(model)(last.view(3, 12, D)), expected[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_enters_and_what_is_added_give_what_leaves(models: Callable[[str], Any], family: str) -> None:
    sites = ["resid_pre.2", "attn_out.2", "mlp_out.2", "resid_post.2"]
    before, attention, mlp, after = (a.x_ND for a in capture(models(family), make_sequences(), sites).values())
    assert attention.norm() > 0.05 * after.norm()
    assert mlp.norm() > 0.05 * after.norm()
    torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_mlp_makes_what_it_adds_of_what_it_reads(models: Callable[[str], Any], family: str) -> None:
    model = models(family)
    read, added = (a.x_ND for a in capture(model, make_sequences(), ["mlp_in.2", "mlp_out.2"]).values())
    with torch.no_grad():
        torch.testing.assert_close(model.get_submodule(f"{BLOCK_PATHS[family]}.2.mlp")(read), added)


def test_gemma_starts_from_scaled_embeddings_and_gpt2_from_positions_too(
    models: Callable[[str], Any],
) -> None:
    sequences = make_sequences()
    gemma, gpt2 = models("gemma2"), models("gpt2")
    ids = sequences.ids_ST.flatten()
    start = capture(gemma, sequences, "resid_pre.0")["resid_pre.0"].x_ND
    torch.testing.assert_close(start, gemma.model.embed_tokens.weight[ids] * D**0.5)
    start = capture(gpt2, sequences, "resid_pre.0")["resid_pre.0"].x_ND
    body = gpt2.transformer
    torch.testing.assert_close(start, body.wte.weight[ids] + body.wpe.weight[:12].repeat(3, 1))


def test_a_module_path_gives_that_modules_output(models: Callable[[str], Any]) -> None:
    model, path = models("gemma2"), "model.layers.1.mlp"
    sites = [path, "mlp_out.1"]
    inner, added = (a.x_ND for a in capture(model, make_sequences(), sites).values())
    with torch.no_grad():
        torch.testing.assert_close(model.model.layers[1].post_feedforward_layernorm(inner), added)
    assert not torch.allclose(inner, added)
    wide = capture(model, make_sequences(), "model.layers.1.mlp.up_proj")["model.layers.1.mlp.up_proj"]
    assert wide.x_ND.shape == (36, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_stops_after_the_last_site(family: str) -> None:
    model = make_model(family)
    calls: list[int] = []

    def trap(*_: Any) -> None:
        raise AssertionError("a block after the last site ran")

    capture(model, make_sequences(1), ["resid_post.0", "mlp_out.1", "resid_post.1"])  # the first is watched to its end
    blocks = model.get_submodule(BLOCK_PATHS[family])
    blocks[0].register_forward_pre_hook(lambda *_: calls.append(0))
    blocks[2].register_forward_pre_hook(trap)
    capture(model, make_sequences(), ["resid_post.0", "mlp_out.1", "resid_post.1"])
    assert calls == [0]  # three sites, one pass
    blocks[1].register_forward_pre_hook(trap)
    with pytest.raises(AssertionError, match="after the last site"):
        capture(model, make_sequences(), ["resid_post.0", "resid_post.1"])


def test_the_head_never_runs(models: Callable[[str], Any]) -> None:
    model = make_model("llama")
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    capture(model, make_sequences(), "resid_post.3")


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_hooks_are_gone_whatever_happens(error: BaseException) -> None:
    model = make_model("llama")

    def fail(*_: Any) -> None:
        raise error

    n_before = count_hooks(model)
    capture(model, make_sequences(), ["resid_pre.1", "resid_post.2"])
    assert count_hooks(model) == n_before
    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(type(error)):
        capture(model, make_sequences(), ["resid_pre.1", "resid_post.2"])
    handle.remove()
    assert count_hooks(model) == n_before
    with pytest.raises(CosaeError):
        capture(model, make_sequences(), ["resid_pre.1", "resid_post.9"])
    assert count_hooks(model) == n_before


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_dropped_and_changes_nothing(models: Callable[[str], Any], family: str, padding: str) -> None:
    model, lengths = models(family), [12, 5, 9]
    padded = make_sequences(lengths=lengths, padding=padding)
    found = capture(model, padded, "resid_post.2")["resid_post.2"]
    assert len(found) == sum(lengths)
    rows = [padded.ids_ST[i][padded.mask_ST[i]] for i in range(3)]
    alone = []
    for row, ids in enumerate(rows):
        one = make_sequences(lengths=[len(ids)], n_positions=len(ids))
        one = replace(one, ids_ST=ids[None], doc_ST=one.doc_ST + row, special_ST=ids[None] < 3)
        alone.append(capture(model, one, "resid_post.2")["resid_post.2"])
    expected = Activations.cat(alone)
    torch.testing.assert_close(found.x_ND, expected.x_ND, rtol=1e-4, atol=1e-4)
    for name in ("token_N", "doc_N", "position_N", "index_N", "special_N"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_residuals_equal_hidden_states_to_the_bit(models: Callable[[str], Any], family: str) -> None:
    sequences = make_sequences(lengths=[12, 5, 9])
    expected = hidden_states(models(family), sequences, attention_mask=sequences.mask_ST.long())
    found = capture(models(family), sequences, "resid_post.1")["resid_post.1"]
    assert torch.equal(found.x_ND, expected[2][sequences.mask_ST])


def test_each_row_knows_its_token_document_place_and_norm(models: Callable[[str], Any]) -> None:
    ids = torch.tensor([[1, 5, 6, 2, 1, 7], [8, 9, 1, 4, 0, 0]])  # packed: BOS in mid-sequence, PAD at the end
    doc = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 2, 2, -1, -1]], dtype=torch.int32)
    index = torch.tensor([[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, -1, -1]], dtype=torch.int32)
    sequences = Sequences(ids, doc, index, doc >= 0, ids < 3, ("a", "b", "c"))
    found = capture(models("qwen3"), sequences, "resid_post.0")["resid_post.0"]
    assert found.token_N.tolist() == [1, 5, 6, 2, 1, 7, 8, 9, 1, 4]
    assert found.doc_N.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert found.index_N.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert found.position_N.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert found.special_N.nonzero().flatten().tolist() == [0, 3, 4, 8]
    assert {str(column.dtype) for column in found.columns.values()} == {
        "torch.float32",
        "torch.int32",
        "torch.bool",
    }
    torch.testing.assert_close(found.norm_N, found.x_ND.double().square().sum(1).sqrt().float())


def test_norms_are_taken_before_rounding_to_the_stored_dtype(models: Callable[[str], Any]) -> None:
    exact = capture(models("llama"), make_sequences(), "resid_post.2")["resid_post.2"]
    rounded = capture(models("llama"), make_sequences(), "resid_post.2", store_dtype=torch.bfloat16)["resid_post.2"]
    assert rounded.x_ND.dtype == torch.bfloat16
    assert torch.equal(rounded.x_ND, exact.x_ND.bfloat16())
    assert torch.equal(rounded.norm_N, exact.norm_N)


def test_batches_change_nothing_but_rounding_and_order_is_kept(models: Callable[[str], Any]) -> None:
    sequences = make_sequences(n_sequences=5)
    whole = capture(models("gpt2"), sequences, "resid_post.1", batch_sequences=5)["resid_post.1"]
    parts = capture(models("gpt2"), sequences, "resid_post.1", batch_sequences=2)["resid_post.1"]
    torch.testing.assert_close(parts.x_ND, whole.x_ND)
    assert torch.equal(parts.token_N, sequences.ids_ST.flatten().int())
    assert torch.equal(parts.doc_N, whole.doc_N)


def test_captured_tensors_train_even_when_captured_in_inference_mode(
    models: Callable[[str], Any],
) -> None:
    with torch.inference_mode():
        found = capture(models("llama"), make_sequences(), "resid_post.1")["resid_post.1"]
    assert not found.x_ND.requires_grad
    weight = torch.ones(D, 2, requires_grad=True)
    (found.x_ND @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, found.x_ND.sum(0)[:, None].expand(D, 2))


def test_captured_tensors_are_copies() -> None:
    model = make_model("llama")

    def spoil(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].zero_()

    expected = capture(model, make_sequences(), ["resid_post.0", "resid_post.1"])["resid_post.0"]
    model.model.layers[1].register_forward_pre_hook(spoil)
    found = capture(model, make_sequences(), ["resid_post.0", "resid_post.1"])["resid_post.0"]
    assert torch.equal(found.x_ND, expected.x_ND)


def test_blocks_that_return_tuples_are_read_too() -> None:
    model = make_model("gpt2")
    expected = capture(model, make_sequences(), "resid_post.3")["resid_post.3"]
    # As in transformers before 4.55; the later block would fail on the tuple, but it is never reached.
    model.transformer.h[3].register_forward_hook(
        lambda _, __, output: output if isinstance(output, tuple) else (output, None)
    )
    found = capture(model, make_sequences(), "resid_post.3")["resid_post.3"]
    assert torch.equal(found.x_ND, expected.x_ND)


def test_a_module_without_a_tensor_is_named() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: {"x": 1})
    with pytest.raises(CosaeError, match=r"'mlp_out\.1' .*dict; choose"):
        capture(model, make_sequences(), "mlp_out.1")


def test_the_cache_is_off_and_masks_are_passed_only_for_padding() -> None:
    model = make_model("llama")
    seen: list[dict[str, Any]] = []
    model.model.register_forward_pre_hook(lambda _, __, kw: seen.append(kw), with_kwargs=True)
    for sequences in (
        make_sequences(),
        make_sequences(lengths=[12, 4]),
        make_sequences(lengths=[12, 4], padding="left"),
    ):
        capture(model, sequences, "resid_post.0")
    assert [kw["use_cache"] for kw in seen] == [False] * 3
    assert [sorted(kw.keys() - {"input_ids", "use_cache"}) for kw in seen] == [
        [],
        ["attention_mask"],
        ["attention_mask", "position_ids"],
    ]
    assert seen[2]["position_ids"].tolist()[1] == [0] * 8 + [0, 1, 2, 3]


def test_bad_requests_get_one_sentence(models: Callable[[str], Any]) -> None:
    model, sequences = models("llama"), make_sequences()
    nothing = replace(sequences, mask_ST=torch.zeros_like(sequences.mask_ST))
    for broken, match in (
        (lambda: capture(model, sequences, []), "No site was given"),
        (lambda: capture(model, nothing, "resid_post.0"), "the corpus is empty"),
        (lambda: capture(model, sequences[:0], "resid_post.0"), "the corpus is empty"),
        (lambda: capture(model, sequences, "resid_post.0", 0), "batch_sequences .*Got 0"),
        (
            lambda: capture(model, sequences, "resid_post.0", store_dtype=torch.int8),
            "store_dtype .*Got torch.int8",
        ),
        (
            lambda: capture(model, replace(sequences, ids_ST=sequences.ids_ST + 50), "resid_post.0"),
            r"Token id \d+ .* 97",
        ),
        (
            lambda: capture(model, make_sequences(n_positions=65), "resid_post.0"),
            "65 tokens.* 64",
        ),
        (
            lambda: capture(make_model("llama").train(), sequences, "resid_post.0"),
            r"training mode.*call model.eval\(\) first",
        ),
        (
            lambda: capture(model, sequences, ["resid_post.1", "model.layers.0.self_attn.rotary"]),
            "unknown",
        ),
    ):
        with pytest.raises(CosaeError, match=match):
            broken()


def test_padding_ids_need_not_be_in_the_vocabulary(models: Callable[[str], Any]) -> None:
    sequences = make_sequences(lengths=[12, 5])
    foreign = replace(sequences, ids_ST=sequences.ids_ST.masked_fill(~sequences.mask_ST, -100))
    a, b = (capture(models("llama"), s, "resid_post.1")["resid_post.1"] for s in (sequences, foreign))
    assert equal(a, b)
    assert int(a.token_N.max()) < VOCABULARY


def test_values_that_are_not_finite_are_named_by_site_document_and_position() -> None:
    model = make_model("llama")
    sequences = make_sequences(n_sequences=4)
    ids = sequences.ids_ST.clone()
    ids[ids == 96] = 95
    ids[2, 7] = 96
    sequences = replace(sequences, ids_ST=ids)
    model.model.embed_tokens.weight[96] = float("nan")
    with pytest.raises(CosaeError, match=r"resid_pre\.0 .*document 2.*, position 7"):
        capture(model, sequences, "resid_pre.0", batch_sequences=2)
    model.model.embed_tokens.weight[96] = 1e5  # finite, but not in float16
    capture(model, sequences, "resid_pre.0", batch_sequences=2)
    with pytest.raises(CosaeError, match=r"document 2.*, position 7.*float16"):
        capture(model, sequences, "resid_pre.0", batch_sequences=2, store_dtype=torch.float16)
    found = capture(model, sequences, "resid_pre.0", store_dtype=torch.float16, allow_non_finite=True)["resid_pre.0"]
    assert (~found.x_ND.isfinite().all(-1)).nonzero().flatten().tolist() == [
        int(sequences.mask_ST[:2].sum()) + 7,
    ]


def test_a_module_that_is_never_called_is_named() -> None:
    model = make_model("llama")
    model.model.layers[1].unused = nn.Linear(2, 2)
    with pytest.raises(CosaeError, match=r"unused.* never reached"):
        capture(model, make_sequences(), ["resid_post.0", "model.layers.1.unused"])


def make_source(model: Any, **options: Any) -> ModelSource:
    options = {"chunk_sequences": 3, "batch_sequences": 2, "seed": 5} | options
    return ModelSource(model, make_sequences(lengths=[12, 7, 12, 3, 9, 12, 12]), "resid_post.1", **options)


def test_a_source_shows_each_sequence_once_an_epoch_in_a_new_order(models: Callable[[str], Any]) -> None:
    source = make_source(models("llama"))
    assert (source.d_in, source.chunks_per_epoch) == (D, 3)
    epochs = []
    chunks = source.chunks()
    for epoch in range(3):
        docs = []
        for size in (3, 3, 1):
            chunk = next(chunks)
            docs += chunk.doc_N[chunk.index_N == 0].tolist()
            assert len(set(chunk.doc_N.tolist())) == size
        assert docs == epoch_order(7, 5, epoch).tolist()
        epochs.append(docs)
    assert len({tuple(docs) for docs in epochs}) == 3
    assert all(sorted(docs) == list(range(7)) for docs in epochs)
    other = next(make_source(models("llama"), seed=6).chunks())
    assert other.doc_N[other.index_N == 0].tolist() != epochs[0][:3]


def test_a_source_restarts_at_any_chunk_to_the_bit(models: Callable[[str], Any]) -> None:
    straight = list(itertools.islice(make_source(models("qwen3")).chunks(), 8))
    for start in range(8):
        again = next(make_source(models("qwen3")).chunks(start))
        assert equal(again, straight[start]), start


def test_a_source_describes_itself_in_plain_values(models: Callable[[str], Any]) -> None:
    metadata = make_source(models("gemma2"), store_dtype=torch.bfloat16).describe()
    assert metadata["model_type"] == "gemma2"
    assert (metadata["site"], metadata["hook_name"]) == ("resid_post.1", "blocks.1.hook_resid_post")
    assert metadata["module_path"] == "model.layers.1"
    assert (metadata["context"], metadata["n_sequences"], metadata["n_tokens"]) == (12, 7, 67)
    assert (metadata["model_dtype"], metadata["store_dtype"]) == ("float32", "bfloat16")
    assert len(metadata["sequences_sha256"]) == 64
    assert {type(value) for value in metadata.values()} <= {str, int, type(None)}


def test_the_digest_sees_every_field() -> None:
    sequences = make_sequences(lengths=[12, 5])
    digests = {digest_sequences(sequences)}
    for f in fields(Sequences):
        value = getattr(sequences, f.name)
        if f.name == "doc_names":
            changed: Any = ("x", *value[1:])
        elif f.name == "first_doc":
            changed = value + 1
        elif f.name == "inputs":
            changed = {"pixel_values": torch.zeros(2, 1)}
        elif f.name == "keep_ST":
            changed = torch.ones_like(sequences.mask_ST)
        elif f.name == "pooled":
            changed = True
        else:
            changed = value.clone()
            changed[1, 2] = not changed[1, 2] if value.dtype == torch.bool else changed[1, 2] + 1
        digests.add(digest_sequences(replace(sequences, **{f.name: changed})))
    assert len(digests) == 1 + len(fields(Sequences))
    assert digest_sequences(make_sequences(lengths=[12, 5])) in digests


def test_a_source_refuses_no_tokens_and_skips_rows_of_padding(models: Callable[[str], Any]) -> None:
    sequences = make_sequences(lengths=[12, 5])
    with pytest.raises(CosaeError, match="corpus is empty"):
        ModelSource(models("llama"), sequences[:0], "resid_post.1")
    with pytest.raises(CosaeError, match="chunk_sequences must be at least 1"):
        ModelSource(models("llama"), sequences, "resid_post.1", chunk_sequences=0)
    hollow = replace(sequences, mask_ST=sequences.mask_ST & torch.tensor([[False], [True]]))
    source = ModelSource(models("llama"), hollow, "resid_post.1", chunk_sequences=1)
    assert [len(c) for c in itertools.islice(source.chunks(), 3)] == [5, 5, 5]


def test_a_streamed_source_repeats_and_restarts(models: Callable[[str], Any]) -> None:
    model = models("llama")

    def make_chunks() -> Iterator[Sequences]:
        return (make_sequences(seed=seed, first_doc=3 * seed) for seed in range(3))

    source = StreamedModelSource(model, make_chunks, "resid_post.1")
    assert source.d_in == D
    straight = list(itertools.islice(source.chunks(), 7))
    assert [int(chunk.doc_N[0]) for chunk in straight] == [0, 3, 6, 0, 3, 6, 0]
    ran: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(0))
    for start in (0, 2, 3, 5):
        assert equal(next(source.chunks(start)), straight[start])
    handle.remove()
    assert len(ran) == 4  # skipped chunks never went through the model
    metadata = source.describe()
    assert metadata["first_chunk_sha256"] == digest_sequences(make_sequences(seed=0))
    assert metadata["hook_name"] == "blocks.1.hook_resid_post"


def test_a_streamed_source_without_tokens_is_refused(models: Callable[[str], Any]) -> None:
    with pytest.raises(CosaeError, match="corpus is empty"):
        StreamedModelSource(models("llama"), lambda: iter(()), "resid_post.1")
    turns = iter([iter([make_sequences()]), iter([make_sequences()])])
    source = StreamedModelSource(models("llama"), lambda: next(turns, iter(())), "resid_post.1")
    with pytest.raises(CosaeError, match="none on a later epoch"):
        list(itertools.islice(source.chunks(), 3))
