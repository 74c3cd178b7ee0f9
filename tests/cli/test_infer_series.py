"""`edgemed infer` on series: which one, which slices, what is written, exit codes.

The model is a stand-in but for the last test.
"""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydicom import dcmread

import edgemed.infer
import edgemed.report.results
from edgemed.cli import main
from edgemed.core import Answer, Language, Prompt, Provenance, Region, Scan
from edgemed.errors import InvalidInput
from edgemed.geometry import box_of
from edgemed.infer import InferOptions
from edgemed.report import read_schema
from edgemed.report.results import KINDS
from edgemed.volume import read_schema as read_series_schema

_HELPER = Path(__file__).resolve().parents[1] / "helpers" / "made_series.py"
_SPEC = importlib.util.spec_from_file_location("made_series", _HELPER)
assert _SPEC is not None and _SPEC.loader is not None
made = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made)

Captured = pytest.CaptureFixture[str]
ASK = ["--prompt", "Where is the liver?"]
BRIGHT = 200


class FakeSession:
    """Finds what is bright; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Scan, Prompt]] = []
        self.bundle = SimpleNamespace(digest="0" * 64)
        self.error: Exception | None = None

    def ask(self, scans: Sequence[Scan], prompt: Prompt, options: InferOptions) -> Answer:
        (scan,) = scans
        self.asked.append((scan, prompt))
        if self.error is not None:
            raise self.error
        mask = scan.pixels[0] >= BRIGHT
        box = box_of(mask)
        regions = () if box is None else (Region("liver", box, scan.first_frame, mask, 0.9, 0.8),)
        tokens = {"prompt": 3, "generated": 2, "decoder_calls": 2}
        used = Provenance("0", "fake", "fake", "0" * 64, "fake", "CPU", {}, "auto", tokens, {"total": 2.0})
        return Answer("liver", "<ref>liver</ref>", regions, used, (1, 2), (4,))

    def notice(self, language: Language) -> str:
        return "not for diagnosis" if language == "en" else "不可用于诊断"


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    fake = FakeSession()
    monkeypatch.setattr(edgemed.infer, "open_session", lambda **options: fake)
    return fake


def pictures(shown: Sequence[int], count: int) -> list[np.ndarray[Any, Any]]:
    """Return slices of 6 x 8 of which those in `shown` have 12 bright pixels."""
    found = [np.full((6, 8), 10, np.uint16) for _ in range(count)]
    for index in shown:
        found[index][1:4, 2:6] = 500
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine slices, 2 mm apart; 3 to 6 show something."""
    made.write_series(tmp_path / "ct", 9, pixels=pictures(range(3, 7), 9))
    return tmp_path / "ct"


def lines(capsys: Captured) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_folder_gives_an_answer_a_slice_and_a_summary(session: FakeSession, folder: Path, capsys: Captured) -> None:
    assert main(["infer", str(folder), *ASK, "--slices", "all", "--json"]) == 0
    *answers, summary = lines(capsys)
    for answer in answers:
        jsonschema.validate(answer, read_schema())
    assert [len(a["regions"]) for a in answers] == [0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert answers[0]["input"]["path"] == str(folder / "s0009.dcm")
    jsonschema.validate(summary, read_series_schema())
    assert (summary["series_instance_uid"], summary["slices"], summary["plane"]) == (made.SERIES, 9, "axial")
    assert summary["verdict"] == {"kind": "uniform", "reasons": [], "spacing_mm": [2.0, 0.8, 0.5]}
    (liver,) = summary["structures"]
    assert (liver["slices"], liver["volume_ml"]) == ([3, 4, 5, 6], pytest.approx(4 * 12 * 0.4 * 2 / 1000, abs=1e-3))


def test_text_is_a_short_table(session: FakeSession, folder: Path, capsys: Captured) -> None:
    assert main(["infer", str(folder), *ASK]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "CT axial, 2.00 mm, uniform, slices 7/9"
    assert re.search(r"^liver +3-6 +0\.0 ml$", out, re.MULTILINE)
    assert out.endswith("not for diagnosis\n")
    assert err == ""


def test_text_is_chinese_where_the_question_is(session: FakeSession, folder: Path, capsys: Captured) -> None:
    assert main(["infer", str(folder), "--prompt", "肝脏在哪里?"]) == 0
    assert "结构   层面  体积" in capsys.readouterr().out


@pytest.mark.parametrize(("which", "asked"), [("middle", 1), ("every:3", 3), ("2-4,8", 4), ("all", 9)])
def test_slices_are_those_that_were_asked_for(session: FakeSession, folder: Path, which: str, asked: int) -> None:
    assert main(["infer", str(folder), *ASK, "--slices", which, "-q"]) == 0
    assert len(session.asked) == asked


def test_slices_that_are_not_there_are_wrong_usage(session: FakeSession, folder: Path, capsys: Captured) -> None:
    assert main(["infer", str(folder), *ASK, "--slices", "3-9"]) == 1
    assert "slices 0 to 8" in capsys.readouterr().err


def test_an_archive_and_a_dicomdir_are_series_too(session: FakeSession, folder: Path, capsys: Captured) -> None:
    path = folder.parent / "study.zip"
    with zipfile.ZipFile(path, "w") as file:
        for slice_file in sorted(folder.iterdir()):
            file.write(slice_file, f"Planted^Name/{slice_file.name}")
    assert main(["infer", str(path), *ASK, "--json"]) == 0
    captured = capsys.readouterr()
    *answers, summary = [json.loads(line) for line in captured.out.splitlines()]
    assert answers[0]["input"]["path"].startswith(f"{path}/0000")
    assert summary["structures"][0]["slices"] == [3, 4, 5, 6]
    assert "Planted" not in captured.out + captured.err


def test_a_volume_file_is_a_series_too(session: FakeSession, tmp_path: Path, capsys: Captured) -> None:
    nibabel = pytest.importorskip("nibabel")
    data = np.stack(pictures(range(3, 7), 9), -1).transpose(1, 0, 2).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(data, np.diag((-0.5, -0.8, 2, 1))), tmp_path / "v.nii.gz")
    assert main(["infer", str(tmp_path / "v.nii.gz"), *ASK, "--slices", "all", "--json"]) == 0
    captured = capsys.readouterr()
    *answers, summary = [json.loads(line) for line in captured.out.splitlines()]
    assert [a["input"]["frame"] for a in answers] == list(range(9))
    jsonschema.validate(answers[3], read_schema())
    assert answers[3]["regions"][0]["box_px"] == [2, 1, 6, 4]
    jsonschema.validate(summary, read_series_schema())
    assert summary["structures"][0]["volume_ml"] == pytest.approx(4 * 12 * 0.4 * 2 / 1000, abs=1e-3)
    assert captured.err == "note: axial slices; taken for no CT (no value is as low as air)\n"


def test_frames_of_a_file_are_a_series_where_slices_are_asked_for(
    session: FakeSession, tmp_path: Path, capsys: Captured
) -> None:
    path = made.write_enhanced(tmp_path / "e.dcm", [(z, 1) for z in (4.0, 2.0, 0.0)])
    assert main(["infer", str(path), *ASK, "--json"]) == 0
    assert len(lines(capsys)) == 1
    assert main(["infer", str(path), *ASK, "--json", "--slices", "all"]) == 0
    *answers, summary = lines(capsys)
    assert [a["input"]["frame"] for a in answers] == [2, 1, 0]
    assert summary["verdict"]["spacing_mm"] == [2.0, 0.8, 0.5]


# --- which series -----------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A localizer, a thin and a thick series, a report."""
    root = tmp_path / "study"
    made.write_series(root / "a", 3, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], series="1.2.1")
    made.write_series(root / "b", 6, 5.0, series="1.2.2", SeriesDescription="Planted Name THICK", SliceThickness="5")
    made.write_series(root / "c", 9, 1.0, series="1.2.3", SeriesDescription="Planted Name THIN", SliceThickness="1")
    made.write_slice(root / "report.dcm", Modality="SR", PixelData=None, series="1.2.4")
    return root


def test_of_several_the_largest_is_taken_and_the_others_are_told_without_the_patient(
    session: FakeSession, study: Path, capsys: Captured
) -> None:
    assert main(["infer", str(study), *ASK, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["series_instance_uid"] == "1.2.3"
    told = captured.err.splitlines()
    assert told[0] == "note: series 1.2.3  CT  9 slices of 8 x 6  uniform"
    assert [line.split()[3] for line in told[1:3]] == ["1.2.2", "1.2.1"]
    assert "Planted" not in captured.err + captured.out


def test_a_series_is_taken_by_its_uid(session: FakeSession, study: Path, capsys: Captured) -> None:
    assert main(["infer", str(study), *ASK, "--json", "-q", "--series", "1.2.2"]) == 0
    assert lines(capsys)[-1]["series_instance_uid"] == "1.2.2"


def test_a_series_is_taken_by_rules(session: FakeSession, study: Path, tmp_path: Path, capsys: Captured) -> None:
    rules = {"selections": [{"name": "thick", "conditions": {"SeriesDescription": "thick$", "SliceThickness": [3, 6]}}]}
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    assert main(["infer", str(study), *ASK, "--json", "-q", "--select", str(tmp_path / "rules.json")]) == 0
    assert lines(capsys)[-1]["series_instance_uid"] == "1.2.2"


def test_a_series_that_is_not_there_is_no_input(session: FakeSession, study: Path, capsys: Captured) -> None:
    assert main(["infer", str(study), *ASK, "--series", "9.9"]) == 21
    assert "there are: 1.2.3, 1.2.2, 1.2.1" in capsys.readouterr().err


def test_a_folder_without_images_is_no_input(session: FakeSession, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "notes.txt").write_text("seen")
    assert main(["infer", str(tmp_path), *ASK]) == 21
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bomb_is_code_86(session: FakeSession, folder: Path, capsys: Captured) -> None:
    head = next(folder.iterdir()).read_bytes()
    with zipfile.ZipFile(folder.parent / "b.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.dcm", head + bytes(64 << 20))
    assert main(["infer", str(folder.parent / "b.zip"), *ASK]) == 86


# --- what is not a volume ---------------------------------------------------------------------------------------------


def test_a_gap_refuses_volumes_unless_resampled(session: FakeSession, folder: Path, capsys: Captured) -> None:
    (folder / "s0004.dcm").unlink()
    assert main(["infer", str(folder), *ASK, "--json", "-q"]) == 0
    refused = lines(capsys)[-1]
    assert (refused["verdict"]["kind"], refused["structures"][0]["volume_ml"]) == ("gaps", None)
    assert main(["infer", str(folder), *ASK, "--json", "-q", "--resample"]) == 0
    given = lines(capsys)[-1]["structures"][0]
    assert given["volume_ml"] == pytest.approx(12 * 0.4 * (2 + 3 + 3) / 1000, abs=1e-3)


def test_a_slice_that_cannot_be_read_is_told_and_the_code_is_87(
    session: FakeSession, folder: Path, capsys: Captured
) -> None:
    cut = folder / "s0004.dcm"
    cut.write_bytes(cut.read_bytes()[:-20])  # the header is whole, the picture is not
    broken = folder / "s0001.dcm"
    broken.write_bytes(broken.read_bytes()[:300])
    assert main(["infer", str(folder), *ASK, "--json", "--slices", "all"]) == 87
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert [(f["slice"], f["code"]) for f in summary["failed"]] == [(5, 20)]
    assert "1 files could not be read and 1 slices failed" in captured.err
    assert "Traceback" not in captured.err


def test_an_error_of_every_slice_is_that_error(session: FakeSession, folder: Path, capsys: Captured) -> None:
    session.error = InvalidInput("the model takes no pictures")
    assert main(["infer", str(folder), *ASK]) == 22
    assert capsys.readouterr().err == "edgemed: the model takes no pictures\n"


def test_options_of_single_images_are_wrong_usage(session: FakeSession, folder: Path) -> None:
    for option in (["--together"], ["--chat"], ["--router", "r.json"], ["--frame", "3"]):
        assert main(["infer", str(folder), *ASK, *option]) == 1


# --- files ------------------------------------------------------------------------------------------------------------


def test_results_go_to_a_folder_and_a_second_run_asks_nothing(
    session: FakeSession, folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    command = ["infer", str(folder), *ASK, "--slices", "all", "-o", str(out), "-q", "--json"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["ct.series.jsonl", "ct.slices.jsonl"]
    assert (out / "ct.series.jsonl").read_text("utf-8") == first
    assert len(session.asked) == 9
    assert main(command) == 0
    assert (capsys.readouterr().out, len(session.asked)) == (first, 9)
    assert main(["infer", str(folder), "--prompt", "Where is the spleen?", "-o", str(out), "-q", "--slices", "3"]) == 0
    assert len((out / "ct.slices.jsonl").read_text("utf-8").splitlines()) == 2


def test_overlays_and_the_report_are_written_for_slices_that_show_something(
    session: FakeSession, folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    command = ["infer", str(folder), *ASK, "-o", str(out), "--overlay", "--report", str(tmp_path / "r.json")]
    assert main(command) == 0
    assert sorted(p.name for p in out.glob("*.png")) == [f"ct.{k:04d}.overlay.png" for k in range(3, 7)]
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [len(r["outputs"]) for r in runs] == [0, 0, 1, 1, 1, 1, 0]


def test_a_region_is_carried_from_its_slice(session: FakeSession, folder: Path, capsys: Captured) -> None:
    command = ["infer", str(folder), *ASK, "--json", "--region", "box:2,1,6,4", "--frame", "4"]
    assert main(command) == 0
    assert lines(capsys)[-1]["structures"][0]["slices"] == [3, 4, 5, 6]
    assert len(session.asked) == 6


def test_several_inputs_go_on_after_one_that_fails(session: FakeSession, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["infer", str(tmp_path / "empty"), str(folder), *ASK, "-q"]) == 87
    assert len(session.asked) == 7


# --- results ----------------------------------------------------------------------------------------------------------


def test_a_series_of_three_slices_has_every_kind_of_result(
    session: FakeSession, tmp_path: Path, capsys: Captured
) -> None:
    made.write_series(tmp_path / "ct", 3, pixels=pictures((1, 2), 3), SliceThickness="2")
    out = tmp_path / "out"
    assert main(["infer", str(tmp_path / "ct"), *ASK, "-o", str(out), "--to", ",".join(KINDS)]) == 0
    captured = capsys.readouterr()
    names = [
        "series.jsonl", "seg.dcm", "sr.dcm", "gsps.dcm", "sc-1.dcm", "sc-2.dcm", "pdf.dcm", "fhir-r4b.json",
        "fhir-r5.json", "overlay-1.png", "overlay-2.png", "labels.nii.gz", "labels.json",
    ]  # fmt: skip
    assert captured.out.split("\n\n")[-1].splitlines() == [f"wrote {out / f'ct.{name}'}" for name in names]
    assert sorted(p.name for p in out.iterdir()) == sorted(f"ct.{name}" for name in ["slices.jsonl", *names])
    assert "Planted" not in captured.out + captured.err
    assert "Planted" in str(dcmread(out / "ct.sr.dcm").PatientName)


def test_masks_of_a_series_lie_where_their_slices_do(session: FakeSession, folder: Path, capsys: Captured) -> None:
    nibabel = pytest.importorskip("nibabel")
    out = folder.parent / "out"
    assert main(["infer", str(folder), *ASK, "-o", str(out), "--to", "seg,nifti", "--json"]) == 0
    *_, summary = lines(capsys)
    assert summary["results"] == [str(out / f"ct.{end}") for end in ("seg.dcm", "labels.nii.gz", "labels.json")]
    jsonschema.validate(summary, read_series_schema())
    assert summary["asked"] == list(range(1, 8))  # the label volume has all nine
    image = nibabel.load(out / "ct.labels.nii.gz")
    labels = np.asarray(image.dataobj)
    expected = np.stack([p >= 500 for p in pictures(range(3, 7), 9)], -1)
    np.testing.assert_array_equal(labels.transpose(1, 0, 2), expected)
    np.testing.assert_allclose(image.affine, np.diag((-0.5, -0.8, 2, 1)), atol=1e-6)
    seg = dcmread(out / "ct.seg.dcm")
    assert sorted(depths_of(seg)) == [6, 8, 10, 12]
    assert (seg.pixel_array == pictures((0,), 1)[0] // 500).all()


def depths_of(seg: Any) -> list[float]:
    groups = seg.PerFrameFunctionalGroupsSequence
    return [float(g.PlanePositionSequence[0].ImagePositionPatient[2]) for g in groups]


def test_an_archive_gives_the_same_objects_as_its_folder(session: FakeSession, folder: Path, capsys: Captured) -> None:
    path = folder.parent / "study.zip"
    with zipfile.ZipFile(path, "w") as file:
        for slice_file in sorted(folder.iterdir()):
            file.write(slice_file, f"Planted^Name/{slice_file.name}")
    out = folder.parent / "out"
    assert main(["infer", str(folder), str(path), *ASK, "-o", str(out), "--to", "seg,sc,sr"]) == 0
    for end in ("seg.dcm", "sr.dcm", "sc-1.dcm"):
        first, second = (dcmread(out / f"{name}.{end}") for name in ("ct", "study.zip"))
        assert first.SOPInstanceUID == second.SOPInstanceUID
    captured = capsys.readouterr()
    assert "Planted" not in captured.out + captured.err


def test_an_archive_is_named_in_errors_not_where_it_was_unpacked(
    session: FakeSession, folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(analysed: Any, *_: object, **__: object) -> None:
        raise InvalidInput(f"no seg can be made of {analysed[0].file}: its header is not what it needs")

    path = folder.parent / "study.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.write(folder / "s0009.dcm", "a.dcm")
    monkeypatch.setattr(edgemed.report.results, "write_results", refuse)
    given = ["--slices", "all", "-o", str(folder.parent / "out"), "--to", "seg"]
    assert main(["infer", str(path), *ASK, *given]) == 22
    assert f"no seg can be made of {path}/0000" in capsys.readouterr().err


def test_slices_with_a_gap_are_no_label_volume_and_it_is_told(
    session: FakeSession, folder: Path, capsys: Captured
) -> None:
    nibabel = pytest.importorskip("nibabel")
    (folder / "s0004.dcm").unlink()  # that at 10 mm
    out = folder.parent / "out"
    assert main(["infer", str(folder), *ASK, "-o", str(out), "--to", "seg,nifti", "--slices", "all"]) == 0
    err = capsys.readouterr().err
    assert "note: the slices are no volume; masks are those of each slice" in err
    assert "note: the images are no even stack: each has a label volume of its own" in err
    found = [nibabel.load(p) for p in sorted(out.glob("*.nii.gz"))]
    assert [(i.shape, i.affine[2, 3]) for i in found] == [((8, 6, 1), z) for z in (0, 2, 4, 6, 8, 12, 14, 16)]
    assert [int(np.asarray(i.dataobj).sum()) for i in found] == [0, 0, 0, 12, 12, 12, 0, 0]
    seg = dcmread(out / "ct.seg.dcm")
    assert sorted(depths_of(seg)) == [6, 8, 12]
    assert "DimensionOrganizationType" not in seg


def test_frames_of_one_file_have_one_seg_and_one_label_volume(session: FakeSession, tmp_path: Path) -> None:
    path = made.write_enhanced(tmp_path / "e.dcm", [(z, 1) for z in (4.0, 2.0, 0.0)])
    ds = dcmread(path)
    ds.PixelData = b"".join(p.astype("<u2").tobytes() for p in pictures((0, 1), 3))
    ds.save_as(path)
    out = tmp_path / "out"
    assert main(["infer", str(path), *ASK, "-q", "-o", str(out), "--to", "seg,nifti", "--slices", "all"]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        f"e.{end}" for end in ("labels.json", "labels.nii.gz", "seg.dcm", "slices.jsonl")
    ]
    assert sorted(depths_of(dcmread(out / "e.seg.dcm"))) == [2, 4]


def test_slices_that_were_not_asked_are_told(session: FakeSession, folder: Path, capsys: Captured) -> None:
    out = folder.parent / "out"
    assert main(["infer", str(folder), *ASK, "-o", str(out), "--to", "nifti", "--slices", "3,5"]) == 0
    assert "2 of 9 slices were asked; SEG and label volume tell of no other" in capsys.readouterr().err


def test_a_volume_file_has_json_nifti_and_png_in_its_own_space(session: FakeSession, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    data = np.stack(pictures(range(3, 7), 9), -1).transpose(1, 0, 2).astype(np.int16)
    path, out = tmp_path / "v.nii.gz", tmp_path / "out"
    nibabel.save(
        nibabel.Nifti1Image(data, np.array([[0.5, 0, 0, 3], [0, 0, 2, 4], [0, 0.8, 0, 5], [0, 0, 0, 1]])), path
    )
    assert main(["infer", str(path), *ASK, "-o", str(out), "--to", "json,nifti,png", "-q"]) == 0
    labels = nibabel.load(out / "v.nii.gz.labels.nii.gz")
    places = np.argwhere(np.asarray(labels.dataobj))
    expected = np.argwhere(data >= 500)
    mm = [
        np.round(nibabel.affines.apply_affine(affine, at), 3)
        for affine, at in ((labels.affine, places), (nibabel.load(path).affine, expected))
    ]
    assert {*map(tuple, mm[0])} == {*map(tuple, mm[1])}
    assert len([*out.glob("*.png")]) == 4


def test_a_volume_file_has_no_dicom_results_and_is_not_asked_about(
    session: FakeSession, tmp_path: Path, capsys: Captured
) -> None:
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 6, 3), np.int16), np.eye(4)), tmp_path / "v.nii")
    given = ["-o", str(tmp_path / "out"), "--to", "nifti,seg,sr"]
    assert main(["infer", str(tmp_path / "v.nii"), *ASK, *given]) == 22
    assert "v.nii is a volume, and seg, sr must refer to DICOM images" in capsys.readouterr().err
    assert (session.asked, [*(tmp_path / "out").iterdir()]) == ([], [])


@pytest.mark.slow
def test_liver_and_spleen_of_the_published_series_are_within_a_tenth(segmentator_files: Path, capsys: Captured) -> None:
    pytest.importorskip("onnxruntime")
    nibabel = pytest.importorskip("nibabel")
    series = str(segmentator_files / "example_ct_dicom")
    assert main(["infer", series, "--prompt", "Where are the liver and the spleen?", "--json", "-q"]) == 0
    summary = lines(capsys)[-1]
    image = nibabel.load(segmentator_files / "example_seg_dicom.nii.gz")
    labels = np.asarray(image.dataobj)
    voxel_ml = abs(np.linalg.det(image.affine)) / 1000
    found = {s["label"]: s["volume_ml"] for s in summary["structures"]}
    for name, label in (("liver", 5), ("spleen", 1)):
        assert found[name] == pytest.approx((labels == label).sum() * voxel_ml, rel=0.1)
