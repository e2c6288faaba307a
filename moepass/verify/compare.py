"""How far two runs are apart, and memory that shows what reads it before it was written."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Largest relative difference allowed in outputs and in gradients."""

    outputs: float
    gradients: float


#: By the dtype under test.  Float32 sums over a few hundred rows; a wrong term is at least a percent of the scale.
TOLERANCES = {
    torch.float64: Tolerance(1e-10, 1e-8),
    torch.float32: Tolerance(2e-5, 2e-4),
    torch.bfloat16: Tolerance(4e-2, 8e-2),
    torch.float16: Tolerance(6e-3, 2e-2),
}
#: A gradient that ought to be zero is noise of the others: no scale is smaller than this part of the largest.
_FLOOR = 1e-3


class Worst(NamedTuple):
    """The largest difference and the tensor that it is in."""

    error: float
    where: str


def mismatch(actual: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> float:
    """max |actual - expected| over max(max |expected|, floor); infinite for NaN or another shape; None is zero."""
    if actual is None or expected is None:
        given = actual if expected is None else expected
        actual = expected = given
        if given is None:
            return 0.0
        actual, expected = torch.zeros_like(given), given
    if actual.shape != expected.shape:
        return math.inf
    if not actual.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = float((actual - expected).abs().max())
    if math.isnan(difference):
        return math.inf
    scale = max(float(expected.abs().max()), floor)
    return difference / scale if scale > 0.0 else (math.inf if difference > 0.0 else 0.0)


def worst_output(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> Worst:
    """Over the outputs of two runs."""
    if len(actual) != len(expected):
        return Worst(math.inf, f"{len(actual)} outputs instead of {len(expected)}")
    errors = [Worst(mismatch(a, e), f"output {i}") for i, (a, e) in enumerate(zip(actual, expected, strict=True))]
    return max(errors, default=Worst(math.inf, "no output is a floating tensor"))


def worst_gradient(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> Worst:
    """Over the gradients that are expected; one that is missing counts as zero."""
    largest = max((float(g.abs().max()) for g in expected.values() if g is not None and g.numel()), default=0.0)
    errors = [Worst(mismatch(actual.get(n), e, _FLOOR * largest), f"gradient of {n}") for n, e in expected.items()]
    return max(errors, default=Worst(0.0, ""))


def equal_bits(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    """Whether two runs gave the same values in every place (NaN equals NaN)."""
    return len(first) == len(second) and all(
        (a is None and b is None)
        or (a is not None and b is not None and torch.equal(a.nan_to_num(nan=1.5), b.nan_to_num(nan=1.5)))
        for a, b in zip(first, second, strict=True)
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` and its kin hold NaN instead of whatever was there: what is read unwritten shows."""
    settings: Any = torch.utils.deterministic  # a module whose attributes are properties
    fill, on = settings.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # ops without a deterministic form are not the question
            yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Fixed random weights of the outputs' elements: the objective whose gradient is compared is their sum.

    Drawn by shape alone, in float64, so that every run of any dtype has the same.
    """
    generator = torch.Generator().manual_seed(17)
    drawn = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    return [d.to(o.device, o.dtype) for d, o in zip(drawn, outputs, strict=True)]
