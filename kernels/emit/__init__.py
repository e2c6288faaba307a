"""Emission: a plan's kernels as standalone, readable Python files (torch and triton only).

``block``       a problem on a target -> all files: what callers ask for
``steps``       a program's launches as steps: which buffers each takes, makes and hands on
``specialise``  partial evaluation of the library's kernels, by ``fold`` (constants) and ``prune`` (what nobody reads);
                ``library`` reads their source, ``layout`` writes the result
``files``       a step -> a file;  ``compose``: the launcher that calls them in order
``plain``       what the files' self-checks compare with, ``torch_text`` the pointwise program in it
"""
