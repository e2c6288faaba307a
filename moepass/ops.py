"""The semantic ops of moepass, as ``torch.library`` ops.

``moepass::router_logits(x_TD, weight_ED, bias_E?) -> logits_TE``
    Router projection in float32 (float64 for float64 inputs), under autocast too.
``moepass::route(logits_TE, top_k, score, score_first, normalize?, scale) -> (index_TK, weight_TK)``
    ``moepass.reference.route`` as one node, for graphs that the backend rewrites (``nn.Router`` is plain PyTorch).
``moepass::experts(x_TD, index_TK, weight_TK, w_in, w_out, b_in?, b_out?, activation, ...) -> y_TD``
    The expert computation, whatever the way of executing it.  ``moepass.reference.experts`` defines its value.
``moepass::experts_ep(..., groups, form, buffer_factor, tokens, mean, tp, chunks, places, shared)``
    ``-> (y_TD, dropped, s_TD)``: the same over the ranks of process groups, each with E/P of the experts
    (``moepass.lowering.ep``), and beside them a shared expert.  ``places`` keeps the ranks' compiled graphs apart.

All are CompositeImplicitAutograd: one node in the graphs of Dynamo and torch.export, decomposed by AOTAutograd with its
gradients, so eager mode, plain Inductor and export run them too.  The backend replaces ``experts`` by the op of the
lowering that it chose (``moepass.lowering.inline``), which has the same schema.

A custom op's body is not part of the compile caches' keys: a change of meaning needs a change of name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepass import _compat, reference
from moepass.spec import RouterSpec

#: After the tokens and their routing: the fields of ``moepass.lowering.base.ExpertArgs``, in their order.
SCHEMA = (
    "(Tensor x_TD, Tensor index_TK, Tensor weight_TK, Tensor w_in, Tensor w_out, Tensor? b_in, Tensor? b_out, "
    "str activation, float dropout, float capacity_factor, str drop_policy, bool interleaved) -> Tensor"
)

EP_SCHEMA = SCHEMA.removesuffix(") -> Tensor") + (
    ", str[] groups, str form, float buffer_factor, int tokens, bool mean, str[] tp, int chunks, int[] places, "
    "Tensor[] shared)"
    " -> (Tensor, Tensor, Tensor)"
)

library = torch.library.Library("moepass", "DEF")
library.define("router_logits(Tensor x_TD, Tensor weight_ED, Tensor? bias_E) -> Tensor")
library.define(
    "route(Tensor logits_TE, int top_k, str score, bool score_first, float? normalize, float scale) -> (Tensor, Tensor)"
)
library.define("experts" + SCHEMA)
library.define("experts_ep" + EP_SCHEMA)


def _router_logits(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    operands = (x_TD.to(wide), weight_ED.to(wide), None if bias_E is None else bias_E.to(wide))
    if not autocast_is_on(x_TD.device.type):
        return F.linear(*operands)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(*operands)


def autocast_is_on(device: str) -> bool:
    """Whether autocast is in force for a device type; the meta device has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _route(
    logits_TE: Tensor, top_k: int, score: str, score_first: bool, normalize: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    spec = RouterSpec.model_construct(
        top_k=top_k,
        score=score,  # type: ignore[arg-type]  # an op's schema knows no Literal
        score_first=score_first,
        normalize=normalize,
        scale=scale,
    )
    return reference.route(logits_TE, spec)


def _experts(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *rest: Any) -> Tensor:
    # The op's default body is the planner's choice; the import waits for the call to keep the layers one-way.
    from moepass.lowering.base import ExpertArgs
    from moepass.lowering.eager import run

    return run(x_TD, index_TK, weight_TK, ExpertArgs(*rest))


def _experts_ep(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from moepass.lowering.base import ExpertArgs
    from moepass.lowering.ep.run import run, shapes
    from moepass.lowering.ep.settings import Settings, Tokens

    given = Tokens(x_TD, index_TK, weight_TK)
    count, shared = len(dataclasses.fields(ExpertArgs)), rest[-1]
    args, settings = ExpertArgs(*rest[:count]), Settings.of(*rest[count:-1])
    compute = shapes if _compat.only_shapes_matter(x_TD) else run
    return compute(given, args, settings, shared)


library.impl("router_logits", _router_logits, "CompositeImplicitAutograd")
library.impl("route", _route, "CompositeImplicitAutograd")
library.impl("experts", _experts, "CompositeImplicitAutograd")
library.impl("experts_ep", _experts_ep, "CompositeImplicitAutograd")


def router_logits(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in float32 whatever the inputs' dtype or autocast say: ``[T, D] -> [T, E]``."""
    logits: Tensor = torch.ops.moepass.router_logits(x_TD, weight_ED, bias_E)
    return logits


def experts(
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    activation: str,
    dropout: float = 0,
    capacity_factor: float | None = None,
    drop_policy: str = "position",
    interleaved: bool = False,
) -> Tensor:
    """``y_t = sum_k weight[t,k] * expert_{index[t,k]}(x_t)`` -> ``[T, D]`` in x's dtype (the autocast dtype under it).

    ``index_TK`` int64 or int32, ``weight_TK`` float32; ``w_in [E, n*F, D]`` gate rows first (``interleaved``:
    alternating), ``w_out [E, D, F]``, ``b_in [E, n*F]``, ``b_out [E, D]``.  Any strides: transposed layouts are views.
    ``dropout`` is the probability on the hidden activations: pass 0 in evaluation.  ``capacity_factor=None`` keeps
    every assignment; otherwise each expert takes ``max(1, ceil(cf*T*K/E))`` rows by ``drop_policy``.

    **Sentinels**: a pair whose index lies outside ``0..E-1`` (we write E) is not computed.  It adds nothing to the
    output, takes no capacity, and gives its weight a zero gradient; a token without any expert gives zero and may hold
    anything.  Whatever drops pairs before the op (token masks, ``moepass.nn.dispatch``) writes them.
    """
    # The defaults are no floats: Dynamo would make symbolic floats of them under dynamic=True and trace twice.
    y_TD: Tensor = torch.ops.moepass.experts(
        x_TD, index_TK, weight_TK, w_in, w_out, b_in, b_out,
        activation, dropout, capacity_factor or 0, drop_policy, interleaved,
    )  # fmt: skip
    return y_TD


def experts_ep(
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """``experts_ep_beside`` without a shared expert: ``(y_TD, dropped)``."""
    return experts_ep_beside(x_TD, index_TK, weight_TK, w_in, w_out, b_in, b_out, **settings)[:2]


def experts_ep_beside(
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    activation: str,
    groups: list[str],
    form: str,
    dropout: float = 0,
    capacity_factor: float | None = None,
    drop_policy: str = "position",
    interleaved: bool = False,
    buffer_factor: float | None = None,
    tokens: int = 0,
    mean: bool = True,
    tp: Sequence[str] = (),
    chunks: int = 1,
    places: Sequence[int] | None = None,
    shared: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """``experts`` over P ranks, rank r with the experts ``r*E/P .. (r+1)*E/P - 1``: ``(y_TD, dropped [], shared_TD)``.

    Every rank of the groups makes the same call on its own tokens (``form="replicated"``: on the same tokens) with
    indices of all E experts.  Together they compute what ``experts`` computes of all tokens in the order of the ranks:
    capacity, too, is counted over all of them.  ``dropped`` (int64) counts this rank's pairs that found no room under
    ``buffer_factor``; 0 otherwise.  ``shared``: nothing, or ``(x, w_in, w_out)`` of a dense expert, whose output is
    computed while rows travel.  The other arguments: ``moepass.lowering.ep.settings.Settings``; the ranks of ``tp``
    (one group, or none) hold the same tokens, and of each projection the same part of F.  ``places``: this process's
    ``_compat.places`` in groups and tp, found where None: compile caches must not give one rank the graph of another.
    """
    y_TD, dropped, shared_TD = torch.ops.moepass.experts_ep(
        x_TD, index_TK, weight_TK, w_in, w_out, b_in, b_out,
        activation, dropout, capacity_factor or 0, drop_policy, interleaved,
        groups, form, buffer_factor or 0, tokens, mean, list(tp), chunks,
        list(_compat.places([*groups, *tp]) if places is None else places), list(shared),
    )  # fmt: skip
    return y_TD, dropped, shared_TD
