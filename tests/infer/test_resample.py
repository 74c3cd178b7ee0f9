"""Masks of uneven stacks on even distances: places, volumes, NIfTI and SEG that agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import result_inputs as inputs

from edgemed.report.dicom_source import Analysed, Group, read_groups
from edgemed.report.results import write_groups
from edgemed.volume.resample import evenly

ROWS, COLUMNS = 16, 12
DISC = inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.25, 0.25)
SPOT = inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.1, 0.1)
DEPTHS = (0.0, 2.0, 4.0, 10.0, 12.0)


def stack(folder: Path, *, lean: float = 0.0, depths: tuple[float, ...] = DEPTHS) -> Group:
    """Return a series with a gap of three slices; the disc is on slices 1 to 3, the spot on slice 3."""
    analysed = []
    for k, depth in enumerate(depths):
        (folder / str(k)).mkdir()
        first = (-30.0, 12.5 + lean * depth, 7.0 + depth)
        (path,) = inputs.write_series(folder / str(k), 1, first=first, SOPInstanceUID=f"1.2.3.4.{k}")
        regions = [inputs.masked("liver", DISC)] if 1 <= k <= 3 else []
        regions += [inputs.masked("spleen", SPOT)] if k == 3 else []
        analysed.append(Analysed(path, 0, inputs.answer("x", regions)))
    (group,), _ = read_groups(analysed)
    return group


def test_planes_lie_at_the_median_distance_and_stand_for_the_nearest_image(tmp_path: Path) -> None:
    even = evenly(stack(tmp_path))
    assert even is not None and even.resampled
    assert [round(image.plane.depth - 7, 6) for image in even.images] == [0, 2, 4, 6, 8, 10, 12]  # type: ignore[union-attr]
    assert [image.file.parent.name for image in even.images] == ["0", "1", "2", "2", "3", "3", "4"]
    shown = [{r.label: r.mask.sum() for r in image.regions if r.mask is not None} for image in even.images]
    assert [labels.get("liver", 0) for labels in shown] == [0, *[DISC.sum()] * 5, 0]
    assert [labels.get("spleen", 0) for labels in shown] == [0, 0, 0, 0, SPOT.sum(), SPOT.sum(), 0]


def test_without_places_or_for_one_image_there_is_nothing_to_resample(tmp_path: Path) -> None:
    group = stack(tmp_path)
    assert evenly(Group(group.images[:1])) is None
    (lost,), _ = read_groups([Analysed(inputs.real_file("US1_UNCR.dcm"), 0, inputs.answer("x", []))])
    assert evenly(Group((*group.images, *lost.images))) is None


@pytest.mark.parametrize("lean", [0.0, 0.4])
def test_label_volume_and_seg_agree_in_the_patient(tmp_path: Path, lean: float) -> None:
    nibabel = pytest.importorskip("nibabel")
    segread = pytest.importorskip("highdicom").seg.segread
    even = evenly(stack(tmp_path, lean=lean))
    assert even is not None
    asked = inputs.options()
    files = write_groups([even], tmp_path / "out", ("seg", "nifti"), language="en", options=asked)
    seg_file, volume_file = (next(f for f in files if f.name.endswith(end)) for end in (".dcm", ".nii.gz"))
    assert len(files) == 3  # one volume, its table, one SEG

    image = nibabel.load(volume_file)
    labels = np.asarray(image.dataobj)
    assert labels.shape == (COLUMNS, ROWS, 7)
    axes = image.affine[:3, :3]
    np.testing.assert_allclose(axes.T @ axes, np.diag(np.square([0.5, 0.8, 2.0])), atol=1e-6)  # no shear is left
    theirs = (image.affine @ np.c_[np.argwhere(labels > 0), np.ones((labels > 0).sum())].T)[:3].mean(axis=1)

    seg = segread(seg_file)
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices == 2.0
    centres: list[Any] = []
    union: dict[tuple[float, ...], Any] = {}
    for frame, item in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        place = tuple(float(v) for v in item.PlanePositionSequence[0].ImagePositionPatient)
        union[place] = union.get(place, False) | (frame > 0)
    for place, mask in union.items():
        rows, columns = np.nonzero(mask)
        centres += [np.add(place, (0.5 * c, 0.8 * r, 0.0)) for r, c in zip(rows, columns, strict=True)]
    np.testing.assert_allclose(np.mean(centres, axis=0) * (-1, -1, 1), theirs, atol=0.01)


def test_the_seg_is_valid_and_has_uids_of_its_own(tmp_path: Path) -> None:
    dcmread = pytest.importorskip("pydicom").dcmread
    group = stack(tmp_path)
    even = evenly(group)
    assert even is not None
    (plain,) = write_groups([group], tmp_path / "a", ("seg",), language="en", options=inputs.options())
    (made,) = write_groups([even], tmp_path / "b", ("seg",), language="en", options=inputs.options())
    assert dcmread(plain).SOPInstanceUID != dcmread(made).SOPInstanceUID
    referenced = dcmread(made).ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert len(referenced) == len(DEPTHS)
    assert inputs.validator_errors(made) == []
