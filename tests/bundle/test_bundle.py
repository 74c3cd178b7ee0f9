"""A bundle opens only if every byte of it fits its manifest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgemed import bundle as bundles
from edgemed.bundle import Bundle, open_bundle, write_bundle
from edgemed.errors import BundleError, CannotWrite
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

GRAPH = b"\x08\x0a\x12\x04test"
"""The smallest ONNX file that says anything: IR version 10, made by "test"."""

SPEC = GraphSpec(
    "decoder",
    (TensorSpec("x", "float32", (1, "sequence")),),
    (TensorSpec("y", "float32", (1, "sequence")),),
    {"sequence": DimRange(1, 8, 16)},
)


def make(folder: Path, **changes: object) -> Bundle:
    parts: dict[str, object] = {
        "name": "tiny",
        "family": "native",
        "graphs": {"decoder": SPEC},
        "files": {
            "graphs/decoder.onnx": GRAPH,
            "tokenizer/tokenizer.json": '{"肝": 1}'.encode(),
            "NOTICE": b"terms",
        },
        "precision": {"decoder": "int8"},
        "versions": {"edgemed": "0.1.0"},
        "licences": {"weights": "Apache-2.0"},
        "settings": {"side": 256},
    }
    return write_bundle(folder, **{**parts, **changes})  # type: ignore[arg-type]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "bundles"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def test_written_bundle_opens_with_the_same_manifest(tmp_path: Path) -> None:
    written = make(tmp_path / "b")
    opened = open_bundle(tmp_path / "b")
    assert opened == written
    assert opened.spec("decoder") == SPEC
    assert opened.graph_path("decoder").read_bytes() == GRAPH
    assert opened.file("NOTICE") == tmp_path / "b" / "NOTICE"
    assert opened.has("decoder")
    assert not opened.has("projector")
    assert os.listdir(tmp_path) == ["b"]


def test_manifest_bytes_are_canonical_and_do_not_depend_on_order(tmp_path: Path) -> None:
    one = make(tmp_path / "a")
    other = make(tmp_path / "b", files={k: one.file(k) for k in reversed(one.manifest.files)})
    assert one.digest == other.digest
    data = (one.path / "bundle.json").read_bytes()
    assert bundles.to_bytes(bundles.from_bytes(data)) == data
    assert data.endswith(b"}\n")
    assert b": " not in data


def test_changed_file_is_refused_with_both_digests(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    made.graph_path("decoder").write_bytes(GRAPH[:-1] + b"T")
    with pytest.raises(
        BundleError, match=r"graphs/decoder.onnx has sha256 [0-9a-f]{8}\.\.\., the manifest says [0-9a-f]{8}"
    ):
        open_bundle(made.path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    made.file("NOTICE").unlink()
    with pytest.raises(BundleError, match="NOTICE of bundle tiny is missing"):
        open_bundle(made.path)


def test_unknown_file_is_refused_and_a_signature_is_not(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    (made.path / "bundle.sig").write_bytes(b"s")
    open_bundle(made.path)
    (made.path / "graphs" / "extra.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"graphs/extra\.onnx is not in the manifest"):
        open_bundle(made.path)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_link_is_refused_even_if_its_target_fits(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    outside = tmp_path / "graph"
    made.graph_path("decoder").rename(outside)
    made.graph_path("decoder").symlink_to(outside)
    with pytest.raises(BundleError, match="is a link"):
        open_bundle(made.path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a//b", "a/./b", "a\\b", "C:x", "", "bundle.json", "a/..", "x\n", "x."]
)
def test_file_name_that_leaves_the_bundle_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="a plain path inside the bundle"):
        make(tmp_path / "b", files={"graphs/decoder.onnx": b"", name: b""})
    made = make(tmp_path / "c")
    edit(made.path, files={**made.manifest.files, name: "0" * 64})
    with pytest.raises(BundleError, match="a plain path inside the bundle"):
        open_bundle(made.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, this version of edgemed reads format 1"),
        ({"format": True}, "has format True"),
        ({"name": "../evil"}, "the bundle's name"),
        ({"surprise": 1}, r"keys unknown: \['surprise'\]"),
        ({"files": {"a": 1}}, "files, 'a' is a int"),
        ({"files": {"a": "12"}}, "no file graphs/decoder.onnx"),
        ({"graphs": {"decoder": {"role": "decoder"}}}, "'decoder' is not a graph specification"),
        ({"graphs": []}, "graphs is a list"),
        ({"precision": {}}, r"precisions of \[\], graphs are \['decoder'\]"),
        ({"family": None}, "family is a NoneType"),
    ],
)
def test_manifest_that_is_not_one_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    made = make(tmp_path / "b")
    edit(made.path, **changes)
    with pytest.raises(BundleError, match=message):
        open_bundle(made.path)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{", b'{"format":1,"format":1}', b"[" * 100000])
def test_damaged_manifest_is_refused(tmp_path: Path, data: bytes) -> None:
    made = make(tmp_path / "b")
    (made.path / "bundle.json").write_bytes(data)
    with pytest.raises(BundleError):
        open_bundle(made.path)


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite):
        make(tmp_path / "b", files={"graphs/decoder.onnx": tmp_path / "nowhere"})
    with pytest.raises(BundleError):
        make(tmp_path / "b", files={"NOTICE": b""})
    assert os.listdir(tmp_path) == []


def test_files_are_copied_or_moved(tmp_path: Path) -> None:
    source = tmp_path / "decoder.onnx"
    source.write_bytes(GRAPH)
    files = {"graphs/decoder.onnx": source, "NOTICE": b"terms"}
    copied = make(tmp_path / "a", files=files)
    assert source.read_bytes() == GRAPH
    inode = source.stat().st_ino
    moved = make(tmp_path / "b", files=files, move=True)
    assert not source.exists()
    assert moved.digest == copied.digest
    assert moved.graph_path("decoder").stat().st_ino == inode  # nothing was copied
    assert open_bundle(tmp_path / "b").digest == moved.digest


def test_a_file_to_move_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite):
        make(tmp_path / "b", files={"graphs/decoder.onnx": tmp_path / "nowhere"}, move=True)
    assert os.listdir(tmp_path) == []


def test_existing_folder_is_replaced_only_when_asked_and_only_if_a_bundle(tmp_path: Path) -> None:
    old = make(tmp_path / "b")
    with pytest.raises(CannotWrite, match="it exists already"):
        make(tmp_path / "b", settings={})
    new = make(tmp_path / "b", settings={}, replace=True)
    assert new.digest != old.digest
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("precious")
    with pytest.raises(CannotWrite, match="not a bundle"):
        make(tmp_path / "c", replace=True)
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


def test_bundles_are_installed_listed_found_by_name_and_removed(tmp_path: Path, home: Path) -> None:
    made = make(tmp_path / "b")
    installed = bundles.install_bundle(made.path)
    assert installed.path == home / "tiny"
    assert open_bundle("tiny").digest == made.digest
    with pytest.raises(CannotWrite, match="it exists already"):
        bundles.install_bundle(made.path)
    bundles.install_bundle(made.path, "other")
    (home / "other" / "bundle.json").write_text("{}")
    listed = {b.name: b for b in bundles.list_bundles() if not b.embedded}
    assert set(listed) == {"tiny", "other"}
    assert listed["tiny"].manifest == made.manifest
    assert listed["other"].problem is not None
    bundles.remove_bundle("tiny")
    with pytest.raises(BundleError, match=r"there is no bundle 'tiny'; installed: .*other"):
        open_bundle("tiny")
    with pytest.raises(BundleError):
        bundles.remove_bundle("../b")
    assert made.path.is_dir()


def test_folder_without_manifest_is_told_apart_from_an_unknown_name(tmp_path: Path, home: Path) -> None:
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="there is no bundle 'nothing'"):
        open_bundle("nothing")
    with pytest.raises(BundleError, match="has no projector"):
        make(tmp_path / "b").spec("projector")
