"""A converted model with the weights that it has now, as a folder that stock transformers load: names and layout of a
MoE host, values bit for bit.

Contract
    in    the dense config, the manifest of the blocks and all tensors of the converted model, by their names in memory
    out   ``HostFolder``: the tensors to write, one for each expert and projection, and config.json
    The host must route as the blocks do: ``HostRefuses`` names the block's field that it has no place for, ``NoHost``
    the architecture.  What acts in training alone (losses, jitter, dropout, a bias's rate) stays behind.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from moepass import errors
from moepass.spec import ExpertSpec, RouterSpec
from moepass.upcycle.checkpoint.tensors import Computed, OutTensor, dtype_code
from moepass.upcycle.hf.config import config_bytes, host_config
from moepass.upcycle.hf.families import FAMILIES
from moepass.upcycle.hf.hosts import Shape
from moepass.upcycle.hf.match import Match, match, resolve
from moepass.upcycle.hf.pieces import Piece, block_name, pieces
from moepass.upcycle.hf.tensors import check_names
from moepass.upcycle.own.load import in_memory
from moepass.upcycle.own.schema import Block, Manifest

_OWN = "use moepass's own format (--to moepass)"
#: Fields of ``RouterSpec`` that act in training alone.
_TRAINING: dict[str, Any] = {"jitter": 0.0, "bias_update_rate": 0.0, "bias_centred": False}
#: Fields of ``ExpertSpec`` that no host has a place for.
_BESIDE = ("bias_in", "bias_out", "output_scale", "latent_size", "shared_intermediate_size")


@dataclass(frozen=True)
class HostFolder:
    """What to write for ``from_pretrained``."""

    model_type: str
    tensors: list[OutTensor]
    files: dict[str, bytes]


def as_host(
    config: dict[str, Any], manifest: Manifest, tensors: Mapping[str, Tensor], folder: Path, to: str | None = None
) -> HostFolder:
    """The model as ``to``, or as the first host of its family that computes what it computes.

    Raises ``NoHost``, ``HostRefuses`` (of the first host), ``BadOption``, ``UnexpectedTensor`` (it names ``folder``).
    """
    resolve(config)  # a family without hosts is refused by its name
    refused: errors.HostRefuses | None = None
    for name in FAMILIES[config["model_type"]].hosts if to is None else (to,):
        try:
            return _as(match(config, name), manifest, tensors, folder)
        except errors.HostRefuses as error:
            refused = refused or error
    assert refused is not None, "every family has a host"
    raise refused


def _as(found: Match, manifest: Manifest, tensors: Mapping[str, Tensor], folder: Path) -> HostFolder:
    blocks = _numbered(found, manifest)
    spec = _one_spec(found, blocks)
    layers = tuple(sorted(blocks))
    dtype = tensors[f"{block_name(layers[0])}.w_in"].dtype
    shape = Shape(
        experts=spec[1].num_experts,
        top_k=spec[0].top_k,
        width=spec[1].intermediate_size or 0,
        renormalize=spec[0].normalize is not None,
        layers=layers,
        num_layers=found.config.num_hidden_layers,
        config=found.config,
        features=found.features,
    )
    if not shape.all_layers and not (found.host.mixed is not None and found.host.mixed(shape)):
        _refuse(found, "layers", list(layers), f"it cannot leave the layers {shape.dense_layers} dense")
    made = host_config(found, shape, str(dtype).removeprefix("torch."))
    prefixes = tuple(f"{block_name(i)}." for i in layers)
    headers = in_memory(tensors, folder).headers
    rest = {name: piece for name, piece in pieces(headers, found).items() if not name.startswith(prefixes)}
    if found.config.tie_word_embeddings:
        rest.pop("lm_head.weight", None)
    out = [_out(name, tensors[piece.source], piece) for name, piece in rest.items()]
    for i in layers:
        out += _Layer(i, found, tensors).tensors()
    check_names(out, made.config, layers, folder)
    return HostFolder(found.host.model_type, out, {"config.json": config_bytes(made.json)})


# --- does the host compute it? ---------------------------------------------------------------------------------------


def _refuse(found: Match, field: str, value: object, detail: str) -> NoReturn:
    raise errors.HostRefuses(
        dense=found.family.model_type, host=found.host.model_type, field=field, value=value, detail=detail, remedy=_OWN
    )


def _numbered(found: Match, manifest: Manifest) -> dict[int, Block]:
    """Blocks by layer: each the whole feed-forward block of one, its gate first."""
    names = {block_name(i): i for i in range(found.config.num_hidden_layers)}
    blocks: dict[int, Block] = {}
    for block in manifest.blocks:
        places = block.origin.places
        if len(places) != 1 or places[0].where not in names:
            where = ", ".join(place.where for place in places)
            _refuse(found, "blocks", where, "its experts stand in layers, one block in each")
        gate, *_ = places[0].ups
        if len(places[0].ups) != 2 or gate.rows[0] != 0 or "gate" not in gate.weight.rpartition(".mlp.")[2]:
            _refuse(found, "activation", str(block.spec.experts.activation), "its experts are gated, the gate first")
        blocks[names[places[0].where]] = block
    return blocks


def _one_spec(found: Match, blocks: Mapping[int, Block]) -> tuple[RouterSpec, ExpertSpec]:
    """Router and experts of all blocks, if they are alike and the host's."""
    specs = [block.spec for block in blocks.values()]
    for spec in specs:
        for field in _BESIDE:
            if value := getattr(spec.experts, field):
                _refuse(found, field, value, "its experts have none")
        if spec.dispatch.drops_tokens:
            _refuse(found, "dispatch", str(spec.dispatch), "it drops no tokens")
        _check_router(found, spec.router)
    alike = {(_rule(s.router), s.experts.num_experts, s.experts.intermediate_size) for s in specs}
    if len(alike) > 1:
        _refuse(found, "spec", "; ".join(str(each[1:]) for each in alike), "all its blocks are alike")
    return specs[0].router, specs[0].experts


def _check_router(found: Match, router: RouterSpec) -> None:
    ours, host = _rule(router), found.host.router.model_copy(update={"top_k": router.top_k})
    if router.normalize is None and found.host.can_leave:
        host = host.model_copy(update={"normalize": None})
    if found.host.names.bias is not None:
        ours, host = (each.model_copy(update={"bias": True}) for each in (ours, host))  # zero where there was none
    host = _rule(host)
    for field in RouterSpec.model_fields:
        if getattr(ours, field) != getattr(host, field):
            _refuse(found, f"router.{field}", getattr(router, field), f"it has {getattr(host, field)!r}")


def _rule(router: RouterSpec) -> RouterSpec:
    """The same function by one name: a softmax over the chosen experts is one over all that is made to sum to 1."""
    same = dict(_TRAINING)
    if router.normalize_eps <= 1e-20:
        same["normalize_eps"] = 0.0
    if router.score == "softmax" and not router.bias and not router.score_first:
        same |= {"score_first": True, "normalize": 1.0}
    return router.model_copy(update=same)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _out(name: str, tensor: Tensor, piece: Piece | None = None, code: str | None = None) -> OutTensor:
    """A tensor that is in memory, or a part of it."""
    if piece is not None:
        tensor = piece.of(tensor)
    code = code or dtype_code(tensor.dtype)
    assert code is not None, "headers were made of it"
    return OutTensor(name, tuple(tensor.shape), code, Computed((), functools.partial(_written, tensor, code), "live"))


def _written(tensor: Tensor, code: str) -> Tensor:
    return tensor.detach().to(torch.float32 if code == "F32" else tensor.dtype).contiguous()


@dataclass(frozen=True)
class _Layer:
    """One layer's experts under the host's names."""

    number: int
    found: Match
    held: Mapping[str, Tensor]

    def tensors(self) -> Iterator[OutTensor]:
        """Router, experts by projection, then what the host asks for beside them."""
        names, host = self.found.host.names, self.found.host
        w_in, w_out, router = (self._own(name) for name in ("w_in", "w_out", "router.weight"))
        E, D, F = w_out.shape
        wide = router.dtype == torch.float64
        yield self._named(names.router, router, None if wide else host.router_dtype)
        if names.stacked:
            yield self._named(names.gate, w_in)
            yield self._named(names.down, w_out)
        else:
            yield from (self._named(names.gate.format(e=e), w_in[e, :F]) for e in range(E))
            yield from (self._named(names.up.format(e=e), w_in[e, F:]) for e in range(E))
            yield from (self._named(names.down.format(e=e), w_out[e]) for e in range(E))
        if names.bias is not None:
            suffix, kind = names.bias
            bias = self.held.get(f"{block_name(self.number)}.router.bias", torch.zeros(E)).float()
            yield self._named(suffix, bias if kind == "E" else bias.view(1, E), "F32")
        if names.shared is not None and host.shared is not None and not host.shared.optional:
            yield from self._idle(names.shared, w_in[0], w_out[0])
        if names.shared_gate is not None:
            yield self._named(names.shared_gate, w_in.new_zeros(1, D))

    def _own(self, name: str) -> Tensor:
        return self.held[f"{block_name(self.number)}.{name}"]

    def _named(self, suffix: str, tensor: Tensor, code: str | None = None) -> OutTensor:
        return _out(f"model.layers.{self.number}.{suffix}", tensor, code=code)

    def _idle(self, prefix: str, w_in: Tensor, w_out: Tensor) -> Iterator[OutTensor]:
        """A shared expert that adds nothing: of width 0, or the first expert's with a zero output projection."""
        F = w_out.shape[1]
        width = F if self.found.host.zero_shared else 0
        yield self._named(f"{prefix}gate_proj.weight", w_in[:width])
        yield self._named(f"{prefix}up_proj.weight", w_in[F : F + width])
        yield self._named(f"{prefix}down_proj.weight", torch.zeros_like(w_out[:, :width]))
