"""`edgemed deid` on files made by the test: what it writes, prints and ends with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataset import FileMetaDataset

from edgemed.cli.deid import command
from edgemed.errors import BatchPartlyFailed


def write_scan(path: Path, uid: str) -> None:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()  # type: ignore[assignment]
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.6.1", uid
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientName, ds.Modality = "1.2.3", "1.2.3.5", "Doe^Jane", "US"
    ds.StudyDate = "20260131"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 8, 10, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = np.arange(80, dtype=np.uint8).tobytes()
    dcmwrite(path, ds, enforce_file_format=True)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    for number in range(2):
        write_scan(folder / f"{number}.dcm", f"1.2.3.5.{number}")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


def test_copies_and_report_are_written_and_warnings_told(study: Path, tmp_path: Path) -> None:
    done = run(study, "-o", tmp_path / "out", "--retain-dates", "full", "--blank", "0,0,5,2", "--blank", "6,6,2,2")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"2 written, 0 refused, 0 no DICOM; {tmp_path}/out/deid.json\n"
    assert done.stderr.count("warning: 2.25.") == 2 and "outside of the blanked regions" in done.stderr
    report = json.loads((tmp_path / "out" / "deid.json").read_text())
    assert (report["codes"], report["blanked"]) == (["113100", "113106"], [[0, 0, 5, 2], [6, 6, 2, 2]])
    ds = dcmread(tmp_path / "out" / report["files"][0]["file"])
    assert ds.StudyDate == "20260131" and "Doe" not in str(ds)
    assert not ds.pixel_array[:2, :5].any() and ds.pixel_array[2, 0] == 20


def test_a_key_file_makes_runs_agree(study: Path, tmp_path: Path) -> None:
    names = []
    for out in ("a", "b"):
        done = run(study, "-o", tmp_path / out, "--key", tmp_path / "site.key", "--json", "-q")
        assert done.stderr == ""
        names.append([f["file"] for f in json.loads(done.stdout)["files"]])
    assert names[0] == names[1]


def test_refused_files_are_named_to_the_user_and_end_in_their_own_code(study: Path, tmp_path: Path) -> None:
    whole = (study / "0.dcm").read_bytes()
    (study / "0.dcm").write_bytes(whole[:-9])
    done = run(study, "-o", tmp_path / "out")
    assert isinstance(done.exception, BatchPartlyFailed)
    assert f"refused: {study}/0.dcm: the pixel data is truncated" in done.stderr


def test_a_region_of_another_form_is_refused(study: Path, tmp_path: Path) -> None:
    done = run(study, "-o", tmp_path / "out", "--blank", "1,2,3")
    assert done.exit_code == 2 and "x,y,w,h" in done.stderr
