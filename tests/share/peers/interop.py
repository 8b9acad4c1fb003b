"""docs/INTEROP.md from what the real packages say.

python tests/share/peers/interop.py SAELENS_PYTHON      (an environment with sae-lens and cosae)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "INTEROP.md"
HEAD = """# Differences against other libraries

Written by `tests/share/peers/interop.py` from the real packages: the largest difference over features and
reconstructions of 400 random inputs, relative to the largest value of the package's own answer. The other formats of
[interop.md](interop.md) are held to 1e-5 against their documented layout, worked out in float64, by
`tests/share/test_read.py`.

| format | package | direction | architecture | largest relative difference |
|---|---|---|---|---|
"""


def measure(python: str) -> dict[str, Any]:
    """What the checks print last."""
    done = subprocess.run(
        [python, str(HERE / "saelens_checks.py")], capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"| {r['format']} | {found['package']} | {r['direction']} | {r['architecture']} | {r['difference']:.1e} |"
        for r in found["rows"]
    ]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(measure(sys.argv[1])), encoding="utf-8")
    print(PAGE)
