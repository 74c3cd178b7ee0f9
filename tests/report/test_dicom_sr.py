"""Structured reports: codes, boxes as polylines, sizes only with units that are known, every image referenced."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from highdicom.sr import srread

from edgemed.report.dicom_source import Group, read_groups
from edgemed.report.findings import Sizes, findings_of, sizes_of
from edgemed.report.results import Analysed, write_results

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "result_inputs.py"
_spec = importlib.util.spec_from_file_location("result_inputs", HELPER)
inputs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(inputs)

ROWS, COLUMNS = 16, 12
BOX = (1.5, 2.0, 7.25, 9.0)


def write_sr(paths, regions_of, folder, kinds=("sr",), language="en", text="Something."):
    analysed = [Analysed(path, 0, inputs.answer(text, regions_of(k))) for k, path in enumerate(paths)]
    written = write_results(analysed, folder, kinds, language=language, options=inputs.options())
    return srread(next(path for path in written if path.name.endswith("sr.dcm")))


def items(sr, name):
    """Return the content items anywhere in the report with this concept name."""
    return [
        item
        for element in sr.iterall()
        if element.keyword == "ContentSequence"
        for item in element.value
        if item.ConceptNameCodeSequence[0].CodeMeaning == name
    ]


def region(label, box=BOX):
    return inputs.Region(label, box)


def test_a_box_is_a_closed_polyline_from_corner_to_corner(tmp_path) -> None:
    sr = write_sr(inputs.write_series(tmp_path, 1), lambda k: [region("left kidney")], tmp_path)

    assert sr.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.34"
    (roi,) = items(sr, "Image Region")
    assert (roi.ValueType, roi.GraphicType) == ("SCOORD", "POLYLINE")
    assert list(roi.GraphicData) == [1.5, 2.0, 7.25, 2.0, 7.25, 9.0, 1.5, 9.0, 1.5, 2.0]
    assert roi.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.3.4.1"
    assert items(sr, "Geometric purpose of region")[0].ConceptCodeSequence[0].CodeMeaning == "Bounded by"
    (site,) = items(sr, "Finding Site")
    assert site.ConceptCodeSequence[0].CodeValue == "64033007"
    assert items(sr, "Laterality")[0].ConceptCodeSequence[0].CodeValue == "7771000"
    assert [item.TextValue for item in items(sr, "Algorithm Name")] == ["edgemed nano"] * 2


def test_without_a_frame_of_reference_it_is_a_comprehensive_sr(tmp_path) -> None:
    paths = inputs.write_series(tmp_path, 1, ImagePositionPatient=None)

    sr = write_sr(paths, lambda k: [region("liver")], tmp_path)

    assert sr.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.33"


def test_it_is_unverified_and_preliminary_and_says_so_in_words(tmp_path) -> None:
    sr = write_sr(inputs.write_series(tmp_path, 1), lambda k: [], tmp_path, language="zh")

    assert (sr.VerificationFlag, sr.PreliminaryFlag, sr.CompletionFlag) == ("UNVERIFIED", "PRELIMINARY", "COMPLETE")
    comments = [item.TextValue for item in items(sr, "Comment")]
    assert comments == ["AI 结果，不可用于诊断。nano is a demo.", "Something.\n这些图像上未标出任何区域。"]
    assert items(sr, "Language of Content Item and Descendants")[0].ConceptCodeSequence[0].CodeValue == "zh-CN"


def test_every_analysed_image_is_referenced_with_or_without_a_finding(tmp_path) -> None:
    paths = inputs.write_series(tmp_path, 3)

    sr = write_sr(paths, lambda k: [region("liver")] if k == 1 else [], tmp_path)

    (study,) = sr.CurrentRequestedProcedureEvidenceSequence
    referenced = {i.ReferencedSOPInstanceUID for i in study.ReferencedSeriesSequence[0].ReferencedSOPSequence}
    assert referenced == {"1.2.3.4.1", "1.2.3.4.2", "1.2.3.4.3"}
    assert len(items(sr, "Source of Measurement")) == 3


def test_a_mask_is_referred_to_as_a_segment_and_measured_once(tmp_path) -> None:
    mask = inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.4, 0.3)
    paths = inputs.write_series(tmp_path, 3)
    regions = [region("polyp"), inputs.masked("liver", mask)]

    sr = write_sr(paths, lambda k: regions, tmp_path, kinds=("seg", "sr"))

    (segment,) = items(sr, "Referenced Segment")
    assert segment.ReferencedSOPSequence[0].ReferencedSegmentNumber == 1
    (volume,) = items(sr, "Volume")
    value = volume.MeasuredValueSequence[0]
    assert float(value.NumericValue) == pytest.approx(3 * mask.sum() * 0.8 * 0.5 * 2.5, abs=0.01)
    assert value.MeasurementUnitsCodeSequence[0].CodeValue == "mm3"
    assert len(items(sr, "Long axis")) == 1
    assert len(items(sr, "Image Region")) == 6
    uids = {item.UID for item in items(sr, "Tracking Unique Identifier")}
    assert len(uids) == 3  # the answer, the polyp, the liver


@pytest.mark.parametrize("language", ["en", "zh"])
def test_findings_are_named_in_the_language_of_the_report(tmp_path, language) -> None:
    sr = write_sr(
        inputs.write_series(tmp_path, 1), lambda k: [region("右肾"), region("odd thing")], tmp_path, language=language
    )

    names = [item.TextValue for item in items(sr, "Tracking Identifier")][1:]
    assert names == [{"en": "right kidney", "zh": "右侧肾"}[language], "odd thing"]


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({}, {"area_mm2", "long_axis_mm", "short_axis_mm"}),
        ({"PixelSpacing": None}, set()),
        ({"PixelSpacing": ["0", "0"]}, set()),
        ({"PixelSpacing": None, "ImagerPixelSpacing": ["0.1", "0.1"]}, set()),
    ],
)
def test_sizes_are_there_only_where_pixels_have_a_size(tmp_path, elements, expected) -> None:
    mask = inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.4, 0.3)
    paths = inputs.write_series(tmp_path, 1, **elements)

    sr = write_sr(paths, lambda k: [inputs.masked("liver", mask)], tmp_path)

    names = {"Area": "area_mm2", "Volume": "volume_mm3", "Long axis": "long_axis_mm", "Short axis": "short_axis_mm"}
    assert {key for name, key in names.items() if items(sr, name)} == expected


def sizes(paths, mask):
    (group,), _ = read_groups([Analysed(p, 0, inputs.answer("x", [inputs.masked("liver", mask)])) for p in paths])
    (finding,) = findings_of(group)
    return sizes_of(finding, group)


def test_sizes_of_a_rectangle_are_exact(tmp_path) -> None:
    mask = np.zeros((ROWS, COLUMNS), bool)
    mask[3:9, 2:10] = True  # 6 rows of 0.8 mm, 8 columns of 0.5 mm

    found = sizes(inputs.write_series(tmp_path, 1), mask)

    assert found.area_mm2 == pytest.approx(4.8 * 4.0)
    assert found.long_axis_mm == pytest.approx(np.hypot(4.8, 4.0))
    assert found.short_axis_mm == pytest.approx(2 * 4.8 * 4.0 / np.hypot(4.8, 4.0))
    assert found.volume_mm3 is None


def test_the_long_axis_is_the_largest_distance_between_pixel_corners(tmp_path) -> None:
    rng = np.random.default_rng(4)
    (path,) = inputs.write_series(tmp_path, 1)
    for _ in range(25):
        mask = rng.random((ROWS, COLUMNS)) < 0.06
        mask[rng.integers(ROWS), rng.integers(COLUMNS)] = True
        corners = np.array([(x + i, y + j) for y, x in np.argwhere(mask) for i in (0, 1) for j in (0, 1)]) * (0.5, 0.8)
        largest = np.linalg.norm(corners[:, None] - corners[None], axis=-1).max()
        assert sizes([path], mask).long_axis_mm == pytest.approx(largest)


@pytest.mark.parametrize("thickness", ["1.0", None])
def test_there_is_no_volume_where_slices_leave_gaps_or_do_not_tell(tmp_path, thickness) -> None:
    paths = inputs.write_series(tmp_path, 3, SliceThickness=thickness)

    assert sizes(paths, np.ones((ROWS, COLUMNS), bool)).volume_mm3 is None


def test_a_finding_without_a_mask_has_no_sizes(tmp_path) -> None:
    (group,), _ = read_groups(
        [Analysed(p, 0, inputs.answer("x", [region("liver")])) for p in inputs.write_series(tmp_path, 1)]
    )
    assert sizes_of(findings_of(group)[0], Group(group.images)) == Sizes()
