"""Studies in by C-MOVE, C-GET, QIDO-RS and WADO-RS, results out by STOW-RS, against servers on loopback."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pydicom import dcmread

from edgemed.errors import CannotRead, CannotWrite, InvalidInput, NoInput
from edgemed.serve.deliver import deliver
from edgemed.serve.pull import fetch_study, find_studies, get_study, move_study
from edgemed.serve.settings import Sender, Target

Serve = Callable[..., Any]


@contextmanager
def query_retrieve(files: Sequence[Path], node_port: int = 0) -> Iterator[Target]:
    """Give an archive that has these files and answers C-MOVE (to EDGEMED) and C-GET by study."""
    from pydicom.uid import CTImageStorage
    from pynetdicom import AE, build_context, evt
    from pynetdicom.sop_class import (  # type: ignore[attr-defined]
        StudyRootQueryRetrieveInformationModelGet as Get,
    )
    from pynetdicom.sop_class import (  # type: ignore[attr-defined]
        StudyRootQueryRetrieveInformationModelMove as Move,
    )

    def having(event: Any) -> list[Any]:
        return [ds for ds in map(dcmread, files) if ds.StudyInstanceUID == event.identifier.StudyInstanceUID]

    def moved(event: Any) -> Iterator[Any]:
        if event.move_destination != "EDGEMED":
            yield None, None
            return
        found = having(event)
        yield (
            "127.0.0.1",
            node_port,
            {"contexts": [build_context(CTImageStorage, found[0].file_meta.TransferSyntaxUID)]} if found else {},
        )
        yield len(found)
        for ds in found:
            yield 0xFF00, ds

    def got(event: Any) -> Iterator[Any]:
        found = having(event)
        yield len(found)
        for ds in found:
            yield 0xFF00, ds

    ae = AE("PACS")
    ae.add_supported_context(Move)
    ae.add_supported_context(Get)
    ae.add_supported_context(CTImageStorage, scu_role=True, scp_role=True)
    server = ae.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_MOVE, moved), (evt.EVT_C_GET, got)]
    )
    assert server is not None
    try:
        yield Target("pacs", "PACS", "127.0.0.1", server.server_address[1])
    finally:
        server.shutdown()


def test_a_study_is_moved_to_the_node(serve: Serve, helper: ModuleType, tmp_path: Path) -> None:
    files = helper.write_instances(tmp_path / "scans", 3)
    with serve(senders=(Sender("PACS", helper.ANYONE),)) as node:
        with query_retrieve(files, node.address[1]) as source:
            assert move_study(source, node.settings, f"{helper.ROOT}.1") == 3
        assert node.journal.counts()["instances"] == {"stored": 3}


def test_a_move_to_an_unknown_ae_and_one_of_no_study_are_told(helper: ModuleType, tmp_path: Path) -> None:
    files = helper.write_instances(tmp_path / "scans", 1)
    settings = helper.settings(tmp_path / "node")
    with query_retrieve(files) as source:
        with pytest.raises(CannotRead, match="0xA801"):
            move_study(source, settings, f"{helper.ROOT}.1", to="ELSEWHERE")
        with pytest.raises(InvalidInput):
            move_study(source, settings, "*")


def test_a_study_is_fetched_by_c_get(helper: ModuleType, tmp_path: Path) -> None:
    files = helper.write_instances(tmp_path / "scans", 3)
    (tmp_path / "in").mkdir()
    with query_retrieve(files) as source:
        got = get_study(source, helper.settings(tmp_path / "node"), f"{helper.ROOT}.1", tmp_path / "in")
        assert [dcmread(f) for f in got] == [dcmread(f) for f in files]
        with pytest.raises(NoInput):
            get_study(source, helper.settings(tmp_path / "node"), f"{helper.ROOT}.5", tmp_path / "in")


def test_a_source_that_is_not_there_is_told(helper: ModuleType, tmp_path: Path) -> None:
    source = Target("pacs", "PACS", "127.0.0.1", helper.free_port())
    with pytest.raises(CannotRead, match="cannot be reached"):
        get_study(source, helper.settings(tmp_path / "node"), "1.2", tmp_path)


# --- DICOMweb ---------------------------------------------------------------------------------------------------------


class Web(BaseHTTPRequestHandler):
    """A DICOMweb service of a few studies: STOW-RS, QIDO-RS and WADO-RS by study."""

    files: Sequence[Path] = ()
    stored: list[str]
    status = 200
    reason = 0

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, kind: str, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        found = [dcmread(f) for f in self.files]
        if self.status != 200:
            self.answer("text/plain", b"", self.status)
        elif path == "/dicom-web/studies":
            wanted = query.get("StudyInstanceUID", query.get("0020000D", [None]))[0]
            uids = sorted({ds.StudyInstanceUID for ds in found if wanted in (None, ds.StudyInstanceUID)})
            rows = [{"0020000D": {"vr": "UI", "Value": [uid]}} for uid in uids]
            self.answer("application/dicom+json", json.dumps(rows).encode())
        else:
            body = b""
            for ds in found:
                if ds.StudyInstanceUID == path.split("/")[3]:
                    stream = io.BytesIO()
                    ds.save_as(stream, enforce_file_format=True)
                    body += b"--edge\r\nContent-Type: application/dicom\r\n\r\n" + stream.getvalue() + b"\r\n"
            kind = 'multipart/related; type="application/dicom"; boundary=edge'
            self.answer(kind, body + b"--edge--\r\n", 200 if body else 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.status != 200:
            self.answer("text/plain", b"", self.status)
            return
        whole = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body
        (part,) = BytesParser().parsebytes(whole).get_payload()
        uid = dcmread(io.BytesIO(part.get_payload(decode=True))).SOPInstanceUID
        item = {"00081155": {"vr": "UI", "Value": [uid]}}
        if self.reason:
            item["00081197"] = {"vr": "US", "Value": [self.reason]}
        else:
            self.stored.append(uid)
        sequence = "00081198" if self.reason else "00081199"
        self.answer("application/dicom+json", json.dumps({sequence: {"vr": "SQ", "Value": [item]}}).encode())


@contextmanager
def web(files: Sequence[Path] = (), *, status: int = 200, reason: int = 0) -> Iterator[tuple[Target, list[str]]]:
    """Give (a DICOMweb service with these files, the UIDs that it was sent)."""
    stored: list[str] = []
    handler = type("Handler", (Web,), {"files": files, "stored": stored, "status": status, "reason": reason})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield Target("web", url=f"http://127.0.0.1:{server.server_address[1]}/dicom-web"), stored
        finally:
            server.shutdown()
            thread.join()


def test_studies_are_found_and_fetched(helper: ModuleType, tmp_path: Path) -> None:
    files = [f for study in (1, 2) for f in helper.write_instances(tmp_path / "scans", 2, study)]
    settings = helper.settings(tmp_path / "node")
    (tmp_path / "in").mkdir()
    with web(files) as (source, _):
        assert find_studies(source, settings, {}) == [f"{helper.ROOT}.1", f"{helper.ROOT}.2"]
        assert find_studies(source, settings, {"StudyInstanceUID": f"{helper.ROOT}.2"}) == [f"{helper.ROOT}.2"]
        got = fetch_study(source, settings, f"{helper.ROOT}.2", tmp_path / "in")
        assert [dcmread(f) for f in got] == [dcmread(f) for f in files[2:]]
        with pytest.raises(CannotRead, match="cannot be fetched"):
            fetch_study(source, settings, f"{helper.ROOT}.3", tmp_path / "in")


def test_results_are_stored_by_stow(helper: ModuleType, tmp_path: Path) -> None:
    files = helper.write_instances(tmp_path / "scans", 2)
    with web() as (target, stored):
        assert [error for _, error in deliver(target, files, helper.settings(tmp_path / "node"))] == [None, None]
        assert stored == [dcmread(f).SOPInstanceUID for f in files]


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [(200, 0xA700, CannotWrite), (200, 0xC000, InvalidInput), (409, 0, InvalidInput), (503, 0, CannotWrite)],
)
def test_what_a_services_answer_means(
    helper: ModuleType, tmp_path: Path, status: int, reason: int, kind: type[Exception]
) -> None:
    files = helper.write_instances(tmp_path / "scans", 1)
    with web(status=status, reason=reason) as (target, stored):
        ((_, error),) = deliver(target, files, helper.settings(tmp_path / "node"))
    assert type(error) is kind
    assert stored == []


def test_a_service_that_is_not_there_may_be_tried_again(helper: ModuleType, tmp_path: Path) -> None:
    files = helper.write_instances(tmp_path / "scans", 1)
    target = Target("web", url=f"http://127.0.0.1:{helper.free_port()}/dicom-web")
    settings = helper.settings(tmp_path / "node")
    ((_, error),) = deliver(target, files, settings)
    assert type(error) is CannotWrite
    with pytest.raises(CannotRead, match="cannot be searched"):
        find_studies(target, settings, {})
