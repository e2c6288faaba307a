"""Train a small dense language model, upcycle copies of it, and continue all of them at equal steps.

The text is Python's own standard library, read as bytes; every 16th file is held out.  One dense Llama is trained
first.  Then each arm starts from those weights, sees the same batches in the same order, and takes the same number of
steps:

    dense            goes on as it is
    virtual_groups   moepass's default: 8 half-width experts, top-2, the FLOPs of the dense model, exact at step 0
    copy             8 full-width copies, top-2: twice the feed-forward FLOPs, exact at step 0

    python examples/train_tiny.py [--steps 1500] [--pretrain 2000] [--arms dense,virtual_groups,copy]
"""

from __future__ import annotations

import argparse
import copy
import math
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import moepass
from moepass.spec import LossSpec, MoESpec

console = Console()
#: Coefficient of the load-balancing loss (Switch Transformer's, as in OLMoE), the mean over the layers.
BALANCE = 0.01


@dataclass(frozen=True)
class Corpus:
    """Byte sequences, int64 ``[N]`` in 0..255: training text and held-out text from other files."""

    train: Tensor
    held_out: Tensor


def read_corpus(max_bytes: int) -> Corpus:
    """The standard library's sources in name order; every 16th file is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: dict[bool, bytearray] = {True: bytearray(), False: bytearray()}
    for number, path in enumerate(files):
        parts[number % 16 == 8] += path.read_bytes()
    train, held_out = (
        torch.frombuffer(parts[key][:max_bytes], dtype=torch.uint8).to(torch.int64) for key in (False, True)
    )
    return Corpus(train, held_out)


def batches(text: Tensor, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Random windows ``[batch, length + 1]``; the order depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length - 1, (batch,), generator=generator)
        yield torch.stack([text[s : s + length + 1] for s in starts.tolist()])


def build_dense(width: int, layers: int) -> nn.Module:
    """A byte-level Llama: vocabulary 256, F = 8/3 D."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 24),
        num_key_value_heads=max(1, width // 24),
        use_cache=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def next_byte_loss(model: nn.Module, window: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte; ``window [B, L+1]``."""
    logits = model(input_ids=window[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Sequence[Tensor]) -> float:
    """Nats per byte on fixed windows."""
    model.eval()
    losses = [next_byte_loss(model, window).item() for window in windows]
    model.train()
    return sum(losses) / len(losses)


@dataclass(frozen=True)
class Curve:
    """What one arm did: held-out loss by step, seconds per step, and its parameters."""

    held_out: dict[int, float]
    seconds_per_step: float
    parameters: int


def train(
    model: nn.Module, data: Iterator[Tensor], windows: Sequence[Tensor], steps: int, lr: float, points: int
) -> Curve:
    """AdamW, constant rate and then linear decay over the last 40 % of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (steps - s) / max(1, 0.4 * steps)))
    marks = {round(steps * i / points) for i in range(points + 1)}
    held_out = {0: held_out_loss(model, windows)}
    busy = 0.0
    for step in range(1, steps + 1):
        window = next(data)
        start = time.perf_counter()
        loss = next_byte_loss(model, window)
        loss.backward()  # and that of the balancing losses, which hang on the graph
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        busy += time.perf_counter() - start
        if step in marks:
            held_out[step] = held_out_loss(model, windows)
            console.print(f"  step {step:5d}  train {loss.item():.4f}  held out {held_out[step]:.4f}", highlight=False)
    return Curve(held_out, busy / max(1, steps), sum(p.numel() for p in model.parameters()))


def arm(dense: nn.Module, name: str) -> nn.Module:
    """A copy of the dense model, converted by the init method ``name`` (``dense``: as it is)."""
    model = copy.deepcopy(dense)
    if name == "dense":
        return model
    layers = len(model.model.layers)
    losses = LossSpec(load_balance="megatron", load_balance_weight=BALANCE / layers)
    report = moepass.convert(model, MoESpec(losses=losses), init=name)
    console.print(str(report), markup=False, highlight=False)
    return model


def loss_table(curves: dict[str, Curve]) -> Table:
    """Held-out loss of every arm (rows) by step (columns)."""
    steps = list(next(iter(curves.values())).held_out)
    table = Table(title="held-out loss, nats per byte")
    table.add_column("arm")
    for step in steps:
        table.add_column(f"+{step}", justify="right")
    table.add_column("ms/step", justify="right")
    table.add_column("parameters", justify="right")
    for name, curve in curves.items():
        row = [f"{curve.held_out[step]:.4f}" for step in steps]
        table.add_row(name, *row, f"{curve.seconds_per_step * 1e3:.0f}", f"{curve.parameters / 1e6:.2f} M")
    return table


def main(argv: Sequence[str] | None = None) -> dict[str, Curve]:
    """Run the experiment; returns each arm's curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrain", type=int, default=2000, help="dense steps before the arms part")
    parser.add_argument("--steps", type=int, default=1500, help="steps of every arm")
    parser.add_argument("--arms", default="dense,virtual_groups,copy", help="comma-separated init methods, or dense")
    parser.add_argument("--width", type=int, default=96, help="model width D")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="bytes per sequence")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0, help="order of the batches")
    parser.add_argument("--points", type=int, default=6, help="held-out evaluations per arm")
    parser.add_argument("--eval-windows", type=int, default=16)
    args = parser.parse_args(argv)

    corpus = read_corpus(max_bytes=8_000_000)
    held_out = batches(corpus.held_out, args.batch, args.length, seed=1234)
    windows = [next(held_out) for _ in range(args.eval_windows)]
    console.print(f"{len(corpus.train) / 1e6:.1f} MB of Python, {len(corpus.held_out) / 1e3:.0f} kB held out")

    dense = build_dense(args.width, args.layers)
    console.print(f"dense model, {args.pretrain} steps")
    order = batches(corpus.train, args.batch, args.length, seed=args.seed)
    train(dense, order, windows, args.pretrain, args.lr, args.points)

    curves: dict[str, Curve] = {}
    for name in args.arms.split(","):
        console.print(f"{name}, {args.steps} more steps")
        order = batches(corpus.train, args.batch, args.length, seed=args.seed + 1)  # the same for every arm
        curves[name] = train(arm(dense, name), order, windows, args.steps, args.lr, args.points)
    console.print(loss_table(curves))
    assert all(math.isfinite(loss) for curve in curves.values() for loss in curve.held_out.values())
    return curves


if __name__ == "__main__":
    main()
