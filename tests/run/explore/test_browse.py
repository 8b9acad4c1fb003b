"""What `cosae browse` builds: a store of a run's SAEs on text, and on a store of activations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosae.browse.store.reader import FeatureStore, open_store
from cosae.errors import CosaeError
from cosae.io.progress import Progress
from cosae.models.embedded import load
from cosae.models.unembed import spelling
from cosae.recipe import DataConfig
from cosae.run.capture.request import Capture
from cosae.run.capture.stores import capture_stores
from cosae.run.explore.browse import prepare
from cosae.run.requests import BrowseRequest
from cosae.sae.calibrate import calibrate
from cosae.sae.file import load as load_sae
from cosae.sae.file import save
from cosae.sae.model import SAE

SITE = "resid_post.3"
TEXT = "def f(x):\n    return x + 1\n\nclass A:\n    def g(self, other):\n        return [self, other]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of Python files, some of it twice, and a run's folder with two SAEs that read the embedded model."""
    folder = tmp_path_factory.mktemp("browse")
    (folder / "corpus").mkdir()
    for i in range(8):
        (folder / "corpus" / f"{i}.py").write_text(TEXT.replace("f", f"f{i // 2}") * 4)
    model, tokenizer = load()
    ids = tokenizer(TEXT * 4, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :120]
    x_ND = model(ids, output_hidden_states=True).hidden_states[4][0]
    for name, seed in (("one", 0), ("two", 1)):
        sae = SAE.build(192, 64, "cosine", k=6, seed=seed, sample=x_ND)
        calibrate(sae, x_ND)
        sae.metadata = {"model": "embedded", "site": SITE}
        save(sae, folder / "run" / "arms" / name)
    return folder


def request(folder: Path, **more: object) -> BrowseRequest:
    return BrowseRequest(**{"corpus": str(folder / "corpus"), "context": 32, "tokens": 500, **more})  # type: ignore[arg-type]


def test_a_run_s_features_on_text(folder: Path) -> None:
    out = prepare([folder / "run"], request(folder))
    assert out == folder / "run" / "features"
    store = open_store(out)
    read = store.read
    assert [one.name for one in store.saes] == ["one", "two"]
    assert (read.model, read.site, read.context) == ("embedded", SITE, 32)
    model, tokenizer = load()
    unembedding_VD = model.get_output_embeddings().weight.float()
    sae = load_sae(folder / "run" / "arms" / "one")
    row = store.table("one", "largest").rows[0]
    feature = store.feature("one", row.id)
    logit_V = unembedding_VD @ sae.W_dec[row.id].detach()
    top = logit_V.topk(10)
    assert [id for id, _ in feature.promoted] == top.indices.tolist()
    assert [value for _, value in feature.promoted] == pytest.approx(top.values.tolist(), rel=1e-5)
    example = feature.group("top")[0]
    text = "".join(store.spell(int(token)) for token in example.ids_W)
    assert text == "".join(spelling(tokenizer, int(token)) for token in example.ids_W)
    assert example.document is not None
    assert example.document.endswith(".py")
    positions = [(one.document, one.sequence) for one in feature.group("top")]
    assert len({tuple(one.ids_W.tolist()) for one in feature.group("top")}) == len(positions)  # each text once
    ids = torch.from_numpy(example.ids_W.copy()).long()[None]
    assert example.position >= example.at
    if example.position == example.at:  # the window is the beginning of its sequence, which the model can read again
        x_TD = model(ids, output_hidden_states=True).hidden_states[4][0]
        assert float(sae.encode(x_TD).to_dense().detach()[example.at, row.id]) == pytest.approx(example.value, rel=1e-3)


def test_a_store_that_is_there_is_taken_and_another_one_made_again(folder: Path) -> None:
    first = prepare([folder / "run"], request(folder))
    stamp = (first / "store.json").stat().st_mtime_ns
    assert prepare([folder / "run"], request(folder)) == first
    assert prepare([first], request(folder)) == first
    assert (first / "store.json").stat().st_mtime_ns == stamp
    prepare([folder / "run"], request(folder, window=16))
    assert open_store(first).read.window == 16
    alone = prepare([folder / "run" / "arms" / "two"], request(folder))
    assert alone.name == "two.features"
    together = [replace(row, matched=0) for row in open_store(first).table("two").rows]
    assert list(open_store(alone).table("two").rows) == together


def test_labels_of_the_embedded_corpus(folder: Path, tmp_path: Path) -> None:
    out = prepare([folder / "run" / "arms" / "one"], BrowseRequest(tokens=3000, context=64), tmp_path / "out")
    store = open_store(out)
    assert len(store.concepts) > 60
    assert store.overview().labelled > 1000
    best = store.table("one", "auroc").rows[0]
    assert best.auroc is not None
    assert best.auroc > 0.8
    assert store.feature("one", best.id).aurocs[0] == (best.concept, pytest.approx(best.auroc))


def test_a_store_of_activations(folder: Path, tmp_path: Path) -> None:
    data = DataConfig(corpus=str(folder / "corpus"), site=SITE, context=32, held_out_frac=0.3)
    capture_stores(Capture(data, (SITE,), 300, 60, "float32"), tmp_path / "activations")
    asked = BrowseRequest(store=str(tmp_path / "activations"))
    store = open_store(prepare([folder / "run"], asked, tmp_path / "out"))
    assert (store.read.model, store.read.site, store.read.tokens) == ("embedded", SITE, 300)
    feature = store.feature("one", store.table("one", "largest").rows[0].id)
    _, tokenizer = load()
    assert feature.promoted
    for one in feature.group("top"):
        assert one.document is not None
        assert one.document.endswith(".py")
        assert len(one.ids_W) == (32 if one.sequence < 9 else 12)  # 300 tokens
        assert store.spell(int(one.ids_W[one.at])) == spelling(tokenizer, int(one.ids_W[one.at]))


def test_what_cannot_be_shown_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CosaeError, match="context has no say"):
        prepare([folder / "run"], BrowseRequest(store="x", context=8))
    sae = load_sae(folder / "run" / "arms" / "one")
    sae.metadata = {"model": "embedded", "site": "resid_post.2"}
    save(sae, tmp_path / "other")
    with pytest.raises(CosaeError, match="one site"):
        prepare([folder / "run" / "arms" / "one", tmp_path / "other"], request(folder))
    with pytest.raises(CosaeError, match="already"):
        prepare([prepare([folder / "run"], request(folder))], request(folder), rebuild=True)


def test_norms_are_perturbed_as_asked(folder: Path, tmp_path: Path) -> None:
    sae = load_sae(folder / "run" / "arms" / "one")
    sae.metadata |= {"perturbation": {"kind": "log_normal", "sigma": 0.5}}
    save(sae, tmp_path / "one")
    said: list[str] = []
    progress = Progress(False)
    progress.note = said.append  # type: ignore[method-assign]
    natural = open_store(prepare([tmp_path / "one"], request(folder), tmp_path / "natural", progress=progress))
    assert any("--inject log_normal:sigma=0.5" in line for line in said)
    said.clear()
    asked = request(folder, inject="log_normal:sigma=0.5")
    perturbed = open_store(prepare([tmp_path / "one"], asked, tmp_path / "perturbed", progress=progress))
    assert not any("--inject" in line for line in said)

    def spread(store: FeatureStore) -> float:
        _, _, _, low, _, high, *_ = store.overview().norms.quantiles
        return high / low

    assert spread(perturbed) > 1.3 * spread(natural)
    with pytest.raises(CosaeError, match="perturbation"):
        prepare([tmp_path / "one"], request(folder, inject="loud"))
