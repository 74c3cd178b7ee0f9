"""Series in folders, DICOMDIRs and zip archives: found by their headers alone, taken apart, sorted, judged.

    with open_source("study.zip") as source:
        found = find_series(source.paths)
        for series in found.series: print(series.name, len(series.slices), series.verdict.kind)

A `Series` here is one stack: one orientation and size, a slice for each place. A DICOM series that holds more (phases,
echoes, planes) becomes several: UID#1, UID#2 ... Headers are parsed in a child process within limits; one slice costs
about 1 kB here, whatever its pixels. Files without a Series Instance UID are grouped by folder and geometry.

Does not cover choosing one (`select`), reading pixels (`reader`), or volume files (`volume_file`).
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from edgemed.dicom.geometry_verdict import MAX_ORIENTATIONS, Place, Verdict, depth_of, judge, orientation_groups
from edgemed.dicom.limits import DEFAULT_LIMITS, Limits
from edgemed.dicom.reader import _ERRORS, Reader
from edgemed.dicom.sniff import kind_of, sniff
from edgemed.errors import CannotRead, CannotWrite, EdgemedError, InvalidInput, NoInput, ResourceLimit, UnsupportedDicom

MAX_FILES = 100_000
"""In one folder or archive, with everything below it; of frames in one file."""

_MAX_DIRECTORY = 10 << 20
"""Bytes of an archive's list of members, which take some 100 each."""

PHASES = (
    "TemporalPositionIdentifier", "TemporalPositionIndex", "EchoNumbers", "EchoTime", "EffectiveEchoTime",
    "TriggerTime", "NominalPercentageOfCardiacPhase", "DiffusionBValue", "ImageType", "AcquisitionNumber",
    "AcquisitionTime",
)  # fmt: skip
"""What tells apart slices that lie at one place, in the order in which they are tried."""

_MAX_REPLY = 64 << 20
_CHUNK = 1 << 20
_FREE_BYTES = 256 << 20
"""What an archive must leave free on the disk that it is unpacked to."""
_ZIP = b"PK\x03\x04"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_NOT_IMAGES = ("SR", "PR", "KO", "SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "DOC", "REG", "FID")


@dataclass(frozen=True, slots=True)
class SliceHeader:
    """One slice: frame `frame` of the file at `path`, where it lies, and what tells it from others at that place.

    phases: the values of PHASES as JSON, None where there is none.
    """

    path: str
    frame: int
    place: Place
    sop_instance_uid: str | None = None
    sop_class_uid: str = ""
    number: int | None = None
    phases: tuple[str | None, ...] = (None,) * len(PHASES)


@dataclass(frozen=True, eq=False)
class Series:
    """One stack of slices, sorted along the normal (without positions: by instance number).

    name: SeriesInstanceUID, with #1, #2 ... where the DICOM series holds several stacks; "no-uid-1" ... without one.
    facts: DICOM keyword -> value of the first slice, for the selection rules. They may name the patient: never print.
    """

    name: str
    uid: str | None
    modality: str
    slices: tuple[SliceHeader, ...]
    verdict: Verdict
    study_uid: str | None = None
    frame_of_reference_uid: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(s.place for s in self.slices)

    @property
    def is_original(self) -> bool:
        """Whether these are pictures of a patient, not drawn, rendered or derived ones or such to plan on."""
        kinds = self.facts.get("ImageType") or []
        words = {str(k).upper() for k in (kinds if isinstance(kinds, list) else [kinds])}
        secondary = str(self.slices[0].sop_class_uid).startswith(_SECONDARY_CAPTURE)
        return not (words & {"LOCALIZER", "DERIVED", "SCREEN SAVE"} or secondary or self.modality in _NOT_IMAGES)

    @property
    def summary(self) -> str:
        """One line without anything of the patient: name, modality, slices, matrix, verdict."""
        place = self.slices[0].place
        why = f" ({'; '.join(self.verdict.reasons)})" if self.verdict.reasons else ""
        count = len(self.slices)
        return (
            f"{self.name}  {self.modality}  {count} slice{'s' if count != 1 else ''} of {place.columns} x {place.rows}"
            f"  {self.verdict.kind}{why}"
        )


@dataclass(frozen=True)
class Found:
    """What a scan found: series in a stable order, how many files were no images, and those that could not be read."""

    series: tuple[Series, ...]
    passed_over: int = 0
    failed: tuple[tuple[str, EdgemedError], ...] = ()


# --- where files come from --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The files to look into, and how a file is called in messages and results."""

    paths: tuple[str, ...]
    shown: Callable[[str], str] = str


def is_source(path: str | os.PathLike[str]) -> bool:
    """Tell whether `path` is a folder, a DICOMDIR or a zip archive."""
    name = os.fspath(path)
    if os.path.isdir(name) or os.path.basename(name).upper() == "DICOMDIR":
        return True
    try:
        with open(name, "rb") as file:
            return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.read(4) == _ZIP
    except (OSError, ValueError):
        return False


@contextmanager
def open_source(path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> Iterator[Source]:
    """Give the files of a folder, DICOMDIR, zip archive or single file; an unpacked archive is removed at the end.

    Raises CannotRead, NoInput (no files), InvalidInput (a DICOMDIR that leads out of its folder, a damaged archive),
    ResourceLimit (too many files, an archive that unpacks to too much), CannotWrite (no room to unpack it).
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        yield Source(tuple(_walk(name)))
    elif os.path.basename(name).upper() == "DICOMDIR":
        yield Source(tuple(_listed(name, limits)))
    elif is_source(name):
        with tempfile.TemporaryDirectory(prefix="edgemed-") as folder:
            yield Source(tuple(_unpack(name, folder, limits)), lambda p: f"{name}/{os.path.basename(p)}")
    else:
        sniff(name)
        yield Source((name,))


def _walk(folder: str) -> Iterator[str]:
    """Yield the plain files below a folder in a stable order; links are passed over."""

    def refuse(error: OSError) -> None:
        raise CannotRead(f"{error.filename or folder} cannot be listed: {error.strerror or 'refused'}")

    count = 0
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        for file in sorted(files):
            path = os.path.join(root, file)
            if os.path.islink(path) or not stat.S_ISREG(os.lstat(path).st_mode):
                continue
            count += 1
            if count > MAX_FILES:
                raise ResourceLimit(f"{folder} holds more than {MAX_FILES} files; pass the folder of one study")
            yield path
    if not count:
        raise NoInput(f"{folder} holds no files; a folder with the files of a series was expected")


def _listed(dicomdir: str, limits: Limits) -> Iterator[str]:
    """Yield the files that a DICOMDIR lists, each below its folder."""
    with HeaderReader(limits) as headers:
        listed = headers.ask(dicomdir, directory=True)["files"]
    root = os.path.realpath(os.path.dirname(os.path.abspath(dicomdir)))
    if not listed:
        raise NoInput(f"{dicomdir} lists no images")
    for names in listed:
        path = os.path.join(os.path.dirname(dicomdir), *names)
        plain = all(n and n not in (".", "..") and not set(n) & set("/\\:\0") for n in names)
        if plain and not os.path.exists(path):  # mounted discs often show their names in lower case
            small = os.path.join(os.path.dirname(dicomdir), *(n.lower() for n in names))
            path = small if os.path.exists(small) else path
        if not plain or os.path.commonpath((root, os.path.realpath(path))) != root:
            raise InvalidInput(f"{dicomdir} lists a file outside its folder; it is damaged or hostile")
        yield path


def _unpack(archive: str, folder: str, limits: Limits) -> Iterator[str]:
    """Yield the members of an archive that may be images, each written to `folder` under a number of its own.

    Names in the archive are never used as paths. Sizes are counted while unpacking, never believed.
    """
    total = 0
    packed_total = os.path.getsize(archive)
    try:
        _check_directory(archive)
        with zipfile.ZipFile(archive) as opened:
            members = [m for m in opened.infolist() if not m.is_dir()]
            if len(members) > MAX_FILES:
                raise ResourceLimit(f"{archive} holds {len(members)} files; the limit is {MAX_FILES}")
            for number, member in enumerate(members, 1):
                if member.flag_bits & 1:
                    raise InvalidInput(f"{archive} is encrypted; unpack it and pass the folder")
                with opened.open(member) as stream:
                    head = stream.read(132)
                    if kind_of(head, max(member.file_size, len(head))) is None:
                        continue
                    path = os.path.join(folder, f"{number:06d}.dcm")
                    with open(path, "xb") as file:
                        part, size = head, 0
                        while part:
                            size, total = size + len(part), total + len(part)
                            _check_unpacked(archive, size, total, member.compress_size, packed_total, folder, limits)
                            file.write(part)
                            part = stream.read(_CHUNK)
                yield path
    # What zipfile raises on damaged members, other compressions and passwords, each by its own class.
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
        if "Overlapped" in str(error):  # later versions of zipfile find this kind of bomb before anything is unpacked
            raise ResourceLimit(f"{archive} has several members in one place; it is no archive of images") from None
        raise InvalidInput(f"{archive} is a damaged or unsupported zip archive ({type(error).__name__})") from None
    except OSError as error:
        raise CannotWrite(f"{archive} cannot be unpacked: {error.strerror or 'refused'}") from None
    except Exception as error:
        if type(error).__module__ != "zlib":  # zlib.error and lzma.LZMAError have no common base
            raise
        raise InvalidInput(f"{archive} is a damaged zip archive") from None


def _check_directory(archive: str) -> None:
    """Raise ResourceLimit if the list of an archive's members, all of which zipfile reads at once, is too long."""
    with open(archive, "rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end and end[zipfile._ECD_SIZE] > _MAX_DIRECTORY:  # type: ignore[attr-defined]
        raise ResourceLimit(f"{archive} has a list of members of more than {_MAX_DIRECTORY >> 20} MiB")


def _check_unpacked(
    archive: str, size: int, total: int, packed: int, packed_total: int, folder: str, limits: Limits
) -> None:
    """Raise ResourceLimit or CannotWrite if a member or the whole archive unpacks to too much."""
    floor = limits.expansion_floor_bytes
    # Deflate reaches 1032:1; images reach about 20:1 (the same limit as for deflated data sets).
    if (size > floor and size > 200 * packed) or (total > floor and total > 200 * packed_total):
        raise ResourceLimit(f"{archive} unpacks to more than 200 times its size; it is no archive of images")
    if total > limits.max_declared_bytes:
        raise ResourceLimit(f"{archive} unpacks to more than {limits.max_declared_bytes >> 30} GiB")
    if total % (64 * _CHUNK) < _CHUNK and shutil.disk_usage(folder).free < _FREE_BYTES:
        raise CannotWrite(f"{archive} cannot be unpacked: the disk of temporary files is full")


# --- headers ----------------------------------------------------------------------------------------------------------


class HeaderReader(Reader):
    """Reads headers through one child process; a context manager. A file that kills the child gets its own error."""

    worker = "edgemed.dicom.series_worker"

    def __enter__(self) -> HeaderReader:
        return self

    def ask(self, path: str, *, directory: bool = False, keywords: Sequence[str] = ()) -> dict[str, Any]:
        """Return what `series_worker` says of a file. Raises the errors of `edgemed.dicom`."""
        self._request = {"path": os.path.abspath(path), "directory": directory, "keywords": list(keywords)}
        sniff(path)
        self.start()
        try:
            reply: Any = self._ask(path, 0, None)
        except EdgemedError as error:
            raise type(error)(f"{path}: {error}") from None
        return dict(reply)

    def _write(self, message: dict[str, Any]) -> None:
        super()._write(self._request if "frame" in message else message)

    def _reply(self, child: subprocess.Popen[bytes]) -> Any:
        assert child.stdout is not None
        line = child.stdout.readline(_MAX_REPLY)
        if not line.endswith(b"\n"):
            raise EOFError
        facts = json.loads(line)
        if "error" in facts:
            raise _ERRORS.get(facts["error"], InvalidInput)(str(facts["message"]))
        return facts


def find_series(
    paths: Sequence[str],
    *,
    keywords: Sequence[str] = (),
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int], None] | None = None,
) -> Found:
    """Return the series in these files.

    keywords: what selection rules ask for beside `series_worker.FACTS`. progress: called with 1 after each file.

    Raises NoInput if no file is an image.
    """
    groups: dict[Hashable, _Group] = {}
    failed: list[tuple[str, EdgemedError]] = []
    passed_over = 0
    with HeaderReader(limits) as headers:
        for path in paths:
            try:
                reply = headers.ask(path, keywords=keywords)
            except (UnsupportedDicom, NoInput):
                passed_over += 1
            except EdgemedError as error:
                if isinstance(error, InvalidInput) and not _is_dicom(path):
                    passed_over += 1
                else:
                    failed.append((path, error))
            else:
                slices = tuple(_slices(path, reply))
                groups.setdefault(_group_key(path, reply, slices[0]), _Group(reply)).slices.extend(slices)
            if progress is not None:
                progress(1)
    if not groups and failed:
        raise failed[0][1]
    if not groups:
        raise NoInput(f"none of {len(paths)} files is a DICOM image; the files of a series were expected")
    named = Counter(group.uid is None for group in groups.values())
    nameless = iter(range(1, named[True] + 1))
    found = [series for group in groups.values() for series in _stacks(group, group.uid or f"no-uid-{next(nameless)}")]
    return Found(tuple(found), passed_over, tuple(failed))


def _is_dicom(path: str) -> bool:
    """Return whether a file that was refused is DICOM, if only by its mark: it is told then, not passed over."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return kind_of(file.read(132), os.path.getsize(path)) in ("dicom", "bare-dicom")
    except OSError:
        return False


class _Group:
    """The slices of one series as they are found, with what the first file says of all."""

    def __init__(self, reply: Mapping[str, Any]) -> None:
        self.uid: str | None = reply["series"]
        self.reply = reply
        self.slices: list[SliceHeader] = []


def _slices(path: str, reply: Mapping[str, Any]) -> Iterator[SliceHeader]:
    rows, columns = reply["size"]
    for frame, (spacing, orientation, position, phases) in enumerate(reply["frames"]):
        yield SliceHeader(
            path,
            frame,
            Place(rows, columns, *_sound(spacing, orientation, position)),
            reply["instance"],
            sys.intern(reply["class"]),
            reply["number"],
            tuple(None if p is None else sys.intern(p) for p in phases),
        )


def _sound(spacing: Any, orientation: Any, position: Any) -> tuple[Any, Any, Any]:
    """Return the three as tuples; None for what makes no sense: no distance, or directions that are no plane."""
    if spacing is not None and not all(0 < s < 1e4 for s in spacing):
        spacing = None
    if orientation is not None:
        row, column = orientation[:3], orientation[3:]
        lengths = [sum(v * v for v in direction) for direction in (row, column)]
        skew = sum(a * b for a, b in zip(row, column, strict=True))
        if max(abs(length - 1) for length in lengths) > 0.01 or abs(skew) > 0.01:
            orientation = None
    return tuple(None if v is None else tuple(v) for v in (spacing, orientation, position))  # type: ignore[return-value]


def _group_key(path: str, reply: Mapping[str, Any], first: SliceHeader) -> Hashable:
    if reply["series"]:
        return str(reply["series"])
    turned = first.place.orientation and tuple(round(v, 2) for v in first.place.orientation)
    spacing = first.place.spacing_mm and tuple(round(v, 3) for v in first.place.spacing_mm)
    return (os.path.dirname(path), reply["modality"], first.place.rows, first.place.columns, turned, spacing)


# --- stacks -----------------------------------------------------------------------------------------------------------


def _stacks(group: _Group, name: str) -> Iterator[Series]:
    """Yield the stacks of one DICOM series, the largest first."""
    slices, copies = _without_copies(group.slices)
    note = (f"left out as copies of others: {copies}",) if copies else ()
    by_plane = orientation_groups([s.place for s in slices])
    if len(by_plane) > MAX_ORIENTATIONS:
        parts, why = [slices], ""
    else:
        planes = [[slices[i] for i in indices] for indices in by_plane]
        parts = [part for plane in planes for part in _phases(plane)]
        why = " and ".join(
            ([f"{len(planes)} orientations or sizes"] if len(planes) > 1 else [])
            + (["several phases or echoes"] if len(parts) > len(planes) else [])
        )
    parts.sort(key=len, reverse=True)
    for number, part in enumerate(parts, 1):
        ordered = tuple(sorted(part, key=_order))
        types = {word for s in part for word in (s.phases[_IMAGE_TYPE] or "").upper().split('"')}
        verdict = judge([s.place for s in ordered], localizer="LOCALIZER" in types)
        more = (f"part {number} of {len(parts)}: the series has {why}",) if len(parts) > 1 else ()
        yield Series(
            name if len(parts) == 1 else f"{name}#{number}",
            group.uid,
            str(group.reply["modality"]),
            ordered,
            verdict.with_reasons(*more, *note),
            group.reply["study"],
            group.reply["reference"],
            {**group.reply["facts"], **_facts_of(ordered[0])},
        )


_IMAGE_TYPE = PHASES.index("ImageType")


def _facts_of(item: SliceHeader) -> dict[str, Any]:
    """Return what a stack's own slices say where the stacks of a series differ."""
    return {name: json.loads(value) for name, value in zip(PHASES, item.phases, strict=True) if value is not None}


def _order(item: SliceHeader) -> tuple[float, int, int]:
    placed = item.place.orientation is not None and item.place.position is not None
    return (depth_of(item.place) if placed else 0.0, item.number or 0, item.frame)


def _without_copies(slices: Sequence[SliceHeader]) -> tuple[list[SliceHeader], int]:
    """Return the slices without a second file of one instance, and how many those were."""
    kept: dict[Hashable, SliceHeader] = {}
    for item in slices:
        known = item.sop_instance_uid and (item.sop_instance_uid, item.frame, item.place.position)
        kept.setdefault(known or (item.path, item.frame), item)
    return list(kept.values()), len(slices) - len(kept)


def _phases(slices: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Return the slices taken apart so that no place is held twice, if one attribute of the headers tells how."""
    if not all(s.place.placed for s in slices):
        return [slices]
    most = max(Counter(round(depth_of(s.place), 2) for s in slices).values())
    if most == 1:
        return [slices]
    for index in range(len(slices[0].phases)):
        values: dict[str | None, list[SliceHeader]] = {}
        for item in slices:
            values.setdefault(item.phases[index], []).append(item)
        # More values than slices at any one place: it counts slices, not phases.
        if 1 < len(values) <= most:
            return [part for value in sorted(values, key=_numbered) for part in _phases(values[value])]
    return [slices]


def _numbered(value: str | None) -> tuple[float, str]:
    try:
        return (float(value or 0), "")
    except ValueError:
        return (0.0, str(value))
