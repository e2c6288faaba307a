"""Compile ``grouped.cpp`` for this machine, once: a shared library in the cache directory, loaded by ctypes.

The file's name holds a hash of the source, the command, the compiler and the processor, so no stale one is ever loaded.
It appears by atomic rename.  Without a compiler (Inductor needs one too), or with one that does not know the source's
vectors (GCC 12 and Clang do), the callers keep PyTorch's own products, and that is said once.

A compiled library is code: whoever can write to the cache directory can run code as its user, as with Inductor's cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch

from moepass import caches

log = logging.getLogger("moepass")

FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
#: What is compiled, and what it includes.
SOURCES = ("grouped.cpp", "tiles.h", "vectors.h")
#: Seconds that a compiler may take (3 to 6 were seen).
PATIENCE = 120


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it cannot be had (said once); ``MOEPASS_CPU_KERNELS=0`` turns it off."""
    if os.environ.get("MOEPASS_CPU_KERNELS", "1") == "0" or not _vectors():
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.warning(
            "moepass computes experts with PyTorch's own products, its C++ could not be built: %s", said.strip()
        )
        return None


def _vectors() -> bool:
    """x86 with AVX2 or AVX-512: what the register tiles are made for, and what they were tried on."""
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _compiled() -> Path:
    folder = resources.files("moepass.kernels.cpu")
    sources = {name: folder.joinpath(name).read_bytes() for name in SOURCES}
    command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS]
    compiler = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE)
    facts = [*command, compiler.stdout, _processor()]
    key = hashlib.sha256("\0".join(facts).encode() + b"".join(sources.values())).hexdigest()[:24]
    path = caches.directory() / f"cpu-{key}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _compile(sources, command, path)
    except OSError:  # the cache cannot be written: a library of this process's own
        return _compile(sources, command, Path(tempfile.mkdtemp(prefix="moepass-")) / path.name)


def _compile(sources: Mapping[str, bytes], command: list[str], path: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".cpu-") as folder:
        made = Path(folder) / "grouped.so"
        for name, content in sources.items():
            (Path(folder) / name).write_bytes(content)
        line = [*command, str(Path(folder) / SOURCES[0]), "-o", str(made)]
        subprocess.run(line, capture_output=True, text=True, check=True, timeout=PATIENCE)
        made.replace(path)
    return path


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("model name", "flags")))[:10_000]
