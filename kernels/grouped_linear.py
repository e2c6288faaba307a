"""Grouped GEMM: every expert's contiguous rows times its own weight, with bias, forward and backward.

``moepass::grouped_linear(x, w_END, b_EN?, offsets_E, from_hidden, to_hidden) -> y``   expert e's rows use ``w[e]``
``moepass::grouped_outer(dy, x, offsets_E, dy_hidden, x_hidden) -> dw_END``            zero for an expert without rows
``moepass::grouped_sum(dy, offsets_E, dy_hidden) -> db_EN``                            likewise

Two layouts of the rows.  *Plain*: ``[R, N]``, expert e owns ``offsets[e-1]:offsets[e]``.  *Hidden*, for what lies
between two grouped GEMMs on the CPU: ``[N, P]``, features first, P = R + 16*E, every expert's columns start at a
multiple of 16.  MKL is 4..15 % faster that way, and a pointwise program does not mind; columns between the experts are
zero and never read.

The offsets may end before R: the rows behind are of no expert.  They are neither computed nor read, and of a plain
result the last of them is zero, for ``sort_by_expert``'s inverse to point at (the others are undefined).

CPU: plain float32 and bfloat16 in one call of our C++ (``kernels.cpu``), which reads each active expert's weight once;
what it does not take, a loop of GEMMs into preallocated outputs; unlike ``F.grouped_mm`` that takes biases, float64 and
any strides.
Accelerators: ``F.grouped_mm`` where its rules hold (bfloat16, 16-byte strides), else the loop, which has to read the
offsets back to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moepass.kernels import host
from moepass.kernels.cpu import grouped as own
from moepass.kernels.rows import sum_by_expert

library = torch.library.Library("moepass", "FRAGMENT")
library.define(
    "grouped_linear(Tensor x, Tensor w_END, Tensor? b_EN, Tensor offsets_E, bool from_hidden, bool to_hidden) -> Tensor"
)
library.define("grouped_outer(Tensor dy, Tensor x, Tensor offsets_E, bool dy_hidden, bool x_hidden) -> Tensor")
library.define("grouped_sum(Tensor dy, Tensor offsets_E, bool dy_hidden) -> Tensor")

#: Rows at which an expert may start in the hidden layout: one cache line of float32.
ALIGN = 16


class Group(NamedTuple):
    """One expert's rows in both layouts."""

    expert: int
    plain: slice
    hidden: slice

    @property
    def rows(self) -> int:
        """How many they are."""
        return int(self.plain.stop - self.plain.start)

    def of(self, x: Tensor, hidden: bool) -> Tensor:
        """Its rows ``[r, N]`` of a tensor in either layout."""
        return x[:, self.hidden].t() if hidden else x[self.plain]

    def rounded(self, R: int) -> Group:
        """With rows up to a multiple of 16: a GEMM with an odd number of columns is 20 % slower than that of the next
        multiple, so a few of the following rows are computed too, into columns that nobody reads.
        """
        count = min(-(-self.rows // ALIGN) * ALIGN, R - self.plain.start)
        return Group(
            self.expert,
            slice(self.plain.start, self.plain.start + count),
            slice(self.hidden.start, self.hidden.start + count),
        )


def _groups(offsets_E: Tensor) -> Iterator[Group]:
    """The experts that have rows."""
    low = start = 0
    for expert, high in enumerate(offsets_E.tolist()):
        if high > low:
            yield Group(expert, slice(low, high), slice(start, start + high - low))
            start += -(-(high - low) // ALIGN) * ALIGN
        low = high


def _output(x: Tensor, w_END: Tensor, from_hidden: bool, to_hidden: bool) -> Tensor:
    E, N, _ = w_END.shape
    R = x.shape[1] - ALIGN * E if from_hidden else x.shape[0]
    shape = (N, R + ALIGN * E) if to_hidden else (R, N)
    return host.empty(shape, x.dtype) if type(x) is Tensor and x.device.type == "cpu" else x.new_empty(shape)


def _features(x: Tensor, hidden: bool) -> int:
    return x.shape[0] if hidden else x.shape[1]


def _linear_loop(
    x: Tensor, w_END: Tensor, b_EN: Tensor | None, offsets_E: Tensor, from_hidden: bool, to_hidden: bool
) -> Tensor:
    y = _output(x, w_END, from_hidden, to_hidden)
    plain = not from_hidden and not to_hidden and x.device.type == "cpu"
    most = own.most_rows(x.dtype) if plain and own.fits(x, w_END, b_EN) else 0
    if most:
        own.linear(x, w_END, b_EN, y, offsets_E=offsets_E, most=most)
    if most == own.ANY:
        return y
    groups = list(_groups(offsets_E))
    for group in groups:
        if group.rows <= most:
            continue
        w_ND, bias = w_END[group.expert], None if b_EN is None else b_EN[group.expert]
        if to_hidden and not from_hidden:
            group = group.rounded(x.shape[0])
        x_rows, y_rows = group.of(x, from_hidden), group.of(y, to_hidden)
        if to_hidden:
            host.mm(w_ND, x_rows.t(), y_rows.t(), None if bias is None else bias.unsqueeze(1))
        else:
            host.mm(x_rows, w_ND.t(), y_rows, bias)
    if to_hidden:
        _zero_between(y, groups)
    else:
        y[groups[-1].plain.stop if groups else 0 :].zero_()
    return y


def _zero_between(y_NP: Tensor, groups: list[Group]) -> None:
    """Padding must be finite: a pointwise program runs over it, and anomaly detection looks at it."""
    end = 0
    for start, stop in [(g.hidden.start, g.hidden.stop) for g in groups] + [(y_NP.shape[1], y_NP.shape[1])]:
        y_NP[:, end:start].zero_()
        end = stop


def _outer_loop(dy: Tensor, x: Tensor, offsets_E: Tensor, dy_hidden: bool, x_hidden: bool) -> Tensor:
    shape = (offsets_E.shape[0], _features(dy, dy_hidden), _features(x, x_hidden))
    dw_END = host.empty(shape, dy.dtype) if dy.device.type == "cpu" else dy.new_empty(shape)
    empty = set(range(shape[0]))
    plain = not dy_hidden and not x_hidden and dy.device.type == "cpu"
    most = own.most_rows(dy.dtype) if plain and own.fits_outer(dy, x) else 0
    if most:
        own.outer(dy, x, offsets_E, dw_END, most=most)
        empty.clear()
    if most == own.ANY:
        return dw_END
    for group in _groups(offsets_E):
        if group.rows <= most:
            continue
        host.mm(group.of(dy, dy_hidden).t(), group.of(x, x_hidden), dw_END[group.expert])
        empty.discard(group.expert)
    for expert in empty:
        dw_END[expert].zero_()
    return dw_END


def _sum_loop(dy: Tensor, offsets_E: Tensor, dy_hidden: bool) -> Tensor:
    db_EN = dy.new_zeros(offsets_E.shape[0], _features(dy, dy_hidden))
    for group in _groups(offsets_E):
        torch.sum(group.of(dy, dy_hidden), 0, out=db_EN[group.expert])
    return db_EN


def _fits_grouped_mm(*operands: Tensor) -> bool:
    """``F.grouped_mm``: bfloat16, one unit stride among the last two, the others multiples of 16 bytes."""
    return all(
        t.dtype == torch.bfloat16
        and 1 in t.stride()[-2:]
        and all(s == 1 or s * t.element_size() % 16 == 0 for s in t.stride())
        for t in operands
    )


def _linear_accelerator(
    x: Tensor, w_END: Tensor, b_EN: Tensor | None, offsets_E: Tensor, from_hidden: bool, to_hidden: bool
) -> Tensor:
    if from_hidden or to_hidden or not _fits_grouped_mm(x, w_END):
        return _linear_loop(x, w_END, b_EN, offsets_E, from_hidden, to_hidden)
    y_RN = F.grouped_mm(x, w_END.transpose(1, 2), offs=offsets_E)
    if b_EN is not None:
        y_RN = y_RN + b_EN[_expert_of_row(offsets_E, x.shape[0]).clamp(max=w_END.shape[0] - 1)]
    y_RN[-1:].masked_fill_(offsets_E[-1:] < x.shape[0], 0)  # only this row: a mask over all would cost a pass
    return y_RN


def _outer_accelerator(dy: Tensor, x: Tensor, offsets_E: Tensor, dy_hidden: bool, x_hidden: bool) -> Tensor:
    if dy_hidden or x_hidden or not _fits_grouped_mm(dy, x):
        return _outer_loop(dy, x, offsets_E, dy_hidden, x_hidden)
    return F.grouped_mm(dy.t(), x, offs=offsets_E)


def _sum_accelerator(dy: Tensor, offsets_E: Tensor, dy_hidden: bool) -> Tensor:
    if dy_hidden:
        return _sum_loop(dy, offsets_E, dy_hidden)
    return sum_by_expert(dy, _expert_of_row(offsets_E, dy.shape[0]), offsets_E.shape[0])


def _expert_of_row(offsets_E: Tensor, R: int) -> Tensor:
    """Each plain row's expert; E behind the last offset."""
    return torch.searchsorted(offsets_E, torch.arange(R, device=offsets_E.device, dtype=offsets_E.dtype), right=True)


library.impl("grouped_linear", _linear_loop, "CPU")
library.impl("grouped_outer", _outer_loop, "CPU")
library.impl("grouped_sum", _sum_loop, "CPU")
library.impl("grouped_linear", _linear_accelerator, "CUDA")
library.impl("grouped_outer", _outer_accelerator, "CUDA")
library.impl("grouped_sum", _sum_accelerator, "CUDA")


@torch.library.register_fake("moepass::grouped_linear", lib=library)
def _(x: Tensor, w_END: Tensor, b_EN: Tensor | None, offsets_E: Tensor, from_hidden: bool, to_hidden: bool) -> Tensor:
    return _output(x, w_END, from_hidden, to_hidden)


@torch.library.register_fake("moepass::grouped_outer", lib=library)
def _(dy: Tensor, x: Tensor, offsets_E: Tensor, dy_hidden: bool, x_hidden: bool) -> Tensor:
    return dy.new_empty(offsets_E.shape[0], _features(dy, dy_hidden), _features(x, x_hidden))


@torch.library.register_fake("moepass::grouped_sum", lib=library)
def _(dy: Tensor, offsets_E: Tensor, dy_hidden: bool) -> Tensor:
    return dy.new_empty(offsets_E.shape[0], _features(dy, dy_hidden))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, bool, bool], output: Tensor) -> None:
    x, w_END, b_EN, offsets_E, ctx.from_hidden, ctx.to_hidden = inputs
    ctx.has_bias = b_EN is not None
    ctx.save_for_backward(x, w_END, offsets_E)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
    x, w_END, offsets_E = ctx.saved_tensors
    needs_x, needs_w, needs_b, *_ = ctx.needs_input_grad
    here, there = ctx.to_hidden, ctx.from_hidden
    dx = (
        grouped_linear(dy, w_END.transpose(1, 2), None, offsets_E, from_hidden=here, to_hidden=there)
        if needs_x
        else None
    )
    dw = weight_gradient(dy, x, w_END, offsets_E, here, there) if needs_w else None
    db = torch.ops.moepass.grouped_sum(dy, offsets_E, here) if ctx.has_bias and needs_b else None
    return dx, dw, db, None, None, None


def weight_gradient(dy: Tensor, x: Tensor, w_END: Tensor, offsets_E: Tensor, dy_hidden: bool, x_hidden: bool) -> Tensor:
    """``grouped_outer`` in the memory layout of the weight, or a view of a transposed one would be copied in place."""
    if w_END.stride(-1) != 1 and w_END.stride(-2) == 1:
        dw_EDN: Tensor = torch.ops.moepass.grouped_outer(x, dy, offsets_E, x_hidden, dy_hidden)
        return dw_EDN.transpose(1, 2)
    dw_END: Tensor = torch.ops.moepass.grouped_outer(dy, x, offsets_E, dy_hidden, x_hidden)
    return dw_END


torch.library.register_autograd("moepass::grouped_linear", _backward, setup_context=_setup, lib=library)


def grouped_linear(
    x: Tensor,
    w_END: Tensor,
    b_EN: Tensor | None,
    offsets_E: Tensor,
    *,
    from_hidden: bool = False,
    to_hidden: bool = False,
) -> Tensor:
    """``y[r] = x[r] @ w[e].T + b[e]`` for the rows r of expert e; differentiable.

    Plain ``[R, D] -> [R, N]``; ``from_hidden``: x is ``[D, P]``; ``to_hidden``: y is ``[N, P]`` (see the module).
    """
    y: Tensor = torch.ops.moepass.grouped_linear(x, w_END, b_EN, offsets_E, from_hidden, to_hidden)
    return y
