"""An audit's page and its answers on screen: the numbers that audit.json holds, and nothing in it is obeyed."""

import json
from pathlib import Path

import pytest

from cosae.io.legacy import upgrade
from cosae.report.audit import audit_text, write_audit_page
from tests.report.test_page import Reader, check_structure

FILE = Path(__file__).parents[1] / "fixtures" / "v0_1" / "audit" / "audit.json"


@pytest.fixture
def result():
    return upgrade(json.loads(FILE.read_text()))


def page_of(result, tmp_path):
    return write_audit_page(result, tmp_path / "audit.html").read_text()


def test_the_page_shows_verdict_answers_and_figures(result, tmp_path):
    page = page_of(result, tmp_path)
    words = check_structure(page).text
    assert "Fooled by norm: yes. 27.1 % of its firings" in words
    assert "inner × batch_topk, frame raw, 16 features, k 3 · 400 tokens of activations.npy" in words
    for line in result["saes"][0]["lines"]:
        assert line["sentence"] in words
        assert line["evidence"] in words
    assert page.count("<svg") == 3
    assert "no tokens known" in words


def test_several_saes_stand_side_by_side(result, tmp_path):
    result["saes"].append({**result["saes"][0], "name": "other", "source": {"model": "m", "site": "s", "corpus": "c"}})
    words = check_structure(page_of(result, tmp_path)).text
    assert "inner_batch_topk yes 27.1 % 0.121 0.327 4.7 2.83" in words
    assert "400 tokens of m, s, c" in words


def test_an_invariant_sae_has_no_histogram_of_shares(result, tmp_path):
    result["saes"][0]["norm_driven"]["invariant"] = True
    assert page_of(result, tmp_path).count("<svg") == 2


def test_everything_is_escaped(result, tmp_path):
    one = result["saes"][0]
    one.update(name="<script>alert(1)</script>", warning="a & <b>", source={"model": "<i>m"})
    one["sinks"]["spelled"] = [["<img src=x>", 3, 5], [None, 7, 1]]
    page = page_of(result, tmp_path)
    reader = Reader(page)
    assert not {"script", "img", "i"} & set(reader.seen)
    assert "A & <b>." in reader.text
    assert "'<img src=x>'" in reader.text
    assert "id 7" in reader.text


def test_the_answers_on_screen(result):
    lines = audit_text(result).split("\n")
    assert lines[0] == "inner_batch_topk: inner × batch_topk, frame raw, 16 features, k 3"
    assert lines[1].startswith("fooled by norm: yes: 27.1 %")
    marked = [line.split("  ")[1] for line in lines if line.startswith("!")]
    assert marked == [line["topic"] for line in result["saes"][0]["lines"] if line["level"] == "look"]


@pytest.mark.parametrize("odd", [None, [], {}, "text", 7])
def test_pieces_of_another_shape_are_left_out(result, tmp_path, odd):
    for key in ("sae", "source", "verdict", "lines", "reconstruction", "norm_driven", "sinks", "tokens", "name"):
        result["saes"][0][key] = odd
    page_of(result, tmp_path)
    audit_text(result)
