"""The only module that touches private torch APIs or differences between torch 2.11 and 2.13.

Every function here names what it needs and what it does where torch does not have it.  It is longer than other files
because it is the one place that a new torch version has to be held against.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._guards import TracingContext
from torch._ops import OpOverload as OpOverload  # the type of ``torch.ops.<library>.<op>.default``
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moepass import errors

CompiledFn = Callable[..., Any]

log = logging.getLogger("moepass")

#: How a private API shows that this torch does not have it.
_GONE = (ImportError, AttributeError)


@functools.cache
def _lost(capability: str, instead: str) -> None:
    """Say once that this torch lacks what a capability needs, and what happens instead."""
    log.warning("torch %s lacks what moepass needs to %s: %s", torch.__version__, capability, instead)


# --- graphs that Dynamo owns -----------------------------------------------------------------------------------------


def copy_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """An owned copy of a graph that Dynamo handed over, sub-graphs included.

    Keeps ``node.meta``, ``_dynamo_source`` of placeholders, ``gm.meta`` and ``_param_name_to_source``: without them
    AOTAutograd demotes parameters from static inputs (reference/compiler.md, finding 7).
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, mapping))
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        new.meta = dict(old.meta)
    copied = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    copied.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_checkpoint_context_fn"):
        if hasattr(gm, name):
            setattr(copied, name, getattr(gm, name))
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule) and hasattr(copied, name):
            setattr(copied, name, copy_dynamo_graph(child))
    return copied


def add_static_placeholder(graph: fx.Graph, name: str, example: FakeTensor | None, *, top_level: bool) -> fx.Node:
    """A new input after the existing ones, counted as static (a weight) by AOTAutograd and CUDA graphs."""
    last = [n for n in graph.nodes if n.op == "placeholder"]
    anchor = last[-1] if last else None
    with graph.inserting_after(anchor) if anchor is not None else graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(name)
    if top_level:
        node._dynamo_source = None
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    if example is not None:
        node.meta["example_value"] = example
    return node


def graph_fake_mode(gm: fx.GraphModule) -> FakeTensorMode | None:
    """The fake mode of the graph's own example values (not the backend's fresh one: finding 8)."""
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def fake_like(mode: FakeTensorMode, tensor: Tensor) -> FakeTensor:
    """A fake of ``tensor`` with static shape in ``mode``."""
    return mode.from_tensor(tensor, static_shapes=True)


def static_example(tensor: Tensor) -> Tensor:
    """An example input with static shape for the backend (by default dimensions without a source become symbols)."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return tensor
    return fake_like(context.fake_mode, tensor)


def readable(gm: fx.GraphModule) -> str:
    """The graph as annotated Python source."""
    return str(gm.print_readable(print_output=False))


def is_fake(value: object) -> bool:
    """Whether a value is a FakeTensor."""
    return isinstance(value, FakeTensor)


def recompute_meta(node: fx.Node, mode: FakeTensorMode) -> None:
    """Set ``meta["example_value"]`` of a new call_function node by running it on its arguments' example values."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
    with mode, torch.enable_grad():
        node.meta["example_value"] = cast(Callable[..., Any], node.target)(*args, **kwargs)


def trace_function(fn: Callable[[Tensor], Any], example: Tensor) -> fx.Graph:
    """The aten graph of ``fn(example)``, run for real; ``meta["val"]`` holds the values' shapes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    # A function of exactly one argument: bound methods and modules confuse the tracer.
    return make_fx(lambda x: fn(x))(example).graph


# --- sizes -----------------------------------------------------------------------------------------------------------


def is_unbacked(size: int | torch.SymInt) -> bool:
    """Whether a size depends on data, so that comparing it would fail."""
    if isinstance(size, int):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(size))


def size_bounds(size: int | torch.SymInt) -> tuple[int, int | None]:
    """Proven ``(low, high)`` of a size; ``high=None`` where unbounded."""
    if isinstance(size, int):
        return size, size
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    low = max(0, int(bounds.lower)) if bounds.lower.is_finite else 0
    high = int(bounds.upper) if bounds.upper.is_finite and bounds.upper < 2**48 else None
    return low, high


def size_hint(size: int | torch.SymInt) -> int | None:
    """The size of the current example without installing a guard; None if unbacked."""
    if isinstance(size, int):
        return size
    return None if is_unbacked(size) else int(size.node.hint)


def known_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal whatever the values of their symbols.  Installs no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def size_text(size: int | torch.SymInt) -> str:
    """``s77`` or ``512``."""
    return str(size)


# --- compilers behind ours -------------------------------------------------------------------------------------------


def compile_with(inner: str, gm: fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]) -> CompiledFn:
    """Hand the graph to an inner compiler.  ``inductor`` takes config patches; any other is a registered backend."""
    if inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return cast(CompiledFn, compile_fx(gm, inputs, config_patches=dict(patches)))
    from torch._dynamo.backends.registry import lookup_backend

    return cast(CompiledFn, lookup_backend(inner)(gm, list(inputs)))


def control_flow_exceptions() -> tuple[type[BaseException], ...]:
    """Exceptions by which a compile asks Dynamo for something; they are not failures and must pass through."""
    from torch._dynamo import exc

    names = ("RestartAnalysis", "SkipFrame", "TensorifyScalarRestartAnalysis", "UncapturedHigherOrderOpError")
    return tuple(getattr(exc, name) for name in names if hasattr(exc, name))


def inner_compilers() -> list[str]:
    """Names that ``compile_with`` accepts."""
    from torch._dynamo.backends.registry import list_backends

    return sorted({"inductor", "aot_eager", "eager", *list_backends()} - {"moepass"})


def inductor_options() -> set[str]:
    """Every option that Inductor accepts in ``torch.compile(options=...)``."""
    from torch._inductor import list_options

    return set(list_options())


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """Inductor's config patches for ``torch.compile(mode=...)``."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def plan_key_patches(key: str, user: Mapping[str, Any]) -> dict[str, Any]:
    """The user's patches with ``key`` in Inductor's and AOTAutograd's cache keys; the user's passes still run."""
    try:
        from torch._inductor import config
        from torch._inductor.custom_graph_pass import CustomGraphPass
    except _GONE:
        _lost("keep plans apart in the compile caches", "the caches are off")
        return {**user, "force_disable_caches": True}

    class PlanKey(CustomGraphPass):
        """Changes nothing; its identity is the plan."""

        def __call__(self, graph: fx.Graph) -> None:  # noqa: ARG002 -- the signature of a pass
            return

        def uuid(self) -> str:
            return key

    existing = user.get("post_grad_custom_post_pass", getattr(config, "post_grad_custom_post_pass", None))
    keyed = PlanKey() if existing is None else _ChainedPass.of(existing, key)
    return {**user, "post_grad_custom_post_pass": keyed}


class _ChainedPass:
    """The user's own post-grad passes, with the plan in the identity."""

    @staticmethod
    def of(existing: Any, key: str) -> Any:
        from torch._inductor.custom_graph_pass import CustomGraphPass

        passes = list(existing) if isinstance(existing, (list, tuple)) else [existing]

        class Chained(CustomGraphPass):
            def __call__(self, graph: fx.Graph) -> None:
                for one in passes:
                    one(graph)

            def uuid(self) -> Any:
                ids = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in passes]
                return None if None in ids else f"{key}:{ids}"

        return Chained()


@contextlib.contextmanager
def many_recompiles() -> Iterator[None]:
    """Lift Dynamo's recompile limits (explain compiles the same code afresh each time)."""
    from torch._dynamo import config

    with config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16):
        yield


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Put an artifact into TORCH_TRACE (read by tlparse)."""
    try:
        from torch._logging._internal import trace_structured
    except _GONE:
        _lost("write TORCH_TRACE artifacts", "they are left out")
        return
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
    )


def inside_ddp() -> bool:
    """Whether a DistributedDataParallel forward is running: the compile in progress is for its module."""
    if not torch.distributed.is_available():
        return False
    from torch.nn.parallel import DistributedDataParallel

    try:
        return DistributedDataParallel._get_active_ddp_module() is not None
    except _GONE:
        _lost("see whether DDP runs", "every model of a process group is taken for DDP's, and left dense")
        return torch.distributed.is_initialized()


def fsdp_unsharded() -> frozenset[int]:
    """Identities of the plain Parameters that FSDP2 puts in the place of its shards while a module runs.

    They last from one all-gather to the next and look like any other Parameter; only their owner knows.
    """
    if "torch.distributed.fsdp._fully_shard" not in sys.modules:
        return frozenset()
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except _GONE as error:
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
    except _GONE as error:
        raise errors.MissingCapability(capability="tell a recomputation from a forward", detail=error) from None


@contextlib.contextmanager
def side_effects_once() -> Iterator[None]:
    """Let compiled code keep what it appends to lists: under activation checkpointing in the first forward only.

    Lifts the recompile limits too, for the lengths of those lists.
    """
    from torch._dynamo import config

    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"  # otherwise Dynamo refuses the mutation
    with many_recompiles(), config.patch({name: True} if hasattr(config, name) else {}):
        yield


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


# --- collectives -----------------------------------------------------------------------------------------------------


def group_size_and_rank(name: str) -> tuple[int, int]:
    """``(ranks, own rank)`` of the process group that functional collectives know by ``name``."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    group = _resolve_process_group(name)  # type: ignore[arg-type]  # not a plain str since torch 2.12
    return group.size(), group.rank()


def everyones(value: Any, groups: Sequence[str]) -> dict[int, Any]:
    """What every rank of a product of groups says, by global rank: an exchange of Python objects.

    Over the groups in turn, so that all ranks hear of all before any can act.  Ranks of a fake group are not there.
    """
    from torch.distributed import all_gather_object, get_backend, get_rank
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    everyone = {get_rank(): value}
    for name in groups:
        group = _resolve_process_group(name)  # type: ignore[arg-type]
        if get_backend(group) == "fake":
            continue
        gathered: list[Any] = [None] * group.size()
        all_gather_object(gathered, everyone, group=group)
        everyone = {rank: said for part in gathered for rank, said in part.items()}
    return everyone


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over a group's ranks, by the functional op; not differentiable."""
    return _waited(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group))


def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """The ranks' tensors (of one shape) one behind the other, by the functional op; not differentiable."""
    return _waited(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group))


def reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """This rank's part of the sum over the ranks, by the functional op; not differentiable."""
    return _waited(torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", size, group))


def all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: str) -> Tensor:
    """Rows to and from every rank of a group, by the functional op; not differentiable."""
    return _waited(torch.ops._c10d_functional.all_to_all_single(x.contiguous(), list(receive), list(send), group))


def _waited(pending: Tensor) -> Tensor:
    return cast(Tensor, torch.ops._c10d_functional.wait_tensor(pending))


def host_sizes(counts: Tensor) -> list[int]:
    """Counts as sizes: a host read; when traced, sizes that depend on data and are known to be no less than 0."""
    sizes: list[int] = counts.tolist()
    for size in sizes:
        torch._check(size >= 0)
    return sizes


def promise(condition: bool) -> None:
    """Tell a trace what is true of sizes that depend on data; checked when it runs."""
    torch._check(condition)


def only_shapes_matter(x: Tensor) -> bool:
    """Whether an op is asked for the shape of its result (Dynamo): nothing is being traced or computed."""
    if not isinstance(x, FakeTensor):
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None


def pretend_host_read(x: Tensor) -> None:
    """On a fake tensor: fail as reading from the host would, where a trace does not allow it (a graph break then)."""
    if not isinstance(x, FakeTensor) or x.fake_mode.shape_env is None:
        return
    with x.fake_mode.shape_env.ignore_fresh_unbacked_symbols():
        x.new_zeros((), dtype=torch.int64).item()


def ignored_by_ddp(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Tell DistributedDataParallel to leave these parameters of a model alone (others that it was told of stay so)."""
    from torch.nn.parallel import DistributedDataParallel

    every = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, every)


def flattened(mesh: Any, dims: Sequence[str]) -> Any:
    """The one-dimensional mesh over several dimensions of a DeviceMesh."""
    return mesh[tuple(d for d in mesh.mesh_dim_names if d in dims)]._flatten()
