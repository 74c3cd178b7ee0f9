"""Studies in by C-MOVE, C-GET, QIDO-RS and WADO-RS, results out by STOW-RS, against servers on loopback."""

from __future__ import annotations

import io
import json
import threading
import time
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
from pydicom.dataset import Dataset

from edgemed.cli import main
from edgemed.errors import CannotRead, CannotWrite, InvalidInput, NoInput
from edgemed.serve.deliver import deliver
from edgemed.serve.pull import Query, fetch, fetch_study, find_studies, get_study, move_study, parse_query
from edgemed.serve.settings import Sender, Target

Serve = Callable[..., Any]


@contextmanager
def query_retrieve(files: Sequence[Path], node_port: int = 0) -> Iterator[Target]:
    """Give an archive that has these files and answers C-FIND by patient, C-MOVE (to EDGEMED) and C-GET by study."""
    from pydicom.uid import CTImageStorage
    from pynetdicom import AE, build_context, evt
    from pynetdicom.sop_class import (  # type: ignore[attr-defined]
        StudyRootQueryRetrieveInformationModelFind as Find,
    )
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

    def found(event: Any) -> Iterator[Any]:
        wanted = event.identifier.get("PatientID") or "PLANTED-ID"
        rows = {str(ds.StudyInstanceUID): ds for ds in map(dcmread, files) if ds.PatientID == wanted}
        for uid in sorted(rows):
            answer = Dataset()
            answer.StudyInstanceUID = uid
            yield 0xFF00, answer

    ae = AE("PACS")
    ae.add_supported_context(Find)
    ae.add_supported_context(Move)
    ae.add_supported_context(Get)
    ae.add_supported_context(CTImageStorage, scu_role=True, scp_role=True)
    server = ae.start_server(
        ("127.0.0.1", 0),
        block=False,
        evt_handlers=[(evt.EVT_C_MOVE, moved), (evt.EVT_C_GET, got), (evt.EVT_C_FIND, found)],
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


def test_studies_are_found_by_c_find_and_no_more_than_asked(helper: ModuleType, tmp_path: Path) -> None:
    files = [f for study in (1, 2, 3) for f in helper.write_instances(tmp_path / "scans", 1, study)]
    settings = helper.settings(tmp_path / "node")
    with query_retrieve(files) as source:
        uids = [f"{helper.ROOT}.{study}" for study in (1, 2, 3)]
        assert find_studies(source, settings, {"PatientID": "PLANTED-ID"}) == uids
        assert find_studies(source, settings, {"PatientID": "PLANTED-ID"}, limit=2) == uids[:2]
        assert find_studies(source, settings, {"PatientID": "ANOTHER"}) == []
        with pytest.raises(NoInput, match="no studies"):
            Query(source, {"PatientID": "ANOTHER"}).studies(settings)


def test_what_is_larger_than_the_limit_is_not_kept(helper: ModuleType, tmp_path: Path) -> None:
    files = helper.write_instances(tmp_path / "scans", 1, size=200_000)
    settings = helper.settings(tmp_path / "node", max_instance_mib=0.1)
    with query_retrieve(files) as source, pytest.raises(CannotRead, match="more than 104857 bytes"):
        fetch(source, settings, f"{helper.ROOT}.1", tmp_path / "in" / "study")
    with web(files) as (service, _), pytest.raises(CannotWrite, match="more than 104857 bytes"):
        fetch(service, settings, f"{helper.ROOT}.1", tmp_path / "in" / "study")
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("else:PatientID=1", "no \\[\\[target\\]\\] 'else'; it has: pacs"),
        ("pacs", "asks for everything"),
        ("pacs:", "not KEYWORD=VALUE"),
        ("pacs:PatientID=", "not KEYWORD=VALUE"),
        ("pacs:Nonsense=1", "not KEYWORD=VALUE"),
        ("pacs:SeriesInstanceUID=1.2", "StudyInstanceUID was expected"),
    ],
)
def test_a_query_of_another_form_is_refused(helper: ModuleType, tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        parse_query(text, helper.settings(tmp_path, target_port=104))


# --- edgemed serve pull -----------------------------------------------------------------------------------------------

Captured = pytest.CaptureFixture[str]


def config(tmp_path: Path, target: Target, port: int = 0) -> Path:
    """Write the configuration of a node with one target."""
    where = f'url = "{target.url}"' if target.url else f'aet = "PACS"\nhost = "127.0.0.1"\nport = {target.port}'
    (tmp_path / "node.toml").write_text(
        f'folder = "{(tmp_path / "node").as_posix()}"\nport = {port}\nmin_free_mib = 0\nquiet_seconds = 3600\n'
        f'[[target]]\nname = "pacs"\n{where}\n'
        '[[rule]]\nname = "any"\nprompt = "What is there?"\nkinds = ["sr"]\n'
    )
    return tmp_path / "node.toml"


@contextmanager
def source(kind: str, files: Sequence[Path], node_port: int = 0) -> Iterator[Target]:
    if kind == "AE":
        with query_retrieve(files, node_port) as target:
            yield target
    else:
        with web(files) as (target, _):
            yield target


@pytest.mark.parametrize("kind", ["AE", "web"])
def test_pull_fetches_studies_for_a_node_that_starts_later(
    helper: ModuleType, serve: Serve, tmp_path: Path, capsys: Captured, kind: str
) -> None:
    files = [f for study in (1, 2) for f in helper.write_instances(tmp_path / "scans", 2, study)]
    with source(kind, files) as target:
        file = str(config(tmp_path, target))
        assert main(["serve", "pull", "pacs:PatientID=PLANTED-ID", "--config", file, "--list"]) == 0
        assert capsys.readouterr().out == f"{helper.ROOT}.1\n{helper.ROOT}.2\n"
        assert main(["serve", "pull", "pacs:PatientID=PLANTED-ID", "--config", file, "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["study"], line["instances"]) for line in told] == [(f"{helper.ROOT}.1", 2), (f"{helper.ROOT}.2", 2)]
    with serve() as node:
        until(lambda: node.journal.counts()["instances"] == {"stored": 4})
        until(lambda: list(node.store.pulled.iterdir()) == [])
        assert node.journal._rows("SELECT DISTINCT sender FROM study") == [("pacs",)]
        (item, *_) = node.journal.instances(f"{helper.ROOT}.1")
        assert dcmread(node.store.instances / item.name) == dcmread(files[0])


def test_pull_hands_a_study_to_the_node_that_runs_and_what_it_has_already_changes_nothing(
    helper: ModuleType, serve: Serve, tmp_path: Path
) -> None:
    files = helper.write_instances(tmp_path / "scans", 2)
    with serve() as node, web(files) as (target, _):
        assert helper.send(node.address[1], files) == [0x0000] * 2
        before = node.journal._rows("SELECT * FROM instance")
        query = f"pacs:StudyInstanceUID={helper.ROOT}.1"
        assert main(["serve", "pull", query, "--config", str(config(tmp_path, target))]) == 0
        until(lambda: list(node.store.pulled.iterdir()) == [])
        assert node.journal._rows("SELECT * FROM instance") == before
        assert node.journal._rows("SELECT revision FROM study") == [(2,)]


def test_pull_moves_to_the_node_or_keeps_in_a_folder(
    helper: ModuleType, serve: Serve, tmp_path: Path, capsys: Captured
) -> None:
    files = helper.write_instances(tmp_path / "scans", 2)
    query = f"pacs:StudyInstanceUID={helper.ROOT}.1"
    with serve(senders=(Sender("PACS", helper.ANYONE),)) as node, query_retrieve(files, node.address[1]) as target:
        file = str(config(tmp_path, target))
        assert main(["serve", "--config", file, "pull", query, "--move"]) == 0
        assert node.journal.counts()["instances"] == {"stored": 2}
        for _ in range(2):  # the second replaces the first
            assert main(["serve", "pull", query, "--config", file, "-o", str(tmp_path / "kept")]) == 0
        assert capsys.readouterr().out == f"{helper.ROOT}.1  2\n" * 3
        assert len(list((tmp_path / "kept" / f"{helper.ROOT}.1").iterdir())) == 2
        assert main(["serve", "pull", query, "--config", file, "-o", "x", "--move"]) == 1


def test_pull_tells_what_cannot_be_fetched_and_ends_with_87(
    helper: ModuleType, tmp_path: Path, capsys: Captured
) -> None:
    files = helper.write_instances(tmp_path / "scans", 1)
    with query_retrieve(files) as target:
        file = str(config(tmp_path, target))
        assert main(["serve", "pull", f"pacs:StudyInstanceUID={helper.ROOT}.9", "--config", file]) == 87
        told = capsys.readouterr()
        assert "no instances of this study" in told.out
        assert told.err == "edgemed: 1 of 1 studies could not be fetched; the lines on stdout say why\n"
        assert main(["serve", "pull", "pacs:PatientID=ANOTHER", "--config", file]) == 21
        assert main(["serve", "pull", "pacs:PatientID=1"]) == 1


def test_a_pulled_file_that_is_no_dicom_is_refused_and_gone(serve: Serve, log: list[dict[str, Any]]) -> None:
    with serve() as node:
        (node.store.pulled / "one").mkdir()
        (node.store.pulled / "one" / "1.2.dcm").write_bytes(b"no DICOM")
        until(lambda: list(node.store.pulled.iterdir()) == [])
        assert node.journal.counts()["instances"] == {"stored": 0}
    assert any(line["event"] == "refused" and line["sender"] == "pull" for line in log)


def test_what_was_pulled_waits_for_room(serve: Serve, helper: ModuleType, tmp_path: Path) -> None:
    one, two = (helper.write_instances(tmp_path / f"s{study}", 1, study)[0] for study in (1, 2))
    with serve(queue=1) as node:
        assert helper.send(node.address[1], [one]) == [0x0000]
        (node.store.pulled / "two.part").mkdir()
        two.rename(node.store.pulled / "two.part" / "1.2.dcm")
        (node.store.pulled / "two.part").rename(node.store.pulled / "two")
        assert node.store.take_pulled() == []
        assert len(list((node.store.pulled / "two").iterdir())) == 1


def until(met: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not happen"
        threading.Event().wait(0.02)


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
