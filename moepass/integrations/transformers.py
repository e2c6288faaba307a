"""Hugging Face transformers: importing this module registers ``moepass`` as an experts implementation.

    import moepass.integrations.transformers
    model.set_experts_implementation("moepass")        # or from_pretrained(..., experts_implementation="moepass")

    moepass.integrations.transformers.use(model)       # the same, and an error where the model has no such interface

The experts' weights are used where they are: nothing is copied, state-dict keys stay, transposed layouts are views.
The activation between the projections is read once per module (``moepass.upcycle.existing.activation``), checked by
numbers, and noted on the module; a change of the module's settings is noticed by the next eager call.

Contract of an experts implementation (``transformers.integrations.moe``)
    in    hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K]; an index of E is not computed
    out   [T, D] in the dtype of hidden_states
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moepass.ops
from moepass import errors, pointwise, reference
from moepass.upcycle.existing.activation import Activation, read_activation
from moepass.upcycle.trace import LAYER_NUMBERS

#: The value of ``experts_implementation``.
NAME = "moepass"
M = TypeVar("M", bound=nn.Module)
_REMEDY = "use another experts implementation for this model, e.g. 'grouped_mm'"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def use(model: M) -> M:
    """Let every experts module of ``model`` run by moepass; returns the model.

    Raises ``UnsupportedExperts`` where the model has no experts with transformers' interface, or some that moepass
    cannot run; nothing has changed then.
    """
    found = interface_experts(model)
    if not found or not hasattr(model, "set_experts_implementation"):
        raise errors.UnsupportedExperts(
            where=type(model).__name__,
            detail="none of its modules has transformers' experts interface",
            remedy="try moepass.convert(model, existing=True)",
        )
    for module in found.values():
        read_experts(module)
    model.set_experts_implementation(NAME)  # type: ignore[operator]
    return model


def interface_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` that dispatch through transformers' experts interface, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, flag) for flag in _FLAGS) and hasattr(module, "down_proj") and hasattr(module, "config")
    }


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a transformers module through ``moepass::experts``.  Registered as ``moepass``."""
    read_experts(self)
    # Read again from the module: Dynamo takes the call above for a constant, and guards on what it reads here.
    activation, interleaved = self._moepass_activation, self._moepass_interleaved
    w_in, w_out = stacked_weights(self)
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    index_TK = top_k_index.reshape(-1, top_k_index.shape[-1])
    weight_TK = top_k_weights.reshape(-1, top_k_weights.shape[-1])
    y_TD = moepass.ops.experts(
        x_TD,
        index_TK,
        weight_TK.to(reference.wide(weight_TK.dtype)),
        w_in,
        w_out,
        (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias) if self.has_bias else None,
        self.down_proj_bias if self.has_bias else None,
        activation=activation,
        interleaved=interleaved,
    )
    return y_TD.reshape(hidden_states.shape).to(hidden_states.dtype)


def stacked_weights(module: Any) -> tuple[Tensor, Tensor]:
    """``w_in [E, n*F, D]`` and ``w_out [E, D, F]`` as views of the module's own."""
    w_in, w_out = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    return (w_in.transpose(1, 2), w_out.transpose(1, 2)) if module.is_transposed else (w_in, w_out)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
def read_experts(module: nn.Module) -> None:
    """Note the activation of an experts module on it, unless the note is there and its settings are the same.

    Raises ``UnsupportedExperts``.  Under Dynamo this runs while tracing, once, outside the graph.
    """
    settings = _settings(module)
    if module.__dict__.get("_moepass_settings") == settings:
        return
    found = _read(module)
    if isinstance(found, str):
        raise errors.UnsupportedExperts(where=type(module).__name__, detail=found, remedy=_REMEDY)
    module.__dict__["_moepass_activation"] = found.text
    module.__dict__["_moepass_interleaved"] = found.interleaved
    module.__dict__["_moepass_settings"] = settings


def _settings(module: nn.Module) -> Hashable:
    """What the activation may depend on: plain attributes, and the activation module or function by identity."""
    plain = (bool, int, float, str, type(None))
    own = {name: value for name, value in module.__dict__.items() if not name.startswith("_") and name != "training"}
    act = getattr(module, "act_fn", None)
    return (
        type(module),
        id(act),
        *((name, value) for name, value in own.items() if isinstance(value, plain) and name not in LAYER_NUMBERS),
    )


def _read(module: Any) -> Activation | str:
    if module.has_post_expert_norm:
        return "it normalises each expert's output (has_post_expert_norm)"
    w_in, w_out = stacked_weights(module)
    if not isinstance(w_in, Tensor) or not w_in.is_floating_point() or w_in.dtype.itemsize < 2:
        return f"its weights are {getattr(w_in, 'dtype', type(w_in))}; dequantise them first"
    if w_in.dim() != 3 or w_out.dim() != 3:
        return (
            f"its weights have the shapes {tuple(w_in.shape)} and {tuple(w_out.shape)}, not [E, n*F, D] and [E, D, F]"
        )
    fn = module._apply_gate if module.has_gate else module.act_fn
    found = read_activation(fn, w_in.shape[1])
    if isinstance(found, str):
        return found
    n = pointwise.n_inputs(found.text)
    E, rows, D = w_in.shape
    if tuple(w_out.shape) != (E, D, rows // n):
        return f"its weights have the shapes {tuple(w_in.shape)} and {tuple(w_out.shape)}, which do not fit together"
    return found


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
