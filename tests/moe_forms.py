"""MoE blocks as other code bases spell them, and what they mean: small stand-ins, one function or class a form.

``oracle`` is the meaning in plain loops, in whatever dtype it is given; every form is a function
``(x, index, weight, *weights) -> y`` that must equal it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moepass.ops  # noqa: F401 -- registers the op
from moepass.graph.capture import Capture
from moepass.graph.foreign.emit import rewrite_foreign
from moepass.graph.foreign.find import recognise
from moepass.graph.foreign.site import ForeignExperts

T, D, FF, E, K = 12, 8, 16, 4, 2


def oracle(x, index, weight, w_in, w_out, b_in=None, b_out=None, act=None):
    """``sum_k weight[t,k] * expert(x_t)``; ``w_in [E, n*F, D]``, ``w_out [E, D, F]``."""
    act = act or swiglu
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros(w_out.shape[1], dtype=x.dtype)
        for k in range(index.shape[1]):
            e = int(index[t, k])
            h = w_in[e] @ x[t] + (0 if b_in is None else b_in[e])
            y = y + weight[t, k] * (w_out[e] @ act(h) + (0 if b_out is None else b_out[e]))
        rows.append(y)
    return torch.stack(rows)


def swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def arguments(seed=0, *, dtype=torch.float32, biases=False, E=E, K=K, T=T):
    """x, index, weight and the stacked weights of a gated block."""
    torch.manual_seed(seed)
    x, logits = torch.randn(T, D, dtype=dtype), torch.randn(T, E)
    weight, index = torch.topk(torch.softmax(logits, -1), K)
    params = [nn.Parameter(torch.randn(E, 2 * FF, D) * 0.3), nn.Parameter(torch.randn(E, D, FF) * 0.3)]
    if biases:
        params += [nn.Parameter(torch.randn(E, 2 * FF)), nn.Parameter(torch.randn(E, D))]
    return x, index, weight.to(dtype), *(nn.Parameter(p.detach().to(dtype)) for p in params)


def grouped_mm(x, w, offs):
    """A grouped GEMM for every dtype on a CPU: transformers' own op, which it uses for float32 under torch.compile."""
    import transformers.integrations.moe  # noqa: F401 -- registers the op

    return torch.ops.transformers.grouped_mm_fallback(x, w, offs=offs)


def histogram(ids: Tensor, experts: int) -> Tensor:
    return torch.histc(ids.float(), bins=experts, min=0, max=experts - 1)


# --- HF: sort, gather, two grouped GEMMs, un-sort by the inverse permutation ------------------------------------------


def sorted_rows(x, index, weight, w_in, w_out, b_in=None, b_out=None):
    K, E = index.size(-1), w_in.shape[0]
    ids, perm = torch.sort(index.reshape(-1))
    offs = torch.cumsum(histogram(ids, E), 0, dtype=torch.int32)
    h = grouped_mm(x[perm // K], w_in.transpose(-2, -1), offs)
    if b_in is not None:
        h.add_(b_in[ids])
    y = grouped_mm(swiglu(h), w_out.transpose(-2, -1), offs)
    if b_out is not None:
        y.add_(b_out[ids])
    y = y * weight.reshape(-1)[perm].unsqueeze(-1)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0))
    return y[inverse].view(x.shape[0], K, -1).sum(dim=1)


def picked_weights(x, index, weight, w_in, w_out, b_in=None, b_out=None):
    """HF's batched form: every row brings its own expert's weights."""
    K, ids = index.size(-1), index.reshape(-1)
    h = torch.bmm(w_in[ids], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
    if b_in is not None:
        h.add_(b_in[ids])
    y = torch.bmm(w_out[ids], swiglu(h).unsqueeze(-1)).squeeze(-1)
    if b_out is not None:
        y.add_(b_out[ids])
    y = y * weight.reshape(-1).unsqueeze(-1)
    return y.view(x.shape[0], K, -1).sum(dim=1)


# --- torchtitan -------------------------------------------------------------------------------------------------------


def torchtitan(x, index, weight, w1, w2, w3, *, score_first=False, shared=None):
    """Stable argsort, histc up to E, scores before or after the experts, scatter_add by token."""
    K, E = index.shape[1], w1.shape[0]
    counts = torch.histc(index.view(-1).float(), bins=E, min=0, max=E)
    perm = torch.argsort(index.view(-1), stable=True)
    scores, token = weight.view(-1)[perm], (perm // K).reshape(-1, 1).expand(-1, x.shape[1])
    rows = torch.gather(x, dim=0, index=token)
    if score_first:
        rows = (rows.to(torch.float32) * scores.reshape(-1, 1)).to(x.dtype)
    offs = torch.cumsum(counts, dim=0, dtype=torch.int32)
    h = F.silu(grouped_mm(rows, w1.transpose(-2, -1), offs))
    h = h * grouped_mm(rows, w3.transpose(-2, -1), offs)
    y = grouped_mm(h, w2.transpose(-2, -1), offs).type_as(x)
    if not score_first:
        y = (y.to(torch.float32) * scores.reshape(-1, 1)).to(x.dtype)
    out = torch.zeros_like(x) if shared is None else shared(x)
    return out.scatter_add(dim=0, index=token, src=y)


def torchtitan_product(x, index, weight, w1, w2, w3):
    """The later form: rows are put back and combined by a batched product with the scores."""
    K, E = index.shape[1], w1.shape[0]
    counts = torch.histc(index.view(-1).float(), bins=E, min=0, max=E)
    perm = torch.argsort(index.view(-1), stable=True)
    offs = torch.cumsum(counts, dim=0, dtype=torch.int32)
    rows = x[perm // K]
    h = F.silu(grouped_mm(rows, w1.transpose(-2, -1), offs)) * grouped_mm(rows, w3.transpose(-2, -1), offs)
    y = grouped_mm(h, w2.transpose(-2, -1), offs)
    back = torch.zeros((x.shape[0] * K, x.shape[1]), dtype=y.dtype)
    back[perm] = y
    back = back.reshape(-1, K, x.shape[1])
    return torch.bmm(weight.reshape(-1, 1, K), back).squeeze(1)


# --- OLMo-core and Megatron -------------------------------------------------------------------------------------------


def olmo_core(x, index, weight, w1, w2, w3):
    """Flat parameters ``[E*F, D]`` viewed as stacks; w2 is not transposed; index_add by token."""
    K, E = index.shape[1], E_of(w1)
    ids, perm = torch.sort(index.flatten())
    offs = histogram(ids, E).cumsum(0).to(torch.int32)
    w1, w2, w3 = (w.view(E, -1, x.shape[1]) for w in (w1, w2, w3))
    rows, token = x.index_select(0, perm // K), perm // K
    h = F.silu(grouped_mm(rows, w1.transpose(1, 2), offs)) * grouped_mm(rows, w3.transpose(1, 2), offs)
    y = grouped_mm(h, w2, offs) * weight.flatten()[perm].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, token, y)


def E_of(w: Tensor) -> int:
    return w.shape[0] // FF


def megatron(x, index, weight, w_in, w_out):
    """Weights ``[E, D, 2F]`` and ``[E, F, D]``, probabilities inside the activation, in-place combine."""
    K, E = index.shape[1], w_in.shape[0]
    perm = index.reshape(-1).argsort(stable=True)
    counts = F.one_hot(index.reshape(-1), E).sum(0)
    offs = counts.cumsum(0).to(torch.int32)
    token = torch.arange(x.shape[0]).unsqueeze(1).expand(-1, K).reshape(-1)[perm]
    probs = weight.reshape(-1)[perm]
    h = swiglu(grouped_mm(x[token], w_in, offs)) * probs.unsqueeze(-1)
    out = torch.zeros(x.shape)
    out.index_add_(0, token, grouped_mm(h, w_out, offs))
    return out


# --- Llama-4: every expert on every token -----------------------------------------------------------------------------


def every_expert(x, logits, w_in, w_out, K=1):
    E = w_in.shape[0]
    top, index = torch.topk(logits, K, dim=1)
    scores = torch.sigmoid(torch.full_like(logits, float("-inf")).scatter_(1, index, top).float()).to(x.dtype)
    rows = x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)
    gate, up = torch.bmm(rows.view(E, -1, x.shape[1]), w_in).chunk(2, dim=-1)
    y = torch.bmm(up * F.silu(gate), w_out).view(-1, x.shape[1])
    return y.reshape(E, -1, x.shape[1]).sum(dim=0)


# --- what the recogniser makes of a form ------------------------------------------------------------------------------


def found(form, *args):
    """The verdicts on the graph of ``form``."""
    seen = []

    def backend(gm, inputs):
        seen.extend(recognise(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(form, backend=backend, fullgraph=True)(*args)
    return seen


def site(form, *args) -> ForeignExperts:
    (only,) = found(form, *args)
    assert isinstance(only, ForeignExperts), only
    return only


def rewriting(graphs):
    """A backend that computes every site by our op and keeps the graphs."""

    def backend(gm, inputs):
        capture = Capture.of(gm, inputs)
        for verdict in recognise(capture.gm):
            assert isinstance(verdict, ForeignExperts), verdict
            rewrite_foreign(capture, (), verdict, torch.ops.moepass.experts.default)
        capture.gm.graph.lint()
        capture.gm.recompile()
        graphs.append(capture.gm)
        return capture.gm.forward

    return backend


def rewritten(form, *args):
    """``form`` with its sites computed by our op, and the graph that does it."""
    graphs = []
    torch._dynamo.reset()
    y = torch.compile(form, backend=rewriting(graphs), fullgraph=True)(*args)
    return y, graphs[0]


def assert_same_function(form, *args, tolerance=1e-5):
    """Values and the gradients of every floating argument, and nothing left of the old region."""
    args = [a.detach().clone().requires_grad_(a.dtype.is_floating_point) for a in args]
    leaves = [a for a in args if a.requires_grad]
    expected = form(*args)
    probe = torch.randn(expected.shape, dtype=expected.dtype)
    grads = torch.autograd.grad((expected * probe).sum(), leaves)
    actual, gm = rewritten(form, *args)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    ours = torch.autograd.grad((actual * probe).sum(), leaves)
    for mine, theirs in zip([actual, *ours], [expected, *grads], strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    names = {str(node.target) for node in gm.graph.nodes}
    assert "moepass.experts.default" in names
    assert not [n for n in names if any(word in n for word in ("grouped_mm", "bmm", "sort", "histc", "setitem"))]
