"""What runs around a forward: DistributedDataParallel, FSDP2, a backward, the memory that it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from moepass import errors
from moepass._compat.lost import GONE, lost


def inside_ddp() -> bool:
    """Whether a DistributedDataParallel forward is running: the compile in progress is for its module."""
    if not torch.distributed.is_available():
        return False
    from torch.nn.parallel import DistributedDataParallel

    try:
        return DistributedDataParallel._get_active_ddp_module() is not None
    except GONE:
        lost("see whether DDP runs", "every model of a process group is taken for DDP's, and left dense")
        return torch.distributed.is_initialized()


def ignored_by_ddp(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Tell DistributedDataParallel to leave these parameters of a model alone (others that it was told of stay so)."""
    from torch.nn.parallel import DistributedDataParallel

    every = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, every)


def fsdp_unsharded() -> frozenset[int]:
    """Identities of the plain Parameters that FSDP2 puts in the place of its shards while a module runs.

    They last from one all-gather to the next and look like any other Parameter; only their owner knows.
    """
    if "torch.distributed.fsdp._fully_shard" not in sys.modules:
        return frozenset()
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except GONE as error:
        what = "tell FSDP2's gathered weights from a model's own"
        raise errors.MissingCapability(capability=what, detail=error) from None

    found: set[int] = set()
    for reference in list(_module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)  # one group, by another name, before torch 2.12
        if groups is None:
            groups = [getattr(state, "_fsdp_param_group", None)]
        params = [p for group in groups if group is not None for p in group.fsdp_params]
        found.update(id(p._unsharded_param) for p in params if hasattr(p, "_unsharded_param"))
    return frozenset(found)


def inside_backward() -> bool:
    """Whether autograd is running a backward on this thread: a forward in it is activation checkpointing's second."""
    try:
        return bool(torch._C._current_graph_task_id() != -1)
    except GONE as error:
        raise errors.MissingCapability(capability="tell a recomputation from a forward", detail=error) from None


def peak_bytes(step: Callable[[], Any], device: str) -> int | None:
    """Most memory that tensors held at a time while ``step`` ran, above what they held before; None: not known.

    CPU: from the allocations that torch's profiler records (the old one: the new one talks to stderr).
    """
    if device != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        step()
        torch.accelerator.synchronize()
        return max(0, int(torch.accelerator.max_memory_allocated()) - before)
    from torch.autograd import profiler

    profile, autograd = cast(Any, profiler), cast(Any, torch.autograd)
    try:
        experimental = torch._C._profiler._ExperimentalConfig()
        state = profile.ProfilerState.CPU
        autograd._enable_profiler_legacy(profile.ProfilerConfig(state, False, True, False, False, False, experimental))
    except (AttributeError, RuntimeError, TypeError):  # gone, changed, or somebody is profiling this process
        return None
    try:
        step()
    finally:
        records = autograd._disable_profiler_legacy()
    held = most = 0
    for record in (record for thread in records for record in thread if record.kind() == "memory_alloc"):
        held += record.cpu_memory_usage()
        most = max(most, held)
    return most


# --- processors ------------------------------------------------------------------------------------------------------


def cpu_has_bf16_products() -> bool:
    """Whether the CPU multiplies bfloat16 natively (AVX512-BF16 or AMX); False where torch does not say."""
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except GONE:
        return False
