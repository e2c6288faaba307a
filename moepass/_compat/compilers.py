"""The compilers behind ours: their registries, options, caches and limits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import fx

from moepass._compat.lost import GONE, lost

CompiledFn = Callable[..., Any]


def compile_with(inner: str, gm: fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]) -> CompiledFn:
    """Hand the graph to an inner compiler.  ``inductor`` takes config patches; any other is a registered backend."""
    if inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return cast(CompiledFn, compile_fx(gm, inputs, config_patches=dict(patches)))
    from torch._dynamo.backends.registry import lookup_backend

    return cast(CompiledFn, lookup_backend(inner)(gm, list(inputs)))


def decompose_for_inductor(ours: Mapping[Any, Callable[..., Any]]) -> None:
    """Add decompositions of our own ops (by overload) to Inductor's, for this process.

    Not by ``compile_fx(decompositions=...)``: a table goes into the cache keys by pickling, which functions refuse.
    """
    try:
        from torch._inductor import decomposition

        if ours.keys() <= decomposition.decompositions.keys():
            return
        decomposition.decompositions.update(ours)
        decomposition.fast_random_decomps.cache_clear()
    except GONE:
        lost("let Inductor fuse the products of few rows", "they stay custom ops")


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
    except GONE:
        lost("keep plans apart in the compile caches", "the caches are off")
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


@contextlib.contextmanager
def side_effects_once() -> Iterator[None]:
    """Let compiled code keep what it appends to lists: under activation checkpointing in the first forward only.

    Lifts the recompile limits too, for the lengths of those lists.
    """
    from torch._dynamo import config

    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"  # otherwise Dynamo refuses the mutation
    with many_recompiles(), config.patch({name: True} if hasattr(config, name) else {}):
        yield


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Put an artifact into TORCH_TRACE (read by tlparse)."""
    try:
        from torch._logging._internal import trace_structured
    except GONE:
        lost("write TORCH_TRACE artifacts", "they are left out")
        return
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
    )
