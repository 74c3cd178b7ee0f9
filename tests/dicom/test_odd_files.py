"""Odd and hostile files that archives hold: each is read right, or refused in one line under its documented code.

What the headers of real writers get wrong: file meta, offset tables, delimiters, lengths, character sets, overlays,
profiles. Bombs are in `test_limits`, series in `test_series`, decoders in `test_pixels`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import ImageCms
from pydicom import Dataset, dcmread
from pydicom.sequence import Sequence

from edgemed.core import Answer, Prompt, Provenance
from edgemed.dicom import Reader
from edgemed.dicom.series import find_series
from edgemed.errors import CannotRead, EdgemedError, InvalidInput
from edgemed.report.dicom_source import Analysed, read_groups
from edgemed.report.results import ResultOptions, write_results

Write = Callable[..., Path]
Array = np.ndarray[Any, Any]
IMAGE = np.arange(48, dtype=np.uint16).reshape(6, 8)
J2K = "1.2.840.10008.1.2.4.90"


def element(group: int, number: int, vr: bytes, value: bytes) -> bytes:
    """Return an explicit little endian element; long VRs have their two reserved bytes."""
    if vr in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"UR"):
        return struct.pack("<HH2sHI", group, number, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", group, number, vr, len(value)) + value


def parts(path: Path) -> tuple[bytes, bytes, bytes]:
    """Return (preamble and DICM with the group length, the rest of the file meta, the data set)."""
    data = path.read_bytes()
    end = 144 + int.from_bytes(data[140:144], "little")
    return data[:144], data[144:end], data[end:]


def analysed(path: Path) -> Analysed:
    """Return an answer about a file that names nothing."""
    provenance = Provenance("0.1.0", "native", "nano", "0" * 64, "onnxruntime", "CPU", {}, "auto", {}, {})
    return Analysed(path, 0, Answer("Nothing.", "Nothing.", (), provenance))


def item(**elements: Any) -> Dataset:
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


# --- file meta --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [-20, -1, 1, 40, 10_000], ids=lambda off: f"{off:+d}")
def test_a_wrong_length_of_the_file_meta_is_not_believed(reader: Reader, write_dicom: Write, off: int) -> None:
    path = write_dicom(IMAGE)
    start, meta, data = parts(path)
    path.write_bytes(start[:-4] + (len(meta) + off).to_bytes(4, "little") + meta + data)
    np.testing.assert_array_equal(reader.read(path).pixels[0], IMAGE)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_file_meta_without_its_length_is_read(reader: Reader, write_dicom: Write, syntax: str) -> None:
    path = write_dicom(IMAGE, syntax=syntax)
    start, meta, data = parts(path)
    path.write_bytes(start[:132] + meta + data)
    np.testing.assert_array_equal(reader.read(path).pixels[0], IMAGE)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_file_meta_in_implicit_vr_is_read(reader: Reader, write_dicom: Write, syntax: str) -> None:
    path = write_dicom(IMAGE, syntax=syntax)
    start, _, data = parts(path)
    uids = {0x02: b"1.2.840.10008.5.1.4.1.1.7\0", 0x03: b"1.2.3.4\0", 0x10: syntax.encode() + b"\0" * (len(syntax) % 2)}
    meta = b"".join(struct.pack("<HHI", 2, number, len(uid)) + uid for number, uid in uids.items())
    path.write_bytes(start[:132] + struct.pack("<HHII", 2, 0, 4, len(meta)) + meta + data)
    np.testing.assert_array_equal(reader.read(path).pixels[0], IMAGE)


@pytest.mark.parametrize("magic", [b"MZ\x90\0", b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"#!/bin/sh\n"])
def test_a_file_that_is_a_program_too_is_refused(reader: Reader, write_dicom: Write, magic: bytes) -> None:
    path = write_dicom(IMAGE)
    path.write_bytes(magic.ljust(128, b"\0") + path.read_bytes()[128:])
    with pytest.raises(InvalidInput, match="is a program as well") as caught:
        reader.read(path)
    assert "\n" not in str(caught.value)
    write_dicom(IMAGE, name="other.dcm")
    found = find_series([str(path), str(path.with_name("other.dcm"))])
    assert [file for file, _ in found.failed] == [str(path)]
    assert len(found.series) == 1


def test_a_preamble_of_a_tiff_and_one_of_noise_are_read(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(IMAGE)
    for start in (b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"\0\0\0\0noise"):
        path.write_bytes(start.ljust(128, b"\xa5") + path.read_bytes()[128:])
        np.testing.assert_array_equal(reader.read(path).pixels[0], IMAGE)


def test_a_result_has_nothing_of_the_preamble_of_its_source(write_dicom: Write, tmp_path: Path) -> None:
    source = write_dicom(IMAGE)
    source.write_bytes(b"II*\0".ljust(128, b"\xa5") + source.read_bytes()[128:])
    told = ResultOptions(prompt=Prompt("What is there?"), notice="", tell=lambda note: None)
    (sr,) = write_results([analysed(source)], tmp_path / "out", ("sr",), language="en", options=told)
    assert sr.read_bytes()[:132] == b"\0" * 128 + b"DICM"


# --- encapsulated frames ----------------------------------------------------------------------------------------------

FRAMES = np.stack([IMAGE.repeat(8, 0).repeat(8, 1) + 100 * n for n in range(3)])
STREAMS = [bytes(imagecodecs.jpeg2k_encode(f, level=0, codecformat="j2k", reversible=True)) for f in FRAMES]
STREAMS = [s + b"\0" * (len(s) % 2) for s in STREAMS]
END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def fragment(data: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(data)) + data


def encapsulated(write_dicom: Write, body: bytes, **elements: Any) -> Path:
    """Return three JPEG 2000 frames whose Pixel Data holds `body`, delimiter included, in place of what it should."""
    path = write_dicom(FRAMES, frames=True, syntax=J2K, encoded=STREAMS, **elements)
    data = path.read_bytes()
    at = data.index(b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff") + 12
    path.write_bytes(data[:at] + body)
    return path


def offsets(*values: int) -> bytes:
    return fragment(struct.pack(f"<{len(values)}I", *values))


STARTS = [sum(8 + len(s) for s in STREAMS[:n]) for n in range(3)]
BODY = b"".join(map(fragment, STREAMS))


@pytest.mark.parametrize(
    "body",
    [
        offsets(*STARTS) + BODY + END,
        offsets() + BODY + END,
        offsets() + BODY,  # no delimiter: the file ends
        offsets(*STARTS) + BODY,
        offsets() + fragment(STREAMS[0][:50]) + b"".join(map(fragment, (STREAMS[0][50:], *STREAMS[1:]))) + END,
    ],
    ids=["table", "empty table", "no delimiter", "table, no delimiter", "a frame in two fragments"],
)
def test_frames_are_found_however_they_are_wrapped(reader: Reader, write_dicom: Write, body: bytes) -> None:
    path = encapsulated(write_dicom, body)
    for n in (2, 0, 1):
        np.testing.assert_array_equal(reader.read(path, frame=n).pixels[0], FRAMES[n])


def test_an_extended_offset_table_is_followed(reader: Reader, write_dicom: Write) -> None:
    table = {
        "ExtendedOffsetTable": struct.pack("<3Q", *STARTS),
        "ExtendedOffsetTableLengths": struct.pack("<3Q", *map(len, STREAMS)),
    }
    path = encapsulated(write_dicom, offsets() + BODY + END, **table)
    for n in (2, 0, 1):
        np.testing.assert_array_equal(reader.read(path, frame=n).pixels[0], FRAMES[n])


WRONG = {
    "beyond the end": (0, STARTS[1], 1 << 30),
    "inside a frame": (0, STARTS[1] + 7, STARTS[2]),
    "backwards": (STARTS[2], STARTS[1], 0),
    "one too few": tuple(STARTS[:2]),
    "all zero": (0, 0, 0),
}


def read_or_refused(reader: Reader, path: Path) -> None:
    """Check that each frame is the right one or an error, and that there is at least one of those."""
    told = []
    for n in range(3):
        try:
            np.testing.assert_array_equal(reader.read(path, frame=n).pixels[0], FRAMES[n])
        except EdgemedError as error:
            told.append((error.exit_code, str(error)))
    assert told
    assert all(code in (20, 22) and "\n" not in text for code, text in told)


@pytest.mark.parametrize("table", WRONG.values(), ids=WRONG)
def test_a_wrong_offset_table_never_gives_another_frame(
    reader: Reader, write_dicom: Write, table: tuple[int, ...]
) -> None:
    path = encapsulated(write_dicom, offsets(*table) + BODY + END)
    read_or_refused(reader, path)


@pytest.mark.parametrize("table", WRONG.values(), ids=WRONG)
def test_a_wrong_extended_table_never_gives_another_frame(
    reader: Reader, write_dicom: Write, table: tuple[int, ...]
) -> None:
    elements = {
        "ExtendedOffsetTable": struct.pack(f"<{len(table)}Q", *table),
        "ExtendedOffsetTableLengths": struct.pack("<3Q", *map(len, STREAMS)),
    }
    path = encapsulated(write_dicom, offsets() + BODY + END, **elements)
    read_or_refused(reader, path)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (offsets() + fragment(b"") * 3 + END, InvalidInput),
        (offsets() + END, InvalidInput),
        (END, InvalidInput),
        (b"", CannotRead),
        (offsets() + BODY[: STARTS[2] + 40], CannotRead),
        (offsets() + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + STREAMS[0] + END, EdgemedError),
        (b"\0" * 200, InvalidInput),
    ],
    ids=["empty fragments", "no fragments", "delimiter alone", "nothing", "cut", "fragment without length", "zeros"],
)
def test_pixel_data_without_its_frames_is_refused(
    reader: Reader, write_dicom: Write, body: bytes, kind: type[EdgemedError]
) -> None:
    with pytest.raises(kind) as caught:
        reader.read(encapsulated(write_dicom, body), frame=2)
    assert caught.value.exit_code in (20, 22) and "\n" not in str(caught.value)


def test_the_last_frame_of_a_file_beyond_4_gib_is_read(reader: Reader, write_dicom: Write, tmp_path: Path) -> None:
    side, frames = 4096, 140  # 4.4 GiB of 16-bit frames, of which the disk holds the last row alone
    source = write_dicom(IMAGE, Rows=side, Columns=side, NumberOfFrames=frames)
    data = source.read_bytes()[: -IMAGE.nbytes]
    path = tmp_path / "large.dcm"
    with open(path, "wb") as file:
        file.write(data[:-4] + (0xFFFFFFFE).to_bytes(4, "little"))
        file.truncate(len(data) + 0xFFFFFFFE)
        last = (0xFFFFFFFE // (2 * side * side)) - 1
        file.seek(len(data) + (last + 1) * 2 * side * side - 2)
        file.write(b"\x39\x30")
    if os.stat(path).st_blocks * 512 > 1 << 24:
        pytest.skip("this file system keeps no holes")
    scan = reader.read(path, frame=last)
    assert scan.pixels[0, -1, -1] == 12345
    assert scan.pixels.sum() == 12345
    with pytest.raises(CannotRead, match="truncated"):
        reader.read(path, frame=frames - 1)


# --- elements ---------------------------------------------------------------------------------------------------------


def with_elements(path: Path, *elements: bytes) -> Path:
    """Put encoded elements into the data set of a file, in the order of their tags; return it."""
    start, meta, data = parts(path)
    kept, at = [], 0
    while at < len(data):
        long = data[at + 4 : at + 6] in (b"OB", b"OW", b"SQ", b"UN")
        size = struct.unpack_from("<I", data, at + 8)[0] + 12 if long else struct.unpack_from("<H", data, at + 6)[0] + 8
        kept.append(data[at : at + size])
        at += size
    kept = sorted([*kept, *elements], key=lambda encoded: struct.unpack_from("<HH", encoded))
    path.write_bytes(start + meta + b"".join(kept))
    return path


@pytest.mark.parametrize(
    "encoded",
    [
        element(0x0018, 0x0050, b"DS", b"thick!"),
        element(0x0020, 0x0013, b"IS", b"9e99999 "),
        element(0x0020, 0x0032, b"DS", b"1\\2"),
        element(0x0008, 0x0020, b"DA", b"20261301Planted^"),
        element(0x0010, 0x0010, b"PN", b"A" * 60_000),
        element(0x0010, 0x0020, b"LO", b"\xff\xfe\x80" * 2),
        element(0x0009, 0x0010, b"LO", b"EDGEMED TEST") + element(0x0009, 0x1001, b"UN", b"\xfe\xff" * 40),
        element(0x0009, 0x0010, b"LO", b"EDGEMED TEST")
        + element(0x0009, 0x1002, b"SQ", fragment(element(0x0010, 0x0010, b"PN", b"Planted^"))),
        element(0x0020, 0x9222, b"UN", fragment(struct.pack("<HHI", 0x0008, 0x0060, 2) + b"CT")),
        element(0x0008, 0x0005, b"CS", b"ISO_IR 100\\GB18030\\NONSENSE "),
        element(0x0008, 0x0005, b"CS", b"NO SUCH SET ") + element(0x0008, 0x103E, b"LO", "肝脏".encode("gb18030")),
    ],
    ids=["DS", "IS", "too few values", "DA", "60 kB of a name", "bytes of no set", "private UN", "private sequence",
         "sequence as UN", "sets that exclude each other", "an unknown set"],
)  # fmt: skip
def test_elements_that_are_wrong_and_not_needed_are_ignored(reader: Reader, write_dicom: Write, encoded: bytes) -> None:
    scan = reader.read(with_elements(write_dicom(IMAGE), encoded))
    np.testing.assert_array_equal(scan.pixels[0], IMAGE)


@pytest.mark.parametrize(
    ("keyword", "vr", "value"), [(0x0010, b"US", b"abc"), (0x0010, b"UT", b"many"), (0x0101, b"CS", b"lots")]
)
def test_elements_that_are_wrong_and_needed_are_refused(
    reader: Reader, write_dicom: Write, keyword: int, vr: bytes, value: bytes
) -> None:
    path = write_dicom(IMAGE)
    data = path.read_bytes()
    at = data.index(struct.pack("<HH", 0x0028, keyword))
    path.write_bytes(data[:at] + element(0x0028, keyword, vr, value) + data[at + 10 :])
    with pytest.raises(EdgemedError) as caught:
        reader.read(path)
    assert caught.value.exit_code == 22 and "\n" not in str(caught.value)


def test_a_palette_without_entries_is_invalid(reader: Reader, write_dicom: Write) -> None:
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        elements[f"{name}PaletteColorLookupTableData"] = b""
    with pytest.raises(InvalidInput, match="palette"):
        reader.read(write_dicom(IMAGE.astype(np.uint8), **elements))


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", J2K])
def test_a_sign_or_depth_that_the_codestream_has_otherwise(reader: Reader, write_dicom: Write, syntax: str) -> None:
    """The bits of the codestream are the bits of the header: 12-bit unsigned in a stream that says 16-bit signed."""
    stored = (np.arange(64 * 64).reshape(64, 64) % 4096).astype(np.int16)
    encoded = [bytes(imagecodecs.jpeg2k_encode(stored, level=0, codecformat="j2k", reversible=True))]
    path = write_dicom(stored, syntax=syntax, encoded=encoded if syntax == J2K else (), BitsStored=12,
                       PixelRepresentation=0)  # fmt: skip
    np.testing.assert_array_equal(reader.read(path).pixels[0], stored)


# --- overlays, shutters, regions, profiles: beside the pixels ---------------------------------------------------------


def overlay(rows: int, columns: int, frames: int) -> dict[int, Any]:
    """Return the elements of an overlay plane that covers everything (PS3.3 C.9.2), by element number."""
    packed = b"\xff" * ((rows * columns * frames + 15) // 16 * 2)
    return {0x10: rows, 0x11: columns, 0x15: str(frames), 0x40: "G", 0x50: [1, 1], 0x51: 1, 0x100: 1, 0x102: 0,
            0x3000: packed}  # fmt: skip


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4"])
@pytest.mark.parametrize("frames", [1, 3])
def test_an_overlay_does_not_reach_the_pixels(reader: Reader, write_dicom: Write, dtype: str, frames: int) -> None:
    image = IMAGE.astype(dtype)
    pixels = np.stack([image, image + 1, image + 2]) if frames > 1 else image
    path = write_dicom(pixels, frames=frames > 1)
    ds = dcmread(path)
    for group in (0x6000, 0x6002):
        for number, value in overlay(6, 8, frames).items():
            vr = {0x15: "IS", 0x40: "CS", 0x50: "SS", 0x3000: "OW"}.get(number, "US")
            ds.add_new((group, number), vr, value)
    ds.save_as(path)
    scan = reader.read(path, frame=frames - 1)
    np.testing.assert_array_equal(scan.pixels[0], pixels[-1] if frames > 1 else pixels)
    assert scan.warnings == ("overlay",)


@pytest.mark.parametrize(("dtype", "low"), [("u2", 0), ("i2", -2048)])
def test_an_overlay_in_the_bits_above_the_stored_ones_is_masked(
    reader: Reader, write_dicom: Write, dtype: str, low: int
) -> None:
    image = np.linspace(low, low + 4095, 48).astype(dtype).reshape(6, 8)
    drawn = (image.view(np.uint16) & 0x0FFF) | np.where(np.eye(6, 8, dtype=bool), 0x1000, 0).astype(np.uint16)
    path = write_dicom(drawn.view(dtype), BitsStored=12)
    np.testing.assert_array_equal(reader.read(path).pixels[0], image)


def test_shutter_burned_in_and_ultrasound_regions_change_neither_pixels_nor_millimetres(
    reader: Reader, write_dicom: Write
) -> None:
    region = item(RegionSpatialFormat=1, RegionDataType=1, PhysicalUnitsXDirection=3, PhysicalUnitsYDirection=3,
                  PhysicalDeltaX=0.05, PhysicalDeltaY=0.05, RegionLocationMinX0=0, RegionLocationMinY0=0,
                  RegionLocationMaxX1=4, RegionLocationMaxY1=3)  # fmt: skip
    path = write_dicom(IMAGE, Modality="US", ShutterShape="RECTANGULAR", ShutterLeftVerticalEdge="2",
                       ShutterRightVerticalEdge="4", BurnedInAnnotation="YES",
                       SequenceOfUltrasoundRegions=Sequence([region]))  # fmt: skip
    scan = reader.read(path)
    np.testing.assert_array_equal(scan.pixels[0], IMAGE)
    assert scan.pixel_spacing_mm is None
    assert scan.warnings == ("burned in", "shutter")
    assert reader.read(write_dicom(IMAGE, BurnedInAnnotation="NO")).warnings == ()


@pytest.mark.parametrize("grouped", [False, True], ids=["of the image", "of its functional groups"])
def test_a_real_world_value_map_is_not_applied(reader: Reader, write_dicom: Write, grouped: bool) -> None:
    mapped = item(RealWorldValueFirstValueMapped=0, RealWorldValueLastValueMapped=255, RealWorldValueSlope=100.0,
                  RealWorldValueIntercept=7.0, LUTLabel="SUV", LUTExplanation="SUV")  # fmt: skip
    maps = {"RealWorldValueMappingSequence": Sequence([mapped])}
    rescale = {"RescaleSlope": 2, "RescaleIntercept": 1}
    if grouped:
        group = item(PixelValueTransformationSequence=Sequence([item(**rescale, RescaleType="US")]), **maps)
        path = write_dicom(IMAGE[None], frames=True, SOPClassUID="1.2.840.10008.5.1.4.1.1.130", Modality="PT",
                           SharedFunctionalGroupsSequence=Sequence([group]))  # fmt: skip
    else:
        path = write_dicom(IMAGE, Modality="PT", **rescale, **maps)
    np.testing.assert_array_equal(reader.read(path).pixels[0], IMAGE * 2.0 + 1)


def swapped_profile() -> bytes:
    """Return an ICC profile of a device whose red is sRGB's green, and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"none").replace(b"gXYZ", b"rXYZ").replace(b"none", b"gXYZ")


RGB = np.stack((IMAGE * 5, 255 - IMAGE * 5, IMAGE * 2), axis=-1).astype(np.uint8)


@pytest.mark.parametrize("slide", [False, True])
def test_colours_are_those_of_the_icc_profile(reader: Reader, write_dicom: Write, slide: bool) -> None:
    profile = {"ICCProfile": swapped_profile()}
    path = write_dicom(RGB, **({"OpticalPathSequence": Sequence([item(**profile)])} if slide else profile))
    shown = reader.read(path).pixels[0].astype(int)
    assert np.abs(shown - RGB[..., [1, 0, 2]]).max() <= 2


@pytest.mark.parametrize("kind", ["sRGB", "sRGB v4", "damaged", "empty", "of grey"])
def test_a_profile_of_srgb_and_one_that_is_none_change_nothing(reader: Reader, write_dicom: Write, kind: str) -> None:
    profile = {
        "sRGB": lambda: ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "sRGB v4": lambda: files("highdicom").joinpath("_icc_profiles", "sRGB_v4_ICC_preference.icc").read_bytes(),
        "damaged": lambda: swapped_profile()[:200],
        "empty": bytes,
        "of grey": lambda: swapped_profile().replace(b"RGB ", b"GRAY"),
    }[kind]()
    scan = reader.read(write_dicom(RGB, ICCProfile=profile))
    np.testing.assert_array_equal(scan.pixels[0], RGB)


def test_a_profile_of_a_grey_image_is_not_asked(reader: Reader, write_dicom: Write) -> None:
    scan = reader.read(write_dicom(IMAGE, ICCProfile=swapped_profile()))
    np.testing.assert_array_equal(scan.pixels[0], IMAGE)


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("GB18030", "gb18030"), ("GBK", "gbk"), ("ISO_IR 192", "utf-8"), ("\\ISO 2022 IR 58", "iso2022_58")],
)
def test_a_chinese_name_reaches_the_results_whatever_set_it_was_written_in(
    write_dicom: Write, name: str, encoding: str
) -> None:
    text = "王^小东"
    # ISO 2022 IR 58 is GB 2312 in G1, announced by ESC $ ) A after every delimiter (PS3.5 6.1.2.5.3).
    iso = b"^".join(b"\x1b$)A" + part.encode("gb2312") for part in text.split("^"))
    value = b"Wang^XiaoDong=" + (iso if encoding == "iso2022_58" else text.encode(encoding))
    path = with_elements(
        write_dicom(IMAGE, PatientName=None, SpecificCharacterSet=None),
        element(0x0008, 0x0005, b"CS", name.encode() + b" " * (len(name) % 2)),
        element(0x0010, 0x0010, b"PN", value + b" " * (len(value) % 2)),
    )
    answer = Answer(
        "", "", (), Provenance("0.1.0", "native", "nano", "0" * 64, "onnxruntime", "CPU", {}, "auto", {}, {})
    )
    groups, _ = read_groups([Analysed(path, 0, answer)])
    assert str(groups[0].header.PatientName) == f"Wang^XiaoDong={text}"
