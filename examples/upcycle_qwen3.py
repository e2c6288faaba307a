"""A dense Qwen3 checkpoint becomes a Qwen3-MoE checkpoint that stock transformers loads; the logits are compared.

The dense model is a small random one, saved to a temporary folder; with ``--src`` it is your own.  The same on the
command line:

    moepass upcycle SRC DST --init virtual-groups --verify

    python examples/upcycle_qwen3.py [--src FOLDER] [--out FOLDER] [--init copy] [--experts 8] [--top-k 2]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

import moepass


def save_dense(folder: Path) -> None:
    """A small random Qwen3, as ``save_pretrained`` leaves it."""
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """Logits on a few tokens, by stock transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print(f"{folder.name}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    return model(input_ids=torch.arange(64)[None]).logits


def main(argv: Sequence[str] | None = None) -> float:
    """Upcycle and compare; returns max |logit difference| relative to the logit scale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--src", type=Path, help="a dense Qwen3 folder; a small random one by default")
    parser.add_argument("--out", type=Path, help="folder to write to, new or empty; a temporary one by default")
    parser.add_argument("--init", default="copy", help="copy, virtual-groups, noise, drop or split")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as scratch:
        src, dst = args.src or Path(scratch, "dense"), args.out or Path(scratch, "moe")
        if args.src is None:
            save_dense(src)
        print(moepass.upcycle_checkpoint(src, dst, init=args.init, experts=args.experts, top_k=args.top_k))
        dense, moe = logits(src), logits(dst)
    difference = ((moe - dense).abs().max() / dense.abs().max()).item()
    print(f"max |logit difference| = {difference:.1e} x the logit scale")
    return difference


if __name__ == "__main__":
    main()
