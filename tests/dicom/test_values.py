"""Modality values, functional groups, MONOCHROME1, spacing and identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from edgemed.core import Window
from edgemed.dicom import Reader

Write = Callable[..., Path]
CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
RAMP = np.arange(12, dtype=np.uint16).reshape(3, 4)


def item(**elements: Any) -> Dataset:
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def group(**macros: Dataset) -> Dataset:
    return item(**{keyword: Sequence([inner]) for keyword, inner in macros.items()})


def rescale(slope: float, intercept: float) -> Dataset:
    return item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")


def test_slope_and_intercept_give_hu(reader: Reader, write_dicom: Write) -> None:
    scan = reader.read(write_dicom(RAMP, SOPClassUID=CT, Modality="CT", RescaleSlope=2, RescaleIntercept=-1024))
    np.testing.assert_array_equal(scan.pixels[0], RAMP * 2.0 - 1024)
    assert scan.modality == "CT"


def test_empty_slope_means_one(reader: Reader, write_dicom: Write) -> None:
    scan = reader.read(write_dicom(RAMP, RescaleSlope="", RescaleIntercept=5))
    np.testing.assert_array_equal(scan.pixels[0], RAMP + 5.0)


def test_dose_grid_scaling_gives_gray(reader: Reader, write_dicom: Write) -> None:
    scan = reader.read(write_dicom(RAMP.astype(np.uint32), Modality="RTDOSE", DoseGridScaling=0.5))
    np.testing.assert_array_equal(scan.pixels[0], RAMP * 0.5)


def test_enhanced_ct_takes_each_frames_own_transform_window_and_spacing(reader: Reader, write_dicom: Write) -> None:
    measures = item(PixelSpacing=[0.7, 0.9])
    lung, soft = item(WindowCenter=-600, WindowWidth=1500), item(WindowCenter=[40, 1], WindowWidth=[400, 2])
    per_frame = [
        group(PixelValueTransformationSequence=rescale(1, -1024), FrameVOILUTSequence=lung),
        group(PixelValueTransformationSequence=rescale(2.5, 100), FrameVOILUTSequence=soft),
    ]
    path = write_dicom(
        np.stack([RAMP, RAMP + 100]),
        frames=True,
        SOPClassUID=ENHANCED_CT,
        Modality="CT",
        RescaleSlope=99,  # a stray top-level value never wins over the functional groups
        SharedFunctionalGroupsSequence=Sequence([group(PixelMeasuresSequence=measures)]),
        PerFrameFunctionalGroupsSequence=Sequence(per_frame),
    )
    first, second = reader.read(path, frame=0), reader.read(path, frame=1)
    assert (first.pixels[0, 0, 0], first.pixels[0, 2, 3]) == (-1024, -1013)
    assert (second.pixels[0, 0, 0], second.pixels[0, 2, 3]) == (350, 377.5)  # 100 * 2.5 + 100, 111 * 2.5 + 100
    assert first.window == Window(-600, 1500, exact=False)
    assert second.window == Window(40, 400, exact=False)
    assert first.pixel_spacing_mm == second.pixel_spacing_mm == (0.7, 0.9)


def test_shared_functional_group_transforms_every_frame(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(
        np.stack([RAMP.astype(np.int16) - 5] * 2),
        frames=True,
        SOPClassUID=ENHANCED_CT,
        BitsStored=12,
        SharedFunctionalGroupsSequence=Sequence([group(PixelValueTransformationSequence=rescale(3, -7))]),
        PerFrameFunctionalGroupsSequence=Sequence([Dataset(), Dataset()]),
    )
    np.testing.assert_array_equal(reader.read(path, frame=1).pixels[0], (RAMP.astype(float) - 5) * 3 - 7)


def test_modality_lut_is_applied_and_clamped(reader: Reader, write_dicom: Write) -> None:
    lut = item(LUTDescriptor=[4, 2, 16], ModalityLUTType="US")
    lut.add_new("LUTData", "US", [10, 20, 40, 80])
    scan = reader.read(write_dicom(RAMP, BitsStored=8, ModalityLUTSequence=Sequence([lut])))
    np.testing.assert_array_equal(scan.pixels[0].ravel(), [10, 10, 10, 20, 40, 80, 80, 80, 80, 80, 80, 80])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("function", [None, "LINEAR_EXACT"])
def test_monochrome1_equals_its_inverted_twin(
    reader: Reader, write_dicom: Write, signed: bool, function: str | None
) -> None:
    dark = np.arange(-600, 600, 100, dtype=np.int16).reshape(3, 4)
    stored = dark if signed else (dark + 600).astype(np.uint16)
    mirror = (-1 - stored) if signed else (4095 - stored)
    common = {
        "BitsStored": 12,
        "RescaleSlope": 2,
        "RescaleIntercept": 10,
        "WindowWidth": 900,
        "VOILUTFunction": function,
    }
    one = write_dicom(stored, name="one.dcm", PhotometricInterpretation="MONOCHROME1", WindowCenter=700, **common)
    # value v -> R - v with R = v(lowest) + v(highest); LINEAR is not symmetric about its center (C.11.2.1.2.1): + 1.
    about = 2 * (-1 if signed else 4095) + 2 * 10
    center = about - 700 + (0 if function else 1)
    two = write_dicom(mirror.astype(stored.dtype), name="two.dcm", WindowCenter=center, **common)
    a, b = reader.read(one), reader.read(two)
    np.testing.assert_array_equal(a.pixels, b.pixels)
    np.testing.assert_array_equal(a.shown(0), b.shown(0))
    assert a.window == b.window
    # Shown, it is the negative of the same values called MONOCHROME2.
    plain = reader.read(write_dicom(stored, name="plain.dcm", WindowCenter=700, **common))
    assert np.abs(255 - a.shown(0).astype(int) - plain.shown(0)).max() <= 1


def test_users_window_on_monochrome1_is_in_the_files_values(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(RAMP, BitsStored=8, PhotometricInterpretation="MONOCHROME1")
    shown = reader.read(path, window="6,12").shown(0)[..., 0]
    assert shown.ravel()[0] == 255 and shown.ravel()[11] == 0


def test_presentation_lut_shape_inverse_is_inverted(reader: Reader, write_dicom: Write) -> None:
    scan = reader.read(write_dicom(RAMP, BitsStored=4, HighBit=3, PresentationLUTShape="INVERSE"))
    np.testing.assert_array_equal(scan.pixels[0], 15 - RAMP)


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"PixelSpacing": [0.5, 0.75]}, (0.5, 0.75)),
        ({"ImagerPixelSpacing": [0.5, 0.75]}, None),
        ({"PixelSpacing": [0, 0]}, None),
        ({"PixelSpacing": ""}, None),
        ({"PixelSpacing": "1"}, None),
        ({}, None),
    ],
)
def test_spacing_is_never_invented(
    reader: Reader, write_dicom: Write, elements: dict[str, Any], expected: tuple[float, float] | None
) -> None:
    assert reader.read(write_dicom(RAMP, **elements)).pixel_spacing_mm == expected


def test_uids_are_read_and_anything_else_is_dropped(reader: Reader, write_dicom: Write) -> None:
    scan = reader.read(write_dicom(RAMP, SOPInstanceUID="", StudyInstanceUID="", SeriesInstanceUID="1.2.9"))
    assert (scan.sop_instance_uid, scan.series_instance_uid, scan.study_instance_uid) == ("1.2.3.4", "1.2.9", None)
    assert scan.frame_of_reference_uid is None


def test_no_patient_data_reaches_the_scan(reader: Reader, write_dicom: Write) -> None:
    scan = reader.read(write_dicom(RAMP, PatientBirthDate="19700101", StudyDescription="Planted"))
    assert not any("lanted" in str(value) or "PLANTED" in str(value) for value in vars(scan).values())


def test_a_ct_that_highdicom_made_enhanced_keeps_its_hu(reader: Reader, tmp_path: Path) -> None:
    from highdicom.legacy import LegacyConvertedEnhancedCTImage
    from pydicom import dcmread
    from pydicom.data import get_testdata_file

    source = get_testdata_file("CT_small.dcm", read=False, download=False)
    made = LegacyConvertedEnhancedCTImage(
        [dcmread(source)], series_instance_uid="1.2.9", series_number=2, sop_instance_uid="1.2.9.1", instance_number=1
    )
    assert "RescaleIntercept" not in made  # it is in the functional groups alone, where pydicom does not look
    made.save_as(tmp_path / "enhanced.dcm")
    enhanced, plain = reader.read(tmp_path / "enhanced.dcm"), reader.read(source)
    assert (plain.pixels.min(), plain.pixels.max()) == (-896, 1167)
    np.testing.assert_array_equal(enhanced.pixels, plain.pixels)
    assert enhanced.pixel_spacing_mm == plain.pixel_spacing_mm is not None
