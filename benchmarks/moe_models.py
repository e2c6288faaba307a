"""Existing Hugging Face MoE models: moepass beside HF's own experts implementations, all under torch.compile.

The sides take turns in one process and compute the same function of the same weights: HF's ``grouped_mm`` and
``batched_mm`` under Inductor, HF's eager loop over experts (not compiled: it breaks the graph), and
``backend="moepass"`` on the ``grouped_mm`` model as it comes.  Target (issue 3): at T >= 256 on CPU at least as fast
as the fastest of the others.

    python -m benchmarks.moe_models [--families olmoe,mixtral] [--tokens 256,1024] [--modes forward,forward+backward]
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import moepass
from benchmarks import common

OURS = "moepass"
#: Two layers of widths that a CPU can time; E and K are the families' own, or a quarter of them.
_COMMON = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512}
CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {"hidden_size": 512, "intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8},
    "mixtral": {"hidden_size": 512, "intermediate_size": 1792, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "hidden_size": 512,
        "moe_intermediate_size": 192,
        "intermediate_size": 1024,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "head_dim": 64,
    },
    "gpt_oss": {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "head_dim": 64,
    },
}


def build(family: str, experts: str, dtype: torch.dtype) -> nn.Module:
    """A random model of one family with one of HF's experts implementations."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **_COMMON, **CONFIGS[family])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=experts)
    for name, parameter in model.named_parameters():
        if "router" in name or name.endswith("gate.weight"):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)  # logits of about 1: a router that chooses
    return model


def sides(family: str, dtype: torch.dtype, batched: bool) -> dict[str, tuple[nn.Module, Callable[..., Any]]]:
    """Model and callable of every side, each with its own copy of equal weights."""
    grouped = build(family, "grouped_mm", dtype)
    eager = copy.deepcopy(grouped)
    eager.set_experts_implementation("eager")
    ours = copy.deepcopy(grouped)
    found = {
        "grouped_mm, Inductor": (grouped, torch.compile(grouped)),
        "loop, eager": (eager, eager),
        OURS: (ours, torch.compile(ours, backend="moepass")),
    }
    if batched:  # it gathers the weights of every (token, expert) pair
        rival = copy.deepcopy(grouped)
        rival.set_experts_implementation("batched_mm")
        found["batched_mm, Inductor"] = (rival, torch.compile(rival))
    return found


def step(model: nn.Module, call: Callable[..., Any], ids: Tensor, train: bool) -> Callable[[], object]:
    """One forward under no_grad, or one forward and backward from cleared gradients."""

    def run() -> None:
        if not train:
            with torch.no_grad():
                call(input_ids=ids, use_cache=False)
            return
        for parameter in model.parameters():
            parameter.grad = None
        call(input_ids=ids, use_cache=False).logits.float().square().mean().backward()

    return run


def pair_bytes(family: str, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the weights that ``batched_mm`` gathers in one layer."""
    c = CONFIGS[family]
    F = c.get("moe_intermediate_size", c["intermediate_size"])
    return tokens * int(c["num_experts_per_tok"]) * 3 * int(c["hidden_size"]) * int(F) * dtype.itemsize


def measure(family: str, tokens: int, dtype: str, mode: str, repeats: int) -> dict[str, Any]:
    """One row of the table: medians in milliseconds, and the best of the others over ours (above 1: ours is faster)."""
    torch.compiler.reset()
    gc.collect()
    kind, train = getattr(torch, dtype), mode != "forward"
    ids = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(0))
    batched = pair_bytes(family, tokens, kind) < 2 << 30
    calls = {name: step(m, call, ids, train) for name, (m, call) in sides(family, kind, batched).items()}
    timings = common.interleaved(calls, repeats)
    report = moepass.last_plan()
    lowered = [] if report is None else [s for s in report.sites if s.status == "lowered"]
    rivals = {name: t.median for name, t in timings.items() if name != OURS}
    best = min(rivals, key=rivals.__getitem__)
    row: dict[str, Any] = {"family": family, "T": tokens, "dtype": dtype, "mode": mode}
    row["lowering"] = ", ".join(sorted({str(s.lowering) for s in lowered})) or "NOT REWRITTEN"
    for name in ("grouped_mm, Inductor", "batched_mm, Inductor", "loop, eager", OURS):
        row[f"{name} [ms]"] = timings[name].median * 1e3 if name in timings else "over 2 GiB"
    return row | {"best other": best, "best other / moepass": rivals[best] / timings[OURS].median}


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure the grid and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(CONFIGS))
    parser.add_argument("--tokens", default="256,1024", help="comma-separated T")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--modes", default="forward,forward+backward")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args(argv)

    about, rows = common.machine(), []
    for family in args.families.split(","):
        for dtype in args.dtypes.split(","):
            for mode in args.modes.split(","):
                for tokens in map(int, args.tokens.split(",")):
                    rows.append(measure(family, tokens, dtype, mode, args.repeats))
                    print(common.table(rows[-1:]), flush=True)
    return common.write(
        "moe_models",
        rows,
        title="Existing Hugging Face MoE models, two layers: moepass beside HF's experts implementations",
        notes=[
            f"medians of {args.repeats} calls of the whole model; the sides take turns in one process",
            "target: at least 1.0 of the fastest other side at T >= 256",
        ],
        about=about,
        out=args.out,
    )


if __name__ == "__main__":
    main()
