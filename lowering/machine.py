"""Which machine and which software this is: the key of calibrated profiles and measurements."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path

import torch


def describe(device: str) -> dict[str, str]:
    """What a timing on ``device`` depends on: processor, cores, threads, and the versions of torch, triton, moepass."""
    facts = {"device": device, **_versions()}
    if device == "cuda" and torch.cuda.is_available():
        return facts | {
            "processor": torch.cuda.get_device_name(),
            "runtime": str(torch.version.cuda or torch.version.hip),
        }
    return facts | {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def fingerprint(device: str) -> str:
    """Short hash of ``describe``."""
    return hashlib.sha256(json.dumps(describe(device), sort_keys=True).encode()).hexdigest()[:16]


def free_bytes(device: str) -> int | None:
    """Memory that a program may still take on ``device``; None where it is not known."""
    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    if device != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found) * 1024


def one_of_many() -> bool:
    """Whether this process is a rank of a job of several (``torchrun`` says so in ``WORLD_SIZE``)."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


@functools.cache
def _versions() -> dict[str, str]:
    return {name: _version(name) for name in ("torch", "triton", "moepass")}


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _processor() -> str:
    """The processor's model name; /proc/cpuinfo says more than ``platform`` does on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    described = " ".join(fields[key] for key in ("model name", "cpu family", "model", "CPU part") if key in fields)
    return described or platform.processor() or platform.machine()
