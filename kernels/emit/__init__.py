"""Emission: a plan's kernels as standalone, readable Python files (torch and triton only).

Partial evaluation of the library's kernels (``specialise``): constants folded, dead branches gone.  ``files`` writes a
file per step, ``compose`` the launcher that calls them in order, ``folder`` puts them on disk in one rename.
"""
