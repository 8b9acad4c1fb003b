"""What objects say of themselves, in Python and in a notebook: what is known, escaped, in one line."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import cosae
from cosae.models.embedded import load as load_embedded
from cosae.models.intervene.edits import ablate, steer
from cosae.sae.calibrate import measure_fve
from cosae.types import Codes
from tests.support.tiny_runs import recipe

EVIL = "<script>alert(1)</script>\x1b[31m\u202e\nnext"


class Cells(HTMLParser):
    """Tags of a page, and the text in its cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.cells += [""] if tag in ("td", "th") else []

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    small = recipe(**{"training.steps": 30})
    return cosae.fit(small, ["standard", "cosine,k=3"], out=tmp_path_factory.mktemp("runs") / "run", evaluate=False)


def test_an_sae_says_what_it_is_and_where_it_comes_from(run: Any) -> None:
    sae = run.saes["cosine-k=3"]
    said = repr(sae)
    for part in (
        "SAE(d_in=16, d_sae=48, score='cosine', selector='batch_topk', k=3, frame='raw'",
        "trained_on='1,920 tokens of a synthetic world'",
        f"l0={sae.metadata['l0_calibrated']:.3g}",
        f"fve={sae.metadata['fve']:.3g}",
        "sinks='left out: norms of at least 10 × the median'",
    ):
        assert part in said
    assert "\n" not in said
    cells = Cells(sae._repr_html_()).cells
    assert cells[cells.index("score") + 1] == "cosine"
    assert cells[cells.index("fve") + 1] == f"{sae.metadata['fve']:.3g}"


def test_the_fve_of_a_file_is_that_of_its_calibration_tokens(run: Any) -> None:
    for name, sae in run.saes.items():
        assert sae.metadata["fve"] == run.calibrations[name].fve
    x_ND = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) + 2
    by_hand = 1 - (x_ND - sae(x_ND).detach()).square().sum() / (x_ND - x_ND.mean(0)).square().sum()
    assert measure_fve(sae, x_ND, 300) == pytest.approx(float(by_hand), abs=1e-5)
    assert measure_fve(sae, torch.ones(4, 16)) is None


def test_a_fresh_sae_and_one_with_a_strangers_metadata() -> None:
    sae = cosae.SAE.build(8, 16, k=2, norm_restoring=True)
    assert repr(sae).endswith("k=2, frame='raw', norm_restoring=True, calibrated=False)")
    sae.metadata = {"model": EVIL, "site": 3, "tokens": "many", "filter": [1], "recipe": {"data": 1}, "fve": True}
    assert "\\x1b[31m\\u202e\\nnext" in repr(sae)
    assert all(c.isprintable() for c in repr(sae))
    assert "site" not in repr(sae)
    page = sae._repr_html_()
    assert Cells(page).tags == {"table", "caption", "tr", "th", "td"}
    assert "<script>" not in page
    sae.metadata = {"model": "m" * 10_000}
    assert len(repr(sae)) < 500


def test_codes_count_their_rows_features_and_entries() -> None:
    codes = Codes.from_dense(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]]))
    assert repr(codes) == "Codes(rows=2, features=3, active_entries=3, mean_l0=1.5)"
    assert "of_shape=[2, 1]" in repr(Codes.from_dense(torch.ones(2, 1, 3)))
    cells = Cells(codes._repr_html_()).cells
    assert cells[cells.index("mean_l0") + 1] == "1.5"


def test_a_recipe_says_what_differs_from_the_defaults() -> None:
    assert repr(cosae.Recipe()) == "Recipe()"
    changed = cosae.Recipe().changed({"training.steps": 9, "k": 4, "name": EVIL})
    assert repr(changed).endswith("next', k=4, training.steps=9)")
    assert "<script>" not in changed._repr_html_()
    arms = cosae.Recipe(arms=cosae.Recipe().arms[:1])
    assert repr(arms) == "Recipe(arms=['standard'])"


def test_a_run_says_what_came_out(run: Any) -> None:
    said = repr(run)
    assert said.startswith("Finished(name='small', saes=['standard', 'cosine-k=3'], tokens=1920")
    assert f"standard: {run.saes['standard'].metadata['l0_calibrated']:.3g}" in said
    assert str(run.out) in said
    cells = Cells(run._repr_html_()).cells
    row = cells.index("cosine-k=3")
    assert cells[row + 1 : row + 6] == ["cosine", "batch_topk", "raw", "48", "3"]


def test_a_splice_says_what_is_where_for_which_tokens(run: Any) -> None:
    model, _ = load_embedded()
    sae = cosae.SAE.build(192, 32, selector="topk", k=2)
    sae.metadata["filter"] = run.saes["standard"].metadata["filter"]
    edits = [ablate(7), steer([1, 2], 0.5, at=(3,), relative=True)]
    splice = cosae.spliced(model, {"resid_post.2": sae}, edits=edits, error_term=True)
    said = repr(splice)
    assert "tokens: all but norms of at least 10 × the median" in said
    assert "'SAE of 32 features'" in said
    assert "'error term kept', 'ablate 7', 'steer 1, 2 by 0.5 |x| at (3,)'" in said
    assert "open=False" in said
    with splice:
        assert "open=True" in repr(splice)
    assert "resid_post.2" in Cells(splice._repr_html_()).cells
    mask = torch.ones(1, 4, dtype=torch.bool)
    for tokens, word in (("sinks_out", "sinks_out"), ("all", "all"), (mask, r"a mask of shape (1, 4)")):
        assert f"tokens: {word}" in repr(cosae.spliced(model, {"resid_post.2": sae}, tokens=tokens))


def test_a_finished_run_is_read_from_its_folder(run: Any, tmp_path: Path) -> None:
    same = cosae.open_run(run.out)
    assert repr(same) == repr(run)
    assert {name: (c.l0, c.fve) for name, c in same.calibrations.items()} == {
        name: (c.l0, c.fve) for name, c in run.calibrations.items()
    }
    for name, sae in same.saes.items():
        assert torch.equal(sae.W_dec, run.saes[name].W_dec)
    with pytest.raises(cosae.CosaeError, match="holds no run"):
        cosae.open_run(tmp_path)
    record = (run.out / "run.json").read_text()
    (tmp_path / "run.json").write_text(record.replace('"finished"', '"interrupted"'))
    with pytest.raises(cosae.CosaeError, match="not finished"):
        cosae.open_run(tmp_path)
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(cosae.CosaeError, match="does not hold the SAEs"):
        cosae.open_run(tmp_path)
