"""One projection of one expert, made from one dense FFN: what every init method is built from.

Contract
    in    the dense matrices: input projections [F, D] each, output projection [D, F]; which expert; InitSpec; a name;
          for a cut that is not by index, the order of the neurons (``upcycle.neurons``)
    out   ``expert_in`` [F/cut, D], ``expert_out`` [D, F/cut], ``expert_bias`` [F/cut], in the dense dtype; may be a
          view of the dense matrix
    Pure and independent of order, device and number of threads: (seed, name, expert, projection) decide every draw, and
    sums are taken in pieces of a fixed size.  Memory: the result (for "drop" also the new channels in float32).
``upcycle.init`` stacks these for a live model, ``moepass upcycle`` streams them to disk one at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moepass.spec import InitSpec

#: torch fills a normal draw in blocks of this many numbers, so two draws of whole blocks equal one of both.
_BLOCK = 16
#: Elements that are summed at a time, and per partial sum: too few for torch to share among threads.
_PIECE, _PARTIAL = 1 << 20, 1 << 10
#: Numbers of noise drawn at a time; part of what a seed means, because torch draws the end of a piece in its own way.
_DRAWN = 1 << 16


def expert_in(
    dense: Sequence[Tensor],
    p: int,
    e: int,
    cut: int,
    init: InitSpec,
    name: str,
    std: float | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Input projection ``p`` of expert ``e``, ``[F/cut, D]``.  ``dense``: the n input projections, ``[F, D]`` each.

    Only "copy+noise" looks at the projections other than ``p``: its noise is relative to ``std``, the standard
    deviation of all of them, which a caller that asks for many experts may compute once (``moments``).  ``order``: the
    neurons to cut, in this order; None: all, as they stand.
    """
    rows = part_of(dense[p], 0, e, cut, order)
    if rows.is_meta:
        return rows
    if init.method == "copy+noise" and init.noise_std:
        size = init.noise_std * (moments(*dense)[1] if std is None else std)
        return _noisy(rows, size, init.seed, f"{name}/w_in/{e}/{p}")
    if init.method == "drop":
        channels = dropped_channels(rows.shape[0], e, init, name, str(p)).to(rows.device)
        return _with_rows(rows, channels, init.seed, f"{name}/w_in/{e}/{p}")
    return rows


def expert_out(
    dense: Tensor,
    e: int,
    cut: int,
    scale: float,
    init: InitSpec,
    name: str,
    std: float | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Output projection of expert ``e``, ``[D, F/cut]``, times ``scale``; the rest as for ``expert_in``."""
    columns = part_of(dense, 1, e, cut, order)
    if columns.is_meta:
        return columns
    if init.method == "copy+noise" and init.noise_std:
        size = init.noise_std * (moments(dense)[1] if std is None else std)
        columns = _noisy(columns, size, init.seed, f"{name}/w_out/{e}")
    if init.method == "drop":
        channels = dropped_channels(columns.shape[1], e, init, name, "out").to(columns.device)
        columns = _with_columns(columns, channels, init.seed, f"{name}/w_out/{e}")
    return scaled(columns, scale)


def expert_bias(
    dense: Tensor, p: int, e: int, cut: int, init: InitSpec, name: str, order: Tensor | None = None
) -> Tensor:
    """Bias ``[F/cut]`` of input projection ``p``; ``dense [F]``.  That of a redrawn channel is redrawn with its row."""
    bias = part_of(dense, 0, e, cut, order)
    if init.method != "drop" or bias.is_meta:
        return bias
    channels, bias = dropped_channels(bias.shape[0], e, init, name, str(p)).to(bias.device), bias.clone()
    bias[channels] = redrawn(bias[channels], init.seed, f"{name}/b_in/{e}/{p}")
    return bias


def part_of(dense: Tensor, dim: int, e: int, cut: int, order: Tensor | None = None) -> Tensor:
    """The neurons of expert ``e``, which lie along ``dim``: run ``e % cut`` of the ``cut`` equal runs of ``order``."""
    if order is not None:
        return dense.index_select(dim, order.chunk(cut)[e % cut].to(dense.device))
    return dense.chunk(cut, dim)[e % cut] if cut > 1 else dense


def dropped_channels(F: int, e: int, init: InitSpec, name: str, matrix: str) -> Tensor:
    """Channels of expert ``e`` that are redrawn in ``matrix`` ("0" and "1": input projections, "out"), ascending.

    One set for all matrices, as Drop-Upcycling is told (Nakamura et al. 2025, section 3), or one for each, as its
    released code draws them.
    """
    own = f"/{matrix}" if init.drop_indices == "independent" else ""
    order = torch.randperm(F, generator=generator(init.seed, f"{name}/drop/{e}{own}"))
    return order[: round(init.drop_ratio * F)].sort().values


def redrawn(old: Tensor, seed: int, key: str) -> Tensor:
    """N(mean, std) of the entries it replaces."""
    if not old.numel():
        return old
    mean, std = moments(old)
    return _normal(old.shape, seed, key).mul_(std).add_(mean).to(old)


def scaled(weight: Tensor, scale: float) -> Tensor:
    """One rounding, to the weight's own dtype."""
    if scale == 1.0:
        return weight
    out, wide = torch.empty_like(weight, memory_format=torch.contiguous_format), _wide(weight)
    rows = max(1, _PIECE // max(1, weight[:1].numel()))
    for part, result in zip(weight.split(rows), out.split(rows), strict=True):
        result.copy_(part.to(wide) * scale)
    return out


def moments(*parts: Tensor) -> tuple[float, float]:
    """Mean and standard deviation (of the population) of all entries, in float64; no thread count changes them."""
    count = sum(part.numel() for part in parts)
    mean = math.fsum(s for part in parts for s in _partial_sums(part, None)) / count
    variance = math.fsum(s for part in parts for s in _partial_sums(part, mean)) / count
    return mean, math.sqrt(variance)


def generator(seed: int, key: str) -> torch.Generator:
    """A generator of its own for every (seed, key); on the CPU, so that every device sees the same draws."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _partial_sums(part: Tensor, mean: float | None) -> Sequence[float]:
    """Sums of ``part``, or of its squared distances from ``mean``, over fixed pieces."""
    sums: list[float] = []
    for piece in part.detach().reshape(-1).split(_PIECE):
        values = piece.cpu().double()
        if mean is not None:
            values = (values - mean).square_()
        whole = values.numel() // _PARTIAL * _PARTIAL
        sums += values[:whole].view(-1, _PARTIAL).sum(1).tolist()
        sums.append(float(values[whole:].sum()))
    return sums


def _normal(shape: torch.Size, seed: int, key: str) -> Tensor:
    return torch.randn(shape, generator=generator(seed, key), dtype=torch.float32)


def _noisy(weight: Tensor, std: float, seed: int, key: str) -> Tensor:
    """``weight`` plus a draw times ``std``, in pieces that stay in a core's cache: the draw never exists whole."""
    out, wide = torch.empty_like(weight, memory_format=torch.contiguous_format), _wide(weight)
    source, noise = generator(seed, key), torch.empty(min(_DRAWN, weight.numel()))
    for result, part in zip(out.view(-1).split(_DRAWN), weight.reshape(-1).split(_DRAWN), strict=True):
        drawn = noise[: part.numel()].normal_(generator=source).to(part.device)
        result.copy_(part.to(wide).add(drawn, alpha=std))
    return out


def _wide(weight: Tensor) -> torch.dtype:
    """The dtype to calculate in."""
    return torch.promote_types(weight.dtype, torch.float32)


def _with_rows(weight: Tensor, rows: Tensor, seed: int, key: str) -> Tensor:
    out = weight.clone()
    for begin, end, values in _redrawn_rows(weight[rows], seed, key):
        out[rows[begin:end]] = values
    return out


def _with_columns(weight: Tensor, columns: Tensor, seed: int, key: str) -> Tensor:
    out = weight.clone(memory_format=torch.contiguous_format)
    for begin, end, values in _redrawn_rows(weight[:, columns], seed, key):
        out[begin:end, columns] = values
    return out


def _redrawn_rows(old: Tensor, seed: int, key: str) -> Iterator[tuple[int, int, Tensor]]:
    """``redrawn`` of a matrix, some rows at a time (whole blocks of the draw)."""
    rows = max(_BLOCK, _PIECE // max(1, old.shape[1]) // _BLOCK * _BLOCK)
    if old.numel() % _BLOCK or rows >= old.shape[0]:
        yield 0, old.shape[0], redrawn(old, seed, key)
        return
    source, (mean, std) = generator(seed, key), moments(old)
    for begin in range(0, old.shape[0], rows):
        end = min(begin + rows, old.shape[0])
        drawn = torch.randn(end - begin, old.shape[1], generator=source, dtype=torch.float32)
        yield begin, end, drawn.mul_(std).add_(mean).to(old)
