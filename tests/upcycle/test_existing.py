"""``convert(model, existing=True)`` on hand-written blocks: what is exchanged computes the same; the rest says why."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from moe_blocks import BLOCKS, FF, D, E, Expert, K, MixtralStyle, SharedStyle, StackedInPlaceStyle, TorchtitanStyle
from torch import Tensor, nn

import moepass
from moepass import errors
from moepass.nn import MoE
from moepass.upcycle.existing.blocks import ExistingMoE, read_block
from moepass.upcycle.existing.experts import Guess


class Net(nn.Module):
    """A block between two layers, so that its input and its router get gradients."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.rise, self.moe, self.fall = nn.Linear(8, D), block, nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rise(x)
        out = self.moe(h)
        out = sum(t.float().mean() for t in out[1:]) + out[0] if isinstance(out, tuple) else out
        return self.fall(h + out.reshape(h.shape))


def net(name: str) -> Net:
    torch.manual_seed(0)
    model = Net(BLOCKS[name]())
    for buffer in model.buffers():  # a correction that somebody has trained
        buffer.copy_(0.2 * torch.randn(buffer.shape))
    return model


@functools.cache
def converted(name: str) -> tuple[Net, moepass.ConversionReport]:
    model = net(name)
    return model, moepass.convert(model, existing=True)


def run(model, x, wrt):
    """Output and the gradients of the input and of ``wrt``."""
    x = x.clone().requires_grad_()
    y = model(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y.detach(), torch.autograd.grad((y * weight).sum(), [x, *wrt])


def assert_close(actual, expected, tolerance=1e-5):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-2)


def router_of(block: nn.Module) -> nn.Parameter:
    return (block if isinstance(block, MoE) else block.moe).router.weight


@pytest.mark.parametrize("T", [1, 5, 64])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_exchanged_block_gives_the_same_outputs_and_gradients(name, T):
    theirs, (ours, report) = net(name), converted(name)
    assert [site.way for site in report.converted] == ["rebuilt"], report
    x = torch.randn(*((T,) if name == "megatron" else (2, T)), 8, generator=torch.Generator().manual_seed(T))
    gate = next(p for n, p in theirs.moe.named_parameters() if p.shape == (E, D) and ("gate" in n or "router" in n))
    expected = run(theirs, x, [gate, theirs.rise.weight])
    actual = run(ours, x, [router_of(ours.moe), ours.rise.weight])
    assert_close(actual[0], expected[0])
    for ours_grad, theirs_grad in zip(actual[1], expected[1], strict=True):
        assert_close(ours_grad, theirs_grad)


RULES = {
    "mixtral": "softmax, top-2, weights divided by their sum",
    "deepseek": "sigmoid, top-2, chosen by scores plus a correction bias, weights divided by their sum, times 2.5",
    "qwen2": "softmax, top-2; beside it shared_expert",
    "biased": "softmax, top-3, weights divided by their sum, with a bias on the logits",
    "torchtitan_before": "sigmoid, top-2, chosen by scores plus a correction bias, weights divided by their sum, "
    "multiplied into the experts' input",
    "olmo_core": "softmax, top-2, weights divided by their L2 norm",
    "megatron": "softmax, top-2, weights divided by their sum",
}


@pytest.mark.parametrize("name", RULES)
def test_the_report_says_the_routing_rule_in_words(name):
    (site,) = converted(name)[1].converted
    assert site.kind == "moe"
    assert site.routing.startswith(RULES[name].split(";")[0])
    assert f"{E} experts of {D}x{FF}" in str(site)


def test_a_block_that_returned_its_logits_still_does():
    ours, theirs = converted("mixtral")[0].moe, net("mixtral").moe
    assert isinstance(ours, ExistingMoE)
    x = torch.randn(2, 5, D)
    for actual, expected in zip(ours(x), theirs(x), strict=True):
        assert actual.shape == expected.shape
        assert_close(actual, expected)


def test_shared_experts_stay_the_modules_that_they_were():
    model = net("deepseek")
    shared = model.moe.shared_experts
    moepass.convert(model, existing=True)
    assert model.moe.shared is shared


def test_stacked_weights_are_used_in_place_and_separate_ones_are_copied():
    model = net("stacked")
    before = model.moe.gate_up, model.moe.down
    (site,) = moepass.convert(model, existing=True).converted
    assert model.moe.w_in is before[0]
    assert model.moe.w_out is before[1]
    assert site.weights == "in place"
    assert "a copy" in converted("mixtral")[1].converted[0].weights


def test_a_trained_correction_bias_comes_along_in_float32():
    ours, theirs = converted("deepseek")[0].moe.moe.router, net("deepseek").moe
    assert ours.bias.dtype == torch.float32
    assert torch.equal(ours.bias, theirs.e_score_correction_bias)


def test_experts_without_tokens_get_zero_gradients():
    model = converted("mixtral")[0]
    moe = model.moe.moe
    y, _ = model.moe(torch.randn(1, 1, D))
    (grad,) = torch.autograd.grad(y.square().sum(), moe.w_in)
    assert sum(bool(g.any()) for g in grad) == K


def test_after_conversion_the_model_compiles_to_one_graph():
    model = converted("torchtitan")[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # the loop over tolist() is gone
    x = torch.randn(1, 9, 8)
    assert_close(compiled(x), net("torchtitan")(x))


def test_bfloat16_blocks_are_proved_in_float64_and_stay_bfloat16():
    model = net("deepseek").to(torch.bfloat16)
    x = torch.randn(1, 33, 8, dtype=torch.bfloat16)
    exact = net("deepseek").to(torch.bfloat16).double()(x.double())
    theirs = (model(x).double() - exact).abs().median()
    (_,) = moepass.convert(model, existing=True).converted
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (model(x).double() - exact).abs().median() <= 1.2 * theirs


def test_a_router_that_is_still_zero_is_read_all_the_same():
    model = net("mixtral")
    nn.init.zeros_(model.moe.gate.weight)
    (site,) = moepass.convert(model, existing=True).converted
    assert site.routing == RULES["mixtral"]
    assert not model.moe.moe.router.weight.any()


def test_blocks_shared_by_layers_stay_shared():
    block = MixtralStyle()
    model = nn.ModuleDict({"a": Net(block), "b": Net(block)})
    (_,) = moepass.convert(model, existing=True).converted
    assert model["a"].moe is model["b"].moe


def test_training_flags_and_requires_grad_are_kept():
    model = net("mixtral").eval()
    model.moe.experts.requires_grad_(False)
    moepass.convert(model, existing=True)
    assert not any(m.training for m in model.modules())
    assert not model.moe.moe.w_in.requires_grad
    assert model.moe.moe.router.weight.requires_grad


def test_a_second_call_changes_nothing():
    model = copy.deepcopy(converted("deepseek")[0])
    report = moepass.convert(model, existing=True)
    assert not report.converted
    assert {site.reason for site in report.skipped} == {"already_moe"}


def test_layers_selects():
    model = nn.Sequential(net("mixtral"), net("mixtral"))
    report = moepass.convert(model, existing=True, layers="1.*")
    assert [site.id for site in report.converted] == ["1.moe"]
    assert [(site.id, site.reason) for site in report.skipped] == [("0.moe", "not_selected")]


# --- refusals: nothing changes, and the report names the block and the reason ----------------------------------------


class Noisy(MixtralStyle):
    def forward(self, hidden):
        noise = torch.rand_like(hidden) if self.training else 0.0
        return super().forward(hidden + noise)


class Capacity(MixtralStyle):
    """Only the first two tokens of every expert are computed."""

    def forward(self, hidden):
        flat = hidden.reshape(-1, D)
        weight, chosen = self.gate(flat).softmax(-1).topk(K)
        out = torch.zeros_like(flat)
        for e in range(E):
            token, slot = (t[:2] for t in torch.where(chosen == e))
            out = out.index_add(0, token, self.experts[e](flat[token]) * weight[token, slot, None])
        return out.view_as(hidden)


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Odd(StackedInPlaceStyle):
    """An activation that nobody would guess."""

    def __init__(self) -> None:
        super().__init__()
        self.act = Bessel()


class Extra(StackedInPlaceStyle):
    """A parameter that takes part in no known way."""

    def __init__(self) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.randn(D))

    def forward(self, x):
        return super().forward(x) * self.tilt


class Returns(StackedInPlaceStyle):
    def forward(self, x):
        y = super().forward(x)
        return y, y.square().mean(-1)


class Hooked(MixtralStyle):
    def __init__(self) -> None:
        super().__init__()
        self.gate.register_forward_hook(lambda *_: None)


class NoFFN(MixtralStyle):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))


REFUSED = {
    "differs_in_training": Noisy,
    "not_reproduced": Capacity,
    "updates_buffers": lambda: TorchtitanStyle(count=True),
    "return_form": Returns,
    "has_hooks": Hooked,
    "experts_not_understood": NoFFN,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_block_that_would_change_is_refused_with_its_reason(reason):
    model = Net(REFUSED[reason]())
    state, block = {k: v.clone() for k, v in model.state_dict().items()}, model.moe
    with pytest.warns(UserWarning, match="changed nothing"):
        report = moepass.convert(model, existing=True)
    assert [(site.id, site.reason) for site in report.skipped] == [("moe", reason)]
    assert model.moe is block
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("block", [Odd, Extra])
def test_what_no_hypothesis_explains_is_refused(block):
    with pytest.warns(UserWarning, match="changed nothing"):
        (site,) = moepass.convert(Net(block()), existing=True).skipped
    assert site.reason == "not_reproduced"


def test_blocks_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = Net(MixtralStyle())
    with pytest.warns(UserWarning, match="changed nothing"):
        (site,) = moepass.convert(model, existing=True).skipped
    assert site.reason == "no_data"


def test_tied_weights_are_refused():
    model = nn.Sequential(net("mixtral"), nn.Linear(D, E, bias=False))
    model[1].weight = model[0].moe.gate.weight
    with pytest.warns(UserWarning, match="changed nothing"):
        (site,) = moepass.convert(model, existing=True).skipped
    assert (site.id, site.reason) == ("0.moe", "tied_weight")


def test_the_model_itself_cannot_be_exchanged():
    with pytest.warns(UserWarning, match="changed nothing"):
        (site,) = moepass.convert(MixtralStyle(), existing=True).skipped
    assert site.reason == "root_module"


def test_arguments_for_dense_blocks_are_refused():
    for arguments in ({"spec": moepass.MoESpec()}, {"every": 2}, {"init": "copy"}, {"seed": 1}):
        with pytest.raises(errors.BadOption, match="existing=True"):
            moepass.convert(net("mixtral"), existing=True, **arguments)


def test_dense_blocks_are_left_alone():
    model = nn.Sequential(net("mixtral"), nn.Sequential(Expert()))
    report = moepass.convert(model, existing=True)
    assert [site.id for site in report.converted] == ["0.moe"]
    assert isinstance(model[1][0], Expert)


def test_attention_is_no_mixture_of_experts():
    layer = nn.TransformerEncoderLayer(D, 2, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = moepass.convert(layer, existing=True)
    assert not report.skipped


def test_the_proof_would_notice_swapped_gate_and_up(monkeypatch):
    """Guards the guard: a reading that is wrong in one detail is not accepted."""
    read = Guess.read

    def swapped(self, block):
        w_in, *rest = read(self, block)
        return torch.cat([*w_in.chunk(2, dim=1)[::-1]], dim=1), *rest

    monkeypatch.setattr(Guess, "read", swapped)
    verdict = read_block(MixtralStyle())
    assert verdict.code == "not_reproduced"


def test_a_rule_is_not_taken_for_another_that_is_near():
    class Nearly(SharedStyle):
        def forward(self, x):
            return super().forward(x) * (1 + 1e-3 * F.sigmoid(x.mean()))

    assert read_block(Nearly()).code == "not_reproduced"
