"""A dense Llama becomes two Mixtrals, copies and granular experts; stock transformers loads both; logits are compared.

Copies (8 experts, top-2) cost twice the feed-forward FLOPs. Granular experts are shards of the dense block (virtual
groups): with granularity G and top-k G a token pays what it paid before. Both compute the dense function at step 0.

The dense model is a small random one, saved to a temporary folder; with ``--src`` it is your own.  On the command line:

    moepass upcycle SRC DST --init virtual-groups --granularity 4 --experts 16 --top-k 4 --verify

    python examples/upcycle_llama.py [--src FOLDER] [--out FOLDER] [--granularity 4]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import moepass


def save_dense(folder: Path) -> None:
    """A small random Llama, as ``save_pretrained`` leaves it."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """Logits on a few tokens, by stock transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print(f"{folder.name}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    return model(input_ids=torch.arange(64)[None]).logits


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Upcycle twice and compare; returns max |logit difference| relative to the logit scale, by recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--src", type=Path, help="a dense Llama folder; a small random one by default")
    parser.add_argument("--out", type=Path, help="folder for the two outputs; a temporary one by default")
    parser.add_argument("--granularity", type=int, default=4, help="shards that a dense block is cut into")
    args = parser.parse_args(argv)

    G = args.granularity
    recipes = {
        "copy": {"init": "copy", "experts": 8, "top_k": 2},
        "granular": {"init": "virtual-groups", "granularity": G, "experts": 4 * G, "top_k": G},
    }
    differences = {}
    with tempfile.TemporaryDirectory() as scratch:
        src, out = args.src or Path(scratch, "dense"), args.out or Path(scratch)
        if args.src is None:
            save_dense(src)
        dense = logits(src)
        for name, recipe in recipes.items():
            print(moepass.upcycle_checkpoint(src, out / name, to="mixtral", **recipe))
            difference = (logits(out / name) - dense).abs().max() / dense.abs().max()
            differences[name] = difference.item()
    for name, value in differences.items():
        print(f"{name}: max |logit difference| = {value:.1e} x the logit scale")
    return differences


if __name__ == "__main__":
    main()
