"""One graph's nodes and weights: how they are stored, that they run, and going on with a file left unfinished."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from edgemed.backends import open_runner
from edgemed.blocks import pack_rows, unpack_rows
from edgemed.errors import CannotWrite, InvalidInput
from edgemed.export import graph_writer
from edgemed.export.graph_writer import GraphWriter, MatrixFormat, WeightFile, quantized, room, rounded, smallest
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

RNG = np.random.default_rng(0)
ROWS, COLUMNS = 48, 70
SPEC = GraphSpec(
    "decoder",
    (TensorSpec("x", "float32", ("rows", COLUMNS)),),
    (TensorSpec("y", "float32", ("rows", ROWS)),),
    {"rows": DimRange(1, 1, 64)},
)
X = RNG.normal(0, 1, (5, COLUMNS)).astype(np.float32)
FINE = RNG.normal(0, 1, (ROWS, COLUMNS)).astype(np.float32)
ROUND = FINE.astype(ml_dtypes.bfloat16).astype(np.float32)
NAMES = [f"w{i}" for i in range(6)]


def product_graph(folder: Path, matrix: np.ndarray, form: MatrixFormat | None = None) -> Path:
    """y = x @ matrix.T + bias, its weights in a file beside it."""
    weights = WeightFile(folder / "g.onnx.data")
    writer = GraphWriter(form, weights)
    product = writer.matmul("x", "w", *matrix.shape, lambda: matrix, "product")
    bias = writer.weight("bias", ROWS, lambda: np.arange(ROWS, dtype=np.float32))
    writer.node("Add", [product, bias], "y")
    weights.finish()
    onnx.save(writer.model(SPEC), folder / "g.onnx")
    return folder / "g.onnx"


def run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def stored(path: Path) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}


@pytest.mark.parametrize(("matrix", "kind", "size"), [(ROUND, TensorProto.BFLOAT16, 2), (FINE, TensorProto.FLOAT, 4)])
def test_a_weight_has_the_smallest_type_that_holds_it_exactly_and_computes_the_same(
    tmp_path: Path, matrix: np.ndarray, kind: int, size: int
) -> None:
    path = product_graph(tmp_path, matrix)
    tensor = stored(path)["w"]
    assert tensor.data_type == kind
    assert (tmp_path / "g.onnx.data").stat().st_size == ROWS * COLUMNS * size
    assert {e.key: e.value for e in tensor.external_data} == {
        "location": "g.onnx.data", "offset": "0", "length": str(ROWS * COLUMNS * size)
    }  # fmt: skip
    np.testing.assert_allclose(run(path), X @ matrix.T + np.arange(ROWS), atol=1e-4)


def test_small_weights_lie_in_the_graph(tmp_path: Path) -> None:
    assert not stored(product_graph(tmp_path, FINE))["bias"].external_data


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("block", [32, 64])
def test_matrices_in_blocks_compute_what_their_blocks_say(
    tmp_path: Path, precision: str, bits: int, block: int
) -> None:
    path = product_graph(tmp_path, FINE, MatrixFormat(precision, block, accuracy_level=0))  # type: ignore[arg-type]
    assert set(stored(path)) == {f"w.{precision}", "w.scales", "bias"}
    restored = unpack_rows(*pack_rows(FINE, block, bits), bits)[:, :COLUMNS]
    np.testing.assert_allclose(run(path), X @ restored.T + np.arange(ROWS), atol=1e-4)


def test_the_room_of_a_tensor_is_where_the_next_one_starts(tmp_path: Path) -> None:
    weights = WeightFile(tmp_path / "g.data")
    weights.add("a", np.zeros(1025, np.float32))
    weights.add("b", np.zeros(3, np.float32))
    offset = next(e.value for e in weights.proto("b").external_data if e.key == "offset")
    weights.close()
    assert int(offset) == room(1025, 4) == 8192
    assert room(3, 4) == 12  # in the graph


def test_without_a_weight_file_weights_are_float32_in_the_graph() -> None:
    writer = GraphWriter()
    half = ROUND.astype(ml_dtypes.bfloat16)
    name = writer.matmul("x", "w", ROWS, COLUMNS, lambda: half, "y")
    model = writer.model(SPEC)
    assert name == "y"
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": X})[0], X @ ROUND.T, atol=1e-4)


def test_a_weight_named_twice_is_stored_read_and_counted_once(tmp_path: Path) -> None:
    reads: list[int] = []
    counted: list[int] = []

    def read() -> np.ndarray:
        reads.append(1)
        return ROUND

    weights = WeightFile(tmp_path / "g.data")
    writer = GraphWriter(weights=weights, progress=counted.append)
    assert writer.weight("w", ROUND.size, read) == writer.weight("w", ROUND.size, read) == "w.float"
    weights.finish()
    assert (len(reads), counted, len(writer.nodes)) == (1, [ROUND.size], 1)


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (ROUND, "bfloat16"),
        (FINE, "float32"),
        (ROUND.astype(ml_dtypes.bfloat16), "bfloat16"),
        (FINE.astype(np.float16), "float16"),
        (FINE.astype(np.float16).astype(np.float32), "float32"),
        (np.float32([3e38, 1]), "float32"),
    ],
)
def test_the_smallest_type_changes_no_value(array: np.ndarray, dtype: str) -> None:
    small = smallest(array)
    assert small.dtype.name == dtype
    assert np.array_equal(small.astype(np.float32), array.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_refused(dtype: type, bad: float) -> None:
    with pytest.raises(InvalidInput, match="not a finite number"):
        smallest(np.array([1, bad], dtype))


# --- weight files that were left unfinished ---------------------------------------------------------------------------


class Reader:
    """Gives the arrays of NAMES and keeps the names of those that were asked for; stops at `last`."""

    def __init__(self, last: str = "") -> None:
        self.last = last
        self.read: list[str] = []

    def __call__(self, name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if name == self.last:
                raise KeyboardInterrupt
            self.read.append(name)
            i = NAMES.index(name)
            dtype = (np.float32, ml_dtypes.bfloat16, np.uint8)[i % 3]
            return np.random.default_rng(i).integers(0, 100, (37, 40 + i)).astype(dtype)

        return read


def write_all(path: Path, reader: Reader) -> dict[str, onnx.TensorProto]:
    """Write NAMES to a file and finish it; when the reader stops, leave it as it is then."""
    weights = WeightFile(path)
    writer = GraphWriter(weights=weights)
    try:
        for i, name in enumerate(NAMES):
            writer.stored(name, 37 * (40 + i), reader(name))
    finally:
        weights.close()
    weights.finish()
    return writer.initializers


def left_unfinished(path: Path) -> Path:
    """Write w0, w1, w2, w3 to a file and stop. Return its journal."""
    with pytest.raises(KeyboardInterrupt):
        write_all(path, Reader("w4"))
    return path.with_name(f"{path.name}.journal")


def cut_data(path: Path, journal: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def half_a_tensor_more(path: Path, journal: Path) -> None:
    with path.open("ab") as file:
        file.write(b"half a tensor")


def tear_line(path: Path, journal: Path) -> None:
    journal.write_bytes(journal.read_bytes()[:-9])


def lose_newline(path: Path, journal: Path) -> None:
    journal.write_bytes(journal.read_bytes()[:-1])


def write_zeros(path: Path, journal: Path) -> None:  # what some file systems leave after a power cut
    journal.write_bytes(journal.read_bytes()[:-9] + bytes(9))


def lose_data(path: Path, journal: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "first"),
    [
        (half_a_tensor_more, 4),
        (cut_data, 3),
        (tear_line, 3),
        (lose_newline, 3),
        (write_zeros, 3),
        (lose_data, 0),
    ],
)
def test_an_unfinished_file_is_gone_on_with_and_ends_as_if_never_interrupted(
    tmp_path: Path, damage: Callable[[Path, Path], None], first: int
) -> None:
    whole = write_all(tmp_path / "whole", Reader())
    path = tmp_path / "part"
    damage(path, left_unfinished(path))
    again = Reader("w5")
    with pytest.raises(KeyboardInterrupt):
        write_all(path, again)
    assert again.read == NAMES[first:5]
    last = Reader()
    resumed = write_all(path, last)
    assert last.read == ["w5"]
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    for name in NAMES:
        ours, expected = ([(e.key, e.value) for e in t[name].external_data if e.key != "location"]
                          for t in (resumed, whole))  # fmt: skip
        assert ours == expected
        assert (resumed[name].data_type, resumed[name].dims) == (whole[name].data_type, whole[name].dims)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part", "whole"]


def test_a_matrix_in_blocks_that_is_there_is_not_read_again(tmp_path: Path) -> None:
    def no_more() -> np.ndarray:
        raise AssertionError("read again")

    large = RNG.normal(0, 1, (300, 64)).astype(np.float32)
    for read in (lambda: large, no_more):
        weights = WeightFile(tmp_path / "g.data")
        GraphWriter(MatrixFormat("int4"), weights).matmul("x", "w", 300, 64, read, "y")
        weights.close()


def test_a_file_without_tensors_goes(tmp_path: Path) -> None:
    WeightFile(tmp_path / "sub" / "g.data").finish()
    assert list((tmp_path / "sub").iterdir()) == []


# --- disks that refuse ------------------------------------------------------------------------------------------------


def test_a_disk_that_takes_no_more_is_named_with_the_file(tmp_path: Path) -> None:
    """The process's own limit on file sizes stands for a full disk: the system takes a part and refuses the rest."""
    resource = pytest.importorskip("resource", reason="only Unix limits the size of files")
    weights = WeightFile(tmp_path / "g.data")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        weights.add("a", np.zeros(1000, np.float32))
        with pytest.raises(CannotWrite, match=r"cannot write .*g\.data: File too large; free space there") as caught:
            weights.add("b", np.zeros(3000, np.float32))
        weights.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [json.loads(line)[0] for line in (tmp_path / "g.data.journal").read_text().splitlines()] == ["a"]
    again = WeightFile(tmp_path / "g.data")
    assert (again.has("a"), again.has("b")) == (True, False)
    again.close()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(CannotWrite, match=r"taken/g\.data"):
        WeightFile(tmp_path / "taken" / "g.data")


# --- standard operators -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "block", "steps"), [("int8", 96, 254), ("int4", 32, 15)])
def test_integers_are_as_near_as_half_a_step(precision: Any, block: int, steps: int) -> None:
    matrix = np.random.default_rng(0).normal(0, 0.02, (70, 96)).astype(np.float32)
    values, scales = quantized(matrix, block, precision)
    assert (values.shape, scales.dtype) == ((96, 70), np.float16)
    wide = np.repeat(scales.reshape(-1, 70).astype(np.float32), block, axis=0)
    error = np.abs(values.astype(np.float32) * wide - matrix.T)
    assert (error <= wide * 0.501).all()
    largest = np.abs(matrix.reshape(70, -1, block)).max(axis=2)
    assert (largest / (steps // 2) * 1.001 >= scales.reshape(-1, 70).T).all()


def test_rows_of_zeros_and_of_tiny_weights_stay_finite() -> None:
    matrix = np.zeros((3, 32), np.float32)
    matrix[1] = 1e-9
    values, scales = quantized(matrix, 32, "int8")
    assert (values == 0).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_a_weight_that_has_no_scale_is_refused(value: float) -> None:
    matrix = np.ones((3, 32), np.float32)
    matrix[1, 1] = value
    with pytest.raises(InvalidInput, match="not a finite number"):
        quantized(matrix, 32, "int8")


def test_inputs_that_hold_no_block_are_refused_and_others_get_a_smaller_one() -> None:
    assert MatrixFormat("int4", 64).block_of(96) == 32
    with pytest.raises(InvalidInput, match="inputs are a multiple of 16; one has 40"):
        MatrixFormat("int4", 64).block_of(40)


@pytest.mark.parametrize("kept", ["the graph", "a file"])
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_product_in_standard_operators_is_near(tmp_path: Path, precision: Any, kept: str) -> None:
    matrix, x = (np.random.default_rng(i).normal(0, 1, (33, 64)).astype(np.float32) for i in (0, 1))
    weights = WeightFile(tmp_path / "g.onnx.data") if kept == "a file" else None
    form = MatrixFormat(precision, 32, standard=True)
    writer = GraphWriter(form, weights)
    writer.matmul("x", "w", 33, 64, lambda: matrix, "y")
    if weights:
        weights.finish()
        values = 33 * 64 * {"fp16": 2, "int8": 1, "int4": 0.5}[precision]
        assert writer.initializers[f"w.{precision}" if form.packed else "w"].external_data[2].value == f"{values:.0f}"
    spec = GraphSpec(
        "projector", (TensorSpec("x", "float32", (33, 64)),), (TensorSpec("y", "float32", (33, 33)),)
    )  # fmt: skip
    model = writer.model(spec)
    assert [o.domain for o in model.opset_import] == [""]
    onnx.save(model, tmp_path / "g.onnx")
    onnx.checker.check_model(str(tmp_path / "g.onnx"), full_check=True)
    out = open_runner("onnxruntime", tmp_path / "g.onnx", spec, device="cpu", threads=1).run({"x": x})["y"]
    expected = x @ matrix.T
    assert (
        np.linalg.norm(out - expected) / np.linalg.norm(expected)
        < {"fp16": 1e-3, "int8": 2e-2, "int4": 0.15}[precision]
    )


@pytest.mark.parametrize("shape", [(), (5,), (40, 30), (3, 4, 5)])
def test_rounding_keeps_shape_and_values(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_writer, "_CHUNK", 100)
    array = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    for given in (array, array.T):
        np.testing.assert_array_equal(rounded(given, "fp16", "w"), given.astype(np.float16))
    with pytest.raises(InvalidInput, match="tensor w has a value that fp16 does not hold; choose bf16"):
        rounded(array * 1e8, "fp16", "w")
