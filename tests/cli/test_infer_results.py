"""`edgemed infer --to`: which files are written, what they hold, what is refused before a model is asked.

The first tests ask the embedded model; the others a stand-in.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread, dcmwrite

import edgemed.infer
from edgemed.cli import main
from edgemed.core import Answer, Language, Prompt, Provenance, Region, Scan
from edgemed.infer import InferOptions
from edgemed.report import read_schema
from edgemed.report.results import KINDS
from edgemed.report.rle import from_rle

Captured = pytest.CaptureFixture[str]
ALL = ["--to", ",".join(KINDS)]
ENDS = [
    "answer.json", "seg.dcm", "sr.dcm", "gsps.dcm", "sc.dcm", "pdf.dcm", "labels.nii.gz", "labels.json",
    "fhir-r4b.json", "fhir-r5.json", "overlay.png",
]  # fmt: skip
QUESTION = "Where are the liver and the spleen?"
CODES = {"liver": "10200004", "spleen": "78961009"}
"""SNOMED CT."""


class FakeSession:
    """Finds a liver in the middle of every image; counts its questions."""

    def __init__(self) -> None:
        self.asked = 0

    def ask(self, scans: Sequence[Scan], prompt: Prompt, options: InferOptions) -> Answer:
        self.asked += 1
        used = Provenance("0", "fake", "fake", "0" * 64, "fake", "CPU", {}, "auto", {}, {"total": 2.0})
        if not scans:
            return Answer("liver", "liver", (), used)
        rows, columns = scans[0].rows, scans[0].columns
        mask = np.zeros((rows, columns), bool)
        mask[rows // 4 : rows // 2, columns // 4 : columns // 2] = True
        box = (columns // 4, rows // 4, columns // 2, rows // 2)
        return Answer("liver", "<ref>liver</ref>", (Region("liver", box, prompt.frame, mask, 0.5),), used)

    def notice(self, language: Language) -> str:
        return "not for diagnosis"


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    fake = FakeSession()
    monkeypatch.setattr(edgemed.infer, "open_session", lambda **options: fake)
    return fake


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.fromarray(np.arange(2400, dtype=np.uint8).reshape(40, 60)).save(path)
    return str(path)


def segments(path: Path) -> dict[str, Any]:
    """Return the masks of a SEG of one image by the code of what they show, as highdicom reads them."""
    from highdicom.seg import segread

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seg = segread(path)
        ((_, _, image),) = seg.get_source_image_uids()
        pixels = seg.get_pixels_by_source_instance([image])  # [images, rows, columns, segments]
    codes = [s.SegmentedPropertyTypeCodeSequence[0].CodeValue for s in seg.SegmentSequence]
    return {code: pixels[0, ..., index].astype(bool) for index, code in enumerate(codes)}


# --- the embedded model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named_scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample CT with a patient's name."""
    ds = dcmread(Path(__file__).resolve().parents[1] / "files" / "sample_ct.dcm")
    ds.PatientName, ds.PatientID = "Planted^Name", "PLANTED-ID"
    path = tmp_path_factory.mktemp("scan") / "ct.dcm"
    dcmwrite(path, ds, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def answered(named_scan: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(folder, stdout, stderr) of a run with every kind."""
    folder = tmp_path_factory.mktemp("results")
    return folder, *run_quietly("infer", str(named_scan), "--prompt", QUESTION, *ALL, "-o", str(folder))


def run_quietly(*arguments: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main(arguments) == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


def test_every_kind_is_written_and_told_one_a_line(answered: tuple[Path, str, str]) -> None:
    folder, out, err = answered
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"ct.{end}" for end in ENDS)
    assert out.split("\n\n")[-1].splitlines() == [f"wrote {folder / f'ct.{end}'}" for end in ENDS]
    assert {line.split(":")[0] for line in err.splitlines()} == {"note"}


def test_nothing_of_the_patient_is_told(answered: tuple[Path, str, str]) -> None:
    folder, out, err = answered
    assert "planted" not in (out + err).lower()
    assert b"Planted" not in (folder / "ct.answer.json").read_bytes()
    assert dcmread(folder / "ct.sr.dcm").PatientName == "Planted^Name"


def test_the_seg_has_the_masks_of_the_json_answer(answered: tuple[Path, str, str]) -> None:
    answer = json.loads((answered[0] / "ct.answer.json").read_text("utf-8"))
    jsonschema.validate(answer, read_schema())
    expected = {CODES[region["label"]]: from_rle(region["mask"]["rle"]) for region in answer["regions"]}
    found = segments(answered[0] / "ct.seg.dcm")
    assert found.keys() == expected.keys() == {*CODES.values()}
    for code, mask in expected.items():
        assert mask.sum() > 5000
        np.testing.assert_array_equal(found[code], mask)


def test_the_label_volume_lies_where_the_mask_does(answered: tuple[Path, str, str]) -> None:
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.load(answered[0] / "ct.labels.nii.gz")
    labels = np.asarray(image.dataobj)[:, :, 0].T
    for row in json.loads((answered[0] / "ct.labels.json").read_text("utf-8")):
        np.testing.assert_array_equal(labels == row["value"], segments(answered[0] / "ct.seg.dcm")[row["type"]])
    place = dcmread(answered[0] / "ct.seg.dcm").PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    np.testing.assert_allclose(image.affine[:3, 3] * (-1, -1, 1), place.ImagePositionPatient, atol=1e-3)


def test_the_report_has_the_codes_of_the_labels_and_refers_to_image_and_seg(answered: tuple[Path, str, str]) -> None:
    folder = answered[0]
    report = dcmread(folder / "ct.sr.dcm")
    values = {str(e.value) for e in report.iterall() if e.keyword in ("CodeValue", "ReferencedSOPInstanceUID")}
    assert {*CODES.values()} < values
    assert str(dcmread(folder / "ct.seg.dcm").SOPInstanceUID) in values


def test_a_second_run_gives_the_same_uids_and_json_tells_the_files(
    answered: tuple[Path, str, str], named_scan: Path, tmp_path: Path
) -> None:
    kinds = ("seg", "sr", "gsps", "sc", "pdf")
    asked = ["--prompt", QUESTION, "--to", "seg,sr", "--to", "gsps,sc,pdf", "-o", str(tmp_path), "-q"]
    out, err = run_quietly("infer", str(named_scan), *asked, "--json")
    told = json.loads(out)
    jsonschema.validate(told, read_schema())
    assert told["results"] == [str(tmp_path / f"ct.{kind}.dcm") for kind in kinds]
    assert err == ""
    for kind in kinds:
        first, second = (dcmread(folder / f"ct.{kind}.dcm") for folder in (answered[0], tmp_path))
        assert (first.SOPInstanceUID, first.SeriesInstanceUID) == (second.SOPInstanceUID, second.SeriesInstanceUID)


# --- a stand-in -------------------------------------------------------------------------------------------------------


def test_inputs_and_questions_do_not_share_files(
    session: FakeSession, sample_scan: str, tmp_path: Path, capsys: Captured
) -> None:
    copy = tmp_path / "b" / "sample_ct.dcm"
    copy.parent.mkdir()
    copy.write_bytes(Path(sample_scan).read_bytes())
    arguments = ["infer", sample_scan, str(copy), "--prompt", "A?", "--prompt", "B?", "-q", "--to", "seg"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["sample_ct-2.seg.dcm", "sample_ct-3.seg.dcm", "sample_ct-4.seg.dcm", "sample_ct.seg.dcm"]


def test_the_report_of_the_run_has_the_digests(session: FakeSession, sample_scan: str, tmp_path: Path) -> None:
    report = tmp_path / "run.json"
    arguments = ["infer", sample_scan, "--prompt", "?", "-q", "--to", "json,seg,nifti", "--report", str(report)]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    (run,) = json.loads(report.read_text("utf-8"))["runs"]
    assert run["outputs"].keys() == {"json", "seg.dcm", "labels.nii.gz", "labels.json"}


def test_options_reach_the_writers(session: FakeSession, sample_scan: str, tmp_path: Path) -> None:
    given = ["--to", "seg,nifti", "--labelmap", "--nrrd", "-o", str(tmp_path), "-q"]
    assert main(["infer", sample_scan, "--prompt", "?", *given]) == 0
    assert dcmread(tmp_path / "sample_ct.seg.dcm").SegmentationType == "LABELMAP"
    assert (tmp_path / "sample_ct.labels.seg.nrrd").is_file()


def test_a_picture_has_json_png_and_nifti(session: FakeSession, picture: str, tmp_path: Path) -> None:
    given = ["--to", "png,json,nifti", "--overlay", "-o", str(tmp_path / "out"), "-q"]
    assert main(["infer", picture, "--prompt", "?", *given]) == 0
    ends = ("answer.json", "labels.json", "labels.nii.gz", "overlay.png")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"picture.{end}" for end in ends]


def test_a_picture_has_no_dicom_results_and_is_not_asked_about(
    session: FakeSession, picture: str, tmp_path: Path, capsys: Captured
) -> None:
    assert main(["infer", picture, "--prompt", "?", "--to", "json,seg,fhir", "-o", str(tmp_path / "out")]) == 22
    assert "picture.png is a picture, and seg, fhir must refer to DICOM images" in capsys.readouterr().err
    assert (session.asked, [*(tmp_path / "out").iterdir()]) == (0, [])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--to", "seg"], "-o FOLDER"),
        (["--to", "seg,xml", "-o", "{}"], "'xml' is no kind of result; json, seg, sr, gsps, sc, pdf, nifti, fhir, png"),
        (["--to", "", "-o", "{}"], "'' is no kind of result"),
        (["--to", "sr", "--labelmap", "-o", "{}"], "--labelmap was given without --to seg"),
        (["--seg-full-frames"], "--seg-full-frames was given without --to seg"),
        (["--nrrd", "-o", "{}"], "--nrrd was given without --to nifti"),
        (["--to", "json,sr", "--together", "-o", "{}"], "--to sr was given with --together"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_read(
    session: FakeSession, tmp_path: Path, capsys: Captured, given: list[str], told: str
) -> None:
    missing, out = str(tmp_path / "missing.dcm"), str(tmp_path / "out")
    assert main(["infer", missing, "--prompt", "?", *(text.format(out) for text in given)]) == 1
    assert told in capsys.readouterr().err
    assert not Path(out).exists()


def test_without_an_image_there_is_json_alone(session: FakeSession, tmp_path: Path, capsys: Captured) -> None:
    assert main(["infer", "--prompt", "?", "--to", "json,sr", "-o", str(tmp_path)]) == 1
    assert main(["infer", "--prompt", "?", "--to", "json", "-o", str(tmp_path), "-q"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["answer.answer.json"]


@pytest.mark.parametrize(("kind", "library"), [("pdf", "reportlab"), ("fhir", "fhir")])
def test_a_missing_library_is_code_82_before_a_question(
    session: FakeSession,
    sample_scan: str,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    library: str,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["infer", sample_scan, "--prompt", "?", "--to", f"json,{kind}", "-o", str(tmp_path / "out")]) == 82
    assert f"infer --to {kind} needs {library}; pip install 'edgemed[results]'" in capsys.readouterr().err
    assert (session.asked, (tmp_path / "out").exists()) == (0, False)


def test_a_file_that_cannot_be_written_is_code_40_and_leaves_nothing_half_written(
    session: FakeSession, sample_scan: str, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "sample_ct.sr.dcm").mkdir()
    assert main(["infer", sample_scan, "--prompt", "?", "--to", "seg,sr,pdf", "-o", str(tmp_path)]) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sample_ct.seg.dcm", "sample_ct.sr.dcm"]
    assert segments(tmp_path / "sample_ct.seg.dcm").keys() == {CODES["liver"]}
    assert "it is a folder" in capsys.readouterr().err


def test_the_help_names_every_kind(capsys: Captured) -> None:
    assert main(["infer", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "json, seg, sr, gsps, sc, pdf (DICOM), nifti, fhir, png" in shown
    assert KINDS == ("json", "seg", "sr", "gsps", "sc", "pdf", "nifti", "fhir", "png")


def test_another_region_or_language_is_another_result(sample_scan: str, tmp_path: Path, capsys: Captured) -> None:
    asked = [
        ["--region", "box:120,180,260,300"],
        ["--region", "box:130,180,260,300"],
        ["--region", "box:130,180,260,300", "--lang", "zh"],
    ]
    uids = set()
    for i, options in enumerate(asked):
        folder = tmp_path / str(i)
        assert main(["infer", sample_scan, "--prompt", "What is this?", "--to", "sr", "-o", str(folder), *options]) == 0
        (path,) = folder.glob("*.sr.dcm")
        uids.add(dcmread(path).SOPInstanceUID)
    assert len(uids) == len(asked)
