"""Names of modules do not depend on what a model is wrapped in."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moepass.nn import MoE, Router
from moepass.nn.named import named
from moepass.spec import ExpertSpec, MoESpec


class Holder(nn.Module):
    """A model that calls a part of its own ``module``, as wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        spec = MoESpec(experts=ExpertSpec(num_experts=4, intermediate_size=4, activation="swiglu"))
        self.module = nn.Sequential(spec.build(4), checkpoint_wrapper(spec.build(4)))


def test_names_are_those_of_the_model_before_it_was_wrapped():
    model = Holder()
    for around in (model, nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert list(dict(named(around, MoE))) == ["module.0", "module.1"]
        assert list(dict(named(around, Router))) == ["module.0.router", "module.1.router"]
    assert dict(named(nn.DataParallel(model.module[0]), MoE)) == {"": model.module[0]}
