"""``model.generate()`` with a KV cache: prefill and decode compiled by moepass give eager mode's tokens."""

from __future__ import annotations

import functools

import pytest
import torch
from moe_zoo import build, inputs
from torch import Tensor, nn

import moepass
from moepass.integrations.transformers import use

PROMPT, NEW = 11, 4


def model_of(name: str, experts: str, layers: int = 1) -> nn.Module:
    return build(name, experts, num_hidden_layers=layers)


def generate(model: nn.Module, cache: str | None = "static", prompt: int = PROMPT) -> Tensor:
    """Greedy continuation of two prompts."""
    ids = inputs("any", prompt, batch=2)["input_ids"]
    settings = {} if cache is None else {"cache_implementation": cache}
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, **settings
    )


@functools.cache
def expected(name: str, layers: int = 1, prompt: int = PROMPT) -> Tensor:
    """What transformers' eager loop over experts generates."""
    tokens = generate(model_of(name, "eager", layers), prompt=prompt)
    assert tokens.shape == (2, prompt + NEW)
    assert len(tokens[:, prompt:].unique()) > 2, "tokens that never change would prove nothing"
    return tokens


def compiled(model: nn.Module, inner: str) -> tuple[nn.Module, list[set[tuple[int, str]]]]:
    """The model with a compiled forward, and a list of what every call ran: (tokens, lowering) of the MoE sites."""
    torch._dynamo.reset()
    forward, plans = torch.compile(model.forward, backend="moepass", options={"inner": inner}), []

    @functools.wraps(forward)
    def noted(*args, **kwargs):
        out = forward(*args, **kwargs)
        sites = [site for site in moepass.last_plan().sites if site.kind == "moe"]
        assert {site.status for site in sites} == {"lowered"}
        plans.append({(site.tokens.high, site.lowering) for site in sites})
        return out

    model.forward = noted
    return model, plans


@pytest.mark.parametrize("cache", ["static", None])
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "gpt_oss"])
def test_eager_generation_with_our_experts(name, cache):
    assert torch.equal(generate(use(model_of(name, "grouped_mm", 2)), cache), expected(name, 2))


@pytest.mark.parametrize(
    ("name", "experts"),
    [("olmoe", "batched_mm"), ("olmoe", "moepass"), ("mixtral", "grouped_mm"), ("gpt_oss", "grouped_mm"),
     ("gpt_oss", "moepass")],
)  # fmt: skip
def test_compiled_generation(name, experts):
    model, plans = compiled(model_of(name, experts), "aot_eager")
    assert torch.equal(generate(model), expected(name))
    assert len(plans) == NEW


def test_prefill_and_decode_run_different_plans():
    model, plans = compiled(model_of("olmoe", "grouped_mm"), "aot_eager")
    assert torch.equal(generate(model, prompt=200), expected("olmoe", prompt=200))
    ((prefill_tokens, prefill_lowering),) = plans[0]
    ((decode_tokens, decode_lowering),) = plans[-1]
    assert (prefill_tokens, decode_tokens) == (400, 2)
    assert decode_lowering == "gathered"
    assert prefill_lowering != "gathered"


@pytest.mark.slow
def test_compiled_generation_with_inductor():
    model, _ = compiled(model_of("olmoe", "moepass"), "inductor")
    assert torch.equal(generate(model), expected("olmoe"))
