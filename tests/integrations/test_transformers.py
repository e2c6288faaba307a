"""transformers' experts interface: with ``moepass`` a family computes what transformers' own eager loop computes."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from moe_zoo import WITH_INTERFACE, build, inputs
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import use_experts_implementation

import moepass.integrations.transformers as integration
from moepass import errors

TOLERANCE = 1e-5


@functools.cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The same model twice: transformers' eager loop, and ours."""
    return build(name, "eager"), build(name, "moepass")


def logits(model, name, T, batch=1, **kwargs):
    return model(**inputs(name, T, batch), use_cache=False, **kwargs).logits


def run(model, name, T, batch=1, call=None):
    """Logits and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    y = logits(model if call is None else call, name, T, batch)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(T))
    (y * weight.to(y.dtype)).sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_close(actual, expected, tolerance=TOLERANCE):
    # The floor: with one token the gradients of queries and keys are rounding noise about zero.
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0)


def assert_same_run(actual, expected):
    assert_close(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        if grad is None:
            assert actual[1][name] is None, name
        else:
            assert_close(actual[1][name], grad)


def experts_of(model):
    return list(integration.interface_experts(model).values())


@pytest.mark.parametrize("T", [1, 5, 64, 257])
@pytest.mark.parametrize("name", WITH_INTERFACE)
def test_logits_and_gradients_equal_those_of_the_eager_loop(name, T):
    theirs, ours = pair(name)
    assert_same_run(run(ours, name, T), run(theirs, name, T))


@pytest.mark.parametrize("name", ["ernie4_5_moe", "deepseek_v3", "gemma4"])
def test_under_dynamo_it_is_one_graph(name):
    theirs, ours = build(name, "eager"), build(name, "moepass")  # fresh: the activation is read while tracing
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_same_run(run(ours, name, 33, call=compiled), run(theirs, name, 33))


def test_aot_autograd_gives_the_same_gradients():
    theirs, ours = build("gpt_oss", "eager"), build("gpt_oss", "moepass")
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same_run(run(ours, "gpt_oss", 33, call=compiled), run(theirs, "gpt_oss", 33))


def test_one_graph_serves_many_token_counts():
    model = build("olmoe", "moepass")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for T in (5, 17, 64, 257):
            assert_close(logits(compiled, "olmoe", T), logits(model, "olmoe", T))
    assert counter.frame_count == 1


def test_experts_without_tokens_get_zero_gradients():
    theirs, ours = pair("mixtral")
    (_, ours_grads), (_, theirs_grads) = run(ours, "mixtral", 1), run(theirs, "mixtral", 1)
    name = "model.layers.0.mlp.experts.down_proj"
    idle = [e for e in range(8) if not theirs_grads[name][e].any()]
    assert len(idle) == 6, "one token uses two of eight experts"
    assert not ours_grads[name][idle].any()


def test_bfloat16_is_as_near_to_float64_as_the_eager_loop_is():
    exact = build("olmoe", "eager").double()
    expected = logits(exact, "olmoe", 64).detach()
    errors_of = {}
    for experts in ("eager", "moepass"):
        model = build("olmoe", experts).to(torch.bfloat16)
        # The median: where rounding sends a token to another expert, the difference is no rounding error.
        errors_of[experts] = (logits(model, "olmoe", 64).detach().double() - expected).abs().median()
    assert errors_of["moepass"] <= 1.1 * errors_of["eager"]
    assert errors_of["moepass"] <= 0.02 * expected.abs().max()


def test_float64_stays_float64():
    theirs, ours = (copy.deepcopy(model).double() for model in pair("gpt_oss"))
    actual, expected = logits(ours, "gpt_oss", 33), logits(theirs, "gpt_oss", 33)
    assert actual.dtype == torch.float64
    assert_close(actual, expected, 1e-10)


# --- ways in ---------------------------------------------------------------------------------------------------------


def test_use_switches_a_model_and_leaves_its_state_dict_alone():
    model = build("mixtral", "grouped_mm")
    before = {name: (t.data_ptr(), tuple(t.shape)) for name, t in model.state_dict().items()}
    assert integration.use(model) is model
    logits(model, "mixtral", 5)
    assert model.get_experts_implementation() == {"": "moepass"}
    assert {name: (t.data_ptr(), tuple(t.shape)) for name, t in model.state_dict().items()} == before


def test_set_experts_implementation_takes_the_name_and_gives_it_up_again():
    model = build("olmoe", "eager")
    model.set_experts_implementation("moepass")
    assert_close(logits(model, "olmoe", 9), logits(pair("olmoe")[0], "olmoe", 9))
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


def test_from_config_and_a_dict_per_sub_config_take_the_name():
    config = build("mixtral").config
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moepass")
    assert model.config._experts_implementation == "moepass"
    model.set_experts_implementation({"": "moepass"})
    assert model.get_experts_implementation() == {"": "moepass"}


def test_a_save_and_load_round_trip_keeps_the_numbers(tmp_path):
    model = build("qwen3_moe", "moepass")
    expected = logits(model, "qwen3_moe", 9)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moepass").eval()
    assert_close(logits(loaded, "qwen3_moe", 9), expected)


def test_a_changed_setting_is_noticed_by_the_next_call():
    model = build("gpt_oss", "moepass")
    theirs = build("gpt_oss", "eager")
    logits(model, "gpt_oss", 5)
    for each in (*experts_of(model), *experts_of(theirs)):
        each.limit = 0.5
    assert_close(logits(model, "gpt_oss", 9), logits(theirs, "gpt_oss", 9))


def test_layers_with_different_activations_do_not_share_a_compiled_frame():
    model, theirs = build("mixtral", "moepass"), build("mixtral", "eager")
    for each in (model, theirs):
        experts_of(each)[1].act_fn = nn.GELU()
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend="eager")
    assert_close(logits(model, "mixtral", 9), logits(theirs, "mixtral", 9))


# --- the interface's other layouts -----------------------------------------------------------------------------------


def toy(**flags):
    """A module with transformers' experts interface, ours to bend."""
    has_gate, has_bias = flags.get("has_gate", True), flags.get("has_bias", False)

    @use_experts_implementation(**flags)
    class Experts(nn.Module):
        def __init__(self, config) -> None:
            super().__init__()
            E, D, width = 4, 8, 6
            rows = 2 * width if has_gate else width
            shape = (E, D, rows) if flags.get("is_transposed") else (E, rows, D)
            back = (E, width, D) if flags.get("is_transposed") else (E, D, width)
            name = "gate_up_proj" if has_gate else "up_proj"
            self.num_experts, self.act_fn = E, nn.SiLU()
            setattr(self, name, nn.Parameter(torch.randn(shape)))
            self.down_proj = nn.Parameter(torch.randn(back))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, rows)))
                self.down_proj_bias = nn.Parameter(torch.randn(E, D))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    config = transformers.PreTrainedConfig()
    config._experts_implementation = "moepass"
    torch.manual_seed(0)
    return Experts(config)


def routed(T=9, E=4, K=2):
    generator = torch.Generator().manual_seed(T)
    index = torch.rand(T, E, generator=generator).argsort(-1)[:, :K]
    return torch.randn(T, 8, generator=generator), index, torch.rand(T, K, generator=generator)


def batched(module, *args):
    module.config._experts_implementation = "batched_mm"
    try:
        return module(*args)
    finally:
        module.config._experts_implementation = "moepass"


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_every_layout_equals_batched_mm(has_gate, has_bias, is_transposed):
    module = toy(has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed)
    assert_close(module(*routed()), batched(module, *routed()))


def test_sentinel_indices_of_expert_parallelism_are_not_computed():
    module = toy()
    x, index, weight = routed()
    index = torch.where(torch.arange(18).view(9, 2) % 3 == 0, 4, index)
    module._is_expert_parallel = True
    ours, theirs = (w.clone().requires_grad_() for w in (weight, weight.masked_fill(index == 4, 0.0)))
    actual, expected = module(x, index, ours), batched(module, x, index, theirs)
    assert_close(actual, expected)
    grads = [torch.autograd.grad(y.square().sum(), w)[0] for y, w in ((actual, ours), (expected, theirs))]
    assert_close(*grads)
    assert not grads[0][index == 4].any()


# --- refusals --------------------------------------------------------------------------------------------------------


class Peculiar(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Normalising(nn.Module):
    def forward(self, x):
        return F.softmax(x, dim=-1)


class Detached(nn.Module):
    def forward(self, x):
        return F.silu(x.detach())


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x * torch.sigmoid(self.slope * x)


@pytest.mark.parametrize("act", [Peculiar, Normalising, Detached, Learned])
def test_an_activation_that_is_no_known_program_is_refused_with_its_reason(act):
    module = toy()
    module.act_fn = act()
    with pytest.raises(errors.UnsupportedExperts, match=r"Experts cannot run .* activation"):
        module(*routed())


def test_a_norm_after_each_expert_is_refused():
    with pytest.raises(errors.UnsupportedExperts, match="has_post_expert_norm"):
        toy(has_post_expert_norm=True)(*routed())


def test_a_gate_that_cuts_unusually_is_refused():
    module = toy()
    module._apply_gate = lambda h: F.silu(h[:, 1:7]) * h[:, 6:]
    with pytest.raises(errors.UnsupportedExperts, match="cut"):
        module(*routed())


def test_swapped_halves_are_read_as_they_are():
    module = toy()
    module._apply_gate = lambda h: h[:, :6] * F.silu(h[:, 6:])
    assert_close(module(*routed()), batched(module, *routed()))
    assert module._moepass_activation == "g*silu(u)"


def test_use_refuses_a_model_without_the_interface_and_changes_nothing():
    with pytest.raises(errors.UnsupportedExperts, match="existing=True"):
        integration.use(build("dbrx"))
    model = build("olmoe", "grouped_mm")
    experts_of(model)[1].act_fn = Peculiar()
    with pytest.raises(errors.UnsupportedExperts):
        integration.use(model)
    assert model.config._experts_implementation == "grouped_mm"
