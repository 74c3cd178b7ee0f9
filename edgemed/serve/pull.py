"""Studies in, on request: C-MOVE to this node, C-GET and WADO-RS to a folder, C-FIND and QIDO-RS to know what is there.

    query = parse_query("pacs:StudyDate=20261122,ModalitiesInStudy=CT", settings)
    for study in query.studies(settings):
        pull(query, study, settings)                the node takes it, at once if it runs

Files are written under a temporary name, within the limits on size and disk of what is sent; a study is there whole or
not at all.

Source: DICOM PS3.4 annex C (C-MOVE, C-GET, C-FIND), PS3.18 sections 10.4 (WADO-RS) and 10.6 (QIDO-RS).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.errors import CannotRead, CannotWrite, InvalidInput, NoInput
from edgemed.serve.deliver import associated, open_ae, open_web
from edgemed.serve.settings import MIB, NodeSettings, Target
from edgemed.serve.store import OUT_OF_RESOURCES, PART, PULLED, Head, Refused, Spool, is_uid

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_MAX_STORAGE_CONTEXTS = 127
"""An association has room for 128 presentation contexts (PS3.8 9.3.2.2); one is C-GET's."""


@dataclass(frozen=True)
class Query:
    """What is asked of a source: DICOM keyword -> value, as of QIDO-RS (`*`, ranges of dates)."""

    source: Target
    filters: Mapping[str, str]

    @property
    def series(self) -> str | None:
        """The one series that is meant, None for whole studies."""
        return self.filters.get("SeriesInstanceUID")

    def studies(self, settings: NodeSettings, limit: int = 100) -> list[str]:
        """Return the Study Instance UIDs; a source is not asked for one that is named. Raises CannotRead, NoInput."""
        named = self.filters.get("StudyInstanceUID")
        if named is not None and is_uid(named):
            return [named]
        found = find_studies(self.source, settings, self.filters, limit)
        if not found:
            raise NoInput(f"source {self.source.name} has no studies that fit the query")
        return found


def parse_query(text: str, settings: NodeSettings) -> Query:
    """Return what NAME:KEYWORD=VALUE,... means, NAME being a target of the settings. Raises InvalidInput."""
    from pydicom.datadict import tag_for_keyword

    name, colon, rest = text.partition(":")
    source = settings.target(name)
    if source is None:
        known = ", ".join(t.name for t in settings.targets) or "none"
        raise InvalidInput(f"the configuration has no [[target]] {name!r}; it has: {known}")
    filters: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        keyword, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and value) or tag_for_keyword(keyword) is None:
            raise InvalidInput(f"{part!r} of the query is not KEYWORD=VALUE with a keyword of DICOM")
        filters[keyword] = value
    if not filters:
        raise InvalidInput(f"the query asks for everything; {name}:KEYWORD=VALUE,... was expected")
    if "SeriesInstanceUID" in filters and "StudyInstanceUID" not in filters:
        raise InvalidInput("the query has a SeriesInstanceUID; its StudyInstanceUID was expected, too")
    return Query(source, filters)


def pull(query: Query, study: str, settings: NodeSettings) -> int:
    """Fetch a study for the node of these settings, running or not; return how many instances.

    Raises CannotRead, NoInput, CannotWrite.
    """
    name = hashlib.blake2b(f"{study} {query.series}".encode(), digest_size=12).hexdigest()
    folder = settings.folder / PULLED / f"{query.source.name}.{name}"
    return len(fetch(query.source, settings, study, folder, query.series))


def fetch(source: Target, settings: NodeSettings, study: str, folder: Path, series: str | None = None) -> list[Path]:
    """Fetch a study (or one series) into `folder`, by WADO-RS or C-GET; return the files. What was there is replaced.

    Raises CannotRead, NoInput, CannotWrite.
    """
    part = folder.with_name(folder.name + PART)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, mode=0o700)
        files = (fetch_study if source.url else get_study)(source, settings, study, part, series)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(part, folder)
    except OSError as error:
        raise CannotWrite(f"cannot keep what was fetched in {folder.parent}: {error.strerror or 'refused'}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [folder / file.name for file in files]


def _query(study: str, series: str | None) -> Dataset:
    from pydicom.dataset import Dataset

    if not all(is_uid(uid) for uid in (study, series) if uid is not None):
        raise InvalidInput("the study or series to fetch is no UID")
    query = Dataset()
    query.QueryRetrieveLevel = "STUDY" if series is None else "SERIES"
    query.StudyInstanceUID = study
    if series is not None:
        query.SeriesInstanceUID = series
    return query


def move_study(
    source: Target, settings: NodeSettings, study: str, series: str | None = None, *, to: str | None = None
) -> int:
    """Have `source` send a study (or one series) to the AE `to`, default this node; return how many instances it sent.

    Raises CannotRead if it cannot be reached or did not send all, NoInput if it has none.
    """
    from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelMove as Move  # type: ignore[attr-defined]

    ae = open_ae(settings)
    ae.add_requested_context(Move)
    query = _query(study, series)
    with associated(ae, source, settings) as assoc:
        return _completed(source, assoc.send_c_move(query, to or settings.aet, Move))


def get_study(
    source: Target, settings: NodeSettings, study: str, folder: Path, series: str | None = None
) -> list[Path]:
    """Fetch a study (or one series) by C-GET into `folder`; return the files, named by their UIDs.

    Raises CannotRead, NoInput as `move_study`.
    """
    from pynetdicom import build_role, evt
    from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelGet as Get  # type: ignore[attr-defined]

    files: dict[str, Path] = {}
    refused: list[Refused] = []

    def keep(event: Any) -> int:
        request = event.request
        head = Head(
            str(request.AffectedSOPInstanceUID), str(request.AffectedSOPClassUID), str(event.context.transfer_syntax)
        )
        try:
            files[head.uid] = _kept(folder, head, request.DataSet.getbuffer(), settings)
        except Refused as error:
            refused.append(error)
            return error.status
        return 0x0000

    ae = open_ae(settings)
    ae.add_requested_context(Get)
    contexts = storage_contexts(settings)[:_MAX_STORAGE_CONTEXTS]
    for context in contexts:
        ae.add_requested_context(context.abstract_syntax, context.transfer_syntax)
    roles = [build_role(context.abstract_syntax, scp_role=True) for context in contexts]
    query = _query(study, series)
    more = {"ext_neg": roles, "evt_handlers": [(evt.EVT_C_STORE, keep)]}
    try:
        with associated(ae, source, settings, **more) as assoc:
            _completed(source, assoc.send_c_get(query, Get))
    except CannotRead as error:
        if refused:
            raise CannotRead(f"{error}; {refused[0]}") from None
        raise
    return sorted(files.values())


def _kept(folder: Path, head: Head, data: Any, settings: NodeSettings) -> Path:
    """Write an instance as the node writes one that is sent, and return its file. Raises Refused."""

    def has_room() -> bool:
        return shutil.disk_usage(folder).free >= settings.min_free_mib * MIB

    spool = Spool(folder / f"incoming{PART}", head, int(settings.max_instance_mib * MIB), has_room)
    try:
        spool.write(data)
        spool.keep()
        path = folder / f"{head.uid}.dcm"
        os.replace(spool.path, path)
        return path
    except OSError as error:
        raise Refused(OUT_OF_RESOURCES, f"the instance cannot be kept ({type(error).__name__})") from error
    finally:
        spool.drop()


def _completed(source: Target, answers: Any) -> int:
    completed = failed = 0
    status = None
    for answer, _ in answers:
        status = answer.get("Status")
        completed = int(answer.get("NumberOfCompletedSuboperations", 0) or completed)
        failed = int(answer.get("NumberOfFailedSuboperations", 0) or 0)
    if status != 0x0000 or failed:
        told = "gave no answer" if status is None else f"ended with status 0x{status:04X}"
        raise CannotRead(f"source {source.name} {told}: {completed} instances came, {failed} failed")
    if not completed:
        raise NoInput(f"source {source.name} has no instances of this study")
    return completed


def find_studies(source: Target, settings: NodeSettings, filters: Mapping[str, str], limit: int = 100) -> list[str]:
    """Return the Study Instance UIDs that QIDO-RS or C-FIND finds for these filters (keyword -> value).

    At most `limit`, each once. Raises CannotRead.
    """
    found = (_find_web if source.url else _find)(source, settings, filters, limit)
    return [uid for uid in dict.fromkeys(found) if is_uid(uid)][:limit]


def _find_web(source: Target, settings: NodeSettings, filters: Mapping[str, str], limit: int) -> list[str]:
    import requests

    client = open_web(source, settings)
    try:
        found = client.search_for_studies(search_filters=dict(filters), limit=limit)
    except (requests.RequestException, OSError, ValueError) as error:
        raise CannotRead(f"source {source.name} cannot be searched ({type(error).__name__})") from None
    return [str((row.get("0020000D", {}).get("Value") or [""])[0]) for row in found]


def _find(source: Target, settings: NodeSettings, filters: Mapping[str, str], limit: int) -> list[str]:
    from pydicom.dataset import Dataset
    from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as Find  # type: ignore[attr-defined]

    query = Dataset()
    query.SpecificCharacterSet = "ISO_IR 192"
    query.QueryRetrieveLevel, query.StudyInstanceUID = "STUDY", ""
    try:
        for keyword, value in filters.items():
            setattr(query, keyword, value)
    except ValueError as error:
        raise InvalidInput(f"a value of the query does not fit its keyword ({type(error).__name__})") from None
    ae = open_ae(settings)
    ae.add_requested_context(Find)
    found: list[str] = []
    with associated(ae, source, settings) as assoc:
        status = None
        for answer, row in assoc.send_c_find(query, Find):
            status = answer.get("Status")
            if row is not None:
                found.append(str(row.get("StudyInstanceUID", "")))
            if len(found) >= limit:
                return found  # the association ends, and with it the search
        if status != 0x0000:
            told = "gave no answer" if status is None else f"ended with status 0x{status:04X}"
            raise CannotRead(f"source {source.name} cannot be searched: it {told}")
    return found


def fetch_study(
    source: Target, settings: NodeSettings, study: str, folder: Path, series: str | None = None
) -> list[Path]:
    """Fetch a study (or one series) by WADO-RS into `folder`, one instance in memory at a time; return the files.

    Raises CannotRead, NoInput as `move_study`.
    """
    import requests
    from pynetdicom.dsutils import encode

    _query(study, series)
    client = open_web(source, settings)
    files: list[Path] = []
    every = (("application/dicom", "*"),)  # in the transfer syntax it is kept in
    try:
        found = (
            client.iter_study(study, media_types=every)
            if series is None
            else client.iter_series(study, series, media_types=every)
        )
        for ds in found:
            head = Head(str(ds.SOPInstanceUID), str(ds.SOPClassUID), str(ds.file_meta.TransferSyntaxUID))
            syntax = ds.file_meta.TransferSyntaxUID
            data = encode(ds, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
            if data is None:
                raise ValueError("it cannot be written")
            files.append(_kept(folder, head, data, settings))
    except Refused as error:
        raise CannotWrite(f"what source {source.name} sends cannot be kept: {error}") from None
    except (requests.RequestException, OSError, ValueError, AttributeError) as error:
        raise CannotRead(f"source {source.name}: the study cannot be fetched ({type(error).__name__})") from None
    if not files:
        raise NoInput(f"source {source.name} has no instances of this study")
    return sorted(files)


def storage_contexts(settings: NodeSettings) -> list[Any]:
    """Return a presentation context for each storage class of the settings, with every transfer syntax that is read.

    Deflated ones are not: they unpack without a limit; nor is video. Raises InvalidInput for a class that is not there.
    """
    import pydicom.uid
    from pynetdicom import ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, build_context

    names = settings.storage or [str(cx.abstract_syntax) for cx in AllStoragePresentationContexts]
    syntaxes = [uid for uid in ALL_TRANSFER_SYNTAXES if not _NOT_TAKEN.fullmatch(uid)]
    contexts = []
    for name in names:
        uid = name if is_uid(name) else getattr(pydicom.uid, name, None)
        if uid is None:
            raise InvalidInput(f"storage class {name!r} is not known; a name as CTImageStorage was expected")
        contexts.append(build_context(uid, syntaxes))
    return contexts


_NOT_TAKEN = re.compile(r"1\.2\.840\.10008\.1\.2\.(1\.99|8\.1|7\.\d|4\.10\d(\.1)?)")
