"""The check that a machine's kernels pass before plans may choose them: here in the interpreter, right and wrong."""

from __future__ import annotations

import pytest

from moepass.lowering import self_check


@pytest.mark.parametrize("case", self_check.CASES, ids=lambda c: c.dtype)
def test_the_interpreted_kernels_pass(case, monkeypatch):
    monkeypatch.setattr(self_check, "CASES", (case,))
    assert list(self_check._wrong("cpu")) == []


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lambda y: y * 1.001, "y is off by"),
        (lambda y: y + 0 * y.detach() / 0, "y is off by nan"),
        (lambda y: y.detach() + 1.01 * (y - y.detach()), "the gradient of x is off by"),
    ],
)
def test_wrong_numbers_are_named(monkeypatch, plant, said):
    real = self_check.fused_experts
    monkeypatch.setattr(self_check, "CASES", self_check.CASES[:1])
    monkeypatch.setattr(self_check, "fused_experts", lambda *a, **k: plant(real(*a, **k)))
    assert next(self_check._wrong("cpu")).startswith(said)
