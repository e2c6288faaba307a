"""Every fenced Python block and every ``moepass`` command line of README and docs.

Python blocks run, on tiny models, in a namespace with what their page speaks of (``NAMESPACES``).  A block that cannot
run here has ``<!-- not run: reason -->`` in the line before it, and one with ``...`` in a call is a sketch: of both,
the names are checked.  Command lines are parsed by the command line itself: commands, options and values must exist.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dense_zoo
import moe_zoo
import pytest
import torch
import typer
import zoo
from tiny import Net, fresh  # noqa: F401 -- fresh is a fixture
from torch import nn

import moepass
from moepass.cli import app
from moepass.spec import MoESpec

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?P<before>[^\n]*)\n```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
MARKER = re.compile(r"<!-- not run: (?P<why>.{10,}) -->")


@dataclass(frozen=True)
class Snippet:
    page: str
    index: int
    code: str
    not_run: str | None

    @property
    def name(self) -> str:
        """What pytest shows."""
        return f"{self.page}:{self.index}"

    @property
    def sketch(self) -> bool:
        """Whether something is left out."""
        return any(isinstance(n, ast.Constant) and n.value is ... for n in ast.walk(ast.parse(self.code)))


def snippets() -> list[Snippet]:
    found = []
    for page in PAGES:
        for i, match in enumerate(FENCE.finditer(page.read_text())):
            marker = MARKER.search(match["before"])
            found.append(Snippet(page.name, i, match["code"], marker["why"] if marker else None))
    return found


# --- what the pages speak of -----------------------------------------------------------------------------------------


def _readme() -> dict[str, Any]:
    llama = zoo.build("llama")
    optimizer = torch.optim.SGD(llama.model.parameters(), lr=0.1)
    return {"model": llama.model, "ids": llama.inputs(8)["input_ids"], "optimizer": optimizer}


def _plan() -> dict[str, Any]:
    torch.compile(Net(1), backend="moepass", options={"inner": "eager"})(torch.randn(4, 32))
    return {}


def _folders() -> dict[str, Any]:
    dense_zoo.save(Path("SRC"), "qwen3")
    return {}


def _own() -> dict[str, Any]:
    model = dense_zoo.build("gpt2")
    moepass.convert(model)
    moepass.save(model, "DST")
    return {}


def _dense_state() -> dict[str, Any]:
    return {"model": Net(1), "spec": MoESpec(), "dense_state_dict": Net(1).state_dict()}


def _converted() -> dict[str, Any]:
    model = Net(1)
    moepass.convert(model)
    return {"model": model}


#: Page and number of the block -> names that it starts from.
NAMESPACES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md:0": _readme,
    "reading-a-plan.md:0": _plan,
    "upcycle.md:0": _folders,
    "upcycle.md:1": _own,
    "upcycle.md:2": _dense_state,
    "upcycle.md:3": _converted,
    "moe-models.md:0": lambda: {"model": moe_zoo.build("olmoe", num_hidden_layers=1)},
    "moe-models.md:1": lambda: {"model": moe_zoo.build("mixtral", num_hidden_layers=1)},
    "verify.md:0": lambda: {"model": Net(1), "input_ids": torch.randn(6, 32)},
}


#: What a tiny model does not need: Inductor's compile time, the weights of DeepSeek-V3's block.
QUICKER = {
    'backend="moepass")': 'backend="moepass", options={"inner": "eager"})',
    '"inner": "inductor"': '"inner": "eager"',
    "build(7168)": 'build(7168, device="meta")',
}


@pytest.mark.parametrize("snippet", snippets(), ids=lambda s: s.name)
def test_a_python_block_runs_or_its_names_exist(snippet, tmp_path, monkeypatch):
    tree = ast.parse(snippet.code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "moepass":
            assert hasattr(moepass, node.attr), node.attr
    if snippet.not_run or snippet.sketch:
        return
    monkeypatch.chdir(tmp_path)
    space = {"torch": torch, "nn": nn, "moepass": moepass, "__name__": "snippet"}
    space.update(NAMESPACES.get(snippet.name, dict)())
    code = snippet.code
    for slow, quick in QUICKER.items():
        code = code.replace(slow, quick)
    exec(compile(code, snippet.name, "exec"), space)


def test_every_namespace_belongs_to_a_block():
    assert set(NAMESPACES) <= {s.name for s in snippets() if not s.not_run}


# --- command lines ---------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    return [
        (page.name, line.strip())
        for page in PAGES
        for line in code_lines(page.read_text())
        if re.match(r"(    )?moepass [a-z]", line)
    ]


def code_lines(text: str) -> list[str]:
    """Lines of fenced blocks that are not Python, and indented ones outside of fences."""
    found, language = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            language = line[3:].strip() or "text" if language is None else None
        elif (language is None and line.startswith("    ")) or language not in (None, "python"):
            found.append(line)
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda v: v if v.endswith(".md") else None)
def test_a_command_line_is_one_that_moepass_takes(page, line):
    _, command, *arguments = shlex.split(line, comments=True)
    group = typer.main.get_command(app)
    commands: dict[str, Any] = vars(group)["commands"]
    assert command in commands, line
    commands[command].make_context(command, arguments)  # exits where an option or a value does not exist


def test_the_pages_have_both():
    assert len(snippets()) > 10
    assert len(commands()) > 25
