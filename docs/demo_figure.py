"""The README's figure, docs/demo.svg, from a demo's folder: python docs/demo_figure.py runs/demo"""

import sys
from pathlib import Path

from cosae.report.figures.svg import INK, WIDTH, Panel, drawing, label, marker, style_of, tag
from cosae.report.format import fixed
from cosae.report.read import read_runs

ARMS = ("standard", "standard_unit_frame", "cosine", "cosine_per_feature")
TITLES = {"natural": "activations as the model makes them", "injected": "each token's norm × a random factor (σ 0.5)"}

demo = Path(sys.argv[1])
looks = {arm: style_of(i) for i, arm in enumerate(ARMS)}
top, parts = 26, [tag("rect", width=WIDTH, height=310, fill="#fff")]
for i, (arm, style) in enumerate(looks.items()):
    parts += [marker(76 + 190 * i, 14, style, size=4.8), label(86 + 190 * i, 18, arm, colour=INK)]
for side, (record, title) in enumerate(zip(read_runs([demo / name for name in TITLES]), TITLES.values(), strict=True)):
    panel = Panel.at((70 + side * 510, top + 34, 440, 200), (-0.5, 3.5), (0.45, 0.92))
    ticks = list(enumerate(("shortest quarter", "second", "third", "longest quarter")))
    parts.append(panel.axes(title, y_label="" if side else "variance explained, median token", x_ticks=ticks))
    for i, arm in enumerate(ARMS):
        for q, quartile in enumerate(record.reconstruction(arm, "sinks_out").by_norm_quartile[:4]):
            value = quartile.median_token_fve
            assert value is not None
            parts.append(panel.mark(q, value, looks[arm], f"{arm}: {fixed(value, 3)}", 14 * (i - 1.5), 5.2))
parts.append(label(WIDTH / 2, top + 272, "tokens by the norm of their activation", "middle"))
described = "Variance explained of the median token by norm quartile, for four SAEs, without and with random norms"
picture = tag("g", *parts, font_family="Helvetica, Arial, sans-serif")
Path(__file__).with_name("demo.svg").write_text(drawing(310, [picture], described) + "\n", encoding="utf-8")
