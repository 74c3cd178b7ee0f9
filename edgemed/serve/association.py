"""Associations that cannot hang, flood or fill the memory: what the node adds to pynetdicom's server.

    deadlines       a TLS handshake, and every PDU from its first byte to its last, in `network_seconds`; the handshake
                    is done in the connection's own thread
    sizes           a PDU not longer than was negotiated; a command not longer than 64 KiB; a data set to a `Spool` on
                    the disk, piece by piece, up to the limit
    counts          connections (beyond associations, which pynetdicom counts), messages that wait for an answer

pynetdicom 3.0.4 has no such limits: its sockets have no time-out, it handshakes in the thread that accepts, reads a PDU
of any declared length, and keeps data sets in memory. The names with an underscore below are its own.

Source: DICOM PS3.8 section 9 (upper layer), annex E (fragments); PS3.7 annex E (commands).
"""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from pynetdicom import evt
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

from edgemed.serve.store import Head, Spool

if TYPE_CHECKING:
    from pynetdicom import AE
    from pynetdicom.association import Association
    from pynetdicom.presentation import PresentationContext

OpenSpool = Callable[[Head], Spool]

MAX_COMMAND = 64 << 10
MAX_ASSOCIATE = 128 << 10
"""Of a PDU in bytes, whatever was negotiated: 128 presentation contexts with many transfer syntaxes."""
MAX_WAITING = 4
"""Messages of one association that wait; a sender that has not negotiated otherwise waits for each answer."""
SPARE_CONNECTIONS = 4
"""Beyond `max_associations`, so that those who ask for one too many can be told."""


class DeadlineSocket(AssociationSocket):
    """A socket that gives up on a PDU that is too long or too slow; pynetdicom then takes it as closed."""

    seconds = 30.0
    max_pdu = MAX_ASSOCIATE

    def recv(self, nr_bytes: int) -> bytearray:
        if nr_bytes > self.max_pdu:
            raise OSError("the PDU is longer than was negotiated")
        sock = cast(socket.socket, self.socket)
        received = bytearray(nr_bytes)
        view, got = memoryview(received), 0
        end = time.monotonic() + self.seconds
        while got < nr_bytes:
            sock.settimeout(max(end - time.monotonic(), 0.001))
            count = sock.recv_into(view[got:])
            if not count:
                break
            got += count
            if time.monotonic() > end:
                raise TimeoutError("the PDU did not arrive in time")
        view.release()
        del received[got:]
        sock.settimeout(self.seconds)  # for what is sent
        return received

    def _shutdown_socket(self) -> None:
        """Close the socket also if the other side was first (pynetdicom leaves that to the garbage collector)."""
        close_socket(self.socket)


def close_socket(sock: socket.socket | None) -> None:
    """End a connection, whatever its state."""
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


class SpooledDataSet(io.BytesIO):
    """Stands for the data set of a message that is being received: small in memory, or on its way to the disk."""

    def __init__(self, message: DIMSEMessage, provider: Provider) -> None:
        super().__init__()
        self._message, self._provider = message, provider
        self.spool: Spool | None = None

    def write(self, data: Any) -> int:
        if self.spool is None:
            self.spool = self._provider.open_spool(self._head())
        self.spool.write(bytes(data))
        return len(data)

    def _head(self) -> Head:
        command = getattr(self._message, "command_set", None)
        accepted = {cx.context_id: cx for cx in self._provider.assoc.accepted_contexts}
        context = accepted.get(getattr(self._message, "context_id", None))
        syntax = str(context.transfer_syntax[0]) if context is not None else ""
        uid, sop_class = (
            str((command and command.get(keyword)) or "")
            for keyword in ("AffectedSOPInstanceUID", "AffectedSOPClassUID")
        )
        return Head(uid, sop_class, syntax)


class Provider(DIMSEServiceProvider):
    """Receives messages, data sets to spools; ends the association of a sender that keeps to no limit."""

    def __init__(self, assoc: Association, open_spool: OpenSpool) -> None:
        super().__init__(assoc)
        self._open_spool = open_spool
        self._command_bytes = 0
        self._open: set[Spool] = set()

    def open_spool(self, head: Head) -> Spool:
        spool = self._open_spool(head)
        self._open.add(spool)
        return spool

    def release(self, spool: Spool) -> None:
        """Leave a spool to the caller."""
        self._open.discard(spool)

    def drop_spools(self) -> None:
        """Remove what an association that is over was sending."""
        while self._open:
            self._open.pop().drop()

    def receive_primitive(self, primitive: P_DATA) -> None:
        for context_id, data in primitive.presentation_data_value_list:
            if not data or self.msg_queue.qsize() > MAX_WAITING:
                self.dul.event_queue.put("Evt19")  # as an invalid PDU: the association is aborted
                return
            if self.message is None:
                self._command_bytes = 0
                self.message = DIMSEMessage()
                self.message.data_set = SpooledDataSet(self.message, self)
            if data[0] & 1:
                self._command_bytes += len(data)
                if self._command_bytes > MAX_COMMAND:
                    self.dul.event_queue.put("Evt19")
                    return
            one = P_DATA()
            one.presentation_data_value_list = [[context_id, data]]  # type: ignore[list-item]  # it asks for lists
            super().receive_primitive(one)


class Handler(RequestHandler):
    """Makes an association of a connection, after the handshake."""

    server: Server

    def setup(self) -> None:
        self.request.settimeout(self.server.seconds)
        if self.server.ssl_context is not None:
            self.request = self.server.ssl_context.wrap_socket(self.request, server_side=True)

    def _create_association(self) -> Association:
        assoc = super()._create_association()
        assoc.dimse = Provider(assoc, self.server.open_spool)
        sock = cast(AssociationSocket, assoc.dul.socket)
        sock.__class__ = DeadlineSocket  # a second AssociationSocket would announce the connection twice
        bounded = cast(DeadlineSocket, sock)
        bounded.seconds = self.server.seconds
        bounded.max_pdu = max(MAX_ASSOCIATE, self.server.ae.maximum_pdu_size)
        return assoc


class Server(ThreadedAssociationServer):
    """pynetdicom's server with the limits of this file."""

    def __init__(
        self,
        ae: AE,
        address: tuple[str, int],
        ae_title: str,
        contexts: list[PresentationContext],
        ssl_context: ssl.SSLContext | None,
        evt_handlers: list[Any],
        *,
        seconds: float,
        open_spool: OpenSpool,
        allows: Callable[[str], bool],
    ) -> None:
        self.seconds, self.open_spool, self._allows = seconds, open_spool, allows
        self._connecting = 0
        self._count = threading.Lock()
        super().__init__(ae, address, ae_title, contexts, ssl_context, evt_handlers, Handler)
        self.bind(evt.EVT_CONN_CLOSE, _closed)

    def get_request(self) -> tuple[socket.socket, Any]:
        return self.socket.accept()  # type: ignore[union-attr]  # the handshake is Handler's

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether a connection goes on: from an address that may send, and not one of too many."""
        limit = self.ae.maximum_associations + SPARE_CONNECTIONS
        return self._allows(client_address[0]) and len(self.active_associations) + self._connecting < limit

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._count:
            self._connecting += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._count:
                self._connecting -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a handshake that failed is the other side's matter (the base class prints a traceback)."""


def _closed(event: evt.Event) -> None:
    provider = event.assoc.dimse
    if isinstance(provider, Provider):
        provider.drop_spools()


def spool_of(event: evt.Event) -> Spool | None:
    """Return the spool of the data set of a C-STORE, None where there was no data set; the caller's from now on."""
    data_set = getattr(event.request, "DataSet", None)
    spool = data_set.spool if isinstance(data_set, SpooledDataSet) else None
    if spool is not None:
        cast(Provider, event.assoc.dimse).release(spool)
    return spool


def server_context(certificate: str, key: str, authorities: str) -> ssl.SSLContext:
    """Return the TLS of a node: 1.2 or later, a certificate of these authorities is asked of every caller."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    return _loaded(context, certificate, key, authorities)


def client_context(certificate: str, key: str, authorities: str) -> ssl.SSLContext:
    """Return the TLS with which the node calls: 1.2 or later, both sides show certificates, names are checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return _loaded(context, certificate, key, authorities)


def _loaded(context: ssl.SSLContext, certificate: str, key: str, authorities: str) -> ssl.SSLContext:
    from edgemed.errors import CannotRead

    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authorities)
    except (OSError, ssl.SSLError) as error:
        reason = "no PEM, or the key is another's" if isinstance(error, ssl.SSLError) else error.strerror
        raise CannotRead(f"cannot use the TLS files of the configuration: {reason}") from None
    return context
