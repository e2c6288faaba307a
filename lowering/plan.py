"""Frozen values that planning passes around: workload, verdicts, prices and the plan itself.

A plan is data: it can be dumped to JSON, compared, pinned and replayed.  Times are seconds, sizes are bytes.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from moepass.frozen import Frozen
from moepass.lowering import routing as spread
from moepass.lowering.mesh import MeshSpec


class TokenRange(Frozen):
    """Token counts ``low <= T <= high`` (both inclusive; ``high=None``: no upper end)."""

    low: int = Field(0, ge=0)
    high: int | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.high is not None and self.high < self.low:
            raise ValueError(f"the range ends at {self.high}, before it begins at {self.low}")
        return self

    def __contains__(self, tokens: int) -> bool:
        return self.low <= tokens and (self.high is None or tokens <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"T >= {self.low}"
        return f"T = {self.low}" if self.low == self.high else f"T in [{self.low}, {self.high}]"


class Workload(Frozen):
    """What one MoE block has to do, as far as planning cares.

    ``dtype`` is the compute dtype's name ("float32", "bfloat16", ...), ``tokens`` the representative T, ``routing``
    what prices assume about the router (``lowering.routing``).

    Expert parallelism: ``mesh`` holds the ranks and links over which the E experts are spread (None: one rank), and T
    is what one rank's graph sees.  ``same_tokens``: every rank holds the same T tokens (decode), instead of its own.
    ``buffer_factor``: static buffers of that many times the mean rows, which may drop rows; None: never drop.
    ``shared``: width of a shared expert, which runs while rows are dispatched (0: none); priced on a mesh alone.

    ``save_limit``: the most bytes that the block may keep for its backward pass (where every lowering keeps more: the
    least that one does); None: no limit.
    """

    tokens: int = Field(ge=0)
    D: int
    F: int
    E: int
    K: int
    n: int = Field(ge=1, le=2)
    dtype: str = "float32"
    device: str = "cpu"
    train: bool = False
    bias: bool = False
    dropout: bool = False
    activation_flops: int = 4
    capacity_factor: float | None = None
    routing: str = "random"
    mesh: MeshSpec | None = None
    same_tokens: bool = False
    buffer_factor: float | None = Field(None, gt=0)
    shared: int = Field(0, ge=0)
    save_limit: int | None = Field(None, ge=0)

    @field_validator("routing")
    @classmethod
    def _known_routing(cls, routing: str) -> str:
        spread.skew(routing)
        return routing

    @property
    def R(self) -> int:
        """Routed rows T*K."""
        return self.tokens * self.K

    @property
    def itemsize(self) -> int:
        """Bytes per element of ``dtype``."""
        return {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def weight_elements(self) -> int:
        """Elements of one expert's matrices: (n+1)*D*F."""
        return (self.n + 1) * self.D * self.F

    @property
    def active_experts(self) -> float:
        """Expected distinct experts; under random routing E(1-(1-K/E)^T)."""
        return spread.active_experts(self.tokens, self.E, self.K, self.routing)


class Verdict(Frozen):
    """May a lowering serve a workload?  ``code`` is a stable reason code where it may not."""

    legal: bool
    code: str | None = None
    detail: str | None = None

    @classmethod
    def yes(cls) -> Verdict:
        """Legal."""
        return cls(legal=True)

    @classmethod
    def no(cls, code: str, detail: str) -> Verdict:
        """Illegal, with a reason."""
        return cls(legal=False, code=code, detail=detail)


class Price(Frozen):
    """A lowering's estimated cost: seconds by component and the traffic behind them."""

    compute: float = 0.0  # seconds of arithmetic
    memory: float = 0.0  # seconds of memory traffic
    overhead: float = 0.0  # seconds of launches, dispatch and whatever else does not overlap with the GEMMs
    flops: float = 0.0
    bytes: float = 0.0
    saved_bytes: float = 0.0  # kept for backward

    @property
    def total(self) -> float:
        """Seconds: smooth maximum (p=4) of compute and memory, plus overhead (reference/kernels.md 2.1)."""
        return float((self.compute**4 + self.memory**4) ** 0.25) + self.overhead


class Alternative(Frozen):
    """One lowering that was considered for a token range."""

    lowering: str
    legal: bool
    reason: str | None = None
    detail: str | None = None
    predicted: Price | None = None
    measured: float | None = None  # seconds, median, only where it was timed
    corrected: float | None = None  # the estimate times what measurements at other T say of it (``lowering.facts``)


class Plan(Frozen):
    """The choice for one workload over one token range.  ``alternatives`` are sorted: best first, illegal last."""

    lowering: str
    tokens: TokenRange
    workload: Workload
    alternatives: tuple[Alternative, ...]
    hardware: str
    decided_by: Literal["estimate", "measurement", "learned", "pin"] = "estimate"
    evidence: str | None = None  # of measurements that were made before: which

    @property
    def chosen(self) -> Alternative:
        """The alternative that was chosen."""
        return next(a for a in self.alternatives if a.lowering == self.lowering)


class Curve(Frozen):
    """One lowering: for each token count its seconds, FLOPs and bytes, or None where it is not legal."""

    lowering: str
    seconds: tuple[float | None, ...]
    flops: tuple[float | None, ...]
    bytes: tuple[float | None, ...]


class Choice(Frozen):
    """What the planner chooses over a range of T."""

    tokens: TokenRange
    lowering: str


class Sweep(Frozen):
    """A block's prices on a machine.

    ``workload``   with T = 0: the sweep is over T
    ``peak``       FLOP/s of a large GEMM in the workload's dtype; ``bandwidth``: bytes/s of a large copy
    """

    hardware: str
    workload: Workload
    peak: float
    bandwidth: float
    tokens: tuple[int, ...]
    curves: tuple[Curve, ...]
    choices: tuple[Choice, ...]

    def chosen(self, tokens: int) -> str:
        """The lowering that serves T = ``tokens``."""
        return next(c.lowering for c in self.choices if tokens in c.tokens)
