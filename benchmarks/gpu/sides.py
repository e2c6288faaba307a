"""Who is measured: moepass's plan, each of its lowerings, Hugging Face's experts, torchtitan's pattern, ScatterMoE.

Every side is a function ``(x_TD, score_TE) -> y_TD`` over the same two weights, routing (``cells.route``) included.
Hugging Face's sides are its own ``OlmoeExperts`` module; "moepass" is ``backend="moepass"`` on that module, as it is.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from benchmarks import common
from benchmarks.gpu.cells import Cell, Shape, route
from moepass.kernels.fused import ops, runner, schedule, schedule_decode
from moepass.kernels.fused.problem import Problem, Target
from moepass.lowering.base import ExpertArgs
from moepass.lowering.eager import run_lowering, workload
from moepass.lowering.plan import Workload
from moepass.lowering.registry import lowerings

OURS = "moepass"
#: Both forms of the fused kernels for a few tokens, whichever the schedule takes: forward only.
STREAMED, TILED = "fused, streamed", "fused, in tiles"
FORMS = (STREAMED, TILED)
Side = Callable[[Tensor, Tensor], Tensor]
_Experts = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_TD, index_TK, weight_TK) -> y_TD
#: A side that would move more than so many bytes of gathered weights is left out; so is one that computes more than so
#: many times the useful FLOPs.
GATHER_LIMIT, WASTE_LIMIT = 8 << 30, 20


@dataclass(frozen=True)
class Bench:
    """The sides of one shape, sharing two parameters."""

    shape: Shape
    w_in: nn.Parameter
    w_out: nn.Parameter
    sides: dict[str, Side]

    @property
    def args(self) -> ExpertArgs:
        """The weights as our lowerings take them."""
        return ExpertArgs(self.w_in, self.w_out, None, None, "swiglu")

    def work(self, cell: Cell, x_TD: Tensor) -> Workload:
        """The planner's view of a cell."""
        return workload(cell.tokens, x_TD, cell.shape.K, self.args, train=cell.train)

    def chosen_for(self, cell: Cell, x_TD: Tensor) -> dict[str, Side]:
        """The sides that make sense here: legal, and not absurdly large."""
        work = self.work(cell, x_TD)
        found = {}
        for name, side in self.sides.items():
            if name in lowerings() and not lowerings()[name].legal(work).legal:
                continue
            if name in FORMS and not _has_forms(cell, work):
                continue
            gathers = "batched_mm" in name or name == "gathered"
            if gathers and work.R * cell.shape.weight_elements * work.itemsize > GATHER_LIMIT:
                continue
            if name == "dense" and cell.tokens > 64 and cell.shape.E / cell.shape.K > WASTE_LIMIT / 10:
                continue
            found[name] = side
        return found


def is_peer(name: str) -> bool:
    """Whether a side is somebody else's."""
    return name != OURS and name not in FORMS and name not in lowerings()


def _has_forms(cell: Cell, work: Workload) -> bool:
    few = not cell.train and cell.tokens <= schedule_decode.MOST_ROWS
    return few and lowerings()["fused"].legal(work).legal


def make(shape: Shape, w_in: Tensor, w_out: Tensor, scattermoe: Path | None) -> Bench:
    """All sides over one copy of the weights."""
    inside, outside = nn.Parameter(w_in), nn.Parameter(w_out)
    bench, sides = Bench(shape, inside, outside, {}), {}
    grouped, batched, loop = (_hf(shape, inside, outside, name) for name in ("grouped_mm", "batched_mm", "eager"))
    for name in lowerings():
        if name != "capacity":  # the spec drops nothing
            sides[name] = partial(_lowering, name, bench.args)
    sides |= {name: partial(_form, name, bench.args) for name in FORMS}
    sides["HF grouped_mm, eager"], sides["HF loop, eager"] = grouped, loop
    sides["permute + F.grouped_mm"] = partial(_titan, inside, outside)
    if scattermoe is not None:
        sides["ScatterMoE"] = _scattermoe(scattermoe, inside, outside)
    bench.sides[OURS] = torch.compile(_routed(grouped, shape.K, "moepass_side"), backend="moepass")
    bench.sides["HF grouped_mm, Inductor"] = torch.compile(_routed(grouped, shape.K, "hf_grouped"))
    bench.sides["HF batched_mm, Inductor"] = torch.compile(_routed(batched, shape.K, "hf_batched"))
    bench.sides.update({name: _routed(experts, shape.K, "eager") for name, experts in sides.items()})
    return bench


def _hf(shape: Shape, w_in: nn.Parameter, w_out: nn.Parameter, implementation: str) -> nn.Module:
    config = OlmoeConfig(
        hidden_size=shape.D, intermediate_size=shape.F, num_experts=shape.E, num_experts_per_tok=shape.K
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = OlmoeExperts(config)
    module.gate_up_proj, module.down_proj = w_in, w_out
    return module


def _routed(experts: _Experts, K: int, name: str) -> Side:
    """Routing, then the experts, in a frame of its own."""

    def call(x_TD: Tensor, score_TE: Tensor) -> Tensor:
        return experts(x_TD, *route(score_TE, K))

    return common.own_frame(call, name)


def _lowering(name: str, args: ExpertArgs, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    return run_lowering(name, x_TD, index_TK, weight_TK, args)


def _form(name: str, args: ExpertArgs, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    operands = ops.Operands(x_TD, index_TK, weight_TK, args.w_in, args.w_out, None, None)
    problem = ops.problem_of(operands, "silu(g)*u", interleaved=False, save=False)
    program = _program(problem, runner.target(x_TD.device), name)
    return runner.run(program, x_TD.shape[0], operands.bindings(), x_TD.device)["y_TD"]


@functools.lru_cache(maxsize=64)
def _program(problem: Problem, target: Target, name: str) -> runner.Runnable:
    if name == STREAMED:
        return runner.prepare(schedule_decode.forward(problem, target))
    return runner.prepare(schedule.forward(problem, schedule.tiles(problem, target), target))


def _titan(w_in: Tensor, w_out: Tensor, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Separate permute, three calls, separate sum: how torchtitan's GroupedExperts uses ``F.grouped_mm``."""
    T, K = index_TK.shape
    flat_R = index_TK.reshape(-1)
    order_R = flat_R.argsort(stable=True)
    ends_E = flat_R.bincount(minlength=w_in.shape[0]).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x_TD[order_R // K], w_in.transpose(1, 2), offs=ends_E).chunk(2, -1)
    y_RD = F.grouped_mm(F.silu(gate) * up, w_out.transpose(1, 2), offs=ends_E)
    y_RD = y_RD.float() * weight_TK.reshape(-1)[order_R].unsqueeze(1)
    back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(T * K, device=order_R.device))
    return y_RD[back_R].view(T, K, -1).sum(1).to(x_TD.dtype)


def _scattermoe(folder: Path, w_in: Tensor, w_out: Tensor) -> _Experts:
    """``folder`` holds the package ``scattermoe`` (github.com/shawntan/scattermoe): carried, never committed."""
    sys.path.insert(0, str(folder))
    ops = importlib.import_module("scattermoe.parallel_experts")

    def side(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        order = ops.flatten_sort_count(index_TK, num_experts=w_in.shape[0])
        h = ops.parallel_linear(x_TD, w_in.permute(0, 2, 1), index_TK.shape[1], *order, grouped_out=True)
        gate, up = h.chunk(2, -1)
        gates_TK = weight_TK.to(x_TD.dtype)
        y_TD: Tensor = ops.parallel_linear(
            F.silu(gate) * up, w_out.permute(0, 2, 1), 1, *order, grouped_in=True, gates=gates_TK
        )
        return y_TD

    return side
