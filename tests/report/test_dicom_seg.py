"""Segmentations: bit-equal masks, codes with side, places in millimetres, overlap, LABELMAP, full frames."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from highdicom.seg import segread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgemed.report.results import Analysed, write_results

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "result_inputs.py"
_spec = importlib.util.spec_from_file_location("result_inputs", HELPER)
inputs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(inputs)

ROWS, COLUMNS = 16, 12


def write_seg(paths, regions_of, folder, **options):
    """Write one SEG; regions_of(k): the regions of slice k. Returns (it, notes)."""
    analysed = [Analysed(path, 0, inputs.answer("x", regions_of(k))) for k, path in enumerate(paths)]
    asked = inputs.options(**options)
    (written,) = write_results(analysed, folder, ("seg",), language="en", options=asked)
    return segread(written), asked.tell.__self__


def rotation(turns):
    """Return a rotation matrix of three angles in radians."""
    (a, b, c), eye = turns, np.eye(3)
    for axis, angle in ((0, a), (1, b), (2, c)):
        i, j = (k for k in range(3) if k != axis)
        one = np.eye(3)
        one[i, i] = one[j, j] = np.cos(angle)
        one[i, j], one[j, i] = -np.sin(angle), np.sin(angle)
        eye = eye @ one
    return eye


angles = st.floats(-3.1, 3.1)
lengths = st.floats(0.3, 4.0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.tuples(angles, angles, angles),
    flip=st.booleans(),
    spacing=st.tuples(lengths, lengths),
    gap=lengths,
    tilt=st.floats(-0.4, 0.4),
    count=st.integers(1, 4),
)
def test_centroids_agree_with_the_formula_and_with_nibabel(
    tmp_path_factory, turns, flip, spacing, gap, tilt, count
) -> None:
    """Flips, oblique planes, anisotropy, gantry tilt, single slices: to 0.01 mm."""
    nibabel = pytest.importorskip("nibabel")
    folder = tmp_path_factory.mktemp("geometry")
    axes = rotation(turns)
    along, down = axes[0], axes[1] * (-1 if flip else 1)
    step = np.cross(along, down) * gap + down * tilt * gap
    first = np.array([-30.0, 12.5, 7.0])
    paths = inputs.write_series(
        folder, count, spacing=spacing, step=step, first=first, orientation=[*along, *down],
        SliceThickness=f"{gap:.10g}",
    )  # fmt: skip
    masks = [inputs.ellipse(ROWS, COLUMNS, 0.3 + 0.1 * k, 0.6, 0.2, 0.3) for k in range(count)]
    analysed = [Analysed(p, 0, inputs.answer("x", [inputs.masked("liver", masks[k])])) for k, p in enumerate(paths)]
    points = [
        first + k * step + x * spacing[1] * along + y * spacing[0] * down
        for k, mask in enumerate(masks)
        for y, x in np.argwhere(mask)
    ]
    expected = np.mean(points, axis=0)

    seg, volume, _ = write_results(analysed, folder, ("seg", "nifti"), language="en", options=inputs.options())

    segmentation = segread(seg)
    found = []
    frames = segmentation.pixel_array.reshape(-1, ROWS, COLUMNS)
    for item, frame in zip(segmentation.PerFrameFunctionalGroupsSequence, frames, strict=True):
        shared = segmentation.SharedFunctionalGroupsSequence[0]
        place = np.array(item.PlanePositionSequence[0].ImagePositionPatient, float)
        cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
        row_mm, column_mm = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
        found += [place + x * column_mm * cosines[:3] + y * row_mm * cosines[3:] for y, x in np.argwhere(frame)]
    image = nibabel.load(volume)
    voxels = np.argwhere(image.get_fdata() > 0)
    ras = (np.c_[voxels, np.ones(len(voxels))] @ image.affine.T)[:, :3].mean(axis=0)

    np.testing.assert_allclose(np.mean(found, axis=0), expected, atol=0.01)
    np.testing.assert_allclose(ras * (-1, -1, 1), expected, atol=0.01)


def test_the_same_label_on_several_slices_is_one_segment(tmp_path) -> None:
    paths = inputs.write_series(tmp_path, 3)
    mask = inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.3, 0.3)
    names = ["liver", "Liver", "肝脏"]

    seg, _ = write_seg(paths, lambda k: [inputs.masked(names[k], mask)], tmp_path)

    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["liver"]
    assert seg.NumberOfFrames == 3


def test_sides_are_modifiers_of_anatomy_and_of_the_site_of_a_finding(tmp_path) -> None:
    mask = inputs.ellipse(ROWS, COLUMNS, 0.25, 0.5, 0.2, 0.2)
    other = mask[:, ::-1]

    seg, _ = write_seg(
        inputs.write_series(tmp_path, 1),
        lambda k: [inputs.masked("right kidney", mask), inputs.masked("left lung tumor", other)],
        tmp_path,
    )

    kidney, tumour = seg.SegmentSequence
    assert kidney.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"
    assert kidney.SegmentedPropertyTypeCodeSequence[0].CodeValue == "64033007"
    modifier = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (modifier.CodeValue, modifier.CodeMeaning) == ("24028007", "Right")
    assert tumour.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    assert tumour.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert tumour.AnatomicRegionSequence[0].CodeValue == "39607008"
    assert tumour.AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0].CodeValue == "7771000"
    assert [s.SegmentAlgorithmType for s in seg.SegmentSequence] == ["AUTOMATIC"] * 2
    assert kidney.SegmentAlgorithmName == "edgemed nano"
    assert len({s.TrackingUID for s in seg.SegmentSequence}) == 2


def test_a_name_without_a_code_keeps_its_words(tmp_path) -> None:
    mask = inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.3, 0.3)

    seg, _ = write_seg(inputs.write_series(tmp_path, 1), lambda k: [inputs.masked("奇怪的\\东西", mask)], tmp_path)

    assert seg.SegmentSequence[0].SegmentLabel == "奇怪的/东西"
    assert seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue == "91723000"


def overlapping(k):
    return [
        inputs.masked("liver", inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.4, 0.4)),
        inputs.masked("liver cyst", inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.2, 0.2)),
    ]


def test_overlapping_findings_keep_all_their_pixels(tmp_path) -> None:
    seg, notes = write_seg(inputs.write_series(tmp_path, 2), overlapping, tmp_path)

    assert seg.SegmentsOverlap == "YES"
    frames = seg.get_pixels_by_source_instance(["1.2.3.4.1", "1.2.3.4.2"])  # [images, rows, columns, segments]
    for index, region in enumerate(overlapping(0)):
        for image in range(2):
            np.testing.assert_array_equal(frames[image, ..., index], region.mask)
    assert notes == []


def test_in_a_labelmap_the_smaller_finding_is_on_top(tmp_path) -> None:
    seg, notes = write_seg(inputs.write_series(tmp_path, 2), overlapping, tmp_path, labelmap=True)

    liver, cyst = (region.mask for region in overlapping(0))
    assert seg.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.7"
    np.testing.assert_array_equal(seg.pixel_array[0], np.where(cyst, 2, liver))
    assert any("overlap" in note for note in notes)


def test_empty_frames_are_written_where_they_are_asked_for(tmp_path) -> None:
    paths = inputs.write_series(tmp_path, 3)
    regions = [inputs.masked("liver", inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.3, 0.3))]

    some, _ = write_seg(paths, lambda k: regions if k == 1 else [], tmp_path)
    full, _ = write_seg(paths, lambda k: regions if k == 1 else [], tmp_path, seg_full_frames=True)

    assert (some.NumberOfFrames, full.NumberOfFrames) == (1, 3)
    for seg in (some, full):
        referenced = seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        assert {item.ReferencedSOPInstanceUID for item in referenced} == {"1.2.3.4.1", "1.2.3.4.2", "1.2.3.4.3"}


def test_a_missing_slice_thickness_is_told(tmp_path) -> None:
    mask = inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.3, 0.3)
    paths = inputs.write_series(tmp_path, 2, SliceThickness=None)

    seg, notes = write_seg(paths, lambda k: [inputs.masked("liver", mask)], tmp_path)

    assert float(seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness) == 0.5
    assert any("SliceThickness" in note for note in notes)
