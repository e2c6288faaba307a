"""How good, point one: for every family the rewritten model gives the dense logits within 5e-6 of their scale.

One layer of each: what several layers of one model share is tested in ``test_backend*.py``, and the converted form of
each family in ``upcycle/test_convert_families.py``.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from zoo import FAMILIES, build

import moepass

TOKENS = (1, 7, 64, 513)
TOLERANCE = 5e-6
#: The first family of each program.  Its block is that of the others with that program, and what depends on T is the
#: block: of the others one T is compiled (and every T is run in the converted form).
PROGRAMS = {family.program: name for name, family in reversed(FAMILIES.items())}


def output(result):
    """Logits, or the last hidden state of a model without a head."""
    if torch.is_tensor(result):
        return result
    return result.logits if "logits" in result else result.last_hidden_state


def run(model, inputs):
    with torch.no_grad():
        return output(model(**inputs))


def assert_same_logits(actual, expected):
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_line_form_keeps_the_logits(family):
    zoo = build(family, layers=1)
    fast = torch.compile(zoo.model, backend="moepass", options={"inner": "eager", "strict": True})
    for T in TOKENS if family in PROGRAMS.values() else (64,):
        inputs = zoo.inputs(T)
        assert_same_logits(run(fast, inputs), run(zoo.model, inputs))
    assert len({id(p) for p in moepass.moe_parameters(zoo.model)}) >= 3 * zoo.sites


@pytest.mark.slow
@pytest.mark.parametrize("family", PROGRAMS.values())
def test_inductor_keeps_the_logits_of_each_program(family):
    zoo = build(family, layers=1)
    inputs = zoo.inputs(64)
    expected = run(zoo.model, inputs)
    fast = torch.compile(zoo.model, backend="moepass", options={"strict": True})
    assert_same_logits(run(fast, inputs), expected)
    assert moepass.last_plan().summary["lowered"] == zoo.sites


def backward(model, inputs):
    """Gradients of a fixed random projection of the output (a norm of it would be blind behind a layer norm)."""
    result = output(model(**inputs))
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (result * weights.to(result.dtype)).sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_training_step_matches_the_float64_reference_and_reaches_every_expert(family):
    zoo = build(family, layers=1)
    # Many short sequences: the tokens of one long sequence look alike to an untrained model, and crowd on few experts.
    inputs = zoo.inputs(8, batch=64)
    model = zoo.model
    moepass.convert(model)
    wide = copy.deepcopy(model).double()
    wide_inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    fast = torch.compile(model, backend="moepass", options={"inner": "aot_eager", "strict": True})
    backward(fast, inputs)
    backward(wide, wide_inputs)
    typical = torch.stack([p.grad.norm() for p in wide.parameters() if p.grad is not None]).median()
    for (name, ours), theirs in zip(model.named_parameters(), wide.parameters(), strict=True):
        if theirs.grad is None:  # unused, like a pooler
            assert ours.grad is None or not ours.grad.any(), name
            continue
        # The floor is for gradients that are zero in exact arithmetic, such as those of key biases.
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-3 * typical)
        assert error <= 1e-4, f"{name}: {error:.2e}"
        if re.search(r"\.(w_in|w_out)$", name):
            assert (ours.grad.flatten(1).abs().sum(1) > 0).all(), f"{name}: an expert got no gradient"
        if name.endswith("router.weight"):
            assert (ours.grad.abs().sum(1) > 0).all(), f"{name}: an expert's row got no gradient"
