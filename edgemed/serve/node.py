"""The node on the network: it takes instances, answers studies that are complete, and sends the results on.

    with Store(settings) as store:
        node = Node(store, *workers)
        node.start()
        ...
        node.stop()

Covers who may connect, statuses, and stopping; `work` does the rest, `store` and `journal` hold what must not be lost.

Source: DICOM PS3.4 annexes A (verification) and B (storage), PS3.8 9.3.4 (reasons of a rejection).
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from edgemed import audit
from edgemed.errors import CannotRead
from edgemed.serve.store import CANNOT_UNDERSTAND, SUCCESS, Refused
from edgemed.serve.work import Work

if TYPE_CHECKING:
    from pynetdicom import evt


class Node(Work):
    """The node of a store; see `Work` for its arguments."""

    _server: Any = None
    _listening = False

    # --- the life of a node ---

    def start(self) -> None:
        """Recover the store, listen, and begin to work.

        Raises CannotRead if the port cannot be had or TLS files cannot be used, InvalidInput as `Store.recover`.
        """
        self._tell("recovered", **self.store.recover())
        self._listen()
        self._tell("listening", port=self.address[1], tls=self.settings.tls is not None)
        self.start_work()

    @property
    def address(self) -> tuple[str, int]:
        """The address and port that the node listens on."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def stop(self) -> None:
        """End the node: no new association, those there may end, the running job is finished or handed back."""
        self._stopping.set()
        if self._listening:
            self._listening = False
            self._server.shutdown()
            self._end_associations()
        self.stop_work()
        self._tell("stopped")

    def upkeep(self) -> int:
        """Take what was pulled in, and forget what is done."""
        return self._take_pulled() + self.store.forget()

    def _take_pulled(self) -> int:
        told = self.store.take_pulled()
        for uid, error in told:
            if error is None:
                self._tell("pulled", instance=self.journal.hashed(uid))
            else:
                self._tell("refused", instance=self.journal.hashed(uid), reason=str(error), sender="pull")
        return len(told)

    def _end_associations(self) -> None:
        from time import monotonic

        end = monotonic() + self.settings.stop_seconds
        for assoc in self._server.active_associations:
            assoc.join(max(end - monotonic(), 0))
        for assoc in self._server.active_associations:
            assoc.abort()

    def _listen(self) -> None:
        from pynetdicom import AE, _config, evt
        from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

        from edgemed.serve.association import Server, server_context
        from edgemed.serve.pull import storage_contexts

        _config.LOG_HANDLER_LEVEL = "none"  # its own log tells the elements of identifiers
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
        logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
        s = self.settings
        ae = AE(ae_title=s.aet)
        ae.require_called_aet = True
        ae.maximum_associations, ae.maximum_pdu_size = s.max_associations, s.max_pdu
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = s.network_seconds
        ae.supported_contexts = storage_contexts(s)
        ae.add_supported_context(Verification)
        tls = None if s.tls is None else server_context(s.tls.certificate, s.tls.key, s.tls.authorities)
        handlers: list[Any] = [
            (evt.EVT_REQUESTED, self._on_request),
            (evt.EVT_REJECTED, self._on_rejected),
            (evt.EVT_C_ECHO, lambda event: SUCCESS),
            (evt.EVT_C_STORE, self._on_store),
        ]
        try:
            self._server = ae.make_server(
                (s.bind, s.port),
                ssl_context=tls,
                evt_handlers=handlers,
                server_class=Server,
                seconds=s.network_seconds,
                open_spool=self.store.open_spool,
                allows=lambda host: any(sender.may_come_from(host) for sender in s.senders),
            )
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "refused"
            raise CannotRead(f"cannot listen on {s.bind} port {s.port}: {reason}") from error
        ae._servers.append(self._server)  # as AE.start_server does; shutdown takes it out again
        self._listening = True
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="edgemed-listen", daemon=True).start()

    # --- events of the network ---

    def _on_request(self, event: evt.Event) -> None:
        """Reject who is not known, or comes from elsewhere, before anything else is looked at."""
        assoc = event.assoc
        aet = _title(event)
        sender = self.settings.sender(aet)
        if self._stopping.is_set():
            assoc.acse.send_reject(0x02, 0x03, 0x01)  # transient, provider (presentation), temporary congestion
        elif sender is None or not sender.may_come_from(str(assoc.requestor.address)):
            assoc.acse.send_reject(0x01, 0x01, 0x03)  # permanent, service user, calling AE title not recognised
        else:
            return
        self._tell("rejected", reason="stopping" if self._stopping.is_set() else "sender", sender=self._known(aet))
        self._record(audit.refused(audit.NODE_AUTHENTICATION, "association", subject=self._known(aet), verb="serve"))
        assoc.is_rejected = True
        assoc.kill()

    def _on_rejected(self, event: evt.Event) -> None:
        aet = _title(event)
        self._tell("rejected", reason="called AE title, or too many associations", sender=self._known(aet))
        self._record(audit.refused(audit.NODE_AUTHENTICATION, "association", subject=self._known(aet), verb="serve"))

    def _known(self, aet: str) -> str:
        """Return an AE title for the log: that of the configuration, a hash of anyone else's."""
        return aet if self.settings.sender(aet) is not None else f"#{self.journal.hashed(aet)}"

    def _on_store(self, event: evt.Event) -> int:
        """Return the status of an instance: success when it is on the disk and in the journal, not before."""
        from edgemed.serve.association import spool_of

        spool = spool_of(event)
        if spool is None:
            return CANNOT_UNDERSTAND
        sender = event.assoc.requestor.ae_title.strip()
        uid = self.journal.hashed(spool.head.uid)
        try:
            item = self.store.take(spool, sender)
        except Refused as error:
            self._tell("refused", instance=uid, status=f"0x{error.status:04X}", reason=str(error), sender=sender)
            why = f"instance, status 0x{error.status:04X}"
            self._record(audit.refused(audit.RESTRICTED_FUNCTION, why, subject="urn:edgemed:input", verb="serve"))
            return error.status
        self._tell("stored", instance=uid, study=self.journal.hashed(item.study), bytes=spool.bytes, sender=sender)
        return SUCCESS


def _title(event: evt.Event) -> str:
    """Return the calling AE title of an association that is asked for."""
    request = event.assoc.requestor.primitive
    return "" if request is None else request.calling_ae_title.strip()
