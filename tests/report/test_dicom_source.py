"""What results take from the analysed files, what they leave behind, and what they derive."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread, dcmwrite

from edgemed.errors import CannotRead, InvalidInput
from edgemed.report.dicom_object import to_bytes
from edgemed.report.dicom_source import derived_uid, read_groups
from edgemed.report.findings import findings_of
from edgemed.report.results import Analysed, write_results

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "result_inputs.py"
_spec = importlib.util.spec_from_file_location("result_inputs", HELPER)
inputs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(inputs)


def analysed_of(paths, *regions):
    return [Analysed(path, 0, inputs.answer("x", regions)) for path in paths]


def changed(tmp_path, name="CT_small.dcm", **elements):
    """Return the path of a real file with other elements."""
    ds = dcmread(inputs.real_file(name))
    for keyword, value in elements.items():
        if value is None:
            ds.pop(keyword, None)
        else:
            setattr(ds, keyword, value)
    dcmwrite(tmp_path / "changed.dcm", ds)
    return tmp_path / "changed.dcm"


def test_a_chinese_name_in_gb18030_arrives_in_utf_8(tmp_path) -> None:
    name, study = "Wang^XiaoDong=王^小东", "腹部平扫"
    path = changed(tmp_path, SpecificCharacterSet="GB18030", PatientName=name, StudyDescription=study)
    assert "王^小东".encode("gb18030") in path.read_bytes()

    (sr,) = write_results(analysed_of([path]), tmp_path, ("sr",), language="zh", options=inputs.options())

    ds = dcmread(sr)
    assert ds.SpecificCharacterSet == "ISO_IR 192"
    assert (ds.PatientName, ds.StudyDescription) == (name, study)
    assert "王^小东".encode() in sr.read_bytes()


def test_a_name_that_cannot_be_decoded_is_an_error_without_the_name(tmp_path) -> None:
    path = changed(tmp_path, PatientName="Wang^Xiao")
    path.write_bytes(
        path.read_bytes().replace(b"ISO_IR 100", b"ISO_IR 192").replace(b"Wang^Xiao", b"Wang^\xff\xfe\xfdo")
    )

    with pytest.raises(InvalidInput, match="'PatientName' has characters") as caught:
        read_groups(analysed_of([path]))
    assert "Wang" not in str(caught.value)


def test_text_that_utf_8_cannot_hold_is_an_error(tmp_path) -> None:
    ds = dcmread(inputs.real_file("CT_small.dcm"))
    ds.StudyDescription = "lone surrogate \ud800"

    with pytest.raises(InvalidInput, match="'StudyDescription' has text that UTF-8 cannot hold"):
        to_bytes(ds)


def test_only_patient_and_study_are_copied(tmp_path) -> None:
    paths = inputs.write_series(tmp_path, 2)

    (seg,) = write_results(
        analysed_of(paths, inputs.masked("liver", inputs.ellipse(16, 12, 0.5, 0.5, 0.2, 0.2))), tmp_path, ("seg",),
        language="en", options=inputs.options(),
    )  # fmt: skip

    ds = dcmread(seg)
    assert (ds.PatientName, ds.PatientID, ds.AccessionNumber, ds.StudyInstanceUID) == ("Doe^Jane", "42", "A1", "1.2.3")
    assert not {"Hidden", "CT7", "secret"} & {
        word for element in ds.iterall() if isinstance(element.value, str) for word in element.value.split()
    }
    assert ds.SeriesInstanceUID != "1.2.3.5"


def test_slices_are_one_group_in_the_order_of_their_places(tmp_path) -> None:
    paths = inputs.write_series(tmp_path, 4)

    groups, notes = read_groups(analysed_of([paths[2], paths[0], paths[3], paths[1]]))

    assert [image.file for image in groups[0].images] == paths
    assert groups[0].gap_mm() == pytest.approx(2.5)
    assert notes == ()


def test_a_series_of_two_orientations_is_two_groups(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    paths = inputs.write_series(tmp_path, 2)
    other = inputs.write_series(tmp_path / "b", 2, orientation=(0, 1, 0, 0, 0, -1), step=(3, 0, 0))

    groups, _ = read_groups(analysed_of([*paths, *other]))

    assert [len(group.images) for group in groups] == [2, 2]


def test_a_second_image_of_a_place_is_another_group(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    paths = inputs.write_series(tmp_path, 3)
    again = inputs.write_series(tmp_path / "b", 3)
    for index, path in enumerate(again):
        ds = dcmread(path)
        ds.SOPInstanceUID, ds.InstanceNumber = f"1.2.3.9.{index}", str(index + 10)
        dcmwrite(path, ds)
    mask = inputs.ellipse(16, 12, 0.5, 0.5, 0.3, 0.3)
    analysed = analysed_of([*again, *paths], inputs.masked("liver", mask))

    groups, _ = read_groups(analysed)
    written = write_results(analysed, tmp_path / "out", ("seg", "gsps"), language="en", options=inputs.options())

    assert [[image.file for image in group.images] for group in groups] == [paths, again]
    assert [dcmread(path).NumberOfFrames for path in written[::2]] == [3, 3]
    assert [path.name for path in written] == [
        "slice0.seg.dcm",
        "slice0.gsps.dcm",
        "slice0-2.seg.dcm",
        "slice0-2.gsps.dcm",
    ]


def test_frames_at_one_place_are_referred_to_by_number(tmp_path) -> None:
    from pydicom.data import get_testdata_file

    path = Path(get_testdata_file("rtdose.dcm", download=False))

    groups, notes = read_groups(inputs.analyse(path))

    assert not groups[0].has_frame_of_reference
    assert any("no volume" in note for note in notes)
    written = write_results(inputs.analyse(path), tmp_path, ("seg", "sr"), language="en", options=inputs.options())
    assert len(written) == 3


def test_a_header_that_highdicom_refuses_is_invalid_input_without_its_values(tmp_path) -> None:
    path = changed(tmp_path, Rows=None, PatientName="Secret^Name")

    with pytest.raises(InvalidInput, match="no gsps can be made") as caught:
        write_results(analysed_of([path]), tmp_path, ("gsps",), language="en", options=inputs.options())
    assert "Secret" not in str(caught.value)


def test_several_answers_about_one_image_are_one_image(tmp_path) -> None:
    (path,) = inputs.write_series(tmp_path, 1)
    mask = inputs.ellipse(16, 12, 0.5, 0.5, 0.2, 0.2)

    groups, _ = read_groups(
        [*analysed_of([path], inputs.masked("liver", mask)), *analysed_of([path], inputs.masked("肝", mask))]
    )

    assert len(groups[0].images) == 1
    (finding,) = findings_of(groups[0])
    assert [region.label for _, region in finding.places] == ["liver", "肝"]


@pytest.mark.parametrize("missing", [None, "", "not a uid", "1.02.3"])
def test_missing_uids_are_derived_alike_each_time_and_told(tmp_path, missing) -> None:
    path = inputs.write_series(tmp_path, 1)[0]
    ds = dcmread(path)
    del ds.StudyInstanceUID
    dcmwrite(path, ds)
    if missing:
        path = inputs.write_series(tmp_path, 1, StudyInstanceUID="9.8.7.6.5")[0]
        path.write_bytes(path.read_bytes().replace(b"9.8.7.6.5", missing.encode()[:9].ljust(9, b" ")))

    first, notes = read_groups(analysed_of([path]))
    second, _ = read_groups(analysed_of([path]))

    uid = first[0].header.StudyInstanceUID
    assert uid == second[0].header.StudyInstanceUID
    assert uid.startswith("2.25.")
    assert len(uid) <= 64
    assert notes == (
        "the images have no valid StudyInstanceUID; one was derived from their other UIDs or their SHA-256",
    )


def test_derived_uids_differ_with_every_part() -> None:
    assert len({derived_uid(*parts) for parts in (("a", "b"), ("ab",), ("b", "a"), ("a", "b", ""))}) == 4


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_a_frame_of_reference_without_a_place_is_dropped(tmp_path, keyword) -> None:
    paths = inputs.write_series(tmp_path, 1, **{keyword: None})

    groups, _ = read_groups(analysed_of(paths))

    assert not groups[0].has_frame_of_reference


@pytest.mark.parametrize("spacing", [[0.0, 0.0], [-1.0, 1.0], [1e9, 1e9]])
def test_a_spacing_that_cannot_be_is_none(tmp_path, spacing) -> None:
    paths = inputs.write_series(tmp_path, 1, PixelSpacing=[str(s) for s in spacing])

    groups, _ = read_groups(analysed_of(paths))

    assert groups[0].first.spacing_mm is None


def test_values_that_do_not_fit_are_left_out_and_named_without_the_value(tmp_path) -> None:
    path = inputs.write_series(tmp_path, 1, PatientBirthDate="20260101")[0]
    path.write_bytes(path.read_bytes().replace(b"20260101", b"spring!!", 2))

    groups, notes = read_groups(analysed_of([path]))

    assert groups[0].header.PatientBirthDate is None
    assert any("'PatientBirthDate'" in note for note in notes)
    assert not any("spring" in note for note in notes)


def test_nothing_that_is_printed_names_the_patient(tmp_path) -> None:
    (group,), _ = read_groups(analysed_of(inputs.write_series(tmp_path, 1)))

    assert "Doe" not in repr(group)


@pytest.mark.parametrize(("frame", "name"), [(1, "CT_small.dcm"), (10, "emri_small.dcm"), (-1, "emri_small.dcm")])
def test_a_frame_that_is_not_there_is_refused(frame, name) -> None:
    with pytest.raises(InvalidInput, match="cannot have been analysed"):
        read_groups([Analysed(inputs.real_file(name), frame, inputs.answer("x", []))])


def test_a_mask_of_another_size_is_refused(tmp_path) -> None:
    with pytest.raises(InvalidInput, match=r"a mask is \[4, 4\], \[16, 12\]"):
        read_groups(analysed_of(inputs.write_series(tmp_path, 1), inputs.masked("liver", np.ones((4, 4), bool))))


def test_a_file_that_is_not_there_cannot_be_read(tmp_path) -> None:
    with pytest.raises(CannotRead, match="gone.dcm"):
        read_groups(analysed_of([tmp_path / "gone.dcm"]))


def test_a_retired_sop_class_is_referred_to_by_its_own_uid(tmp_path) -> None:
    retired = "1.2.840.10008.5.1.4.1.1.6"
    path = changed(tmp_path, "US1_UNCR.dcm", SOPClassUID=retired)
    mask = inputs.ellipse(480, 640, 0.5, 0.5, 0.2, 0.2)

    written = write_results(
        analysed_of([path], inputs.masked("liver", mask)), tmp_path, ("seg", "sr", "gsps", "pdf"), language="en",
        options=inputs.options(),
    )  # fmt: skip

    source = dcmread(path, stop_before_pixels=True).SOPInstanceUID
    for result in map(dcmread, written):
        classes = {
            item.ReferencedSOPClassUID
            for element in result.iterall()
            if element.VR == "SQ"
            for item in element.value
            if item.get("ReferencedSOPInstanceUID") == source
        }
        assert classes == {retired}
