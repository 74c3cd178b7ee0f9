"""De-identified copies of real files: nothing of what was planted is left, the pixels are the same, they are valid."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import result_inputs as helper
from pydicom import DataElement, Dataset, dcmread, dcmwrite
from pydicom.data import get_testdata_file
from pydicom.datadict import DicomDictionary, dictionary_keyword, tag_for_keyword
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID_dictionary

from edgemed.dicom.deid import REPORT, deidentify, read_key
from edgemed.dicom.deid_rules import CODES, Profile, read_rules
from edgemed.errors import CannotRead, EdgemedError, NoInput

TEXT = ("LO", "SH", "LT", "ST", "UT", "UC", "PN", "AE", "UR")
KEY = bytes(range(32))
PATIENT = "Zauberberg"
KEPT_PARTS = ("CodingSchemeDesignator", "CodingSchemeVersion")


pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pydicom")  # what real files hold, it finds fault with


# --- planting ---------------------------------------------------------------------------------------------------------


class Planter:
    """Overwrites what could identify somebody by values that can be searched for."""

    def __init__(self) -> None:
        self.planted: list[str] = []

    def value(self, vr: str, keyword: str) -> Any:
        number = len(self.planted)
        made = {
            "PN": f"{PATIENT}^Zq{number:04d}", "DA": f"17{number % 90 + 10}0714", "TM": f"0314{number % 60:02d}.926535",
            "DT": f"17{number % 90 + 10}0714031415.926535", "AS": "077Y", "UI": f"1.2.3.98765.{number}",
            "UR": f"http://zq{number:04d}.example",
        }.get(vr, f"Zq{number:04d}")  # fmt: skip
        if vr in ("OB", "UN"):
            made = f"Zq{number:04d}xx"
        self.planted.append(made)
        return made.encode() if vr in ("OB", "UN") else made

    def plant(self, ds: Dataset) -> None:
        """Give every element of these kinds, in sequences too, another value."""
        kept = read_rules().keep
        for element in list(ds):
            if element.VR == "SQ":
                for item in element.value:
                    self.plant(item)
            elif element.tag in kept:
                if element.keyword not in KEPT_PARTS and element.VR != "SH":
                    element.value = f"of {PATIENT}"
            elif element.VR in (*TEXT, "DA", "TM", "DT") or (element.tag.is_private and element.VR in ("OB", "UN")):
                if not element.tag.is_private_creator:
                    element.value = self.value(element.VR, element.keyword)
            elif element.VR == "UI" and str(element.value) not in UID_dictionary:
                element.value = self.value("UI", element.keyword)

    def fill(self, ds: Dataset) -> None:
        """Add what a file could hold: every listed attribute, a private block, overlay and curve comments, padding."""
        for tag, rule in read_rules().rules.items():
            entry = DicomDictionary.get(tag)
            if entry is None or tag >> 16 < 8 or tag in ds or rule.action == "K":
                continue
            vr = entry[0]
            if entry[4] == "EncapsulatedDocument":
                continue  # refused as a whole
            if vr in (*TEXT, "DA", "TM", "DT", "UI", "OB"):
                ds.add(DataElement(tag, vr, self.value(vr, entry[4])))
            elif vr == "SQ" and "PixelData" in ds:
                inner = Dataset()
                inner.PatientName, inner.StudyDescription = self.value("PN", ""), self.value("LO", "")
                ds.add(DataElement(tag, "SQ", [inner]))
        block = ds.private_block(0x0011, "ZQ VENDOR", create=True)
        block.add_new(0x01, "LO", self.value("LO", ""))
        ds.add_new(0x60024000, "LT", self.value("LT", ""))
        ds.add_new(0x50002500, "LO", self.value("LO", ""))
        ds.add_new(0x60020045, "LO", self.value("LO", ""))
        ds.add_new(0xFFFCFFFC, "OB", self.value("OB", ""))
        coded = Dataset()
        coded.CodeValue, coded.CodingSchemeDesignator = self.value("SH", ""), "99" + self.value("SH", "")
        coded.CodeMeaning = self.value("LO", "")
        ds.ViewCodeSequence = [coded]


def plant_into(source: Path, target: Path) -> list[str]:
    """Write a copy of a file with planted values in the dataset, the file meta information and the preamble."""
    ds = dcmread(source, force=True)
    planter = Planter()
    charset = ds.get("SpecificCharacterSet")
    planter.plant(ds)
    planter.fill(ds)
    ds.PatientName, ds.PatientID = f"{PATIENT}^Hans", "ID-4711-ZQ"
    if charset is not None and "GB" in str(charset):
        ds.PatientName = "王小东^Hans"
        planter.planted.append("王小东")
    if "TransferSyntaxUID" not in ds.file_meta:
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = planter.value("UI", "")
    ds.file_meta.SourceApplicationEntityTitle = planter.value("AE", "")
    ds.file_meta.PrivateInformationCreatorUID = "1.2.3.98765"
    ds.file_meta.PrivateInformation = planter.value("OB", "")
    ds.preamble = b"ZQPREAMBLE".ljust(128, b"\0")
    planter.planted += [PATIENT, "ID-4711-ZQ", "ZQPREAMBLE", "ZQ VENDOR"]
    dcmwrite(target, ds, enforce_file_format=False)
    return planter.planted


class Copies:
    """The real files, planted, and their copies; one run for all tests of the module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: dict[str, Path] = {}
        self.planted: dict[str, list[str]] = {}
        (folder / "in").mkdir()
        for number, (what, name) in enumerate(helper.REAL.items()):
            self.sources[what] = target = folder / "in" / f"{number:02d}.dcm"
            self.planted[what] = plant_into(helper.real_file(name), target)
        self.report = deidentify([*self.sources.values()], folder / "out", Profile(), KEY)
        self.copies = dict(zip(self.sources, (folder / "out" / f["file"] for f in self.report["files"]), strict=True))


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    return Copies(tmp_path_factory.mktemp("deid"))


def found_in(data: bytes, values: list[str]) -> list[str]:
    """Return the values that some encoding of them leaves in the bytes."""
    return [v for v in values if len(v) > 4 and any(_encoded(v, e) in data for e in ("utf-8", "gb18030", "utf-16-le"))]


def _encoded(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


@pytest.mark.parametrize("what", helper.REAL)
def test_nothing_planted_is_left_in_any_byte(copies: Copies, what: str) -> None:
    assert len(copies.planted[what]) > 200
    pixels = bytes(dcmread(copies.sources[what]).get("PixelData") or b"")  # the same, see below
    data = copies.copies[what].read_bytes()
    assert found_in(data.replace(pixels, b"") if pixels else data, copies.planted[what]) == []


def test_cleaning_options_leave_nothing_planted_either(copies: Copies, tmp_path: Path) -> None:
    profile = Profile(clean_descriptors=True, clean_content=True, clean_graphics=True, retain_safe_private=True)
    chosen = ["CT small", "MR with overlay planes", "Chinese name, GB18030"]
    report = deidentify([copies.sources[what] for what in chosen], tmp_path, profile, KEY)
    for what, told in zip(chosen, report["files"], strict=True):
        assert found_in((tmp_path / told["file"]).read_bytes(), copies.planted[what]) == []


@pytest.mark.parametrize("what", helper.REAL)
def test_pixels_are_the_same_bit_for_bit(copies: Copies, what: str) -> None:
    before, after = dcmread(copies.sources[what]), dcmread(copies.copies[what])
    if "PixelData" not in before:
        assert "PixelData" not in after
        return
    assert after.file_meta.TransferSyntaxUID == before.file_meta.TransferSyntaxUID
    assert after["PixelData"].VR == before["PixelData"].VR
    size = len(after.PixelData)
    assert len(before.PixelData) - size in (0, 1)
    if not after.file_meta.TransferSyntaxUID.is_compressed:
        assert after.PixelData == before.PixelData[:size]
    if int(before.get("NumberOfFrames") or 1) < 20:
        np.testing.assert_array_equal(after.pixel_array, before.pixel_array)
    assert after.get("SpecificCharacterSet") == before.get("SpecificCharacterSet")


@pytest.mark.parametrize("what", helper.REAL)
def test_the_copy_is_named_by_its_new_uids_and_says_what_was_done(copies: Copies, what: str) -> None:
    before, after = dcmread(copies.sources[what]), dcmread(copies.copies[what])
    assert copies.copies[what].name == f"{after.SOPInstanceUID}.dcm"
    assert after.SOPInstanceUID == after.file_meta.MediaStorageSOPInstanceUID != before.SOPInstanceUID
    assert re.fullmatch(r"2\.25\.\d{30,39}", after.SOPInstanceUID)
    assert re.fullmatch(r"P[0-9A-F]{12}", after.PatientID)
    assert after.PatientName == after.PatientID
    assert (after.PatientIdentityRemoved, after.LongitudinalTemporalInformationModified) == ("YES", "REMOVED")
    (item,) = after.DeidentificationMethodCodeSequence
    assert (item.CodeValue, item.CodingSchemeDesignator) == ("113100", "DCM")
    assert not any(element.tag.is_private for element in after.iterall())


def test_no_file_has_an_error_that_its_source_had_not(copies: Copies, tmp_path: Path) -> None:
    helper.tool("dciodvfy")
    sources = {what: helper.real_file(name) for what, name in helper.REAL.items()}
    report = deidentify([*sources.values()], tmp_path, Profile(retain_dates="modified", retain_patient=True), KEY)
    for what, told in zip(sources, report["files"], strict=True):
        before, after = (set(_kinds_of_errors(p)) for p in (sources[what], tmp_path / told["file"]))
        assert after - before == set(), what


def _kinds_of_errors(path: Path) -> Iterator[str]:
    for line in helper.validator_errors(path):
        yield re.sub(r"\[.*?\]|<[^>]*>|= *\S+|[\d.]{12,}", "", line)


def test_real_values_are_gone_from_the_headers(tmp_path: Path) -> None:
    sources = [helper.real_file(name) for name in helper.REAL.values()]
    report = deidentify(sources, tmp_path, Profile(), KEY)
    for source, told in zip(sources, report["files"], strict=True):
        ds = dcmread(source, stop_before_pixels=True, force=True)
        after = tmp_path / told["file"]
        text = after.read_bytes()[: 1 << 16] if "PixelData" not in dcmread(after) else _header_of(after)
        kept = {str(e.value) for e in dcmread(after).iterall() if e.VR in (*TEXT, "CS", "DS", "IS")}
        gone = [
            str(e.value)
            for e in ds.iterall()
            if e.VR in (*TEXT, "DA", "TM", "DT", "UI") and str(e.value) not in UID_dictionary
            and e.tag not in read_rules().keep and not any(str(e.value) in k for k in kept)
        ]  # fmt: skip
        assert found_in(text, gone) == [], source.name


def _header_of(path: Path) -> bytes:
    from io import BytesIO

    ds, out = dcmread(path, stop_before_pixels=True), BytesIO()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds = Dataset(ds) if ds.original_encoding[1] else _little(ds)
    dcmwrite(out, ds, implicit_vr=False, little_endian=True)
    return out.getvalue()


def _little(ds: Dataset) -> Dataset:
    return Dataset({e.tag: e for e in ds if e.VR not in ("OW", "OB")})


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_holds_what_the_standard_lists() -> None:
    rules = read_rules()
    assert len(rules.rules) == 652
    assert {rule.action for rule in rules.rules.values()} == {
        "D", "Z", "X", "U", "Z/D", "X/Z", "X/D", "X/Z/D", "X/Z/U*",
    }  # fmt: skip
    chosen = ("PatientName", "PatientID", "StudyDate", "SOPInstanceUID", "ContentSequence", "StationName", "Allergies")
    told = {k: rules.rules[tag_for_keyword(k)] for k in chosen}  # type: ignore[index]
    assert {k: r.action for k, r in told.items()} == {
        "PatientName": "Z", "PatientID": "Z/D", "StudyDate": "Z", "SOPInstanceUID": "U", "ContentSequence": "D",
        "StationName": "X/Z/D", "Allergies": "X",
    }  # fmt: skip
    assert told["Allergies"].options == {"patient": "C", "descriptors": "C"}
    assert len(rules.keep) == 63


def test_every_attribute_of_the_dictionary_that_can_hold_text_is_dealt_with() -> None:
    """Whatever is not listed and is not on the short list of acquisition words gets a new value or goes."""
    from edgemed.dicom.deid_rules import Cleaner

    left = []
    for tag, (vr, vm, _, _, keyword) in DicomDictionary.items():
        if vr not in (*TEXT, "DA", "TM", "DT", "UI", "AS") or tag >> 16 < 8 or not keyword or vm.endswith("2n"):
            continue
        planter = Planter()
        ds = Dataset()
        ds.add(DataElement(tag, vr, planter.value(vr, keyword)))
        Cleaner(Profile(), KEY, ds).clean(ds)
        if tag in ds and planter.planted[0] in str(ds[tag].value):
            left.append(tag)
    assert {dictionary_keyword(t) for t in left} == {dictionary_keyword(t) for t in read_rules().keep}


def test_the_codes_are_those_of_context_group_7050() -> None:
    known = {code.value: code.meaning for code in codes.cid7050.concepts.values()}
    assert dict(CODES.values()).items() <= known.items()
    named = {name.partition(":")[0] for name in CODES} - {"basic"}
    assert named == {f.name for f in fields(Profile)}
    with pytest.raises(EdgemedError, match="full or modified"):
        Profile(retain_dates="some")


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean(tmp_path: Path) -> Callable[..., list[Dataset]]:
    """`clean(datasets, blank=..., retain_dates="full", ...)`: the copies of datasets, in that order."""
    runs = iter(range(100))

    def run(*sources: Dataset, key: bytes = KEY, blank: Any = (), **options: Any) -> list[Dataset]:
        folder = tmp_path / f"run{next(runs)}"
        (folder / "in").mkdir(parents=True)
        paths = []
        for number, ds in enumerate(sources):
            paths.append(folder / "in" / f"{number}.dcm")
            dcmwrite(paths[-1], ds, enforce_file_format=True)
        report = deidentify(paths, folder / "out", Profile(**options), key, blank=blank)
        assert report["refused"] == []
        return [dcmread(folder / "out" / told["file"]) for told in report["files"]]

    return run


def scan(**elements: Any) -> Dataset:
    """Return a small CT slice with an identity."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()  # type: ignore[assignment]
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3.1"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.5", "1.2.3.6"
    ds.PatientName, ds.PatientID, ds.PatientAge, ds.PatientSex = "Doe^Jane", "4711", "093Y", "F"
    ds.StudyDate, ds.StudyTime, ds.AcquisitionDateTime = "20260131", "120000", "20260201120000.5+0800"
    ds.Modality, ds.StationName, ds.InstitutionName = "CT", "CT7", "Hidden Hospital"
    ds.StudyDescription = "CT of the liver and spleen for Doe, Rumpelstilz, 98765, 3 mm"
    ds.Manufacturer, ds.SoftwareVersions = "MAKER", ["V1", "of Jane"]
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 8, 10, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.arange(80, dtype="<u2").tobytes()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def test_without_an_option_only_how_the_image_was_made_is_left(clean: Callable[..., list[Dataset]]) -> None:
    (ds,) = clean(scan())
    assert "PatientAge" not in ds and ds.PatientSex == "" and ds.StudyDate == ""
    assert (ds.Manufacturer, ds.SoftwareVersions) == ("MAKER", ["REMOVED", "REMOVED"])
    assert "StudyDescription" not in ds and ds.StationName == ds.InstitutionName == "REMOVED"


def test_each_option_keeps_what_it_names_and_is_recorded(clean: Callable[..., list[Dataset]]) -> None:
    source = scan()
    source.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", "800")
    source.private_block(0x0019, "SIEMENS MR HEADER").add_new(0x0D, "LO", "800 Doe")
    source.private_block(0x0029, "OTHER", create=True).add_new(0x10, "IS", "1")
    told = dict(
        retain_uids=("SOPInstanceUID", "1.2.3.1"),
        retain_patient=("PatientAge", "090Y"),
        retain_device=("StationName", "CT7"),
        retain_institution=("InstitutionName", "Hidden Hospital"),
        clean_descriptors=("StudyDescription", "CT of the liver and spleen for 3 mm"),
    )
    for option, (keyword, value) in told.items():
        (ds,) = clean(source, **{option: True})
        assert ds[keyword].value == value
        assert [i.CodeValue for i in ds.DeidentificationMethodCodeSequence] == ["113100", CODES[option][0]]
    (ds,) = clean(source, retain_safe_private=True)
    assert [str(e.value) for e in ds if e.tag.is_private] == ["SIEMENS MR HEADER", "800"]


def test_dates_are_kept_or_shifted_by_one_number_of_days_for_each_patient(clean: Callable[..., list[Dataset]]) -> None:
    (ds,) = clean(scan(), retain_dates="full")
    assert (ds.StudyDate, ds.StudyTime, ds.LongitudinalTemporalInformationModified) == (
        "20260131", "120000", "UNMODIFIED",
    )  # fmt: skip
    later = scan(SOPInstanceUID="1.2.3.2", StudyDate="20260228", AcquisitionDateTime="20260301")
    other = scan(SOPInstanceUID="1.2.3.3", PatientID="4712")
    first, second, third = clean(scan(), later, other, retain_dates="modified")
    assert first.LongitudinalTemporalInformationModified == "MODIFIED"
    assert first.StudyTime == "120000" and first.AcquisitionDateTime.endswith("120000.5+0800")
    assert _days(second.StudyDate) - _days(first.StudyDate) == 28
    assert _days(first.AcquisitionDateTime) - _days(first.StudyDate) == 1
    assert first.StudyDate not in ("20260131", third.StudyDate)
    assert 0 < _days("20260131") - _days(first.StudyDate) <= 3650


def _days(text: str) -> int:
    from datetime import date

    return date(int(text[:4]), int(text[4:6]), int(text[6:8])).toordinal()


def test_references_hold_within_a_run_and_with_a_key_over_runs(clean: Callable[..., list[Dataset]]) -> None:
    def pair() -> tuple[Dataset, Dataset]:
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3.1"
        return scan(), scan(SOPInstanceUID="1.2.3.2", SourceImageSequence=[reference])

    first, second = clean(*pair())
    assert second.SourceImageSequence[0].ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert second.SourceImageSequence[0].ReferencedSOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
    assert second.SeriesInstanceUID == first.SeriesInstanceUID and second.PatientID == first.PatientID
    again, _ = clean(*pair())
    assert (again.SOPInstanceUID, again.PatientID) == (first.SOPInstanceUID, first.PatientID)
    other, _ = clean(*pair(), key=bytes(32))
    assert other.SOPInstanceUID != first.SOPInstanceUID and other.PatientID != first.PatientID


def test_a_cleaned_chinese_description_is_written_in_the_files_character_set(
    clean: Callable[..., list[Dataset]],
) -> None:
    source = scan(SpecificCharacterSet="GB18030", PatientName="王^小东", StudyDescription="肝脏 王小东 平扫")
    (ds,) = clean(source, clean_descriptors=True)
    assert (ds.SpecificCharacterSet, ds.StudyDescription) == ("GB18030", "肝脏")


def test_a_code_is_kept_only_in_a_public_scheme_with_its_own_meaning(clean: Callable[..., list[Dataset]]) -> None:
    items = []
    for value, scheme, meaning in (
        ("10200004", "SCT", "Liver of Doe"), ("T-62000", "SRT", "Liver"), ("99999-4", "LN", "Doe"),
        ("4711", "99DOE", "X"), ("Doe", "SCT", "Liver"),
    ):  # fmt: skip
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
        items.append(item)
    (ds,) = clean(scan(ViewCodeSequence=items))
    told = [(i.CodeValue, i.CodingSchemeDesignator, i.CodeMeaning) for i in ds.ViewCodeSequence]
    assert told[:2] == [("10200004", "SCT", "Liver"), ("T-62000", "SRT", "Liver")]
    assert told[2] == ("99999-4", "LN", "REMOVED")
    assert told[3:] == [("REMOVED", "99REMOVED", "REMOVED")] * 2


# --- structured reports, graphics, overlays ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test-SR.dcm", "reportsi.dcm"])
def test_a_report_loses_its_tree_or_its_texts_and_names(name: str, tmp_path: Path) -> None:
    source = tmp_path / "sr.dcm"
    planted = plant_into(Path(str(get_testdata_file(name, download=False))), source)
    for clean_content in (False, True):
        out = tmp_path / str(clean_content)
        report = deidentify([source], out, Profile(clean_content=clean_content), KEY)
        copy = out / report["files"][0]["file"]
        assert found_in(copy.read_bytes(), planted) == []
        ds = dcmread(copy)
        kinds = {i.get("ValueType") for i in _items(ds)}
        if clean_content:
            assert len(list(_items(ds))) == len(list(_items(dcmread(source))))
            assert {i.TextValue for i in _items(ds) if i.get("ValueType") == "TEXT"} <= {"REMOVED"}
        else:
            assert kinds == {"TEXT"} and len(ds.ContentSequence) == 1


def _items(ds: Dataset) -> Iterator[Dataset]:
    for item in ds.get("ContentSequence", []):
        yield item
        yield from _items(item)


def test_overlays_and_curves_go_and_outlines_stay_with_the_option(clean: Callable[..., list[Dataset]]) -> None:
    def drawn() -> Dataset:
        ds = scan()
        for group, kind in ((0x6000, "R"), (0x6002, "G")):
            ds.add_new((group, 0x0010), "US", 8)
            ds.add_new((group, 0x0011), "US", 10)
            ds.add_new((group, 0x0040), "CS", kind)
            ds.add_new((group, 0x3000), "OW", bytes(10))
            ds.add_new((group, 0x4000), "LT", "Doe")
        ds.add_new((0x5000, 0x3000), "OW", bytes(4))
        return ds

    (basic,) = clean(drawn())
    assert not [e for e in basic if e.tag.group >> 8 in (0x50, 0x60)]
    (outlines,) = clean(drawn(), clean_graphics=True)
    kept = [e for e in outlines if e.tag.group >> 8 in (0x50, 0x60)]
    assert {e.tag.group for e in kept} == {0x6000} and all(e.tag.element != 0x4000 for e in kept)


def test_an_overlay_in_unused_bits_is_cleared(clean: Callable[..., list[Dataset]]) -> None:
    for signed in (0, 1):
        values = np.arange(80, dtype="<u2") - (40 if signed else 0)
        stored = (values & 0x0FFF) | (0x1000 if not signed else 0x3000)
        source = scan(PixelData=stored.astype("<u2").tobytes(), PixelRepresentation=signed)
        source.add_new((0x6000, 0x0102), "US", 12)
        (ds,) = clean(source)
        kept = np.frombuffer(ds.PixelData, "<i2" if signed else "<u2")
        np.testing.assert_array_equal(kept, values.view("<i2") if signed else values)


def test_bytes_around_the_pixels_are_not_copied(tmp_path: Path) -> None:
    ds = scan()
    ds.PixelData = ds.PixelData + b"Doe^Jane, 4711!!"
    ds.add_new(0xFFFCFFFC, "OB", b"trailing Doe")
    dcmwrite(tmp_path / "a.dcm", ds, enforce_file_format=True)
    with open(tmp_path / "a.dcm", "ab") as file:
        file.write(b"behind Doe")
    report = deidentify([tmp_path / "a.dcm"], tmp_path / "out", Profile(), KEY)
    data = (tmp_path / "out" / report["files"][0]["file"]).read_bytes()
    assert b"Doe" not in data and data.endswith(np.arange(80, dtype="<u2").tobytes())


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["US1_UNCR.dcm", "US1_J2KR.dcm", "OBXXXX1A.dcm", "RG1_UNCR.dcm", "JPEG-LL.dcm"])
def test_a_blanked_region_is_overwritten_and_the_rest_is_as_it_was(name: str, tmp_path: Path) -> None:
    source = helper.real_file(name)
    report = deidentify([source], tmp_path, Profile(clean_pixel_data=True), KEY, blank=[(4, 2, 30, 10)])
    (told,) = report["files"]
    assert told["warnings"] == []
    ds = dcmread(tmp_path / told["file"])
    assert (ds.BurnedInAnnotation, ds.file_meta.TransferSyntaxUID) == ("NO", "1.2.840.10008.1.2.1")
    assert ds.DeidentificationMethodCodeSequence[-1].CodeValue == "113101"
    before, after = dcmread(source).pixel_array, ds.pixel_array
    assert len(np.unique(after[2:12, 4:34])) == 1
    outside = np.ones(before.shape[:2], bool)
    outside[2:12, 4:34] = False
    np.testing.assert_array_equal(after[outside], before[outside])


def test_pixels_that_may_hold_text_are_warned_about(tmp_path: Path) -> None:
    report = deidentify([helper.real_file("US1_UNCR.dcm"), helper.real_file("CT_small.dcm")], tmp_path, Profile(), KEY)
    first, second = report["files"]
    assert "burned into the pixels (modality US" in first["warnings"][0]
    assert second["warnings"] == []


def test_comments_in_compressed_frames_become_spaces(tmp_path: Path) -> None:
    from pydicom.encaps import encapsulate, generate_frames

    for name, marker in (("color3d_jpeg_baseline.dcm", b"\xff\xfe"), ("US1_J2KR.dcm", b"\xff\x64")):
        ds = dcmread(helper.real_file(name))
        frame = next(generate_frames(ds.PixelData, number_of_frames=int(ds.get("NumberOfFrames") or 1)))
        at = 2 + (0 if marker == b"\xff\xfe" else 2 + int.from_bytes(frame[4:6], "big"))  # after SOI; after SIZ
        noted = frame[:at] + marker + (14).to_bytes(2, "big") + b"\0\1Doe^Jane99" + frame[at:]
        ds.PixelData, ds.NumberOfFrames = encapsulate([noted]), 1
        dcmwrite(tmp_path / name, ds)
        report = deidentify([tmp_path / name], tmp_path / f"{name}.out", Profile(), KEY)
        copy = tmp_path / f"{name}.out" / report["files"][0]["file"]
        assert b"Doe" in (tmp_path / name).read_bytes() and b"Doe" not in copy.read_bytes()
        np.testing.assert_array_equal(dcmread(copy).pixel_array, ds.pixel_array)


def test_a_name_or_a_path_in_place_of_a_uid_is_never_kept(tmp_path: Path) -> None:
    source = scan(SeriesInstanceUID="../../doe", SOPInstanceUID="/tmp/doe", FrameOfReferenceUID="doe")
    dcmwrite(tmp_path / "a.dcm", source, enforce_file_format=True)
    (told,) = deidentify([tmp_path / "a.dcm"], tmp_path / "out", Profile(retain_uids=True), KEY)["files"]
    assert re.fullmatch(r"2\.25\.\d+/2\.25\.\d+\.dcm", told["file"])
    assert b"doe" not in (tmp_path / "out" / told["file"]).read_bytes()
    assert dcmread(tmp_path / "out" / told["file"]).StudyInstanceUID == "1.2.3"


# --- what is refused, and the report ----------------------------------------------------------------------------------


def test_what_is_not_looked_into_is_refused_and_told_without_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "Doe^Jane"
    folder.mkdir()
    document = scan(EncapsulatedDocument=b"%PDF Doe", MIMETypeOfEncapsulatedDocument="application/pdf")
    document.SOPClassUID = "1.2.840.10008.5.1.4.1.1.104.1"
    private = scan(SOPClassUID="1.3.12.2.1107.5.9.1")
    short = scan()
    short.PixelData = short.PixelData[:50]
    short["PixelData"].VR = "OW"
    for name, ds in (("1document", document), ("2private", private), ("3short", short), ("4fine", scan())):
        dcmwrite(folder / name, ds, enforce_file_format=True)
    (folder / "readme.txt").write_text("Doe")
    told: list[str] = []
    report = deidentify(
        [folder], tmp_path / "out", Profile(), on_refusal=lambda path, error: told.append(Path(path).name)
    )
    assert told == ["1document", "2private", "3short"]
    assert [r["name"] for r in report["refused"]] == ["UnsupportedDicom", "UnsupportedDicom", "CannotRead"]
    assert (len(report["files"]), report["passed_over"]) == (1, 1)
    written = (tmp_path / "out" / REPORT).read_text()
    assert json.loads(written) == report
    assert not re.search("Doe|4711|Hidden|1\\.2\\.3|20260131", written)
    assert not list((tmp_path / "out").rglob("*.part"))


def test_one_instance_given_twice_is_written_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        dcmwrite(tmp_path / name, scan(), enforce_file_format=True)
    report = deidentify([tmp_path / "a", tmp_path / "b"], tmp_path / "out", Profile(), KEY)
    assert len(report["files"]) == 1 and "given twice" in report["refused"][0]["message"]


def test_a_file_without_an_instance_uid_gets_one(tmp_path: Path) -> None:
    ds = scan()
    dcmwrite(tmp_path / "a", ds, enforce_file_format=True)
    whole = (tmp_path / "a").read_bytes()
    ds = dcmread(tmp_path / "a")
    del ds.SOPInstanceUID, ds.file_meta.MediaStorageSOPInstanceUID
    dcmwrite(tmp_path / "b", ds)
    assert whole != (tmp_path / "b").read_bytes()
    report = deidentify([tmp_path / "b"], tmp_path / "out", Profile(retain_uids=True), KEY)
    assert len(report["files"]) == 1


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    dcmwrite(tmp_path / "a.dcm", scan(), enforce_file_format=True)
    for blank, options, message in (
        ([(0, 0, 0, 4)], {}, "above 0"),
        ([], {"clean_pixel_data": True}, "name the regions"),
    ):
        with pytest.raises(EdgemedError, match=message):
            deidentify([tmp_path / "a.dcm"], tmp_path / "out", Profile(**options), blank=blank)  # type: ignore[arg-type]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no DICOM")
    with pytest.raises(NoInput, match="none of the files"):
        deidentify([tmp_path / "texts"], tmp_path / "out", Profile())


def test_a_key_file_is_made_for_its_owner_alone_and_refused_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "site.key"
    key = read_key(file)
    assert (len(key), file.stat().st_mode & 0o777) == (32, 0o600)
    assert read_key(file) == key
    file.chmod(0o644)
    with pytest.raises(CannotRead, match="chmod 600"):
        read_key(file)
    file.chmod(0o600)
    file.write_text("secret")
    with pytest.raises(CannotRead, match="hexadecimal"):
        read_key(file)
