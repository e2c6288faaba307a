"""A step -> one standalone Python file: its kernels specialised, a ``launch`` function, and a self-check.

``python FILE [T]`` compares the kernels with plain PyTorch on an accelerator, or in Triton's interpreter (in float32)
where there is none; the exit code is 1 where they differ.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from moepass import pointwise
from moepass.kernels.codegen import derive
from moepass.kernels.emit import layout, library
from moepass.kernels.emit.specialise import Specialiser
from moepass.kernels.emit.steps import Step
from moepass.kernels.emit.torch_text import torch_text
from moepass.kernels.fused.launch import SCALARS, Activation, Buffer, Launch, Program
from moepass.kernels.fused.problem import TRITON_TYPES, Problem

_PLAIN = "moepass.kernels.emit.plain"
_FUNCTIONS = "moepass.kernels.codegen.functions"
#: Names of the pointwise program's functions in a file.
NAMES = {"value": "activate", "grad": "activate_gradient"}
#: Tokens of the self-check in the interpreter.
FEW = 3


#: Lines of a header: a word and what is said of it.
Lines = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Facts:
    """What the header says besides the shapes, such as the plan and its price; ``tokens``: T of the self-check."""

    lines: tuple[tuple[str, str], ...] = ()
    tokens: int = 512


def kernel_file(step: Step, program: Program, problem: Problem, facts: Facts) -> str:
    """The source of one step."""
    functions = Specialiser(given=frozenset({*NAMES.values(), "program"}))
    kernels = [_kernel(functions, launch) for launch in step.launches]
    plain = Specialiser(given=frozenset({"program"}))
    plain.function(_PLAIN, "check", _check_constants(step, program, problem))
    tiles = "tile_bound(T)" if _has_tiles(program) else "0"
    parts = [
        _header(step, problem, facts),
        _IMPORTS.format(tile_bound=_tile_bound(program)) if _has_tiles(program) else _IMPORTS.partition("\n\n\n")[0],
        *_activation(step, problem),
        *(layout.function(f) for f in functions.functions.values()),
        _launch(step, kernels, program, problem),
        section("The self-check"),
        program_function(problem),
        tolerance(),
        *(layout.function(f) for f in plain.functions.values()),
        main_of(step.name, f"check(launch, T, {tiles}, device, dtype)", problem, facts),
    ]
    return "\n\n".join(part.strip("\n") + "\n" for part in parts)


_IMPORTS = """\
from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
import triton
import triton.language as tl


{tile_bound}
"""

_MAIN = '''\
def main() -> int:
    """Compare with plain PyTorch; 0 where they agree."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = "cpu" if interpreted else str(torch.accelerator.current_accelerator())
    dtype = torch.float32 if interpreted else torch.{dtype}
    T = int(sys.argv[1]) if len(sys.argv) > 1 else {few} if interpreted else {tokens}
    good = {check}
    print(f"{name}: {{'agrees' if good else 'DIFFERS'}} with plain PyTorch, T={{T}}, {{dtype}}, {{device}}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
'''


def main_of(name: str, check: str, problem: Problem, facts: Facts) -> str:
    """What ``python FILE`` runs: ``check`` at a T that suits the device."""
    return _MAIN.format(few=FEW, tokens=facts.tokens, dtype=problem.dtype, name=name, check=check)


def _has_tiles(program: Program) -> bool:
    """Whether rows are routed into M-tiles; a program that streams its weights has none."""
    return any(launch.kernel.startswith("routing.") for launch in program.launches)


def _tile_bound(program: Program) -> str:
    E, K, m = program.E, program.K, program.block_m
    return (
        "def tile_bound(T: int) -> int:\n"
        f'    """The most M-tiles of {m} rows that T tokens of {K} experts each can need, over {E} experts."""\n'
        f"    R = {_times('T', K)}\n"
        f"    return R if R <= {E} else {E - 1} + triton.cdiv(R - {E - 1}, {m})"
    )


def _times(name: str, factor: int) -> str:
    return name if factor == 1 else f"{name} * {factor}"


def header(name: str, what: str, problem: Problem, facts: Facts, doc: list[str], more: Lines = ()) -> str:
    """The docstring of a file."""
    p = problem
    widths = f"D={p.D} F={p.F} E={p.E} K={p.K} n={p.n}, {p.dtype}"
    layouts = [word for word, is_set in (("interleaved gate and up", p.interleaved), ("biases", _biases(p))) if is_set]
    lines = [
        ("block", ", ".join([widths, *layouts])),
        ("program", pointwise.canonical(p.activation)),
        *facts.lines,
        *more,
    ]
    width = max(len(word) for word, _ in lines) + 2
    text = [f'"""{name}: {what}, written by moepass.', ""]
    for word, said in lines:
        text += textwrap.wrap(
            clean(said), 118, initial_indent=word.ljust(width), subsequent_indent=" " * width, break_on_hyphens=False
        )
    legend = "T tokens, R = T*K routed rows; D model width, F expert width, E experts, K experts per token."
    return "\n".join([*text, "", legend, *doc, '"""'])


def _header(step: Step, problem: Problem, facts: Facts) -> str:
    more = [
        (launch.name, f"{_tile(launch)}; {launch.num_warps} warps, {launch.num_stages} stages")
        for launch in step.launches
    ]
    doc = [f"`python {step.name}.py [T]` compares it with plain PyTorch; without an accelerator, in the interpreter."]
    return header(step.name, "one step of a mixture-of-experts block", problem, facts, doc, more)


def clean(text: str) -> str:
    """Text that cannot end a docstring or be anything but text in one."""
    return "".join(c if c.isascii() and c.isprintable() and c not in '\\"' else "?" for c in text)


def _biases(p: Problem) -> bool:
    return p.bias_in or p.bias_out


def _tile(launch: Launch) -> str:
    constants = dict(launch.constexprs)
    sizes = [f"{name.removeprefix('BLOCK_')}={constants[name]}" for name in constants if name.startswith("BLOCK")]
    return f"{launch.kernel}, blocks {' '.join(sizes)}"


def _kernel(functions: Specialiser, launch: Launch) -> str:
    module, _, name = launch.kernel.partition(".")
    home = f"moepass.kernels.fused.{module}"
    given = {a.parameter for a in launch.arguments}
    off = library.defaults(library.load(home).functions[name])
    constants = {key: value for key, value in off.items() if key not in given}
    constants |= {key: value for key, value in launch.constexprs if not isinstance(value, Activation)}
    refer = {key: NAMES[value.part] for key, value in launch.constexprs if isinstance(value, Activation)}
    return functions.function(home, name, constants, refer).name


def _activation(step: Step, problem: Problem) -> list[str]:
    """JIT functions of the program, as far as the kernels call them."""
    wanted = {v.part for launch in step.launches for _, v in launch.constexprs if isinstance(v, Activation)}
    if not wanted:
        return []
    value, grad = derive.bodies(problem.activation)
    lines = {"value": value, "grad": grad}
    heads = {"value": f"{NAMES['value']}(g, u)", "grad": f"{NAMES['grad']}(g, u, dh)"}
    docs = {"value": "The pointwise program.", "grad": "The gradients of g and u."}
    made = [
        "\n".join(["@triton.jit", f"def {heads[part]}:", f'    """{docs[part]}"""', *(f"    {x}" for x in lines[part])])
        for part in ("value", "grad")
        if part in wanted
    ]
    text = "\n".join(line for part in wanted for line in lines[part])
    helpers = [library.load(_FUNCTIONS).functions[name] for name in ("expm1", "log1p", "tanh") if f"{name}(" in text]
    return [*map(layout.function, helpers), *made]


def _launch(step: Step, kernels: list[str], program: Program, problem: Problem) -> str:
    arguments = ["T: int", *(f"{name}: Tensor" for name in step.takes)]
    head = layout.bracketed("def launch(", arguments, ") -> tuple[Tensor, ...]:", 0)
    extents = [size for buffer in step.allocates for size in buffer.shape] + [x.grid for x in step.launches]
    text = " ".join(map(str, extents)) + " ".join(a.binding for x in step.launches for a in x.arguments)
    body = [f'"""{", ".join(step.gives)} of T tokens."""']
    body += [f"R = {_times('T', program.K)}"] if _mentions(text, "R") else []
    body += ["TILES = tile_bound(T)"] if _mentions(text, "TILES") else []
    body += [_allocation(buffer, step, problem) for buffer in step.allocates]
    if any(launch.descriptors for launch in step.launches):
        memory = f"torch.empty(size, dtype=torch.int8, device={step.takes[0]}.device)"
        body += ["# TMA descriptors lie in memory that Triton asks for at each launch."]
        body += [f"triton.set_allocator(lambda size, align, stream: {memory})"]
    calls = [line for pair in zip(kernels, step.launches, strict=True) for line in _call(*pair)]
    results = ", ".join(step.gives)
    last = f"return ({results},)" if len(step.gives) == 1 else f"return {results}"
    return "\n".join([*head, *(f"    {line}" for line in body), *calls, f"    {last}"])


def _mentions(text: str, name: str) -> bool:
    return name in text.replace("(", " ").replace(")", " ").replace(",", " ").split()


def _allocation(buffer: Buffer, step: Step, problem: Problem) -> str:
    wanted = f"*{TRITON_TYPES[problem.dtype]}"
    inputs = [a.binding for launch in step.launches for a in launch.arguments if a.binding in step.takes]
    floats = [a.binding for launch in step.launches for a in launch.arguments if a.type == wanted]
    like = next((name for name in floats if name in step.takes), None)
    dtype = f"{like}.dtype" if like and buffer.dtype == problem.dtype else f"torch.{buffer.dtype}"
    shape = f"({', '.join(str(size).replace('cdiv(', 'triton.cdiv(') for size in buffer.shape)},)".replace(",,", ",")
    shape = shape.replace(",)", ")") if len(buffer.shape) > 1 else shape
    end = f"dtype={dtype}, device={inputs[0]}.device)"
    if buffer.strides is not None:
        return f"{buffer.name} = torch.empty_strided({shape}, {buffer.strides}, {end}"
    return f"{buffer.name} = torch.empty({shape}, {end}"


def _call(kernel: str, launch: Launch) -> list[str]:
    """The lines that launch a kernel, in the body of ``launch``."""
    grid = str(launch.grid).replace("cdiv(", "triton.cdiv(")
    arguments = [a.binding for a in launch.arguments]
    arguments += [f"num_warps={launch.num_warps}", f"num_stages={launch.num_stages}"]
    if grid.isdecimal():
        return layout.bracketed(f"{kernel}[({grid},)](", arguments, ")", 1)
    if grid in SCALARS:
        return [f"    if {grid}:", *layout.bracketed(f"{kernel}[({grid},)](", arguments, ")", 2)]
    lines = layout.bracketed(f"{kernel}[(programs,)](", arguments, ")", 2)
    return [f"    programs = {grid}", "    if programs:", *lines]


def section(title: str) -> str:
    """A line that divides a file."""
    return f"# {title} {'-' * (117 - len(title))}"


def program_function(problem: Problem) -> str:
    """The pointwise program for the self-check."""
    lines = layout.returned(torch_text(problem.activation), 1)
    head = ["def program(g: Tensor, u: Tensor) -> Tensor:", '    """The pointwise program in plain PyTorch."""']
    return "\n".join([*head, *lines])


def tolerance() -> str:
    """The self-check's tolerances."""
    from moepass.kernels.emit.plain import TOLERANCE

    pairs = ", ".join(f"{dtype}: {value}" for dtype, value in TOLERANCE.items())
    return f"#: Largest error allowed, of the largest value.\nTOLERANCE = {{{pairs}}}"


def block_constants(p: Problem) -> dict[str, object]:
    """Constants of ``plain.example`` and ``plain.block``."""
    return {
        "D": p.D,
        "F": p.F,
        "E": p.E,
        "K": p.K,
        "N": p.n,
        "W_IN": p.w_in,
        "W_OUT": p.w_out,
        "BIAS_IN": p.bias_in,
        "BIAS_OUT": p.bias_out,
        "INDEX": p.index_dtype,
        "WEIGHT": p.weight_dtype,
        "INTERLEAVED": p.interleaved,
    }


def _check_constants(step: Step, program: Program, problem: Problem) -> dict[str, object]:
    known = [dict(x.constexprs) for x in step.launches]
    parts = next((x[name] for x in known for name in ("PARTS", "SPLITS") if name in x), 1)
    own: dict[str, object] = {"BLOCK_M": program.block_m, "PARTS": parts, "STREAMED": not _has_tiles(program)}
    own |= {"TAKES": step.takes, "GIVES": step.gives}
    return block_constants(problem) | own
