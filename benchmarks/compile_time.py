"""Compile time: moepass beside plain Inductor on the same converted model, with cold caches.

Every sample is a fresh process with an empty cache folder; it imports, builds, loads the compiler on a toy, and then
times the first compiled forward (and backward, with ``--train``) minus a second one.  Sides take turns.  Hugging Face's
OLMoE with its own ``grouped_mm`` experts, in the same widths, stands beside them under plain Inductor.  Target
(issue 2): at most 1.25x.

    python -m benchmarks.compile_time [--repeats 5] [--layers 4] [--train]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoeConfig

import moepass
from benchmarks import common

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("dense, Inductor", "converted, Inductor", "converted, moepass", "OLMoE grouped_mm, Inductor")
D, F, E, K = 256, 1024, 8, 2


def build(side: str, layers: int) -> nn.Module:
    """A float32 causal LM: a Llama (converted or dense), or an OLMoE of the same widths (F/2 per expert)."""
    torch.manual_seed(0)
    common_fields: dict[str, Any] = {
        "vocab_size": 1024, "hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 4, "use_cache": False, "eos_token_id": 2,
    }  # fmt: skip
    if side.startswith("OLMoE"):
        config: Any = OlmoeConfig(
            **common_fields, intermediate_size=F // 2, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="grouped_mm")
    config = LlamaConfig(**common_fields, intermediate_size=F)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if side.startswith("converted"):
        moepass.convert(model)
    return model


def first_call_seconds(side: str, layers: int, tokens: int, train: bool) -> float:
    """Seconds of the first compiled call over the second, in this process."""
    model = build(side, layers)
    ids = torch.randint(0, 1024, (1, tokens))
    torch.compile(nn.Linear(8, 8))(torch.ones(1, 8))  # loads the compiler itself, which both sides need
    compiled = torch.compile(model, backend="moepass" if side.endswith("moepass") else "inductor")

    def step() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(train):
            loss = compiled(input_ids=ids).logits.square().mean()
            if train:
                loss.backward()
        return time.perf_counter() - start

    first = step()
    return first - step()


def sample(side: str, args: argparse.Namespace) -> float:
    """``first_call_seconds`` in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.compile_time", "--child", side]
        command += ["--layers", str(args.layers), "--tokens", str(args.tokens), *(["--train"] if args.train else [])]
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-4000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Measure all sides and write the results (or, as a child, time one side)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes per side")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps({"seconds": first_call_seconds(args.child, args.layers, args.tokens, args.train)}))
        return None

    about = common.machine()
    samples: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(args.repeats):
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            samples[side].append(sample(side, args))
            print(f"{turn + 1}/{args.repeats}  {side:28} {samples[side][-1]:7.2f} s", flush=True)
    timings = {side: common.Timing.of(seconds) for side, seconds in samples.items()}
    base = timings["converted, Inductor"].median
    rows = [
        {"side": side, "median [s]": t.median, "quartiles [s]": f"{t.low:.2f} - {t.high:.2f}", "ratio": t.median / base}
        for side, t in timings.items()
    ]
    mode = "forward and backward" if args.train else "forward"
    return common.write(
        "compile_time_train" if args.train else "compile_time",
        rows,
        title=f"Compile time of {mode}, {args.layers} layers, D={D}, F={F}, T={args.tokens}, cold caches",
        notes=[
            f"{args.repeats} fresh processes per side, in turns; the ratio is to plain Inductor on the converted model",
            "target: converted, moepass at most 1.25x",
        ],
        about=about,
        out=args.out,
    )


if __name__ == "__main__":
    main()
