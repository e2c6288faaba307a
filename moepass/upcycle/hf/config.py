"""The output's config.json: every field of the host's class decided, none left to a default.

Where a field comes from, first match wins
    1  the host's ``fields`` (what makes the MoE)
    2  the dense config's field of the same name (only declared ones: a stray key means nothing to the dense model and
       might to the host)
    3  the host's ``absent`` (the dense family has no such field; the value changes nothing)
A field of the host that none of these decides, or a dense field that nobody takes, is new in this transformers: it is
reported as a warning, and ``verify`` still compares the functions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from moepass import errors
from moepass.upcycle.hf.hosts import Shape, head_dim
from moepass.upcycle.hf.match import Match, declared, transformers

#: Dense fields that are looked at as features, or that decide widths.
_FEATURE_FIELDS = {"attention_bias", "attention_out_bias", "mlp_bias", "use_bias", "sliding_window", "layer_types",
                   "use_sliding_window", "max_window_layers", "intermediate_size", "head_dim"}  # fmt: skip
_EVERY_CONFIG = ("id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder")


@dataclass(frozen=True)
class HostConfig:
    """``config`` is the host's config object, ``json`` what is written, ``warnings`` sentences for the user."""

    config: Any
    json: dict[str, Any]
    warnings: tuple[str, ...]


def host_config(found: Match, shape: Shape, dtype: str | None) -> HostConfig:
    """``dtype``: the output's, as torch calls it; None keeps what the source says."""
    cls = transformers().CONFIG_MAPPING[found.host.model_type]
    values, undecided = _values(found, shape, cls)
    values["dtype"] = dtype if dtype is not None else getattr(found.config, "dtype", None)
    values["architectures"] = [_architecture(found.host.model_type)]
    try:
        config = cls(**values)
    except Exception as error:  # each config class has checks of its own, of any type
        raise errors.HostRefuses(
            dense=found.family.model_type,
            host=found.host.model_type,
            field="config.json",
            value="...",
            detail=" ".join(str(error).split())[:300],
            remedy="correct the field, or choose another host with --to",
        ) from error
    _check(config, values, found)
    return HostConfig(config, _json(config, values, found), (*_warnings(found, undecided), *_lost(found, shape, cls)))


def config_bytes(content: dict[str, Any]) -> bytes:
    """As ``save_pretrained`` writes it: indented, sorted."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _values(found: Match, shape: Shape, cls: Any) -> tuple[dict[str, Any], list[str]]:
    dense, made = declared(found.config), found.host.fields(shape)
    values = dict(made)
    values.setdefault("head_dim", head_dim(found.config))
    undecided = []
    renamed = getattr(cls, "attribute_map", {})
    for name in sorted(declared(cls) - set(values) - {renamed.get(key) for key in values}):
        if name in dense:
            values[name] = getattr(found.config, name)
        elif name in found.host.absent:
            values[name] = found.host.absent[name]
        else:
            undecided.append(name)
    return values, undecided


def _architecture(model_type: str) -> str:
    names = transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return str(names[model_type])


def _check(config: Any, values: dict[str, Any], found: Match) -> None:
    """The host's class may rewrite what it is given; a value that did not stick would be a silent change."""
    for name, value in values.items():
        kept = getattr(config, name)
        if name in {"dtype", "architectures"} or kept == value or (not kept and not value):
            continue
        if name == "rope_parameters" and _covers(kept, value):
            continue
        raise errors.HostRefuses(
            dense=found.family.model_type,
            host=found.host.model_type,
            field=name,
            value=value,
            detail=f"its config class makes {kept!r} of it",
            remedy="report this with your version of transformers",
        )


def _covers(kept: Any, value: dict[str, Any]) -> bool:
    """Everything that was given is there; the class may add keys that it derives."""
    return isinstance(kept, dict) and all(kept.get(key) == v for key, v in value.items())


def _json(config: Any, values: dict[str, Any], found: Match) -> dict[str, Any]:
    content = json.loads(config.to_json_string(use_diff=False))
    for key in (*_EVERY_CONFIG, "_name_or_path", "transformers_version"):
        content.pop(key, None)
    content["transformers_version"] = transformers().__version__
    for key, name in found.host.aliases:
        content[key] = values[name]
    return dict(content)


def _warnings(found: Match, undecided: list[str]) -> list[str]:
    warnings = []
    if undecided:
        fields = ", ".join(undecided)
        warnings.append(f"{found.host.model_type} has fields new to moepass, left at their defaults: {fields}")
    for name in sorted(found.family.training):
        if value := getattr(found.config, name, 0):
            warnings.append(f"{name}={value} acts in training only and has no counterpart in {found.host.model_type}")
    width = found.config.hidden_size // found.config.num_attention_heads
    if head_dim(found.config) != width and not found.host.head_dim:
        warnings.append(
            f"head_dim={head_dim(found.config)} differs from hidden_size / num_attention_heads = {width}: transformers "
            f"reads it for {found.host.model_type}, other programs may not"
        )
    return warnings


def _lost(found: Match, shape: Shape, cls: Any) -> list[str]:
    """Dense fields that no rule accounts for."""
    known = declared(cls) | set(found.host.fields(shape)) | found.family.ignored | found.family.training
    lost = sorted(declared(found.config) - known - _FEATURE_FIELDS)
    if not lost:
        return []
    return [f"fields of {found.family.model_type} that moepass does not know were left out: {', '.join(lost)}"]
