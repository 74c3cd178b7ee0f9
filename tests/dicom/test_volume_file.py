"""Volume files: slices lie as shown, millimetres agree with other libraries, hostile files are refused."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemed.dicom import Limits
from edgemed.dicom.geometry_verdict import affine_of, centroid_mm
from edgemed.dicom.volume_file import is_volume_file, open_volume
from edgemed.errors import CannotRead, EdgemedError, InvalidInput, NoInput, ResourceLimit, UnsupportedDicom

nibabel = pytest.importorskip("nibabel")
nrrd = pytest.importorskip("nrrd")

SHAPE = (5, 6, 7)


def values(dtype: str = "int16") -> np.ndarray[Any, Any]:
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) - 100).astype(dtype)


def save(path: Path, data: np.ndarray[Any, Any], affine: np.ndarray[Any, Any] | None = None) -> Path:
    image = nibabel.Nifti1Image(data, np.diag((2.0, 2, 2, 1)) if affine is None else affine)
    nibabel.save(image, path)
    return path


def turns() -> list[np.ndarray[Any, Any]]:
    """Return the 48 ways in which the axes of a file may lie, 2 x 2.5 x 3 mm, not at the origin."""
    found = []
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        affine = np.eye(4)
        affine[:3, :3] = (np.eye(3)[:, order]) * np.array(signs) * (2.0, 2.5, 2.9)
        affine[:3, 3] = (11, -22, 33)
        found.append(affine)
    return found


@pytest.mark.parametrize("affine", turns()[::5])
def test_slices_of_every_file_order_lie_as_shown(tmp_path: Path, affine: np.ndarray[Any, Any]) -> None:
    data = values()
    with open_volume(save(tmp_path / "v.nii.gz", data, affine)) as volume:
        first = volume.places[0]
        assert (volume.plane, volume.verdict.kind) == ("axial", "uniform")
        assert first.orientation == pytest.approx((1, 0, 0, 0, 1, 0))
        lps = np.diag((-1, -1, 1, 1)) @ affine
        for index in range(volume.count):
            scan = volume.read(index)
            place = affine_of(volume.places[index])
            for row, column in ((0, 0), (scan.rows - 1, 1)):
                at = np.rint(np.linalg.solve(lps, place @ (column, row, 0, 1))).astype(int)
                assert scan.pixels[0, row, column] == data[tuple(at[:3])]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_centroids_agree_with_nibabel_and_simpleitk(tmp_path: Path, axis: int) -> None:
    sitk = pytest.importorskip("SimpleITK")
    data = np.zeros(SHAPE, np.uint8)
    data[1:3, 2:6, 3] = 1
    spacing = [1.0, 1.2, 0.9]
    spacing[axis] = 5.0
    turn = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, -1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * spacing, (-7, 8, 9)
    path = save(tmp_path / "v.nii", data, affine)
    with open_volume(path) as volume:
        assert volume.plane == ("sagittal", "coronal", "axial")[axis]
        masks = [volume.read(k).pixels[0] > 0 for k in range(volume.count)]
        ours = centroid_mm(zip(volume.places, masks, strict=True))
    ras = (affine @ np.c_[np.argwhere(data), np.ones(8)].T)[:3].mean(axis=1)
    assert ours == pytest.approx(ras * (-1, -1, 1), abs=0.01)
    image = sitk.ReadImage(str(path))
    points = [image.TransformIndexToPhysicalPoint([int(v) for v in i]) for i in np.argwhere(data)]
    assert ours == pytest.approx(np.mean(points, axis=0), abs=0.01)


def test_the_labels_of_the_published_series_lie_on_its_slices(segmentator_files: Path) -> None:
    """The same patient as DICOM and as NIfTI: slice k of one is slice k of the other."""
    from edgemed.dicom.series import find_series, open_source

    with open_source(segmentator_files / "example_ct_dicom") as source:
        (series,) = find_series(source.paths).series
    with open_volume(segmentator_files / "example_seg_dicom.nii.gz") as volume:
        for ours, theirs in zip(series.places, volume.places, strict=True):
            assert ours.position == pytest.approx(theirs.position, abs=0.01)
            assert ours.orientation == pytest.approx(theirs.orientation, abs=1e-6)
        assert series.places[0].spacing_mm == pytest.approx(volume.places[0].spacing_mm)


def test_nrrd_and_nifti_of_one_volume_agree(tmp_path: Path) -> None:
    data = values()
    affine = np.diag((2.0, 2, 3, 1))
    affine[:3, 3] = (5, 6, 7)
    header = {
        "space": "right-anterior-superior",
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
    }
    nrrd.write(str(tmp_path / "zip.nrrd"), data, {**header, "encoding": "gzip"})
    nrrd.write(str(tmp_path / "raw.nrrd"), data, {**header, "encoding": "raw"})
    paths = [save(tmp_path / "v.nii", data, affine), tmp_path / "zip.nrrd", tmp_path / "raw.nrrd"]
    seen = []
    for path in paths:
        with open_volume(path) as volume:
            seen.append(([volume.read(k).pixels for k in range(volume.count)], volume.places))
    for pixels, places in seen[1:]:
        assert np.array_equal(pixels, seen[0][0])
        assert np.array([p.position for p in places]) == pytest.approx(np.array([p.position for p in seen[0][1]]))


def test_values_are_rescaled(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(values(), np.eye(4))
    image.header.set_slope_inter(0.5, -1000)
    nibabel.save(image, tmp_path / "v.nii")
    stored = np.asarray(nibabel.load(tmp_path / "v.nii").dataobj)
    with open_volume(tmp_path / "v.nii") as volume:
        assert sorted(volume.read(0).pixels.ravel()) == pytest.approx(sorted(stored[:, :, 0].ravel()))


def test_a_volume_with_air_is_ct_and_others_have_no_modality(tmp_path: Path) -> None:
    with open_volume(save(tmp_path / "ct.nii", np.full(SHAPE, -1000, np.int16))) as volume:
        assert (volume.modality, volume.read(0).window.center) == ("CT", 40)  # type: ignore[union-attr]
        assert "CT in HU" in volume.notes[0]
    with open_volume(save(tmp_path / "mr.nii", values("float32"))) as volume:
        window = volume.read(0).window
        assert volume.modality == "OT"
        assert window is not None
        assert -100 <= window.low < window.high <= values().max()
        asked = volume.read(0, "lung").window
        assert asked is not None
        assert asked.width == 1500


def test_a_slice_knows_its_number_and_spacing(tmp_path: Path) -> None:
    with open_volume(save(tmp_path / "v.nii", values(), np.diag((1.5, 2.5, 3, 1)))) as volume:
        scan = volume.read(3)
        assert (scan.first_frame, scan.frames, scan.pixel_spacing_mm) == (3, 7, (2.5, 1.5))
        with pytest.raises(InvalidInput, match="slices 0 to 6"):
            volume.read(7)


def test_what_is_no_number_becomes_zero(tmp_path: Path) -> None:
    data = np.full(SHAPE, np.nan, np.float32)
    data[0] = np.inf
    with open_volume(save(tmp_path / "v.nii", data)) as volume:
        assert not volume.read(0).pixels.any()


@pytest.mark.parametrize(("name", "is_one"), [("a.nii", 1), ("A.NII.GZ", 1), ("a.nrrd", 1), ("a.gz", 0), ("a.dcm", 0)])
def test_volumes_are_known_by_their_name(name: str, is_one: int) -> None:
    assert is_volume_file(name) == bool(is_one)


# --- hostile and odd --------------------------------------------------------------------------------------------------


def refused(path: Path, kind: type[EdgemedError], told: str, limits: Limits | None = None) -> None:
    with pytest.raises(kind, match=told) as caught, open_volume(path, limits or Limits()):
        pass
    assert type(caught.value) is kind


def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((4096, 4096, 2000))
    header.set_data_dtype(np.uint8)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(1 << 20)))
    refused(path, ResourceLimit, "ask for 32000 MiB")


def test_what_a_gzip_stream_holds_beyond_the_volume_is_not_unpacked(tmp_path: Path) -> None:
    whole = save(tmp_path / "v.nii", values()).read_bytes()
    path = tmp_path / "v.nii.gz"
    path.write_bytes(gzip.compress(whole + bytes(200 << 20)))
    with open_volume(path, Limits(max_declared_bytes=1 << 20)) as volume:
        assert volume.count == 7


def test_a_volume_beyond_the_limits_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii", values())
    refused(path, ResourceLimit, "more than 10 pixels", Limits(max_pixels=10))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd"])
def test_a_truncated_volume_cannot_be_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"v{ending}"
    if ending == ".nrrd":
        space = {"space": "left-posterior-superior", "space directions": np.eye(3), "space origin": np.zeros(3)}
        nrrd.write(str(path), values(), {**space, "encoding": "raw"})
    else:
        save(path, values())
    path.write_bytes(path.read_bytes()[:-40])
    refused(path, CannotRead, "truncated")


def test_an_empty_and_a_missing_volume(tmp_path: Path) -> None:
    (tmp_path / "v.nii").write_bytes(b"")
    refused(tmp_path / "v.nii", NoInput, "empty")
    refused(tmp_path / "none.nii", CannotRead, "cannot be read")


@pytest.mark.parametrize("content", [b"text that is no volume", bytes(400), b"NRRD0004\nnothing", b"\x1f\x8bno"])
def test_what_is_no_volume_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "v.nii"
    path.write_bytes(content)
    with pytest.raises((InvalidInput, CannotRead)), open_volume(path):
        pass


def test_a_damaged_nifti_header_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii", values())
    whole = bytearray(path.read_bytes())
    whole[40:56] = b"\xff" * 16  # the shape
    path.write_bytes(bytes(whole))
    with pytest.raises((InvalidInput, UnsupportedDicom)), open_volume(path):
        pass


def test_a_flat_affine_is_refused(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(values(), None)
    image.header.set_sform(np.diag((1, 1, 0, 1)), 1)
    nibabel.save(image, tmp_path / "v.nii")
    refused(tmp_path / "v.nii", InvalidInput, "affine")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 4, 5, 6), "int16"), ((3, 4, 5), "complex64"), ((3, 4, 5, 1, 3), "uint8")]
)
def test_series_in_time_and_colour_are_not_supported(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    refused(save(tmp_path / "v.nii", np.zeros(shape, dtype)), UnsupportedDicom, "shape|type")


def test_a_nrrd_header_with_its_data_elsewhere_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "v.nrrd"
    path.write_text("NRRD0004\ntype: short\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: /etc/passwd\n\n")
    refused(path, UnsupportedDicom, "another file")


def test_a_nrrd_volume_without_a_place_is_not_supported(tmp_path: Path) -> None:
    nrrd.write(str(tmp_path / "v.nrrd"), values(), {"encoding": "raw"})
    refused(tmp_path / "v.nrrd", UnsupportedDicom, "where it lies")
