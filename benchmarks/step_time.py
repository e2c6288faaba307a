"""Step time of the default rewrite beside the dense model under Inductor.

Three sides, timed in turns in one process: the dense model under Inductor; the same model with one line
(``backend="moepass"``); a copy converted by ``moepass.convert`` and compiled with ``backend="moepass"``.  The default
init keeps the FLOPs, so what is seen is the price of routing.  Target (issue 2): at most 1.15x of dense at T >= 512,
D=1024, F=4096.

    python -m benchmarks.step_time [--tokens 512,2048] [--dtypes float32,bfloat16] [--models block,stack]
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moepass
from benchmarks import common

DENSE, ONE_LINE, CONVERTED = "dense, Inductor", "moepass, one line", "moepass.convert"


class GatedFFN(nn.Module):
    """SwiGLU: ``[T, D] -> [T, D]``."""

    def __init__(self, D: int, F: int) -> None:
        super().__init__()
        self.gate = nn.Linear(D, F, bias=False)
        self.up = nn.Linear(D, F, bias=False)
        self.down = nn.Linear(F, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """A pre-norm transformer layer with causal attention: ``[1, T, D] -> [1, T, D]``."""

    def __init__(self, D: int, F: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(D), nn.RMSNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.ffn = GatedFFN(D, F)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return x + self.ffn(self.norm_2(x))


def build(model: str, D: int, F: int, dtype: torch.dtype) -> nn.Module:
    """``block``: one FFN; ``stack``: two transformer layers."""
    torch.manual_seed(0)
    if model == "block":
        return nn.Sequential(GatedFFN(D, F)).to(dtype)
    return nn.Sequential(*(Layer(D, F, heads=max(1, D // 64)) for _ in range(2))).to(dtype)


def sides(model: nn.Module) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """The three forms with their compiled callables, each with its own parameters."""
    dense, one_line, converted = model, copy.deepcopy(model), copy.deepcopy(model)
    moepass.convert(converted)
    return {
        DENSE: (dense, torch.compile(dense)),
        ONE_LINE: (one_line, torch.compile(one_line, backend="moepass")),
        CONVERTED: (converted, torch.compile(converted, backend="moepass")),
    }


def forward(_model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """One forward under no_grad."""

    def step() -> None:
        with torch.no_grad():
            call(x)

    return step


def forward_backward(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """One forward and backward from cleared gradients (as after ``optimizer.zero_grad()``), to all parameters and x."""
    x = x.clone().requires_grad_()

    def step() -> None:
        for parameter in (x, *model.parameters(), *attached(model)):
            parameter.grad = None
        call(x).float().square().mean().backward()

    return step


def attached(model: nn.Module) -> list[nn.Parameter]:
    """The one-line form's parameters, once it has run."""
    try:
        return list(moepass.moe_parameters(model))
    except moepass.errors.NoState:
        return []


def measure(model: str, tokens: int, D: int, F: int, dtype: str, mode: str, repeats: int) -> dict[str, Any]:
    """One row of the table: medians in milliseconds and ratios to dense."""
    torch.compiler.reset()
    gc.collect()
    kind = getattr(torch, dtype)
    module = build(model, D, F, kind)
    x = torch.randn(1, tokens, D).to(kind)
    wrap = forward if mode == "forward" else forward_backward
    calls = {name: wrap(form, call, x) for name, (form, call) in sides(module).items()}
    timings = common.interleaved(calls, repeats)
    report = moepass.last_plan()
    row: dict[str, Any] = {"model": model, "T": tokens, "dtype": dtype, "mode": mode}
    row["lowering"] = "none" if report is None else ", ".join(sorted({s.lowering or s.status for s in report.sites}))
    row |= {f"{name} [ms]": timing.median * 1e3 for name, timing in timings.items()}
    row |= {f"{name} / dense": timings[name].median / timings[DENSE].median for name in (ONE_LINE, CONVERTED)}
    return row


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure the grid and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="512,2048", help="comma-separated T")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--models", default="block,stack")
    parser.add_argument("--modes", default="forward,forward+backward")
    parser.add_argument("-D", type=int, default=1024, help="model width")
    parser.add_argument("-F", type=int, default=4096, help="hidden width of the dense FFN")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args(argv)

    about, rows = common.machine(), []
    for model in args.models.split(","):
        for dtype in args.dtypes.split(","):
            for mode in args.modes.split(","):
                for tokens in map(int, args.tokens.split(",")):
                    rows.append(measure(model, tokens, args.D, args.F, dtype, mode, args.repeats))
                    print(common.table(rows[-1:]), flush=True)
    return common.write(
        "step_time",
        rows,
        title=f"Step time, D={args.D}, F={args.F}: the default rewrite beside dense under Inductor",
        notes=[
            f"medians of {args.repeats} calls; the sides take turns in one process",
            "target: at most 1.15x of dense",
        ],
        about=about,
        out=args.out,
    )


if __name__ == "__main__":
    main()
