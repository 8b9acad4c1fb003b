"""What holds for every test: hypothesis draws the same examples on every run, and processes leave each other the cores.

Beside other workers of pytest-xdist torch and BLAS run one thread each, in the processes that tests start too; waiting
OpenMP threads do not spin. The variables are read once, when the libraries load.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("cosae", derandomize=True, deadline=None)
settings.load_profile("cosae")
