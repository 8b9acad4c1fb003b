"""The report: self-contained, escaped, honest in words, and in one sentence about whatever is missing or broken."""

import itertools
import json
import re
from html.parser import HTMLParser

import pytest

from cosae.cli import main
from cosae.errors import CosaeError
from cosae.io.escape import printable
from cosae.report.page import summary_table, write_report
from tests.support.fake_run import ARMS, write_run
from tests.support.feature_stores import write_store

HOSTILE = "<script>alert(1)</script> \"'&<b>"
TWO = {"standard": ("inner", "raw", None), "global": ("cosine", "raw", 0.3)}


class Reader(HTMLParser):
    """Collects elements with their attributes, and text; checks that elements nest."""

    VOID = ("meta", "br", "hr")

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def seen(self):
        return [tag for tag, _ in self.elements]

    @property
    def attributes(self):
        return [pair for _, attributes in self.elements for pair in attributes.items()]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    where = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(where / "natural", concepts=12),
        write_run(where / "injected", "injected", "injected: log_normal σ=1", concepts=12, seed=1),
    ]
    return runs, write_report(runs, where / "page.html").read_text()


def page_of(run, tmp_path):
    return Reader(write_report([run], tmp_path / "page.html").read_text()).text


def change(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def test_page_is_self_contained_and_well_formed(two_runs):
    _, page = two_runs
    reader = Reader(page)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(reader.seen)
    for name, value in reader.attributes:
        assert name not in ("src", "xlink:href", "onload", "onclick", "style")
        assert name != "href" or value.startswith("#")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_figures_have_finite_coordinates(two_runs):
    _, page = two_runs
    drawings = " ".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    assert drawings.count('role="img"') >= 2 * 12
    assert not re.search(r'="[^"]*\b(nan|inf|None)\b', drawings)


def check_structure(page):
    """What every page owes its readers, whatever they read it with."""
    reader = Reader(page)
    ids = [value for name, value in reader.attributes if name == "id"]
    targets = {value.removeprefix("#") for name, value in reader.attributes if name == "href"}
    assert len(ids) == len(set(ids))
    assert targets <= set(ids)
    sections = {a["id"] for tag, a in reader.elements if tag in ("section", "h3") and "id" in a}
    assert sections - {"answer"} <= targets
    levels = [int(tag[1]) for tag in reader.seen if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(deeper - level <= 1 for level, deeper in itertools.pairwise(levels))
    assert all(a.get("scope") in ("row", "col", "colgroup") for tag, a in reader.elements if tag == "th")
    tables = re.findall(r"<table>(.{10})", page, flags=re.S)
    assert all("<caption>" in table for table in tables)
    figures = re.findall(r'<svg [^>]*role="img"[^>]*>(.{7})', page)
    assert figures
    assert set(figures) == {"<title>"}
    assert len(re.findall(r"<svg", page)) == len(figures) + page.count('aria-hidden="true"')
    words = reader.text
    assert words.index("Answer") < words.index("Contents") < words.index("Glossary")
    return reader


def test_page_begins_with_the_answer_and_gives_every_section(two_runs):
    _, page = two_runs
    words = check_structure(page).text
    words = words[words.index("Run natural") :]
    headings = ("Norms of", "Summary", "Reconstruction by norm", "Learned exponents", "Sparse probing", "Provenance")
    places = [words.index(heading) for heading in headings]
    assert places == sorted(places)
    for fact in (
        "2.61 ×",
        "0.39 %",
        "drops position 0",
        "0.71",
        "4a1b89c0ffee",
        "9f2c1d0be71a55e3",
        "schedule.warmup",
        "seed 42",
    ):
        assert fact in words


def test_fve_never_stands_without_the_median_token(two_runs):
    _, page = two_runs
    for head in re.findall(r"<thead>(.*?)</thead>", page, flags=re.S):
        columns = re.findall(r"<th[^>]*>(.*?)</th>", head)
        if any(re.match(r"FVE($|,)", column) for column in columns):
            assert any("median token" in column for column in columns)


def test_everything_untrusted_is_escaped(tmp_path):
    run = write_run(tmp_path / "run", HOSTILE, HOSTILE, {HOSTILE: ("inner", "raw", None), **TWO}, concepts=8)
    change(run / "run.json", lambda value: value["recipe"].update({HOSTILE: HOSTILE}, odd="\ud800"))
    change(run / "run.json", lambda value: value["arms"]["global"].update(stopped=HOSTILE))
    change(run / "evaluation.json", lambda value: value["probing"]["sinks_out"]["concepts"][0].update(name=HOSTILE))
    page = write_report([run], tmp_path / "page.html").read_text()
    reader = Reader(page)
    assert "script" not in reader.seen
    assert HOSTILE not in page
    assert HOSTILE in reader.text


def test_a_few_features_are_shown_with_their_text(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO, concepts=0)
    hostile = {"before": HOSTILE, "token": "\n", "after": "\u202e\x1b"}
    change(run / "evaluation.json", lambda value: value["features"]["global"][0]["examples"][0].update(hostile))
    page = write_report([run], tmp_path / "page.html").read_text()
    reader = Reader(page)
    assert "script" not in reader.seen
    assert "1.23 %" in reader.text
    assert HOSTILE in reader.text
    assert "<mark>\\n</mark>\\u202e\\x1b" in page
    assert "<mark>return</mark> x + 1" in page
    assert "cosae browse run" in page
    assert str(tmp_path) not in page, "the page tells no folder of this machine"
    change(run / "evaluation.json", lambda value: value.update(features={}))
    assert "cosae browse" not in write_report([run], tmp_path / "page.html").read_text()


def test_explanations_of_a_run_s_features_are_shown_with_their_scores(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO, concepts=0)
    store = write_store(run / "features", 24, list(TWO))
    means = {"detection": {"value": 0.8125, "low": 0.7, "high": 0.9}, "shuffled": {"value": 0.52}, "fuzzing": None}
    (store / "explain.json").write_text(json.dumps({"saes": {"global": {"features": 4, **means}}}))
    page = write_report([run], tmp_path / "page.html").read_text()
    reader = Reader(page)
    assert "img" not in reader.seen
    assert "<img src=x onerror=alert(1)>" in reader.text
    assert "words that begin with 2" in reader.text
    assert "0.81" in reader.text
    assert "0.52" in reader.text
    assert "4 explained features of global" in reader.text
    (store / "sae0" / "explanations.json").write_text('{"record": {"features": 3}}')
    write_report([run], tmp_path / "page.html")  # what is of another shape is left out
    (store / "store.json").unlink()
    assert "explained feature" not in write_report([run], tmp_path / "page.html").read_text()


def test_names_cannot_turn_the_page_around(tmp_path):
    name = "\u202eevil\x1b\u2066"
    run = write_run(
        tmp_path / "run", name, arms={name: ("inner", "raw", None), "x": ("cosine", "raw", 0.3)}, concepts=4
    )
    change(run / "run.json", lambda value: value["recipe"].update({name: name}))
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "?evil??" in page
    assert not {"\u202e", "\x1b", "\u2066"} & set(page)


def test_names_cannot_steer_a_terminal(tmp_path):
    name = "\x1b[2Jarm\nx"
    run = write_run(tmp_path / "run", name, arms={name: ("inner", "raw", None), "global": ("cosine", "raw", 0.3)})
    change(run / "run.json", lambda value: value["arms"][name].update(stopped=name))
    words = summary_table([run])
    assert "\x1b" not in words
    assert "\nx" not in words


def test_names_in_errors_cannot_steer_a_terminal(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "\x1b[2J\x1b]8;;a.example\x07"), "--out", str(tmp_path / "x.html")])
    said = capsys.readouterr().err
    assert "a.example" in said
    assert said == printable(said, keep="\n")


def test_the_answer_stands_on_the_page_and_on_screen(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO, concepts=0, gain=0.0)
    said = "Reconstruction: no arm is told apart from another."
    assert said in page_of(run, tmp_path)
    assert said in summary_table([run])
    run = write_run(tmp_path / "worse", arms=TWO, concepts=0, gain=-0.02)
    words = page_of(run, tmp_path)
    assert "Reconstruction: standard is best." in words
    assert "−0.0200 −0.0230 to −0.0170 lower" in words
    assert "Bonferroni" in words


def test_warnings_of_a_run_stand_at_its_top_and_on_screen(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO, concepts=0)
    lost, sinks = "12 lines of metrics.jsonl <were> lost", "1.1 % of tokens are attention sinks"
    change(run / "run.json", lambda value: value.update(sinks=sinks, warnings=[lost, lost]))
    change(run / "run.json", lambda value: value.update(resumed=[{"step": 4, "warnings": ["one was damaged"]}]))
    change(run / "run.json", lambda value: value["warnings"].append({"kind": "late", "text": "of an event's shape"}))
    words = page_of(run, tmp_path)
    for said in (lost, sinks, "one was damaged", "of an event's shape"):
        assert words.count(said) == 1
        assert words.index("Answer") < words.index(said) < words.index("Contents")
        assert said in summary_table([run])


def test_where_the_numbers_come_from_is_one_table(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO)
    change(run / "run.json", lambda value: value["packages"].update(cosae="9.8.7"))
    words = page_of(run, tmp_path)
    facts = words[words.index("Provenance what value") :]
    for fact in (
        "cosae 9.8.7", "commit 4a1b89c0ffee4a1b89c0ffee", "torch 2.13.0", "transformers 4.57.1", "device cpu",
        "seed 42", "data: corpus digest 77ab01", "digest of the stream 9f2c1d0be71a55e3", "seconds of training 301",
    ):  # fmt: skip
        assert fact in facts
    assert re.search(r"digest of the recipe [0-9a-f]{64} ", facts)


def test_a_page_of_six_probed_arms_in_two_settings_is_small(two_runs, tmp_path):
    runs = [write_run(tmp_path / name, name, concepts=108) for name in ("natural", "injected")]
    page = write_report(runs, tmp_path / "page.html")
    assert page.stat().st_size < 500_000
    assert page.read_text().count("<details>") >= 8


def test_a_synthetic_world_shows_what_was_recovered(tmp_path):
    words = page_of(write_run(tmp_path / "run", arms=TWO, concepts=0, world=True), tmp_path)
    assert "Recovery of the known dictionary" in words
    assert "mcc 0.7000 0.7040" in words


def test_probing_is_shown_with_sinks_in_as_well(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO, concepts=6)
    assert "Probing with sinks in" in page_of(run, tmp_path)
    change(run / "evaluation.json", lambda value: value["probing"].update(sinks_in=None))
    assert "Probing with sinks in" not in page_of(run, tmp_path)


def test_a_run_without_probing_says_so(tmp_path):
    words = page_of(write_run(tmp_path / "run", concepts=0), tmp_path)
    assert "This run was not probed" in words


def test_an_unfinished_run_with_a_cut_line_still_gives_a_page(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "evaluation.json").unlink()
    change(run / "run.json", lambda value: value.update(status="running"))
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines + '{"step": 9999, "tok')
    words = page_of(run, tmp_path)
    assert "not finished (status: running)" in words
    assert "has not been evaluated" in words
    assert "2.6 ×" in words  # from the training window
    assert "FVE of the training batches" in words
    assert "has not been evaluated" in summary_table([run])


def test_stopped_and_moving_arms_are_named(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO)
    change(run / "run.json", lambda value: value["arms"]["standard"].update(stopped="loss became NaN at step 7"))
    change(run / "run.json", lambda value: value["arms"]["global"].update(a_moving=True, a_change=0.125))
    words = page_of(run, tmp_path)
    assert "The arm standard stopped before the end (loss became NaN at step 7)" in words
    assert "The exponent of global was still moving when the learning rate began to fall (+0.125 " in words
    assert "standard stopped before the end (loss became NaN" in summary_table([run])


def test_arms_on_different_streams_are_not_called_paired(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO)
    for arm, digest in (("standard", "9f2c1d0be71a55e3"), ("global", "other")):
        change(run / "run.json", lambda value, a=arm, d=digest: value["arms"][a].update(stream_digest=d))
    assert "did NOT all record the same stream (global" in page_of(run, tmp_path)
    change(run / "run.json", lambda value: value["arms"]["global"].update(stream_digest="9f2c1d0be71a55e3"))
    assert "All arms saw identical batches" in page_of(run, tmp_path)


def test_events_are_listed_and_the_rest_counted(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO, concepts=0)
    rows = [{"step": 10 * i, "arm": "global" if i else None, "text": f"loss <spike> {i}"} for i in range(43)]
    (run / "events.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = " ".join(page_of(run, tmp_path).split())
    assert "0 stream loss <spike> 0 10 global loss <spike> 1" in words
    assert "loss <spike> 39 … and 3 more in events.jsonl" in words


def test_a_run_without_arms_or_metrics(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO, concepts=0)
    (run / "metrics.jsonl").unlink()
    assert "The run logged no training metrics." in page_of(run, tmp_path)
    change(run / "run.json", lambda value: value.update(arms={}, filter={"policy": {"kind": "none"}}))
    words = page_of(run, tmp_path)
    assert "The run has no arms." in words
    assert "no filter" in words


@pytest.mark.parametrize("odd", [{}, [], None, "text", 7, {"a": None}])
def test_pieces_of_another_shape_are_left_out_rather_than_fatal(tmp_path, odd):
    run = write_run(tmp_path / "run", arms=TWO, concepts=4)
    for key in ("norms", "reconstruction", "paired_fve", "exponents", "recovery"):
        change(run / "evaluation.json", lambda value, k=key: value.update({k: odd}))
    for key in ("concepts", "arms", "baselines", "summary", "paired"):
        change(run / "evaluation.json", lambda value, k=key: value["probing"]["sinks_out"].update({k: odd}))
    for key in ("norm_summary", "filter", "source", "recipe", "packages", "hardware"):
        change(run / "run.json", lambda value, k=key: value.update({k: odd}))
    Reader(write_report([run], tmp_path / "page.html").read_text())
    summary_table([run])


def test_many_arms_and_long_names_get_looks_of_their_own(tmp_path):
    arms = {f"arm {i} {'long ' * 12}": ("cosine", "raw", 0.1) for i in range(20)}
    run = write_run(tmp_path / "run", arms=arms, concepts=6)
    Reader(write_report([run], tmp_path / "page.html").read_text())


def test_summary_table_lines_up_and_matches_the_page(two_runs):
    runs, page = two_runs
    tables = summary_table(runs).split("\n\n")
    assert len(tables) == 2
    lines = tables[0].splitlines()[1 : 2 + len(ARMS)]
    assert len({len(line) for line in lines}) == 1
    assert "0.8450" in lines[1]
    assert "0.8450" in page


def test_bad_paths_and_files_get_one_sentence(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO, concepts=0)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "page.html"
    with pytest.raises(CosaeError, match="at least one run"):
        write_report([], out)
    with pytest.raises(CosaeError, match="nothing at"):
        write_report([tmp_path / "absent"], out)
    with pytest.raises(CosaeError, match="a file at"):
        write_report([run / "run.json"], out)
    with pytest.raises(CosaeError, match=r"holds no run\.json"):
        summary_table([tmp_path / "empty"])
    with pytest.raises(CosaeError, match="is a directory"):
        write_report([run], tmp_path)
    with pytest.raises(CosaeError, match="cannot be written"):
        write_report([run], run / "run.json" / "page.html")
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{", "is damaged"),
        ("run.json", "[]", "must hold a JSON object"),
        ("run.json", '{"format": "other"}', "is not a cosae run"),
        ("run.json", '{"format": "cosae-run", "version": 3}', "has version 3"),
        ("run.json", b"\xff\xfe", "is damaged"),
        ("evaluation.json", "[" * 100_000, "is damaged"),
        ("metrics.jsonl", '{"step": 1}\nnot json\n{"step": 2}\n', "line 2"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    run = write_run(tmp_path / "run", arms=TWO, concepts=0)
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CosaeError, match=message):
        summary_table([run])


def test_an_older_page_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    run = write_run(tmp_path / "run", arms=TWO, concepts=0)
    out = tmp_path / "pages" / "page.html"
    write_report([run], out)
    out.write_text("old")
    assert write_report([run], out) == out
    assert out.read_text().startswith("<!doctype html>")
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
