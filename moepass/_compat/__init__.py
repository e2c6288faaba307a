"""The only package that touches private torch APIs or differences between torch 2.11 and 2.13.

Every function names what it needs and what it does where torch does not have it (``lost``).  Callers say
``_compat.<function>``, whichever file it is in: a new torch version is held against this folder alone.
"""

from __future__ import annotations

from torch._ops import OpOverload  # the type of ``torch.ops.<library>.<op>.default``

from moepass._compat.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    begin_all_gather,
    begin_all_reduce,
    begin_all_to_all,
    begin_reduce_scatter,
    everyones,
    flattened,
    group_size_and_rank,
    places,
    wait,
)
from moepass._compat.compilers import (
    CompiledFn,
    compile_with,
    control_flow_exceptions,
    decompose_for_inductor,
    inductor_mode_options,
    inductor_options,
    inner_compilers,
    many_recompiles,
    plan_key_patches,
    side_effects_once,
    trace_artifact,
)
from moepass._compat.graphs import (
    add_static_placeholder,
    copy_dynamo_graph,
    fake_like,
    graph_fake_mode,
    is_fake,
    readable,
    recompute_meta,
    static_example,
    trace_function,
)
from moepass._compat.runtime import (
    cpu_has_bf16_products,
    fsdp_unsharded,
    ignored_by_ddp,
    inside_backward,
    inside_ddp,
    peak_bytes,
)
from moepass._compat.sizes import (
    host_sizes,
    is_unbacked,
    known_equal,
    only_shapes_matter,
    pretend_host_read,
    promise,
    size_bounds,
    size_hint,
    size_text,
)

__all__ = [
    "CompiledFn",
    "OpOverload",
    "add_static_placeholder",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "begin_all_gather",
    "begin_all_reduce",
    "begin_all_to_all",
    "begin_reduce_scatter",
    "compile_with",
    "control_flow_exceptions",
    "copy_dynamo_graph",
    "cpu_has_bf16_products",
    "decompose_for_inductor",
    "everyones",
    "fake_like",
    "flattened",
    "fsdp_unsharded",
    "graph_fake_mode",
    "group_size_and_rank",
    "host_sizes",
    "ignored_by_ddp",
    "inductor_mode_options",
    "inductor_options",
    "inner_compilers",
    "inside_backward",
    "inside_ddp",
    "is_fake",
    "is_unbacked",
    "known_equal",
    "many_recompiles",
    "only_shapes_matter",
    "peak_bytes",
    "places",
    "plan_key_patches",
    "pretend_host_read",
    "promise",
    "readable",
    "recompute_meta",
    "side_effects_once",
    "size_bounds",
    "size_hint",
    "size_text",
    "static_example",
    "trace_artifact",
    "trace_function",
    "wait",
]
