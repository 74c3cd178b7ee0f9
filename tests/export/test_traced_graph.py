"""Graphs that torch traces without weights: they compute what the module computes, in every format of the matrices."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from edgemed.backends import open_runner
from edgemed.checkpoints import open_checkpoint
from edgemed.export.graph_writer import GraphWriter, MatrixFormat, WeightFile
from edgemed.export.traced_graph import build_traced_graph, traced
from edgemed.families.opened_torch import describe
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

# The full references have the same sizes; other digits of their weights change nothing here.
compact = pytest.mark.parametrize("reference", ["compact"], indirect=True)

PARTS: dict[tuple[str, str], list[dict[str, int]]] = {
    ("medrega-tiny", "vision_encoder"): [{"tiles": 1}, {"tiles": 3}],
    ("medrega-tiny", "projector"): [{"tiles": 1}, {"tiles": 2}, {"tiles": 5}],
    ("medplib-tiny", "vision_encoder"): [{}],
    ("medplib-tiny", "projector"): [{"regions": 1}, {"regions": 4}, {"regions": 16}],
    ("medplib-tiny", "mask_decoder"): [
        {"prompts": 1, "points": 1}, {"prompts": 3, "points": 2}, {"prompts": 16, "points": 5},
    ],
}  # fmt: skip
"""Family and role -> sizes of the dynamic dims that are tried."""


def feeds_of(spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Random inputs; what says whether a prompt is there is 0 or 1, labels of points are -1, 0 or 1."""
    rng = np.random.default_rng(sum(sizes.values()))
    feeds: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape)
        if tensor.dtype == "int64":
            feeds[tensor.name] = rng.integers(-1, 2, shape)
        elif tensor.name.startswith("has_"):
            feeds[tensor.name] = rng.integers(0, 2, shape).astype(np.float32)
        else:
            feeds[tensor.name] = rng.normal(0, 1, shape).astype(np.float32)
    return feeds


def by_torch(module: nn.Module, spec: GraphSpec, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        out = module(*(torch.from_numpy(feeds[t.name]) for t in spec.inputs))
    values = out if isinstance(out, tuple) else (out,)
    return {t.name: value.numpy() for t, value in zip(spec.outputs, values, strict=True)}


def by_graph(path: Path, spec: GraphSpec, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    runner = open_runner("onnxruntime", path, spec, device="cpu", threads=1)
    try:
        return runner.run(feeds)
    finally:
        runner.close()


def save(
    folder: Path, module: nn.Module, tensors: Mapping[str, Any], spec: GraphSpec, form: MatrixFormat | None = None
) -> Path:
    weights = WeightFile(folder / "g.onnx.data")
    graph = build_traced_graph(module, tensors, spec, GraphWriter(form, weights))
    weights.finish()
    onnx.save(graph, folder / "g.onnx")
    return folder / "g.onnx"


@compact
@pytest.mark.parametrize(("family", "role"), PARTS)
def test_every_output_equals_torch_at_every_size(reference: Any, tmp_path: Path, family: str, role: str) -> None:
    published = describe(open_checkpoint(reference(family).folder))
    spec = published.specs[role]
    path = save(tmp_path, published.modules[role], published.tensors[role], spec)
    module = describe(open_checkpoint(reference(family).folder)).load(role)
    for sizes in PARTS[family, role]:
        feeds = feeds_of(spec, sizes)
        ours, expected = by_graph(path, spec, feeds), by_torch(module, spec, feeds)
        assert list(ours) == list(expected)
        for name in expected:
            assert ours[name].shape == expected[name].shape
            # Masks reach magnitudes of 100 here.
            np.testing.assert_allclose(ours[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=f"{name} {sizes}")


@compact
@pytest.mark.parametrize(("family", "role"), [("medrega-tiny", "vision_encoder"), ("medrega-tiny", "projector")])
def test_int8_matrices_are_stored_in_8_bits_and_keep_the_direction(
    reference: Any, tmp_path: Path, family: str, role: str
) -> None:
    published = describe(open_checkpoint(reference(family).folder))
    spec, tensors = published.specs[role], published.tensors[role]
    path = save(tmp_path, published.modules[role], tensors, spec, MatrixFormat("int8"))
    module = describe(open_checkpoint(reference(family).folder)).load(role)
    linear = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    stored = {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
    assert linear
    for name in linear:
        assert name not in stored
        assert stored[f"{name}.int8"].data_type == TensorProto.UINT8
        rows, columns = tensors[name].shape
        assert list(stored[f"{name}.int8"].dims) == [rows, -(-columns // 32), 32]
    feeds = feeds_of(spec, PARTS[family, role][1])
    ours, expected = by_graph(path, spec, feeds), by_torch(module, spec, feeds)
    for name in expected:
        assert cosine(ours[name], expected[name]) > 0.999


def cosine(ours: np.ndarray, expected: np.ndarray) -> float:
    return float((ours * expected).sum() / np.linalg.norm(ours) / np.linalg.norm(expected))


# --- what torch makes of weights in all places ------------------------------------------------------------------------

WIDTH = 96
ODD_SPEC = GraphSpec(
    "projector",
    (TensorSpec("x", "float32", ("batch", WIDTH, WIDTH)),),
    (TensorSpec("y", "float32", ("batch", WIDTH, WIDTH)), TensorSpec("z", "float32", ("batch", WIDTH))),
    {"batch": DimRange(1, 1, 8)},
)
PACKED = {"first.weight", "second.weight", "rows.weight"}


class Odd(nn.Module):
    """Layers of equal shape, a weight on the left of a product, one that is added, a layer over rows, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.left = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.places = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.rows = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        turned = self.left.T @ self.second(self.first(x)) + self.places
        return turned, self.rows(turned[:, 0]) + self.shift


@pytest.fixture(scope="module")
def odd() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    return {name: value.numpy() for name, value in Odd().state_dict().items()}


def hollow() -> Odd:
    with torch.device("meta"):
        return Odd()


def expected_of(odd: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    module = Odd()
    module.load_state_dict({name: torch.from_numpy(value) for name, value in odd.items()})
    return by_torch(module, ODD_SPEC, feeds)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_weights_in_all_places_are_stored_once_and_right(
    tmp_path: Path, odd: dict[str, np.ndarray], precision: Any
) -> None:
    path = save(tmp_path, hollow(), odd, ODD_SPEC, MatrixFormat(precision, accuracy_level=0))
    stored = [t.name for t in onnx.load(path, load_external_data=False).graph.initializer]
    suffixes = ("",) if precision == "fp32" else (f".{precision}", ".scales")
    wanted = {name + suffix for name in PACKED for suffix in suffixes} | (set(odd) - PACKED)
    assert wanted <= set(stored)
    assert len(stored) == len(set(stored))
    assert not {name for name in odd if precision != "fp32" and name in PACKED and name in stored}
    feeds = feeds_of(ODD_SPEC, {"batch": 3})
    ours, expected = by_graph(path, ODD_SPEC, feeds), expected_of(odd, feeds)
    for name in expected:
        if precision == "fp32":
            np.testing.assert_allclose(ours[name], expected[name], atol=1e-4)
        assert cosine(ours[name], expected[name]) > {"fp32": 0.999999, "int8": 0.9999, "int4": 0.98}[precision]


class Watched(Mapping[str, np.ndarray]):
    """Weights that count how often each is read and how many arrays are alive at a time."""

    def __init__(self, values: Mapping[str, np.ndarray]) -> None:
        self._values = values
        self._alive: list[weakref.ref[np.ndarray]] = []
        self.read: list[str] = []
        self.most = 0

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._values[name].copy()
        self.read.append(name)
        self._alive = [ref for ref in self._alive if ref() is not None] + [weakref.ref(array)]
        self.most = max(self.most, len(self._alive))
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_each_weight_is_read_once_and_one_is_held_at_a_time(
    tmp_path: Path, odd: dict[str, np.ndarray], precision: Any
) -> None:
    watched = Watched(odd)
    save(tmp_path, hollow(), watched, ODD_SPEC, MatrixFormat(precision))
    assert sorted(watched.read) == sorted(odd)
    assert watched.most == 1


def test_a_weight_that_is_in_the_file_already_is_not_read(tmp_path: Path, odd: dict[str, np.ndarray]) -> None:
    watched = Watched(odd)
    for _ in range(2):
        weights = WeightFile(tmp_path / "g.data")
        build_traced_graph(hollow(), watched, ODD_SPEC, GraphWriter(MatrixFormat("int8"), weights))
        weights.close()
    large = {name for name in odd if odd[name].ndim == 2}
    assert {name for name in large if watched.read.count(name) == 1} == large


def test_a_large_module_is_traced_without_memory_for_its_weights() -> None:
    side = 1 << 17  # 64 GiB in float32
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(side, side), nn.LayerNorm(side))
    spec = GraphSpec(
        "projector", (TensorSpec("x", "float32", (1, 2, side)),), (TensorSpec("y", "float32", (1, 2, side)),)
    )
    proto = traced(module, spec)
    assert proto.ByteSize() < 100_000
    assert {"0.weight", "0.bias", "1.weight"} <= {i.name for i in proto.graph.input}
