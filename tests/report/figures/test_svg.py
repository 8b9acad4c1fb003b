"""Axes that a reader can trust: ticks told apart, ranges by the data, and the same marks however they are written."""

import re

import pytest

from cosae.report.figures.run import quartile_figure
from cosae.report.figures.svg import DARK, Panel, Scale, Style, bulk, marker, marks, padded, style_of, tick_texts
from cosae.report.read import read_run
from tests.support.fake_run import write_run


@pytest.mark.parametrize("value", [32.0, 0.0, 1e-6, 0.123, -5.5, 1234.5, 7.7e6])
def test_a_constant_curve_has_ticks_of_its_own_size(value):
    ticks = Scale(*padded([value, value]), 0.0, 100.0).ticks()
    texts = tick_texts(ticks)
    assert len(set(texts)) == len(ticks) >= 3
    assert min(ticks) <= value <= max(ticks)
    for text, tick in zip(texts, ticks, strict=True):
        assert float(text.replace("−", "-")) == pytest.approx(tick, rel=1e-6, abs=1e-12)


def test_ticks_are_written_as_short_as_tells_them_apart():
    assert tick_texts([0.0, 0.25, 0.5]) == ["0", "0.25", "0.5"]
    assert tick_texts([1.0, 100.0, 100000.0]) == ["1", "100", "1e5"]
    assert tick_texts([123450.0, 123460.0]) == ["1.2345e5", "1.2346e5"]
    assert tick_texts([-0.02, 0.0, 0.0004]) == ["−0.02", "0", "0.0004"]


def test_outliers_leave_the_scale_to_the_others():
    assert bulk([0.8, 0.81, 0.83, 0.84, -185.1]) == [0.8, 0.81, 0.83, 0.84]
    assert bulk([0.1, 0.5, 0.9, 0.2]) == [0.1, 0.5, 0.9, 0.2]
    assert bulk([-100.0, 0.8]) == [-100.0, 0.8]


def test_a_value_off_the_scale_is_written_beside_its_mark(tmp_path):
    run = read_run(write_run(tmp_path / "run", concepts=0))
    figure = quartile_figure(run, {arm: style_of(i) for i, arm in enumerate(run.arms)})
    out, within, *_ = figure.panels
    assert "off" not in re.findall(r"<text[^>]*>(.*?)</text>", out)
    assert within.count(">−185</text>") == 3  # of the three arms that score by inner product
    ticks = [float(t) for t in re.findall(r">(−?[\d.]+)</text>", within.split("off")[0].replace("−", "-"))]
    assert 0.6 < min(t for t in ticks if t < 2) < max(t for t in ticks if t < 2) < 0.9
    assert "standard 0.760, 0.770, 0.780, −185.100" in within  # for those who cannot see it


def test_many_marks_are_the_single_ones_in_one_path():
    for shape in ("circle", "square", "plus", "cross"):
        style = Style("#0072b2", shape)
        one, many = marker(5.0, 7.0, style, size=3.6), marks([(5.0, 7.0), (9.0, 7.0)], style)
        outline = re.search(r'd="(.*?)"', one)[1]
        assert re.search(r'd="(.*?)"', many)[1].startswith(outline)
    assert marks([], style) == ""


def test_a_line_does_not_drift():
    panel = Panel.at((0, 0, 100, 100), (0, 1), (0, 1))
    drawn = panel.line([i / 997 for i in range(998)], [0.0] * 998, style_of(0))
    steps = re.findall(r"l(-?[\d.]+)[ -]", drawn)
    assert sum(map(float, steps)) == pytest.approx(100, abs=0.05)


def _luminance(colour):
    colour = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_series_is_seen_on_a_light_and_a_dark_page():
    for i in range(8):
        for colour, paper in ((style_of(i).colour, "#fff"), (DARK[style_of(i).colour], DARK["#fff"])):
            dark, light = sorted((_luminance(colour), _luminance(paper)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5
