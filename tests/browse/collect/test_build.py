"""Feature stores against the library's own measurements and plain loops over dense codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cosae.activations.sample import Sample, SinkRule
from cosae.browse.collect import building as builds
from cosae.browse.collect import state as states
from cosae.browse.collect.build import build_store, planned_bytes
from cosae.browse.collect.building import BuildOptions, Listed
from cosae.browse.store.reader import FeatureStore, open_store
from cosae.errors import CosaeError
from cosae.evaluate.encoded import encode_sample
from cosae.evaluate.matching.match import match_saes
from cosae.evaluate.norms.counterfactual import at_median, lengths
from cosae.evaluate.norms.driven import norm_driven
from cosae.evaluate.probing.ranking import auroc_of_latents
from cosae.sae.calibrate import calibrate
from cosae.sae.model import SAE
from tests.support.chunk_sources import MadeUp, made_up_sae

NAMES = ("standard", "cosine/of <b>")


def saes_of(source: MadeUp) -> dict[str, SAE]:
    return {NAMES[0]: made_up_sae(source, "inner"), NAMES[1]: made_up_sae(source, "cosine", seed=1)}


def build(out: Path, source: MadeUp, saes: dict[str, SAE]) -> FeatureStore:
    listed = {name: Listed(sae, f"{name}") for name, sae in saes.items()}
    return open_store(build_store(out, source, listed, BuildOptions(window=12)))


@pytest.fixture(scope="module")
def source() -> MadeUp:
    return MadeUp()


@pytest.fixture(scope="module")
def saes(source: MadeUp) -> dict[str, SAE]:
    return saes_of(source)


@pytest.fixture(scope="module")
def store(source: MadeUp, saes: dict[str, SAE], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return build(tmp_path_factory.mktemp("built") / "store", source, saes)


def counted(source: MadeUp) -> np.ndarray:
    return source.id_N != 48


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_dense_codes(store: FeatureStore, source: MadeUp, saes: dict[str, SAE], name: str) -> None:
    with torch.no_grad():
        code_NF = saes[name].encode(source.x_ND).to_dense().double().numpy()[counted(source)]
    norm_N = source.x_ND.norm(dim=1).double().numpy()[counted(source)]
    cuts = store.overview().norms.cuts
    for row in store.table(name, "id", False, limit=100).rows:
        column, feature = code_NF[:, row.id], store.feature(name, row.id)
        fires = column != 0
        assert row.firings == fires.sum()
        if not fires.any():
            assert (row.largest, row.mean, row.norm_driven, feature.examples) == (None, None, None, ())
            continue
        assert row.density == pytest.approx(fires.mean())
        assert row.largest == pytest.approx(column.max(), rel=1e-6)
        assert row.mean == pytest.approx(column[fires].mean())
        assert row.firing_norm == pytest.approx(norm_N[fires].mean() / norm_N.mean(), rel=1e-6)
        exact = np.quantile(column[fires], [0.05, 0.25, 0.5, 0.75, 0.95], method="inverted_cdf")
        assert np.allclose(feature.quantiles, exact, rtol=0.0222)
        assert sum(feature.counts) == row.firings
        assert feature.edges[0] <= column[fires].min() * 1.0001
        assert feature.edges[-1] >= column.max() * 0.9999
        quartile = np.searchsorted(cuts, norm_N[fires])
        assert np.allclose(feature.quartile_share, np.bincount(quartile, minlength=4) / fires.sum())
    assert store.sae(name).dead == (code_NF != 0).any(0).size - (code_NF != 0).any(0).sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_what_they_say(store: FeatureStore, source: MadeUp, saes: dict[str, SAE], name: str) -> None:
    sae = saes[name]
    with torch.no_grad():
        code_NF = sae.encode(source.x_ND).to_dense().numpy()
    z_ND = source.x_ND - sae.centre_D.detach()
    row_FD = sae.score.rows_FD.detach()
    kappa_NF = (torch.nn.functional.normalize(z_ND, dim=1) @ torch.nn.functional.normalize(row_FD, dim=1).T).numpy()
    seen = set()
    for id in range(sae.d_sae):
        feature = store.feature(name, id)
        column = np.where(counted(source), code_NF[:, id], 0)
        largest_S = np.maximum.reduceat(column, source.start_S1[:-1])
        best = np.sort(largest_S[largest_S > 0])[::-1][:20]
        assert np.allclose([one.value for one in feature.group("top")], best)
        assert len({one.sequence for one in feature.group("top")}) == len(best)
        for one in feature.examples:
            start = source.start_S1[one.sequence] + one.position - one.at
            window = slice(start, start + len(one.ids_W))
            assert len(one.ids_W) == min(12, source.length_S[one.sequence])
            assert (one.ids_W == source.id_N[window]).all()
            assert (one.value_W == code_NF[window, id]).all()
            assert np.allclose(one.kappa_W, kappa_NF[window, id], atol=2e-5)
            assert np.allclose(one.r_W, z_ND[window].norm(dim=1), rtol=1e-5)
            assert (one.counted_W == counted(source)[window]).all()
            assert one.sink_W[0] or one.position > one.at
            assert one.document == f"document {one.sequence // 2}"
            seen.add(one.group)
            if one.interval is not None:
                assert feature.row.largest is not None
                assert one.interval < one.value / feature.row.largest * 5 <= one.interval + 1 + 1e-6
        shown = {(one.sequence, one.position) for one in feature.group("top")}
        for interval in range(5):
            low, high = (feature.row.largest or 0) * interval / 5, (feature.row.largest or 0) * (interval + 1) / 5
            there = np.flatnonzero((column > low) & (column <= high))
            sequence = np.searchsorted(source.start_S1, there, side="right") - 1
            left = {s for s, n in zip(sequence, there, strict=True) if (s, n - source.start_S1[s]) not in shown}
            drawn = [one for one in feature.group("interval") if one.interval == interval]
            assert len({one.sequence for one in drawn}) == len(drawn)
            assert len(drawn) == min(5, len(left)) or len(column.nonzero()[0]) > 20
    assert seen == {"top", "interval", "random"}


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_driven_share_is_the_library_s(
    store: FeatureStore, source: MadeUp, saes: dict[str, SAE], name: str
) -> None:
    sae = saes[name]
    sample = Sample.of(source.activations()[torch.from_numpy(counted(source))])
    encoded = encode_sample(sae, sample)
    info = store.sae(name)
    found = norm_driven(encoded, at_median(encoded, median_r=info.median_r))["sinks_in"]
    share_F = np.nan_to_num(found["per_feature"]["share"], nan=-1)
    mine_F = np.nan_to_num(store.columns(name)["norm_driven"], nan=-1)
    assert np.abs(share_F - mine_F).max() < 0.02  # a rounding at a threshold may move one firing
    assert info.norm_driven == pytest.approx(found["share"], abs=1e-3)
    everything = Sample.of(source.activations())
    assert info.median_r == pytest.approx(
        float(np.median(lengths(sae, everything.activations)[~everything.sink_N])), rel=1e-6
    )


def test_a_score_that_no_norm_enters_has_a_share_of_exactly_zero(tmp_path: Path, source: MadeUp) -> None:
    sae = made_up_sae(source, "cosine")
    sae.score.set_exponent(0.0)
    calibrate(sae, source.x_ND)
    share_F = build(tmp_path / "store", source, {"a": sae}).columns("a")["norm_driven"]
    assert set(share_F[np.isfinite(share_F)]) == {0.0}


def test_neighbours_and_matches_are_exact(store: FeatureStore, source: MadeUp, saes: dict[str, SAE]) -> None:
    overview = store.overview()
    rule = SinkRule(overview.norms.factor, overview.norms.median)
    sample = Sample.of(source.activations(), rule)
    keep_N = torch.from_numpy(counted(source)) & ~sample.sink_N
    assert overview.pair_tokens == int(keep_N.sum())
    passes = [encode_sample(sae, sample) for sae in saes.values()]
    found = match_saes(*passes, keep_N=keep_N, method="mutual")
    pairs = {int(a): (int(b), r, c) for a, b, r, c in zip(*vars(found.pairs).values(), strict=True)}
    for id in range(40):
        match = store.feature(NAMES[0], id).matches[0]
        expected = pairs.get(id)
        assert match.id == (None if expected is None else expected[0])
        if expected is not None:
            assert (match.correlation, match.cosine) == pytest.approx(expected[1:], abs=1e-6)
            assert store.feature(NAMES[1], expected[0]).matches[0].id == id
    pairing = overview.pairings[0]
    assert (pairing.alive_a, pairing.pairs, pairing.shared) == (
        len(found.alive_a), len(found.pairs), len(found.pairs.shared()),
    )  # fmt: skip
    fires_NF = passes[1].codes.take(keep_N).to_dense().numpy() != 0
    unit_FD = torch.nn.functional.normalize(saes[NAMES[1]].W_dec.detach(), dim=1).numpy()
    for id in range(39):
        both = (fires_NF & fires_NF[:, id : id + 1]).sum(0)
        either = (fires_NF | fires_NF[:, id : id + 1]).sum(0)
        jaccard = np.divide(both, either, out=np.zeros(40), where=either > 0)
        jaccard[id] = -1
        feature = store.feature(NAMES[1], id)
        best = np.sort(jaccard[jaccard > 0])[::-1][:8]
        assert np.allclose([one.jaccard for one in feature.by_cofiring], best)
        for one in (*feature.by_cofiring, *feature.by_cosine):
            assert one.jaccard == pytest.approx(jaccard[one.id])
            assert one.cosine == pytest.approx(unit_FD[id] @ unit_FD[one.id], abs=1e-5)
        cosine = unit_FD @ unit_FD[id]
        cosine[id] = -2
        assert [one.id for one in feature.by_cosine] == np.argsort(-cosine)[:8].tolist()


def test_aurocs_and_logits_are_those_of_the_library(store: FeatureStore, source: MadeUp, saes: dict[str, SAE]) -> None:
    rule = SinkRule(store.overview().norms.factor, store.overview().norms.median)
    sample = Sample.of(source.activations(), rule)
    keep_N = torch.from_numpy(counted(source)) & ~sample.sink_N
    codes = encode_sample(saes[NAMES[0]], sample).codes.take(keep_N)
    area_FC = auroc_of_latents(codes, source.labels_NC[keep_N.numpy()])
    for id in range(39):
        feature = store.feature(NAMES[0], id)
        expected = dict(zip((name for name, _ in source.concepts), area_FC[id], strict=True))
        assert dict(feature.aurocs) == pytest.approx(expected, abs=1e-6)
        assert feature.aurocs[0][0] == feature.row.concept
        logit_V = source.logits(saes[NAMES[0]].W_dec.detach())(slice(id, id + 1))[0]
        assert [value for _, value in feature.promoted] == pytest.approx(logit_V.topk(10).values.tolist())
        assert feature.suppressed[0][1] == pytest.approx(float(logit_V.min()))
    assert store.spell(7) == " w7"


def same(a: FeatureStore, b: FeatureStore, name: str) -> None:
    for id in range(40):
        x, y = a.feature(name, id), b.feature(name, id)
        assert [(e.group, e.interval, e.sequence, e.position) for e in x.examples] == [
            (e.group, e.interval, e.sequence, e.position) for e in y.examples
        ]
        assert (x.row.firings, x.counts, x.quartile_share) == (y.row.firings, y.counts, y.quartile_share)
        assert [one.id for one in x.matches] == [one.id for one in y.matches]
        assert all(np.allclose(p.value_W, q.value_W) for p, q in zip(x.examples, y.examples, strict=True))


def test_the_store_does_not_depend_on_how_tokens_are_cut(tmp_path: Path, source: MadeUp, store: FeatureStore) -> None:
    other = MadeUp(chunk_sequences=3)
    same(store, build(tmp_path / "store", other, saes_of(source)), NAMES[1])


def test_candidates_are_counted_beyond_the_sample(
    tmp_path: Path, source: MadeUp, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs chosen on a part of the tokens are counted on all of them: those that were chosen have the same numbers."""
    for module in (builds, states):
        monkeypatch.setattr(module, "SAMPLE_TOKENS", 700)
    found = build(tmp_path / "store", source, saes_of(source))
    for id in range(39):
        whole, part = (one.feature(NAMES[1], id) for one in (store, found))
        exact = {one.id: one.jaccard for one in whole.by_cofiring}
        assert all(exact.get(one.id, one.jaccard) == one.jaccard for one in part.by_cofiring)
        assert part.by_cosine == whole.by_cosine
        if part.matches[0].id == whole.matches[0].id is not None:
            assert part.matches[0].correlation == pytest.approx(whole.matches[0].correlation)


def test_a_pass_that_was_interrupted_goes_on_to_the_same_store(
    tmp_path: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(builds, "PROBE_TOKENS", 200)
    for module in (builds, states):
        monkeypatch.setattr(module, "SAMPLE_TOKENS", 1000)
    whole = build(tmp_path / "whole", MadeUp(), saes_of(MadeUp()))
    for stop in (2, 5, 7):
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "store", MadeUp(stop_after=stop), saes_of(MadeUp()))
        assert not (tmp_path / "store").exists()
    read: list[int] = []
    source = MadeUp()
    chunks = source.chunks
    source.chunks = lambda skip: (read.append(skip), chunks(skip))[1]  # type: ignore[method-assign]
    found = build(tmp_path / "store", source, saes_of(MadeUp()))
    assert read == [7]
    same(whole, found, NAMES[0])
    for name in ("features", "examples-0", "codes"):
        a, b = (one.folder / "sae1" / f"{name}.parquet" for one in (whole, found))
        assert a.read_bytes() == b.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "building" in path.name] == []


def test_a_checkpoint_of_another_build_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(builds, "PROBE_TOKENS", 200)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "store", MadeUp(stop_after=3), saes_of(MadeUp()))
    other = MadeUp(seed=1)
    found = build(tmp_path / "store", other, saes_of(other))
    same(found, build(tmp_path / "fresh", other, saes_of(other)), NAMES[0])


def test_signed_codes_have_a_negative_side(tmp_path: Path, source: MadeUp) -> None:
    sae = made_up_sae(source, "inner", "abs_topk")
    store = build(tmp_path / "store", source, {"signed": sae})
    with torch.no_grad():
        code_NF = sae.encode(source.x_ND).to_dense().numpy()
    for id in range(40):
        feature, column = store.feature("signed", id), np.where(counted(source), code_NF[:, id], 0)
        least = np.minimum.reduceat(column, source.start_S1[:-1])
        assert np.allclose([one.value for one in feature.group("negative")], np.sort(least[least < 0])[:10])
        if (column != 0).any():
            assert feature.negative == pytest.approx((column < 0).sum() / (column != 0).sum())
            assert feature.row.largest == pytest.approx(np.abs(column).max())


def test_what_cannot_be_built_is_refused(tmp_path: Path, source: MadeUp) -> None:
    uncalibrated = SAE.build(8, 16, "inner", "batch_topk", k=2)
    with pytest.raises(CosaeError, match="threshold"):
        build(tmp_path / "a", source, {"a": uncalibrated})
    other = SAE.build(9, 16, "inner", "topk", k=2)
    with pytest.raises(CosaeError, match="width"):
        build(tmp_path / "b", source, {"b": other})
    with pytest.raises(CosaeError, match="one width"):
        build(tmp_path / "c", source, {"b": other, "c": made_up_sae(source)})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("x")
    with pytest.raises(CosaeError, match="not empty"):
        build(tmp_path / "d", source, {"d": made_up_sae(source)})


def test_memory_is_told(source: MadeUp, saes: dict[str, SAE]) -> None:
    memory, disk = planned_bytes(saes, 48)
    assert 2000 < memory / 80 < 4500
    assert disk == 80 * 104 * (6 * 48 + 8)
