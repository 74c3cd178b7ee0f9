"""`edgemed infer` on MetaImage and TIFF, and what --resample writes. The model, a stand-in, finds what is bright."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_series
import numpy as np
import pytest

import edgemed.infer
from edgemed.cli import main
from edgemed.core import Answer, Prompt, Provenance, Region, Scan
from edgemed.geometry import box_of

Captured = pytest.CaptureFixture[str]
ASK = ["--prompt", "Where is the liver?"]
SHAPE = (7, 6, 8)  # [slices, rows, columns]


class BrightSession:
    """Calls liver what is 200 and more."""

    bundle = SimpleNamespace(digest="0" * 64)

    def ask(self, scans: Sequence[Scan], prompt: Prompt, options: Any) -> Answer:
        (scan,) = scans
        mask = (scan.pixels[0] if scan.pixels.ndim == 3 else scan.pixels[0, ..., 0]) >= 200
        box = box_of(mask)
        regions = () if box is None else (Region("liver", box, scan.first_frame, mask, 0.9, 0.8),)
        tokens = {"prompt": 3, "generated": 2, "decoder_calls": 2}
        used = Provenance("0", "fake", "fake", "0" * 64, "fake", "CPU", {}, "auto", tokens, {"total": 2.0})
        return Answer("liver", "<ref>liver</ref>", regions, used, (1, 2), (4,))

    def notice(self, language: str) -> str:
        return "not for diagnosis"


@pytest.fixture(autouse=True)
def _session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgemed.infer, "open_session", lambda **options: BrightSession())


def bright() -> np.ndarray[Any, Any]:
    values = np.full(SHAPE, 10, "<i2")
    values[2:5, 1:4, 2:6] = 500
    return values


def summary_of(capsys: Captured) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def write_meta(path: Path) -> Path:
    where = "LOCAL" if path.suffix == ".mha" else f"{path.stem}.raw"
    head = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 0.5 0.8 2\nDimSize = 8 6 7\n"
        f"ElementType = MET_SHORT\nElementDataFile = {where}\n"
    )
    if where == "LOCAL":
        path.write_bytes(head.encode() + bright().tobytes())
    else:
        path.write_text(head)
        path.with_suffix(".raw").write_bytes(bright().tobytes())
    return path


@pytest.mark.parametrize("name", ["v.mha", "v.mhd"])
def test_a_metaimage_is_a_series_with_volumes(tmp_path: Path, capsys: Captured, name: str) -> None:
    path = write_meta(tmp_path / name)
    assert main(["infer", str(path), *ASK, "--json", "-q", "--slices", "all"]) == 0
    found = summary_of(capsys)
    assert (found["slices"], found["plane"], found["verdict"]["kind"]) == (7, "axial", "uniform")
    (liver,) = found["structures"]
    assert (liver["slices"], liver["volume_ml"]) == ([2, 3, 4], pytest.approx(36 * 0.8 / 1000, abs=1e-3))


def test_answers_kept_about_another_data_file_are_not_taken(tmp_path: Path, capsys: Captured) -> None:
    path = write_meta(tmp_path / "v.mhd")
    run = ["infer", str(path), *ASK, "--json", "-q", "--slices", "all", "-o", str(tmp_path / "out")]
    assert main(run) == 0
    assert summary_of(capsys)["structures"]
    (tmp_path / "v.raw").write_bytes(bytes(bright().nbytes))
    assert main(run) == 0
    assert summary_of(capsys)["structures"] == []


def test_a_page_of_a_tiff_is_asked_about(tmp_path: Path, capsys: Captured) -> None:
    from PIL import Image

    pages = [Image.fromarray((plane // 2).astype(np.uint8)) for plane in bright()]
    pages[0].save(tmp_path / "p.tif", save_all=True, append_images=pages[1:])
    assert main(["infer", str(tmp_path / "p.tif"), *ASK, "--json", "-q", "--frame", "3"]) == 0
    answer = summary_of(capsys)
    assert (answer["regions"][0]["box_px"], answer["input"]["frame"]) == ([2, 1, 6, 4], 3)


def test_resample_writes_one_even_label_volume_and_seg(tmp_path: Path, capsys: Captured) -> None:
    nibabel = pytest.importorskip("nibabel")
    segread = pytest.importorskip("highdicom").seg.segread
    folder, out = tmp_path / "ct", tmp_path / "out"
    shown = [np.where(plane > 10, 500, 10).astype(np.uint16) for plane in bright()]
    made_series.write_series(folder, 7, pixels=shown)
    (folder / "s0004.dcm").unlink()  # a gap of one slice, within what is bright
    run = ["infer", str(folder), *ASK, "--to", "seg,nifti", "-o"]
    assert main([*run, str(tmp_path / "as is")]) == 0
    assert len(list((tmp_path / "as is").glob("*.nii.gz"))) > 1
    assert "nothing is resampled" in capsys.readouterr().err
    assert main([*run, str(out), "--resample"]) == 0
    assert "resampled: masks on even distances" in capsys.readouterr().err
    (volume,), (seg,) = out.glob("*.nii.gz"), out.glob("*.seg.dcm")
    image = nibabel.load(volume)
    labels = np.asarray(image.dataobj)
    assert labels.shape == (8, 6, 7) and np.linalg.norm(image.affine[:3, 2]) == pytest.approx(2)
    np.testing.assert_array_equal(labels.any(axis=(0, 1)), [False, False, True, True, True, False, False])
    assert len(segread(seg).PerFrameFunctionalGroupsSequence) == 3


def test_resample_tells_where_it_cannot(tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "ct"
    made_series.write_series(folder, 7, pixels=[plane.astype(np.uint16) for plane in bright()])
    (folder / "s0004.dcm").unlink()
    run = ["infer", str(folder), *ASK, "--to", "seg", "-o", str(tmp_path / "out"), "--resample", "--slices", "1-3"]
    assert main(run) == 0
    assert "SEG and label volume are not resampled" in capsys.readouterr().err
