"""Series are found by their headers, taken apart, sorted and judged; hostile folders and archives are bounded."""

from __future__ import annotations

import importlib.util
import os
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgemed.dicom import Limits
from edgemed.dicom import series as module
from edgemed.dicom.select import choose
from edgemed.dicom.series import Found, Series, find_series, is_source, open_source
from edgemed.errors import InvalidInput, NoInput, ResourceLimit

_HELPER = Path(__file__).resolve().parents[1] / "helpers" / "made_series.py"
_SPEC = importlib.util.spec_from_file_location("made_series", _HELPER)
assert _SPEC is not None and _SPEC.loader is not None
made = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made)


def found(path: Path, **more: object) -> Found:
    with open_source(path) as source:
        return find_series(source.paths, **more)  # type: ignore[arg-type]


def only(path: Path) -> Series:
    (series,) = found(path).series
    return series


def depths(series: Series) -> list[float]:
    return [s.place.position[2] for s in series.slices if s.place.position]


# --- finding and sorting ----------------------------------------------------------------------------------------------


def test_slices_are_sorted_along_the_normal_not_by_name_or_number(tmp_path: Path) -> None:
    made.write_series(tmp_path, 5, 2.0)
    series = only(tmp_path)
    assert depths(series) == [0, 2, 4, 6, 8]
    assert [s.number for s in series.slices] == [5, 4, 3, 2, 1]
    assert (series.verdict.kind, series.verdict.spacing_mm) == ("uniform", (2.0, 0.8, 0.5))
    assert (series.name, series.uid, series.modality) == (made.SERIES, made.SERIES, "CT")


def test_two_series_of_a_folder_tree_are_told_apart(tmp_path: Path) -> None:
    made.write_series(tmp_path / "a" / "deep", 3)
    made.write_series(tmp_path / "b", 4, series=made.SERIES + ".9")
    assert sorted((s.name, len(s.slices)) for s in found(tmp_path).series) == [
        (made.SERIES, 3),
        (made.SERIES + ".9", 4),
    ]


def test_files_without_uids_are_grouped_by_folder_and_geometry(tmp_path: Path) -> None:
    made.write_series(tmp_path / "a", 3, series=None)
    made.write_series(tmp_path / "b", 2, series="")
    made.write_series(tmp_path / "b", 2, series="", prefix="t", orientation=made.CORONAL)
    result = found(tmp_path)
    assert [(s.uid, len(s.slices)) for s in result.series] == [(None, 3), (None, 2), (None, 2)]
    assert len({s.name for s in result.series}) == 3


def test_the_published_ct_series_is_uniform(segmentator_files: Path) -> None:
    series = only(segmentator_files / "example_ct_dicom")
    assert (len(series.slices), series.uid, series.verdict.kind) == (20, None, "uniform")
    assert series.verdict.spacing_mm == pytest.approx((2, 0.9765625, 0.9765625))
    assert series.is_original


def test_files_that_are_no_images_are_passed_over(tmp_path: Path) -> None:
    made.write_series(tmp_path, 3)
    (tmp_path / "notes.txt").write_text("seen")
    (tmp_path / "empty").write_bytes(b"")
    made.write_slice(tmp_path / "report.dcm", Modality="SR", PixelData=None)
    result = found(tmp_path)
    assert (len(result.series), result.passed_over, result.failed) == (1, 3, ())


def test_a_damaged_slice_is_told_and_leaves_a_gap(tmp_path: Path) -> None:
    paths = made.write_series(tmp_path, 5)
    data = paths[2].read_bytes()
    paths[2].write_bytes(data[:300])
    result = found(tmp_path)
    assert [Path(p) for p, _ in result.failed] == [paths[2]]
    assert result.series[0].verdict.kind == "gaps"


def test_a_folder_of_texts_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("seen")
    with pytest.raises(NoInput, match="none of 1 files"):
        found(tmp_path)


def test_an_empty_folder_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(NoInput, match="holds no files"):
        found(tmp_path)


# --- what a series may hold -------------------------------------------------------------------------------------------


def test_copies_of_a_file_count_once(tmp_path: Path) -> None:
    paths = made.write_series(tmp_path, 3)
    (tmp_path / "again.dcm").write_bytes(paths[0].read_bytes())
    series = only(tmp_path)
    assert (len(series.slices), series.verdict.kind) == (3, "uniform")
    assert series.verdict.reasons == ("left out as copies of others: 1",)


def test_two_different_slices_at_one_place_are_duplicates(tmp_path: Path) -> None:
    made.write_series(tmp_path, depths=[0, 2, 2, 4])
    series = only(tmp_path)
    assert (len(series.slices), series.verdict.kind) == (4, "duplicates")


@pytest.mark.parametrize(
    ("keyword", "values"),
    [("TemporalPositionIdentifier", (1, 2, 3)), ("EchoTime", ("4.6", "2.3")), ("AcquisitionNumber", (2, 1))],
)
def test_phases_and_echoes_become_stacks_of_their_own(tmp_path: Path, keyword: str, values: tuple[object, ...]) -> None:
    for phase, value in enumerate(values):
        made.write_series(tmp_path, 4, prefix=f"p{phase}-", **{keyword: value})
    stacks = found(tmp_path).series
    assert [s.name for s in stacks] == [f"{made.SERIES}#{k}" for k in range(1, len(values) + 1)]
    assert {(len(s.slices), s.verdict.kind) for s in stacks} == {(4, "uniform")}
    assert "several phases or echoes" in stacks[0].verdict.reasons[0]


def test_rules_see_what_a_stack_has_of_its_own(tmp_path: Path) -> None:
    for kind in ("WATER", "FAT"):
        made.write_series(tmp_path, 4, prefix=kind, ImageType=["DERIVED", "PRIMARY", "DIXON", kind])
    fat, water = found(tmp_path).series
    assert (fat.facts["ImageType"][3], water.facts["ImageType"][3]) == ("FAT", "WATER")


def test_a_time_that_every_slice_has_of_its_own_is_no_phase(tmp_path: Path) -> None:
    for k in range(4):
        for phase in (1, 2):
            made.write_slice(
                tmp_path / f"{phase}{k}.dcm",
                position=(0, 0, 2 * k),
                TriggerTime=str(10 * k + phase),
                AcquisitionNumber=phase,
            )
    assert [len(s.slices) for s in found(tmp_path).series] == [4, 4]


def test_planes_of_one_series_are_stacks_of_their_own(tmp_path: Path) -> None:
    made.write_series(tmp_path, 4)
    for k in range(3):
        made.write_slice(tmp_path / f"c{k}.dcm", position=(0, 3 * k, 0), orientation=made.CORONAL)
    axial, coronal = found(tmp_path).series
    assert (len(axial.slices), axial.verdict.spacing_mm) == (4, (2.0, 0.8, 0.5))
    assert (len(coronal.slices), coronal.verdict.spacing_mm) == (3, (3.0, 0.8, 0.5))
    assert "2 orientations" in axial.verdict.reasons[0]


def test_a_series_that_turns_is_not_taken_apart(tmp_path: Path) -> None:
    for k in range(12):
        a = k * np.pi / 12
        made.write_slice(tmp_path / f"{k}.dcm", orientation=(np.cos(a), np.sin(a), 0, 0, 0, -1), InstanceNumber=k)
    series = only(tmp_path)
    assert (len(series.slices), series.verdict.kind) == (12, "mixed orientation")
    assert [s.number for s in series.slices] == list(range(12))


def test_a_localizer_is_no_volume(tmp_path: Path) -> None:
    made.write_series(tmp_path, 3, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series = only(tmp_path)
    assert (series.verdict.kind, series.is_original, series.verdict.is_volume) == ("localizer", False, False)


@pytest.mark.parametrize(
    "elements",
    [
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.4", "Modality": "CT"},
        {"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "SCREEN SAVE"]},
        {"Modality": "SR"},
        {"Modality": "DOC"},
        {"Modality": "RTDOSE"},
        {"Modality": "SEG"},
    ],
    ids=["secondary capture", "coloured screenshot of a CT", "dose sheet", "screen save", "SR", "DOC", "dose", "SEG"],
)
def test_what_is_no_picture_of_a_patient_is_not_taken_before_one_that_is(
    tmp_path: Path, elements: dict[str, object]
) -> None:
    made.write_series(tmp_path / "a", 9, SeriesInstanceUID="1.2.1", **elements)
    made.write_series(tmp_path / "b", 2, SeriesInstanceUID="1.2.2")
    stacks = found(tmp_path).series
    assert {s.uid: s.is_original for s in stacks} == {"1.2.1": False, "1.2.2": True}
    assert choose(stacks)[0].uid == "1.2.2"


def test_frames_of_an_enhanced_file_are_slices_by_phase(tmp_path: Path) -> None:
    frames = [(z, phase) for z in (4.0, 0.0, 2.0) for phase in (1, 2)]
    path = made.write_enhanced(tmp_path / "enhanced.dcm", frames)
    first, second = found(path).series
    assert [s.frame for s in first.slices] == [2, 4, 0]
    assert [s.frame for s in second.slices] == [3, 5, 1]
    assert first.verdict.spacing_mm == (2.0, 0.8, 0.5)


def test_frames_of_a_film_have_no_place(tmp_path: Path) -> None:
    path = made.write_slice(tmp_path / "film.dcm", np.zeros((7, 6, 8), np.uint16), NumberOfFrames=7, Modality="US")
    series = only(path)
    assert (len(series.slices), series.verdict.kind) == (7, "unplaced")


def test_a_missing_position_makes_the_series_unplaced(tmp_path: Path) -> None:
    made.write_series(tmp_path, 3, orientation=None)
    assert only(tmp_path).verdict.kind == "unplaced"


@pytest.mark.parametrize("spacing", [(0, 0), (0.8, 0), None])
def test_a_pixel_spacing_that_is_none_makes_the_series_unplaced(
    tmp_path: Path, spacing: tuple[float, ...] | None
) -> None:
    for k in range(3):
        made.write_slice(tmp_path / f"{k}.dcm", position=(0, 0, k), spacing=spacing)
    assert only(tmp_path).verdict.kind == "unplaced"


@pytest.mark.parametrize("orientation", [(1, 0, 0, 1, 0, 0), (0, 0, 0, 0, 0, 0), (2, 0, 0, 0, 2, 0)])
def test_an_orientation_that_is_no_plane_is_not_believed(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    made.write_series(tmp_path, 3, orientation=orientation)
    assert only(tmp_path).verdict.kind == "unplaced"


def test_the_summary_of_a_series_names_no_patient(tmp_path: Path) -> None:
    made.write_series(tmp_path, 3, SeriesDescription="Planted description")
    series = only(tmp_path)
    assert series.summary == f"{made.SERIES}  CT  3 slices of 8 x 6  uniform"
    assert series.facts["SeriesDescription"] == "Planted description"


# --- folders, DICOMDIR, archives --------------------------------------------------------------------------------------


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = made.write_slice(tmp_path / "outside" / "x.dcm")
    made.write_series(tmp_path / "in", 2)
    os.symlink(outside, tmp_path / "in" / "link.dcm")
    os.symlink(outside.parent, tmp_path / "in" / "folder")
    assert len(only(tmp_path / "in").slices) == 2


def test_a_name_with_a_line_break_is_a_name(tmp_path: Path) -> None:
    made.write_slice(tmp_path / "a\nb.dcm")
    assert only(tmp_path).slices[0].path.endswith("a\nb.dcm")


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 3)
    for k in range(4):
        (tmp_path / str(k)).write_bytes(b"x")
    with pytest.raises(ResourceLimit, match="more than 3 files"):
        found(tmp_path)


def dicomdir(folder: Path, *file_ids: list[str]) -> Path:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.sequence import Sequence
    from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage

    records = []
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.FileSetID = "TEST"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom tells that such file ids are none
        for names in file_ids:
            record = Dataset()
            record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", names
            records.append(record)
        ds.DirectoryRecordSequence = Sequence(records)
        ds.save_as(folder / "DICOMDIR", enforce_file_format=True)
    return folder / "DICOMDIR"


def test_a_dicomdir_lists_the_files(tmp_path: Path) -> None:
    made.write_series(tmp_path / "IMAGES", 3)
    path = dicomdir(tmp_path, *(["IMAGES", f"s{k:04d}.dcm"] for k in (1, 2)))
    assert is_source(path)
    assert len(only(path).slices) == 2


def test_a_dicomdir_of_a_disc_whose_names_are_in_lower_case_is_read(tmp_path: Path) -> None:
    made.write_slice(tmp_path / "images" / "im1")
    assert len(only(dicomdir(tmp_path, ["IMAGES", "IM1"])).slices) == 1


def test_a_file_that_a_dicomdir_lists_and_that_is_missing_is_told(tmp_path: Path) -> None:
    made.write_slice(tmp_path / "IM1")
    result = found(dicomdir(tmp_path, ["IM1"], ["IM2"]))
    assert [Path(path).name for path, _ in result.failed] == ["IM2"]


def test_the_published_dicomdir_is_read() -> None:
    from pydicom.data import get_testdata_file

    path = get_testdata_file("DICOMDIR", download=False)
    assert isinstance(path, str)
    assert sum(len(s.slices) for s in found(Path(path)).series) == 31


@pytest.mark.parametrize("names", [["..", "x.dcm"], ["/etc", "passwd"], ["a/../../x.dcm"], ["", "x.dcm"]])
def test_a_dicomdir_that_leads_out_of_its_folder_is_refused(tmp_path: Path, names: list[str]) -> None:
    made.write_slice(tmp_path / "x.dcm")
    (tmp_path / "media").mkdir()
    with pytest.raises(InvalidInput, match="outside its folder"):
        found(dicomdir(tmp_path / "media", names))


def test_a_dicomdir_that_leads_out_through_a_link_is_refused(tmp_path: Path) -> None:
    made.write_slice(tmp_path / "x.dcm")
    (tmp_path / "media").mkdir()
    os.symlink(tmp_path, tmp_path / "media" / "IN")
    with pytest.raises(InvalidInput, match="outside its folder"):
        found(dicomdir(tmp_path / "media", ["IN", "x.dcm"]))


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def test_an_archive_is_unpacked_and_removed(tmp_path: Path) -> None:
    paths = made.write_series(tmp_path / "in", 3)
    path = archive(tmp_path / "a.zip", {f"Planted/{p.name}": p.read_bytes() for p in paths} | {"readme": b"text"})
    assert is_source(path)
    with open_source(path) as source:
        (series,) = find_series(source.paths).series
        inside = source.paths[0]
        assert source.shown(inside) == f"{path}/000001.dcm"
        assert os.stat(os.path.dirname(inside)).st_mode & 0o077 == 0
    assert len(series.slices) == 3
    assert not os.path.exists(os.path.dirname(inside))


@pytest.mark.parametrize("name", ["../../evil.dcm", "/tmp/evil.dcm", "a\\..\\..\\evil.dcm"])
def test_names_in_an_archive_are_no_paths(tmp_path: Path, name: str) -> None:
    data = made.write_slice(tmp_path / "in" / "x.dcm").read_bytes()
    path = archive(tmp_path / "a.zip", {name: data})
    before = sorted(p for p in tmp_path.rglob("*"))
    with open_source(path) as source:
        (unpacked,) = source.paths
        assert os.path.basename(unpacked) == "000001.dcm"
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    head = made.write_slice(tmp_path / "in" / "x.dcm").read_bytes()
    path = archive(tmp_path / "bomb.zip", {"x.dcm": head + bytes(64 << 20)})
    started = time.perf_counter()
    with pytest.raises(ResourceLimit, match="200 times"):
        found(path)
    assert time.perf_counter() - started < 20


def test_an_archive_of_many_small_bombs_is_refused(tmp_path: Path) -> None:
    head = made.write_slice(tmp_path / "in" / "x.dcm").read_bytes()
    path = archive(tmp_path / "bombs.zip", {f"{k}.dcm": head + bytes(1 << 20) for k in range(40)})
    with pytest.raises(ResourceLimit, match="200 times"):
        found(path)


@pytest.mark.parametrize("cut", [100, 2000])
def test_a_damaged_archive_is_refused(tmp_path: Path, cut: int) -> None:
    data = made.write_slice(tmp_path / "in" / "x.dcm", np.arange(4800, dtype=np.uint16).reshape(60, 80)).read_bytes()
    path = archive(tmp_path / "a.zip", {"x.dcm": data})
    whole = bytearray(path.read_bytes())
    whole[cut : cut + 40] = os.urandom(40)
    path.write_bytes(bytes(whole))
    with pytest.raises(InvalidInput, match="damaged"):
        found(path)


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x.dcm": made.write_slice(tmp_path / "in" / "x.dcm").read_bytes()})
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InvalidInput, match="encrypted"):
        found(path)


# --- cost -------------------------------------------------------------------------------------------------------------


def test_a_thousand_slices_cost_little_memory_and_no_more_time_each(tmp_path: Path) -> None:
    one = made.write_slice(tmp_path / "one.dcm", SOPInstanceUID="1.2.10000", ImagePositionPatient=["0", "0", "10000"])
    folder = tmp_path / "many"
    folder.mkdir()
    for k in range(1000):  # one file with other digits: writing is not what is measured
        (folder / f"{k:04d}.dcm").write_bytes(one.read_bytes().replace(b"10000", b"1%04d" % k))
    times: list[float] = []
    paths = [str(p) for p in sorted(folder.iterdir())]
    tracemalloc.start()
    result = find_series(paths, progress=lambda done: times.append(time.perf_counter()))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (series,) = result.series
    assert (len(series.slices), series.verdict.kind) == (1000, "uniform")
    assert held < 3 << 20
    first, last = times[299] - times[99], times[999] - times[799]
    assert last < 3 * first


def test_a_declared_million_of_frames_is_refused(tmp_path: Path) -> None:
    path = made.write_slice(tmp_path / "x.dcm", NumberOfFrames=1_000_000)
    with pytest.raises(ResourceLimit, match="1000000 frames"):
        found(path)


def test_a_header_beyond_the_limits_is_refused(tmp_path: Path) -> None:
    made.write_series(tmp_path, 1)
    with open_source(tmp_path) as source, pytest.raises(ResourceLimit, match="more than 10 data elements"):
        find_series(source.paths, limits=Limits(max_elements=10))


def test_a_deflated_bomb_costs_its_own_file_only(tmp_path: Path) -> None:
    import zlib

    made.write_series(tmp_path, 3)
    whole = made.write_slice(tmp_path / "in" / "x.dcm").read_bytes()
    syntax, deflated = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"
    start = whole.index(syntax)
    at = whole.index(b"\x08\0\x16\0UI")  # the data set begins with the SOP class
    meta = whole[:start] + deflated + whole[start + len(syntax) : at]
    meta = meta.replace(b"UI" + len(syntax).to_bytes(2, "little") + deflated, b"UI\x16\0" + deflated)
    meta = meta[:140] + (int.from_bytes(meta[140:144], "little") + 2).to_bytes(4, "little") + meta[144:]
    packed = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    data = packed.compress(whole[at:] + bytes(200 << 20)) + packed.flush()
    (tmp_path / "in" / "x.dcm").write_bytes(meta + data)
    result = found(tmp_path)
    assert len(result.series[0].slices) == 3
    ((_, error),) = result.failed
    assert isinstance(error, ResourceLimit)
    assert "deflated data set" in str(error)


def test_deep_sequences_cost_their_own_file_only(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    made.write_series(tmp_path, 3)
    inner = Dataset()
    for _ in range(150):
        outer = Dataset()
        outer.RelatedSeriesSequence = Sequence([inner])
        outer["RelatedSeriesSequence"].is_undefined_length = True
        inner = outer
    made.write_slice(tmp_path / "deep.dcm", series="1.2.3", RelatedSeriesSequence=Sequence([inner]))
    result = found(tmp_path)
    assert made.SERIES in {s.name for s in result.series}
    assert {type(error) for _, error in result.failed} <= {ResourceLimit}
