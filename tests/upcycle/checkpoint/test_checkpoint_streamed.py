"""Tensors that are changed element by element: no more than a piece of them is in memory."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from moepass import errors
from moepass.upcycle import one_expert
from moepass.upcycle.checkpoint import writer
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import PIECE, OutTensor, Streamed

ROWS, COLUMNS = 7, PIECE // 3 + 5
HALF = torch.finfo(torch.float16)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "src").mkdir()
    tensors = {
        "w": torch.randn(ROWS, COLUMNS).bfloat16(),
        "other": torch.full((3,), 2.0),
        "empty": torch.empty(0, 4),
        "one": torch.tensor(3.0),
    }
    save_file(tensors, tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "config.json").write_text("{}")
    return Source.open(tmp_path / "src")


def doubled(read):
    """Twice the element, plus the sum of ``other`` (6), in float32."""
    added = float(sum(piece.sum() for piece in read("other", None)))
    return lambda piece: piece.float() * 2 + added


def write(source, tmp_path, t):
    writer.write(tmp_path / "dst", [t], source, {"config.json": b"{}"})
    return load_file(tmp_path / "dst" / "model.safetensors")[t.name]


@pytest.mark.parametrize("rows", [None, (0, 2), (3, 7), (6, 7)])
def test_each_element_is_changed_where_it_stands(source, tmp_path, rows):
    expected = source.read("w")[slice(*rows) if rows else slice(None)].float() * 2 + 6
    t = OutTensor("t", tuple(expected.shape), "F32", Streamed(("w", "other"), rows, doubled, "doubled"))
    assert torch.equal(write(source, tmp_path, t), expected)


@pytest.mark.parametrize("name", ["empty", "one"])
def test_no_elements_and_no_dimensions(source, tmp_path, name):
    expected = source.read(name) * 2 + 6
    t = OutTensor("t", tuple(expected.shape), "F32", Streamed((name, "other"), None, doubled, "doubled"))
    assert torch.equal(write(source, tmp_path, t), expected)


def test_a_piece_is_all_that_is_read_at_a_time(source):
    sizes = [piece.numel() for piece in source.pieces("w", (1, 6))]
    assert sizes == [PIECE] * (5 * COLUMNS // PIECE) + [5 * COLUMNS % PIECE]
    assert torch.equal(torch.cat(list(source.pieces("w", (1, 6)))), source.read("w", 1, 6).flatten())


def test_noise_and_moments_may_be_cut_where_a_stream_is_cut():
    assert PIECE % one_expert.STREAMED == 0


@pytest.mark.parametrize("rows", [(0, 6), (2, 9)])
def test_rows_that_do_not_make_the_tensor_are_refused_before_anything_is_written(source, tmp_path, rows):
    t = OutTensor("t", (ROWS, COLUMNS), "F32", Streamed(("w", "other"), rows, doubled, "doubled"))
    with pytest.raises(errors.BadOutTensor, match=f"rows {rows[0]}:{rows[1]} of w"):
        write(source, tmp_path, t)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x: x, "bfloat16"),
        (lambda x: x[:-1].half(), "planned as"),
        (lambda x: (x.half() + HALF.max) * 2, "overflows torch.float16"),
    ],
)
def test_a_result_that_breaks_its_promise_is_refused_and_leaves_nothing(source, tmp_path, step, message):
    t = OutTensor("t", (ROWS, COLUMNS), "F16", Streamed(("w",), None, lambda read: step, "step"))
    with pytest.raises(errors.BadOutTensor, match=message):
        write(source, tmp_path, t)
    assert not (tmp_path / "dst").exists()


def test_a_source_that_ends_early_is_named(source, tmp_path):
    def cut(read):
        with source.headers["w"].file.open("r+b") as file:
            file.truncate(source.headers["w"].begin + 100)
        return lambda piece: piece.float()

    t = OutTensor("t", (ROWS, COLUMNS), "F32", Streamed(("w",), None, cut, "cut"))
    with pytest.raises(errors.BadCheckpoint, match="it ended while 'w' was read"):
        write(source, tmp_path, t)
