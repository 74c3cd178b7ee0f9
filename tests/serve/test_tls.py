"""DICOM TLS with certificates on both sides: who has none of ours is not heard, in or out."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgemed.errors import CannotRead
from edgemed.serve.association import client_context, server_context
from edgemed.serve.deliver import deliver
from edgemed.serve.settings import Target, Tls

x509 = pytest.importorskip("cryptography.x509", reason="cryptography is not installed (extra: edgemed[dev])")

Serve = Callable[..., Any]


class Authority:
    """Makes certificates of one authority in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec

        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._signed(name, self.key.public_key(), ca=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._pem(self.certificate))

    def _pem(self, certificate: Any) -> bytes:
        from cryptography.hazmat.primitives.serialization import Encoding

        return bytes(certificate.public_bytes(Encoding.PEM))

    def _signed(self, subject: str, public_key: Any, *, ca: bool, days: int = 1) -> Any:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.x509.oid import NameOID

        def named(text: str) -> Any:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named(self.name))
        builder = builder.public_key(public_key).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=2)).not_valid_after(now + timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        return builder.add_extension(names, critical=False).sign(self.key, SHA256())

    def issue(self, name: str, days: int = 1) -> Tls:
        """Return the files of a new certificate, to be checked against this authority."""
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = ec.generate_private_key(ec.SECP256R1())
        certificate, secret = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        certificate.write_bytes(self._pem(self._signed(name, key.public_key(), ca=False, days=days)))
        secret.touch(0o600)
        secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return Tls(str(certificate), str(secret), str(self.file))


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "hospital")


def echoes(helper: ModuleType, port: int, context: ssl.SSLContext) -> bool:
    with helper.association(port, tls_args=(context, "127.0.0.1")) as assoc:
        return bool(assoc.is_established and assoc.send_c_echo().Status == 0x0000)


def files_of(tls: Tls) -> tuple[str, str, str]:
    return tls.certificate, tls.key, tls.authorities


def test_a_certificate_of_ours_is_let_in_and_no_other(serve: Serve, helper: ModuleType, ours: Authority) -> None:
    other = Authority(ours.folder, "other")
    node_tls, good, expired = ours.issue("node"), ours.issue("ct1"), ours.issue("old", days=-1)
    foreign = Tls(other.issue("mallory").certificate, str(ours.folder / "mallory.key"), str(ours.file))
    with serve(tls=node_tls, network_seconds=3.0) as node:
        port = node.address[1]
        assert echoes(helper, port, client_context(*files_of(good)))
        for bad in (expired, foreign):
            assert not echoes(helper, port, client_context(*files_of(bad)))
        without = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        without.load_verify_locations(str(ours.file))
        assert not echoes(helper, port, without)
        with helper.association(port) as plain:
            assert not plain.is_established
        assert echoes(helper, port, client_context(*files_of(good)))


def test_tls_below_1_2_is_refused(serve: Serve, helper: ModuleType, ours: Authority) -> None:
    assert server_context(*files_of(ours.issue("node"))).minimum_version is ssl.TLSVersion.TLSv1_2
    assert client_context(*files_of(ours.issue("ct1"))).minimum_version is ssl.TLSVersion.TLSv1_2


def test_who_does_not_handshake_keeps_nobody_out(serve: Serve, helper: ModuleType, ours: Authority) -> None:
    context = client_context(*files_of(ours.issue("ct1")))
    with (
        serve(tls=ours.issue("node"), network_seconds=2.0) as node,
        socket.create_connection(node.address, timeout=20) as silent,
    ):
        assert echoes(helper, node.address[1], context)
        assert silent.recv(1) == b""


def test_results_go_to_a_target_with_a_certificate_of_ours_and_to_no_other(
    serve: Serve, helper: ModuleType, ours: Authority, tmp_path: Path
) -> None:
    tls = ours.issue("node")
    with serve(tls=tls) as node:  # stands for the target: any node takes a CT
        target = Target("pacs", "EDGEMED", "127.0.0.1", node.address[1], tls=True)
        settings = helper.settings(tmp_path / "other", aet="CT1", tls=tls)
        files = helper.write_instances(tmp_path / "scans", 2)
        assert [error for _, error in deliver(target, files, settings)] == [None, None]
        stranger = Tls(tls.certificate, tls.key, str(Authority(tmp_path, "other").file))
        settings = helper.settings(tmp_path / "other", aet="CT1", tls=stranger)
        ((_, error), _) = deliver(target, files, settings)
        assert "cannot be reached" in str(error)


def test_a_key_of_another_certificate_is_told(ours: Authority) -> None:
    one, two = ours.issue("one"), ours.issue("two")
    with pytest.raises(CannotRead, match="another's"):
        server_context(one.certificate, two.key, one.authorities)
