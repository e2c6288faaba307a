"""Upcycle a dense checkpoint and train the result with ``transformers.Trainer``; nothing of moepass is needed for that.

The dense model is a byte-level Llama, trained for a moment on Python's own library so that there is something to keep;
the upcycled one is a stock Mixtral with drop-upcycled experts, trained with its load-balancing loss, saved by the
Trainer, and loaded again by stock transformers.  Needs ``accelerate``, as every ``Trainer`` does.

    python examples/train_upcycled.py [--steps 40] [--init drop] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import moepass

LENGTH, BATCH = 64, 8
Example = dict[str, torch.Tensor]


def corpus() -> tuple[list[Example], list[Example]]:
    """Windows of bytes of two modules of the standard library: to train on, and held out."""
    text = inspect.getsource(argparse) + inspect.getsource(inspect)
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    windows = [{"input_ids": w, "labels": w} for w in data.split(LENGTH)[:-1]]
    held_out = windows[::20][:32]
    return [w for i, w in enumerate(windows) if i % 20], held_out


def build_dense() -> nn.Module:
    """A random byte-level Llama."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(model: nn.Module, folder: Path, steps: int) -> tuple[Any, float, float]:
    """The trainer, and the held-out loss (nats per byte, without the balancing loss) before and after."""
    trained, held_out = corpus()
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=3e-3,
        warmup_steps=max(1, steps // 10),
        seed=0,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(model=model, args=settings, train_dataset=trained)
    before = loss(model, held_out)
    trainer.train()
    return trainer, before, loss(model, held_out)


@torch.no_grad()
def loss(model: Any, windows: list[Example]) -> float:
    """Mean next-byte loss in nats."""
    model.eval()
    ids = torch.stack([w["input_ids"] for w in windows]).to(model.device)
    logits = model(input_ids=ids).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train dense, upcycle, train on, save, load; returns the held-out losses on the way."""
    parser = argparse.ArgumentParser(description=textwrap.shorten(__doc__ or "", 100))
    parser.add_argument("--steps", type=int, default=40, help="of the dense model, and of the upcycled one")
    parser.add_argument("--init", default="drop", help="copy, virtual-groups, noise, drop or split")
    parser.add_argument("--out", type=Path, help="folder for the trained model; a temporary one by default")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as scratch:
        src, dst, out = Path(scratch, "dense"), Path(scratch, "moe"), args.out or Path(scratch, "trained")
        trainer, random, dense = train(build_dense(), Path(scratch, "run"), args.steps)
        trainer.save_model(src)

        print(moepass.upcycle_checkpoint(src, dst, init=args.init, experts=4, top_k=2))
        moe = AutoModelForCausalLM.from_pretrained(dst, output_router_logits=True, router_aux_loss_coef=0.01)
        trainer, start, end = train(moe, Path(scratch, "run"), args.steps)
        trainer.save_model(out)

        again = AutoModelForCausalLM.from_pretrained(out)
        losses = {"random": random, "dense": dense, "upcycled": start, "trained": end}
        losses["loaded"] = loss(again, corpus()[1])
    print(f"{type(again).__name__}, held-out nats per byte:", ", ".join(f"{k} {v:.4f}" for k, v in losses.items()))
    return losses


if __name__ == "__main__":
    main()
