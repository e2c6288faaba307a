"""What all errors of moepass are made from; the catalogue is ``moepass.errors``."""

from __future__ import annotations

from typing import Any, ClassVar


class MoepassError(Exception):
    """Base of all errors that a user of moepass may see."""

    code: ClassVar[str] = "moepass_error"
    template: ClassVar[str] = "{detail}"

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        super().__init__(self.template.format(**fields))


def first_line(error: BaseException) -> str:
    """What another library's error says in one line of at most 200 characters, for a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
