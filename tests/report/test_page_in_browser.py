"""Pages as a browser shows them: on a phone and a laptop, in light and in dark."""

import json
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from cosae.io.legacy import upgrade
from cosae.report.audit import write_audit_page
from cosae.report.page import write_report
from tests.support.fake_run import write_run
from tests.support.feature_stores import write_store

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0_1" / "audit" / "audit.json"
pytestmark = pytest.mark.browser

MEASURE = """
<!doctype html><body style="margin:0"><iframe src="PAGE" style="border:0;width:WIDTHpx;height:2000px"></iframe>
<pre id="found"></pre><script>
const frame = document.querySelector("iframe");
const parts = (css) => css.match(/[\\d.]+/g).map(Number);
function luminance(css) {
  const [r, g, b] = parts(css).slice(0, 3).map((v) => v / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll("details").forEach((one) => { one.open = true; });
  const background = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const css = view.getComputedStyle(at).backgroundColor;
      if ((parts(css)[3] ?? 1) > 0) return css;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = [], sizes = [], marks = [];
  for (const element of page.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const svg = element.closest("svg"), style = view.getComputedStyle(element);
    const drawn = svg && ["path", "rect"].includes(element.tagName);
    if (drawn && style.fill.startsWith("rgb(") && style.fillOpacity === "1") {
      const best = Math.max(...[style.fill, style.stroke].filter((css) => css.startsWith("rgb("))
        .map((css) => contrast(css, background(svg))));
      marks.push([best, element.outerHTML.slice(0, 80)]);
    }
    if (!own || ["title", "desc", "style"].includes(element.tagName)) continue;
    const ink = svg ? style.fill : style.color;
    texts.push([contrast(ink, background(element)), element.textContent.trim().slice(0, 40)]);
    if (svg) {
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      sizes.push([parseFloat(style.fontSize) * scale, element.textContent]);
    }
  }
  const least = (rows) => rows.reduce((a, b) => (a[0] <= b[0] ? a : b));
  document.getElementById("found").textContent = JSON.stringify({
    paper: view.getComputedStyle(page.body).backgroundColor, scroll: page.documentElement.scrollWidth,
    text: least(texts), size: least(sizes), mark: least(marks),
  });
};
</script>
"""


def measured(page, width, dark, folder):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    around = folder / "around.html"
    around.write_text(MEASURE.replace("PAGE", page.as_uri()).replace("WIDTH", str(width)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    options += ["--virtual-time-budget=20000", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    options += [f"--user-data-dir={folder / 'profile'}", around.as_uri()]
    done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(unescape(done.stdout.partition('<pre id="found">')[2].partition("</pre>")[0]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    where = tmp_path_factory.mktemp("pages")
    runs = [write_run(where / name, name, concepts=40) for name in ("natural", "injected")]
    long = {"standard": ("inner", "raw", None), "x" * 80: ("cosine", "raw", 0.3)}
    write_store(runs[0] / "features", 24, ["standard"])  # which has explanations
    return {
        "two runs": write_report(runs, where / "runs.html"),
        "long names": write_report([write_run(where / "long", "n" * 200, arms=long)], where / "long.html"),
        "audit": write_audit_page(upgrade(json.loads(FIXTURE.read_text())), where / "audit.html"),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 400, 1280])
@pytest.mark.parametrize("name", ["two runs", "long names", "audit"])
def test_pages_can_be_read(pages, name, width, dark, tmp_path):
    found = measured(pages[name], width, dark, tmp_path)
    assert (found["paper"] != "rgb(255, 255, 255)") == dark
    assert found["scroll"] <= width
    assert found["size"][0] >= (9 if width >= 400 else 8), found["size"]
    assert found["text"][0] >= 4.5, found["text"]
    assert found["mark"][0] >= 4.5, found["mark"]
