"""SRC's own tokenizer, or a refusal that says what to give instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from moepass import errors
from moepass.upcycle.hf.match import transformers

#: Without one of these transformers may make a tokenizer that knows no word.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def tokenizer_of(folder: Path, option: str, value: object, instead: str) -> Any:
    """The tokenizer in ``folder``.  Raises ``BadOption`` in the name of ``option``; ``instead``: what would do."""

    def refuse(detail: str) -> NoReturn:
        raise errors.BadOption(name=option, value=value, detail=f"{detail}; {instead}")

    if not any((folder / name).is_file() for name in FILES):
        refuse(f"{folder} has no tokenizer")
    try:
        return transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's files can make another library say
        refuse(f"the tokenizer of {folder} cannot be loaded ({errors.first_line(error)})")
