"""An audit tells a norm-driven SAE from one that is not, says so in sentences, and changes nothing."""

from __future__ import annotations

import json

import pytest
import torch

import cosae
from cosae.errors import CosaeError
from cosae.evaluate.audit import value_growth
from cosae.sae.calibrate import calibrate
from cosae.types import Activations, Codes
from tests.support.passes import audit

D = 16


def activations(n: int = 1200, sigma: float = 0.6, n_sinks: int = 12) -> tuple[Activations, torch.Tensor]:
    """Sparse combinations of 24 directions, log-normal lengths, and sinks 60 × as long at position 0."""
    generator = torch.Generator().manual_seed(0)
    feature_FD = torch.nn.functional.normalize(torch.randn(24, D, generator=generator), dim=-1)
    code_NF = (torch.rand(n, 24, generator=generator) < 0.12) * torch.rand(n, 24, generator=generator)
    x_ND = torch.nn.functional.normalize(code_NF @ feature_FD + 0.05 * torch.randn(n, D, generator=generator), dim=-1)
    x_ND = x_ND * (sigma * torch.randn(n, generator=generator)).exp()[:, None]
    sink_N = torch.arange(n) < n_sinks
    x_ND[sink_N] *= 60
    bare = Activations.bare(x_ND)
    position_N = torch.where(sink_N, 0, 5).int()
    token_N = torch.where(sink_N, 1, 7).int()
    fields = {**vars(bare), "position_N": position_N, "token_N": token_N, "doc_N": torch.arange(n).int() // 100}
    return Activations(**fields), sink_N


def trained(arm: str) -> cosae.SAE:
    x, sink_N = activations()
    run = cosae.fit(
        x.x_ND[~sink_N], [arm], d_sae=24, k=3, steps=150, batch_tokens=128, lr=1e-2, training__optimizer__warmup_steps=5
    )
    return next(iter(run.saes.values()))


@pytest.fixture(scope="module")
def audits() -> dict[str, dict[str, object]]:
    x, sink_N = activations()
    return {
        arm: audit(trained(arm), x, sink_N, spell=lambda t: f"<{t}>") for arm in ("standard", "standard_unit_frame")
    }


def by_topic(found: dict[str, object]) -> dict[str, dict[str, str]]:
    return {line["topic"]: line for line in found["lines"]}  # type: ignore[attr-defined]


def test_the_standard_sae_is_fooled_and_the_unit_frame_is_not(audits: dict) -> None:
    assert audits["standard"]["verdict"]["fooled"] == "yes"
    assert audits["standard"]["norm_driven"]["sinks_out"]["share"] > 0.2
    assert audits["standard_unit_frame"]["verdict"]["fooled"] == "no"
    assert audits["standard_unit_frame"]["norm_driven"]["sinks_out"]["share"] == 0.0
    assert by_topic(audits["standard"])["norm-driven"]["level"] == "look"
    assert by_topic(audits["standard_unit_frame"])["norm-driven"]["level"] == "ok"


def test_the_budget_follows_the_norm_only_where_it_does(audits: dict) -> None:
    assert by_topic(audits["standard"])["L0"]["level"] == "look"
    assert by_topic(audits["standard_unit_frame"])["L0"]["level"] == "ok"


def test_sinks_are_found_and_named(audits: dict) -> None:
    line = by_topic(audits["standard"])["sinks"]
    assert line["level"] == "look"
    assert "12 tokens (1.00 %)" in line["evidence"]
    assert "at position 0" in line["evidence"]
    assert "'<1>'" in line["evidence"]
    assert by_topic(audits["standard"])["on sinks"]["level"] == "look"


def test_every_question_of_an_audit_is_answered(audits: dict) -> None:
    asked = {"norms", "norm shift", "norm-driven", "where it fires", "reconstruction", "L0", "sinks", "on sinks"}
    asked |= {"calibrated L0", "read-time removal", "dead features", "duplicates"}
    assert set(by_topic(audits["standard"])) == asked
    for line in audits["standard"]["lines"]:
        assert line["sentence"].endswith(".")
        assert line["evidence"]
        assert "None" not in line["evidence"]
        assert "nan" not in line["evidence"]


def test_it_is_json(audits: dict) -> None:
    assert json.loads(json.dumps(audits["standard"], allow_nan=False)) == audits["standard"]


def test_an_audit_changes_nothing_and_does_not_depend_on_the_batch() -> None:
    sae = trained("standard")
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    x, sink_N = activations()
    one, other = audit(sae, x, sink_N, batch_tokens=4096), audit(sae, x, sink_N, batch_tokens=37)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    for path in (("norm_driven", "sinks_out", "share"), ("reconstruction", "sinks_out", "fve"), ("sinks", "fve_on")):
        a, b = one, other
        for key in path:
            a, b = a[key], b[key]
        assert a == pytest.approx(b, abs=1e-6), path


def test_a_shift_against_training_is_noticed() -> None:
    sae = trained("standard")
    x, sink_N = activations()
    longer = Activations.bare(3 * x.x_ND[~sink_N])
    found = audit(sae, longer, torch.zeros(len(longer), dtype=torch.bool))
    assert found["shift"]["ratio"] == pytest.approx(3, rel=0.1)
    assert by_topic(found)["norm shift"]["level"] == "look"
    assert by_topic(found)["sinks"]["level"] == "note"


def test_only_sinks_are_refused() -> None:
    x, _ = activations()
    with pytest.raises(CosaeError, match="nothing left to audit"):
        audit(trained("standard"), x, torch.ones(len(x), dtype=torch.bool))


def test_growth_is_the_slope_of_log_value_on_log_length() -> None:
    length_N = torch.linspace(0.5, 4, 50).double()
    dense = torch.stack([3 * length_N, 0.2 * length_N.sqrt(), torch.zeros(50)], dim=1).float()
    codes = Codes.from_dense(dense)
    assert value_growth(codes, length_N) == pytest.approx(0.75, rel=1e-5)
    assert value_growth(Codes.from_dense(dense[:, :1]), length_N) == pytest.approx(1.0, rel=1e-5)
    assert value_growth(codes, torch.ones(50)) is None


@pytest.mark.parametrize("selector", ["topk", "abs_topk", "jumprelu", "gated"])
def test_every_selector_can_be_audited(selector: str) -> None:
    x, sink_N = activations(300)
    sae = cosae.SAE.build(d_in=D, d_sae=24, score="cosine", selector=selector, k=3, seed=0, sample=x.x_ND)
    calibrate(sae, x.x_ND[~sink_N])
    found = audit(sae, x, sink_N)
    live = x.x_ND[~sink_N]
    fve = 1 - float((sae(live).detach() - live).square().sum() / (live - live.mean(0)).square().sum())
    measured = found["reconstruction"]["sinks_out"]
    assert measured["fve"] == pytest.approx(fve, abs=1e-5)
    assert measured["l0"] == pytest.approx(sae.encode(live).l0)
    assert found["norms"]["sinks"] == int(sink_N.sum()) == 12
    json.dumps(found, allow_nan=False)


def test_a_silent_sae_says_so() -> None:
    x, sink_N = activations(300)
    sae = cosae.SAE.build(d_in=D, d_sae=24, score="inner", selector="batch_topk", k=3, seed=0, sample=x.x_ND)
    sae.selector.threshold = torch.tensor(1e9)
    found = audit(sae, x, sink_N)
    assert found["verdict"]["fooled"] == "unknown"
    assert by_topic(found)["norm-driven"]["level"] == "look"
    json.dumps(found, allow_nan=False)
