"""What holds for every test: hypothesis draws the same examples on every run, and waiting threads do not spin.

Spinning OpenMP threads take the core that another test process wants; the variable is read once, when torch loads.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import settings

settings.register_profile("cosae", derandomize=True, deadline=None)
settings.load_profile("cosae")
