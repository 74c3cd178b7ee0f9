"""An index of images: what is most like what, what is refused, and what an embedding is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgemed.bundle import Bundle
from edgemed.core import Prompt, Scan
from edgemed.errors import CannotRead, CannotWrite, EdgemedError, InvalidInput, NoInput
from edgemed.infer import Session, open_session
from edgemed.retrieval import EMBEDDINGS, METADATA, Index, Item, Vector, build_index, open_index


@pytest.fixture(scope="module")
def bundle(tiny_native: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A native bundle whose features are the picture in 4 x 4 pixels."""
    made: Bundle = tiny_native.make(tmp_path_factory.mktemp("retrieval") / "b", "Yes.")
    return made


@pytest.fixture
def session(bundle: Bundle) -> Session:
    return open_session(bundle.path, threads=1, roles=("vision_encoder",))


def digest(number: int) -> str:
    return f"{number:064x}"


def scan(seed: int) -> Scan:
    colour = np.random.default_rng(seed).integers(0, 256, 3, dtype=np.uint8)
    return Scan(np.broadcast_to(colour, (1, 40, 60, 3)).copy(), "OT")


def direction(*values: float) -> Vector:
    vector = np.array(values, np.float32)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


ROWS = (direction(1, 0), direction(1, 1), direction(0, 1), direction(1, 1), direction(-1, 0))
QUERY = direction(1, 0)


@pytest.fixture
def index(bundle: Bundle, tmp_path: Path) -> Index:
    """Five images in the plane; the second and the fifth have a mask."""
    items = [Item(f"{i}.png", digest(i), mask="m.png" if i in (1, 4) else None) for i in range(5)]
    return build_index(bundle, zip(items, ROWS, strict=True), tmp_path / "index")


def test_an_image_is_most_like_itself_and_can_be_left_out(session: Session, tmp_path: Path) -> None:
    images = [(Item(f"{i}.png", digest(i)), session.embed(scan(i))) for i in range(6)]
    made = build_index(session.bundle, images, tmp_path / "index")
    for i in range(6):
        best = made.find(session, scan(i))[0]
        assert best.item.path == f"{i}.png"
        assert best.similarity == pytest.approx(1, abs=1e-6)
        others = made.find(session, scan(i), top=9, exclude={digest(i)})
        assert sorted(match.item.path for match in others) == [f"{j}.png" for j in range(6) if j != i]


def test_best_come_first_and_of_equal_ones_the_first(index: Index) -> None:
    found = index.search(QUERY, top=9)
    assert [match.item.path for match in found] == ["0.png", "1.png", "3.png", "2.png", "4.png"]
    assert [match.similarity for match in found] == pytest.approx([1, 0.5**0.5, 0.5**0.5, 0, -1])
    assert index.search(QUERY, top=2) == found[:2]
    assert len(index.search(QUERY)) == 3


def test_only_images_with_a_mask_where_that_is_asked(index: Index) -> None:
    assert [match.item.path for match in index.search(QUERY, masked=True)] == ["1.png", "4.png"]


def test_many_rows_are_read_part_by_part(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemed.retrieval._ROWS", 7)
    rows = np.random.default_rng(0).normal(size=(30, 5))
    vectors = [direction(*row) for row in rows]
    items = [Item(f"{i}.png", digest(i)) for i in range(30)]
    made = build_index(bundle, zip(items, vectors, strict=True), tmp_path / "index")
    expected = np.argsort(-(np.stack(vectors) @ vectors[3]))[:4]
    assert [match.item.path for match in made.search(vectors[3], top=4)] == [f"{i}.png" for i in expected]


def test_an_index_holds_paths_inside_the_folder_and_nothing_else(index: Index, bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index"]
    assert sorted(file.name for file in folder.iterdir()) == [EMBEDDINGS, METADATA]
    metadata = json.loads((folder / METADATA).read_text())
    assert metadata.pop("items")[1] == {"path": "1.png", "sha256": digest(1), "frame": 0, "mask": "m.png", "text": None}
    assert metadata == {
        "schema": "edgemed.index/1", "bundle": "tiny", "bundle_sha256": bundle.digest, "family": "native",
    }  # fmt: skip
    assert isinstance(index.embeddings, np.memmap)


def test_another_bundle_is_refused(index: Index, tiny_native: ModuleType, tmp_path: Path) -> None:
    other = tiny_native.make(tmp_path / "other", "No.")
    with open_session(other.path, threads=1) as session, pytest.raises(InvalidInput, match="made with the bundle"):
        index.find(session, scan(0))


@pytest.mark.parametrize(
    ("vector", "told"),
    [
        (direction(1, 0, 0), r"float32 \[3\], expected float32 \[2\]"),
        (direction(1, 0).astype(np.float64), "float64"),
        (np.array([2, 0], np.float32), "not of length 1"),
        (np.array([np.nan, 0], np.float32), "not of length 1"),
    ],
    ids=["width", "dtype", "length", "nan"],
)
def test_a_query_that_does_not_fit_is_refused(index: Index, vector: Any, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        index.search(vector)


@pytest.mark.parametrize(
    "rows",
    [
        np.stack(ROWS).astype(np.float64),
        np.stack(ROWS)[:4],
        np.stack(ROWS)[0],
        np.array([{"a": 1}] * 5, dtype=object),
    ],
    ids=["dtype", "a row less", "no matrix", "pickled"],
)
def test_embeddings_that_do_not_fit_are_refused(index: Index, tmp_path: Path, rows: Any) -> None:
    np.save(tmp_path / "index" / EMBEDDINGS, rows, allow_pickle=True)
    with pytest.raises(InvalidInput, match=r"embeddings\.npy"):
        open_index(tmp_path / "index")


def test_embeddings_that_are_cut_off_are_refused(index: Index, tmp_path: Path) -> None:
    file = tmp_path / "index" / EMBEDDINGS
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="cut off"):
        open_index(tmp_path / "index")
    file.write_bytes(b"")
    with pytest.raises(InvalidInput, match="cut off"):
        open_index(tmp_path / "index")


def test_rows_that_are_not_of_length_1_are_refused(index: Index, tmp_path: Path) -> None:
    np.save(tmp_path / "index" / EMBEDDINGS, np.full((5, 2), np.nan, np.float32))
    with pytest.raises(InvalidInput, match="rows that are not of length 1"):
        open_index(tmp_path / "index").search(QUERY)


def change(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda metadata: metadata["items"][0].update({key: value})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (change("path", "../x.png"), "has the path"),
        (change("path", "a/../../x.png"), "has the path"),
        (change("path", "/etc/passwd"), "has the path"),
        (change("path", "C:\\x.png"), "has the path"),
        (change("path", "a\x1b[2J.png"), "has the path"),
        (change("mask", "../m.png"), "has the path"),
        (change("sha256", "12"), "has sha256"),
        (change("frame", -1), "has sha256 .* frame -1"),
        (change("frame", True), "another form"),
        (change("text", ["x"]), "another form"),
        (change("name", "x"), "another form"),
        (lambda metadata: metadata["items"][0].pop("mask"), "another form"),
        (lambda metadata: metadata.update(schema="edgemed.index/2"), "another kind"),
        (lambda metadata: metadata.update(items=[]), "damaged"),
        (lambda metadata: metadata.update(family=None), "damaged"),
        (lambda metadata: metadata.update(more=1), "damaged"),
        (lambda metadata: metadata["items"].pop(), "expected float32"),
    ],
)
def test_metadata_that_is_not_what_was_written_is_refused(
    index: Index, tmp_path: Path, damage: Callable[[dict[str, Any]], object], told: str
) -> None:
    file = tmp_path / "index" / METADATA
    metadata = json.loads(file.read_text())
    damage(metadata)
    file.write_text(json.dumps(metadata))
    with pytest.raises(InvalidInput, match=told):
        open_index(tmp_path / "index")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"[]"], ids=["cut", "bytes", "deep", "list"])
def test_metadata_that_is_no_object_is_refused(index: Index, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index" / METADATA).write_bytes(content)
    with pytest.raises(InvalidInput, match=r"metadata\.json"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize("name", [EMBEDDINGS, METADATA])
def test_a_missing_file_is_told(index: Index, tmp_path: Path, name: str) -> None:
    (tmp_path / "index" / name).unlink()
    with pytest.raises(CannotRead, match=name):
        open_index(tmp_path / "index")


def test_a_folder_that_holds_something_is_left_alone(index: Index, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="exists already"):
        build_index(bundle, [(Item("x.png", digest(9)), QUERY)], tmp_path / "index")
    assert len(open_index(tmp_path / "index").items) == 5


@pytest.mark.parametrize(
    ("images", "error"),
    [
        ([], NoInput),
        ([(Item("a.png", digest(0)), QUERY), (Item("b.png", digest(1)), direction(1, 0, 0))], InvalidInput),
    ],
    ids=["none", "widths differ"],
)
def test_an_index_that_cannot_be_made_leaves_nothing(
    bundle: Bundle, tmp_path: Path, images: list[tuple[Item, Vector]], error: type[EdgemedError]
) -> None:
    with pytest.raises(error):
        build_index(bundle, images, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_embedding_loads_the_vision_encoder_alone(session: Session) -> None:
    vector = session.embed(scan(0))
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    with pytest.raises(InvalidInput, match="there is no projector"):
        session.ask(scan(0), Prompt("x"))
    with pytest.raises(InvalidInput, match="frame 1 was asked for"):
        session.embed(scan(0), 1)


def test_an_image_without_a_direction_is_refused(session: Session) -> None:
    features = {"image_features": np.zeros((1, 3, 64, 64), np.float32)}
    with pytest.raises(InvalidInput, match="nothing to compare"):
        session.family.embedding(features)


def test_native_is_the_mean_over_places(session: Session) -> None:
    features = np.zeros((1, 3, 64, 64), np.float32)
    features[0, 0], features[0, 2, :32] = 3, 8
    np.testing.assert_allclose(session.family.embedding({"image_features": features}), [0.6, 0, 0.8], atol=1e-7)


def test_medplib_is_the_mean_of_the_published_patches(reference: Any) -> None:
    pytest.importorskip("torch", reason="the checkpoint is run as it is")
    from edgemed.backends import open_runner
    from edgemed.families.opened_torch import open_folder

    tiny = reference("medplib-tiny")
    bundle, artifact = open_folder(tiny.folder)
    picture = Scan(tiny.input("image_square")[None], "OT")
    with Session(bundle, "torch", "cpu", 1, artifact=artifact, roles=("vision_encoder",)) as session:
        ours = session.embed(picture)
        feeds = session.family.prepare((picture,), Prompt("x")).vision
    runner = open_runner("torch", artifact("vision_encoder"), bundle.spec("vision_encoder"), device="cpu", threads=1)
    # The compact copy has some rows only; ours stand for the others. Row 0 is the class token, which does not count.
    rows = np.pad(runner.run(feeds)["last_features"], ((0, 0), (1, 0), (0, 0)))[0]
    rows[:: tiny.steps.get("clip_last_hidden_square", 1)] = tiny.expected("clip_last_hidden_square").reshape(
        -1, rows.shape[1]
    )
    mean = rows[1:].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(ours, mean / np.linalg.norm(mean), rtol=0, atol=1e-5)


def test_medrega_is_the_mean_of_the_patches_of_all_tiles(reference: Any) -> None:
    pytest.importorskip("torch", reason="the checkpoint is run as it is")
    tiny = reference("medrega-tiny")
    with open_session(tiny.folder, "torch", "cpu", threads=1, roles=("vision_encoder",)) as session:
        features = np.random.default_rng(0).normal(size=(3, 16, 64)).astype(np.float32)
        mean = features.mean(axis=(0, 1))
        found = session.family.embedding({"image_features": features})
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-6)
        assert session.embed(Scan(tiny.input("image_square")[None], "OT")).shape == (64,)
