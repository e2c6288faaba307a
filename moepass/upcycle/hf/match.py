"""May this dense model become that MoE?  The answer comes from the resolved config, before anything is read or written.

``resolve`` reads config.json through the family's own config class, so that old and short configs mean what they mean
there; ``match`` finds the host, or refuses and names the field and what to do instead.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from moepass import errors
from moepass.upcycle.hf.families import FAMILIES, FEATURES, NO_HOST, Family, Feature
from moepass.upcycle.hf.hosts import HOSTS, Host

_OWN = "use --to moepass (moepass's own format), or moepass.convert on the loaded model"


@dataclass(frozen=True)
class Match:
    """A dense family, its host, the resolved config and the features of this model."""

    family: Family
    host: Host
    config: Any
    features: tuple[Feature, ...]


def transformers() -> Any:
    """The package.  Raises ``MissingPackage``."""
    try:
        import transformers as package
    except ImportError as error:
        raise errors.MissingPackage(
            what="moepass upcycle", package="transformers", install="moepass[transformers]"
        ) from error
    return package


def resolve(raw: dict[str, Any]) -> Any:
    """config.json as its own config class understands it.  Raises ``NoHost`` for an unknown ``model_type``."""
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        _refuse_family(model_type)
    mapping = transformers().CONFIG_MAPPING
    if model_type not in mapping:
        detail = "this transformers does not know it"
        raise errors.NoHost(model_type=model_type, detail=detail, remedy="install a newer one")
    try:
        return mapping[model_type].from_dict(copy.deepcopy(raw))
    except Exception as error:  # each config class has checks of its own, of any type
        raise errors.NoHost(
            model_type=model_type,
            detail=f"its config.json is not valid: {' '.join(str(error).split())[:300]}",
            remedy="correct config.json",
        ) from error


def match(raw: dict[str, Any], to: str | None = None) -> Match:
    """The host for this config: ``to``, or the family's default.  Raises ``NoHost``, ``HostRefuses``, ``BadOption``."""
    config = resolve(raw)
    family = FAMILIES[raw["model_type"]]
    name = family.hosts[0] if to is None else to
    if name not in family.hosts:
        known = ", ".join(family.hosts)
        raise errors.BadOption(name="to", value=to, detail=f"{family.model_type} can become {known}")
    features = tuple(family.features(config))
    missing = next((f for f in features if f.name not in HOSTS[name].supports), None)
    if missing is not None:
        raise errors.HostRefuses(
            dense=family.model_type,
            host=name,
            field=missing.field,
            value=missing.value,
            detail=f"{name} does not have {FEATURES[missing.name]}",
            remedy=_alternative(family, features),
        )
    if name not in transformers().CONFIG_MAPPING:
        raise errors.NoHost(
            model_type=family.model_type, detail=f"this transformers has no {name}", remedy="install a newer one"
        )
    return Match(family, HOSTS[name], config, features)


def declared(config: Any) -> set[str]:
    """Fields that a config class declares itself, without those of every config."""
    if not dataclasses.is_dataclass(config):
        raise errors.MissingPackage(what="moepass upcycle", package="transformers", install="transformers>=5.23")
    base = {field.name for field in dataclasses.fields(transformers().PreTrainedConfig)}
    return {field.name for field in dataclasses.fields(config)} - base


def _alternative(family: Family, features: tuple[Feature, ...]) -> str:
    wanted = {f.name for f in features}
    fitting = [name for name in family.hosts if wanted <= HOSTS[name].supports]
    if fitting:
        return f"use --to {fitting[0]}"
    return f"no stock architecture has it; {_OWN}"


def _refuse_family(model_type: object) -> None:
    name = str(model_type)
    detail = NO_HOST.get(name)
    remedy = _OWN
    if detail is None and name in HOSTS:
        detail, remedy = "it is a mixture of experts already", "give a dense checkpoint"
    if detail is None:
        close = difflib.get_close_matches(name, FAMILIES, n=1)
        detail = "it is not one of the checked dense architectures" + (f" (did you mean {close[0]}?)" if close else "")
        remedy = f"those are {', '.join(FAMILIES)}; {remedy}"
    raise errors.NoHost(model_type=model_type, detail=detail, remedy=remedy)
