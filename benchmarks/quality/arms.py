"""The arms of the quality experiment: how a dense model becomes an MoE, and how its router is trained.

Every conversion goes through ``moepass.convert``.  What it does not offer (other cuts for every copy, redrawn channels
inside virtual groups, a sharper router) is done here to the weights of the converted module: they are experiments.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

import moepass
from benchmarks.quality.training import Setup, fresh_model
from moepass.nn.router import LOGIT_STD
from moepass.spec import ExpertSpec, InitMethod, InitSpec, LossSpec, MoESpec, RouterSpec
from moepass.upcycle.one_expert import generator, redrawn

#: Switch Transformer's coefficient, as in OLMoE and Mixtral; per layer.
BALANCE = 0.01


@dataclass(frozen=True)
class Arm:
    """One way to go on from the dense checkpoint.  ``method`` None: as a dense model.

    ``longer``         dense with as many FLOPs as top-2 of full width, hence more steps
    ``scratch``        the MoE starts from random weights instead
    ``shuffled``       every copy of the dense block is cut by its own permutation of the neurons; stays exact
    ``redrawn``        share of each expert's channels that are drawn anew, in virtual groups; not exact
    ``router_std``     standard deviation of the logits at step 0
    ``router_lr``      factor on the routers' learning rate; ``router_warmup``, ``router_frozen``: steps
    """

    text: str
    method: InitMethod | None = None
    experts: int = 8
    top_k: int = 2
    granularity: int = 1
    renormalize: bool = True
    longer: bool = False
    scratch: bool = False
    shuffled: bool = False
    redrawn: float = 0.0
    router_std: float = LOGIT_STD
    router_lr: float = 1.0
    router_warmup: int = 0
    router_frozen: int = 0

    def router_rate(self, step: int) -> float:
        """The factor at a step (from 0)."""
        if step < self.router_frozen:
            return 0.0
        return self.router_lr * min(1.0, (step + 1) / self.router_warmup if self.router_warmup else 1.0)

    @property
    def exact(self) -> bool:
        """Whether step 0 is the dense function (exactly so, not nearly)."""
        copies = self.method in (None, "copy", "virtual_groups")
        return copies and self.renormalize and not (self.scratch or self.redrawn)


def _groups(text: str, **changes: object) -> Arm:
    options: dict[str, object] = {"method": "virtual_groups", "granularity": 2} | changes
    return Arm(text, **options)  # type: ignore[arg-type]


MAIN = {
    "dense": Arm("continued dense"),
    "dense_flops": Arm("continued dense, more tokens: FLOPs of the top-2 arms", longer=True),
    "groups": _groups("virtual groups E8 G2 top-2 (default)"),
    "copy": Arm("copy E8 top-2", "copy"),
    "drop": Arm("Drop-Upcycling r=0.5 E8 top-2", "drop"),
    "scratch": Arm("MoE from scratch E8 top-2", "drop", scratch=True),
}

CANDIDATES = {
    "router_warm": _groups("router warm-up 400", router_warmup=400),
    "router_slow": _groups("router LR x 0.1", router_lr=0.1),
    "router_frozen": _groups("router frozen for 200 steps", router_frozen=200),
    "std_small": _groups("router std 0.02", router_std=0.02),
    "std_1": _groups("router std 1", router_std=1.0),
    "std_3": _groups("router std 3", router_std=3.0),
    "std_3_slow": _groups("router std 3, router LR x 0.25", router_std=3.0, router_lr=0.25),
    "shuffled": _groups("own cut for every copy", shuffled=True),
    "shuffled_std_1": _groups("own cut for every copy, router std 1", shuffled=True, router_std=1.0),
    "redrawn_05": _groups("5 % of the channels redrawn", redrawn=0.05),
    "softmax_first": _groups("weights not renormalised", renormalize=False),
    "two_blocks": _groups("E16 G2 top-4 (two whole blocks)", experts=16, top_k=4),
}

ARMS = MAIN | CANDIDATES


def build(arm: Arm, dense: nn.Module, setup: Setup, seed: int) -> nn.Module:
    """The model that an arm starts from."""
    model = fresh_model(setup, seed + 1) if arm.scratch else copy.deepcopy(dense)
    if arm.method is None:
        return model
    spec = MoESpec(
        router=RouterSpec(top_k=arm.top_k, normalize=1.0 if arm.renormalize else None),
        experts=ExpertSpec(num_experts=arm.experts),
        losses=LossSpec(load_balance="olmo_core_local", load_balance_weight=BALANCE),
    )
    # From scratch every channel of every expert is drawn as the model's own initialisation drew it.
    init = InitSpec(method=arm.method, granularity=arm.granularity, drop_ratio=1.0 if arm.scratch else 0.5, seed=seed)
    report = moepass.convert(model, spec, init=init)
    blocks = [model.get_submodule(site.where) for site in report.converted]
    assert len(blocks) == setup.layers, str(report)
    for number, block in enumerate(blocks):
        assert isinstance(block, moepass.nn.MoE)
        _adjust(block, arm, seed, f"layer {number}")
    return model


@torch.no_grad()
def _adjust(moe: moepass.nn.MoE, arm: Arm, seed: int, name: str) -> None:
    moe.router.weight.mul_(arm.router_std / LOGIT_STD)
    if arm.shuffled:
        shuffle_cuts(moe, arm.granularity, seed, name)
    if arm.redrawn:
        redraw_channels(moe, arm.redrawn, seed, name)


@torch.no_grad()
def shuffle_cuts(moe: moepass.nn.MoE, G: int, seed: int, name: str) -> None:
    """Cut every copy of the dense block by a permutation of its own: a group still sums to the dense block."""
    E, D, f = moe.w_out.shape
    n = moe.w_in.shape[1] // f
    for first in range(0, E, G):
        order = torch.randperm(G * f, generator=generator(seed, f"{name}/cut/{first}"))
        # The group's neurons in the dense order: [n, G*f, D] and [G*f, D]; then the same in the new order.
        w_in = moe.w_in[first : first + G].reshape(G, n, f, D).transpose(0, 1).reshape(n, G * f, D)[:, order]
        w_out = moe.w_out[first : first + G].transpose(1, 2).reshape(G * f, D)[order]
        moe.w_in[first : first + G] = w_in.reshape(n, G, f, D).transpose(0, 1).reshape(G, n * f, D)
        moe.w_out[first : first + G] = w_out.reshape(G, f, D).transpose(1, 2)


@torch.no_grad()
def redraw_channels(moe: moepass.nn.MoE, ratio: float, seed: int, name: str) -> None:
    """Drop-Upcycling inside virtual groups: per expert, one index set for gate, up and down."""
    E, _, f = moe.w_out.shape
    for e in range(E):
        channels = torch.randperm(f, generator=generator(seed, f"{name}/drop/{e}"))[: round(ratio * f)]
        for p in range(moe.w_in.shape[1] // f):
            old = moe.w_in[e, p * f + channels]
            moe.w_in[e, p * f + channels] = redrawn(old, seed, f"{name}/in/{e}/{p}")
        moe.w_out[e][:, channels] = redrawn(moe.w_out[e][:, channels], seed, f"{name}/out/{e}")
