"""Planting a fault: the source of one real function is edited while a test runs, whoever holds the function."""

from __future__ import annotations
import __future__

import inspect
import itertools
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest


def plant(patch: pytest.MonkeyPatch, function: Callable[..., Any], old: str, new: str) -> None:
    """Run ``function`` with ``old`` exchanged for ``new`` in its source, until ``patch`` is undone.

    The code object is exchanged, not the function: ops and importers that hold the function run the fault too.
    """
    function = inspect.unwrap(function)  # torch.no_grad and the like wrap it
    lines = textwrap.dedent(inspect.getsource(function)).splitlines(keepends=True)
    source = "".join(itertools.dropwhile(lambda line: line.startswith("@"), lines))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {function.__qualname__}"
    assert function.__closure__ is None, "a closure cannot be exchanged"
    made: dict[str, Any] = {}
    name, flags = f"<{function.__qualname__} with a fault>", __future__.annotations.compiler_flag
    code = compile(source.replace(old, new), name, "exec", flags)
    exec(code, vars(sys.modules[function.__module__]), made)
    patch.setattr(function, "__code__", made[function.__name__].__code__)
