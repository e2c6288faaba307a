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
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from moepass.spec import InitSpec

#: torch fills a normal draw in blocks of this many numbers, so two draws of whole blocks equal one of both.
_BLOCK = 16
#: Elements that are in a wider dtype at a time.
_PIECE = 1 << 20
#: Elements that are summed at a time (1 MB of float64; blocks mapped afresh took six times as long), and per partial
#: sum: too few for torch to share among threads.
_SUMMED, _PARTIAL = 1 << 17, 1 << 10
#: Numbers of noise drawn at a time; part of what a seed means, because torch draws the end of a piece in its own way.
_DRAWN = 1 << 16
#: Where a matrix may be cut without changing a bit of its moments or of its noise.
STREAMED = math.lcm(_DRAWN, _PARTIAL)


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
        noise = noise_in(moments(*dense)[1] if std is None else std, p, e, init, name)
        return noise(rows.reshape(-1)).view(rows.shape)
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
        noise = noise_out(moments(dense)[1] if std is None else std, e, init, name)
        columns = noise(columns.reshape(-1)).view(columns.shape)
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
    return moments_of(lambda: parts)


def moments_of(parts: Callable[[], Iterable[Tensor]]) -> tuple[float, float]:
    """``moments`` of tensors that are not in memory together: ``parts()`` is gone through twice.

    The bits do not depend on where a tensor is cut, as long as each cut is at a multiple of ``STREAMED`` elements.
    """
    count = 0
    sums: list[float] = []
    for part in parts():
        count += part.numel()
        sums += _partial_sums(part, None)
    mean = math.fsum(sums) / count
    variance = math.fsum(s for part in parts() for s in _partial_sums(part, mean)) / count
    return mean, math.sqrt(variance)


def generator(seed: int, key: str) -> torch.Generator:
    """A generator of its own for every (seed, key); on the CPU, so that every device sees the same draws."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _partial_sums(part: Tensor, mean: float | None) -> Sequence[float]:
    """Sums of ``part``, or of its squared distances from ``mean``, over fixed pieces."""
    sums: list[float] = []
    for piece in part.detach().reshape(-1).split(_SUMMED):
        values = piece.cpu().to(torch.float64, copy=True)
        if mean is not None:
            values.sub_(mean).square_()
        whole = values.numel() // _PARTIAL * _PARTIAL
        sums += values[:whole].view(-1, _PARTIAL).sum(1).tolist()
        sums.append(float(values[whole:].sum()))
    return sums


def _normal(shape: torch.Size, seed: int, key: str) -> Tensor:
    return torch.randn(shape, generator=generator(seed, key), dtype=torch.float32)


class Noise:
    """The noise of one projection, for its elements in order.

    The draw never exists whole: it is made in pieces that stay in a core's cache.
    """

    def __init__(self, std: float, seed: int, key: str) -> None:
        self.std = std
        self._source = generator(seed, key)

    def __call__(self, weight: Tensor) -> Tensor:
        """The next elements, ``[n]``, plus draws times ``std``; n is a multiple of ``STREAMED`` except at the end."""
        out, wide, noise = torch.empty_like(weight), _wide(weight), torch.empty(min(_DRAWN, weight.numel()))
        for result, part in zip(out.split(_DRAWN), weight.split(_DRAWN), strict=True):
            drawn = noise[: part.numel()].normal_(generator=self._source).to(part.device)
            result.copy_(part.to(wide).add(drawn, alpha=self.std))
        return out


def noise_in(std: float, p: int, e: int, init: InitSpec, name: str) -> Noise:
    """What "copy+noise" adds to input projection ``p`` of expert ``e``; ``std``: that of all input projections."""
    return Noise(init.noise_std * std, init.seed, f"{name}/w_in/{e}/{p}")


def noise_out(std: float, e: int, init: InitSpec, name: str) -> Noise:
    """What "copy+noise" adds to the output projection of expert ``e``, whose deviation is ``std``."""
    return Noise(init.noise_std * std, init.seed, f"{name}/w_out/{e}")


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
