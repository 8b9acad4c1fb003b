"""docs/CLAIMS.md from what the claims' folders hold: the paper's number, the audit's remark, our verdict, the command.

python -m studies            write the page from the numbers that are there
python -m studies --all      try every claim first
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from studies.real_model import claims

STUDIES = Path(__file__).parent
PAGE = STUDIES.parent / "docs" / "CLAIMS.md"
CLAIMS = (
    "matched_reconstruction",
    "learned_exponent",
    "concept_alignment",
    "norm_detectors",
    "reweighting",
    "score_swap",
    "selectors",
    "width_and_k",
    "layer_norm_side",
    "norm_shift",
    "two_exponents",
)
HEAD = """# The paper's claims, tried at our scale

arXiv 2606.15054 claims that cosine scoring learns features that match human concepts far more often at equal
reconstruction.

{real}

Each claim is tried on the embedded model (192 wide, block 5), on synthetic worlds or on both, with three seeds, paired
arms and intervals; the verdict is about those. A small model with tame norms is not Qwen3-8B: "cannot be seen at this
scale" is a possible answer, and "not supported" means no more than it says. "On a real model" is the pretrained one
above. "What an audit of its code remarks": our notes on the paper, by their section.

| | claim | the paper | what an audit of its code remarks | verdict here | our figures | on a real model | command |
|---|---|---|---|---|---|---|---|
"""
FOOT = """
A claim's command trains the runs that are not there yet, measures them and writes its RESULT.md, figure.svg and
numbers.json; `python -m studies --all` does so for all eleven, in some hours on two cores. Runs (three seeds a set) are
kept under `runs/studies/` by the digest of their recipe and are not part of the repository. `python -m studies` writes
this page again from the numbers that are there, in a second; tests/test_studies.py judges every verdict again from
numbers.json. Why a learned exponent ends where it does, without training:
[REASON.md](../studies/learned_exponent/REASON.md), `python -m studies.learned_exponent.reason`.
"""


def page() -> str:
    """The table, one row per claim that has numbers."""
    rows = []
    real = claims.numbers()
    on_real = claims.cells(real)
    for folder in CLAIMS:
        path = STUDIES / folder / "numbers.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        title = f"[{found['title']}](../studies/{folder}/RESULT.md)"
        cells = [
            f"({found['letter']})",
            title,
            found["paper"],
            found["audit"],
            f"**{found['verdict']}**",
            found["figures"],
            on_real.get(found["letter"], claims.UNTRIED),
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + f" | `{found['command']}` |")
    return HEAD.format(real=claims.paragraph(real)) + "\n".join(rows) + "\n" + FOOT


if __name__ == "__main__":
    if "--all" in sys.argv[1:]:
        for claim in CLAIMS:
            subprocess.run([sys.executable, "-m", f"studies.{claim}"], check=True, cwd=STUDIES.parent)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
