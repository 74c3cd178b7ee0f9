"""An audit server on loopback that speaks syslog over TLS, a configuration that names it, and the schema of A.5."""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from edgemed import config

SYSLOG = re.compile(
    r"<(?P<pri>\d{1,3})>1 (?P<at>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (?P<host>[!-~]{1,255}) edgemed (?P<pid>\d+) "
    r'DICOM\+RFC3881 \[meta sequenceId="(?P<number>[1-9]\d*)"\] \ufeff(?P<xml><AuditMessage>.*</AuditMessage>)'
)


class Authority:
    """Makes certificates for 127.0.0.1 in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.key = folder, name, ec.generate_private_key(ec.SECP256R1())
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._signed(name, self.key.public_key(), ca=True))

    def _signed(self, subject: str, public_key: Any, *, ca: bool) -> bytes:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named(self.name))
        builder = builder.public_key(public_key).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        return builder.add_extension(names, critical=False).sign(self.key, SHA256()).public_bytes(Encoding.PEM)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Return the files of a new certificate and its key, which only its owner may read."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, secret = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        certificate.write_bytes(self._signed(name, key.public_key(), ca=False))
        secret.touch(0o600)
        secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, secret


class Receiver:
    """Takes octet-counted messages from whoever shows a certificate of the authority; `up` and `down` at one port.

    confirms: whether it answers the end of a connection. limit: hangs up after so many bytes.
    """

    def __init__(self, authority: Authority) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.load_cert_chain(*authority.issue("siem"))
        self.context.load_verify_locations(authority.file)
        self.messages: list[str] = []
        self.versions: list[str | None] = []
        self.confirms, self.limit = True, 1 << 30
        with socket.create_server(("127.0.0.1", 0)) as any_port:
            self.port = int(any_port.getsockname()[1])
        self._server: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def up(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self.port))
        self._thread = threading.Thread(target=self._serve, args=(self._server,), daemon=True)
        self._thread.start()

    def down(self) -> None:
        server, self._server = self._server, None
        if server is not None and self._thread is not None:
            server.shutdown(socket.SHUT_RDWR)
            server.close()
            self._thread.join(20)

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                plain, _ = server.accept()
            except OSError:
                return
            with plain, contextlib.suppress(OSError):
                plain.settimeout(20)
                with self.context.wrap_socket(plain, server_side=True) as secured:
                    self.versions.append(secured.version())
                    self._take(secured)

    def _take(self, secured: ssl.SSLSocket) -> None:
        data = b""
        while (more := secured.recv(1 << 16)) and len(data) < self.limit:
            data += more
        while data:
            length, _, rest = data.partition(b" ")
            if len(rest) < int(length):
                break
            self.messages.append(rest[: int(length)].decode("utf-8"))
            data = rest[int(length) :]
        if self.confirms and not more:
            secured.unwrap().close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "hospital")


@pytest.fixture
def receiver(authority: Authority) -> Iterator[Receiver]:
    made = Receiver(authority)
    yield made
    made.down()


Configure = Callable[..., Path]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """`configure(receiver, authority)`: write [audit] for a trail below the returned folder; without them no server."""

    def write(receiver: Receiver | None = None, authority: Authority | None = None, **more: str) -> Path:
        folder = tmp_path / "audit"
        keys: dict[str, str] = {"folder": str(folder), **more}
        if receiver is not None and authority is not None:
            certificate, key = authority.issue("workstation")
            keys |= {"server": f"127.0.0.1:{receiver.port}", "authorities": str(authority.file)}
            keys |= {"certificate": str(certificate), "key_file": str(key)}
        file = tmp_path / "config.toml"
        file.write_text("[audit]\n" + "".join(f"{name} = '{value}'\n" for name, value in keys.items()))
        monkeypatch.setenv("EDGEMED_CONFIG", str(file))
        return folder

    monkeypatch.setattr(config, "system_file", lambda: tmp_path / "no.toml")
    return write


# --- the schema of PS3.15 A.5.1.1, as rules ---------------------------------------------------------------------------

CODED = ({"csd-code", "codeSystemName", "originalText"}, {"displayName"}, "")
ELEMENTS: dict[str, tuple[set[str], set[str], str]] = {
    "AuditMessage": (
        set(),
        set(),
        "EventIdentification (ActiveParticipant )+AuditSourceIdentification (ParticipantObjectIdentification )*",
    ),
    "EventIdentification": (
        {"EventDateTime", "EventOutcomeIndicator"},
        {"EventActionCode"},
        "EventID (EventTypeCode )*(EventOutcomeDescription )?",
    ),
    "EventID": CODED,
    "EventTypeCode": CODED,
    "ActiveParticipant": (
        {"UserID", "UserIsRequestor"},
        {"AlternativeUserID", "UserName", "NetworkAccessPointID", "NetworkAccessPointTypeCode"},
        "(RoleIDCode )*(MediaIdentifier )?",
    ),
    "RoleIDCode": CODED,
    "MediaIdentifier": (set(), set(), "MediaType "),
    "MediaType": CODED,
    "AuditSourceIdentification": ({"AuditSourceID"}, {"AuditEnterpriseSiteID"}, "(AuditSourceTypeCode )*"),
    "AuditSourceTypeCode": ({"csd-code"}, {"codeSystemName", "originalText", "displayName"}, ""),
    "ParticipantObjectIdentification": (
        {"ParticipantObjectID"},
        {
            "ParticipantObjectTypeCode",
            "ParticipantObjectTypeCodeRole",
            "ParticipantObjectDataLifeCycle",
            "ParticipantObjectSensitivity",
        },
        "ParticipantObjectIDTypeCode (ParticipantObjectName |ParticipantObjectQuery )"
        "(ParticipantObjectDetail )*(ParticipantObjectDescription )*",
    ),
    "ParticipantObjectIDTypeCode": CODED,
    "ParticipantObjectName": (set(), set(), ""),
    "ParticipantObjectDetail": ({"type", "value"}, set(), ""),
    "ParticipantObjectDescription": (set(), set(), "(MPPS )*(Accession )*(SOPClass )*"),
    "SOPClass": ({"NumberOfInstances"}, {"UID"}, "(Instance )*"),
}
VALUES = {
    "EventActionCode": "[CRUDE]",
    "EventDateTime": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)",
    "EventOutcomeIndicator": "0|4|8|12",
    "UserIsRequestor": "true|false",
    "NetworkAccessPointTypeCode": "[1-5]",
    "ParticipantObjectTypeCode": "[1-4]",
    "ParticipantObjectTypeCodeRole": "[1-9]|1[0-9]|2[0-6]",
    "NumberOfInstances": r"\d+",
}
# Of A.5.3: the actions, whether a type is mandatory, the participants (roles), the objects (type, role, code).
STUDIES_AND_PATIENT = {("2", "3", "110180"), ("1", "1", "2")}
MESSAGES: dict[str, tuple[str, set[str] | None, set[str] | None, list[set[tuple[str, str, str]]]]] = {
    "110100": ("E", {"110120", "110121"}, {"110150", "110151"}, [set()]),
    "110101": ("R", None, None, [{("2", "13", "12")}]),
    "110103": ("CRUD", None, None, [STUDIES_AND_PATIENT]),
    "110104": ("CRU", None, {"110152", "110153"}, [STUDIES_AND_PATIENT]),
    "110106": ("R", None, {"110153", "110154"}, [STUDIES_AND_PATIENT]),
    "110113": (
        "E",
        {str(n) for n in range(110120, 110148)},
        None,
        [set(), {("2", "13", "12")}, {("2", "13", "110182")}],
    ),
}


def check_message(xml: str) -> ElementTree.Element:
    """Return the message after checking it against the schema and the table of its kind; raises AssertionError."""
    root = ElementTree.fromstring(xml)
    assert root.tag == "AuditMessage"
    for element in root.iter():
        required, optional, children = ELEMENTS[element.tag]
        assert required <= set(element.attrib) <= required | optional, (element.tag, element.attrib)
        assert re.fullmatch(children, "".join(f"{child.tag} " for child in element)), element.tag
        assert element.tag == "ParticipantObjectName" or not (element.text or "").strip(), element.tag
        for name, value in element.attrib.items():
            assert re.fullmatch(VALUES.get(name, ".+"), value), (element.tag, name, value)
        if element.tag == "ParticipantObjectDetail":
            base64.b64decode(element.attrib["value"], validate=True)
    event = root[0]
    action, types, roles, objects = MESSAGES[event[0].attrib["csd-code"]]
    assert event.attrib["EventActionCode"] in action
    if types is not None:
        assert event[1].attrib["csd-code"] in types
    users = root.findall("ActiveParticipant")
    assert sum(user.attrib["UserIsRequestor"] == "true" for user in users) == 1
    if roles is not None:
        assert {code.attrib["csd-code"] for code in root.findall("ActiveParticipant/RoleIDCode")} == roles
    found = {
        (o.attrib["ParticipantObjectTypeCode"], o.attrib["ParticipantObjectTypeCodeRole"], o[0].attrib["csd-code"])
        for o in root.findall("ParticipantObjectIdentification")
    }
    assert found in objects
    return root


@pytest.fixture
def check() -> Callable[[str], ElementTree.Element]:
    """Check a whole syslog message and return its XML."""

    def run(message: str) -> ElementTree.Element:
        found = SYSLOG.fullmatch(message)
        assert found is not None, message
        assert int(found["pri"]) // 8 == 10
        root = check_message(found["xml"])
        serious = int(root[0].attrib["EventOutcomeIndicator"]) >= 8
        assert int(found["pri"]) % 8 == (4 if serious else 5)
        return root

    return run
