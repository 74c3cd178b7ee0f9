"""Graphs with their products in float16: same names, same answers but for rounding, everything else as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgemed.backends import open_runner
from edgemed.bundle import open_bundle
from edgemed.export.mixed_precision import PRODUCTS, in_mixed_precision


@pytest.mark.parametrize("role", ["vision_encoder", "mask_decoder"])
def test_a_native_graph_answers_the_same_but_for_rounding(tmp_path: Path, role: str) -> None:
    bundle = open_bundle("nano")
    spec, rng = bundle.spec(role), np.random.default_rng(0)
    sizes = {t.name: [d if isinstance(d, int) else spec.dims[d].opt for d in t.shape] for t in spec.inputs}
    feeds = {t.name: rng.random(sizes[t.name]).astype(t.dtype) for t in spec.inputs}
    onnx.save(in_mixed_precision(onnx.load(bundle.graph_path(role))), tmp_path / "half.onnx")
    ours, whole = (
        open_runner("onnxruntime", path, spec, device="cpu", threads=1).run(feeds)
        for path in (tmp_path / "half.onnx", bundle.graph_path(role))
    )
    for name, values in whole.items():
        assert ours[name].dtype == values.dtype
        np.testing.assert_allclose(ours[name], values, atol=1e-2 * np.abs(values).max())  # measured: below 3e-3


def test_only_products_change_and_the_graph_stays_valid() -> None:
    model = onnx.load(open_bundle("nano").graph_path("projector"))
    half = in_mixed_precision(model)
    onnx.checker.check_model(half, full_check=True)
    assert (half.graph.input, half.graph.output) == (model.graph.input, model.graph.output)
    assert half.graph.initializer == model.graph.initializer
    kept = [[n for n in m.graph.node if n.op_type not in {*PRODUCTS, "Cast"}] for m in (model, half)]
    assert kept[0] == kept[1]
    products = [n for n in half.graph.node if n.op_type in PRODUCTS]
    assert all(x.endswith(".fp16") for n in products for x in n.input)


def test_a_graph_that_is_in_float16_already_stays_as_it_is() -> None:
    half = in_mixed_precision(onnx.load(open_bundle("nano").graph_path("projector")))
    assert in_mixed_precision(half) == half
