"""MoE models on the meta device, where transformers takes the branches that it takes on an accelerator."""

from __future__ import annotations

import pytest
import torch

import moepass
from tests import moe_zoo


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_experts_on_an_accelerator_are_recognised_too(family, experts):
    torch._dynamo.reset()
    model = moe_zoo.build(family, experts).to("meta")
    model.config.use_cache = False
    inputs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in moe_zoo.inputs(family, 5).items()}

    with torch.no_grad():
        report = moepass.explain(model, hardware="H100", tokens=(1, 512))(**inputs)

    routed = [site for site in report.sites if site.kind == "moe"]
    assert routed
    assert {(site.status, site.reason) for site in routed} == {("lowered", None)}
