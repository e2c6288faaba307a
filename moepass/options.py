"""The options of ``torch.compile(model, backend="moepass", options={...})``: validated once, frozen."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moepass import _compat, errors
from moepass.lowering.hardware import Hardware, load_hardware
from moepass.spec import InitSpec, MoESpec


@dataclass(frozen=True)
class Options:
    """What a user may ask of the backend.

    ``spec``      MoE semantics for dense FFNs; None: 8 experts, top-2.
    ``convert``   "auto": rewrite dense FFNs by the default init, unless the graph has experts already; True: always;
                  an init name or ``InitSpec``: always, by that; False: leave them dense.
    ``inner``     compiler of the rewritten graph: "inductor", "aot_eager", "eager" or another registered backend.
    ``plan``      path of a dumped plan (or a PlanReport) to replay.
    ``measure``   time the legal lowerings on this device instead of trusting the estimate.
    ``strict``    raise where the backend would otherwise leave something dense.
    ``hardware``  a preset or profile path to plan for; None: this machine.
    ``save_limit``  the most bytes that a block may keep for its backward pass; None: no limit.  Lowerings that keep
                  more are left out, unless none keeps less; ``fused_recompute`` keeps the least.
    ``inductor``  extra Inductor options.
    """

    spec: MoESpec | None = None
    convert: bool | str | InitSpec = "auto"
    inner: str = "inductor"
    plan: Any = None
    measure: bool = False
    strict: bool = False
    hardware: Any = None
    save_limit: int | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Check names and values.  Raises ``UnknownOption`` (with the nearest name) or ``BadOption``."""
        given = dict(options or {})
        known = list(cls.__dataclass_fields__)
        for name in given:
            if name not in known:
                raise errors.UnknownOption(
                    name=name, suggestion=suggestion(name, known, _misplaced(name)), known=", ".join(known)
                )
        parsed = cls(**given)
        parsed._check()
        if mode is None or mode == "default":
            return parsed
        return cls(**{**given, "inductor": {**_mode_options(mode), **parsed.inductor}})

    @property
    def init(self) -> InitSpec | None:
        """How dense FFNs are converted; None: not at all."""
        if self.convert is False:
            return None
        if isinstance(self.convert, InitSpec):
            return self.convert
        return InitSpec() if self.convert is True or self.convert == "auto" else InitSpec(method=self.convert)

    def settings(self) -> dict[str, Any]:
        """The part that belongs into a report: JSON scalars."""
        return {
            "spec": None if self.spec is None else self.spec.model_dump_json(),
            "init": None if self.init is None else self.init.model_dump_json(),
            "inner": self.inner,
            "measure": self.measure,
            "pinned": self.plan is not None,
        } | ({} if self.save_limit is None else {"save_limit": self.save_limit})

    def _check(self) -> None:
        if self.spec is not None and not isinstance(self.spec, MoESpec):
            raise errors.BadOption(name="spec", value=self.spec, detail="give a moepass.MoESpec")
        if isinstance(self.convert, str):
            methods = InitSpec.model_fields["method"].annotation.__args__  # type: ignore[union-attr]
            _one_of("convert", self.convert, ("auto", *methods))
        elif not isinstance(self.convert, (bool, InitSpec)):
            raise errors.BadOption(
                name="convert", value=self.convert, detail="give a bool, an init name or an InitSpec"
            )
        _one_of("inner", self.inner, _compat.inner_compilers())
        if self.hardware is not None and not isinstance(self.hardware, (str, Path, Hardware)):
            raise errors.BadOption(name="hardware", value=self.hardware, detail="give a preset's name or a profile")
        if isinstance(self.hardware, (str, Path)):
            load_hardware(self.hardware)  # raises UnknownHardware or BadProfile
        for name in ("measure", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise errors.BadOption(name=name, value=getattr(self, name), detail="give True or False")
        limit = self.save_limit
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
            raise errors.BadOption(name="save_limit", value=limit, detail="give a number of bytes, 0 or more, or None")
        if not isinstance(self.inductor, Mapping):
            raise errors.BadOption(name="inductor", value=self.inductor, detail="give a dict of Inductor options")
        if self.inductor and self.inner != "inductor":
            raise errors.BadOption(name="inductor", value=self.inductor, detail=f"inner={self.inner!r} takes none")
        known = _compat.inductor_options() if self.inductor else set()
        for name in self.inductor:
            if name.replace("-", "_") not in known:
                raise errors.UnknownOption(
                    name=f"inductor.{name}", suggestion=suggestion(name, known), known="those of torch._inductor.config"
                )


def pin_text(plan: Any) -> str:
    """How messages name ``options["plan"]``: its path, or its fingerprint where it is a report."""
    return str(getattr(plan, "fingerprint", plan))


def suggestion(name: str, known: Iterable[str], extra: str = "") -> str:
    """``"; did you mean 'x'?"`` or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return extra or (f"; did you mean {close[0]!r}?" if close else "")


def _misplaced(name: str) -> str:
    if isinstance(name, str) and name.replace("-", "_") in _compat.inductor_options():
        return f"; it is an Inductor option: put it in options={{'inductor': {{{name!r}: ...}}}}"
    return ""


def _one_of(name: str, value: object, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        detail = f"use one of {', '.join(known)}{suggestion(str(value), known)}"
        raise errors.BadOption(name=name, value=value, detail=detail)


def _mode_options(mode: str) -> dict[str, Any]:
    try:
        return _compat.inductor_mode_options(mode)
    except Exception as error:
        raise errors.BadOption(name="mode", value=mode, detail=str(error)) from None
