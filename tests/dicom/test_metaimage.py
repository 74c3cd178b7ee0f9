"""MetaImage volumes: values and millimetres agree with SimpleITK's, hostile headers are refused."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemed.dicom import Limits
from edgemed.dicom.geometry_verdict import affine_of
from edgemed.dicom.volume_file import is_volume_file, open_volume
from edgemed.errors import CannotRead, EdgemedError, InvalidInput, NoInput, ResourceLimit, UnsupportedDicom

DATA = (np.arange(5 * 6 * 7).reshape(7, 6, 5) - 100).astype("<i2")  # [slices, rows, columns]
TURN = (0.96, 0.28, 0.0, -0.28, 0.96, 0.0, 0.0, 0.0, 1.0)


def header(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "ObjectType": "Image", "NDims": 3, "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "1 2 3",
        "ElementSpacing": "0.5 0.75 2", "DimSize": "5 6 7", "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL",
    }  # fmt: skip
    fields |= changes
    last = fields.pop("ElementDataFile")
    lines = [f"{k} = {v}\n" for k, v in fields.items() if v is not None]
    return "".join([*lines, f"ElementDataFile = {last}\n"]).encode()


@pytest.mark.parametrize("ending", [".mha", ".mhd"])
@pytest.mark.parametrize("compress", [False, True])
def test_values_and_places_are_those_of_simpleitk(tmp_path: Path, ending: str, compress: bool) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(DATA)
    image.SetSpacing((0.5, 0.75, 2.0))
    image.SetOrigin((-7.0, 8.0, 9.0))
    image.SetDirection((0.96, -0.28, 0.0, 0.28, 0.96, 0.0, 0.0, 0.0, 1.0))
    path = tmp_path / f"v{ending}"
    sitk.WriteImage(image, str(path), compress)
    assert is_volume_file(path)
    with open_volume(path) as volume:
        assert (volume.count, volume.plane, volume.verdict.kind) == (7, "axial", "uniform")
        assert volume.places[0].spacing_mm == pytest.approx((0.75, 0.5))
        assert (volume.data_path == str(path)) is (ending == ".mha")
        for index in range(volume.count):
            scan = volume.read(index)
            np.testing.assert_array_equal(scan.pixels[0], DATA[index])
            for row, column in ((0, 0), (5, 4), (2, 3)):
                ours = (affine_of(volume.places[index]) @ (column, row, 0, 1))[:3]
                assert ours == pytest.approx(image.TransformIndexToPhysicalPoint((column, row, index)), abs=1e-6)


def test_big_endian_a_header_size_and_two_axes(tmp_path: Path) -> None:
    (tmp_path / "v.raw").write_bytes(b"0123456" + DATA.astype(">i2").tobytes())
    for size in (7, -1):
        named = header(ElementDataFile="v.raw", BinaryDataByteOrderMSB="True", HeaderSize=size)
        (tmp_path / "v.mhd").write_bytes(named)
        with open_volume(tmp_path / "v.mhd") as volume:
            np.testing.assert_array_equal(volume.read(6).pixels[0], DATA[6])
    flat = header(NDims=2, DimSize="5 6", ElementSpacing="1 1", Offset="0 0", TransformMatrix="1 0 0 1")
    (tmp_path / "f.mha").write_bytes(flat + DATA[0].tobytes())
    with open_volume(tmp_path / "f.mha") as volume:
        np.testing.assert_array_equal(volume.read(0).pixels[0], DATA[0])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"ElementDataFile": "../v.raw"}, InvalidInput, "not beside it"),
        ({"ElementDataFile": "/etc/passwd"}, InvalidInput, "not beside it"),
        ({"ElementDataFile": "there.raw"}, CannotRead, "not beside it"),
        ({"ElementDataFile": "linked.raw"}, CannotRead, "not beside it"),
        ({"ElementDataFile": "LIST"}, UnsupportedDicom, "each slice"),
        ({"ElementDataFile": "v%03d.raw"}, UnsupportedDicom, "each slice"),
        ({"NDims": 4, "DimSize": "5 6 7 8"}, UnsupportedDicom, "4 axes"),
        ({"ElementNumberOfChannels": 3}, UnsupportedDicom, "single numbers"),
        ({"ElementType": "MET_OTHER"}, UnsupportedDicom, "single numbers"),
        ({"BinaryData": "False"}, UnsupportedDicom, "text"),
        ({"DimSize": "5 6 x"}, InvalidInput, "ValueError"),
        ({"DimSize": None}, InvalidInput, "KeyError"),
        ({"DimSize": "5 6 0"}, InvalidInput, "at least one"),
        ({"DimSize": "5 6 700"}, CannotRead, "truncated"),
        ({"DimSize": "50000 50000 7"}, ResourceLimit, "pixels"),
        ({"DimSize": "5000 5000 7000"}, ResourceLimit, "GiB"),
        ({"ElementSpacing": "0 1 1"}, InvalidInput, "affine"),
        ({"ElementSpacing": "nan 1 1"}, InvalidInput, "affine"),
        ({"TransformMatrix": "1 0 0"}, InvalidInput, "ValueError"),
        ({"CompressedData": "True", "DimSize": "4000 4000 7"}, ResourceLimit, "ask for"),
        ({"CompressedData": "True"}, CannotRead, "truncated or damaged"),
    ],
)
def test_hostile_and_odd_headers_are_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[EdgemedError], message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "v.raw").write_bytes(DATA.tobytes())
    (tmp_path / "in" / "linked.raw").symlink_to(tmp_path / "v.raw")
    path = tmp_path / "in" / "v.mha"
    path.write_bytes(header(**changes) + DATA.tobytes())
    with pytest.raises(kind, match=message), open_volume(path):
        pass


def test_a_file_cut_anywhere_ends_in_its_error(tmp_path: Path) -> None:
    whole = header(CompressedData="True") + zlib.compress(DATA.tobytes())
    path = tmp_path / "v.mha"
    path.write_bytes(whole)
    with open_volume(path) as volume:
        np.testing.assert_array_equal(volume.read(3).pixels[0], DATA[3])
    for size in (0, 5, 30, 200, len(whole) - 40, len(whole) - 20):
        path.write_bytes(whole[:size])
        with pytest.raises((CannotRead, InvalidInput, NoInput)), open_volume(path):
            pass
    path.write_bytes(b"ObjectType = Image\n" + b"a = b\n" * 1001)
    with pytest.raises(ResourceLimit, match="1000 lines"), open_volume(path):
        pass


def test_a_stream_of_zeros_is_unpacked_to_what_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "v.mha"
    path.write_bytes(header(CompressedData="True") + zlib.compress(bytes(50 << 20)))
    with open_volume(path, Limits(max_declared_bytes=1 << 20)) as volume:
        assert not volume.read(0).pixels.any()
