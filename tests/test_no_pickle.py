"""Nothing that moepass reads can run code, and no path in what it reads leads out of its folder.

See docs/security.md for what that covers and what it does not.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from tiny import D, Net, compiled, fresh  # noqa: F401 -- fresh is a fixture

import moepass
from moepass import errors, pointwise
from moepass.explain.report import PlanReport
from moepass.kernels.codegen.derive import source
from moepass.lowering.hardware import load_hardware

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for folder in ("moepass", "lowering", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]
#: Calls that can run what they read.  The last part of a dotted name is enough: aliases would not hide them.
_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
ALLOWED = {
    # Triton wants functions of Python source; this one is printed from an expression tree, never from a text.
    "kernels/codegen/materialise.py": {"exec"},
}
_CALLS = {"eval", "exec", "loads_pickle", "read_pickle", "Unpickler"}


def unsafe(tree: ast.AST) -> list[str]:
    """What a source does that could run data."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in _MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in _MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in _CALLS or name.split(".")[-1] in _CALLS - {"eval", "exec"}:
                found.append(name)
            if name in ("torch.load", "torch.hub.load", "np.load", "numpy.load") and not _weights_only(node):
                found.append(name)
    return found


def _weights_only(call: ast.Call) -> bool:
    return any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)


def test_the_rule_knows_what_it_looks_for():
    lines = ["import pickle", "from joblib import load", "torch.load(f)", "eval(t)", "torch.load(f, weights_only=0)"]
    assert all(unsafe(ast.parse(line)) for line in lines)
    assert not unsafe(ast.parse("torch.load(f, weights_only=True)\nmodel.eval()\njson.loads(t)"))


def test_no_source_unpickles_or_evaluates():
    found = {p.relative_to(ROOT).as_posix(): set(unsafe(ast.parse(p.read_text()))) for p in SOURCES}
    assert {path: calls for path, calls in found.items() if calls} == ALLOWED


CODE = "__import__('os').system('echo moepass')"


@pytest.mark.parametrize("text", [CODE, "g.__class__", "(lambda: g)()", "[g][0]", "g if g else g", "f'{g}'", "open(g)"])
def test_an_activation_is_read_by_a_grammar(text):
    with pytest.raises(errors.BadActivation):
        pointwise.canonical(text)
    with pytest.raises(errors.BadActivation):
        source(text)


def test_a_plan_is_data_its_strings_are_never_run(tmp_path):
    model, x = Net(1), torch.randn(8, D)
    compiled(model, "eager")(x)
    data = json.loads(moepass.last_plan().to_json())
    data["sites"][0]["activation"] = CODE
    data["sites"][0]["guard"] = CODE
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(model, "eager", plan=str(path))(x), model(x), rtol=1e-5, atol=1e-6)
    assert moepass.last_plan().sites[0].activation != CODE, "what the plan says of the activation is not believed"


def test_markup_in_a_plan_reaches_neither_the_terminal_nor_the_page():
    base = PlanReport(hardware="cpu", device="cpu", notes=("<script>alert(1)</script>", "\x1b[31m red"))
    assert "<script>alert(1)" not in base.to_html()
    assert "\x1b" not in base.to_text()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\0b", "~root/x.json"])
def test_a_name_of_hardware_opens_a_profile_or_nothing(name):
    with pytest.raises((errors.UnknownHardware, errors.BadProfile)):
        load_hardware(name)


def test_the_page_on_security_names_what_runs_code():
    page = (ROOT / "docs" / "security.md").read_text()
    for word in ("module:function", "torch.export.load", "weights_only=True", "safetensors", "MOEPASS_DUMP"):
        assert word in page
