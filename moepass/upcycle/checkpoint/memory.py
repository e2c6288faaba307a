"""Huge pages for the tensors that a conversion computes.

glibc maps every block above 32 MB afresh, so each temporary of a large matrix faults its pages in again, 4 KB at a
time: of ``(x.float() * 2).to(x.dtype)`` for 46 MB of bfloat16 that was five sixths of the time (16 results took 2.94 s,
with huge pages 0.86 s; two Zen 3 cores, torch 2.13.0).  torch asks for huge pages itself where this variable is set.
"""

from __future__ import annotations

import os

_VARIABLE = "THP_MEM_ALLOC_ENABLE"  # c10/core/impl/alloc_cpu.cpp


def use_huge_pages() -> None:
    """Ask torch to back large CPU tensors by transparent huge pages; for command lines, before their first tensor.

    torch reads the variable once, when it first allocates: later calls change nothing.  A value that the user has set
    stays.
    """
    os.environ.setdefault(_VARIABLE, "1")
