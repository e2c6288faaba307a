"""JSON files in the user's cache directory: calibrated profiles and measurements.

Files appear by atomic rename.  A cache that cannot be read or written costs time, never correctness: it is logged as a
warning and the value is computed again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moepass.caches import directory as directory

log = logging.getLogger(__name__)


def read(name: str) -> dict[str, Any] | None:
    """The object stored under ``name``, or None where there is none or it is damaged (logged)."""
    path = directory() / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("ignoring the cache file %s: %s", path, error)
        return None
    if not isinstance(content, dict):
        log.warning("ignoring the cache file %s: it does not hold a JSON object", path)
        return None
    return content


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Have the file ``name`` to oneself among processes that ask for it too; where locks cannot be had, do without."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            directory().mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context((directory() / f".{name}.lock").open("w"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            log.debug("no lock on %s: %s", name, error)
        yield


def write(name: str, content: dict[str, Any]) -> Path | None:
    """Store ``content`` under ``name`` by atomic rename; None where the directory cannot be written (logged)."""
    path = directory() / name
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=name, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            temporary = file.name
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("could not write the cache file %s: %s", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return None
    return path
