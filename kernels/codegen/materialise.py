"""Generated source -> JIT functions that kernels take as constexpr arguments.

The text is kept in ``linecache``, where inspect, Triton and tracebacks find it: no file that another process or user
could change is ever executed.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from dataclasses import dataclass
from typing import Any

from moepass.kernels.codegen.derive import source


@dataclass(frozen=True)
class PointwiseFunctions:
    """The JIT functions of one program; see `pointwise_functions`.

    ``value``   ``value(g, u) -> h``
    ``grad``    ``grad(g, u, dh) -> (dg, du)``
    ``source``  the module they were made from
    """

    value: Any
    grad: Any
    source: str


def pointwise_functions(activation: str) -> PointwiseFunctions:
    """JIT functions on float32 blocks; a program of one input ignores ``u``, and its second gradient is zero.

    Equal sources are the same objects, so that a kernel is compiled once for them.  Needs triton.  Raises
    ``errors.BadActivation`` for a text outside the grammar of ``moepass.pointwise``.
    """
    return _from_source(source(activation))


@functools.lru_cache(maxsize=256)
def _from_source(text: str) -> PointwiseFunctions:
    name = f"moepass_pointwise_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    filename = f"<{name}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": name, "__file__": filename}
    exec(compile(text, filename, "exec"), namespace)
    return PointwiseFunctions(value=namespace["value"], grad=namespace["grad"], source=text)
