"""The quality experiment's model, text and training loop: everything that all arms share.

Contract
    The text is the Python standard library's sources as bytes, in name order; every 16th file is held out.
    A seed decides the order of the batches and nothing else; all arms of a seed see the same windows in the same order.
    Learning rate: a warm-up (the first steps of a fresh AdamW disturb the dense model too), constant, then linear to
    zero over the last 40 % of the steps.
    Held-out loss in nats per byte: the curve on ``curve_windows`` windows, the final value on ``final_windows``.
"""

from __future__ import annotations

import hashlib
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moepass

DECAYED = 0.4
#: The curve of the first steps is fine, because that is where virtual groups bump.
BUMP_STEPS = 200
_FINE = (*range(0, 10, 2), *range(10, 50, 5), *range(50, BUMP_STEPS + 1, 10))


@dataclass(frozen=True)
class Setup:
    """Sizes of model, text and training.  ``pretrain``, ``steps``: dense steps before the arms part, and after."""

    width: int = 32
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    length: int = 64
    batch: int = 16
    lr: float = 3e-3
    warmup: int = 50
    pretrain: int = 2000
    steps: int = 1000
    curve_windows: int = 96
    final_windows: int = 768


@dataclass(frozen=True)
class Corpus:
    """uint8 bytes ``[N]`` to train on, and held-out windows ``[W, length + 1]`` from other files."""

    train: Tensor
    held_out: Tensor
    digest: str


def read_corpus(setup: Setup, max_bytes: int = 8_000_000) -> Corpus:
    """Held-out windows are spread evenly over the held-out files, so that fewer of them are a thinner sample of all."""
    parts: dict[bool, bytearray] = {True: bytearray(), False: bytearray()}
    for number, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        parts[number % 16 == 8] += path.read_bytes()
    train, rest = (torch.frombuffer(parts[held][:max_bytes], dtype=torch.uint8) for held in (False, True))
    starts = torch.linspace(0, len(rest) - setup.length - 1, setup.final_windows).long()
    digest = hashlib.sha256(parts[False][:max_bytes] + parts[True][:max_bytes]).hexdigest()[:12]
    return Corpus(train, _windows(rest, starts, setup.length), digest)


def batches(corpus: Corpus, setup: Setup, seed: int) -> Iterator[Tensor]:
    """Random windows ``[batch, length + 1]``."""
    source = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(corpus.train) - setup.length - 1, (setup.batch,), generator=source)
        yield _windows(corpus.train, starts, setup.length)


def _windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts[:, None] + torch.arange(length + 1)].long()


def fresh_model(setup: Setup, seed: int) -> nn.Module:
    """A byte-level Llama with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=setup.width,
            intermediate_size=setup.hidden,
            num_hidden_layers=setup.layers,
            num_attention_heads=setup.heads,
            num_key_value_heads=setup.heads,
            use_cache=False,
            tie_word_embeddings=True,
        )
    )


def next_byte_loss(model: nn.Module, window: Tensor) -> Tensor:
    """Mean cross-entropy; ``window [B, L+1]``."""
    logits = model(input_ids=window[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor) -> float:
    """Nats per byte on windows ``[W, L+1]``."""
    model.eval()
    total = sum(next_byte_loss(model, part).item() * len(part) for part in windows.split(64))
    model.train()
    return total / len(windows)


@torch.no_grad()
def whole_groups(model: nn.Module, windows: Tensor, G: int) -> float:
    """Share of tokens, over all layers, whose experts are whole virtual groups of G neighbours."""
    shares: list[float] = []

    def look(_: nn.Module, __: object, routing: Any) -> None:
        group_TK = (routing.index_TK // G).sort(-1).values.unflatten(-1, (-1, G))
        shares.append((group_TK == group_TK[..., :1]).all(-1).all(-1).float().mean().item())

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, moepass.nn.Router)]
    model.eval()
    model(input_ids=windows[:32, :-1])
    model.train()
    for hook in hooks:
        hook.remove()
    return sum(shares) / len(shares)


@dataclass(frozen=True)
class Curve:
    """Held-out loss by step, the share of whole virtual groups by step (if any), the final loss, and seconds."""

    held_out: dict[int, float]
    whole: dict[int, float]
    final: float
    seconds_per_step: float


def train(
    model: nn.Module,
    corpus: Corpus,
    setup: Setup,
    *,
    seed: int,
    steps: int,
    router_rate: Callable[[int], float] = lambda _: 1.0,
    warmup: int,
    decay: bool = True,
    granularity: int = 1,
) -> Curve:
    """AdamW.  ``router_rate(step)``: a factor on the routers' learning rate; ``warmup``: linear, for all weights."""
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    others = [p for name, p in model.named_parameters() if ".router." not in name]
    groups = [{"params": group} for group in (others, routers) if group]
    optimizer = torch.optim.AdamW(groups, lr=setup.lr, weight_decay=0.1, betas=(0.9, 0.95), fused=True)

    def common(step: int) -> float:
        end = (steps - step) / max(1.0, DECAYED * steps) if decay else 1.0
        return min(1.0, end, (step + 1) / warmup if warmup else 1.0)

    rates: list[Callable[[int], float]] = [common, lambda step: common(step) * router_rate(step)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates[: len(groups)])
    order, busy = batches(corpus, setup, seed), 0.0
    held_out, whole = dict[int, float](), dict[int, float]()
    few, marks = corpus.held_out[:: max(1, setup.final_windows // setup.curve_windows)], _marks(steps)
    model.train()
    for step in range(steps + 1):
        if step in marks:
            held_out[step] = held_out_loss(model, few)
            if granularity > 1:
                whole[step] = whole_groups(model, few, granularity)
        if step < steps:
            start = time.perf_counter()
            next_byte_loss(model, next(order)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            busy += time.perf_counter() - start
    return Curve(held_out, whole, held_out_loss(model, corpus.held_out), busy / max(1, steps))


def _marks(steps: int) -> set[int]:
    """Steps at which the curve is measured: finely at first, then every 100, and the last."""
    return {step for step in (*_FINE, *range(BUMP_STEPS, steps, 100), steps) if step <= steps}
