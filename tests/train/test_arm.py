"""Arms: names, fields and texts that make one; what is refused; norm noise."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from cosae.errors import CosaeError
from cosae.io.legacy import upgrade
from cosae.io.values import from_plain, to_plain
from cosae.sae.calibrate import calibrate
from cosae.sae.config import InitConfig, SAEConfig
from cosae.sae.file import save
from cosae.sae.loss import LossConfig
from cosae.train.arm import ARMS, SECTIONS, Arm, check_arms, input_noise, parse_arm


@pytest.mark.parametrize("name", ARMS)
def test_every_named_arm_parses_to_itself_and_builds(name: str) -> None:
    arm = parse_arm(name)
    assert arm is ARMS[name] or arm == ARMS[name]
    assert arm.name == name
    whole = arm.with_defaults(d_sae=24, k=3, seed=5, lr=0.01, kernel="reference")
    sae = whole.build(8, torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    assert (sae.d_sae, sae.k, sae.cfg.score, sae.cfg.frame, sae.kernel) == (
        24,
        3,
        arm.sae.score,
        arm.sae.frame,
        "reference",
    )


def test_fields_are_read_as_their_types() -> None:
    arm = parse_arm(
        "cosine, k=64,seed=1,prefixes=8+32,norm_restoring=TRUE,a_init=1,b_init=-0.5,loss.reweight=2,lr=1e-3,name=a"
    )
    assert arm.sae == SAEConfig(score="cosine", k=64, prefixes=(8, 32), norm_restoring=True)
    assert arm.init == InitConfig(a_init=1.0, b_init=-0.5)
    assert (arm.seed, arm.lr) == (1, 1e-3)
    assert arm.loss == LossConfig(reweight=2.0)


def test_changes_show_in_the_name_unless_it_is_given() -> None:
    assert parse_arm("cosine,k=64,loss.reweight=1").name == "cosine-k=64-loss.reweight=1"
    assert parse_arm("cosine,k=64,name=mine").name == "mine"
    names = {parse_arm(text).name for text in ("cosine", "cosine,k=4", "cosine,k=8", "cosine,k=4,seed=1")}
    assert len(names) == 4


@pytest.mark.parametrize("text", ["k=9→3,k_steps=4", "k=9->3,k_steps=4", "k_start=9,k=3,k_steps=4"])
def test_a_schedule_of_k_falls_linearly_to_k(text: str) -> None:
    arm = parse_arm(f"standard,{text}")
    assert (arm.k_start, arm.sae.k, arm.k_steps) == (9, 3, 4)
    assert [arm.k_at(step) for step in range(6)] == [9, 7, 6, 4, None, None]
    assert parse_arm("standard,k=3").k_at(0) is None


def test_open_fields_come_from_the_run_and_set_ones_stay() -> None:
    run = {"d_sae": 100, "k": 7, "seed": 3, "lr": 0.5, "kernel": "reference"}
    filled = Arm().with_defaults(**run)
    assert (filled.sae.d_sae, filled.sae.k, filled.seed, filled.lr, filled.kernel) == (100, 7, 3, 0.5, "reference")
    kept = Arm.of(d_sae=10, k=1, seed=0, lr=0.1).with_defaults(**run)
    assert (kept.sae.d_sae, kept.sae.k, kept.seed, kept.lr) == (10, 1, 0, 0.1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "an arm must start with one of standard"),
        ("euclid", "Got 'euclid' instead"),
        ("Cosine", "an arm must start with"),
        ("cosine,k", "must read field=value"),
        ("cosine,", "must read field=value"),
        ("cosine,k=", "k must be a whole number"),
        ("cosine,k=four", "k must be a whole number. Got 'four'"),
        ("cosine,k=2.5", "k must be a whole number"),
        ("cosine,a_init=x", "a_init must be a number"),
        ("cosine,prefixes=4+x", "each of prefixes must be a whole number"),
        ("cosine,norm_restoring=1", "must be one of true, false"),
        ("cosine,width=4", "an arm has no field 'width'"),
        ("cosine,loss=4", "an arm has no field 'loss'"),
        ("cosine,loss.weight=4", "has no field 'loss.weight'"),
        ("cosine,loss.space=sideways", "loss space must be one of"),
        ("cosine,a_lr=-1", "a_lr must be a finite number"),
        ("cosine,threshold_lr=nan", "threshold_lr must be a finite number"),
        ("cosine,lr=0", "lr must be a positive number"),
        ("cosine,lr=inf", "lr must be a positive number"),
        ("cosine,input_noise=0.5", "input_noise must be at least 1"),
        ("cosine,k=1,k=2", "k was given twice"),
        ("cosine,k_start=9,k=8→2,k_steps=3", "k_start was given twice"),
        ("cosine,k=8→2", "needs both its first k and its steps"),
        ("cosine,k=2→8,k_steps=3", "k_start must be above 8"),
        ("cosine,k=8→2,k_steps=0", "k_steps must be"),
        ("cosine,k=8→2,k_steps=3,d_sae=7", "k_start must be at most d_sae = 7"),
        ("cosine,k=8→2,k_steps=3,selector=jumprelu", "Got the selector jumprelu: drop k_start"),
        (
            "cosine,"
            + ",".join(
                ["seed=1", "d_sae=1024", "norm_restoring=true", "input_noise=2", "a_init=0.5", "b_lr=2.0", "a_lr=1"]
            ),
            "add name=",
        ),
        ("standard,sparsity_weight=-1", "sparsity_weight must be"),
        ("standard,sparsity_weight=nan", "sparsity_weight must be"),
        ("standard,seed=-1", "seed must be"),
        ("standard,seed=99999999999999999999", "seed must be"),
    ],
)
def test_a_bad_text_is_one_sentence(text: str, says: str) -> None:
    with pytest.raises(CosaeError) as caught:
        parse_arm(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["<b>bold</b>", "../up", "a/b", "a b", "", ".hidden", "-flag", "naïve", "a\n", "x" * 81, 'q"uote', "a,b", "$(id)"],
)
def test_a_name_that_could_harm_a_page_or_a_path_is_refused(name: str) -> None:
    with pytest.raises(CosaeError, match="an arm's name must be letters"):
        Arm(name=name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": "dot"}, "score must be one of"),
        ({"selector": "softmax"}, "selector must be one of"),
        ({"frame": "cube"}, "frame must be one of"),
        ({"k": 25}, "k must be at most d_sae"),
        ({"k": 0}, "k must be a whole number of at least 1"),
        ({"b_init": "guess"}, "b_init"),
        ({"a_init": float("nan")}, "a_init must be a finite number"),
        ({"centre": "median"}, "centre must be one of"),
        ({"kernel": "magic"}, "kernel"),
        ({"prefixes": (8, 4)}, "prefixes must be ascending"),
    ],
)
def test_what_no_sae_can_be_is_refused_on_building(change: dict[str, object], says: str) -> None:
    settings = {"d_sae": 24, "k": 3, "seed": 0, **change}
    with pytest.raises(CosaeError, match=says):
        Arm.of(**settings).build(8, torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))  # type: ignore[arg-type]


def test_arms_must_be_some_and_differ() -> None:
    with pytest.raises(CosaeError, match="at least one arm"):
        check_arms(())
    with pytest.raises(CosaeError, match=r"cosine came more than once"):
        check_arms((ARMS["cosine"], ARMS["standard"], ARMS["cosine"]))
    check_arms((ARMS["cosine"], parse_arm("cosine,seed=1")))


def test_learning_rate_multiples_name_real_parameters() -> None:
    """A multiple for a name that no SAE has would be silently dropped."""
    names: set[str] = set()
    for score in ("cosine", "cosine_base_delta", "cosine_two_exponents"):
        for selector in ("batch_topk", "jumprelu"):
            sae = Arm.of(score=score, selector=selector, d_sae=16, k=2, seed=0).build(4, None)
            names |= dict(sae.named_parameters()).keys()
    multiples = Arm.of(a_lr=2.0, b_lr=3.0, threshold_lr=4.0, value_exponent_lr=5.0).lr_multipliers()
    assert set(multiples) <= names
    assert sorted(multiples.values()) == [2.0, 2.0, 2.0, 3.0, 4.0, 5.0]


def test_input_noise_scales_rows_within_its_range_and_repeats() -> None:
    x_BD = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
    noisy = input_noise(x_BD, 2.0, seed=3, step=7)
    factor_BD = noisy / x_BD
    factor_B = factor_BD.mean(-1)
    torch.testing.assert_close(factor_BD, factor_B[:, None].expand_as(factor_BD))
    assert 0.5 <= float(factor_B.min()) < 0.51
    assert 1.99 < float(factor_B.max()) <= 2.0001
    assert float(factor_B.mean()) == pytest.approx(1.25, abs=0.02)  # U(½, 2), not log-uniform
    assert torch.equal(noisy, input_noise(x_BD, 2.0, seed=3, step=7))
    assert not torch.equal(noisy, input_noise(x_BD, 2.0, seed=3, step=8))
    assert not torch.equal(noisy, input_noise(x_BD, 2.0, seed=4, step=7))
    assert input_noise(x_BD, 1.0, seed=3, step=7) is x_BD


def test_the_text_form_reaches_every_field() -> None:
    """Without the section's name, but for the loss, and but for d_in and d_out, which are the data's."""
    texts = {
        **{"score": "inner_unit", "selector": "topk", "frame": "unit", "b_init": "norm", "centre": "mean"},
        **{"bias": "false", "norm_restoring": "true", "prefixes": "4", "space": "frame", "normalise": "none"},
        **{"a_owner": "feature", "value_exponent_owner": "fixed", "skip": "true", "target_frame": "input"},
        **{"sites": "3+4", "balanced": "true"},
    }
    for section, owner in {"": Arm, **SECTIONS}.items():
        for f in fields(owner):
            if f.name not in ("name", "d_in", "d_out", *SECTIONS):
                key = f"loss.{f.name}" if section == "loss" else f.name
                text = texts.get(f.name, "3" if str(f.type).startswith("int") else "1.5")
                base = "cosine_two_exponents" if "value" in key or "owner" in key else "cosine"
                base = {"n_groups": "cosine_grouped"}.get(key, base)
                make = ",selector=jumprelu" if key in ("bandwidth", "threshold_lr", "sparsity_weight") else ""
                make = ",frame=unit" if key == "target_frame" else make
                with_it = {"k_start": ",k_steps=3", "k_steps": ",k_start=3"}.get(key, "")
                plain = parse_arm(f"{base}{make},name=x")
                assert parse_arm(f"{base}{make},{key}={text}{with_it},name=x") != plain, key
    with pytest.raises(CosaeError, match="no field 'd_in'"):
        parse_arm("cosine,d_in=4")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cosine,value_exponent_init=1", "value_exponent_init has no say .*cosine, which has no value exponent"),
        ("cosine,value_exponent_lr=2", "value_exponent_lr has no say"),
        ("cosine,a_owner=feature", "a_owner can be chosen for the score cosine_two_exponents alone"),
        ("cosine_two_exponents,a_owner=fixed,a_lr=2", "a_lr has no say .*whose exponent is not learned"),
        ("cosine_two_exponents,value_exponent_owner=fixed,value_exponent_lr=2", "value_exponent_lr has no say"),
        ("cosine_two_exponents,n_groups=3", "n_groups has no say .*without groups"),
        ("cosine_two_exponents,value_exponent_init=inf", "value_exponent_init must be a finite number"),
    ],
)
def test_an_exponent_s_option_that_would_do_nothing_is_refused(text: str, words: str) -> None:
    with pytest.raises(CosaeError, match=words):
        parse_arm(text)


def test_two_exponents_by_text() -> None:
    arm = parse_arm("cosine_two_exponents,a_init=0,value_exponent_init=1")
    assert (arm.sae.score, arm.init.a_init, arm.init.value_exponent_init) == ("cosine_two_exponents", 0.0, 1.0)
    held = parse_arm("cosine_two_exponents,name=held,a_owner=fixed,a_init=0.5,value_exponent_owner=group,n_groups=2")
    sae = held.with_defaults(d_sae=8, k=2, seed=0, lr=1e-3, kernel="auto").build(4, None)
    assert float(sae.scale_a) == 0.5
    assert sae.score.value_exponent.shape == (2,)


def test_what_0_1_wrote_of_an_arm_is_put_into_its_sections() -> None:
    old = {"name": "a", "score": "cosine", "k": None, "prefixes": [4, 8], "b_init": "-0.5", "lr": 0.1}
    old["loss"] = {"aux_k": 3}
    (arm,) = upgrade({"arms": [old]})["arms"]
    wanted = Arm.of("a", "cosine", prefixes=(4, 8), b_init=-0.5, lr=0.1, loss=LossConfig(aux_k=3))
    assert from_plain(Arm, arm, "arm") == wanted
    assert upgrade({"arms": [to_plain(wanted)]}) == {"arms": [to_plain(wanted)]}


def test_an_arm_goes_on_from_a_saved_sae_under_another_score(tmp_path: Path) -> None:
    """The recipe's way to continued training after a score swap (paper §5.2)."""
    x_ND = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    first = Arm.of("standard").with_defaults(d_sae=20, k=3, seed=0, lr=1e-3, kernel="auto").build(8, x_ND)
    calibrate(first, x_ND)
    save(first, tmp_path / "saved")
    start = f"start={tmp_path / 'saved'}"
    same = parse_arm(f"standard,name=on,{start}").with_defaults(d_sae=20, k=3, seed=5, lr=1e-3, kernel="auto")
    assert torch.equal(same.build(8, x_ND).W_enc, first.W_enc)
    swapped = parse_arm(f"cosine,name=swapped,{start}").with_defaults(d_sae=20, k=3, seed=5, lr=1e-3, kernel="auto")
    built = swapped.build(8, x_ND)
    assert built.cfg.score == "cosine"
    assert torch.equal(built.W_dec, first.W_dec)
    assert built.metadata["swapped_from"] == "inner"
    wider = parse_arm(f"standard,name=wide,{start}").with_defaults(d_sae=24, k=3, seed=0, lr=1e-3, kernel="auto")
    with pytest.raises(CosaeError, match="asks for d_sae 24"):
        wider.build(8, x_ND)
    missing = parse_arm("standard,name=gone,start=nowhere").with_defaults(d_sae=20, k=3, seed=0, lr=1e-3, kernel="auto")
    with pytest.raises(CosaeError, match="nowhere"):
        missing.build(8, x_ND)
