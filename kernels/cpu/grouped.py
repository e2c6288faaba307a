"""The C++ grouped GEMM on tensors: when it is the right one, and its calls.

``linear``  every expert's rows times its weight, with bias      ``outer``  the gradient of that weight
``sort``    the rows by expert
Contract of the products: CPU tensors; weights, bias and results float32 or bfloat16 alike; sums in float32.
``linear`` makes rows of nobody zero: those behind the offsets' end, or those whose expert is not one.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from moepass import _compat
from moepass.kernels import host
from moepass.kernels.cpu import build

log = logging.getLogger("moepass")

#: Rows per expert up to which the C++ is used where the library has better instructions than float32's: native bfloat16
#: (a product then runs at several times the rate), and AVX-512 (not measured: packing is paid for by then).
MOST_NATIVE_BF16, MOST_AVX512 = 16, 128
#: Rows that the C++ packs together, at most (its STRIP with AVX-512): what its buffers are rounded up to.
STRIP = 32
#: Rows of an expert that are not packed so, at most (its DOTS with AVX-512), and what keeps each apart from the next.
DOTS, SPREAD = 12, 256
#: An expert with fewer rows is never packed (one more than its DOTS with AVX2).
PACKED_FROM = 10
#: No limit.
ANY = 1 << 62


def takes(dtype: torch.dtype) -> bool:
    """Whether the library is there, right on this machine, and made for this dtype."""
    return dtype in (torch.float32, torch.bfloat16) and _proved()


@functools.cache
def _proved() -> bool:
    """The library's results beside PyTorch's, once a process: compilers and processors differ (a millisecond)."""
    if build.load() is None:
        return False
    with ThreadPoolExecutor(1) as clean:  # a trace may be under way here: its modes belong to this thread alone
        right = {dtype: clean.submit(_is_right, dtype).result() for dtype in (torch.float32, torch.bfloat16)}
    wrong = [str(dtype) for dtype, good in right.items() if not good]
    if wrong:
        log.warning("moepass's C++ products are wrong here (%s) and are not used: please report it", ", ".join(wrong))
    return not wrong


def _is_right(dtype: torch.dtype) -> bool:
    """Both layouts of the weight, and the outer product, with tails everywhere; whole numbers: sums are exact."""
    counts, (E, N, K) = (0, 1, 9, 37), (4, 101, 75)
    offsets_E = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x_RK, w_ENK = _whole((sum(counts), K), dtype), _whole((E, N, K), dtype)
    experts = [slice(int(end) - count, int(end)) for end, count in zip(offsets_E, counts, strict=True)]
    truth_RN = torch.cat([x_RK[rows].float() @ w.float().t() for rows, w in zip(experts, w_ENK, strict=True)]).to(dtype)
    by_row, by_column, dw_ENK = torch.empty_like(truth_RN), torch.empty_like(truth_RN), torch.empty_like(w_ENK)
    linear(x_RK, w_ENK, None, by_row, offsets_E=offsets_E)
    linear(x_RK, w_ENK.transpose(1, 2).contiguous().transpose(1, 2), None, by_column, offsets_E=offsets_E)
    dy_RN = _whole((sum(counts), N), dtype)
    outer(dy_RN, x_RK, offsets_E, dw_ENK)
    gradient_ENK = torch.stack([dy_RN[rows].float().t() @ x_RK[rows].float() for rows in experts]).to(dtype)
    pairs = ((by_row, truth_RN), (by_column, truth_RN), (dw_ENK, gradient_ENK))
    return all(torch.equal(ours, truth) for ours, truth in pairs)


def _whole(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """-3, -2, ... 3, in an order without a pattern; torch's own random state is left alone."""
    count = torch.arange(torch.Size(shape).numel())
    return ((count * 2654435761 % 1000003) % 7 - 3).view(shape).to(dtype)


def most_rows(dtype: torch.dtype) -> int:
    """Rows per expert up to which this beats PyTorch's product (measured on AVX2: always; docs/benchmarks.md)."""
    if dtype == torch.bfloat16 and _compat.cpu_has_bf16_products():
        return MOST_NATIVE_BF16
    return MOST_AVX512 if torch.backends.cpu.get_cpu_capability() == "AVX512" and dtype == torch.float32 else ANY


def agree(x_RK: Tensor, w_ENK: Tensor, b_EN: Tensor | None) -> bool:
    """Whether dtypes and widths go together."""
    E, N, K = w_ENK.shape
    rows = x_RK.dtype == w_ENK.dtype and x_RK.shape[1] == K
    return rows and (b_EN is None or (b_EN.dtype == w_ENK.dtype and b_EN.shape == (E, N)))


def fits(x_RK: Tensor, w_ENK: Tensor, b_EN: Tensor | None) -> bool:
    """Whether ``linear`` reads these as they stand: the weight contiguous along one of its two dimensions.

    C++ reads memory as it is told to: dtypes and widths that differ are left to PyTorch, which says what is wrong.
    """
    return agree(x_RK, w_ENK, b_EN) and takes(w_ENK.dtype) and 1 in w_ENK.stride()[-2:]


def fits_outer(dy_RN: Tensor, x_RK: Tensor) -> bool:
    """Whether ``outer`` reads these."""
    return dy_RN.dtype == x_RK.dtype and takes(x_RK.dtype)


def _fields(names: str) -> list[Any]:
    """Fields of a C struct: ``*name`` is a pointer, any other a 64-bit integer."""
    return [(n.lstrip("*"), ctypes.c_void_p if n[0] == "*" else ctypes.c_int64) for n in names.split()]


class _Linear(ctypes.Structure):
    _fields_ = _fields(
        "*x ldx *take per *packed room *w w_expert w_row w_col *bias *y ldy *offsets *experts R E N K most threads "
        "is_bf16"
    )


class _Outer(ctypes.Structure):
    _fields_ = _fields("*dy ldy *x ldx *take per *packed *dw *offsets E N K most threads is_bf16")


class _Sort(ctypes.Structure):
    _fields_ = _fields("*experts is_int32 R E *order *inverse *offsets")


def linear(
    x_RK: Tensor,
    w_ENK: Tensor,
    b_EN: Tensor | None,
    y_RN: Tensor,
    *,
    offsets_E: Tensor | None = None,
    expert_R: Tensor | None = None,
    order_R: Tensor | None = None,
    per: int = 1,
    most: int = ANY,
) -> None:
    """``y[r] = x[r] @ w[e].T (+ b[e])``, e by ``offsets_E`` (int32 ends of sorted rows) or ``expert_R`` (int64).

    With ``order_R`` (int64), ``x[order[r] // per]`` instead of ``x[r]``.  Experts with more than ``most`` rows are left
    out.
    """
    x_RK = _rows(x_RK)
    b_EN, offsets_E, expert_R, order_R = (
        None if t is None else t.contiguous() for t in (b_EN, offsets_E, expert_R, order_R)
    )
    (E, N, K), R = w_ENK.shape, y_RN.shape[0]
    apart = R if expert_R is not None else min(R, DOTS * E)
    packed = host.empty(((R + STRIP * min(E, R // PACKED_FROM)) * K + SPREAD * apart,), torch.float32)
    task = _Linear(
        x=x_RK.data_ptr(), ldx=x_RK.stride(0), take=_address(order_R), per=per,
        packed=packed.data_ptr(), room=packed.numel(),
        w=w_ENK.data_ptr(), w_expert=w_ENK.stride(0), w_row=w_ENK.stride(1), w_col=w_ENK.stride(2),
        bias=_address(b_EN), y=y_RN.data_ptr(), ldy=y_RN.stride(0),
        offsets=_address(offsets_E), experts=_address(expert_R), R=R, E=E, N=N, K=K, most=most,
        threads=torch.get_num_threads(), is_bf16=w_ENK.dtype == torch.bfloat16,
    )  # fmt: skip
    if not _library().moepass_linear(ctypes.byref(task)):
        raise RuntimeError(f"{packed.numel()} floats are too few for {R} rows of {E} experts: a bug of moepass")


def sorts(index_TK: Tensor) -> bool:
    """Whether ``sort`` takes these; a library whose products are wrong sorts nothing either."""
    return index_TK.dtype in (torch.int64, torch.int32) and takes(torch.float32)


def sort(index_TK: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(order_R, inverse_R, offsets_E)`` as ``kernels.sorting`` defines them; ask ``sorts`` first."""
    index_TK = index_TK.contiguous()
    R = index_TK.numel()
    order_R, inverse_R = torch.empty(R, dtype=torch.int64), torch.empty(R, dtype=torch.int64)
    offsets_E = torch.empty(E, dtype=torch.int32)
    task = _Sort(
        experts=index_TK.data_ptr(), is_int32=index_TK.dtype == torch.int32, R=R, E=E,
        order=order_R.data_ptr(), inverse=inverse_R.data_ptr(), offsets=offsets_E.data_ptr(),
    )  # fmt: skip
    _library().moepass_sort(ctypes.byref(task))
    return order_R, inverse_R, offsets_E


def outer(
    dy_RN: Tensor,
    x_RK: Tensor,
    offsets_E: Tensor,
    dw_ENK: Tensor,
    *,
    order_R: Tensor | None = None,
    per: int = 1,
    most: int = ANY,
) -> None:
    """``dw[e] = dy[rows of e].T @ x[rows of e]``, zero where an expert has none; ``dw`` contiguous.

    ``order_R``, ``per`` and ``most`` as for ``linear``.
    """
    dy_RN, x_RK, offsets_E = _rows(dy_RN), _rows(x_RK), offsets_E.contiguous()
    order_R = None if order_R is None else order_R.contiguous()
    E, N, K = dw_ENK.shape
    packed = host.empty((dy_RN.shape[0] * (-(-K // STRIP) * STRIP),), torch.float32)
    task = _Outer(
        dy=dy_RN.data_ptr(), ldy=dy_RN.stride(0), x=x_RK.data_ptr(), ldx=x_RK.stride(0),
        take=_address(order_R), per=per, packed=packed.data_ptr(),
        dw=dw_ENK.data_ptr(), offsets=offsets_E.data_ptr(), E=E, N=N, K=K, most=most,
        threads=torch.get_num_threads(), is_bf16=dw_ENK.dtype == torch.bfloat16,
    )  # fmt: skip
    _library().moepass_outer(ctypes.byref(task))


def _rows(x_RK: Tensor) -> Tensor:
    """Rows that are contiguous each."""
    return x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _library() -> ctypes.CDLL:
    library = build.load()
    assert library is not None, "ask takes() first"
    return library
