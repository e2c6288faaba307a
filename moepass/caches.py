"""Where moepass keeps its caches: profiles, measurements, compiled CPU kernels.

``$MOEPASS_CACHE_DIR`` names the directory; the default is ``$XDG_CACHE_HOME/moepass`` or ``~/.cache/moepass``.
"""

from __future__ import annotations

import os
from pathlib import Path


def directory() -> Path:
    """The directory; it need not exist yet."""
    if own := os.environ.get("MOEPASS_CACHE_DIR"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moepass"
