"""`edgemed index`: images and masks are found in folders, similar ones printed, questions get examples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgemed.infer
from edgemed.cli import main
from edgemed.cli.index import find_images
from edgemed.core import Answer, Prompt, Scan
from edgemed.errors import CannotRead, EdgemedError
from edgemed.infer import InferOptions, Session
from edgemed.retrieval import open_index

Captured = pytest.CaptureFixture[str]

COLOURS = {"red": (250, 10, 10), "brick": (200, 30, 20), "green": (10, 250, 10), "blue": (10, 10, 250)}


@pytest.fixture(scope="module")
def bundle(tiny_native: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A native bundle whose features are the picture in 4 x 4 pixels, so that an embedding is a mean colour."""
    return str(tiny_native.make(tmp_path_factory.mktemp("index") / "b", "Yes.").path)


def paint(file: Path, colour: tuple[int, int, int] = (90, 90, 90)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(file)


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Four pictures in two folders, of which red and green have a mask beside them."""
    folder = tmp_path / "images"
    for name, colour in COLOURS.items():
        paint(folder / ("warm" if colour[0] > 100 else "cold") / f"{name}.png", colour)
    paint(folder / "warm" / "red_mask.png")
    paint(folder / "cold" / "green_mask.png")
    return folder


@pytest.fixture
def index(collection: Path, bundle: str, tmp_path: Path, capsys: Captured) -> str:
    folder = str(tmp_path / "index")
    assert main(["index", "build", str(collection), "-o", folder, "--masks", "_mask", "--bundle", bundle]) == 0
    out, err = capsys.readouterr()
    assert out == f"4 images, 2 with a mask: {folder}\n"
    assert err == f"note: the paths in the index are relative to {collection}\n"
    return folder


def test_similar_images_come_first_without_the_image_itself(
    index: str, collection: Path, bundle: str, capsys: Captured
) -> None:
    brick = str(collection / "warm" / "brick.png")
    assert main(["index", "search", index, brick, "--bundle", bundle, "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("0.")
    assert out.endswith("  warm/red.png  mask warm/red_mask.png\n")
    assert main(["index", "search", index, brick, "--bundle", bundle, "--with-self", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["input"], found["frame"]) == ("edgemed.search/1", brick, 0)
    assert [match["path"] for match in found["matches"][:2]] == ["warm/brick.png", "warm/red.png"]
    assert len(found["matches"]) == 3
    assert found["matches"][0]["similarity"] == pytest.approx(1, abs=1e-6)
    assert found["matches"][0]["mask"] is None


def test_a_copy_of_an_image_is_the_image_itself(index: str, collection: Path, bundle: str, capsys: Captured) -> None:
    shutil.copy(collection / "cold" / "blue.png", collection.parent / "copy.png")
    arguments = ["index", "search", index, str(collection.parent / "copy.png"), "--bundle", bundle, "--top", "9"]
    assert main(arguments) == 0
    assert "blue" not in capsys.readouterr().out


def test_files_that_cannot_be_read_are_told_and_left_out(
    collection: Path, bundle: str, sample_scan: str, tmp_path: Path, capsys: Captured
) -> None:
    (collection / "notes.txt").write_text("not an image")
    shutil.copy(sample_scan, collection / "1.2.840.7")
    red = (collection / "warm" / "red.png").read_bytes()
    (collection / "broken.png").write_bytes(red[: len(red) // 2])
    (collection / "empty.dcm").write_bytes(b"")
    folder = tmp_path / "index"
    assert main(["index", "build", str(collection), "-o", str(folder), "--bundle", bundle]) == 87
    out, err = capsys.readouterr()
    assert out.startswith("7 images, 0 with a mask")
    lines = err.splitlines()
    assert next(line for line in lines if "broken.png" in line).endswith("(code 20)")
    assert next(line for line in lines if "empty.dcm" in line).endswith("(code 21)")
    assert "note: 1 files that are no images were passed over" in lines
    assert lines[-1] == "edgemed: 2 of 9 images failed; each is told above"
    assert "1.2.840.7" in [item.path for item in open_index(folder).items]


def test_a_folder_without_images_is_code_21_and_nothing_is_written(
    bundle: str, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["index", "build", str(tmp_path / "empty"), "-o", str(tmp_path / "i"), "--bundle", bundle]) == 21
    assert not (tmp_path / "i").exists()


def test_an_index_is_not_overwritten(index: str, collection: Path, bundle: str, capsys: Captured) -> None:
    assert main(["index", "build", str(collection), "-o", index, "--bundle", bundle]) == 40
    assert "exists already" in capsys.readouterr().err


def test_another_bundle_is_code_22(index: str, sample_scan: str, capsys: Captured) -> None:
    assert main(["index", "search", index, sample_scan, "--bundle", "nano"]) == 22
    assert "made with the bundle 'tiny'" in capsys.readouterr().err


def test_masks_in_a_folder_beside_the_images(tmp_path: Path, bundle: str, capsys: Captured) -> None:
    paint(tmp_path / "images" / "a" / "x.png")
    paint(tmp_path / "images" / "y.jpg", (9, 200, 30))
    paint(tmp_path / "masks" / "a" / "x.png")
    paint(tmp_path / "masks" / "y.png")
    found = find_images(str(tmp_path / "images"), str(tmp_path / "masks"))
    assert found.root == tmp_path
    assert found.images == {"images/a/x.png": "masks/a/x.png", "images/y.jpg": "masks/y.png"}
    with pytest.raises(EdgemedError, match="lies elsewhere"):
        find_images(str(tmp_path / "images" / "a"), str(tmp_path / "masks"))


def test_masks_in_a_folder_among_the_images_and_hidden_files_are_no_images(tmp_path: Path) -> None:
    paint(tmp_path / "x.png")
    paint(tmp_path / "z.png")
    paint(tmp_path / ".hidden.png")
    paint(tmp_path / ".cache" / "x.png")
    paint(tmp_path / "masks" / "x.png")
    found = find_images(str(tmp_path), str(tmp_path / "masks"))
    assert found.root == tmp_path
    assert found.images == {"x.png": "masks/x.png", "z.png": None}


@pytest.mark.parametrize("suffix", ["_mask", "_mask.png"])
def test_masks_by_their_suffix(tmp_path: Path, suffix: str) -> None:
    for name in ("x.jpg", "x_mask.png", "lonely_mask.png", "1.2.3.dcm", "1.2.3_mask.png"):
        paint(tmp_path / name) if not name.endswith(".dcm") else (tmp_path / name).write_bytes(b"x")
    assert find_images(str(tmp_path), suffix).images == {"1.2.3.dcm": "1.2.3_mask.png", "x.jpg": "x_mask.png"}


def test_folders_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(CannotRead, match="no such folder"):
        find_images(str(tmp_path / "no"))
    with pytest.raises(CannotRead, match="takes a folder or a suffix"):
        find_images(str(tmp_path), str(tmp_path / "no"))


def asked(tmp_path: Path, *items: Any) -> str:
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(items))
    return str(file)


def test_questions_get_the_images_with_masks_that_are_most_like_theirs(
    index: str, collection: Path, bundle: str, tmp_path: Path, capsys: Captured
) -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<SEG>.<mask>m/brick.png</mask>"}]
    file = asked(
        tmp_path,
        {"image": "warm/brick.png", "conversations": turns, "answer_type": "open"},
        {"image1": "cold/blue.png", "image2": "warm/red.png", "mask3": "m/red.png"},
        {"conversations": [{"from": "human", "value": "What is a mask?"}]},
    )
    output = tmp_path / "out.json"
    arguments = ["index", "augment", index, file, "-o", str(output), "--images", str(collection), "--bundle", bundle]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == f"2 of 3 questions have examples: {output}\n"
    assert err == "note: 2 of 4 images of the index have no mask and are left out\n"
    red = {"image": "warm/red.png", "mask": "warm/red_mask.png"}
    green = {"image": "cold/green.png", "mask": "cold/green_mask.png"}
    first, second, third = json.loads(output.read_text())
    assert first["icl_examples"] == [red, green]
    assert (first["target_mask"], first["conversations"], first["answer_type"]) == ("m/brick.png", turns, "open")
    assert second["icl_examples"] == [green]
    assert (second["image"], second["target_mask"]) == ("warm/red.png", "m/red.png")
    assert third == {"conversations": [{"from": "human", "value": "What is a mask?"}]}
    assert main([*arguments, "--with-self", "--top", "1", "-q"]) == 0
    assert json.loads(output.read_text())[1]["icl_examples"] == [red]
    assert capsys.readouterr().err == ""


def test_a_question_whose_image_cannot_be_read_stays_as_it_is(
    index: str, collection: Path, bundle: str, tmp_path: Path, capsys: Captured
) -> None:
    missing = {"image": "no.png", "conversations": []}
    file = asked(tmp_path, missing, {"image": "warm/red.png"})
    output = tmp_path / "out.json"
    arguments = ["index", "augment", index, file, "-o", str(output), "--images", str(collection), "--bundle", bundle]
    assert main(arguments) == 87
    written = json.loads(output.read_text())
    assert written[0] == missing
    assert "icl_examples" in written[1]
    assert "no.png" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("content", ["{", '{"image": "x"}', "[1]"])
def test_questions_of_another_form_are_code_22(
    index: str, bundle: str, tmp_path: Path, content: str, capsys: Captured
) -> None:
    file = tmp_path / "q.json"
    file.write_text(content)
    assert main(["index", "augment", index, str(file), "-o", str(tmp_path / "o.json"), "--bundle", bundle]) == 22
    assert not (tmp_path / "o.json").exists()


def test_an_index_without_masks_gives_no_examples(
    collection: Path, bundle: str, tmp_path: Path, capsys: Captured
) -> None:
    index = str(tmp_path / "i")
    assert main(["index", "build", str(collection / "cold"), "-o", index, "--masks", "_m", "--bundle", bundle]) == 0
    assert "note: no image has a mask in, or with, _m" in capsys.readouterr().err
    file = asked(tmp_path, {"image": "x.png"})
    assert main(["index", "augment", index, file, "-o", str(tmp_path / "o.json"), "--bundle", bundle]) == 21
    assert "build it with --masks" in capsys.readouterr().err


class Asked:
    """A session that embeds with a real one, and keeps what it is asked."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.bundle = session.bundle
        self.embed = session.embed
        self.notice = session.notice
        self.prompts: list[Prompt] = []

    def ask(self, scans: Sequence[Scan], prompt: Prompt, options: InferOptions) -> Answer:
        self.prompts.append(prompt)
        return self._session.ask(scans, replace(prompt, examples=()), options)  # its family takes no examples


@pytest.fixture
def asking(bundle: str, monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked(edgemed.infer.open_session(bundle, threads=1))
    monkeypatch.setattr(edgemed.infer, "open_session", lambda **options: asked)
    return asked


def test_infer_shows_the_nearest_images_as_examples(
    index: str, collection: Path, asking: Asked, capsys: Captured
) -> None:
    images = [str(collection / "warm" / f"{name}.png") for name in ("brick", "red")]
    mask = collection / "cold" / "green_mask.png"
    Image.fromarray(np.pad(np.full((9, 9), 255, np.uint8), ((0, 55), (55, 0)))).save(mask)
    source = f"{index}={collection}"
    assert main(["infer", *images, "--prompt", "?", "--examples-from", source, "--top", "2", "-q"]) == 0
    brick, red = asking.prompts
    assert [example.scan.shown(0)[0, 0].tolist() for example in brick.examples] == [[250, 10, 10], [10, 250, 10]]
    assert brick.examples[0].mask.all()
    assert brick.examples[1].mask.sum() == 81
    assert [example.scan.shown(0)[0, 0].tolist() for example in red.examples] == [[10, 250, 10]]


def test_infer_refuses_an_image_that_is_not_the_one_indexed(
    index: str, collection: Path, asking: Asked, capsys: Captured
) -> None:
    paint(collection / "cold" / "green.png", (20, 240, 20))
    image = str(collection / "warm" / "red.png")
    assert main(["infer", image, "--prompt", "?", "--examples-from", f"{index}={collection}"]) == 22
    assert "is not the file that was indexed" in capsys.readouterr().err


def test_infer_tells_another_form_of_examples_from(index: str, asking: Asked, capsys: Captured) -> None:
    assert main(["infer", "x.png", "--prompt", "?", "--examples-from", index]) == 1
    assert main(["infer", "--prompt", "?", "--examples-from", f"{index}=x"]) == 1
    assert "an INPUT was expected" in capsys.readouterr().err


def test_the_embedded_model_knows_the_sample_scan_again(sample_scan: str, tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(sample_scan, folder / "scan.dcm")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    assert main(["index", "build", str(folder), "-o", str(tmp_path / "i"), "-q"]) == 0
    capsys.readouterr()
    assert main(["index", "search", str(tmp_path / "i"), sample_scan, "--with-self"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1.0000  scan.dcm"
    assert lines[1].endswith("noise.png")
