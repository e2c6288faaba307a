"""``moepass explain MODEL`` without its printing: load, feed, trace once, plan for every token count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moepass import explain
from moepass.explain import targets
from moepass.explain.report import PlanReport


def explain_target(
    name: str,
    *,
    tokens: Sequence[int] = (),
    dtype: str | None = None,
    train: bool = False,
    routing: str = "random",
    **options: Any,
) -> PlanReport:
    """The report of MODEL as the command line names it (``explain.targets``), traced once for all ``tokens``."""
    target = targets.load(name, dtype=targets.parse_dtype(dtype), train=train)
    counts = tuple(tokens) or tuple(t for t in target.tokens if t is not None)
    args, kwargs = target.feed(max(counts, default=None))
    with torch.set_grad_enabled(train):
        return explain(target.model, tokens=counts or None, routing=routing, **options)(*args, **kwargs)
