"""Each kind of file that cannot be read ends in its documented class, in one line without patient data."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from edgemed.dicom import Reader, read_scan
from edgemed.errors import CannotRead, EdgemedError, InvalidInput, NoInput, UnsupportedDicom

Write = Callable[..., Path]
IMAGE = np.arange(48, dtype=np.uint16).reshape(6, 8)


def refused(reader: Reader, path: Path, kind: type[EdgemedError], words: str, frame: int = 0) -> None:
    with pytest.raises(kind, match=words) as caught:
        reader.read(path, frame=frame)
    text = str(caught.value)
    assert type(caught.value) is kind and "\n" not in text and str(path) in text
    assert "lanted" not in text and "PLANTED" not in text


def test_missing_file(reader: Reader, tmp_path: Path) -> None:
    refused(reader, tmp_path / "none.dcm", CannotRead, "does not exist")


def test_name_with_a_null_byte_cannot_be_opened(reader: Reader) -> None:
    with pytest.raises(CannotRead, match="cannot be opened"):
        reader.read("a\0b")


def test_file_that_may_not_be_read(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(IMAGE)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    refused(reader, path, CannotRead, "Permission denied")


def test_folder(reader: Reader, tmp_path: Path) -> None:
    refused(reader, tmp_path, NoInput, "folder; pass the files")


def test_empty_file(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "empty.dcm"
    path.touch()
    refused(reader, path, NoInput, "is empty")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
def test_named_pipe_is_not_waited_for(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert stat.S_ISFIFO(path.stat().st_mode)
    refused(reader, path, InvalidInput, "not a plain file")


@pytest.mark.parametrize(
    "content", [b"hello", b"\0" * 4096, b"PK\x03\x04" + b"\0" * 99, b"%PDF-1.7", bytes(range(256)) * 9, b"\x08"]
)
def test_other_files_are_not_dicom(reader: Reader, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    refused(reader, path, InvalidInput, "not a DICOM file")


@pytest.mark.parametrize("sop_class", ["88.33", "481.5", "481.3", "9.1.1"], ids=["SR", "plan", "structures", "ECG"])
def test_objects_without_pixels_are_unsupported(reader: Reader, write_dicom: Write, sop_class: str) -> None:
    path = write_dicom(None, SOPClassUID="1.2.840.10008.5.1.4.1.1." + sop_class)
    refused(reader, path, UnsupportedDicom, "no pixels")


@pytest.mark.parametrize("keep", [-1, -40, -95, 403])
def test_truncated_native_file(reader: Reader, write_dicom: Write, keep: int) -> None:
    path = write_dicom(IMAGE)
    path.write_bytes(path.read_bytes()[:keep])
    refused(reader, path, CannotRead, "truncated")


def test_truncation_of_a_later_frame_leaves_the_earlier_readable(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(np.stack([IMAGE] * 3), frames=True)
    path.write_bytes(path.read_bytes()[:-10])
    assert reader.read(path, frame=1).frames == 3
    refused(reader, path, CannotRead, "frame 2", frame=2)


def test_truncated_compressed_file(reader: Reader, write_dicom: Write) -> None:
    import imagecodecs

    big = np.random.default_rng(0).integers(0, 4095, (64, 64)).astype(np.uint16)
    frame = bytes(imagecodecs.jpeg2k_encode(big, level=0, codecformat="j2k", reversible=True))
    path = write_dicom(big, syntax="1.2.840.10008.1.2.4.90", encoded=[frame])
    path.write_bytes(path.read_bytes()[:-500])
    refused(reader, path, CannotRead, "truncated")


def test_truncated_deflated_file(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(IMAGE, syntax="1.2.840.10008.1.2.1.99")
    path.write_bytes(path.read_bytes()[:-20])
    refused(reader, path, CannotRead, "truncated")


@pytest.mark.parametrize("syntax", ["4.50", "4.70", "4.80", "4.90", "4.201", "5"])
def test_noise_in_place_of_a_codestream_is_invalid(reader: Reader, write_dicom: Write, syntax: str) -> None:
    noise = np.random.default_rng(1).bytes(300)
    path = write_dicom(IMAGE, syntax="1.2.840.10008.1.2." + syntax, encoded=[noise])
    with pytest.raises(InvalidInput):
        reader.read(path)


def test_declared_length_of_4_gib_is_truncation(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(IMAGE)
    data = bytearray(path.read_bytes())
    data[-100:-96] = (0xFFFFFFF0).to_bytes(4, "little")  # the length of Pixel Data, before its 96 bytes
    path.write_bytes(data[:-32])
    refused(reader, path, CannotRead, "truncated")


@pytest.mark.parametrize("keyword", ["Rows", "Columns", "BitsAllocated"])
def test_missing_required_element_is_invalid(reader: Reader, write_dicom: Write, keyword: str) -> None:
    refused(reader, write_dicom(IMAGE, **{keyword: None}), InvalidInput, keyword)


@pytest.mark.parametrize("keyword", ["Rows", "Columns"])
def test_no_rows_or_columns_is_invalid(reader: Reader, write_dicom: Write, keyword: str) -> None:
    refused(reader, write_dicom(IMAGE, **{keyword: 0}), InvalidInput, "at least one of each")


@pytest.mark.parametrize("elements", [{"BitsAllocated": 12}, {"SamplesPerPixel": 4}, {"BitsStored": 20}])
def test_odd_bit_depths_are_unsupported(reader: Reader, write_dicom: Write, elements: dict[str, int]) -> None:
    refused(reader, write_dicom(IMAGE, **elements), UnsupportedDicom, "not supported")


@pytest.mark.parametrize("frame", [-1, 1, 10**9])
def test_frame_outside_the_file_is_invalid(reader: Reader, write_dicom: Write, frame: int) -> None:
    with pytest.raises(InvalidInput, match="frame"):
        reader.read(write_dicom(IMAGE), frame=frame)


def test_bad_palette_is_invalid(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(IMAGE, PhotometricInterpretation="PALETTE COLOR")
    refused(reader, path, InvalidInput, "palette")


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_missing_preamble_is_accepted(reader: Reader, write_dicom: Write, syntax: str) -> None:
    path = write_dicom(IMAGE, syntax=syntax, preamble=False)
    np.testing.assert_array_equal(reader.read(path).pixels[0], IMAGE)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
def test_missing_file_meta_is_guessed(reader: Reader, write_dicom: Write, syntax: str) -> None:
    path = write_dicom(IMAGE, syntax=syntax)
    data = path.read_bytes()
    meta = int.from_bytes(data[140:144], "little")
    path.write_bytes(data[144 + meta :])
    np.testing.assert_array_equal(reader.read(path).pixels[0], IMAGE)


def test_missing_transfer_syntax_of_compressed_pixels_is_guessed(reader: Reader, write_dicom: Write) -> None:
    import imagecodecs

    image = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    frame = bytes(imagecodecs.jpeg2k_encode(image, level=0, codecformat="j2k", reversible=True))
    path = write_dicom(image, syntax="1.2.840.10008.1.2.4.90", encoded=[frame])
    data = path.read_bytes()
    path.write_bytes(data[144 + int.from_bytes(data[140:144], "little") :])
    np.testing.assert_array_equal(reader.read(path).pixels[0], image)


def test_unreadable_optional_element_is_ignored(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(IMAGE, WindowCenter=7777, WindowWidth=8888, RescaleSlope=1)
    path.write_bytes(path.read_bytes().replace(b"7777", b"x?y!"))
    np.testing.assert_array_equal(reader.read(path).pixels[0], IMAGE)


def test_sequences_before_the_pixels_do_no_harm(reader: Reader, write_dicom: Write) -> None:
    inner = Dataset()
    inner.PatientName = "Planted^Inner"
    path = write_dicom(IMAGE, ReferencedStudySequence=Sequence([inner]))
    np.testing.assert_array_equal(reader.read(path).pixels[0], IMAGE)


def test_one_shot_reading_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(InvalidInput, match=r"x\.dcm: the file has no DICOM data set"):
        read_scan(path)
