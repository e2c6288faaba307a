"""Runs programs: allocates their buffers and launches their kernels, on an accelerator or in Triton's interpreter.

Triton is imported when a kernel is first launched.  The interpreter is Triton's own switch: ``TRITON_INTERPRET=1`` in
the environment before Triton is imported makes every kernel run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moepass.kernels.fused.launch import Activation, Argument, Buffer, Constant, Extent, Launch, Program
from moepass.kernels.fused.problem import INTERPRETER, TARGETS, Target


class Ready(NamedTuple):
    """A launch with its JIT function and constants looked up."""

    kernel: Any
    grid: Extent
    arguments: tuple[Argument, ...]
    options: dict[str, Any]


class Runnable(NamedTuple):
    """A program and its launches, ready."""

    program: Program
    launches: tuple[Ready, ...]


def interpreting() -> bool:
    """Whether Triton's interpreter is on."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def available(device: str) -> bool:
    """Whether the kernels can run on a device type: accelerators, and the CPU in the interpreter."""
    return find_spec("triton") is not None and (interpreting() if device == "cpu" else not interpreting())


@functools.cache
def target(device: torch.device) -> Target:
    """What is compiled for on this device."""
    if device.type == "cpu":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    arch = getattr(found, "gcnArchName", "").split(":")[0]
    name = arch if torch.version.hip else f"sm_{found.major}{found.minor}"
    known = TARGETS.get(name)
    shared = getattr(found, "shared_memory_per_block_optin", known.shared if known else 65536)
    return Target(name, found.multi_processor_count, shared, 64 if torch.version.hip else 32)


def run(runnable: Runnable, T: int, inputs: Mapping[str, Tensor | None], device: torch.device) -> dict[str, Tensor]:
    """The results of a program for T tokens, by name.  Inputs are contiguous but for the weights."""
    program = runnable.program
    sizes = program.sizes(T)
    bound: dict[str, Any] = {**inputs, **sizes}
    for buffer in program.buffers:
        bound[buffer.name] = allocate(buffer, sizes, device)
    with _current(device):
        if any(launch.descriptors for launch in program.launches):
            copy_context().run(_launch_with_descriptors, runnable, sizes, bound, device)  # the allocator stays its own
        else:
            _launch(runnable, sizes, bound)
    return {name: bound[name] for name in program.results}


def _launch(runnable: Runnable, sizes: Mapping[str, int], bound: Mapping[str, Any]) -> None:
    for ready in runnable.launches:
        count = ready.grid.at(sizes)
        if count:
            arguments = {a.parameter: bound[a.binding] for a in ready.arguments}
            ready.kernel[(count,)](**arguments, **ready.options)


def _launch_with_descriptors(
    runnable: Runnable, sizes: Mapping[str, int], bound: Mapping[str, Any], device: torch.device
) -> None:
    """TMA descriptors that a kernel makes lie in memory that Triton asks for at each launch."""
    import triton

    triton.set_allocator(lambda size, _align, _stream: torch.empty(size, dtype=torch.int8, device=device))
    _launch(runnable, sizes, bound)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the operands."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


def allocate(buffer: Buffer, sizes: Mapping[str, int], device: torch.device) -> Tensor:
    """Memory that holds anything."""
    shape = [size.at(sizes) for size in buffer.shape]
    dtype: torch.dtype = getattr(torch, buffer.dtype)
    if buffer.strides is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty_strided(shape, buffer.strides, dtype=dtype, device=device)


def prepare(program: Program) -> Runnable:
    """A program with its kernels looked up: what callers keep."""
    return Runnable(program, tuple(_prepare(launch) for launch in program.launches))


def _prepare(launch: Launch) -> Ready:
    constants = {name: resolve(value) for name, value in launch.constexprs}
    options = constants | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return Ready(function(launch.kernel), launch.grid, launch.arguments, options)


def function(kernel: str) -> Any:
    """The JIT function that a launch names."""
    module, _, name = kernel.partition(".")
    return getattr(importlib.import_module(f"moepass.kernels.fused.{module}"), name)


def resolve(value: Constant) -> object:
    """A constexpr's value; an activation becomes its JIT function."""
    if not isinstance(value, Activation):
        return value
    from moepass.kernels.codegen import pointwise_functions

    return getattr(pointwise_functions(value.text), value.part)
