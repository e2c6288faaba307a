"""From graph inputs to the names users know: ``model.layers.0.mlp.gate_proj.weight`` and ``model.layers.0.mlp``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from torch.fx import Node

_STEP = r"\._(?:modules|parameters|buffers)\['([^']+)'\]"
_TAIL = re.compile(rf"(?:{_STEP})+$")
ROOT = "(root)"


def parameter_fqn(node: Node) -> str | None:
    """Fully-qualified name of the parameter or buffer that a placeholder or get_attr holds, relative to the root.

    Dynamo's source of the placeholder decides (``L['self']._modules['mlp']._parameters['weight']``), then the flat
    names that Dynamo leaves on the graph module.  None for anything else.
    """
    if node.op == "get_attr":
        return str(node.target)
    if node.op != "placeholder":
        return None
    return _from_source(node) or _from_flat_names(node)


def site_id(names: Sequence[str]) -> str:
    """The innermost module that holds all the parameters; ``(root)`` where that is the root itself.

    >>> site_id(["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"])
    'model.layers.0.mlp'
    """
    modules = [name.split(".")[:-1] for name in names]
    if not modules:
        return ROOT
    shared: list[str] = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or ROOT


def site_ids(sites: Sequence[Sequence[str]]) -> list[str]:
    """The ids of a model's sites from the names of their parameters, the first projection's weight first.

    Several sites of one module are named after the module of their first projection, since ids seed the draws and
    select in pinned plans.  ``moepass.convert`` and the backend both name their sites here.

    >>> site_ids([["rise.0.weight", "fall.0.weight"], ["rise.1.weight", "fall.1.weight"]])
    ['rise.0', 'rise.1']
    """
    ids = [site_id(names) for names in sites]
    count = Counter(ids)
    return [id if count[id] == 1 else names[0].rpartition(".")[0] or id for id, names in zip(ids, sites, strict=True)]


def _from_source(node: Node) -> str | None:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", None)
    text = name() if callable(name) else name
    tail = _TAIL.search(text) if isinstance(text, str) else None
    if tail is None:
        return None
    steps = [step for step in re.findall(_STEP, tail.group()) if step != "_orig_mod"]
    return ".".join(steps) or None


def _from_flat_names(node: Node) -> str | None:
    """``l_self_modules_mlp_parameters_weight_`` through the map ``L__self___mlp_weight -> mlp.weight``."""
    owner = node.graph.owning_module
    flat = getattr(owner, "meta", {}).get("dynamo_flat_name_to_original_fqn", {}) if owner is not None else {}
    wanted = _letters(re.sub(r"_(modules|parameters|buffers)_", "_", str(node.target)))
    matches = {fqn for key, fqn in flat.items() if _letters(key) == wanted}
    return matches.pop() if len(matches) == 1 else None


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
