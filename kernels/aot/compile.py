"""Compile a launch for a GPU that is not here, and read what it needs: registers, spills, shared memory, matrix ops.

Triton compiles for sm_80, sm_90, sm_100 and gfx942 without a driver; ``cuobjdump`` lies in its wheel, and AMD's numbers
stand in the assembly.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepass import errors
from moepass.frozen import Frozen
from moepass.kernels.fused.launch import Launch
from moepass.kernels.fused.problem import TARGETS, Target
from moepass.kernels.fused.runner import function, interpreting, resolve

#: Instructions that multiply matrices, by target: what a fast kernel must have.
_MATRIX_OPS = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}


class Resources(Frozen):
    """What one compiled kernel needs.

    ``registers``   per thread (NVIDIA) or vector registers per lane (AMD)
    ``spills``      bytes of stack per thread (NVIDIA) or vector registers spilled (AMD); 0: everything fits
    ``shared``      bytes of shared memory per block
    ``matrix_ops``  matrix instructions in the assembly, of any kind; ``wgmma``: those of a whole warp group (sm_90)
    ``tma``         loads of tiles through TMA descriptors
    """

    registers: int
    spills: int
    shared: int
    matrix_ops: int
    wgmma: int = 0
    tma: int = 0


def available() -> bool:
    """Whether kernels can be compiled here: Triton is installed and does not interpret."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return not interpreting()


@functools.lru_cache(maxsize=4096)
def compile_launch(launch: Launch, target: Target) -> Resources:
    """Compile one launch for ``target``, one of ``problem.TARGETS``; raises ``errors.BadOption`` for another."""
    constants = {name: resolve(value) for name, value in launch.constexprs}
    compiled = build(function(launch.kernel), launch, constants, target)
    wanted = _MATRIX_OPS[target.name]
    if target.warp == 64:
        return _amd(compiled, wanted)
    ptx = compiled.asm["ptx"]
    registers, stack = _usage(compiled.asm["cubin"])
    return Resources(
        registers=registers,
        spills=stack,
        shared=compiled.metadata.shared,
        matrix_ops=len(re.findall(wanted, ptx)),
        wgmma=ptx.count("wgmma.mma_async"),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor\.\w+\.shared", ptx)),
    )


def build(kernel: Any, launch: Launch, constants: Mapping[str, object], target: Target) -> Any:
    """Triton's compiled kernel, with its assembly by name in ``asm``.

    ``kernel`` is the library's JIT function with ``constants``, or the emitted one, which has none left.
    """
    import triton
    from triton.compiler import ASTSource

    types, names = launch.arg_types, list(kernel.arg_names)
    absent = {p.name: p.default for p in kernel.params if p.has_default and p.name not in types}
    types, constants = types | dict.fromkeys(absent, "constexpr"), {**absent, **constants}
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # What the launcher infers of torch's allocations; without it loads are scalar.
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        return triton.compile(source, target=_gpu(target), options=options)


def _gpu(target: Target) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.name not in TARGETS:
        raise errors.BadOption(name="target", value=target.name, detail=f"use one of {', '.join(TARGETS)}")
    if target.warp == 64:
        return GPUTarget("hip", target.name, 64)
    return GPUTarget("cuda", int(target.name.removeprefix("sm_")), 32)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack."""
    handle, name = tempfile.mkstemp(suffix=".cubin")
    with os.fdopen(handle, "wb") as file:
        file.write(cubin)
    try:
        command = [str(_cuobjdump()), "--dump-resource-usage", name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    finally:
        os.unlink(name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _amd(compiled: Any, wanted: str) -> Resources:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    return Resources(
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count"),
        shared=compiled.metadata.shared,
        matrix_ops=len(re.findall(wanted, text)),
    )
