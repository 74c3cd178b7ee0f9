"""An ONNX file is taken only if it needs no code and no file from elsewhere; told without an ONNX library."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from edgemed.bundle import find_bundle, open_bundle
from edgemed.errors import BundleError
from edgemed.graph_check import MAX_FIELDS, external_files


def check(tmp_path: Path, data: bytes) -> frozenset[str]:
    path = tmp_path / "graph.onnx"
    path.write_bytes(data)
    return external_files(path)


def test_graphs_of_the_embedded_bundle_pass() -> None:
    graphs = sorted((find_bundle("nano") / "graphs").glob("*.onnx"))
    assert len(graphs) == 4
    assert {file for graph in graphs for file in external_files(graph)} == set()


def test_what_onnx_writes_is_read_as_onnx_means_it(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the writer to compare with")
    helper, f32 = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.TensorProto(name="w", dims=[1], data_type=f32, data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="offset", value="0")
    weight.external_data.add(key="location", value="inner.data")
    out = helper.make_tensor_value_info("y", f32, [1])
    inner = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "inner", [], [out], [weight])
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
        helper.make_node("MatMulNBits", ["y", "b"], ["z"], domain="com.microsoft", K=1, N=1),
    ]
    graph = helper.make_graph(nodes, "outer", [helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])], [out])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    )
    assert check(tmp_path, model.SerializeToString()) == {"inner.data"}
    model.graph.node[0].attribute[1].g.node[0].domain = "evil"
    with pytest.raises(BundleError, match="'evil'"):
        check(tmp_path, model.SerializeToString())


def test_location_is_found_in_every_order_of_an_entry(hospital: Any, tmp_path: Path) -> None:
    field = hospital.field
    parts = (field(1, b"length"), field(1, b"location"), field(2, b"a"), field(2, b"b"))
    for order in itertools.permutations(parts):
        tensors = field(5, hospital.entry(b"offset", b"7") + field(13, b"".join(order)) + hospital.entry(b"x", b"9"))
        assert check(tmp_path, hospital.model(tensors)) == {"a", "b"}


def test_place_of_a_tensor_does_not_hide_its_weights(hospital: Any, tmp_path: Path) -> None:
    field, where = hospital.field, hospital.entry(b"location", b"w")
    attribute = {"t": field(5, where), "tensors": field(10, where), "sparse": field(22, field(1, where))}
    for content in attribute.values():
        assert check(tmp_path, hospital.model(field(1, field(5, content)))) == {"w"}
    assert check(tmp_path, hospital.model(field(15, field(2, where)))) == {"w"}
    function = field(25, field(7, field(5, field(5, where))))
    assert check(tmp_path, hospital.model(more=function)) == {"w"}
    graph = field(1, field(5, field(11, field(5, where))))
    assert check(tmp_path, hospital.model(graph)) == {"w"}


def test_endless_and_deep_files_are_refused_in_time(hospital: Any, tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(BundleError, match=f"more than {MAX_FIELDS} fields"):
        check(tmp_path, hospital.model(b"\x08\x00" * (MAX_FIELDS + 1)))
    assert time.process_time() - start < 10  # 1 s on an idle machine; a loop without end is what this is for
    deep = b""
    for _ in range(40):
        deep = hospital.field(1, hospital.field(5, hospital.field(6, deep)))
    with pytest.raises(BundleError, match="levels deep"):
        check(tmp_path, hospital.model(deep))


def test_every_cut_and_every_flipped_bit_ends_in_an_answer_or_a_refusal(hospital: Any, tmp_path: Path) -> None:
    field = hospital.field
    whole = hospital.model(
        field(1, field(4, b"Add") + field(7, b"ai.onnx")) + field(5, hospital.entry(b"location", b"w"))
    )
    damaged = [whole[:n] for n in range(len(whole))]
    damaged += [
        whole[:n] + bytes([whole[n] ^ 1 << bit]) + whole[n + 1 :] for n in range(len(whole)) for bit in range(8)
    ]
    refused = 0
    for data in damaged:
        try:
            check(tmp_path, data)
        except BundleError:
            refused += 1
    assert refused > len(damaged) / 4


@pytest.mark.parametrize(
    "place", ["../w", "/etc/hostname", "w/../../x", "..\\w", "graphs/decoder.onnx.data", "*/_ORT_MEM_ADDR_/*", ""]
)
def test_weights_outside_the_manifest_are_refused(hospital: Any, tmp_path: Path, place: str) -> None:
    graph = hospital.model(hospital.field(5, hospital.entry(b"location", place.encode())))
    with pytest.raises(BundleError, match="takes weights from"):
        hospital.make(tmp_path / "b", files={"graphs/decoder.onnx": graph, "w": b"", "graphs/w": b""})


def test_checking_the_graphs_of_the_embedded_bundle_is_a_small_part_of_opening_it() -> None:
    bundle = open_bundle("nano")
    graphs = [bundle.graph_path(role) for role in bundle.manifest.graphs]
    spent = []
    for _ in range(3):
        start = time.process_time()
        for graph in graphs:
            external_files(graph)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.05
