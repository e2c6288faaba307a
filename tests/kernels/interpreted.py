"""Runs in its own process with TRITON_INTERPRET=1: values and gradients of programs, through a kernel, as JSON.

stdin: a list of ``[program, g, u, dh]``; stdout: a list of ``[h, dg, du]``.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl

from moepass.kernels.codegen import pointwise_functions


@triton.jit
def run(g_ptr, u_ptr, dh_ptr, out_ptr, N: tl.constexpr, VALUE: tl.constexpr, GRAD: tl.constexpr):
    at = tl.arange(0, N)
    g = tl.load(g_ptr + at)
    u = tl.load(u_ptr + at)
    dg, du = GRAD(g, u, tl.load(dh_ptr + at))
    tl.store(out_ptr + at, VALUE(g, u))
    tl.store(out_ptr + N + at, dg)
    tl.store(out_ptr + 2 * N + at, du)


def main() -> None:
    results = []
    for text, *given in json.load(sys.stdin):
        g, u, dh = (torch.tensor(values, dtype=torch.float32) for values in given)
        functions = pointwise_functions(text)
        out = torch.empty(3, g.numel())
        run[(1,)](g, u, dh, out, N=g.numel(), VALUE=functions.value, GRAD=functions.grad)
        results.append(out.tolist())
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
