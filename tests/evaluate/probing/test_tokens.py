"""Probing with planted answers: what knows a concept must win, what knows nothing must stay at one half."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cosae.errors import CosaeError
from cosae.evaluate.probing import baselines, logistic, tokens
from cosae.evaluate.probing.tokens import probe
from cosae.io.progress import Progress
from cosae.io.signals import Stop
from cosae.text.concepts.labels import Concept
from cosae.types import Activations, Codes

N, M, D, F, C = 3000, 2000, 12, 30, 6
CONCEPTS = tuple(Concept(f"c{c}", f"concept {c}", "lexical" if c < 2 else "contextual") for c in range(C))


def side(n: int, seed: int) -> tuple[dict[str, Codes], Activations, np.ndarray]:
    """Tokens whose concept c is: latent c of "standard"; a whisper beside a shout in "loud"; noise in "random".

    Concept 0 is the token id's parity, concept 1 a short norm, concept 2 dimension 3 below zero; concept 3 a linear
    mixture of dimensions; the others chance.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)).astype(np.float32)
    token = rng.integers(0, 50, size=n).astype(np.int32)
    norm = np.linalg.norm(x, axis=1)
    label = rng.random((n, C)) < 0.15
    label[:, 0], label[:, 1], label[:, 2] = token % 2 == 0, norm < 3, x[:, 3] < -0.5
    label[:, 3] = x @ np.linspace(-1, 1, D) > 1
    codes = rng.exponential(size=(n, F)) * (rng.random((n, F)) < 0.2)
    standard, loud = codes.copy(), codes.copy()
    standard[:, :C] = label * rng.uniform(0.5, 1, size=(n, C))
    loud[:, :C] = 1e-3 * standard[:, :C]
    loud[:, C] = 1000 * (rng.random(n) < np.where(label.any(axis=1), 0.8, 0.2))
    activations = replace(Activations.bare(torch.from_numpy(x)), token_N=torch.from_numpy(token))
    arms = {"standard": standard, "loud": loud, "random": codes}
    return {k: Codes.from_dense(torch.from_numpy(v).float()) for k, v in arms.items()}, activations, label


def run(**changes: object) -> dict:
    (train, at, yt), (held_out, ah, yh) = side(N, 1), side(M, 2)
    given: dict = {"train": train, "held_out": held_out, "activations_train": at, "activations_held_out": ah}
    given |= {"labels_train_NC": yt, "labels_held_out_NC": yh, "concepts": CONCEPTS, "n_bootstrap": 200}
    random_arm = train.pop("random"), held_out.pop("random")
    return probe(**(given | {"random_arm": random_arm} | changes))


@pytest.fixture(scope="module")
def result() -> dict:
    return run()


def test_layout_is_plain_json_and_the_same_twice(result: dict) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert run() == result
    assert set(result) == {
        *("n_train", "n_held_out", "seed", "min_positives", "concepts", "arms", "baselines", "summary", "paired")
    }
    assert (result["n_train"], result["n_held_out"], result["min_positives"]) == (N, M, 200)
    assert set(result["baselines"]) == {"token_identity", "norm", "best_dimension", "logistic", "random_sae"}
    assert set(result["summary"]) == {"standard", "loud", *result["baselines"]}
    rows = [*result["baselines"].values(), *(row for arm in result["arms"].values() for row in arm.values())]
    assert all(len(column) == C for row in rows for column in row.values())


def test_concepts_are_described_with_their_counts(result: dict) -> None:
    train, held_out = side(N, 1)[2], side(M, 2)[2]
    assert result["concepts"][1] == {
        "name": "c1",
        "group": "lexical",
        "description": "concept 1",
        "positives_train": int(train[:, 1].sum()),
        "positives_held_out": int(held_out[:, 1].sum()),
    }


def test_planted_latents_are_found_and_perfect(result: dict) -> None:
    row = result["arms"]["standard"]["auroc"]
    assert row["latent"] == list(range(C))
    assert row["auroc"] == [1.0] * C
    assert row["average_precision"] == pytest.approx([1.0] * C)


def test_mean_difference_follows_the_loud_latent_and_auroc_does_not(result: dict) -> None:
    assert result["arms"]["loud"]["auroc"]["latent"] == list(range(C))
    assert result["arms"]["loud"]["mean_difference"]["latent"] == [C] * C
    assert max(result["arms"]["loud"]["mean_difference"]["auroc"]) < 0.9


def test_a_latent_against_the_concept_is_turned_by_its_sign() -> None:
    (_, at, yt), (_, ah, yh) = side(N, 1), side(M, 2)
    one, two = (Codes.from_dense(torch.from_numpy(~y[:, :1]).float()) for y in (yt, yh))
    out = probe(
        {"standard": one}, {"standard": two}, at, ah, yt[:, :1], yh[:, :1], CONCEPTS[:1], n_bootstrap=10
    )  # fmt: skip
    assert out["arms"]["standard"]["mean_difference"]["auroc"] == [1.0]
    assert out["arms"]["standard"]["auroc"]["auroc"] == [0.0]  # must fire FOR the concept, and none does
    assert "random_sae" not in out["baselines"]
    assert out["summary"]["standard"]["auroc"]["contextual"]["auroc"] == {"mean": None, "low": None, "high": None}
    assert out["paired"] == []


def test_a_signal_ends_ranking_between_two_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to stop while latents are weighed, in whatever thread: none is ranked any more."""
    progress, ranked, weigh = Progress(False), [], tokens.qualities_of_latents
    progress.stop = Stop(at_once=KeyboardInterrupt())

    def asked(*args: object) -> object:
        progress.stop.asked = True
        return weigh(*args)

    monkeypatch.setattr(tokens, "qualities_of_latents", asked)
    monkeypatch.setattr(tokens, "rank_quality_of_latents", lambda *args: ranked.append(args))
    with pytest.raises(KeyboardInterrupt):
        run(progress=progress)
    assert ranked == []


@pytest.mark.parametrize("tops", [(1,), (2,)])
def test_a_signal_ends_a_regression_in_its_next_iteration(tops: tuple[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On all dimensions (the ceiling), and on the first two latents."""
    progress, iterations, fit = Progress(False), [], logistic.fit
    progress.stop = Stop(at_once=KeyboardInterrupt())

    def counted(x: object, label: object, *, check: Callable[[], None], **named: object) -> object:
        def third() -> None:
            iterations.append(threading.get_ident())
            if iterations.count(threading.get_ident()) == 3:
                progress.stop.asked = True
            check()

        return fit(x, label, check=third, **named)

    monkeypatch.setattr(logistic, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        run(progress=progress, tops=tops)
    by_thread = [iterations.count(one) for one in set(iterations)]
    assert max(by_thread) <= 3, "no iteration after the one in which somebody asked"


def test_two_latents_know_what_neither_knows_alone() -> None:
    """Concept 0 is "latent 0 or latent 1"; a probe of two finds both, and is scikit-learn's regression on them."""
    (train, at, yt), (held_out, ah, yh) = side(N, 1), side(M, 2)
    for codes, label in ((train, yt), (held_out, yh)):
        dense = codes["standard"].to_dense().numpy().copy()
        half = np.random.default_rng(3).random(len(label)) < 0.5
        dense[:, 20], dense[:, 21] = dense[:, 0] * half, dense[:, 0] * ~half
        dense[:, 0] = 0
        codes["standard"] = Codes.from_dense(torch.from_numpy(dense))
    sides = (train, held_out, at, ah, yt, yh, CONCEPTS)
    found = probe(*sides, rules=("auroc", "mean_difference"), tops=(1, 2), n_bootstrap=50)["arms"]["standard"]
    assert list(found) == ["auroc", "auroc/top_2", "mean_difference", "mean_difference/top_2"]
    for rule in ("auroc", "mean_difference"):
        two = found[f"{rule}/top_2"]
        assert sorted(two["latent"][0]) == [20, 21]
        assert found[rule]["auroc"][0] < 0.8
        assert two["auroc"][0] == 1.0
        assert [latents[0] for latents in two["latent"]] == found[rule]["latent"]
    dense_t, dense_h = (one["standard"].to_dense().numpy()[:, two["latent"][4]] for one in (train, held_out))
    mean, scale = dense_t.mean(0), dense_t.std(0)
    theirs = (
        LogisticRegression(tol=1e-8).fit((dense_t - mean) / scale, yt[:, 4]).decision_function((dense_h - mean) / scale)
    )
    assert two["auroc"][4] == pytest.approx(roc_auc_score(yh[:, 4], theirs), abs=2e-3)
    with pytest.raises(CosaeError, match="tops must be counts"):
        probe(*sides, tops=(0,))


def test_each_baseline_knows_what_it_can_know(result: dict) -> None:
    area = {name: row["auroc"] for name, row in result["baselines"].items()}
    assert area["token_identity"][0] == 1.0
    assert area["norm"][1] == 1.0  # oriented on train: short norms speak for it
    assert area["best_dimension"][2] == 1.0  # negative side of dimension 3
    assert area["logistic"][3] > 0.99
    assert area["best_dimension"][3] < 0.9
    for name, row in area.items():
        assert row[4:] == pytest.approx([0.5, 0.5], abs=0.08), name


def test_permuted_labels_leave_nothing() -> None:
    rng = np.random.default_rng(0)
    yt, yh = side(N, 1)[2][rng.permutation(N)], side(M, 2)[2][rng.permutation(M)]
    out = run(labels_train_NC=yt, labels_held_out_NC=yh)
    for arm in ("standard", "loud"):
        for rule in ("auroc", "mean_difference"):
            interval = out["summary"][arm][rule]["all"]["auroc"]
            assert interval["low"] - 0.02 <= 0.5 <= interval["high"] + 0.02
            assert interval["mean"] == pytest.approx(0.5, abs=0.03)


def test_summary_and_pairs_are_means_over_the_group(result: dict) -> None:
    arms, rows = result["arms"], result["paired"]
    lexical = result["summary"]["loud"]["mean_difference"]["lexical"]["auroc"]
    assert lexical["mean"] == pytest.approx(np.mean(arms["loud"]["mean_difference"]["auroc"][:2]))
    assert lexical["low"] <= lexical["mean"] <= lexical["high"]
    assert len(rows) == 2 * 3 * 2
    assert {(row["arm"], row["versus"]) for row in rows} == {("loud", "standard")}
    [row] = [
        r
        for r in rows
        if (r["rule"], r["group"], r["metric"]) == ("mean_difference", "contextual", "average_precision")
    ]
    ours, theirs = (np.array(arms[a]["mean_difference"]["average_precision"][2:]) for a in ("loud", "standard"))
    assert row["difference"] == pytest.approx((ours - theirs).mean())
    assert (ours - theirs).min() <= row["low"] <= row["difference"] <= row["high"] <= (ours - theirs).max()


def test_pairs_of_equal_arms_are_zero_because_resamples_are_shared() -> None:
    (train, at, yt), (held_out, ah, yh) = side(N, 1), side(M, 2)
    twice = [{"standard": codes["loud"], "again": codes["loud"]} for codes in (train, held_out)]
    out = probe(*twice, at, ah, yt, yh, CONCEPTS, n_bootstrap=50)
    assert all((row["difference"], row["low"], row["high"]) == (0.0, 0.0, 0.0) for row in out["paired"])


def test_rare_concepts_are_dropped_on_either_side() -> None:
    yt, yh = side(N, 1)[2], side(M, 2)[2]
    yt[100:, 4] = False  # rare in train
    yh[100:, 5] = False  # rare in held-out
    out = run(labels_train_NC=yt, labels_held_out_NC=yh)
    assert [concept["name"] for concept in out["concepts"]] == ["c0", "c1", "c2", "c3"]
    assert out["arms"]["standard"]["auroc"]["latent"] == [0, 1, 2, 3]


def test_masks_keep_the_tokens_asked_for() -> None:
    """Half of the tokens is spoilt; with the mask the result is that of the other half alone."""
    (train, at, yt), (held_out, ah, yh) = side(N, 1), side(M, 2)
    keep_t, keep_h = np.arange(N) % 2 == 0, np.arange(M) % 2 == 0
    masked = run(labels_train_NC=yt ^ ~keep_t[:, None], labels_held_out_NC=yh, keep_train=keep_t, keep_held_out=keep_h)
    assert (masked["n_train"], masked["n_held_out"]) == (N // 2, M // 2)
    halves = [
        {arm: Codes.from_dense(codes.to_dense()[::2]) for arm, codes in s.items() if arm != "random"}
        for s in (train, held_out)
    ]
    alone = probe(*halves, at[::2], ah[::2], yt[::2], yh[::2], CONCEPTS, n_bootstrap=200)
    assert masked["arms"] == alone["arms"]
    assert masked["concepts"] == alone["concepts"]
    assert masked["baselines"]["logistic"] == alone["baselines"]["logistic"]


def test_token_identity_is_the_smoothed_frequency() -> None:
    def tokens(ids: list[int]) -> Activations:
        bare = Activations.bare(torch.ones(len(ids), 1))
        return replace(bare, token_N=torch.tensor(ids, dtype=torch.int32))

    label = np.array([[True], [True], [False], [False]])
    score = baselines.token_identity(tokens([7, 7, 7, 3]), label, tokens([3, 7, 5, 9, 1]))
    assert score[:, 0] == pytest.approx([(0 + 0.5) / 2, (2 + 0.5) / 4, 0.5, 0.5, 0.5])


def test_joint_logistic_regression_is_scikit_learns() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5))  # correlated
    x -= x.mean(axis=0)
    label = rng.random((400, 3)) < 1 / (1 + np.exp(-(x @ rng.normal(size=(5, 3)) - [0, 2, 4])))
    weight, bias = logistic.fit(x.astype(np.float32), label, l2=2.0)
    for c in range(3):
        other = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(x, label[:, c])
        np.testing.assert_allclose(weight[:, c], other.coef_[0], rtol=5e-3, atol=5e-3)
        np.testing.assert_allclose(bias[c], other.intercept_[0], rtol=5e-3, atol=5e-3)


def test_constant_dimensions_do_not_break_the_logistic_probe() -> None:
    (_, at, yt), (_, ah, _) = side(500, 1), side(300, 2)
    flat = [replace(a, x_ND=torch.cat([a.x_ND, torch.full((len(a), 1), 3.0)], dim=1)) for a in (at, ah)]
    with_flat = baselines.logistic(flat[0], yt, flat[1])
    np.testing.assert_allclose(with_flat, baselines.logistic(at, yt, ah), atol=1e-2)


def test_mistakes_get_one_sentence() -> None:
    (train, _, yt), (_, _, yh) = side(N, 1), side(M, 2)
    with pytest.raises(CosaeError, match="same arms"):
        run(train={"standard": train["standard"]})
    with pytest.raises(CosaeError, match="baseline_arm must be one of"):
        run(baseline_arm="cosine")
    with pytest.raises(CosaeError, match="name of a baseline"):
        probe({"norm": train["loud"]}, {"norm": train["loud"]}, *side(N, 1)[1:2] * 2, yt, yt, CONCEPTS)
    with pytest.raises(CosaeError, match="lower min_positives"):
        run(min_positives=N)
    with pytest.raises(CosaeError, match="column for each"):
        run(labels_train_NC=yt[:, :2])
    with pytest.raises(CosaeError, match="same tokens"):
        run(labels_held_out_NC=yh[:-1])
    with pytest.raises(CosaeError, match="one boolean"):
        run(keep_train=np.arange(10))
