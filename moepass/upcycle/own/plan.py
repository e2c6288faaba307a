"""A dense folder in moepass's own format: which tensors to write, from the source's headers and a model on meta.

Contract
    in    an opened source of any causal language model of transformers, a ``Recipe``, globs over block names
    out   ``Draft``: ``moepass.convert`` on the meta device says where every tensor comes from; draws, names and values
          are those of ``moepass.convert`` on the loaded model
    Raises ``BadCheckpoint``, ``NoHost`` (no block found), ``UnexpectedTensor``, ``BadOption``, ``NotDivisible`` ...
Memory: one tensor of one block, all its experts, and the dense matrices that it is made from.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moepass import errors
from moepass.nn.counting import Counts, count
from moepass.nn.moe import MoE
from moepass.nn.origin import Place
from moepass.spec import InitMethod
from moepass.upcycle.accept import FIELDS, make
from moepass.upcycle.checkpoint.headers import bad
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.stock import renamed
from moepass.upcycle.checkpoint.tensors import Computed, Header, OutTensor, dtype_code, torch_dtype
from moepass.upcycle.convert import convert
from moepass.upcycle.hf.families import Family
from moepass.upcycle.hf.hosts import HOSTS, Host
from moepass.upcycle.hf.match import Match
from moepass.upcycle.hf.pieces import Piece, cast_code, passed_on
from moepass.upcycle.hf.recipe import Plan, Recipe, plan
from moepass.upcycle.hf.routers import router_weight
from moepass.upcycle.hf.sizes import Sizes
from moepass.upcycle.own.schema import NAME, Block, small
from moepass.upcycle.own.skeleton import dense_model, tied_names

#: What a recipe may ask of ``nn.MoE``: it has every feature, since the dense architecture stays.
HOST = Host(NAME, frozenset(), lambda _: {}, can_leave=True)
#: Methods that make each tensor from the dense tensors of the same projection alone.
_SEPARATE: frozenset[InitMethod] = frozenset({"copy", "virtual_groups", "split", "copy+noise", "drop"})


@dataclass(frozen=True)
class Draft:
    """Everything but the shards.  ``files``: config.json and moepass.json; ``layers``: numbers in the blocks' names."""

    found: Match
    plan: Plan
    tensors: list[OutTensor]
    files: dict[str, bytes]
    layers: tuple[int, ...]
    warnings: tuple[str, ...]
    model: nn.Module
    dense: Counts
    #: Name in the dense model -> name on disk.
    on_disk: dict[str, str]

    @property
    def expert_code(self) -> str:
        """Dtype of the experts on disk."""
        return next(t.dtype for t in self.tensors if t.name.endswith("w_out"))

    def sizes(self, shards: Sequence[tuple[str, int]]) -> Sizes:
        """Parameters, FLOPs and bytes, of experts by the share that a token uses."""
        made = count(self.model)
        return Sizes(
            parameters=made.num_params,
            active_parameters=made.num_active_params,
            flops_per_token=made.flops_per_token(backward=False),
            nbytes=sum(size for _, size in shards),
            shards=tuple(shards),
            dense_parameters=self.dense.num_params,
            dense_flops_per_token=self.dense.flops_per_token(backward=False),
        )


def draft(source: Source, recipe: Recipe, patterns: Sequence[str], dtype: str | None) -> Draft:
    """Plan the output.  ``dtype``: code of safetensors for all floating tensors; None keeps each as it is."""
    planned = plan(recipe, HOST, 0)  # the widths are checked by ``convert``, block by block
    model = dense_on_meta(source)
    on_disk = names_on_disk(model, source)
    dense = count(model)
    notes = _convert(model, planned, patterns, source.config["model_type"])
    writer = _Writer(source, on_disk, planned, dtype)
    tensors = list(writer.tensors(model))
    blocks = [Block.of(module) for module in model.modules() if isinstance(module, MoE)]
    family = Family(source.config["model_type"], (NAME,))
    layers = {number for block in blocks if (number := layer_number(block.origin.site)) is not None}
    return Draft(
        found=Match(family, HOST, model.config, ()),
        plan=planned,
        tensors=tensors,
        files=small(source.config, blocks),
        layers=tuple(sorted(layers)),
        warnings=tuple(notes),
        model=model,
        dense=dense,
        on_disk=on_disk,
    )


def layer_number(site: str) -> int | None:
    """The first number in a block's name, if it has one."""
    found = re.search(r"\.(\d+)(\.|$)", site)
    return int(found[1]) if found else None


def dense_on_meta(source: Source, device: torch.device | str = "cpu") -> Any:
    """The source's model without weights; on ``device`` what no file holds.  Raises ``NoHost``, ``BadCheckpoint``."""
    model_type = source.config.get("model_type")
    if model_type in HOSTS:
        detail = "it is a mixture of experts already"
        raise errors.NoHost(model_type=model_type, detail=detail, remedy="give a dense checkpoint")
    try:
        return dense_model(source.config, source.folder / "config.json", device)
    except errors.BadMoEFolder as error:
        fields = error.fields
        return bad(source.folder / "config.json", "config", str(fields["detail"]), str(fields["remedy"]))


def names_on_disk(model: Any, source: Source) -> dict[str, str]:
    """Name in the model -> name on disk; tied tensors that are stored once have several names in the model.

    Raises ``UnexpectedTensor``.
    """
    known, found = model.state_dict(), dict[str, str]()
    for name, target, changed in renamed(model, source.headers):
        if name.endswith("rotary_emb.inv_freq") and target not in known:
            continue  # of old checkpoints; it follows from the config
        if target not in known:
            _unexpected(source, name, f"has no place in {type(model).__name__}", "check that config.json belongs to it")
        if changed or target in found:
            remedy = "load it with transformers, then moepass.convert and moepass.save"
            _unexpected(source, name, "is changed by transformers when it is loaded", remedy)
        shape, wanted = source.headers[name].shape, tuple(known[target].shape)
        if shape != wanted:
            _unexpected(source, name, f"has the shape {list(shape)}, not {list(wanted)}", "check config.json")
        found[target] = name
    for group in tied_names(model):
        there = [found[name] for name in group if name in found]
        if not there:
            _unexpected(source, group[0], "is missing", "check that config.json belongs to these tensors")
        found |= {name: there[0] for name in group if name not in found}
    return found


def _convert(model: nn.Module, planned: Plan, patterns: Sequence[str], model_type: str) -> list[str]:
    """Put the blocks in place, on meta.  Returns what was left dense, in words."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        report = convert(model, planned.spec, layers=patterns, init=planned.init)
    left = [site for site in report.skipped if site.reason != "not_selected"]
    if not report.converted:
        if len(left) < len(report.skipped):
            names = [site.id for site in report.skipped if site.reason == "not_selected"]
            detail = f"it selects none of {names[0]} to {names[-1]}"
            raise errors.BadOption(name="layers", value=",".join(patterns), detail=detail)
        detail = f"moepass.convert finds no feed-forward block in it: {report}"
        raise errors.NoHost(model_type=model_type, detail=detail, remedy="see docs/upcycle.md")
    return [f"{site.id} stays dense: {site.reason}" + f" ({site.detail})" * bool(site.detail) for site in left]


@dataclass(frozen=True)
class _Writer:
    source: Source
    on_disk: dict[str, str]
    plan: Plan
    dtype: str | None

    def tensors(self, model: nn.Module) -> Iterator[OutTensor]:
        """In the order of the model's state dict; what is tied is written once."""
        inside = {f"{name}.{key}": (module, key)
                  for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, MoE)
                  for key in module.state_dict()}  # fmt: skip
        for names in tied_names(model):
            if names[0] in inside:
                yield self._moe(names[0], *inside[names[0]])
                continue
            for disk in dict.fromkeys(self.on_disk[name] for name in names):
                name = next(name for name in names if self.on_disk[name] == disk)
                header = self.source.headers[disk]
                yield passed_on(name, Piece(disk, header.shape, header.dtype), self.dtype)

    def _moe(self, name: str, moe: MoE, key: str) -> OutTensor:
        assert moe.origin is not None
        place, field = moe.origin.places[0], FIELDS[key]
        meta = {each: _empty(self._header(each)) for each in place.names}
        like: Tensor = getattr(make(moe, place, meta.__getitem__), field)
        made = dtype_code(like.dtype)
        assert made is not None, "made from tensors of safetensors"
        code = cast_code(made, self.dtype)
        function, used = self._recipe(moe, place, field, meta, torch_dtype(code))
        inputs = tuple(dict.fromkeys(self._header(each).name for each in used))
        recipe = Computed(inputs, function, self._digest(moe, place, field, code))
        return OutTensor(name, tuple(like.shape), code, recipe, f"{moe.origin.site}/{field}")

    def _recipe(
        self, moe: MoE, place: Place, field: str, meta: Mapping[str, Tensor], dtype: torch.dtype
    ) -> tuple[Callable[..., Tensor], Sequence[str]]:
        """The function, and names of the dense tensors that it takes."""
        assert moe.origin is not None
        site = moe.origin.site
        if field == "router_weight":
            return lambda: router_weight(self.plan, site, moe.D, dtype), ()
        used = _needed(place, field, moe.origin.init.method)
        names = [self._header(each).name for each in used]
        order = list(dict.fromkeys(names))

        def function(*tensors: Tensor) -> Tensor:
            given = {each: tensors[order.index(disk)] for each, disk in zip(used, names, strict=True)}
            made: Tensor = getattr(make(moe, place, lambda each: given.get(each, meta[each])), field)
            return made.to(dtype)

        return function, used

    def _header(self, name: str) -> Header:
        return self.source.headers[self.on_disk[name]]

    def _digest(self, moe: MoE, place: Place, field: str, code: str) -> str:
        """Everything that the values depend on besides the dense tensors."""
        assert moe.origin is not None
        recipe, origin = self.plan.recipe, moe.origin
        router = f" {recipe.router} {recipe.router_std!r}" if field == "router_weight" else ""
        rows = [part.rows for part in (*place.ups, place.down)]
        return (
            f"{field}{router} spec={moe.spec.digest} init={origin.init.model_dump_json()} name={origin.site} "
            f"rows={rows} {code}"
        )


def _needed(place: Place, field: str, method: InitMethod) -> tuple[str, ...]:
    """Dense tensors that a field of ``MoEWeights`` is made from."""
    if method not in _SEPARATE:
        return place.names
    parts = place.ups if field in {"w_in", "b_in"} else (place.down,)
    names = [part.weight if field in {"w_in", "w_out"} else part.bias for part in parts]
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _empty(header: Header) -> Tensor:
    return torch.empty(header.shape, dtype=torch_dtype(header.dtype), device="meta")


def _unexpected(source: Source, name: str, detail: str, remedy: str) -> None:
    raise errors.UnexpectedTensor(folder=source.folder, name=name, detail=detail, remedy=remedy)
