"""Elementary functions that Triton's language lacks, on float32 blocks, accurate also near zero.

They use nothing outside ``triton.language``: libdevice is neither on AMD nor in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """The hyperbolic tangent: an odd series where |x| < 1/4, (1 - e)/(1 + e) with e = exp(-2|x|) elsewhere."""
    q = x * x
    tail = -0.3333333333333333 + q * (0.13333333333333333 + q * (-0.05396825396825397 + q * 0.021869488536155203))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(q < 0.0625, x + x * q * tail, tl.where(x < 0.0, -far, far))


@triton.jit
def expm1(x):
    """exp(x) - 1: a series where |x| < 1/4."""
    tail = 0.16666666666666666 + x * (0.041666666666666664 + x * (0.008333333333333333 + x * 0.001388888888888889))
    return tl.where(tl.abs(x) < 0.25, x + x * x * (0.5 + x * tail), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x): the rounding error of 1 + x is divided out (Goldberg 1991, theorem 4)."""
    w = 1.0 + x
    return tl.where((w == 1.0) | (w == float("inf")), x, tl.log(w) * (x / (w - 1.0)))
