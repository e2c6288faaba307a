"""An MoE block as one op, and its backward pass as another.

``moepass::fused_experts(x_TD, index_TK, weight_TK, w_in, w_out, b_in?, b_out?, activation, interleaved, save) -> y, z``
``moepass::fused_experts_backward(dy_TD, <the same>, z, activation, interleaved, needs) -> dx, dweight, dw_in, dw_out,
db_in, db_out``

x, the weights and the biases share one dtype: float32, bfloat16 or float16; sums are float32.  ``z`` are the
pre-activations in expert order where ``save`` is true, else an empty tensor, and the backward pass computes them again.
``needs`` says which gradients are wanted, in the order of the results; the others are empty.

Opaque ops, not ``triton_op``: that fails under torch.compile on a CPU (reference/kernels.md 3d).  One op a pass keeps
the dispatcher out of the way.  No host synchronisation: buffers have sizes that T alone decides, and CUDA graphs can
capture the launches.  Not differentiable twice.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moepass import errors, pointwise
from moepass.kernels.fused import runner, schedule, select, tma, tuning
from moepass.kernels.fused.launch import power_of_two
from moepass.kernels.fused.problem import ITEMSIZE, Needs, Problem, Target
from moepass.kernels.fused.schedule_backward import backward, dense_strides

OPERANDS = "Tensor x_TD, Tensor index_TK, Tensor weight_TK, Tensor w_in, Tensor w_out, Tensor? b_in, Tensor? b_out"
library = torch.library.Library("moepass", "FRAGMENT")
library.define(f"fused_experts({OPERANDS}, str activation, bool interleaved, bool save) -> (Tensor, Tensor)")
library.define(
    f"fused_experts_backward(Tensor dy_TD, {OPERANDS}, Tensor z, str activation, bool interleaved, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Operands(NamedTuple):
    """What both ops take, in the order of ``OPERANDS``."""

    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None

    def bindings(self) -> dict[str, Tensor | None]:
        """By the names of the programs' inputs; all but the weights contiguous."""
        return {
            "x_TD": self.x_TD.contiguous(),
            "index_R": self.index_TK.contiguous(),
            "weight_R": self.weight_TK.contiguous(),
            "w_in": self.w_in,
            "w_out": self.w_out,
            "b_in": None if self.b_in is None else self.b_in.contiguous(),
            "b_out": None if self.b_out is None else self.b_out.contiguous(),
        }


def problem_of(args: Operands, activation: str, interleaved: bool, save: bool) -> Problem:
    """The block that the operands describe, T rounded up to a power of two so that few programs are made."""
    T, K = args.index_TK.shape
    E, _, D = args.w_in.shape
    return Problem(
        tokens=power_of_two(T),
        D=D,
        F=args.w_out.shape[2],
        E=E,
        K=K,
        n=pointwise.n_inputs(activation),
        dtype=_name(args.x_TD),
        activation=activation,
        w_in=_strides(args.w_in),
        w_out=_strides(args.w_out),
        bias_in=args.b_in is not None,
        bias_out=args.b_out is not None,
        interleaved=interleaved,
        save=save,
        index_dtype=_name(args.index_TK),
        weight_dtype=_name(args.weight_TK),
        aligned=_aligned(args.w_in) and _aligned(args.w_out),
    )


def _aligned(w: Tensor) -> bool:
    """Whether a matrix starts where a TMA descriptor may; unknown, so no, while a program is traced."""
    try:
        return w.data_ptr() % tma.UNIT == 0
    except RuntimeError:
        return False


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _strides(w: Tensor) -> tuple[int, int, int]:
    first, second, third = w.stride()
    return first, second, third


@functools.lru_cache(maxsize=1024)
def _forward_program(problem: Problem, target: Target) -> runner.Runnable:
    return runner.prepare(select.forward(problem, target))


@functools.lru_cache(maxsize=1024)
def _backward_program(problem: Problem, target: Target, needs: Needs) -> runner.Runnable:
    return runner.prepare(backward(problem, schedule.tiles(problem, target), target, needs))


def reload_tiles() -> None:
    """Forget every program and tile: after a tuning table has changed."""
    for cached in (_forward_program, _backward_program, schedule.tiles):
        cached.cache_clear()
    tuning.reload()


def _check(args: Operands, activation: str) -> None:
    """Raises ``FusedUnavailable`` and ``FusedOperands``."""
    device = args.x_TD.device.type
    if not runner.available(device):
        raise errors.FusedUnavailable(device=device)
    named = {"x": args.x_TD, "w_in": args.w_in, "w_out": args.w_out, "b_in": args.b_in, "b_out": args.b_out}
    dtypes = {name: _name(t) for name, t in named.items() if t is not None}
    if len(set(dtypes.values())) > 1 or dtypes["x"] not in ITEMSIZE:
        detail = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise errors.FusedOperands(detail=detail, remedy="give all of them float32, bfloat16 or float16")
    n, (E, rows, D), (_, outputs, F) = pointwise.n_inputs(activation), args.w_in.shape, args.w_out.shape
    if rows != n * F or outputs != D or args.x_TD.shape[1] != D or args.w_out.shape[0] != E:
        detail = f"x {tuple(args.x_TD.shape)}, w_in {tuple(args.w_in.shape)}, w_out {tuple(args.w_out.shape)}"
        raise errors.FusedOperands(detail=detail, remedy=f"give x [T, D], w_in [E, {n}*F, D] and w_out [E, D, F]")


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    args, (activation, interleaved, save) = _split(given)
    _check(args, activation)
    x_TD = args.x_TD
    problem = problem_of(args, activation, interleaved, save)
    runnable = _forward_program(problem, runner.target(x_TD.device))
    results = runner.run(runnable, x_TD.shape[0], args.bindings(), x_TD.device)
    return results["y_TD"], results["z_RN"] if save else x_TD.new_empty(0)


def _backward(dy_TD: Tensor, *given: Any) -> tuple[Tensor, ...]:
    args, (z, activation, interleaved, needs) = _split(given)
    _check(args, activation)
    x_TD = args.x_TD
    problem = problem_of(args, activation, interleaved, save=z.dim() == 2)
    runnable = _backward_program(problem, runner.target(x_TD.device), Needs(*needs))
    bindings = args.bindings() | {"dy_TD": dy_TD.contiguous(), "z_RN": z if problem.save else None}
    results = iter(runner.run(runnable, x_TD.shape[0], bindings, x_TD.device).values())
    dx, dweight, *others = (next(results) if needed else x_TD.new_empty(0) for needed in needs)
    return dx, dweight.view(args.index_TK.shape) if needs[1] else dweight, *others


def _split(given: tuple[Any, ...]) -> tuple[Operands, tuple[Any, ...]]:
    """The arguments of either op as the schema orders them: ``OPERANDS``, then the rest."""
    count = len(Operands._fields)
    return Operands(*given[:count]), given[count:]


for _device in ("CPU", "CUDA"):
    library.impl("fused_experts", _forward, _device)
    library.impl("fused_experts_backward", _backward, _device)


@torch.library.register_fake("moepass::fused_experts", lib=library)
def _(*given: Any) -> tuple[Tensor, Tensor]:
    args, (_activation, _interleaved, save) = _split(given)
    T, K = args.index_TK.shape
    z = args.x_TD.new_empty(T * K, args.w_in.shape[1]) if save else args.x_TD.new_empty(0)
    return args.x_TD.new_empty(T, args.w_out.shape[1]), z


@torch.library.register_fake("moepass::fused_experts_backward", lib=library)
def _(_: Tensor, *given: Any) -> tuple[Tensor, ...]:
    args, rest = _split(given)
    leaves = (args.x_TD, args.weight_TK, args.w_in, args.w_out, args.b_in, args.b_out)
    pairs = zip(leaves, rest[-1], strict=True)
    return tuple(_gradient_like(t) if needed and t is not None else args.x_TD.new_empty(0) for t, needed in pairs)


def _gradient_like(t: Tensor) -> Tensor:
    if t.dim() != 3:
        return t.new_empty(t.shape)
    E, rows, columns = t.shape
    return t.new_empty_strided(t.shape, dense_strides(_strides(t), (E, rows, columns)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.activation, ctx.interleaved, _ = inputs
    z = output[1]
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, z)


def _differentiate(ctx: Any, dy_TD: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *operands, z = ctx.saved_tensors
    x, _index, weight, w_in, w_out, b_in, b_out, *_flags = ctx.needs_input_grad
    wanted = Needs(x, weight, w_in, w_out, b_in, b_out)
    if dy_TD is None or not any(wanted):
        return (None,) * 10
    gradients = torch.ops.moepass.fused_experts_backward(
        dy_TD, *operands, z, ctx.activation, ctx.interleaved, list(wanted)
    )
    dx, dweight, *others = (g if needed else None for g, needed in zip(gradients, wanted, strict=True))
    return dx, None, dweight, *others, None, None, None


torch.library.register_autograd("moepass::fused_experts", _differentiate, setup_context=_setup, lib=library)


def fused_experts(
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    activation: str,
    interleaved: bool = False,
    save: bool = True,
) -> Tensor:
    """``y_t = sum_k weight[t,k] * expert_{index[t,k]}(x_t)`` by Triton kernels: ``[T, D]`` in x's dtype.

    ``save=False`` trades the memory of the pre-activations (``R*n*F`` elements) for computing them again backward; give
    it too where no gradient will be asked for.  Everything else is as in ``moepass.ops.experts``.  Raises
    ``FusedUnavailable`` on a CPU without Triton's interpreter, ``FusedOperands`` for mixed dtypes or widths.
    """
    y_TD, _ = torch.ops.moepass.fused_experts(
        x_TD, index_TK, weight_TK, w_in, w_out, b_in, b_out, activation, interleaved, save
    )
    result: Tensor = y_TD
    return result
