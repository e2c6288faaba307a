"""Partial evaluation: constants folded, dead branches gone, helpers specialised, comments kept; and the text itself."""

from __future__ import annotations

import ast

import pytest
from expecttest import assert_expected_inline

from moepass import errors, pointwise
from moepass.kernels.emit import layout, library
from moepass.kernels.emit.block import emit_block
from moepass.kernels.emit.files import Facts
from moepass.kernels.emit.fold import fold
from moepass.kernels.emit.specialise import Specialiser
from moepass.kernels.emit.torch_text import TEXTS, torch_text
from moepass.kernels.fused.problem import TARGETS, Problem
from moepass.pointwise import OPS

SOURCE = '''
@triton.jit
def scaled(x, w, FACTOR: tl.constexpr, SQUARE: tl.constexpr):
    """x times FACTOR."""
    if SQUARE:
        return x * x * FACTOR
    return x * FACTOR


@triton.jit
def twice(x, y, N: tl.constexpr):
    y = x + N
    return y, y


@triton.jit
def kernel(x, bias, out, N: tl.constexpr, BLOCK: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr):
    """Does this and that."""
    COLUMNS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    # Where this program is.
    i = tl.program_id(0) * COLUMNS + tl.arange(0, BLOCK)
    unused = i < N
    value = tl.load(x + i * 1, mask=i < N, other=0.0) if not EVEN else tl.load(x + i)  # one load
    if bias is not None:
        # The bias is there.
        value += tl.load(bias + i)

    for part in tl.static_range(2):
        value += part
    value = scaled(value, unused, 3, SAVE and N > 2)
    a, b = twice(value, i, COLUMNS)
    if SAVE or (EVEN and N % BLOCK == 0):
        tl.store(out + i, a + b)
    else:
        tl.store(out, a)
'''


def specialised(monkeypatch, constants):
    """The functions of the file, as text."""
    monkeypatch.setattr(library, "load", lambda name: library.parse(SOURCE))
    made = Specialiser()
    made.function("anything", "kernel", constants)
    return "\n\n".join(map(layout.function, made.functions.values()))


def test_a_kernel_with_every_branch_taken(monkeypatch):
    text = specialised(monkeypatch, {"N": 6, "BLOCK": 4, "SAVE": True, "EVEN": False})
    assert_expected_inline(
        text,
        '''\
@triton.jit
def twice(x, y):
    y = x + 2
    return y, y


@triton.jit
def kernel(x, bias, out):
    """Does this and that."""
    # Where this program is.
    i = tl.program_id(0) * 2 + tl.arange(0, 4)
    value = tl.load(x + i, mask=i < 6, other=0.0)  # one load
    # The bias is there.
    value += tl.load(bias + i)
    value += 0
    value += 1
    value = value * value * 3
    a, b = twice(value, i)
    tl.store(out + i, a + b)
''',
    )


def test_a_kernel_without_what_its_plan_does_not_need(monkeypatch):
    text = specialised(monkeypatch, {"N": 8, "BLOCK": 8, "SAVE": False, "EVEN": True, "bias": None})
    assert_expected_inline(
        text,
        '''\
@triton.jit
def twice(x, y):
    y = x + 1
    return y, y


@triton.jit
def kernel(x, out):
    """Does this and that."""
    # Where this program is.
    i = tl.program_id(0) + tl.arange(0, 8)
    value = tl.load(x + i)  # one load
    value += 0
    value += 1
    value = value * 3
    a, b = twice(value, i)
    tl.store(out + i, a + b)
''',
    )


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("(N + 3) // 4 * x", "2 * x"),
        ("x * ONE + 0", "x"),
        ("x + y if N > 4 else y", "x + y"),
        ("N == 8 and x > 1", "x > 1"),
        ("N != 8 or x > 1 or y", "x > 1 or y"),
        ("N == 8 or x", "True"),
        ("not FLAG and tl.cdiv(N, 3) == 3", "False"),
        ("p is not None", "True"),
        ("y is None", "y is None"),
        ("-N + x", "-8 + x"),
        ("min(N, 3)", "3"),
        ("tl.zeros((N, N), tl.float32)", "tl.zeros((8, 8), tl.float32)"),
        ("x * 1.0", "x * 1.0"),  # no integer: the type of the block might change
    ],
)
def test_folding(text, folded):
    env = {"N": ast.Constant(8), "ONE": ast.Constant(1), "FLAG": ast.Constant(True)}
    assert ast.unparse(fold(ast.parse(text, mode="eval").body, env, frozenset({"p"}))) == folded


def problem(**fields):
    shape = {"tokens": 64, "D": 32, "F": 48, "E": 4, "K": 2, "n": 2, "dtype": "bfloat16", "activation": "silu(g)*u"}
    return Problem(**{**shape, "w_in": (32 * 96, 32, 1), "w_out": (32 * 48, 48, 1), **fields})


def test_the_text_of_an_emitted_kernel():
    text = emit_block(problem(), TARGETS["sm_90"], train=False).files["forward_up.py"]
    assert_expected_inline(
        text[text.index("@triton.jit") : text.index("# The self-check")],
        '''\
@triton.jit
def activate(g, u):
    """The pointwise program."""
    return g * tl.sigmoid(g) * u


@triton.jit
def tile_at(program, tiles):
    """(row tile, column tile) of a program: GROUP row tiles run over all columns before the next GROUP starts.

    Neighbours in time read the same panel of weights, which then comes from L2.
    """
    group = program // 8
    first = group * 8
    height = tl.minimum(tiles - first, 8)
    inside = program % 8
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=["TILES"])
def up_projection(x_TD, w_in, row_R, offset_E, tile_expert, tile_row, h_RF, TILES):
    """``h = program(x[token] @ w_in[expert].T + b_in[expert])`` for the rows of one M-tile and BLOCK_N features."""
    tile, column = tile_at(tl.program_id(0), TILES)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first = tl.load(tile_row + tile)
    m = tl.arange(0, 32)
    computed = m < tl.load(offset_E + expert + 1) - first
    token = tl.load(row_R + first + m, mask=computed, other=0) // 2
    feature = column * 64 + tl.arange(0, 64)
    wanted = feature < 48
    weights = w_in + expert.to(tl.int64) * 3072

    k = tl.arange(0, 32)
    x = x_TD + token.to(tl.int64)[:, None] * 32 + k[None, :]
    w_g = weights + feature[None, :] * 32 + k[:, None]
    g = tl.zeros((32, 64), tl.float32)
    w_u = weights + (48 + feature)[None, :] * 32 + k[:, None]
    u = tl.zeros((32, 64), tl.float32)
    for start in range(0, 32, 32):
        inside = k < 32 - start
        x_tile = tl.load(x)
        w_mask = inside[:, None] & wanted[None, :]
        g = tl.dot(x_tile, tl.load(w_g, mask=w_mask, other=0.0), g, input_precision="ieee")
        u = tl.dot(x_tile, tl.load(w_u, mask=w_mask, other=0.0), u, input_precision="ieee")
        x += 32
        w_g += 32
        w_u += 32
    stored = computed[:, None] & wanted[None, :]
    h = activate(g, u)
    out = h_RF + first.to(tl.int64) * 48
    tl.store(out + (m[:, None] * 48 + feature[None, :]), h.to(h_RF.dtype.element_ty), mask=stored)


def launch(
    T: int, x_TD: Tensor, w_in: Tensor, row_R: Tensor, offset_E: Tensor, tile_expert: Tensor, tile_row: Tensor
) -> tuple[Tensor, ...]:
    """h_RF of T tokens."""
    R = T * 2
    TILES = tile_bound(T)
    h_RF = torch.empty((R, 48), dtype=x_TD.dtype, device=x_TD.device)
    if TILES:
        up_projection[(TILES,)](
            x_TD, w_in, row_R, offset_E, tile_expert, tile_row, h_RF, TILES, num_warps=4, num_stages=4
        )
    return (h_RF,)


''',
    )


def test_the_text_of_the_launcher():
    text = emit_block(problem(), TARGETS["sm_90"], train=False).files["moe.py"]
    assert_expected_inline(
        text[text.index("def forward") : text.index("# The self-check")],
        '''\
def forward(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, ...]:
    """y_TD of T tokens; ``index_TK`` outside 0..3: not computed."""
    if x_TD.shape[1:] != (32,) or (w_in.shape, w_out.shape) != ((4, 96, 32), (4, 32, 48)):
        raise ValueError("x_TD, w_in and w_out must have the shapes (T, 32), (4, 96, 32) and (4, 32, 48)")
    if (w_in.stride(), w_out.stride()) != ((3072, 32, 1), (1536, 48, 1)):
        raise ValueError("w_in and w_out must have the strides (3072, 32, 1) and (1536, 48, 1)")
    if index_TK.shape != (x_TD.shape[0], 2) or weight_TK.shape != index_TK.shape:
        raise ValueError("index_TK and weight_TK must have the shape (T, 2)")
    T, x_TD = x_TD.shape[0], x_TD.contiguous()
    index_R, weight_R = index_TK.reshape(-1), weight_TK.reshape(-1)
    row_R, position_R, offset_E, tile_expert, tile_row = forward_routing.launch(T, index_R)
    (h_RF,) = forward_up.launch(T, x_TD, w_in, row_R, offset_E, tile_expert, tile_row)
    (y_RD,) = forward_down.launch(T, h_RF, w_out, offset_E, tile_expert, tile_row)
    (y_TD,) = forward_combine.launch(T, y_RD, weight_R, position_R)
    return (y_TD,)


def moe(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """y_TD."""
    return forward(x_TD, index_TK, weight_TK, w_in, w_out)[0]


''',
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("train", [False, True])
def test_every_file_is_python_of_short_lines_without_constexprs(target, train):
    files = emit_block(problem(activation="gpt_oss", bias_in=True, save=train), TARGETS[target], train=train).files
    for name, text in files.items():
        compile(text, name, "exec")
        assert max(map(len, text.splitlines())) <= 120, name
        assert "constexpr" not in text, name
        assert "BLOCK_M" not in text.split("@triton.jit", 1)[-1].split("# The self-check")[0].replace(
            "BLOCK_N f", ""
        ), name


HOSTILE = '"""\nimport os; os.system("false")\n\\N{BELL}é\x00'


def test_hostile_names_stay_text():
    facts = Facts((("site", HOSTILE),))
    for text in emit_block(problem(), TARGETS["sm_90"], train=False, facts=facts).files.values():
        statements = ast.parse(text).body
        assert isinstance(statements[0], ast.Expr)
        assert "os.system" in ast.get_docstring(ast.parse(text))
        assert "os.system" not in "".join(map(ast.unparse, statements[1:]))


def test_hostile_activations_are_refused():
    with pytest.raises(errors.BadActivation):
        emit_block(problem(activation='g); __import__("os").system("false"); (u'), TARGETS["sm_90"], train=False)


def test_the_plain_text_of_every_operation_is_that_operation():
    import torch

    assert set(TEXTS) == set(OPS)
    g = torch.linspace(-4.0, 4.0, 9, dtype=torch.float64)
    u = g.flip(0) + 0.25
    constants = {0: "", 1: ", 0.5", 2: ", -1.0, 0.5"}
    programs = [f"{n}(g{', u' if op.tensors == 2 else ''}{constants[op.constants]})" for n, op in OPS.items()]
    for text in [
        *programs,
        "gpt_oss",
        "g - u/3.0",
        "(g + u)**(-2)",
        "maximum(g, 0.0)",
        "sigmoid(2.0)*u",
        "relu2",
        "1.5",
    ]:
        got = eval(torch_text(text), {"torch": torch, "g": g, "u": u})
        want = pointwise.evaluate(pointwise.parse(text), {"g": g, "u": u})
        torch.testing.assert_close(torch.as_tensor(got) + 0.0 * g, want + 0.0 * g, equal_nan=True, msg=text)
