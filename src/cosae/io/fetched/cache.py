"""The user's cache directory, where cosae keeps what can be made or brought again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """cosae/ in the user's cache directory, which XDG_CACHE_HOME names; it need not exist."""
    if sys.platform == "win32":
        folder = os.environ.get("LOCALAPPDATA") or str(Path.home())
    else:
        folder = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(folder) / "cosae"
