"""Studies in, on request: C-MOVE to this node, C-GET and WADO-RS to a folder, QIDO-RS to know what is there.

Source: DICOM PS3.4 annex C (C-MOVE, C-GET), PS3.18 sections 10.4 (WADO-RS) and 10.6 (QIDO-RS).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.errors import CannotRead, InvalidInput, NoInput
from edgemed.serve.deliver import associated, open_ae, open_web
from edgemed.serve.settings import NodeSettings, Target
from edgemed.serve.store import is_uid

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_MAX_STORAGE_CONTEXTS = 127
"""An association has room for 128 presentation contexts (PS3.8 9.3.2.2); one is C-GET's."""


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

    def keep(event: Any) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        if not is_uid(uid):
            return 0xC000
        path = folder / f"{uid}.dcm"
        try:
            path.write_bytes(event.encoded_dataset())
        except OSError:
            return 0xA700
        files[uid] = path
        return 0x0000

    ae = open_ae(settings)
    ae.add_requested_context(Get)
    contexts = storage_contexts(settings)[:_MAX_STORAGE_CONTEXTS]
    for context in contexts:
        ae.add_requested_context(context.abstract_syntax, context.transfer_syntax)
    roles = [build_role(context.abstract_syntax, scp_role=True) for context in contexts]
    query = _query(study, series)
    more = {"ext_neg": roles, "evt_handlers": [(evt.EVT_C_STORE, keep)]}
    with associated(ae, source, settings, **more) as assoc:
        _completed(source, assoc.send_c_get(query, Get))
    return sorted(files.values())


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
    """Return the Study Instance UIDs that QIDO-RS finds for these filters (keyword -> value). Raises CannotRead."""
    import requests

    client = open_web(source, settings)
    try:
        found = client.search_for_studies(search_filters=dict(filters), limit=limit)
    except (requests.RequestException, OSError, ValueError) as error:
        raise CannotRead(f"source {source.name} cannot be searched ({type(error).__name__})") from None
    uids = [str((row.get("0020000D", {}).get("Value") or [""])[0]) for row in found]
    return [uid for uid in uids if is_uid(uid)]


def fetch_study(
    source: Target, settings: NodeSettings, study: str, folder: Path, series: str | None = None
) -> list[Path]:
    """Fetch a study (or one series) by WADO-RS into `folder`, one instance in memory at a time; return the files.

    Raises CannotRead, NoInput as `move_study`.
    """
    import requests

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
            uid = str(ds.SOPInstanceUID)
            if not is_uid(uid):
                raise ValueError("no UID")
            files.append(folder / f"{uid}.dcm")
            ds.save_as(files[-1], enforce_file_format=True)
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
