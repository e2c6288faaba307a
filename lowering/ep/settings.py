"""What a form is told besides the operands of the experts, and what several forms ask about tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moepass import _compat, errors, spec
from moepass.kernels.sorting import rank_in_group
from moepass.lowering.base import ExpertArgs
from moepass.lowering.ep.collectives import Group, mean_gradient

#: ``Settings.tokens`` beside a number.
ANY, EQUAL = 0, -1


@dataclass(frozen=True)
class Settings:
    """Of one call.

    ``form``           how tokens and experts meet
    ``groups``         the EP group, or (nodes, ranks of a node) for ``hierarchical``: rank = node * local + local rank;
                       none for ``local``, where every rank has all experts
    ``buffer_factor``  0: exact; otherwise ``all_to_all`` moves blocks of fixed size (``lowering.ep.ragged``)
    ``tokens``         T of the other ranks: ANY (they are asked), EQUAL to this one's, or the most that any has
    ``mean``           gradients of experts are divided by the number of ranks, as those of replicated parameters are
                       when data parallelism averages them
    ``tp``             the group whose ranks hold the same tokens and F/tp of every expert, in order; None: one rank
    ``chunks``         the tokens travel and are computed in so many parts, one over the other (``schedule``)
    """

    form: str
    groups: tuple[Group, ...]
    buffer_factor: float = 0.0
    tokens: int = ANY
    mean: bool = True
    tp: Group | None = None
    chunks: int = 1

    @classmethod
    def of(
        cls, groups: Sequence[str], form: str, buffer_factor: float, tokens: int, mean: bool, tp: Sequence[str],
        chunks: int, places: Sequence[int],
    ) -> Settings:  # fmt: skip
        """From the op's arguments: groups by name.  Raises ``BadOption`` where the call was traced on another rank."""
        members, slices = tuple(map(Group.of, groups)), Group.of(tp[0]) if tp else None
        here = [n for group in (*members, *([slices] if slices else [])) for n in (group.size, group.rank)]
        if here != list(places):
            detail = f"this process stands at {here}; trace the model on every rank"
            raise errors.BadOption(name="places", value=list(places), detail=detail)
        return cls(form, members, buffer_factor, tokens, mean, slices, chunks)

    @property
    def ranks(self) -> int:
        """P."""
        return math.prod(group.size for group in self.groups)

    @property
    def rank(self) -> int:
        """This rank's number among P."""
        number = 0
        for group in self.groups:
            number = number * group.size + group.rank
        return number


class Tokens(NamedTuple):
    """Operands whose rows are tokens."""

    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor


def local_index(index_TK: Tensor, E: int, rank: int) -> Tensor:
    """Numbers of this rank's E experts; E where the pair is another rank's, or nobody's."""
    local_TK = index_TK - rank * E
    return torch.where((local_TK >= 0) & (local_TK < E), local_TK, E)


def averaged(args: ExpertArgs, ranks: int) -> ExpertArgs:
    """The same operands with gradients divided by the number of ranks."""

    def mean(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else mean_gradient(weight, ranks)

    w_in, w_out = mean_gradient(args.w_in, ranks), mean_gradient(args.w_out, ranks)
    return replace(args, w_in=w_in, w_out=w_out, b_in=mean(args.b_in), b_out=mean(args.b_out))


# --- how many tokens the others have ---------------------------------------------------------------------------------


def most_tokens(T: int, tokens: int, group: Group, like: Tensor) -> int:
    """The rows that every rank's tokens are padded to, no less than 1; reads the host only where tokens is ANY.

    Raises ``BadOption`` where the number that none was to exceed is exceeded.
    """
    if tokens == EQUAL:
        return T if isinstance(T, torch.SymInt) else max(T, 1)
    if tokens != ANY:
        if tokens < T:
            detail = f"this rank has {T} tokens; give the most that any rank ever has"
            raise errors.BadOption(name="tokens", value=tokens, detail=detail)
        return tokens
    T_P = _compat.all_gather(torch.full((1,), T, dtype=torch.int64, device=like.device), group.size, group.name)
    most = _compat.host_sizes(T_P.max().clamp(min=1).unsqueeze(0))[0]
    _compat.promise(most >= T)  # otherwise the first T of so many rows have an unknown number, when traced
    return most


def padded(given: Tokens, rows: int, E: int) -> Tokens:
    """As many rows, those behind T of nobody."""
    T = given.x_TD.shape[0]
    if rows is T or (isinstance(rows, int) and isinstance(T, int) and rows == T):
        return given
    more = (0, 0, 0, rows - T)
    return Tokens(F.pad(given.x_TD, more), F.pad(given.index_TK, more, value=E), F.pad(given.weight_TK, more))


# --- chunks ----------------------------------------------------------------------------------------------------------


def chunks(given: Tokens, count: int) -> list[Tokens]:
    """The tokens in so many parts whose sizes differ by one at most; parts may be empty."""
    if count == 1:
        return [given]
    T = given.x_TD.shape[0]
    sizes = [T * (i + 1) // count - T * i // count for i in range(count - 1)]
    return _split(given, [*sizes, T - sum(sizes)])


def even_chunks(given: Tokens, E: int, settings: Settings) -> list[Tokens]:
    """The tokens of a form whose buffers have fixed sizes, in parts that have the same size on all ranks."""
    (group,), count = settings.groups, settings.chunks
    most = most_tokens(given.x_TD.shape[0], settings.tokens, group, given.x_TD)
    each = most if count == 1 else (most + count - 1) // count
    whole = padded(given, each * count, E)
    return [whole] if count == 1 else _split(whole, [each] * count)


def _split(given: Tokens, sizes: list[int]) -> list[Tokens]:
    return [Tokens(*parts) for parts in zip(*(torch.split(t, sizes) for t in given), strict=True)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The results of chunks as one."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


# --- capacity over all ranks -----------------------------------------------------------------------------------------


def capacity(args: ExpertArgs, K: int, E: int, T: int, settings: Settings, like: Tensor) -> int | Tensor:
    """Rows that each of all E experts takes of all ranks' tokens: ``max(1, ceil(cf*T*K/E))``; on the device unless T
    of all ranks is known."""
    if settings.tokens == EQUAL:
        return spec.capacity(args.capacity_factor, T * settings.ranks, K, E)
    total = torch.full((1,), T, dtype=torch.int64, device=like.device)
    for group in settings.groups:
        total = _compat.all_reduce(total, group.name)
    return torch.ceil(args.capacity_factor * total.double() * K / E).clamp(min=1)


def within_capacity(expert_R: Tensor, priority_R: Tensor | None, C: int | Tensor, E: int) -> Tensor:
    """The experts of rows, E for those beyond the first C of their expert, in order or by falling priority."""
    return torch.where(rank_in_group(expert_R, priority_R) < C, expert_R, E)
