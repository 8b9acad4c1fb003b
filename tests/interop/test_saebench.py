"""The SAEBench adapter against the contract SAEBench 0.6 reads, without SAEBench."""

import json
from dataclasses import asdict, fields, is_dataclass

import pytest
import torch

from cosae.errors import CosaeError
from cosae.interop.saebench.adapter import SAEBenchSAE, tl_hook_name
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from cosae.sae.score import SCORES

PLACE = {"model_name": "embedded", "hook_name": "blocks.3.hook_resid_post"}
D, F, K = 12, 40, 6


def make(score="cosine", selector="topk", frame="raw", seed=0, **options):
    """An SAE with decoder rows of many lengths, biases, and exponents away from 0 and 1."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(400, D, generator=draw) * 3 + 2
    sae = SAE.build(D, F, score, selector, K, seed=seed, frame=frame, a_init=0.3, sample=x, **options)
    with torch.no_grad():
        sae.decoder.rows_FD.mul_(torch.rand(F, 1, generator=draw) * 4 + 0.2)
        if sae.score.bias_F is not None:
            sae.score.bias_F.uniform_(-0.2, 0.2, generator=draw)
    if selector == "batch_topk":
        calibrate(sae, x)
    return sae, x[:50]


class TestTensors:
    @pytest.mark.parametrize("selector", ["topk", "batch_topk", "jumprelu", "gated", "abs_topk"])
    @pytest.mark.parametrize("score", sorted(SCORES))
    def test_names_shapes_and_unit_rows(self, score, selector):
        sae, _ = make(score, selector)
        bench = SAEBenchSAE(sae, **PLACE)
        shapes = {name: tuple(getattr(bench, name).shape) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        assert shapes == {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
        torch.testing.assert_close(bench.W_dec.norm(dim=1), torch.ones(F))
        assert not any(p.requires_grad for p in bench.parameters())

    @pytest.mark.parametrize("selector", ["topk", "batch_topk", "jumprelu", "gated", "abs_topk"])
    @pytest.mark.parametrize("score", sorted(SCORES))
    def test_same_reconstructions_and_codes_times_row_lengths(self, score, selector):
        sae, x = make(score, selector)
        bench = SAEBenchSAE(sae, **PLACE)
        if selector in ("batch_topk", "jumprelu", "gated"):  # a fold changes which scores are the largest k
            lengths = sae.W_dec.norm(dim=1)
            torch.testing.assert_close(bench.encode(x), sae.encode(x).to_dense() * lengths, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(bench(x), sae(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bench(x), bench.decode(bench.encode(x)), rtol=1e-5, atol=1e-5)
        by_hand = bench.encode(x) @ bench.W_dec + bench.b_dec
        torch.testing.assert_close(bench.decode(bench.encode(x)), by_hand, rtol=1e-4, atol=1e-4)

    def test_the_sae_that_was_handed_in_stays_as_it_was(self):
        sae, x = make()
        before = {name: value.clone() for name, value in sae.state_dict().items()}
        trainable = [p.requires_grad for p in sae.parameters()]
        bench = SAEBenchSAE(sae, **PLACE).to(dtype=torch.bfloat16)
        bench.encode(x)
        torch.testing.assert_close(dict(sae.state_dict()), before, rtol=0, atol=0, equal_nan=True)
        assert [p.requires_grad for p in sae.parameters()] == trainable

    def test_no_bias_shows_as_zeros(self):
        sae, _ = make(bias=False)
        assert not SAEBenchSAE(sae, **PLACE).b_enc.any()

    def test_inputs_of_two_and_three_dimensions(self):
        sae, x = make()
        bench = SAEBenchSAE(sae, **PLACE)
        cube = x.reshape(5, 10, D)
        assert bench.encode(cube).shape == (5, 10, F)
        assert bench(cube).shape == cube.shape
        torch.testing.assert_close(bench.encode(cube).reshape(50, F), bench.encode(x))

    def test_gradients_reach_the_input(self):
        sae, x = make()
        x = x.requires_grad_()
        SAEBenchSAE(sae, **PLACE)(x).sum().backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0


class TestNumerics:
    @pytest.mark.parametrize("a", [0.0, 0.26, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_zero_rows_encode_to_nothing(self, a, dtype):
        """SAEBench zeroes BOS and padding, then encodes them; only the centre would be left to fire on."""
        sae, x = make("cosine", "batch_topk")
        with torch.no_grad():
            sae.score.exponent.fill_(a)
            sae.selector.threshold = torch.tensor(-10.0)  # everything fires that may
        bench = SAEBenchSAE(sae, **PLACE).to(device="cpu", dtype=dtype)
        x = torch.cat([x[:3], torch.zeros(2, D), x[3:5]]).to(dtype)
        codes = bench.encode(x)
        assert codes[3:5].count_nonzero() == 0
        assert (codes[[0, 1, 2, 5, 6]] != 0).any(dim=1).all()

    @pytest.mark.parametrize("score", sorted(SCORES))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_finite_at_any_length(self, score, dtype):
        sae, x = make(score)
        bench = SAEBenchSAE(sae, **PLACE).to(dtype=dtype)
        largest = min(1e18, torch.finfo(dtype).max / 4) / float(x.norm(dim=1).max())
        for scale in (1e-30, 1e-6, 1.0, largest):
            codes = bench.encode((x * scale).to(dtype))
            assert codes.isfinite().all()
            assert bench.decode(codes).isfinite().all()

    def test_rows_whose_square_overflows_are_refused(self):
        sae, x = make("cosine")
        with pytest.raises(CosaeError, match=r"at most 1\.8e"):
            SAEBenchSAE(sae, **PLACE).encode(x * 1e30)

    def test_norms_and_thresholds_stay_in_float32(self):
        """bfloat16 adds 1/256 of error to what comes out, not to what is decided inside."""
        sae, x = make("cosine", "batch_topk")
        exact = SAEBenchSAE(sae, **PLACE)
        cast = SAEBenchSAE(sae, **PLACE).to(dtype=torch.bfloat16)
        x = x.bfloat16()
        torch.testing.assert_close(cast.encode(x), exact.encode(x.float()).bfloat16(), rtol=0, atol=0)
        assert cast.sae.dtype == torch.float32

    def test_casting_there_and_back_loses_nothing(self):
        sae, x = make()
        bench = SAEBenchSAE(sae, **PLACE)
        codes, W_dec = bench.encode(x), bench.W_dec.clone()
        bench = bench.to(dtype=torch.bfloat16).to(dtype=torch.float32)
        assert torch.equal(bench.encode(x), codes)
        assert torch.equal(bench.W_dec, W_dec)

    def test_activations_that_are_not_finite_are_refused(self):
        sae, x = make()
        x[3, 2] = float("nan")
        with pytest.raises(CosaeError, match="x must be finite"):
            SAEBenchSAE(sae, **PLACE).encode(x)


class TestModule:
    def test_to_by_keyword_tells_device_and_dtype(self):
        sae, x = make()
        bench = SAEBenchSAE(sae, **PLACE)
        assert (bench.device, bench.dtype, bench.cfg.dtype) == (torch.device("cpu"), torch.float32, "float32")
        assert bench.to(device="cpu", dtype=torch.bfloat16) is bench
        assert (bench.dtype, bench.cfg.dtype) == (torch.bfloat16, "bfloat16")
        assert {bench.W_enc.dtype, bench.W_dec.dtype, bench.b_enc.dtype, bench.b_dec.dtype} == {torch.bfloat16}
        assert bench.encode(x).dtype == bench.decode(bench.encode(x)).dtype == bench(x).dtype == torch.bfloat16
        assert bench.half().dtype == torch.float16

    def test_cfg_is_a_complete_json_able_dataclass(self):
        sae, _ = make()
        sae.metadata = {"tokens": 7, "path": torch.device("cpu")}
        cfg = SAEBenchSAE(sae, **PLACE, context_size=64).cfg
        assert is_dataclass(cfg)
        as_json = json.loads(json.dumps(cfg.to_dict()))
        assert as_json == cfg.to_dict()
        assert json.loads(json.dumps(asdict(cfg))) == as_json
        assert {f.name for f in fields(cfg)} == set(as_json)
        wanted = {
            "model_name": "embedded",
            "hook_name": "blocks.3.hook_resid_post",
            "hook_layer": 3,
            "hook_head_index": None,
            "context_size": 64,
            "d_in": D,
            "d_sae": F,
            "prepend_bos": True,
            "normalize_activations": "none",
            "training_tokens": 7,
            "architecture": "cosae_cosine_topk",
            "architecture_str": "cosae_cosine_topk",
        }
        assert wanted.items() <= as_json.items()
        assert as_json["cosae"]["sae"]["score"] == "cosine"

    def test_metadata_has_what_saelens_store_reads(self):
        sae, _ = make()
        metadata = SAEBenchSAE(sae, **PLACE, prepend_bos=False).cfg.metadata
        assert metadata.hook_name == "blocks.3.hook_resid_post"
        assert metadata.context_size == 128
        assert metadata.prepend_bos is False
        assert metadata.seqpos_slice == (None,)

    def test_saebench_may_set_fields_on_cfg(self):
        sae, _ = make()
        cfg = SAEBenchSAE(sae, **PLACE).cfg
        cfg.exclude_special_tokens = None
        cfg.metadata.model_from_pretrained_kwargs = {"n_ctx": 8}
        written = json.loads(json.dumps(cfg.to_dict()))
        assert written["exclude_special_tokens"] is None
        assert written["metadata"]["model_from_pretrained_kwargs"] == {"n_ctx": 8}

    def test_place_from_the_facts_and_short_site_names(self):
        sae, _ = make()
        sae.metadata = {"model": "some/model", "site": "mlp_out.11"}
        cfg = SAEBenchSAE(sae).cfg
        assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("some/model", "blocks.11.hook_mlp_out", 11)
        assert SAEBenchSAE(sae, hook_layer=4).cfg.hook_layer == 4
        assert tl_hook_name("model.layers.3") == "model.layers.3"


class TestRefusals:
    def test_without_a_place(self):
        sae, _ = make()
        with pytest.raises(CosaeError, match="pass model_name and hook_name"):
            SAEBenchSAE(sae)

    def test_a_hook_without_a_number(self):
        sae, _ = make()
        with pytest.raises(CosaeError, match="hook_layer must be given"):
            SAEBenchSAE(sae, model_name="m", hook_name="hook_embed")

    def test_uncalibrated(self):
        sae = SAE.build(D, F, "cosine", "batch_topk", K)
        with pytest.raises(CosaeError, match="no threshold yet: calibrate it first"):
            SAEBenchSAE(sae, **PLACE)

    def test_a_decoder_row_of_length_zero(self):
        sae, _ = make()
        with torch.no_grad():
            sae.decoder.rows_FD[3] = 0
        with pytest.raises(CosaeError, match="Row 3 is"):
            SAEBenchSAE(sae, **PLACE)

    @pytest.mark.parametrize("options", [{"frame": "unit"}, {"frame": "layer_norm"}, {"norm_restoring": True}])
    def test_decoding_from_codes_alone_where_lengths_are_needed(self, options):
        sae, x = make(**options)
        bench = SAEBenchSAE(sae, **PLACE)
        assert not bench.decodes_alone
        codes = bench.encode(x)
        assert bench(x).isfinite().all()
        with pytest.raises(CosaeError, match="also needs the length of each token"):
            bench.decode(codes)

    def test_a_dtype_that_is_none(self):
        sae, _ = make()
        with pytest.raises(CosaeError, match="dtype must be one of float32"):
            SAEBenchSAE(sae, **PLACE, dtype="int8")
