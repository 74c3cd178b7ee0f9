"""Records on their way: syslog messages (RFC 5424), octet-counted over TLS with certificates on both sides (RFC 5425).

A server says nothing about a message. What it does answer is the end of the TLS connection: its close_notify comes
after it has taken everything that was sent before ours. So a delivery is one connection, and only that answer counts:
without it the same records are sent again, and the server may then have some of them twice (sequenceId tells which).

Source: RFC 5424 section 6, RFC 5425 sections 4.3 and 4.4; DICOM PS3.15 A.6 (facility 10, MSGID, TLS 1.2 or later).
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgemed.errors import CannotRead, CannotWrite, EdgemedError

MSGID = "DICOM+RFC3881"
NOTICE, WARNING = 5, 4
_FACILITY = 10
_PORT = 6514

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """Where records go: host, port, and the files (PEM) that both sides are known by. seconds: for each step."""

    host: str
    port: int
    authorities: Path
    certificate: Path
    key: Path
    seconds: float = 5.0


def to_address(text: str) -> tuple[str, int]:
    """Return (host, port) of HOST:PORT, [ADDRESS]:PORT, or of a host alone.

    >>> to_address("siem.example:6515"), to_address("[::1]")
    (('siem.example', 6515), ('::1', 6514))
    """
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?", text)
    if found is None or not 0 < int(found[3] or _PORT) < 65536:
        raise EdgemedError("audit.server is not HOST:PORT")
    return found[1] or found[2], int(found[3] or _PORT)


def to_syslog(xml: str, at: str, host: str, process: int, severity: int, number: int) -> str:
    """Return a syslog message on one line. at: as RFC 3339; number: of the record, told as sequenceId."""
    name = re.sub(r"[^!-~]", "_", host)[:255] or "-"
    head = f"<{_FACILITY * 8 + severity}>1 {at} {name} edgemed {process} {MSGID}"
    return f'{head} [meta sequenceId="{(number - 1) % 0x7FFFFFFF + 1}"] \ufeff{xml}'


def to_frame(message: str) -> bytes:
    """Return a message as it is sent: its length in bytes, a space, itself."""
    data = message.encode("utf-8", "replace")
    return b"%d %b" % (len(data), data)


def deliver(server: Server, messages: Sequence[str]) -> None:
    """Send messages; they have arrived when this returns.

    Raises CannotRead if a TLS file cannot be used, CannotWrite if the server is away or did not confirm.
    """
    context = to_context(server)
    at = f"{server.host} port {server.port}"
    try:
        with socket.create_connection((server.host, server.port), server.seconds) as plain:
            _Conversation(plain, context, server.host).send(b"".join(map(to_frame, messages)))
    except (OSError, ValueError) as error:
        reason = "it ended without a close_notify" if isinstance(error, ssl.SSLEOFError) else type(error).__name__
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = f"its certificate: {error.verify_message}"
        raise CannotWrite(f"the audit server {at} confirmed nothing ({reason}); the records are kept") from None


class _Conversation:
    """One TLS connection whose end is looked at closely.

    SSLSocket.unwrap does not tell a close_notify from a fatal alert that comes in its place: OpenSSL notes both as the
    other side's shutdown, so a server that refuses our certificate (in TLS 1.3 after the handshake) seemed to confirm.
    Here the two halves of the end are apart: ours is written while nothing is there to be read, the other is read.
    """

    def __init__(self, plain: socket.socket, context: ssl.SSLContext, host: str) -> None:
        self._plain, self._in, self._out = plain, ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)

    def send(self, data: bytes) -> None:
        """Send data and wait for the end; raises OSError (SSLError is one) unless the other side ends in order."""
        self._until(self._tls.do_handshake)
        self._tls.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        with contextlib.suppress(ssl.SSLZeroReturnError):
            while self._until(lambda: self._tls.read(1 << 14)):
                pass

    def _until(self, step: Callable[[], T]) -> T:
        """Return what a step returns, after giving it all that it wants to read; what it writes is sent."""
        while True:
            try:
                done = step()
            except ssl.SSLWantReadError:
                self._plain.sendall(self._out.read())
                if more := self._plain.recv(1 << 16):
                    self._in.write(more)
                else:
                    self._in.write_eof()
            else:
                self._plain.sendall(self._out.read())
                return done


def to_context(server: Server) -> ssl.SSLContext:
    """Return TLS 1.2 or later that checks the server's name and shows a certificate. Raises CannotRead."""
    from edgemed.config import read_secret

    read_secret(server.key)  # that only its owner may read it; OpenSSL takes the path
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(server.authorities)
        context.load_cert_chain(server.certificate, server.key, lambda: "")
    except (OSError, ssl.SSLError) as error:
        reason = "no PEM, locked, or the key is another's" if isinstance(error, ssl.SSLError) else error.strerror
        raise CannotRead(f"cannot use the TLS files of [audit]: {reason}") from None
    return context
