"""For the whole suite: import the installed package, never the repository's folders.

``python -m pytest`` puts the working directory on ``sys.path``; there, ``kernels/`` would hide Hugging Face's package
of that name, which transformers looks for.  ``tests/kernels`` would do the same if ``tests/`` were on the path, so the
suite's helpers (``zoo.py``, ``tracing.py``) are found by a finder that knows files only, and ``benchmarks`` by name.

The suite neither reads nor writes the user's cache, and no test learns from another (``MOEPASS_LEARN``).

Hypothesis draws the same examples in every run, so that a red run is a red commit; ``HYPOTHESIS_PROFILE=explore`` draws
new ones, and more of them, to look for what nobody has seen yet.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
from hypothesis import settings

import moepass  # noqa: F401 -- found before the path shrinks, wherever it is installed

TESTS = Path(__file__).resolve().parent


class Helpers:
    """Finds ``tests/<name>.py`` for ``import <name>``, and the folder ``benchmarks``; last in line."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "benchmarks":
            found = ModuleSpec(name, None, is_package=True)
            found.submodule_search_locations = [str(TESTS.parent / name)]
            return found
        file = TESTS / f"{name}.py"
        return spec_from_file_location(name, file) if path is None and file.is_file() else None


sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != TESTS.parent]
sys.meta_path.append(Helpers)  # type: ignore[arg-type]

#: A folder of this process; workers of xdist inherit the environment of the one that starts them, and make their own.
OWN_CACHE: Path | None = None
if os.environ.get("MOEPASS_CACHE_DIR") == os.environ.get("MOEPASS_TESTS_CACHE"):
    OWN_CACHE = Path(tempfile.mkdtemp(prefix="moepass-tests-"))
    os.environ["MOEPASS_CACHE_DIR"] = os.environ["MOEPASS_TESTS_CACHE"] = str(OWN_CACHE)
    atexit.register(shutil.rmtree, OWN_CACHE, ignore_errors=True)
os.environ.setdefault("MOEPASS_LEARN", "0")

settings.register_profile("suite", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(autouse=True)
def no_profile_stays(monkeypatch) -> Iterator[None]:
    """What a test calibrates, asks torch for, or puts on ``sys.path``, is nothing to the next one."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", os.environ.get("THP_MEM_ALLOC_ENABLE", "0"))
    yield
    left = [] if OWN_CACHE is None else list(OWN_CACHE.glob("hardware-*.json"))
    for path in left:
        path.unlink()
    if left:
        from moepass.lowering.hardware import forget_default

        forget_default()
