"""Routing recorded in one pass and used in another: eagerly, compiled, and under activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from moepass import errors, reference
from moepass.nn import MoE, Router, capture_routing, replay_routing
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec

D, E, T = 6, 8, 9


class Net(nn.Module):
    """Two routers whose choices decide the output."""

    def __init__(self, spec=None, recompute=False):
        super().__init__()
        spec = spec or RouterSpec(score="sigmoid", bias=True, bias_update_rate=0.1)
        dispatch = DispatchSpec(capacity_factor=1.0) if spec.choice == "expert" else None
        self.linear, self.recompute = nn.Linear(D, D), recompute
        self.first, self.second = Router(D, E, spec, dispatch=dispatch), Router(D, E, spec, dispatch=dispatch)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def block(self, x):
        x = self.linear(x).tanh()
        for router in (self.first, self.second):
            index, weight, *_ = router(x)
            x = (x * (weight * (index + 1)).sum(-1, keepdim=True)).tanh()
        return x

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)


def tokens(seed, count=T):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def output_and_gradients(model, x):
    y = model(x)
    return y, torch.autograd.grad(y.square().sum(), list(model.parameters()), materialize_grads=True)


def by_hand(net, routes, x):
    """The replayed function: recorded experts, weights of the present scores."""
    x = net.linear(x).tanh()
    for name, router in (("first", net.first), ("second", net.second)):
        index, scores = routes[name][0].index_TK, torch.sigmoid(x @ router.weight.T)
        weight = scores.gather(1, index)
        weight = weight / weight.sum(-1, keepdim=True)
        x = (x * (weight * (index + 1)).sum(-1, keepdim=True)).tanh()
    return x


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compile_", [False, True])
def test_replay_is_the_recorded_choice_with_the_weights_of_the_present(compile_, recompute):
    net = Net(recompute=recompute)
    torch._dynamo.reset()
    model = torch.compile(net, backend="aot_eager", fullgraph=True) if compile_ else net
    x, other = tokens(1), tokens(2)
    before, _ = output_and_gradients(model, other)  # compiled without a tape
    with capture_routing(model, weights=True) as routes:
        recorded, _ = output_and_gradients(model, x)
    assert [(name, len(calls)) for name, calls in routes.items()] == [("first", 1), ("second", 1)]
    h = net.linear(x).tanh()
    index, weight = reference.route(h @ net.first.weight.T, net.first.spec, bias=net.first.bias)
    assert torch.equal(routes["first"][0].index_TK, index)
    torch.testing.assert_close(routes["first"][0].weight_TK, weight.detach())
    with replay_routing(model, routes):
        y, grads = output_and_gradients(model, other)
    expected = by_hand(net, routes, other)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(net.parameters()), materialize_grads=True)
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, before), "the two batches are routed differently"
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(model(other), before)
    torch.testing.assert_close(model(x), recorded)


def test_what_was_captured_eagerly_replays_in_compiled_code_and_the_other_way_round():
    net = Net()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with capture_routing(net) as eager:
        net(tokens(1))
    with capture_routing(compiled) as ours:
        compiled(tokens(1))
    assert list(eager) == list(ours)
    assert all(torch.equal(eager[name][0].index_TK, ours[name][0].index_TK) for name in eager)
    for model, routes in ((compiled, eager), (net, ours)):
        with replay_routing(model, routes):
            torch.testing.assert_close(model(tokens(2)), by_hand(net, eager, tokens(2)))
    assert counter.frame_count == 2
    for seed in (3, 4, 5):  # another context of the same kind needs no other graph
        with capture_routing(compiled) as routes:
            compiled(tokens(seed))
        with replay_routing(compiled, routes):
            compiled(tokens(seed))
    assert counter.frame_count == 2


@pytest.mark.parametrize("compile_", [False, True])
def test_several_calls_replay_in_their_order(compile_):
    net = Net()
    torch._dynamo.reset()
    model = torch.compile(net, backend="aot_eager", fullgraph=True) if compile_ else net
    with capture_routing(model) as routes:
        outputs = [model(tokens(seed)) for seed in range(3)]
    with torch.no_grad():
        net.first.bias.add_(torch.arange(float(E)))
        net.second.bias.sub_(torch.arange(float(E)))
    assert not torch.allclose(model(tokens(0)), outputs[0]), "the bias has changed the choice"
    with replay_routing(model, routes):
        for seed, output in enumerate(outputs):
            torch.testing.assert_close(model(tokens(seed)), output)


@pytest.mark.parametrize(
    "spec",
    [
        RouterSpec(assignment="random"),
        RouterSpec(choice="expert", normalize=None),
        RouterSpec(score_first=False, normalize=None),
    ],
    ids=["random", "expert choice", "scores after top-k"],
)
def test_the_batch_that_was_captured_replays_to_the_same_numbers(spec):
    net = Net(spec)
    with capture_routing(net) as routes:
        y, grads = output_and_gradients(net, tokens(1))
    with replay_routing(net, routes):
        again, grads_again = output_and_gradients(net, tokens(1))
    torch.testing.assert_close(again, y)
    for a, b in zip(grads_again, grads, strict=True):
        torch.testing.assert_close(a, b)


def test_masked_tokens_are_nobodys_in_the_record_and_in_the_replay():
    net, mask = Net(), torch.arange(T) < 5
    with capture_routing(net.first) as routes:
        net.first(tokens(1), mask)
    assert list(routes) == [""]
    assert (routes[""][0].index_TK[5:] == E).all()
    with replay_routing(net.first, routes):
        index, weight, *_ = net.first(tokens(2))
    assert torch.equal(index, routes[""][0].index_TK)
    assert torch.count_nonzero(weight[5:]) == 0


def test_a_block_replays_under_the_moepass_backend():
    spec = MoESpec(experts=ExpertSpec(num_experts=E, intermediate_size=4, activation="swiglu"))
    block = MoE(D, spec)
    with torch.no_grad():
        block.router.weight.mul_(30.0)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="moepass", options={"inner": "aot_eager"})
    plain = compiled(tokens(2))
    with capture_routing(block) as routes:
        block(tokens(1))
    with replay_routing(block, routes):
        y, eager = compiled(tokens(2)), block(tokens(2))
    torch.testing.assert_close(y, eager)
    assert not torch.allclose(y, plain)


def test_recomputation_that_could_be_of_several_calls_is_refused():
    net = Net(recompute=True)
    with capture_routing(net) as routes:
        [net(tokens(seed)) for seed in range(2)]
    with pytest.raises(errors.ReplayMismatch, match="which; replay one forward"), replay_routing(net, routes):
        torch.stack([net(tokens(seed)) for seed in range(2)]).sum().backward()


def test_a_replay_that_does_not_fit_is_refused_with_its_router_and_leaves_no_trace():
    net = Net()
    with capture_routing(net) as routes:
        net(tokens(1))
        net(tokens(2))
    cases = {
        "first cannot be replayed: there is no record": ({}, lambda: net(tokens(1))),
        "first cannot be replayed: 9 tokens were recorded and 4 arrive": (routes, lambda: net(tokens(1, 4))),
        "called 2 times in the capture": (routes, lambda: [net(tokens(1)) for _ in range(3)]),
        "1 of 2 recorded calls were used": (routes, lambda: net(tokens(1))),
        "in a capture or a replay already": (routes, lambda: capture_routing(net).__enter__()),
    }
    for text, (recorded, run) in cases.items():
        with pytest.raises(errors.ReplayMismatch, match=text), replay_routing(net, recorded):
            run()
        assert net.first.tape is None
    with pytest.raises(errors.NoRouters, match=r"capture_routing found no moepass\.nn\.Router in Linear"):
        capture_routing(nn.Linear(2, 2)).__enter__()
