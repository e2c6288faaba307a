"""The steps of a block -> ``moe.py``: forward, and backward under autograd where the plan trains."""

from __future__ import annotations

import textwrap

from moepass.kernels.emit import layout
from moepass.kernels.emit.files import Facts, block_constants, header, main_of, program_function, section, tolerance
from moepass.kernels.emit.specialise import Specialiser
from moepass.kernels.emit.steps import Step
from moepass.kernels.fused.launch import Program
from moepass.kernels.fused.problem import Problem

#: What callers give, in the order of ``forward``.
_OPERANDS = ("x_TD", "index_TK", "weight_TK", "w_in", "w_out")


def launcher_file(
    forward: tuple[Program, tuple[Step, ...]],
    backward: tuple[Program, tuple[Step, ...]] | None,
    problem: Problem,
    facts: Facts,
) -> str:
    """The source of ``moe.py``, which loads the steps' files from its own folder."""
    steps = (*forward[1], *(backward[1] if backward else ()))
    plain = Specialiser(given=frozenset({"program"}))
    constants = block_constants(problem) | {"TRAIN": backward is not None}
    plain.function("moepass.kernels.emit.plain", "check_block", constants)
    doc = [*textwrap.wrap(f"Steps: {', '.join(step.name for step in steps)}.", 118), _RUN]
    parts = [
        header("moe", "a mixture-of-experts block", problem, facts, doc),
        _IMPORTS,
        "\n".join(f'{step.name} = _step("{step.name}")' for step in steps),
        _forward(*forward, problem),
        *(_training(*backward, forward[0], problem) if backward else (_inference(problem),)),
        section("The self-check"),
        program_function(problem),
        tolerance(),
        *(layout.function(f) for f in plain.functions.values()),
        main_of("moe", "check_block(moe, T, device, dtype)", problem, facts),
    ]
    return "\n\n".join(part.strip("\n") + "\n" for part in parts)


_IMPORTS = '''\
from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the steps import triton


def _step(name: str) -> Any:
    """The module of a step, from the file beside this one."""
    spec = importlib.util.spec_from_file_location(f"{__name__}.{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
'''

_RUN = "`python moe.py [T]` compares it with plain PyTorch; without an accelerator, in the interpreter."


def operands(problem: Problem) -> tuple[str, ...]:
    """Names of the tensors that the block takes."""
    biases = (("b_in", problem.bias_in), ("b_out", problem.bias_out))
    return (*_OPERANDS, *(name for name, is_there in biases if is_there))


def _forward(program: Program, steps: tuple[Step, ...], problem: Problem) -> str:
    arguments = [f"{name}: Tensor" for name in operands(problem)]
    body = [
        f'"""{", ".join(program.results)} of T tokens; ``index_TK`` outside 0..{problem.E - 1}: not computed."""',
        *_check(problem),
        *(_ALIGNED if any(launch.descriptors for launch in program.launches) else ()),
        "T, x_TD = x_TD.shape[0], x_TD.contiguous()",
        "index_R, weight_R = index_TK.reshape(-1), weight_TK.reshape(-1)",
        *_calls(steps),
        f"return {_tuple(program.results)}",
    ]
    return _define("forward", arguments, "tuple[Tensor, ...]", body)


def _check(p: Problem) -> list[str]:
    """The kernels' constants are those of one shape and layout: other weights are refused."""
    w_in, w_out = (p.E, p.n * p.F, p.D), (p.E, p.D, p.F)
    return [
        f"if x_TD.shape[1:] != ({p.D},) or (w_in.shape, w_out.shape) != ({w_in}, {w_out}):",
        f'    raise ValueError("x_TD, w_in and w_out must have the shapes (T, {p.D}), {w_in} and {w_out}")',
        f"if (w_in.stride(), w_out.stride()) != ({p.w_in}, {p.w_out}):",
        f'    raise ValueError("w_in and w_out must have the strides {p.w_in} and {p.w_out}")',
        f"if index_TK.shape != (x_TD.shape[0], {p.K}) or weight_TK.shape != index_TK.shape:",
        f'    raise ValueError("index_TK and weight_TK must have the shape (T, {p.K})")',
    ]


#: What descriptors want besides: forward's serve for backward's, which reads the same weights.
_ALIGNED = (
    "if w_in.data_ptr() % 16 or w_out.data_ptr() % 16:",
    '    raise ValueError("w_in and w_out must start at multiples of 16 bytes")',
)


def _inference(problem: Problem) -> str:
    names = operands(problem)
    body = ['"""y_TD."""', f"return forward({', '.join(names)})[0]"]
    return _define("moe", [f"{name}: Tensor" for name in names], "Tensor", body)


def _training(program: Program, steps: tuple[Step, ...], forward: Program, problem: Problem) -> tuple[str, ...]:
    names = operands(problem)
    saved = tuple(name for name in forward.results if name != "y_TD")
    arguments = [f"{name}: Tensor" for name in ("dy_TD", *names, *saved)]
    like = {"dx_TD": "x_TD", "dweight_R": "weight_R"}
    zeros = [f"torch.zeros_like({like.get(name, name.removeprefix('d'))})" for name in program.results]
    body = [
        f'"""{", ".join(program.results)}."""',
        "T, x_TD, dy_TD = x_TD.shape[0], x_TD.contiguous(), dy_TD.contiguous()",
        "index_R, weight_R = index_TK.reshape(-1), weight_TK.reshape(-1)",
        "if T == 0:",
        *(line[4:] for line in layout.returned(f"({', '.join(zeros)},)", 2)),  # _define indents
        *_calls(steps),
        f"return {_tuple(program.results)}",
    ]
    return (
        _define("backward", arguments, "tuple[Tensor, ...]", body),
        _function(names, saved, program.results),
        _define(
            "moe",
            [f"{name}: Tensor" for name in names],
            "Tensor",
            ['"""y_TD, differentiable in everything but ``index_TK``."""', f"return MoE.apply({', '.join(names)})"],
        ),
    )


def _function(names: tuple[str, ...], saved: tuple[str, ...], results: tuple[str, ...]) -> str:
    """The autograd function: gradients in the order of the operands, none for the index."""
    made = {"x_TD": "dx_TD", "index_TK": None, "weight_TK": "dweight_R.view_as(weight_TK)"}
    order = [made.get(name, f"d{name}") for name in names]
    everything = (*names, *saved)
    kept = ", ".join(saved)
    head = f"y_TD, {kept} = forward" if saved else "(y_TD,) = forward"
    lines = [
        "class MoE(torch.autograd.Function):",
        '    """Forward and backward of the block."""',
        "",
        "    @staticmethod",
        f"    def forward(ctx: Any, {', '.join(names)}) -> Tensor:",
        f"        {head}({', '.join(names)})",
        f"        ctx.save_for_backward({', '.join(everything)})",
        "        return y_TD",
        "",
        "    @staticmethod",
        "    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:",
        f"        {', '.join(everything)} = ctx.saved_tensors",
        *layout.bracketed(f"{_tuple(results)} = backward(", ["dy_TD", *everything], ")", 2),
        f"        return {', '.join(str(name) for name in order)}",
    ]
    return "\n".join(lines)


def _calls(steps: tuple[Step, ...]) -> list[str]:
    lines = []
    for step in steps:
        head = f"{_tuple(step.gives)} = {step.name}.launch("
        lines += layout.bracketed(head, ["T", *step.takes], ")", 0)
    return lines


def _define(name: str, arguments: list[str], returns: str, body: list[str]) -> str:
    head = layout.bracketed(f"def {name}(", arguments, f") -> {returns}:", 0)
    return "\n".join([*head, *(f"    {line}" for line in body)])


def _tuple(names: tuple[str, ...]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)
