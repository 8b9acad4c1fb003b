"""The README's figure and its run's differences, docs/demo.svg and demo.json: python docs/demo_figure.py runs/demo"""

import json
import sys
from pathlib import Path

from cosae.report.figures.svg import INK, WIDTH, Panel, drawing, label, marker, style_of, tag
from cosae.report.format import fixed
from cosae.report.read import read_runs
from cosae.report.verdict import claims

ARMS = ("standard", "standard_unit_frame", "cosine", "cosine_per_feature")
TITLES = {"natural": "activations as the model makes them", "injected": "each token's norm × a random factor (σ 0.5)"}

demo = Path(sys.argv[1])
looks = {arm: style_of(i) for i, arm in enumerate(ARMS)}
top, parts = 26, [tag("rect", width=WIDTH, height=310, fill="#fff")]
for i, (arm, style) in enumerate(looks.items()):
    parts += [marker(76 + 190 * i, 14, style, size=4.8), label(86 + 190 * i, 18, arm, colour=INK)]
records = read_runs([demo / name for name in TITLES])
for side, (record, title) in enumerate(zip(records, TITLES.values(), strict=True)):
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
here, run = Path(__file__).parent, records[0].run
which = f"seed {run.seed}, {run.hardware['processor']}, commit {(run.commit or 'unknown')[:12]}"
(here / "demo.svg").write_text(drawing(310, [picture], described, told=which) + "\n", encoding="utf-8")
differences = {
    f"{name}: {claim.measure}: {claim.arm}": [claim.difference, claim.low, claim.high]
    for name, record in zip(TITLES, records, strict=True)
    for claim in claims(record)
    if claim.counted
}
(here / "demo.json").write_text(
    json.dumps({"run": which, "differences": differences}, indent=1) + "\n", encoding="utf-8"
)
