"""SAEs in a running model: exact where they must be, gone afterwards, and doing what by hand would be done."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from cosae.activations.filter import Filter, FilterPolicy
from cosae.errors import CosaeError, CosaeWarning
from cosae.io.values import to_plain
from cosae.models import embedded
from cosae.models.capture import capture
from cosae.models.intervene.edits import ablate, scale, set_to, steer
from cosae.models.intervene.splice import Step, hook, spliced
from cosae.types import Activations, Site
from tests.support.tiny import (
    EVERY_TOKEN,
    FAMILIES,
    D,
    first_of,
    identity_sae,
    make_model,
    make_sae,
    make_sequences,
    mixed_sequences,
    on_first,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def sae(model: Any) -> Any:
    return make_sae(model)


def logits(model: Any, sequences: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(sequences.ids_ST, attention_mask=sequences.mask_ST.long(), use_cache=False)
    return out.logits


def hooks_of(model: Any) -> list[Any]:
    return [(dict(m._forward_hooks), dict(m._forward_pre_hooks), m.forward) for m in model.modules()]


def by_hand(model: Any, sequences: Any, path: str, change: Any) -> torch.Tensor:
    """Logits with a plain hook of torch's own: the whole machinery in one line."""
    handle = model.get_submodule(path).register_forward_hook(on_first(change))
    try:
        return logits(model, sequences)
    finally:
        handle.remove()


# ---------------------------------------------------------------- what goes on through the model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_error_term_and_no_edits_outputs_are_the_models_own_to_the_bit(
    family: str, dtype: torch.dtype
) -> None:
    model, sequences = make_model(family, dtype=dtype), mixed_sequences()
    own = logits(model, sequences)
    saes = {site: make_sae(model, site) for site in ("resid_post.0", "mlp_out.1", "attn_out.2", "resid_pre.3")}
    with spliced(model, saes, error_term=True) as run:
        assert torch.equal(logits(model, sequences), own)
    assert set(run.codes) == set(saes)
    assert all(codes.l0 > 1 for codes in run.codes.values())
    with spliced(model, saes):
        changed = logits(model, sequences)
    assert changed.dtype == own.dtype
    assert (changed - own).abs().max() > 0.05
    assert torch.equal(logits(model, sequences), own)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reconstruction_stands_where_x_stood(family: str) -> None:
    model, sequences = make_model(family), make_sequences()
    sae = make_sae(model)
    path = capture_path(model)
    with spliced(model, {"resid_post.2": sae}) as run:
        got = logits(model, sequences)
    expected = by_hand(model, sequences, path, sae)
    assert torch.allclose(got, expected, atol=1e-5)
    x_ND = capture(model, sequences, "resid_post.2")["resid_post.2"].x_ND
    assert torch.equal(run.codes["resid_post.2"].to_dense().reshape(len(x_ND), -1), sae.encode(x_ND).to_dense())


def capture_path(model: Any, block: int = 2) -> str:
    from cosae.models.sites import resolve_site

    return resolve_site(model, f"resid_post.{block}").module_path


def test_tuple_outputs_keep_what_else_they_hold(model: Any, sae: Any) -> None:
    attention = make_sae(model, "attn_out.1")
    seen: list[Any] = []
    module = model.model.layers[1].self_attn
    plain: list[Any] = []
    handle = module.register_forward_hook(lambda _m, _a, out: plain.append(out))
    sequences = make_sequences()
    logits(model, sequences)
    handle.remove()
    with spliced(model, {"attn_out.1": attention}):
        handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out))
        logits(model, sequences)
        handle.remove()
    assert isinstance(plain[0], tuple)
    assert type(seen[0]) is type(plain[0])
    assert len(seen[0]) == len(plain[0])
    assert torch.allclose(seen[0][0], attention(plain[0][0]), atol=1e-5)


@pytest.mark.parametrize("site", ["model.layers.1.mlp:input", "resid_pre.2", "model.layers.1.mlp.up_proj"])
def test_inputs_and_inner_modules(model: Any, site: str) -> None:
    sequences = make_sequences()
    if site.endswith(":input"):
        path = "model.layers.1.post_attention_layernorm"
        sae = make_sae(model, path)
    elif site == "resid_pre.2":
        sae, path = make_sae(model, "resid_post.1"), "model.layers.1"
    else:
        sae, path = make_sae(model, site), site
    with spliced(model, {site: sae}):
        got = logits(model, sequences)
    assert torch.allclose(got, by_hand(model, sequences, path, lambda out: sae(out)), atol=1e-5)


def test_a_site_object_may_read_an_input(model: Any) -> None:
    sae = make_sae(model, "model.layers.1.post_attention_layernorm")
    site = Site("mine", "mine", "model.layers.1.mlp", 1, reads="input")
    with spliced(model, {site: sae}) as run:
        got = logits(model, make_sequences())
    with spliced(model, {"model.layers.1.mlp:input": sae}):
        assert torch.equal(logits(model, make_sequences()), got)
    assert run.codes["mine"].shape == (3, 12)


def test_bf16_models_get_bf16_back_computed_in_fp32() -> None:
    model = make_model("qwen3", dtype=torch.bfloat16)
    sae, sequences = make_sae(model), make_sequences()
    out: list[Any] = []
    with spliced(model, {"resid_post.2": sae}):
        handle = model.model.layers[2].register_forward_hook(lambda _m, _a, y: out.append(first_of(y)))
        logits(model, sequences)
        handle.remove()
    x = capture(model, sequences, "resid_post.2", store_dtype=torch.bfloat16)["resid_post.2"].x_ND
    assert out[0].dtype == torch.bfloat16
    assert torch.equal(out[0].reshape(-1, D), sae(x.float()).to(torch.bfloat16))


def test_a_perfect_sae_changes_nothing_but_rounding(model: Any) -> None:
    sequences = mixed_sequences("left")
    own = logits(model, sequences)
    with spliced(model, {"resid_post.1": identity_sae(), "resid_post.2": identity_sae()}):
        got = logits(model, sequences)
    assert torch.allclose(got[sequences.mask_ST], own[sequences.mask_ST], atol=1e-5)


# ---------------------------------------------------------------- padding and policies


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_left_as_it_is_and_does_not_change_what_real_tokens_get(model: Any, sae: Any, padding: str) -> None:
    sequences = mixed_sequences(padding)
    before: list[Any] = []
    after: list[Any] = []
    block = model.model.layers[2]
    handle = block.register_forward_hook(lambda _m, _a, y: before.append(first_of(y)))
    with spliced(model, {"resid_post.2": sae}) as run:
        second = block.register_forward_hook(lambda _m, _a, y: after.append(first_of(y)))
        logits(model, sequences)
    handle.remove()
    second.remove()
    mask_ST = sequences.mask_ST
    assert torch.equal(after[0][~mask_ST], before[0][~mask_ST])
    assert (after[0][mask_ST] != before[0][mask_ST]).any(-1).all()
    assert (run.codes["resid_post.2"].count_B.reshape(mask_ST.shape)[~mask_ST] == 0).all()


def test_left_right_and_no_padding_give_the_same_codes(model: Any, sae: Any) -> None:
    dense = {}
    for padding in ("left", "right"):
        sequences = mixed_sequences(padding)
        with spliced(model, {"resid_post.2": sae}) as run:
            mask = sequences.mask_ST.long()
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                model(sequences.ids_ST, attention_mask=mask, position_ids=position_ids)
        dense[padding] = run.codes["resid_post.2"].to_dense()[sequences.mask_ST]
    assert torch.allclose(dense["left"], dense["right"], atol=1e-4)


def test_tokens_the_sae_never_trained_on_are_left_unless_all_are_asked_for(model: Any) -> None:
    sae, sequences = make_sae(model), make_sequences()
    x = capture(model, sequences, "resid_post.2")["resid_post.2"]
    cut = float(x.norm_N.sort().values[-4:-2].mean())
    fitted = Filter(FilterPolicy("norm", factor=2.0), cut / 2, 36)
    assert 2 < int((~fitted.keep(x)).sum()) < 9
    sae.metadata["filter"] = to_plain(fitted)
    wanted = {
        "filter": fitted.keep(x),
        "sinks_out": fitted.keep(x) & (x.position_N != 0) & ~x.special_N,
        "all": torch.ones(36, dtype=torch.bool),
    }
    wanted[None] = wanted["filter"]
    for policy, kept_N in wanted.items():
        told = pytest.warns(CosaeWarning, match="training left out") if policy == "all" else nullcontext()
        with told, spliced(model, {"resid_post.2": sae}, tokens=policy) as run:
            got = logits(model, sequences)
        assert torch.equal(run.codes["resid_post.2"].count_B > 0, kept_N & (sae.encode(x.x_ND).count_B > 0))
        kept = kept_N.reshape(3, 12, 1)
        expected = by_hand(model, sequences, "model.layers.2", lambda y, kept=kept: torch.where(kept, sae(y), y))
        assert torch.allclose(got, expected, atol=1e-5)
        for same in (lambda a, kept_N=kept_N: kept_N, kept_N.reshape(3, 12)):
            with spliced(model, {"resid_post.2": sae}, tokens=same):
                assert torch.equal(logits(model, sequences), got)
    quiet = spliced(model, {"resid_post.2": sae}, tokens="all", error_term=True)
    with quiet:  # nothing is changed
        logits(model, sequences)
    replace = hook(sae)
    kept = wanted["filter"].reshape(3, 12, 1)
    x_STD = x.x_ND.reshape(3, 12, D)
    assert torch.allclose(replace(x_STD), torch.where(kept, sae(x_STD), x_STD), atol=1e-5)


def test_of_an_sae_that_does_not_say_what_it_was_trained_on_everything_is_assumed_and_said(model: Any) -> None:
    sae, sequences = make_sae(model), make_sequences()
    del sae.metadata["filter"]
    with pytest.warns(CosaeWarning, match="does not say"):
        run = spliced(model, {"resid_post.2": sae})
    with pytest.warns(CosaeWarning, match="does not say"):
        hook(sae)
    with spliced(model, {"resid_post.2": sae}, tokens="all"):
        expected = logits(model, sequences)
    with run:
        assert torch.equal(logits(model, sequences), expected)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_leaves_the_sink_that_training_never_saw(model: Any, options: dict[str, Any]) -> None:
    """An SAE that is exact below a norm and hopeless above: what an SAE is that never saw a sink."""
    model, sequences = make_model("llama"), make_sequences()
    with torch.no_grad():
        model.get_input_embeddings().weight[1] *= 400  # BOS
    norm_ST = capture(model, sequences, "resid_post.2")["resid_post.2"].norm_N.reshape(3, 12)
    median = float(norm_ST.median())
    assert (norm_ST[:, 0] > 10 * median).all()
    assert (norm_ST[:, 1:] < 10 * median).all()
    sae = OrdinaryOnly(identity_sae(), 10 * median)
    sae.metadata["filter"] = to_plain(Filter(FilterPolicy("norm"), median, 100))
    own = generate(model, sequences, **options)
    with spliced(model, {"resid_post.2": sae}, keep="history") as run:
        assert torch.equal(generate(model, sequences, **options), own)
    used_ST = run.joined("resid_post.2").count_B.reshape(3, -1) > 0 if options != {"use_cache": False} else None
    assert used_ST is None or (not used_ST[:, 0].any() and used_ST[:, 1:].all())
    with pytest.warns(CosaeWarning, match="training left out"), spliced(model, {"resid_post.2": sae}, tokens="all"):
        assert not torch.equal(generate(model, sequences, **options), own)


class OrdinaryOnly:
    def __init__(self, sae: Any, most: float) -> None:
        self.sae, self.most, self.metadata = sae, most, dict(sae.metadata)
        self.d_in, self.d_sae, self.W_dec, self.decode = sae.d_in, sae.d_sae, sae.W_dec, sae.decode

    def encode(self, x: torch.Tensor) -> Any:
        length = x.norm(dim=-1, keepdim=True)
        return self.sae.encode(torch.where(length < self.most, x, x.flip(-1)))


def test_a_policy_of_ones_own_sees_norms_positions_and_ids(model: Any, sae: Any) -> None:
    sequences, seen = mixed_sequences("left"), []

    def policy(activations: Activations) -> torch.Tensor:
        seen.append(activations)
        return activations.norm_N > 0

    with spliced(model, {"resid_post.2": sae}, tokens=policy):
        logits(model, sequences)
    x = capture(model, sequences, "resid_post.2")["resid_post.2"]
    real_N = sequences.mask_ST.reshape(-1)
    assert torch.equal(seen[0].token_N[real_N], x.token_N)
    assert torch.equal(seen[0].position_N[real_N], x.position_N)
    assert torch.equal(seen[0].special_N[real_N], x.special_N)
    assert (seen[0].norm_N[~real_N] == 0).all()


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("frame", ["raw", "layer_norm"])
def test_edits_on_codes_are_those_made_by_hand_on_dense_ones(model: Any, error_term: bool, frame: str) -> None:
    sae, sequences = make_sae(model, frame=frame), make_sequences()
    x_ND = capture(model, sequences, "resid_post.2")["resid_post.2"].x_ND
    codes = sae.encode(x_ND)
    common = torch.bincount(codes.feature_E, minlength=48).argsort(descending=True)[:6].tolist()
    never = int((torch.bincount(codes.feature_E, minlength=48)).argmin())
    edits = [
        ablate(common[:2]),
        scale(common[2:4], (3.0, -0.5), at="last"),
        set_to([never, common[4]], (2.5, 1.5), at=[0, 4]),
        scale(common[5], 0.0, at=slice(6, None)),
    ]
    dense = codes.to_dense().reshape(3, 12, 48)
    dense[:, :, common[:2]] = 0
    dense[:, 11, common[2:4]] *= torch.tensor([3.0, -0.5])
    for at in (0, 4):
        dense[:, at, never], dense[:, at, common[4]] = 2.5, 1.5
    dense[:, 6:, common[5]] = 0
    recon = sae.decode(dense, codes.norm_stats)
    if error_term:
        recon = x_ND.reshape(3, 12, D) + recon - sae(x_ND).reshape(3, 12, D)
    with spliced(model, {"resid_post.2": sae}, error_term=error_term, edits=edits) as run:
        got = logits(model, sequences)
    assert torch.allclose(run.edited["resid_post.2"].to_dense(), dense, atol=1e-5)
    assert torch.allclose(run.codes["resid_post.2"].to_dense().reshape(36, 48), codes.to_dense(), atol=1e-6)
    assert torch.allclose(got, by_hand(model, sequences, "model.layers.2", lambda _: recon), atol=2e-4)


def test_with_the_error_term_only_edited_tokens_and_what_follows_change(model: Any, sae: Any) -> None:
    sequences = make_sequences()
    own = logits(model, sequences)
    with spliced(model, {"resid_post.1": sae}, error_term=True, edits=set_to(3, 5.0, at=[7])):
        got = logits(model, sequences)
    assert torch.equal(got[:, :7], own[:, :7])
    assert (got[:, 7:] != own[:, 7:]).any(-1).all()


@pytest.mark.parametrize("relative", [False, True])
def test_steering_adds_a_decoder_row_with_and_without_reconstruction(model: Any, relative: bool) -> None:
    sae = make_sae(model, norm_restoring=True)  # which would rescale an edit of codes
    sequences = make_sequences()
    at = torch.zeros(3, 12, dtype=torch.bool)
    at[1, 3:5] = True

    def pushed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        size = x.norm(dim=-1, keepdim=True) if relative else 1.0
        return y + at[..., None] * size * (0.5 * sae.W_dec[7] - 2.0 * sae.W_dec[9])

    edit = steer([7, 9], (0.5, -2.0), at=at, relative=relative)
    for error_term in (True, False):
        with spliced(model, {"resid_post.2": sae}, error_term=error_term, edits=edit, keep="none"):
            got = logits(model, sequences)
        expected = by_hand(
            model, sequences, "model.layers.2", lambda x, e=error_term: pushed(x, x if e else sae(x)).detach()
        )
        assert torch.allclose(got, expected, atol=1e-4)


def test_plain_steering_never_encodes(model: Any, sae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sae), "encode", lambda *_: pytest.fail("encoded"))
    with spliced(model, {"resid_post.2": sae}, error_term=True, edits=steer(1, 4.0), keep="none"):
        logits(model, make_sequences())


def test_last_means_the_last_real_token_whatever_the_padding(model: Any, sae: Any) -> None:
    for padding in ("left", "right"):
        sequences = mixed_sequences(padding)
        with spliced(model, {"resid_post.2": sae}, edits=set_to(0, 9.0, at="last")) as run:
            logits(model, sequences)
        on_ST = run.edited["resid_post.2"].to_dense()[..., 0] == 9.0
        assert on_ST.sum(1).tolist() == [1, 1, 1]
        column = [9, 9, 9] if padding == "left" else [9, 5, 7]
        assert on_ST.nonzero()[:, 1].tolist() == column


def test_edits_by_site_reach_their_site_only(model: Any) -> None:
    saes = {"resid_post.1": make_sae(model, "resid_post.1"), "resid_post.2": make_sae(model)}
    with spliced(model, saes, edits={"resid_post.2": [set_to(5, 3.0)]}) as run:
        logits(model, make_sequences())
    assert (run.edited["resid_post.2"].to_dense()[..., 5] == 3.0).all()
    assert run.edited["resid_post.1"] is run.codes["resid_post.1"]


# ---------------------------------------------------------------- generate

OLD = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 53)
NO_STATIC_CACHE = ("gpt_neox", *(("gemma2", "gpt2") if OLD else ()))
"""Families that transformers itself cannot run with one."""


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_says_the_same_with_and_without_a_cache(family: str) -> None:
    model, sequences = make_model(family), mixed_sequences("left")
    sae = make_sae(model)
    edits = [ablate([1, 2]), set_to(4, 3.0, at=slice(7, 12)), steer(6, 2.0, at=[3, 12])]
    said, history = {}, {}
    caches: dict[str, dict[str, Any]] = {"dynamic": {}, "none": {"use_cache": False}}
    if family not in NO_STATIC_CACHE:
        caches["static"] = {"cache_implementation": "static"}
    for name, options in caches.items():
        with spliced(model, {"resid_post.2": sae}, error_term=True, edits=edits, keep="history") as run:
            said[name] = generate(model, sequences, **options)
        history[name] = run
    for name in said:
        assert torch.equal(said[name], said["dynamic"]), name
    assert not torch.equal(said["dynamic"], generate(model, sequences))
    whole = history["dynamic"].joined("resid_post.2", edited=True).to_dense()
    uncached = history["none"].edited["resid_post.2"].to_dense()
    assert whole.shape == uncached.shape == (3, 15, 48)
    assert torch.allclose(whole, uncached, atol=1e-4)
    position_ST = (torch.cat([sequences.mask_ST, torch.ones(3, 5, dtype=torch.bool)], 1).long().cumsum(1) - 1).clamp(0)
    real_ST = torch.cat([sequences.mask_ST, torch.ones(3, 5, dtype=torch.bool)], 1)
    assert torch.equal(whole[..., 4] == 3.0, real_ST & (position_ST >= 7) & (position_ST < 12))


def generate(model: Any, sequences: Any, **options: Any) -> torch.Tensor:
    return model.generate(
        sequences.ids_ST,
        attention_mask=sequences.mask_ST.long(),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        **options,
    )


def test_with_the_error_term_generate_says_what_the_model_says() -> None:
    model, tokenizer = embedded.load()
    ids = tokenizer("def add(a, b):\n    return", return_tensors="pt").input_ids
    sae = make_sae_for_embedded(model, ids)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    own = model.generate(ids, **options)
    steps: list[Step] = []
    with spliced(model, {"resid_post.2": sae}, error_term=True, keep="history", on_step=steps.append) as run:
        assert torch.equal(model.generate(ids, **options), own)
    assert len(steps) == len(run.history) == own.shape[1] - ids.shape[1]
    assert [step.window.position_ST[0, 0].item() for step in steps][1:] == list(range(ids.shape[1], own.shape[1] - 1))
    assert run.joined("resid_post.2").shape == (1, own.shape[1] - 1)
    with spliced(model, {"resid_post.2": identity_sae(192)}):
        assert torch.equal(model.generate(ids, **options), own)
    with spliced(model, {"resid_post.2": sae}, error_term=True, edits=steer(3, 8.0, relative=True)):
        assert not torch.equal(model.generate(ids, **options), own)


def make_sae_for_embedded(model: Any, ids: torch.Tensor) -> Any:
    import cosae
    from cosae.sae.calibrate import calibrate

    x_ND = torch.randn(200, 192) * 3
    sae = cosae.SAE.build(d_in=192, d_sae=256, k=8, sample=x_ND)
    calibrate(sae, x_ND)
    sae.metadata["filter"] = EVERY_TOKEN
    return sae


def test_beam_search_runs(model: Any, sae: Any) -> None:
    with spliced(model, {"resid_post.2": sae}, error_term=True) as run:
        with_it = model.generate(make_sequences().ids_ST, num_beams=2, max_new_tokens=4, do_sample=False)
    assert torch.equal(with_it, model.generate(make_sequences().ids_ST, num_beams=2, max_new_tokens=4, do_sample=False))
    assert run.codes["resid_post.2"].shape == (6, 1)


# ---------------------------------------------------------------- leaving no trace


def test_the_model_is_as_it_was_afterwards_however_it_ended(model: Any, sae: Any) -> None:
    before, own = hooks_of(model), logits(model, make_sequences())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    mine = {name: value.clone() for name, value in sae.state_dict().items()}
    run = spliced(model, {"resid_post.2": sae})
    assert hooks_of(model) == before
    with run:
        logits(model, make_sequences())
        assert hooks_of(model) != before
    assert hooks_of(model) == before
    with pytest.raises(KeyboardInterrupt), spliced(model, {"resid_post.2": sae}, on_step=interrupt):
        generate(model, make_sequences())
    assert hooks_of(model) == before
    with pytest.raises(ZeroDivisionError), spliced(model, {"resid_post.2": sae}), spliced(model, {"resid_pre.1": sae}):
        raise ZeroDivisionError
    assert hooks_of(model) == before
    assert torch.equal(logits(model, make_sequences()), own)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, mine[name]) for name, value in sae.state_dict().items() if not value.isnan().any())


def interrupt(step: Step) -> None:
    if step.window.start > 12:
        raise KeyboardInterrupt


def test_nested_splices_act_one_after_the_other_and_leave_one_by_one(model: Any) -> None:
    first, second = make_sae(model, seed=1), make_sae(model, seed=2)
    sequences = make_sequences()
    both = by_hand(model, sequences, "model.layers.2", lambda x: second(first(x)))
    with spliced(model, {"resid_post.2": first}):
        alone = logits(model, sequences)
        with spliced(model, {"resid_post.2": second}):
            assert torch.allclose(logits(model, sequences), both, atol=1e-5)
        assert torch.equal(logits(model, sequences), alone)


def test_a_run_can_be_entered_again_but_not_twice_at_once(model: Any, sae: Any) -> None:
    run = spliced(model, {"resid_post.2": sae}, keep="history")
    for _ in range(2):
        with run:
            logits(model, make_sequences())
            with pytest.raises(CosaeError, match="already open"):
                run.__enter__()
        assert len(run.history) == 1


def test_capture_inside_a_splice_reads_what_the_model_now_computes(model: Any, sae: Any) -> None:
    sequences = make_sequences()
    x_ND = capture(model, sequences, "resid_post.2")["resid_post.2"].x_ND
    with spliced(model, {"resid_post.2": sae}):
        assert torch.allclose(capture(model, sequences, "resid_post.2")["resid_post.2"].x_ND, sae(x_ND), atol=1e-6)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("error_term", [False, True])
def test_gradients_reach_codes_and_earlier_layers_through_the_codes_only(model: Any, error_term: bool) -> None:
    sae, sequences = make_sae(model), make_sequences()
    own = logits(model, sequences)
    embeddings = model.get_input_embeddings()(sequences.ids_ST).requires_grad_()
    with spliced(model, {"resid_post.2": sae}, error_term=error_term, grad=True) as run:
        loss = model(inputs_embeds=embeddings).logits[:, -1, 5].sum()
    value_E = run.codes["resid_post.2"].value_E
    to_codes, to_embeddings = torch.autograd.grad(loss, [value_E, embeddings])
    assert to_codes.abs().sum() > 0
    assert to_embeddings.abs().sum() > 0
    if error_term:
        assert torch.equal(loss.detach(), own[:, -1, 5].sum())
    # a small change of one code, by hand
    largest = int(to_codes.abs().argmax())
    token, feature = int(run.codes["resid_post.2"].token_E[largest]), int(run.codes["resid_post.2"].feature_E[largest])
    at = torch.zeros(36, dtype=torch.bool)
    at[token] = True
    ends = []
    for step in (1e-2, -1e-2):
        edit = set_to(feature, float(value_E.detach()[largest]) + step, at=at.reshape(3, 12))
        with spliced(model, {"resid_post.2": sae}, error_term=error_term, edits=edit):
            ends.append(float(logits(model, sequences)[:, -1, 5].sum().double()))
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(to_codes[largest]), rel=0.05)
    with spliced(model, {"resid_post.2": sae}, error_term=error_term):
        cut = model(inputs_embeds=embeddings).logits
    assert cut.requires_grad is error_term  # the stream itself passes on beside its error


# ---------------------------------------------------------------- plain hooks


def test_a_plain_hook_is_the_same_rule(model: Any, sae: Any) -> None:
    sequences = make_sequences()
    edits = [ablate(range(8)), steer(3, 1.5, at="last")]
    with spliced(model, {"resid_post.2": sae}, error_term=True, edits=edits):
        expected = logits(model, sequences)
    change = hook(sae, error_term=True, edits=edits)
    assert torch.equal(by_hand(model, sequences, "model.layers.2", change), expected)
    padded = mixed_sequences("right")
    with spliced(model, {"resid_post.2": sae}, edits=edits):
        expected = logits(model, padded)
    change = hook(sae, edits=edits)
    got = by_hand(model, padded, "model.layers.2", lambda x: change(x, mask_ST=padded.mask_ST, hook="its name"))
    assert torch.equal(got, expected)
    with pytest.raises(CosaeError, match=r"shape \(sequences, tokens, width\). Got \(12, 32\)"):
        change(torch.zeros(12, D))


# ---------------------------------------------------------------- refusals: one sentence each


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"saes": {}}, "at least one SAE by site"),
        ({"saes": {"resid_post.9": "sae"}}, "out of range: LlamaForCausalLM has 4 blocks"),
        ({"saes": {"nowhere": "sae"}}, "Site 'nowhere' is unknown"),
        ({"saes": {"resid_post.2": object()}}, "An SAE must be spliced in at resid_post.2. Got object"),
        ({"saes": {"resid_post.2": "sae", "model.layers.2": "sae"}}, "are the same place"),
        ({"saes": {"resid_post.2": "wide"}}, "has width 32, but the SAE was made for d_in = 16"),
        ({"saes": {"resid_post.2": "raw"}}, "has no threshold yet"),
        ({"edits": ablate(48)}, "Feature 48 is out of range: the SAE at resid_post.2 has 48 features, 0 to 47"),
        ({"edits": ["ablate 3"]}, "edits must be made with ablate"),
        ({"edits": {"resid_post.1": [ablate(1)]}}, "SAEs are spliced in at resid_post.2 only"),
        ({"saes": {"resid_post.2": "sae", "resid_post.1": "sae"}, "edits": ablate(1)}, "must say at which site"),
        ({"tokens": "most"}, "tokens must be 'all', 'filter'"),
        ({"saes": {"resid_post.2": "bare"}, "tokens": "filter"}, "which this one does not carry"),
        ({"keep": "all"}, "keep must be one of latest, history, none"),
    ],
)
def test_mistakes_are_told_before_any_pass(model: Any, sae: Any, options: dict[str, Any], sentence: str) -> None:
    import cosae

    made = {
        "sae": sae,
        "wide": cosae.SAE.build(d_in=16, d_sae=32, selector="topk", k=2),
        "raw": cosae.SAE.build(d_in=D, d_sae=32, k=2),
        "bare": cosae.SAE.build(d_in=D, d_sae=32, selector="topk", k=2),
    }
    saes = options.pop("saes", {"resid_post.2": "sae"})
    saes = {site: made.get(one, one) if isinstance(one, str) else one for site, one in saes.items()}
    with pytest.raises(CosaeError, match=sentence.replace("(", r"\(").replace(")", r"\)")) as caught:
        spliced(model, saes, **options)
    assert "\n" not in str(caught.value)


def test_mistakes_that_only_a_pass_shows(model: Any, sae: Any) -> None:
    sequences = make_sequences()
    wide = spliced(model, {"model.layers.1.mlp.up_proj": sae})
    with pytest.raises(CosaeError, match=r"width 64.* d_in = 32"), wide:
        logits(model, sequences)
    model.model.layers[1].idle = torch.nn.Linear(D, D)
    with pytest.raises(CosaeError, match="was never reached"), spliced(model, {"model.layers.1.idle": sae}):
        logits(model, sequences)
    del model.model.layers[1].idle


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ablate([1, 1]), "each once"),
        (lambda: ablate([]), "feature ids of at least 0"),
        (lambda: ablate(-1), "feature ids of at least 0"),
        (lambda: ablate(1.5), "feature ids of at least 0"),
        (lambda: ablate(torch.tensor([0.5])), "whole numbers"),
        (lambda: set_to(1, float("nan")), "one finite number"),
        (lambda: scale([1, 2], [1.0, 2.0, 3.0]), "one for each of its 2 features"),
        (lambda: steer(1, "much"), "must be a number"),
        (lambda: ablate(1, at="first"), "at must be 'all', 'last'"),
        (lambda: ablate(1, at=-1), "at must be 'all', 'last'"),
        (lambda: ablate(1, at=torch.ones(3)), "at must be 'all', 'last'"),
    ],
)
def test_edits_that_make_no_sense(make: Any, sentence: str) -> None:
    with pytest.raises(CosaeError, match=sentence):
        make()


def test_nothing_to_read_before_the_first_pass(model: Any, sae: Any) -> None:
    with spliced(model, {"resid_post.2": sae}) as run, pytest.raises(CosaeError, match="no codes yet"):
        _ = run.codes
    with pytest.raises(CosaeError, match="no history to join"):
        run.joined("resid_post.2")
