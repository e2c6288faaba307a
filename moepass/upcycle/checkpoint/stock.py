"""A checkpoint run by stock transformers classes, of which one layer is in memory at a time.

The model is built on the meta device.  Before the forward of a *unit* (a decoder layer; outside the layers, each module
with weights of its own) a hook reads its tensors and hands them to transformers' own loader, which renames and fuses
them as ``from_pretrained`` does; after the forward they are dropped.  So the forward is stock code, unchanged.  What
this package needs of transformers beyond its models is in this file.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moepass import errors
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.modules import set_tensor_at, tensor_at
from moepass.upcycle.own.load import check_tensors, skeleton
from moepass.upcycle.own.schema import STEM, is_own
from moepass.upcycle.own.skeleton import real_buffers, tied_names

#: Called after a unit's forward, while its weights are still there: (name, module, first output tensor).
Visit = Callable[[str, nn.Module, Tensor], None]


def refuse(path: Path, detail: str, remedy: str) -> NoReturn:
    """Raise ``NotVerifiable``."""
    raise errors.NotVerifiable(path=path, detail=detail, remedy=remedy)


@dataclass
class Stock:
    """A model on meta, its checkpoint, and which tensors on disk make which unit.  Make it with ``Stock.open``."""

    source: Source
    model: Any
    mapping: list[Any]
    #: Unit -> names on disk.
    disk: dict[str, list[str]]
    #: Unit -> (name in the unit, the meta tensor to put back).
    empty: dict[str, list[tuple[str, Tensor]]]
    #: Parameter name -> names of the parameters it is tied to.
    tied: dict[str, tuple[str, ...]]
    layers: tuple[str, ...]
    #: Bytes of the weights that were in memory together at most.
    peak: int = 0
    _live: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Stock:
        """Raises ``BadCheckpoint``, ``MissingPackage``, and ``NotVerifiable`` for names that do not fit the class."""
        source, model, mapping, targets = _open(Path(folder))
        layers = _layers(model, source.folder)
        units = (*layers, *_other_units(model, layers))
        known = dict(_tensors(model))
        disk: dict[str, list[str]] = defaultdict(list)
        for name, target in targets.items():
            unit = _unit_of(target, units)
            if target not in known or unit is None:
                detail = f"{type(model).__name__} has no place for the tensor {name!r}"
                refuse(source.folder, detail, "check the config's model_type")
            disk[unit].append(name)
        empty = {unit: [(n, t) for n, t in known.items() if _unit_of(n, units) == unit] for unit in units}
        return cls(source, model, mapping, dict(disk), empty, _tied(model), layers)

    @torch.no_grad()
    def run(self, token_ids: Tensor, visit: Visit, **options: Any) -> Tensor:
        """Logits ``[B, S, V]`` in float32 of ``token_ids [B, S]``; ``visit`` sees every decoder layer in order.

        ``options`` go to the model's forward.
        """
        with self._hooks(visit):
            logits: Tensor = self.model(input_ids=token_ids, use_cache=False, **options).logits
        return logits

    @contextmanager
    def _hooks(self, visit: Visit) -> Iterator[None]:
        handles = []
        for unit in self.empty:
            module = self.model.get_submodule(unit)
            handles.append(module.register_forward_pre_hook(lambda *_, u=unit: self._load(u)))
            handles.append(module.register_forward_hook(lambda m, _, out, u=unit: self._after(u, m, out, visit)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for unit in list(self._live):
                self._drop(unit)

    def _after(self, unit: str, module: nn.Module, out: Any, visit: Visit) -> None:
        if unit in self.layers:
            visit(unit, module, out if isinstance(out, Tensor) else out[0])
        self._drop(unit)

    def _load(self, unit: str) -> None:
        self._read(self.disk.get(unit, []))
        for name, _ in self.empty[unit]:
            if tensor_at(self.model, name).is_meta:
                self._from_tied(name)
        self._live[unit] = sum(tensor_at(self.model, name).nbytes for name, _ in self.empty[unit])
        self.peak = max(self.peak, sum(self._live.values()))

    def _read(self, names: Sequence[str]) -> None:
        tensors = {name: self.source.read(name) for name in names}
        info = _load_like_from_pretrained(self.model, tensors, self.mapping)
        wrong = [str(m) for m in (*info.mismatched_keys, *info.conversion_errors.values(), *info.unexpected_keys)]
        if wrong:
            refuse(self.source.folder, f"transformers cannot load {wrong[0]}", "check the config's sizes")

    def _from_tied(self, name: str) -> None:
        """A tied weight lies on disk under the name of its partner."""
        for other in self.tied.get(name, ()):
            unit = next(u for u, tensors in self.empty.items() if any(n == other for n, _ in tensors))
            if self.disk.get(unit):
                self._read(self.disk[unit])
                set_tensor_at(self.model, name, tensor_at(self.model, other))
                if unit not in self._live:
                    self._drop(unit)
                return
        detail = f"{name!r} of {type(self.model).__name__} is not in the checkpoint"
        refuse(self.source.folder, detail, "write the missing tensor, or correct the config")

    def _drop(self, unit: str) -> None:
        for name, meta in self.empty[unit]:
            set_tensor_at(self.model, name, meta)
        self._live.pop(unit, None)


def _open(folder: Path) -> tuple[Source, Any, list[Any], dict[str, str]]:
    """Source, model on meta, transformers' rules, and for each name on disk the parameter it becomes."""
    if not is_own(folder):
        source = Source.open(folder)
        model = _build(folder)
        return source, model, *_targets(model, source)
    model, source = skeleton(folder).float(), Source.open(folder, stem=STEM)
    check_tensors(model, tied_names(model), source.headers, folder)
    return source, model, [], {name: name for name in source.headers}


def _build(folder: Path) -> Any:
    """The causal language model of a folder's config on meta, in float32, with real non-persistent buffers."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise errors.MissingPackage(
            what="verifying a checkpoint", package="transformers", install="moepass[transformers]"
        ) from None
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, experts_implementation="eager", trust_remote_code=False
            )
    except Exception as e:  # whatever a config can make another library say
        refuse(folder, f"transformers cannot build it ({e})", "check config.json")
    real_buffers(model, "cpu")
    return model.eval()


def _targets(model: Any, source: Source) -> tuple[list[Any], dict[str, str]]:
    """transformers' rules for this model, and for each name on disk the parameter that it becomes (a part of)."""
    mapping = _mapping(model)
    return mapping, {name: target for name, target, _ in renamed(model, source.headers)}


def renamed(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """``(name on disk, parameter of the model, whether transformers also changes the values)``, without those that the
    class ignores."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping, known = _mapping(model), model.state_dict()
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target in known or not _is_ignored(model, name):
            yield name, target, pattern is not None


def on_disk(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a stock model as ``save_pretrained`` names and cuts it: a tensor for each expert and projection."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, tensors))


def _mapping(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)  # type: ignore[no-any-return]


def _is_ignored(model: Any, name: str) -> bool:
    """Whether the class itself says that this tensor may be left over."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _load_like_from_pretrained(model: Any, tensors: dict[str, Tensor], mapping: list[Any]) -> Any:
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=mapping)
        info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
    finally:
        if shown:
            logging.enable_progress_bar()
    return info


def _layers(model: Any, folder: Path) -> tuple[str, ...]:
    lists = [m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList) and len(m)]
    layers = next((m for m in lists if len(m) == model.config.num_hidden_layers), None)
    if layers is None:
        refuse(folder, f"{type(model).__name__} has no decoder layers", "compare causal language models only")
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return tuple(f"{prefix}.{i}" for i in range(len(layers)))


def _other_units(model: Any, layers: Sequence[str]) -> tuple[str, ...]:
    inside = layers[0].rpartition(".")[0] + "."
    names = {name.rpartition(".")[0] for name, _ in _tensors(model) if not name.startswith(inside)}
    return tuple(sorted(names))


def _unit_of(name: str, units: Sequence[str]) -> str | None:
    """The unit that holds a tensor of this name."""
    parts = name.split(".")
    prefixes = {".".join(parts[:i]) for i in range(1, len(parts))}
    return next((unit for unit in units if unit in prefixes), None)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds, by every name: parameters (tied ones too) and persistent buffers."""
    yield from model.state_dict(keep_vars=True).items()


def _tied(model: Any) -> dict[str, tuple[str, ...]]:
    return {n: tuple(o for o in group if o != n) for group in tied_names(model) for n in group if len(group) > 1}
