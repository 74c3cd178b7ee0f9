"""Presentation states: outlines along pixel edges, the right frame, MONOCHROME1 inverted, the notice on every image."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydicom import dcmread

from edgemed.report import dicom_gsps
from edgemed.report.dicom_gsps import outlines_of
from edgemed.report.results import Analysed, write_results

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "result_inputs.py"
_spec = importlib.util.spec_from_file_location("result_inputs", HELPER)
inputs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(inputs)


def write_gsps(paths, regions, folder):
    analysed = [Analysed(path, 0, inputs.answer("x", regions)) for path in paths]
    return [dcmread(p) for p in write_results(analysed, folder, ("gsps",), language="en", options=inputs.options())]


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.booleans()))
def test_outlines_enclose_the_pixels_of_the_mask_and_no_other(mask) -> None:
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    crossed = np.zeros(mask.shape, int)
    for line in outlines_of(mask):
        np.testing.assert_array_equal(line[0], line[-1])
        for (ax, ay), (bx, by) in pairwise(line):
            assert (ax == bx) != (ay == by)
            if ax == bx:
                crossed += (y > min(ay, by)) & (y < max(ay, by)) & (x > ax)

    np.testing.assert_array_equal(crossed % 2 == 1, mask)


def test_a_full_image_has_the_corners_of_the_image() -> None:
    (line,) = outlines_of(np.ones((3, 5), bool))

    assert {tuple(point) for point in line} == {(0, 0), (5, 0), (5, 3), (0, 3)}


def test_an_outline_too_long_for_dicom_gives_way_to_the_box(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(dicom_gsps, "MAX_POINTS", 6)
    mask = inputs.ellipse(16, 12, 0.5, 0.5, 0.4, 0.4)

    (state,) = write_gsps(inputs.write_series(tmp_path, 1), [inputs.masked("liver", mask)], tmp_path)

    (graphic,) = state.GraphicAnnotationSequence[0].GraphicObjectSequence
    assert graphic.NumberOfGraphicPoints == 5


def test_every_image_has_the_notice_and_the_names_of_its_findings(tmp_path) -> None:
    (state,) = write_gsps(inputs.write_series(tmp_path, 2), [inputs.Region("肝", (1.0, 2.0, 5.0, 9.0))], tmp_path)

    assert len(state.GraphicAnnotationSequence) == 2
    for item in state.GraphicAnnotationSequence:
        assert [t.UnformattedTextValue for t in item.TextObjectSequence] == ["AI result, not for diagnosis", "1 liver"]
        assert list(item.GraphicObjectSequence[0].GraphicData) == [1, 2, 5, 2, 5, 9, 1, 9, 1, 2]
        assert item.GraphicObjectSequence[0].GraphicAnnotationUnits == "PIXEL"
    assert "not for diagnosis" in state.ContentDescription


@pytest.mark.parametrize(("photometric", "shape"), [("MONOCHROME1", "INVERSE"), ("MONOCHROME2", "IDENTITY")])
def test_grey_is_shown_the_right_way_round(tmp_path, photometric, shape) -> None:
    (state,) = write_gsps(inputs.write_series(tmp_path, 1, PhotometricInterpretation=photometric), [], tmp_path)

    assert state.PresentationLUTShape == shape
    assert (state.RescaleIntercept, state.SoftcopyVOILUTSequence[0].WindowWidth) == (-1024, 400)


def test_images_of_two_rescales_are_two_states(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    paths = inputs.write_series(tmp_path, 2)
    other = inputs.write_series(tmp_path / "b", 3, RescaleSlope="2")[2:]

    states = write_gsps([*paths, *other], [], tmp_path / "out")

    assert sorted((len(s.GraphicAnnotationSequence), float(s.RescaleSlope)) for s in states) == [(1, 2.0), (2, 1.0)]


@pytest.mark.parametrize("name", ["emri_small.dcm", "color3d_jpeg_baseline.dcm", "eCT_Supplemental.dcm"])
def test_frames_are_annotated_by_their_numbers(tmp_path, name) -> None:
    analysed = inputs.analyse(inputs.real_file(name))

    (path,) = write_results(analysed, tmp_path, ("gsps",), language="en", options=inputs.options())

    frames = [i.ReferencedImageSequence[0].ReferencedFrameNumber for i in dcmread(path).GraphicAnnotationSequence]
    assert sorted(map(int, frames)) == [one.frame + 1 for one in analysed]


def test_colour_has_an_icc_profile(tmp_path) -> None:
    (state,) = write_gsps([inputs.real_file("US1_UNCR.dcm")], [], tmp_path)

    assert state.SOPClassUID == "1.2.840.10008.5.1.4.1.1.11.2"
    assert state.ICCProfile[36:40] == b"acsp"
