"""The file format: any SAE round-trips to the bit; any damage ends in one sentence; saving is atomic."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosae import SAE, CosaeError, load, save
from cosae.io.digest import value_digest
from cosae.sae import file
from cosae.sae.config import SAEConfig
from cosae.sae.fold import fold_decoder_norm
from cosae.sae.frame import FRAMES
from cosae.sae.score import SCORES
from cosae.sae.selector import SELECTORS

D, F = 5, 9

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> SAEConfig:
    d_sae = draw(st.integers(1, 13))
    selector = draw(st.sampled_from(SELECTORS))
    return SAEConfig(
        d_in=draw(st.integers(1, 7)),
        d_sae=d_sae,
        score=draw(st.sampled_from(sorted(SCORES))),
        selector=selector,
        k=draw(st.integers(1, d_sae)),
        frame=draw(st.sampled_from(FRAMES)),
        prefixes=tuple(sorted(draw(st.sets(st.integers(1, d_sae), max_size=3)))),
        norm_restoring=draw(st.booleans()),
        n_groups=draw(st.integers(1, d_sae)),
        bias=selector == "gated" or draw(st.booleans()),
        bandwidth=draw(st.floats(0.01, 1.9)),
    )


@torch.no_grad()
def randomise(sae: SAE, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.7)


def raw_state(sae: SAE) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in sae.state_dict().items()}


@settings(max_examples=60)
@given(
    configs(), st.integers(0, 2**31), st.dictionaries(st.text(), json_values, max_size=3), st.booleans(), st.booleans()
)
def test_any_sae_round_trips(
    cfg: SAEConfig, seed: int, metadata: dict[str, Any], calibrated: bool, double: bool
) -> None:
    sae = SAE(cfg)
    randomise(sae, seed)
    if calibrated and cfg.selector in ("batch_topk", "gated"):
        sae.selector.threshold.fill_(0.1)
    if double:
        sae.double()
    sae.metadata = metadata
    with tempfile.TemporaryDirectory() as folder:
        back = load(save(sae, Path(folder) / "deep" / "er"))
        assert names(Path(folder) / "deep") == ["er"], "nothing is left beside it"
    assert back.cfg == cfg
    assert back.metadata == metadata
    assert back.dtype == sae.dtype
    assert raw_state(back) == raw_state(sae)


@settings(max_examples=30)
@given(configs(), st.integers(0, 2**31))
def test_folded_saes_round_trip(cfg: SAEConfig, seed: int) -> None:
    """A fold may turn a shared gain into one per feature and leaves rank gains and thresholds per feature."""
    sae = SAE(cfg)
    randomise(sae, seed)
    folded = fold_decoder_norm(sae)
    x_BD = torch.randn(6, cfg.d_in, generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        back = load(save(folded, Path(folder) / "sae"))
    found, wanted = back.encode(x_BD), folded.encode(x_BD)
    assert torch.equal(found.feature_E, wanted.feature_E)
    assert torch.equal(found.value_E, wanted.value_E)
    assert torch.equal(back.scale_b.expand(cfg.d_sae), folded.scale_b.expand(cfg.d_sae))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def make(score: str = "cosine_per_feature", selector: str = "jumprelu") -> SAE:
    sae = SAE.build(D, F, score, selector, 3, 4)
    sae.metadata = {"site": "resid_post.3", "tokens": 1000}
    return sae


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], digests: bool = True) -> None:
    """Change cfg.json; with `digests`, make its digests those of the files that lie there."""
    config = json.loads((folder / file.CONFIG).read_text())
    if digests:
        for name in config["sha256"]:
            config["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(config)
    if digests:
        own = {name: value for name, value in config.items() if name != file.DIGEST}
        config[file.DIGEST] = value_digest(json.loads(json.dumps(own), parse_constant=lambda _: None))
    (folder / file.CONFIG).write_text(json.dumps(config))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], object], name: str = file.WEIGHTS) -> None:
    """Change tensors of a file and renew the digests: damage that no checksum sees."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    rewrite(folder, lambda config: None)


def sentence(path: Path) -> str:
    """What loading `path` answers: one line, a CosaeError and no subclass or cause with a traceback."""
    with pytest.raises(CosaeError) as caught:
        load(path)
    assert type(caught.value) is CosaeError
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def truncate(target: Path, size: int) -> None:
    target.write_bytes(target.read_bytes()[:size])


def flip_a_bit(target: Path, at: int) -> None:
    data = bytearray(target.read_bytes())
    data[at] ^= 4
    target.write_bytes(bytes(data))


class Bomb:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, (f"import pathlib; pathlib.Path({str(self.mark)!r}).write_text('boom')",)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights truncated": (lambda f: truncate(f / file.WEIGHTS, 200), "digest differs"),
    "weights of 0 bytes": (lambda f: truncate(f / file.WEIGHTS, 0), "digest differs"),
    "self-check of 0 bytes": (lambda f: truncate(f / file.SELF_CHECK, 0), "digest differs"),
    "a bit of the weights flipped": (lambda f: flip_a_bit(f / file.WEIGHTS, -7), "digest differs"),
    "a bit of the self-check flipped": (lambda f: flip_a_bit(f / file.SELF_CHECK, -7), "digest differs"),
    "no weights": (lambda f: (f / file.WEIGHTS).unlink(), "lacks sae_weights.safetensors"),
    "no self-check": (lambda f: (f / file.SELF_CHECK).unlink(), "lacks self_check.safetensors"),
    "no cfg": (lambda f: (f / file.CONFIG).unlink(), "is not a saved SAE"),
    "cfg of 0 bytes": (lambda f: truncate(f / file.CONFIG, 0), "not readable JSON"),
    "cfg truncated": (lambda f: truncate(f / file.CONFIG, 90), "not readable JSON"),
    "cfg not text": (lambda f: (f / file.CONFIG).write_bytes(b"\xff\xfe\x00{"), "not readable JSON"),
    "cfg nested without end": (lambda f: (f / file.CONFIG).write_text("[" * 100_000), "not readable JSON"),
    "cfg a list": (lambda f: (f / file.CONFIG).write_text("[1, 2]"), "must hold a mapping"),
    "cfg of gigabytes": (lambda f: os.truncate(f / file.CONFIG, 1_500_000_000), "too large to be an SAE's"),
    "metadata that are a list": (lambda f: rewrite(f, lambda c: c.update(provenance=[1])), "must be a mapping"),
    "no digest of its own": (lambda f: rewrite(f, lambda c: c["sae"].update(bandwidth=1.0), digests=False), "altered"),
    "a width beyond memory without weights": (
        lambda f: (rewrite(f, lambda c: c["sae"].update(d_sae=200_000_000)), retensor(f, lambda t: t.pop("W_dec"))),
        "missing: W_dec",
    ),
    "a width beyond numbers": (lambda f: rewrite(f, lambda c: c["sae"].update(d_sae=1e30)), "no SAE has such sizes"),
    "groups beyond numbers": (
        lambda f: rewrite(f, lambda c: c["sae"].update(score="cosine_grouped", n_groups=1e30)), "n_groups must be",
    ),
    "an infinite prefix": (lambda f: rewrite(f, lambda c: c["sae"].update(prefixes=[math.inf])), "prefixes[0] must be"),
    "truth in text": (lambda f: rewrite(f, lambda c: c["sae"].update(norm_restoring="false")), "must be of type bool"),
    "a setting of the decoder": (
        lambda f: rewrite(f, lambda c: c["sae"].update(norm_restoring=True)), "no longer give their stored recon",
    ),
    "a decoder edited": (lambda f: retensor(f, lambda t: t["W_dec"].mul_(-1)), "no longer give their stored recon"),
    "ever so many probes": (
        lambda f: retensor(f, lambda t: t.update(x=torch.ones(10**5, 5)), file.SELF_CHECK), "does not fit the SAE",
    ),
    "another library's cfg": (
        lambda f: (f / file.CONFIG).write_text('{"architecture": "standard", "d_in": 5}'), "was not written by cosae",
    ),
    "a future version": (lambda f: rewrite(f, lambda c: c.update(version=file.VERSION + 1)), "upgrade cosae"),
    "a version of text": (lambda f: rewrite(f, lambda c: c.update(version="1.0")), "format version '1.0'"),
    "no version": (lambda f: rewrite(f, lambda c: c.pop("version")), "format version None"),
    "no sections": (lambda f: rewrite(f, lambda c: c.pop("sae")), "lacks its sections"),
    "digests missing": (lambda f: rewrite(f, lambda c: c.update(sha256={})), "digest differs"),
    "an unknown field": (lambda f: rewrite(f, lambda c: c["sae"].update(colour="red")), "colour"),
    "a field missing": (lambda f: rewrite(f, lambda c: c["sae"].pop("d_in")), "d_in"),
    "a field of another type": (lambda f: rewrite(f, lambda c: c["sae"].update(k="three")), "k must be of type int"),
    "an unknown score": (lambda f: rewrite(f, lambda c: c["sae"].update(score="dot")), "score must be one of"),
    "prefixes of null": (lambda f: rewrite(f, lambda c: c["sae"].update(prefixes=None)), "cfg.json"),
    "a bandwidth of text": (lambda f: rewrite(f, lambda c: c["sae"].update(bandwidth="wide")), "cfg.json"),
    "a width beyond memory": (lambda f: rewrite(f, lambda c: c["sae"].update(d_sae=10**13)), "must have shape"),
    "another width": (lambda f: rewrite(f, lambda c: c["sae"].update(d_in=6)), "must have shape"),
    "another score": (lambda f: rewrite(f, lambda c: c["sae"].update(score="inner")), "unknown: scale_a, scale_b"),
    "another selector": (lambda f: rewrite(f, lambda c: c["sae"].update(selector="gated")), "missing: b_gate, b_mag"),
    "a tensor missing": (lambda f: retensor(f, lambda t: t.pop("b_dec")), "missing: b_dec"),
    "a tensor too many": (lambda f: retensor(f, lambda t: t.update(b_pre=torch.zeros(5))), "unknown: b_pre"),
    "a tensor transposed": (
        lambda f: retensor(f, lambda t: t.update(W_enc=t["W_enc"].T.contiguous())), r"W_enc must have shape (5, 9)",
    ),
    "a decoder transposed": (
        lambda f: retensor(f, lambda t: t.update(W_dec=t["W_dec"].T.contiguous())), r"W_dec must have shape (9, 5)",
    ),
    "NaN in the weights": (lambda f: retensor(f, lambda t: t["W_enc"][2].fill_(math.nan)), "W_enc holds values"),
    "Inf in a bias": (lambda f: retensor(f, lambda t: t["b_enc"][2].fill_(math.inf)), "b_enc holds values that are"),
    "integers for weights": (lambda f: retensor(f, lambda t: t.update(b_dec=t["b_dec"].int())), "b_dec holds values"),
    "a weight edited": (lambda f: retensor(f, lambda t: t["W_enc"].mul_(-1)), "no longer give their stored codes"),
    "a threshold edited": (
        lambda f: retensor(f, lambda t: t["log_threshold"].sub_(5)), "no longer give their stored codes",
    ),
    "probes without values": (lambda f: retensor(f, lambda t: t.pop("value"), file.SELF_CHECK), "does not fit the SAE"),
    "probes with features far outside": (
        lambda f: retensor(f, lambda t: t["feature"].fill_(10**9), file.SELF_CHECK), "does not fit the SAE",
    ),
    "probes with negative tokens": (
        lambda f: retensor(f, lambda t: t["token"].fill_(-3), file.SELF_CHECK), "does not fit the SAE",
    ),
    "probes with fewer indices than values": (
        lambda f: retensor(f, lambda t: t.update(token=t["token"][:1]), file.SELF_CHECK), "does not fit the SAE",
    ),
    "probes of NaN": (lambda f: retensor(f, lambda t: t["x"].fill_(math.nan), file.SELF_CHECK), "does not fit the SAE"),
    "probe values of NaN": (
        lambda f: retensor(f, lambda t: t["value"].fill_(math.nan), file.SELF_CHECK), "no longer give",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [file.CONFIG, file.WEIGHTS])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))])
def test_no_flipped_bit_of_a_file_loads(seed: int, name: str, tmp_path: Path) -> None:
    path = save(make(), tmp_path / "sae")
    whole = (path / name).read_bytes()
    draw = random.Random(seed)
    for _ in range(100):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (path / name).write_bytes(data)
        sentence(path)


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_ends_in_one_sentence(what: str, tmp_path: Path) -> None:
    damage, words = DAMAGE[what]
    path = save(make(), tmp_path / "sae")
    load(path)
    damage(path)
    assert words in sentence(path)


def test_paths_that_are_no_sae(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    assert "does not exist" in sentence(tmp_path / "nowhere")
    assert "is not a saved SAE" in sentence(tmp_path / "empty")
    assert "is not a saved SAE" in sentence(tmp_path / "file")


@pytest.mark.parametrize("name", [file.WEIGHTS, file.SELF_CHECK])
def test_a_pickle_is_never_executed(name: str, tmp_path: Path) -> None:
    """Not where its digest fits either; and the payload is one that works."""
    path, mark = save(make(), tmp_path / "sae"), tmp_path / "mark"
    payload = pickle.dumps(Bomb(mark))
    pickle.loads(payload)
    assert mark.exists()
    mark.unlink()
    (path / name).write_bytes(payload)
    assert "digest differs" in sentence(path)
    rewrite(path, lambda config: None)
    assert "not opened" in sentence(path)
    torch.save({"W_enc": Bomb(mark)}, path / name)
    rewrite(path, lambda config: None)
    assert "not opened" in sentence(path)
    assert not mark.exists()


def test_another_saes_self_check(tmp_path: Path) -> None:
    """Of the same shape and of a larger one, with fitting digests."""
    path = save(make(), tmp_path / "sae")
    for other in (
        SAE.build(D, F, "cosine_per_feature", "jumprelu", 3, 5),
        SAE.build(D, 4 * F, k=3),
        SAE.build(2, F, k=3),
    ):
        donor = save(other, tmp_path / "other")
        (path / file.SELF_CHECK).write_bytes((donor / file.SELF_CHECK).read_bytes())
        rewrite(path, lambda config: None)
        assert any(words in sentence(path) for words in ("no longer give", "mixes two SAEs"))


def test_names_and_layouts_on_disk(tmp_path: Path) -> None:
    sae = make("cosine_base_delta", "gated")
    randomise(sae, 1)
    state = load_file(save(sae, tmp_path / "sae") / file.WEIGHTS)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), "b_gate": (F,), "b_mag": (F,), "r_mag": (F,),
        "scale_a": (F,), "scale_a_base": (), "scale_a_delta": (F,), "scale_b": (F,),
    }  # fmt: skip
    assert torch.equal(state["W_enc"].T, sae.score.rows_FD)
    assert torch.equal(state["scale_a"], sae.score.exponent_base + sae.score.exponent_delta_F)
    config = json.loads((tmp_path / "sae" / file.CONFIG).read_text())
    assert (config["format"], config["version"], config["d_in"], config["d_sae"]) == ("cosae-sae", 3, D, F)
    standard = SAE.build(D, F, "inner", k=3)
    standard.selector.threshold.fill_(0.5)
    config = json.loads((save(standard, tmp_path / "standard") / file.CONFIG).read_text())
    assert config["architecture"] == "jumprelu", "what SAELens calls a fixed threshold on the standard encoder"
    assert load_file(tmp_path / "standard" / file.WEIGHTS)["threshold"].tolist() == [0.5] * F


def test_probes_that_are_given_are_stored(tmp_path: Path) -> None:
    sae, x_BD = make(), torch.randn(20, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    probe = load_file(save(sae, tmp_path / "sae", x_BD) / file.SELF_CHECK)
    assert torch.equal(probe["x"], x_BD[:8].float())
    assert torch.equal(probe["x_hat"], sae(x_BD[:8]).detach())
    assert len(probe["value"]) > 0


@pytest.mark.parametrize("where", ["save_file", "fsync", "rename"])
def test_a_failed_save_keeps_the_old_sae(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = make(), make()
    randomise(new, 8)
    path = save(old, tmp_path / "sae")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "rename":
        rename = Path.rename

        def second_fails(self: Path, target: Path) -> Path:
            return rename(self, target) if ".old" in f"{self}{target}" else full()  # type: ignore[return-value]

        monkeypatch.setattr(Path, "rename", second_fails)
    else:
        monkeypatch.setattr(file if where == "save_file" else os, where, full)
    with pytest.raises(CosaeError, match=r"No space left on device.*is kept") as caught:
        save(new, path)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert raw_state(load(path)) == raw_state(old)
    assert names(tmp_path) == ["sae"], "no staged folder stays behind"
    save(new, path)
    assert raw_state(load(path)) == raw_state(new)
    assert names(tmp_path) == ["sae"]


def test_a_writer_that_runs_out_of_disk(tmp_path: Path) -> None:
    """safetensors has an error of its own for that, which is no OSError."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path = save(make(), tmp_path / "sae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "save_file", lambda tensors, target, metadata: save_file(tensors, "/dev/full", metadata))
        with pytest.raises(CosaeError, match="could not be written"):
            save(make(), path)
    load(path)


def test_foreign_folders_are_never_replaced(tmp_path: Path) -> None:
    """Not a file, not a folder of other things, not another library's SAE, not ours with the user's notes in it."""
    document, other, saelens = tmp_path / "file", tmp_path / "other", tmp_path / "saelens"
    document.write_text("mine")
    for folder, name in ((other, "thesis.tex"), (saelens, file.CONFIG)):
        folder.mkdir()
        (folder / name).write_text('{"architecture": "standard"}')
    (saelens / file.WEIGHTS).write_text("weights")
    ours = save(make(), tmp_path / "ours")
    (ours / "notes.md").write_text("what I found")
    for path in (document, other, saelens, ours):
        with pytest.raises(CosaeError, match="holds something that is not a cosae SAE"):
            save(make(), path)
    assert document.read_text() == "mine"
    assert (other / "thesis.tex").exists()
    assert (saelens / file.WEIGHTS).read_text() == "weights"
    assert (ours / "notes.md").exists()
    (tmp_path / "void").mkdir()
    load(save(make(), tmp_path / "void"))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CosaeError, match="cannot be written"):
        save(make(), tmp_path / "file" / "sae")


@pytest.mark.parametrize("fact", [math.nan, math.inf, {1, 2}, b"bytes", Path("x")])
def test_facts_that_json_cannot_hold(fact: object, tmp_path: Path) -> None:
    sae = make()
    old = save(sae, tmp_path / "sae")
    sae.metadata = {"fve": {"deep": fact}}
    with pytest.raises(CosaeError, match=r"sae\.metadata"):
        save(sae, old)
    assert load(old).metadata == {"site": "resid_post.3", "tokens": 1000}


def test_facts_may_hold_tensors(tmp_path: Path) -> None:
    sae = make()
    sae.metadata = {"quantiles": torch.tensor([1.0, 2.0]), "norm_summary": {"median_norm": 3.0}}
    assert load(save(sae, tmp_path / "sae")).metadata == {"quantiles": [1.0, 2.0], "norm_summary": {"median_norm": 3.0}}
