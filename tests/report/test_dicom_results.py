"""Results of real files: outside validators find no error, and read back the same masks, codes and Chinese text."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from pydicom import config, dcmread
from pydicom.uid import UID

from edgemed.dicom import Reader
from edgemed.errors import InvalidInput, NoInput
from edgemed.report.results import KINDS, Analysed, write_results

DICOM_KINDS = ("seg", "sr", "gsps", "sc", "pdf")
HELPER = Path(__file__).resolve().parents[1] / "helpers" / "result_inputs.py"


def _load():
    import importlib.util

    spec = importlib.util.spec_from_file_location("result_inputs", HELPER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


inputs = _load()


@pytest.fixture(scope="module")
def read():
    with Reader() as reader:
        yield lambda file, frame: reader.read(file, frame=frame)


@pytest.fixture(scope="module", params=inputs.REAL.values(), ids=inputs.REAL)
def results(request, read, tmp_path_factory):
    """(analysed, kind -> paths) of the DICOM results of one real file."""
    analysed = inputs.analyse(inputs.real_file(request.param))
    folder = tmp_path_factory.mktemp("results")
    written = write_results(analysed, folder, DICOM_KINDS, language="zh", options=inputs.options(read=read))
    return analysed, {kind: [p for p in written if f".{kind}" in p.name] for kind in DICOM_KINDS}


@pytest.mark.parametrize("kind", DICOM_KINDS)
def test_dciodvfy_finds_no_error(results, kind) -> None:
    _, paths = results
    assert paths[kind]
    assert {path.name: errors for path in paths[kind] if (errors := inputs.validator_errors(path))} == {}


def test_highdicom_reads_the_same_masks(results) -> None:
    from highdicom.seg import segread

    analysed, paths = results
    expected = {}
    for one in analysed:
        for region in one.answer.regions[:2]:
            expected.setdefault(region.label, []).append(region.mask)
    found = {"liver": [], "左肾": []}
    for path in paths["seg"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seg = segread(path)
        frames = np.atleast_3d(seg.pixel_array.T).T
        for item, frame in zip(seg.PerFrameFunctionalGroupsSequence, frames, strict=True):
            number = item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            label = {"肝脏": "liver", "左侧肾": "左肾"}[seg.SegmentSequence[number - 1].SegmentLabel]
            found[label].append(frame.astype(bool))

    for label, masks in expected.items():
        assert len(found[label]) == len(masks)
        for one, other in zip(found[label], masks, strict=True):
            np.testing.assert_array_equal(one, other)


def test_every_object_is_utf_8_marked_and_in_the_study(results) -> None:
    analysed, paths = results
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = dcmread(analysed[0].file, stop_before_pixels=True, force=True)
        source.decode()
        name = str(source.get("PatientName") or "")
        study = UID(str(source.get("StudyInstanceUID") or ""))
    for path in (path for some in paths.values() for path in some):
        ds = dcmread(path)
        assert ds.SpecificCharacterSet == "ISO_IR 192"
        assert "不可用于诊断" in ds.SeriesDescription
        assert str(ds.PatientName or "") == name.strip()
        assert ds.StudyInstanceUID == study or not study.is_valid
        assert ds.SOPInstanceUID.startswith("2.25.")
        assert ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID
        assert path.read_bytes()[:128] == b"\0" * 128


def test_dsrdump_prints_codes_and_chinese_text(results) -> None:
    _, paths = results
    printed = inputs.run_tool("dsrdump", "+U8", "+Pc", paths["sr"][0])

    assert '(10200004,SCT,"Liver")' in printed
    assert '(7771000,SCT,"Left")' in printed
    assert "左侧肾" in printed
    assert "不可用于诊断" in printed
    assert "UNVERIFIED" in printed


def test_dcmqi_reads_the_same_masks_and_codes(results, tmp_path) -> None:
    import nibabel

    analysed, paths = results
    for path, one in zip(paths["seg"], analysed, strict=False):
        if "FrameOfReferenceUID" not in dcmread(path):
            pytest.skip("dcmqi reads segmentations in space only")
        inputs.run_tool(
            "segimage2itkimage", "--inputDICOM", path, "--outputDirectory", tmp_path, "--outputType", "nifti"
        )
        meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
        segments = [segment for group in meta["segmentAttributes"] for segment in group]
        volumes = [nibabel.load(tmp_path / f"{i}.nii.gz").get_fdata() for i in range(1, len(segments) + 1)]

        assert [s["SegmentedPropertyTypeCodeSequence"]["CodeValue"] for s in segments] == ["10200004", "64033007"]
        assert segments[1]["SegmentedPropertyTypeModifierCodeSequence"]["CodeValue"] == "7771000"
        assert [s["SegmentLabel"] for s in segments] == ["肝脏", "左侧肾"]
        for volume, region in zip(volumes, one.answer.regions[:2], strict=True):
            assert np.count_nonzero(volume) == region.mask.sum() * len(analysed)


def test_dcmqi_reads_the_findings_of_the_report(results, tmp_path) -> None:
    _, paths = results
    inputs.run_tool("tid1500reader", "--inputDICOM", paths["sr"][0], "--outputMetadata", tmp_path / "sr.json")

    groups = json.loads((tmp_path / "sr.json").read_text(encoding="utf-8"))["Measurements"]
    found = {group["TrackingIdentifier"]: group for group in groups}
    assert found["肝脏"]["Finding"]["CodeValue"] == "10200004"
    assert (found["左侧肾"]["FindingSite"]["CodeValue"], found["左侧肾"]["Laterality"]["CodeValue"]) == (
        "64033007",
        "7771000",
    )
    assert found["息肉"]["Finding"]["CodeMeaning"] == "Polyp of colon"


@pytest.mark.parametrize("kind", ["seg", "sr"])
def test_pydicom_reads_every_value_strictly(results, kind, monkeypatch) -> None:
    monkeypatch.setattr(config.settings, "reading_validation_mode", config.RAISE)
    for path in results[1][kind]:
        for element in dcmread(path).iterall():
            assert element.value is not NotImplemented


def test_the_stripped_ct_series_is_one_group(segmentator_files, read, tmp_path) -> None:
    from highdicom.seg import segread

    files = sorted((segmentator_files / "example_ct_dicom").iterdir())
    analysed = [one for file in files for one in inputs.analyse(file)]
    asked = inputs.options(read=read)

    written = write_results(analysed, tmp_path, ("seg", "sr", "gsps", "pdf"), language="en", options=asked)

    assert len(written) == 4
    seg = segread(written[0])
    assert seg.NumberOfFrames == 40
    assert len(seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 20
    assert [note.split(";")[0] for note in asked.tell.__self__] == [
        "the images have no valid SeriesInstanceUID",
        "the images have no valid StudyInstanceUID",
    ]
    if all(path.suffix == ".dcm" for path in written):
        assert [inputs.validator_errors(path) for path in written] == [[]] * 4


def test_a_repeated_run_writes_the_same_uids_under_the_same_names(tmp_path, read) -> None:
    analysed = inputs.analyse(inputs.real_file("CT_small.dcm"))

    def run(folder, **changes):
        paths = write_results(
            analysed, tmp_path / folder, DICOM_KINDS, language="en", options=inputs.options(read=read, **changes)
        )
        return {p.name: (dcmread(p).SOPInstanceUID, dcmread(p).SeriesInstanceUID) for p in paths}

    first, second = run("a"), run("b")
    other = run("c", prompt=inputs.Prompt("Is there a polyp?"))

    assert first == second
    assert first.keys() == other.keys()
    assert not {uid for pair in first.values() for uid in pair} & {uid for pair in other.values() for uid in pair}
    assert len({uid for pair in first.values() for uid in pair}) == 2 * len(first)


def test_every_kind_is_written_whole_and_nothing_else_is_left(tmp_path, read) -> None:
    analysed = inputs.analyse(inputs.real_file("CT_small.dcm"))

    written = write_results(analysed, tmp_path, KINDS, language="en", options=inputs.options(read=read))

    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert [path.name.removeprefix("CT_small.") for path in written] == [
        "answer.json", "seg.dcm", "sr.dcm", "gsps.dcm", "sc.dcm", "pdf.dcm", "labels.nii.gz", "labels.json",
        "fhir-r4b.json", "fhir-r5.json", "overlay.png",
    ]  # fmt: skip


def test_a_picture_has_json_png_and_nifti_but_no_dicom_results(tmp_path, read) -> None:
    from PIL import Image

    Image.new("L", (12, 10), 99).save(tmp_path / "a.png")
    mask = inputs.ellipse(10, 12, 0.5, 0.5, 0.2, 0.2)
    analysed = [Analysed(tmp_path / "a.png", 0, inputs.answer("x", [inputs.masked("polyp", mask)]))]
    asked = inputs.options(read=read)

    written = write_results(analysed, tmp_path / "out", ("json", "png", "nifti"), language="en", options=asked)
    assert len(written) == 4
    with pytest.raises(InvalidInput, match="a.png is a picture"):
        write_results(analysed, tmp_path / "no", ("nifti", "sr"), language="en", options=asked)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("kinds", "match"), [((), "(none)"), (("seg", "xml"), "xml"), (("png",), "ResultOptions.read")]
)
def test_what_cannot_be_written_is_refused_at_once(tmp_path, kinds, match) -> None:
    with pytest.raises(InvalidInput, match=match.replace("(", r"\(").replace(")", r"\)")):
        write_results(
            inputs.analyse(inputs.real_file("CT_small.dcm")), tmp_path / "x", kinds, language="en",
            options=inputs.options(),
        )  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_no_image_is_no_input(tmp_path) -> None:
    with pytest.raises(NoInput, match="no image was analysed"):
        write_results([], tmp_path, ("seg",), language="en", options=inputs.options())


def test_a_missing_library_is_named_before_anything_is_written(tmp_path, monkeypatch) -> None:
    import sys

    from edgemed.errors import BackendUnavailable

    monkeypatch.setitem(sys.modules, "reportlab", None)
    with pytest.raises(BackendUnavailable, match=r"edgemed\[results\]"):
        write_results(
            inputs.analyse(inputs.real_file("CT_small.dcm")), tmp_path / "x", ("sr", "pdf"), language="en",
            options=inputs.options(),
        )  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_nothing_found_is_a_result_of_every_kind_but_seg(tmp_path, read) -> None:
    file = inputs.real_file("CT_small.dcm")
    asked = inputs.options(read=read)

    written = write_results(
        [Analysed(file, 0, inputs.answer("Nothing to see.", []))], tmp_path, DICOM_KINDS, language="en", options=asked
    )

    assert [path.name for path in written] == [
        "CT_small.sr.dcm",
        "CT_small.gsps.dcm",
        "CT_small.sc.dcm",
        "CT_small.pdf.dcm",
    ]
    assert any("no SEG" in note for note in asked.tell.__self__)
    texts = [element.value for element in dcmread(written[0]).iterall() if element.keyword == "TextValue"]
    assert "Nothing to see.\nNothing was marked on these images." in texts
