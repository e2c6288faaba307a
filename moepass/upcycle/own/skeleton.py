"""The model of a config on the meta device: the dense architecture, and MoE blocks where a manifest says.

Contract
    in    a dense config as JSON, a ``Manifest``
    out   the stock causal language model in evaluation mode: parameters and persistent buffers on meta, other buffers
          computed on ``device``; blocks placed by the recogniser and the splicer of ``moepass.convert``
    A manifest that does not fit what the recogniser finds in the architecture raises ``BadMoEFolder``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moepass import errors
from moepass.nn.moe import MoE
from moepass.upcycle.find import Block as Found
from moepass.upcycle.find import find
from moepass.upcycle.hf.match import transformers
from moepass.upcycle.init import complete
from moepass.upcycle.modules import replace_site, set_tensor_at
from moepass.upcycle.own.schema import Block, Manifest, refuse

_RESTORE = "restore the file as it was written"


def dense_model(config: dict[str, Any], path: Path, device: torch.device | str = "cpu") -> Any:
    """``AutoModelForCausalLM`` of a config, without weights.  Raises ``BadMoEFolder`` (it names ``path``)."""
    package = transformers()
    model_type = config.get("model_type")
    if model_type not in package.CONFIG_MAPPING:
        refuse(path, f"this transformers does not know model_type={model_type!r}", "install the one it was made with")
    try:
        settings = package.CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(config))
        with torch.device("meta"):
            model = package.AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except Exception as error:  # whatever a config can make another library say
        detail = f"transformers cannot build it ({' '.join(str(error).split())[:300]})"
        refuse(path, detail, "check the dense config; it must be that of a causal language model")
    real_buffers(model, device)
    return model.eval()


def real_buffers(model: Any, device: torch.device | str) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies), as the model itself would."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        set_tensor_at(model, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # does nothing to weights on meta


def place(model: nn.Module, manifest: Manifest, path: Path) -> nn.Module:
    """Put the manifest's MoE blocks, on meta, in their places."""
    found = {block.place.where: block for block in find(model).blocks}
    groups = []
    for i, block in enumerate(manifest.blocks):
        sites = []
        for where in block.origin.places:
            if where.where not in found:
                known = ", ".join(found) or "none"
                detail = f"blocks.{i}: no dense block gives the place {where.where!r} (there are {known:.300})"
                refuse(path, detail, "use the version of moepass and transformers that it was made with")
            sites.append(found.pop(where.where))
        groups.append((block, sites))
        _check(i, block, sites, path)
    for block, sites in groups:  # nothing is exchanged before everything is known to fit
        moe = MoE(block.D, block.spec, device="meta", dtype=_dtype(sites[0]))
        moe.origin = block.origin
        for site in sites:
            replace_site(model, site.location, moe)
    return model


def _dtype(site: Found) -> torch.dtype:
    return site.module.get_parameter(site.shape.down.weight).dtype


def _check(i: int, block: Block, sites: Sequence[Found], path: Path) -> None:
    """The spec is what ``convert`` would have completed it to, and the dense tensors have these names."""
    if not sites:
        refuse(path, f"blocks.{i}.origin.places is empty", _RESTORE)
    for site, recorded in zip(sites, block.origin.places, strict=True):
        if site.shape.D != block.D:
            refuse(path, f"blocks.{i}.D={block.D}, and {site.id} has the width {site.shape.D}", _RESTORE)
        if site.place != recorded:
            detail = f"blocks.{i}: {recorded.where} was made from {recorded.names}, now it would be {site.place.names}"
            refuse(path, detail, "use the version of transformers that it was made with")
        try:
            full = complete(
                block.spec,
                F=site.shape.F,
                D=site.shape.D,
                program=site.shape.program,
                init=block.origin.init,
                bias_in=site.shape.ups[0].bias is not None,
                bias_out=site.shape.down.bias is not None,
                dropout=block.spec.experts.dropout,
                where=site.id,
            )
        except errors.MoepassError as error:
            refuse(path, f"blocks.{i}.spec does not fit: {error}", _RESTORE)
        if full != block.spec:
            detail = f"blocks.{i}.spec does not fit {site.id}: complete, it would be {full.experts}"
            refuse(path, detail, _RESTORE)


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names in the state dict, those of one tensor together, in order."""
    names: dict[int, list[str]] = {}
    held: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        held[id(tensor)] = tensor  # identities are only unique among the living
    return list(names.values())
