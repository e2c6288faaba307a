"""One line turns a Hugging Face model into a mixture of experts that computes the same function.

Builds a real Llama architecture from a configuration (random weights, nothing is downloaded), compiles it with
``backend="moepass"`` and shows: the difference to the dense logits, the plan, the speed beside plain Inductor, and one
training step that reaches the experts and the router.

    python examples/demo.py [--tokens 512] [--layers 4] [--width 384] [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.rule import Rule
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import moepass

console = Console()


def build_dense(width: int, layers: int) -> nn.Module:
    """A float32 Llama of the given width and depth, F = 3.5 D as in Llama 3, in evaluation mode."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        use_cache=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def logits_of(model: Callable[..., object], ids: Tensor) -> Tensor:
    """Logits ``[1, T, vocabulary]`` without a gradient."""
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[attr-defined]


def interleaved_medians(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each side; the sides take turns, so that a slow moment of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> str:
    """Processor, cores and versions in one line."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def show_difference(dense: Tensor, sparse: Tensor) -> float:
    """Print and return max |difference| relative to the scale of the dense logits."""
    scale = dense.abs().max().item()
    relative = (dense - sparse).abs().max().item() / scale
    console.print(f"max |logit difference| = {relative:.1e} x the logit scale ({scale:.3f}); the promise is 5e-6")
    return relative


def train_one_step(model: nn.Module, compiled: Callable[..., object], ids: Tensor) -> float:
    """One AdamW step over the dense parameters and the MoE state; returns the smallest gradient norm of an expert."""
    moe = list(moepass.moe_parameters(model))
    moe_ids = {id(p) for p in moe}
    dense = [p for p in model.parameters() if id(p) not in moe_ids]
    optimizer = torch.optim.AdamW([{"params": dense}, {"params": moe}], lr=1e-4)
    loss = compiled(input_ids=ids, labels=ids).loss  # type: ignore[attr-defined]
    loss.backward()

    def norms(ndim: int) -> Tensor:
        """Gradient norms: of every router (2 dimensions), or of every expert of every w_in and w_out (3)."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in moe if p.ndim == ndim]
        return torch.cat([g.flatten(-2).norm(dim=-1).reshape(-1) for g in grads])

    for name, values in (("router", norms(2)), ("expert", norms(3))):
        reached = int((values > 0).sum())
        spread = f"|grad| {values.min():.1e} .. {values.max():.1e}"
        console.print(f"  {name}: a gradient in {reached} of {len(values)} matrices, {spread}", highlight=False)
    smallest = norms(3).min().item()
    optimizer.step()
    after = compiled(input_ids=ids, labels=ids).loss.item()  # with gradients: a graph without would be compiled anew
    console.print(f"  loss {loss.item():.4f} -> {after:.4f} after one step of AdamW", highlight=False)
    return smallest


def main(argv: Sequence[str] | None = None) -> float:
    """Run the demonstration; returns the relative difference of the logits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="sequence length T")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384, help="model width D")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per side")
    args = parser.parse_args(argv)

    dense = build_dense(args.width, args.layers)
    ids = torch.randint(0, 4096, (1, args.tokens), generator=torch.Generator().manual_seed(1))
    console.print(Rule("1. the same function"))
    expected = logits_of(dense, ids)
    sparse = torch.compile(dense, backend="moepass")
    relative = show_difference(expected, logits_of(sparse, ids))

    console.print(Rule("2. the plan"))
    report = moepass.last_plan()
    assert report is not None, "the compile above made one"
    console.print(report.to_text(), markup=False, highlight=False, soft_wrap=True)

    console.print(Rule("3. the speed, beside the dense model under plain Inductor"))
    inductor = torch.compile(build_dense(args.width, args.layers))
    sides = {"dense, Inductor": lambda: logits_of(inductor, ids), "moepass": lambda: logits_of(sparse, ids)}
    for call in sides.values():
        call()  # compile
    medians = interleaved_medians(sides, args.repeats)
    for name, seconds in medians.items():
        ratio = seconds / medians["dense, Inductor"]
        console.print(f"  {name:16} {seconds * 1e3:8.2f} ms per forward of {args.tokens} tokens   {ratio:.2f}x")
    console.print(f"  medians of {args.repeats} interleaved calls on {machine()}", highlight=False)

    console.print(Rule("4. one training step"))
    train_one_step(dense, sparse, ids)
    return relative


if __name__ == "__main__":
    main()
