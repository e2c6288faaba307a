"""The architecture as a test: import direction, private torch APIs, file sizes (DESIGN sections 1, 2 and 8)."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"moepass": "moepass", "lowering": "moepass.lowering", "kernels": "moepass.kernels"}
MAX_LINES = 400
MAX_TEST_LINES = 500

#: Data flows downwards: a module may import from its own level or below.  Longest matching prefix wins.
LEVELS = {
    "moepass": 0,  # __init__ imports nothing at import time
    "moepass.errors": 0,
    "moepass.errors_base": 0,
    "moepass.errors_nn": 0,
    "moepass._compat": 0,
    "moepass.caches": 0,
    "moepass.frozen": 0,
    "moepass.watch": 0,
    "moepass.pointwise": 1,
    "moepass.spec": 2,
    "moepass.reference": 3,
    "moepass.ops": 3,
    "moepass.kernels": 4,
    "moepass.lowering": 5,
    "moepass.nn": 5,
    "moepass.graph": 5,
    "moepass.upcycle": 6,
    "moepass.explain": 6,
    "moepass.parallel": 6,
    "moepass.options": 6,
    "moepass.attach": 7,
    "moepass.workloads": 6,
    "moepass.decide": 7,
    "moepass.decide_ep": 7,
    "moepass.backend": 8,
    "moepass.preview": 8,
    "moepass.integrations": 8,
    "moepass.verify": 9,
    "moepass.cli": 9,
    "moepass.cli_calibrate": 9,
    "moepass.cli_emit": 9,
    "moepass.cli_parallel": 9,
    "moepass.cli_plan": 9,
    "moepass.cli_mesh": 9,
    "moepass.cli_upcycle": 9,
    "moepass.cli_verify": 9,
}

#: Imports inside functions that point upwards, each with the reason it may.
UPWARD_WHEN_CALLED: dict[tuple[str, str], str] = {
    ("moepass.ops", "moepass.lowering"): "an eager call of the op asks the same planner as the backend",
    ("moepass.explain", "moepass.preview"): "moepass.explain(model)(*args) runs the backend's stages",
    ("moepass.spec", "moepass.nn"): "MoESpec.build() makes the module that a spec describes",
    (
        "moepass.upcycle",
        "moepass.integrations",
    ): "convert(existing=True) uses transformers' experts interface",
}


class Import(NamedTuple):
    importer: str
    imported: str
    lazy: bool
    line: int


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def _module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(part for part in rest if part != "__init__")])


@functools.cache
def _modules() -> dict[str, Path]:
    paths = [path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))]
    return {_module_name(path): path for path in paths}


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _import_nodes(body: list[ast.stmt], lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements that run, with whether they run only when a function is called."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, lazy
        elif not _is_type_checking(node):
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for name in ("body", "orelse", "finalbody"):
                yield from _import_nodes(getattr(node, name, []), inside)
            for handler in getattr(node, "handlers", []):
                yield from _import_nodes(handler.body, inside)


def _targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.module is not None, "relative imports hide the layer; write the full name"
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _our_module(dotted: str) -> str | None:
    """The module of ours that ``dotted`` (a module, or a name in one) refers to."""
    if dotted.split(".")[0] != "moepass":
        return None
    while dotted not in _modules() and "." in dotted:
        dotted = dotted.rpartition(".")[0]
    return dotted


@functools.cache
def _imports() -> tuple[Import, ...]:
    found = []
    for name, path in _modules().items():
        for node, lazy in _import_nodes(_tree(path).body):
            for target in _targets(node):
                imported = _our_module(target)
                if imported is not None and imported != name:
                    found.append(Import(name, imported, lazy, node.lineno))
    return tuple(found)


def _level(module: str) -> int:
    if module == "moepass":
        return LEVELS[module]
    while module not in LEVELS:
        module = module.rpartition(".")[0]
        assert module not in ("", "moepass"), "a new top-level module needs a level in tests/test_layering.py"
    return LEVELS[module]


def _family(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_the_walk_sees_the_imports_it_judges():
    edges = {(edge.importer, edge.imported, edge.lazy) for edge in _imports()}
    assert ("moepass.spec", "moepass.errors", False) in edges
    assert ("moepass.lowering.base", "moepass.lowering.plan", False) in edges
    assert ("moepass.lowering.base", "moepass.lowering.hardware", False) not in edges, "that one is for type checkers"


def test_every_module_has_a_level_and_imports_only_downwards():
    level = {module: _level(module) for module in _modules()}
    upwards = [
        f"line {edge.line} of {edge.importer} (level {level[edge.importer]}) imports {edge.imported} "
        f"(level {level[edge.imported]})"
        for edge in _imports()
        if level[edge.imported] > level[edge.importer]
        if not (edge.lazy and (_family(edge.importer), _family(edge.imported)) in UPWARD_WHEN_CALLED)
    ]
    assert upwards == []


def test_every_listed_exception_is_still_needed():
    used = {(_family(e.importer), _family(e.imported)) for e in _imports() if e.lazy}
    assert set(UPWARD_WHEN_CALLED) <= used
    assert all(_level(importer) < _level(imported) for importer, imported in UPWARD_WHEN_CALLED)


def test_imports_have_no_circle():
    graph = nx.DiGraph((e.importer, e.imported) for e in _imports() if not e.lazy)
    assert list(nx.simple_cycles(graph)) == []


def test_the_ground_floor_imports_only_the_ground_floor():
    ground = {
        "moepass.errors",
        "moepass.errors_base",
        "moepass.errors_nn",
        "moepass.pointwise",
        "moepass.spec",
        "moepass.reference",
    }
    for edge in _imports():
        allowed = edge.lazy and (_family(edge.importer), _family(edge.imported)) in UPWARD_WHEN_CALLED
        if _family(edge.importer) in ground and not allowed:
            assert _family(edge.imported) in ground, edge


def _private_torch(node: ast.AST) -> Iterator[str]:
    names: list[str] = []
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = _targets(node)
    elif isinstance(node, ast.Attribute):
        names = [ast.unparse(node)]
    for name in names:
        first, *rest = name.split(".")
        if first == "torch" and any(_is_private(part) for part in rest):
            yield name


def _is_private(part: str) -> bool:
    return (part.startswith("_") and not part.startswith("__")) or part == "experimental"


def test_the_private_api_rule_knows_one_when_it_sees_one():
    lines = ["import torch._dynamo", "from torch.fx.experimental import x", "torch._foo.bar()"]
    assert all(any(True for n in ast.walk(ast.parse(line)) for _ in _private_torch(n)) for line in lines)
    fine = "import torch.nn\ntorch.__version__\nself._torch.x"
    assert [name for n in ast.walk(ast.parse(fine)) for name in _private_torch(n)] == []


def test_private_torch_apis_are_touched_only_in_compat():
    found = [
        f"line {node.lineno} of {module}: {name}"  # type: ignore[attr-defined]
        for module, path in _modules().items()
        if _family(module) != "moepass._compat"
        for node in ast.walk(_tree(path))
        for name in _private_torch(node)
    ]
    assert found == []


def _all_scripts() -> list[Path]:
    folders = [*PACKAGES, "examples", "benchmarks", "tests"]
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_kernels_and_lowering_are_imported_by_their_full_names():
    short = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in _all_scripts()
        for node, _ in _import_nodes(_tree(path).body)
        for target in _targets(node)
        if target.split(".")[0] in {"kernels", "lowering"}
    ]
    assert short == []


def _hard_coded_cuda(node: ast.AST) -> bool:
    """``x.cuda()``, ``device="cuda"``, ``x.to("cuda:0")``, ``torch.device("cuda")``; comparing a type is fine."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name == "cuda":
        return True
    given = [k.value for k in node.keywords if k.arg in {"device", "device_type"}]
    given += node.args if name in {"to", "device", "Device"} else []
    return any(isinstance(v, ast.Constant) and str(v.value).split(":")[0] == "cuda" for v in given)


def test_the_device_rule_knows_a_hard_coded_device_when_it_sees_one():
    lines = ["x.cuda()", 'torch.zeros(2, device="cuda")', 'x.to("cuda:0")', 'torch.device("cuda")']
    assert all(any(_hard_coded_cuda(n) for n in ast.walk(ast.parse(line))) for line in lines)
    assert not any(_hard_coded_cuda(n) for n in ast.walk(ast.parse('x.device.type == "cuda" and x.to(y.device)')))


def test_no_device_is_hard_coded():
    found = [
        f"line {node.lineno} of {module}"  # type: ignore[attr-defined]
        for module, path in _modules().items()
        for node in ast.walk(_tree(path))
        if _hard_coded_cuda(node)
    ]
    assert found == []


def test_files_are_short_and_say_what_they_are():
    wrong = {str(path.relative_to(ROOT)): said for path in _all_scripts() if (said := _bad_manners(path))}
    assert wrong == {}


def _bad_manners(path: Path) -> list[str]:
    text, tree = path.read_text(), _tree(path)
    lines, limit = text.count("\n"), MAX_TEST_LINES if path.is_relative_to(ROOT / "tests") else MAX_LINES
    rules = {
        f"{lines} lines: split it, one pass, lowering or kernel family per file": lines > limit,
        "no docstring: the first lines of a file say its contract": not ast.get_docstring(tree),
        "no annotations import": len(tree.body) > 1 and "from __future__ import annotations" not in text,
    }
    return [said for said, broken in rules.items() if broken]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_every_example_has_a_main(path):
    names = {node.name for node in _tree(path).body if isinstance(node, ast.FunctionDef)}
    assert "main" in names
    assert 'if __name__ == "__main__":' in path.read_text()


def test_test_files_have_unique_names():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
