"""What each lowering costs: a roofline with M-tile padding, expected active experts, and dispatch.

Pure functions of a workload and a hardware profile; forward, or forward and backward where ``work.train``.
Letters: T tokens, D model width, F expert width, E experts, K top-k, n input projections, R = T*K, b bytes an element,
``W = (n+1)*D*F`` elements of one expert, A expected active experts (``lowering.routing``), r rows per expert.

    FLOPs     2*W per row and pass; the backward pass does twice the forward's
    weights   read once forward and once for dX, where they are used; the gradient [E, n*F, D] and [E, D, F] is written
              whole, zeros included
    glue      traffic of kernels that run between the GEMMs (permute, activation, combine): not overlapped with them, so
              it is seconds of ``overhead``; rows are moved at the rate of gathers, and sorted once a step
    CPU       GEMM efficiency by rows is measured with weights that come from memory, so ``compute`` holds reading them;
              a core does not overlap kernels, so all traffic of activations is glue

Source: reference/kernels.md 2.1 and 3c; total = (compute^4 + memory^4)^(1/4) + overhead (``Price.total``).
"""

from __future__ import annotations

import functools

from moepass import spec
from moepass.kernels.fused.schedule import ONE_PROGRAM
from moepass.kernels.fused.schedule_decode import MOST_TOKENS
from moepass.lowering import routing
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Price, Workload

#: Kernels (accelerator) or aten ops (CPU) of a forward pass, counted in ``lowering/*.py`` after fusion.
LAUNCHES = {"dense": 6, "gathered": 8, "grouped": 9, "capacity": 12}
#: Launches of the fused kernels, whose backward pass is not twice the forward: (forward, backward).  Two fewer each
#: where one program routes (``kernels.fused.schedule.ONE_PROGRAM``), two more backward with biases.
FUSED_LAUNCHES = (6, 9)
#: Launches where weights are streamed for a few tokens; one more where few narrow experts cut the up projection.
STREAMED_LAUNCHES = 3
#: Seconds of one pass in Triton's interpreter: never the choice, only ever a pin.
INTERPRETED = 1.0
#: glibc returns larger blocks to the system when they are freed, so every step faults their pages in again
#: (DEFAULT_MMAP_THRESHOLD_MAX of malloc.c on 64 bits).
FRESH_BYTES = 32 << 20
#: Passes over the activations in a training step, in units of the forward's: forward, and twice that backward.
TRAIN_PASSES = 3


def price_dense(work: Workload, hw: Hardware) -> Price:
    """All experts on all tokens: ``2*W*T*E`` FLOPs, every weight read, ``[T, E, *]`` activations moved."""
    rows = work.tokens * work.E
    hidden = _hidden_traffic(work, rows)
    outputs = 2 * rows * work.D + 2 * work.tokens * work.D
    return _batched_price("dense", work, hw, work.tokens, hw.dense, 0, hidden + outputs)


def price_capacity(work: Workload, hw: Hardware) -> Price:
    """C rows for each of E experts, C = max(1, ceil(cf*T*K/E)): ``2*W*E*C`` FLOPs, dispatch and combine by gather.

    Without a capacity factor: priced as if cf were 1 (the lowering is not legal there).
    """
    C = spec.capacity(work.capacity_factor or 1.0, work.tokens, work.K, work.E)
    rows = work.E * C
    dispatch = (work.tokens + rows) * work.D
    combine = (rows + work.R + work.tokens) * work.D
    return _batched_price("capacity", work, hw, C, hw.batched, dispatch + combine, _hidden_traffic(work, rows))


def price_gathered(work: Workload, hw: Hardware) -> Price:
    """A mat-vec per routed row, each with its own expert's weights: ``W*b`` bytes per row however rows repeat."""
    return _gathered_cpu(work, hw) if hw.device == "cpu" else _gathered_accelerator(work, hw)


def price_grouped(work: Workload, hw: Hardware) -> Price:
    """Rows sorted by expert, a GEMM per active expert: ``2*W*R`` FLOPs, the weights of the active experts."""
    return _grouped_cpu(work, hw) if hw.device == "cpu" else _grouped_accelerator(work, hw)


def price_fused(work: Workload, hw: Hardware, *, recompute: bool = False) -> Price:
    """Rows padded to BLOCK_M in tiles that gather them: no permuted copy, hidden rows written once and read once.

    Backward: dA' and dX by row tiles, each weight read once more, z and dz moved, both weight gradients written whole;
    the combines are kernels of their own, whose traffic does not overlap.  ``recompute``: the pre-activations are not
    kept, and the up projection runs again.  A few tokens: ``_price_streamed``.
    """
    if not work.train and 0 < work.tokens <= MOST_TOKENS:
        return _price_streamed(work, hw)
    passes, b, R, D, F = _passes(work), work.itemsize, work.R, work.D, work.F
    again = work.n * D * F if recompute else 0
    multiplied = passes * work.weight_elements + again
    compute = min(
        2.0 * multiplied * _padded(work, int(tile)) / (efficiency * hw.peak(work.dtype))
        for tile, efficiency in hw.fused
    )
    gemm = work.tokens * D * (1 + recompute) + 2 * R * F + R * D
    glue = (R + work.tokens) * D
    if work.train:  # z written; then dy, z, dz three times, s*A twice, x, dx
        gemm += work.n * R * F + 2 * work.tokens * D + 4 * work.n * R * F + 2 * R * F + work.tokens * D + R * D
        glue *= 2
    weights = _active_weights(work) + work.active_experts * again
    few = R <= ONE_PROGRAM
    forward, backward = (launches - 2 * few for launches in FUSED_LAUNCHES)
    launches = forward + (backward + 2 * work.bias + recompute if work.train else 0)
    interpreted = INTERPRETED * passes if hw.device == "cpu" else 0.0
    saved = ((0 if recompute else work.n * R * F) + work.tokens * D) * b
    return Price(
        compute=compute,
        memory=(weights + gemm) * b / hw.bandwidth,
        overhead=hw.dispatch("fused", launches) + glue * b / hw.bandwidth + interpreted,
        flops=2.0 * multiplied * R,
        bytes=(weights + gemm + glue) * b,
        saved_bytes=float(saved) if work.train else 0.0,
    )


def _price_streamed(work: Workload, hw: Hardware) -> Price:
    """The active experts' weights read once and multiplied on vector units, unpadded (``kernels.fused.decode``).

    Each weight costs a conversion, and a product for each row of its expert, at the rate of float32 without matrix
    units.  Between the kernels: hidden rows, and sums in float32, which the last kernel reads.
    """
    W, R, b = work.weight_elements, work.R, work.itemsize
    weights = _active_weights(work)
    moved = work.tokens * work.D * b + 2 * R * work.F * b
    glue = 2 * R * work.D * 4 + work.tokens * work.D * b
    return Price(
        compute=2.0 * (weights + W * R) / hw.peak("float32"),
        memory=(weights * b + moved) / hw.bandwidth,
        overhead=hw.dispatch("fused", STREAMED_LAUNCHES)
        + glue / hw.bandwidth
        + (INTERPRETED if hw.device == "cpu" else 0.0),
        flops=2.0 * W * R,
        bytes=weights * b + moved + glue,
    )


def _batched_price(
    name: str, work: Workload, hw: Hardware, rows: int, efficiency: float, glue: int, activations: int
) -> Price:
    """``rows`` rows for every expert in batched GEMMs; ``glue`` and ``activations`` are elements moved forward."""
    passes, b = _passes(work), work.itemsize
    forward = 2.0 * work.weight_elements * rows * work.E
    weights = work.E * work.weight_elements * (3 if work.train else 1)
    moved, other = hw.gather_seconds(glue * b), 0
    if hw.device == "cpu":
        activations, other = 0, activations
    saved = work.E * rows * ((work.n + 1) * work.F * b + work.D * max(b, 4)) + work.tokens * work.D * b
    return Price(
        compute=_gemm_seconds(work, hw, forward, rows) / efficiency,
        memory=(weights + passes * activations) * b / hw.bandwidth,
        overhead=passes * (hw.dispatch(name, LAUNCHES[name]) + moved + other * b / hw.bandwidth)
        + _fresh_gradient(work, hw)
        + (work.R * hw.sort_row if glue else 0.0),
        flops=passes * forward,
        bytes=float((weights + passes * (activations + other + glue)) * b),
        saved_bytes=float(saved) if work.train else 0.0,
    )


def _grouped_accelerator(work: Workload, hw: Hardware) -> Price:
    """One library grouped GEMM per projection; a loop of GEMMs with a host read where it does not take the dtype."""
    passes, b = _passes(work), work.itemsize
    compute = min(
        passes * 2.0 * work.weight_elements * _padded(work, int(tile)) / (efficiency * hw.peak(work.dtype))
        for tile, efficiency in hw.tiles
    )
    gemm = passes * (2 * work.R * work.D + (work.n + 1) * work.R * work.F)
    moved = passes * 2 * (work.tokens + work.R) * work.D
    glue = moved + passes * (work.n + 1) * work.R * work.F
    weights = _active_weights(work)
    loop = 0.0 if work.dtype == "bfloat16" else passes * 2 * work.active_experts * hw.per_expert
    return Price(
        compute=compute,
        memory=(weights + gemm) * b / hw.bandwidth,
        overhead=passes * hw.dispatch("grouped", LAUNCHES["grouped"])
        + loop
        + work.R * hw.sort_row
        + hw.gather_seconds(moved * b)
        + (glue - moved) * b / hw.bandwidth,
        flops=passes * 2.0 * work.weight_elements * work.R,
        bytes=(weights + gemm + glue) * b,
        saved_bytes=_saved_rows(work),
    )


def _grouped_cpu(work: Workload, hw: Hardware) -> Price:
    """A loop of GEMMs over the active experts, two forward and four backward for each."""
    passes, b = _passes(work), work.itemsize
    forward = 2.0 * work.weight_elements * work.R
    spread = routing.rows_by_expert(work.tokens, work.E, work.K, work.routing)
    moved = passes * (4 * work.R * work.D + 2 * work.tokens * work.D)
    glue = moved + passes * _hidden_traffic(work, work.R)
    weights = _active_weights(work)
    return Price(
        compute=sum(_gemm_seconds(work, hw, share * forward, rows, grouped=True) for rows, share in spread),
        memory=weights * b / hw.bandwidth,
        overhead=passes * (2 * work.active_experts * hw.per_expert + hw.dispatch("grouped", LAUNCHES["grouped"]))
        + work.R * hw.sort_row
        + hw.gather_seconds(moved * b)
        + (glue - moved) * b / hw.bandwidth
        + _fresh_gradient(work, hw),
        flops=passes * forward,
        bytes=(weights + glue) * b,
        saved_bytes=_saved_rows(work),
    )


def _gathered_accelerator(work: Workload, hw: Hardware) -> Price:
    """Gathered copies of the weights (read, write, read) in a batched product; dW by a one-hot product over experts."""
    W, b = work.weight_elements, work.itemsize
    flops = 2.0 * W * work.R
    elements = 3 * W * work.R + 8 * work.R * work.D
    if work.train:
        flops += 2.0 * W * work.R + 2.0 * W * work.R * work.E
        elements += elements + work.E * W
    return Price(
        compute=flops / (hw.dense * hw.peak(work.dtype)),
        memory=elements * b / hw.bandwidth,
        overhead=_passes(work) * hw.dispatch("gathered", LAUNCHES["gathered"]),
        flops=flops,
        bytes=float(elements * b),
        saved_bytes=_saved_rows(work),
    )


def _gathered_cpu(work: Workload, hw: Hardware) -> Price:
    """Two mat-vecs per row forward; backward two more, and two rank-one updates (read and write) into dW.

    The gradients of experts without rows are filled with zeros.
    """
    W, b, passes = work.weight_elements, work.itemsize, _passes(work)
    forward = W * work.R * b
    backward = 3 * forward if work.train else 0
    gradient = work.E * W * b if work.train else 0
    zeros = gradient * (1 - work.active_experts / work.E)
    flops = passes * 2.0 * W * work.R
    return Price(
        compute=flops / hw.peak(work.dtype),
        memory=forward / hw.matvec_bandwidth(work.dtype)
        + backward / hw.matvec_bandwidth(work.dtype, backward=True)
        + zeros / hw.bandwidth,
        overhead=passes * (2 * work.R * hw.per_row + hw.dispatch("gathered", LAUNCHES["gathered"]))
        + _fresh_gradient(work, hw),
        flops=flops,
        bytes=float(forward + backward + gradient),
        saved_bytes=_saved_rows(work),
    )


def _padded(work: Workload, tile: int) -> float:
    """Expected rows after padding each expert's to whole tiles."""
    return routing.padded_rows(work.tokens, work.E, work.K, work.routing, tile)


def _passes(work: Workload) -> int:
    return TRAIN_PASSES if work.train else 1


def _gemm_seconds(work: Workload, hw: Hardware, forward: float, rows: float, *, grouped: bool = False) -> float:
    """Seconds of ``forward`` FLOPs in GEMMs of ``rows`` rows and, in training, of twice as many backward."""
    rate = functools.partial(hw.rows_efficiency, work.dtype, rows, grouped=grouped)
    seconds = forward / (rate() * hw.peak(work.dtype))
    if work.train:
        seconds += 2 * forward / (rate(backward=True) * hw.peak(work.dtype))
    return seconds


def _fresh_gradient(work: Workload, hw: Hardware) -> float:
    """CPU: seconds of the page faults of newly allocated weight gradients, which no lowering avoids."""
    if not work.train or hw.fresh is None:
        return 0.0
    gradients = (work.E * work.n * work.F * work.D * work.itemsize, work.E * work.D * work.F * work.itemsize)
    return sum(size for size in gradients if size >= FRESH_BYTES) / hw.fresh


def _active_weights(work: Workload) -> float:
    """Weight elements moved: the active experts' forward and for dX, all of dW."""
    active = work.active_experts * work.weight_elements
    return 2 * active + work.E * work.weight_elements if work.train else active


def _hidden_traffic(work: Workload, rows: int) -> int:
    """Elements moved between the two GEMMs, forward: ``n*F`` and ``F`` per row, each written and read."""
    return 2 * (work.n + 1) * rows * work.F


def _saved_rows(work: Workload) -> float:
    """Bytes kept for backward by the row-wise lowerings: inputs, pre-activations, hidden, outputs of R rows."""
    return float(work.R * (2 * work.D + (work.n + 1) * work.F) * work.itemsize) if work.train else 0.0
