"""Every real file either is answered by the embedded model or ends in its documented exit code; no other exception.

The files: pydicom's own test files and character sets, the pydicom-data package, and, where EDGEMED_TEST_FILES names a
folder, deid-data and Debian's octave-dicom.
"""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemed.core import Prompt, Scan
from edgemed.dicom import Reader
from edgemed.errors import EdgemedError
from edgemed.infer import Session, open_session

# Path pattern -> exit code, the first that matches; a file that matches none must read.
MUST_FAIL = (
    # read to its end: 20
    (r"test_files/MR_truncated\.dcm", 20),
    (r"test_files/rtplan_truncated\.dcm", 20),
    # not what it must be: 22
    (r"\.(txt|md|py|pyc|toml|in|cfg|json|dump|icc|gz|zip)$|/(README|LICENSE|PKG-INFO)$", 22),
    (r"test_files/badVR\.dcm", 22),  # Number of Frames is no number
    (r"test_files/meta_missing_tsyntax\.dcm", 22),  # pixel data without rows
    (r"test_files/nested_priv_SQ\.dcm", 22),  # the same
    (r"test_files/no_meta\.dcm", 22),  # starts with a stray byte
    # no pixels: 85
    (r"/DICOMDIR[^/]*$", 85),
    (r"TINY_ALPHA/PT000000/", 85),
    (r"charset_files/chr(JapMulti|JapMultiExplicitIR6|KoreanMulti|SQEncoding1?)\.dcm", 85),
    (r"test_files/ExplVR_(Big|Lit)EndNoMeta\.dcm", 85),
    (r"test_files/(UN_sequence|empty_charset_LEI|no_meta_group_length|priv_SQ)\.dcm", 85),
    (r"test_files/(reportsi|reportsi_with_empty_number_tags|test-SR|waveform_ecg)\.dcm", 85),
    (r"/rt(plan|struct)\.dcm", 85),
    # asks for too much: 86
    (r"test_files/JPEG2000-embedded-sequence-delimiter\.dcm", 86),  # its SIZ says 3.7 billion columns
)
GREY_OR_COLOUR = {"float32", "uint8"}


def expected(path: Path) -> int:
    return next((code for pattern, code in MUST_FAIL if re.search(pattern, path.as_posix())), 0)


def package_folder(name: str, *parts: str) -> Path:
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the package {name} is not installed")
    return Path(next(iter(found.submodule_search_locations)), *parts)


def check_all(reader: Reader, folder: Path, at_least: int) -> None:
    """Read every file below `folder` and compare with the table; `at_least`: how many of them there must be."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert len(paths) >= at_least
    wrong = []
    for path in paths:
        code, text = outcome(reader, path)
        if code != expected(path) or "\n" in text:
            wrong.append(f"{path.relative_to(folder)}: {code} instead of {expected(path)} {text}")
    assert not wrong, "\n".join(wrong)


def outcome(reader: Reader, path: Path) -> tuple[int, str]:
    """Return (exit code or 0, message); checks the Scan and the embedded model's answer about it."""
    try:
        scan = reader.read(path)
        check_scan(scan)
        answer = session().ask(scan, Prompt("Which modality is this, and where is the liver?", frame=scan.first_frame))
    except EdgemedError as error:
        return error.exit_code, str(error)
    assert answer.text
    assert "<" not in answer.text
    return 0, ""


@cache
def session() -> Session:
    return open_session("nano", device="cpu")


def check_scan(scan: Scan) -> None:
    assert scan.pixels.dtype.name in GREY_OR_COLOUR
    assert np.isfinite(scan.pixels).all()
    assert scan.shown(0).shape == (scan.rows, scan.columns, 3)
    # A window that shows nothing of a scan with content is a wrong window.
    assert scan.pixels.min() == scan.pixels.max() or scan.rows < 32 or scan.shown(0).std() > 0


def test_pydicom_test_files(reader: Reader) -> None:
    check_all(reader, package_folder("pydicom", "data", "test_files"), 160)


def test_pydicom_character_sets(reader: Reader) -> None:
    check_all(reader, package_folder("pydicom", "data", "charset_files"), 15)


def test_pydicom_data(reader: Reader) -> None:
    check_all(reader, package_folder("data_store", "data"), 60)


@pytest.fixture
def fetched() -> Path:
    folder = os.environ.get("EDGEMED_TEST_FILES", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("EDGEMED_TEST_FILES names no folder with deid-data and octave-dicom")
    return Path(folder)


def test_deid_data(reader: Reader, fetched: Path) -> None:
    found = sorted(fetched.rglob("deid_data/data"))
    if not found:
        pytest.skip("deid-data is not in EDGEMED_TEST_FILES")
    check_all(reader, found[0], 15)


def test_octave_dicom(reader: Reader, fetched: Path) -> None:
    found = sorted(fetched.rglob("imdata"))
    if not found:
        pytest.skip("octave-dicom is not in EDGEMED_TEST_FILES")
    check_all(reader, found[0], 5)


def values(reader: Reader, name: str) -> np.ndarray[Any, Any]:
    pixels: np.ndarray[Any, Any] = reader.read(package_folder("data_store", "data", name)).pixels[0]
    return pixels.astype(float)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("emri_small.dcm", "emri_small_big_endian.dcm"),
        ("emri_small.dcm", "emri_small_RLE.dcm"),
        ("emri_small.dcm", "emri_small_jpeg_ls_lossless.dcm"),
        ("emri_small.dcm", "emri_small_jpeg_2k_lossless.dcm"),
        ("OBXXXX1A.dcm", "OBXXXX1A_expb.dcm"),
        ("OBXXXX1A.dcm", "OBXXXX1A_rle.dcm"),
        ("gdcm-US-ALOKA-16.dcm", "gdcm-US-ALOKA-16_big.dcm"),
        ("SC_rgb.dcm", "SC_rgb_expb.dcm"),
        ("SC_rgb.dcm", "SC_rgb_16bit.dcm"),
        ("SC_rgb.dcm", "SC_rgb_32bit.dcm"),
        ("color-pl.dcm", "color-px.dcm"),
        ("liver.dcm", "liver_expb.dcm"),
        ("693_UNCR.dcm", "693_J2KR.dcm"),
        ("MR2_UNCR.dcm", "MR2_J2KR.dcm"),
        ("RG3_UNCR.dcm", "RG3_J2KR.dcm"),
        ("US1_UNCR.dcm", "US1_J2KR.dcm"),
    ],
)
def test_the_same_image_is_the_same_in_every_encoding(reader: Reader, one: str, other: str) -> None:
    np.testing.assert_array_equal(values(reader, one), values(reader, other))


@pytest.mark.parametrize(
    "name",
    [
        # JPEG: colour transform said by the header, by APP14, by neither; odd size; subsampled; 12 bits; lossless
        "SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_dcmtk_+eb+cy+n2.dcm",
        "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_+eb+cy+s2.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm",
        "SC_jpeg_no_color_transform.dcm", "SC_jpeg_no_color_transform_2.dcm", "SC_rgb_jpeg_app14_dcmd.dcm",
        "SC_rgb_jpeg.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_jpeg_lossy_gdcm.dcm", "SC_rgb_small_odd_jpeg.dcm",
        "examples_ybr_color.dcm", "JPEG-lossy.dcm", "JPGExtended.dcm", "JPEG-LL.dcm", "JPGLosslessP14SV1_1s_1f_8b.dcm",
        "SC_rgb_jpeg_gdcm.dcm",
        # JPEG-LS and JPEG 2000: near lossless, sign or depth other than the header's, colour transforms
        "JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm", "SC_rgb_jls_lossy_line.dcm",
        "SC_rgb_jls_lossy_sample.dcm", "MR_small_jpeg_ls_lossless.dcm", "J2K_pixelrep_mismatch.dcm",
        "GDCMJ2K_TextGBR.dcm", "693_J2KI.dcm", "JPEG2000.dcm", "SC_rgb_gdcm_KY.dcm", "examples_jpeg2k.dcm",
        "RG1_J2KI.dcm", "US1_J2KI.dcm", "bad_sequence.dcm",
        # others: overlays, palettes, 422, big endian, deflated, padded
        "MR-SIEMENS-DICOM-WithOverlays.dcm", "examples_overlay.dcm", "examples_palette.dcm", "OT-PAL-8-face.dcm",
        "SC_ybr_full_422_uncompressed.dcm", "ExplVR_BigEnd.dcm", "image_dfl.dcm", "MR_small_padded.dcm",
    ],
)  # fmt: skip
def test_a_second_decoder_shows_the_same(reader: Reader, name: str) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed (extra: edgemed[test])")
    path = package_folder("pydicom", "data", "test_files", name)
    path = path if path.exists() else package_folder("data_store", "data", name)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    scan = reader.read(path)
    np.testing.assert_array_equal(scan.pixels[0], expected.reshape((-1, *scan.pixels.shape[1:]))[0])
    truth = values(reader, "SC_rgb.dcm")
    if name.startswith("SC_rgb_") and scan.pixels.shape[1:] == truth.shape:  # that decoder may be the same: the bars
        assert np.abs(scan.pixels[0] - truth).mean() < 3


def test_last_frame_of_a_compressed_cine_is_reached(reader: Reader) -> None:
    path = package_folder("data_store", "data", "color3d_jpeg_baseline.dcm")
    first, last = reader.read(path), reader.read(path, frame=119)
    assert (first.frames, last.first_frame) == (120, 119)
    assert not np.array_equal(first.pixels, last.pixels)


def test_values_equal_pydicoms_where_pydicom_reads_them(reader: Reader) -> None:
    from pydicom import dcmread
    from pydicom.pixels import apply_modality_lut, pixel_array

    for name in ("CT_small.dcm", "MR_small.dcm", "JPEG2000.dcm", "image_dfl.dcm", "JPEGLSNearLossless_16.dcm"):
        path = package_folder("pydicom", "data", "test_files", name)
        ds = dcmread(path)
        np.testing.assert_array_equal(reader.read(path).pixels[0], apply_modality_lut(pixel_array(ds), ds))
