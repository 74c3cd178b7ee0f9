"""Results out: to an AE by C-STORE, or to a DICOMweb service by STOW-RS. Sending the same object again is harmless.

Source: DICOM PS3.4 B.2.3 (statuses of C-STORE), PS3.18 section 10.5 (STOW-RS).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.errors import CannotRead, CannotWrite, EdgemedError, InvalidInput
from edgemed.serve.settings import NodeSettings, Target

if TYPE_CHECKING:
    from dicomweb_client.api import DICOMwebClient
    from pynetdicom import AE
    from pynetdicom.association import Association

Outcome = tuple[Path, EdgemedError | None]


def deliver(target: Target, files: Sequence[Path], settings: NodeSettings) -> Iterator[Outcome]:
    """Yield (file, None) for each DICOM file that the target has taken, or (file, why not).

    CannotWrite: it may be tried again. InvalidInput: the target refuses this object.
    """
    yield from _stow(target, files, settings) if target.url else _store(target, files, settings)


def _store(target: Target, files: Sequence[Path], settings: NodeSettings) -> Iterator[Outcome]:
    from pydicom.filereader import read_file_meta_info

    ae = open_ae(settings)
    kinds: dict[Path, tuple[str, str]] = {}
    for file in files:
        meta = read_file_meta_info(file)
        kinds[file] = (str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID))
    for sop_class, syntax in sorted(set(kinds.values()))[:128]:
        ae.add_requested_context(sop_class, syntax)
    try:
        with associated(ae, target, settings) as assoc:
            taken = {cx.abstract_syntax for cx in assoc.accepted_contexts}
            for file in files:
                if kinds[file][0] not in taken:
                    yield file, InvalidInput(f"target {target.name} does not take this SOP class")
                elif not assoc.is_established:
                    yield file, CannotWrite(f"target {target.name} ended the association")
                else:
                    yield file, _status_error(target, assoc.send_c_store(file).get("Status"))
    except CannotRead as error:
        yield from ((file, CannotWrite(str(error))) for file in files)


def _status_error(target: Target, status: int | None) -> EdgemedError | None:
    """Return what a status means: success and warnings (0xB000 and those below) are none."""
    if status is None:
        return CannotWrite(f"target {target.name} gave no answer")
    if status == 0x0000 or 0xB000 <= status <= 0xBFFF:
        return None
    kind = CannotWrite if 0xA700 <= status <= 0xA7FF else InvalidInput
    return kind(f"target {target.name} answered with status 0x{status:04X}")


def _stow(target: Target, files: Sequence[Path], settings: NodeSettings) -> Iterator[Outcome]:
    import requests
    from pydicom import dcmread

    client = open_web(target, settings)
    for file in files:
        error: EdgemedError | None = None
        try:
            answer = client.store_instances([dcmread(file)])
            if answer.get("FailedSOPSequence"):
                reason = int(answer.FailedSOPSequence[0].get("FailureReason", 0))
                error = _status_error(target, reason or 0x0110)
        except requests.HTTPError as problem:
            code = problem.response.status_code if problem.response is not None else 0
            # 409: none was stored; 400, 415: not understood. Anything else may pass (busy, log-in, proxy).
            kind = InvalidInput if code in (400, 409, 415) else CannotWrite
            error = kind(f"target {target.name} answered with HTTP status {code}")
        except (requests.RequestException, OSError, ValueError) as problem:
            error = CannotWrite(f"target {target.name} cannot be reached ({type(problem).__name__})")
        yield file, error


# --- how the node calls others ----------------------------------------------------------------------------------------


def open_ae(settings: NodeSettings) -> AE:
    """Return an AE of the node's title, with its time limits, that requests nothing yet."""
    from pynetdicom import AE

    ae = AE(ae_title=settings.aet)
    ae.acse_timeout = ae.network_timeout = ae.connection_timeout = settings.network_seconds
    ae.dimse_timeout = max(settings.network_seconds, 60.0)  # an archive may take a while over a large object
    ae.maximum_pdu_size = settings.max_pdu
    return ae


@contextmanager
def associated(ae: AE, target: Target, settings: NodeSettings, **more: Any) -> Iterator[Association]:
    """Give an association with the target. Raises CannotRead if there is none."""
    from edgemed.serve.association import client_context, close_socket

    tls = None
    if target.tls:
        assert settings.tls is not None
        tls = (client_context(settings.tls.certificate, settings.tls.key, settings.tls.authorities), target.host)
    assoc = ae.associate(target.host, target.port, ae_title=target.aet, tls_args=tls, **more)
    connection = assoc.dul.socket.socket if assoc.dul.socket is not None else None
    try:
        if not assoc.is_established:
            how = "rejects the association" if assoc.is_rejected else "cannot be reached"
            raise CannotRead(f"target {target.name} {how}; its AE table must have {settings.aet}")
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()
        close_socket(connection)


def open_web(target: Target, settings: NodeSettings) -> DICOMwebClient:
    """Return a client of the target's DICOMweb service; with [tls], the node's certificate is shown to https."""
    import requests
    from dicomweb_client.api import DICOMwebClient

    session = requests.Session()
    session.trust_env = False  # no proxies and no passwords of the environment
    if settings.tls is not None:
        session.cert, session.verify = (settings.tls.certificate, settings.tls.key), settings.tls.authorities
    client = DICOMwebClient(target.url, session=session, timeout=settings.network_seconds)
    client.set_http_retry_params(retry=False)  # the journal tries again
    return client
