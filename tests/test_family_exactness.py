"""How good, point one: for every family the rewritten model gives the dense logits within 5e-6 of their scale.

One layer of each: what several layers of one model share is tested in ``test_backend*.py``, and the converted form of
each family in ``upcycle/test_convert_families.py``.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from zoo import FAMILIES, FF, D, build

import moepass
from moepass import pointwise

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


#: Each program as transformers spells it, and whether it has a gate.
SPELLED = {
    "silu(g)*u": ("silu", True),
    "gelu_tanh(g)*u": ("gelu_pytorch_tanh", True),
    "gelu_tanh(g)": ("gelu_new", False),
    "gelu(g)": ("gelu", False),
    "relu(g)": ("relu", False),
    "relu(g)**2": ("relu2", False),
}


class Block(nn.Module):
    """A feed-forward block behind a norm; without a residual stream, which would hide it."""

    def __init__(self, spelled: str, gated: bool) -> None:
        super().__init__()
        self.act, self.gate = ACT2FN[spelled], nn.Linear(D, FF) if gated else None
        self.up, self.down = nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x):
        x = F.layer_norm(x, (D,))
        return self.down(self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x))


@pytest.mark.slow
def test_inductor_keeps_what_blocks_of_every_program_compute():
    """The programs alone; models of transformers under Inductor: ``test_examples.py``, ``test_generate.py``."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block(*SPELLED[program]) for program in PROGRAMS)), torch.randn(64, D)
    fast = torch.compile(model, backend="moepass", options={"strict": True})
    with torch.no_grad():
        assert_same_logits(fast(x), model(x))
    lowered = [site for site in moepass.last_plan().sites if site.status == "lowered"]
    assert sorted(site.activation for site in lowered) == sorted(pointwise.canonical(program) for program in PROGRAMS)


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
