"""What the feed-forward blocks of a dense checkpoint see, one layer in memory at a time.

The input of a block is the hidden state after the norm in front of it: what a router in its place will read.  (mergekit
takes the residual stream before that norm, which no router sees: ``reference/upcycling.md`` section 1.7.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moepass.upcycle.checkpoint.stock import Stock, refuse

#: (layer, input of the block [B, S, D], input of its output projection [B, S, F]), both float32.
See = Callable[[int, Tensor, Tensor], None]


def observe(src: str | os.PathLike[str], token_ids: Tensor, see: See) -> None:
    """Run ``token_ids [B, S]`` through the checkpoint in ``src``; ``see`` is called for layer after layer.

    The models are causal, so rows may be padded on the right: entries before the padding do not depend on it.
    Memory: one layer, or the embeddings, and the hidden states of all tokens.  Raises as ``Stock.open``, and
    ``NotVerifiable`` for layers without ``mlp.down_proj``.
    """
    stock = Stock.open(src)
    blocks = [_block(stock, layer) for layer in stock.layers]
    seen: dict[str, Tensor] = {}

    def keep(key: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: seen.__setitem__(key, args[0].detach())

    handles = []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(keep("x")))
        handles.append(block.get_submodule("down_proj").register_forward_pre_hook(keep("a")))
    try:
        stock.run(
            token_ids,
            lambda layer, *_: see(stock.layers.index(layer), seen.pop("x"), seen.pop("a")),
            logits_to_keep=1,  # nobody looks at the logits, which are the largest tensor of all
        )
    finally:
        for handle in handles:
            handle.remove()


def _block(stock: Stock, layer: str) -> nn.Module:
    block = getattr(stock.model.get_submodule(layer), "mlp", None)
    if not isinstance(block, nn.Module) or not hasattr(block, "down_proj"):
        refuse(stock.source.folder, f"{layer} has no mlp.down_proj", "observe a dense model of a family with hosts")
    return block
