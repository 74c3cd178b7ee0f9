"""Refuses and records what this process asks of the network beyond loopback and Unix sockets.

By an audit hook, which Python calls in C: a library cannot go around it with a reference to socket.socket that it took
earlier. Covers Python code of this process. Does not cover native code and child processes: `namespace` does.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOCAL = ("localhost", "")
_WITH_ADDRESS = ("socket.connect", "socket.sendto", "socket.sendmsg")
_WITH_NAME = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_active: list[list[str]] = []
_installed: list[bool] = []


class NetworkRefused(OSError):
    """The test asked for the network."""


def is_local(host: Any) -> bool:
    """Return whether only this machine can be meant."""
    if host is None:
        return True
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return text.lower() in LOCAL
    return address.is_loopback or address.is_unspecified


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _active or not event.startswith("socket."):
        return
    if event in _WITH_ADDRESS:
        address = arguments[1]
        if not isinstance(address, tuple) or is_local(address[0]):  # a path of a Unix socket, or none
            return
        told = f"{event} {address[0]}"
    elif event in _WITH_NAME:
        if is_local(arguments[0]):
            return
        told = f"{event} {arguments[0]}"
    else:
        return
    _active[-1].append(told)
    raise NetworkRefused(f"{told} was refused by the test")


@contextmanager
def guarded() -> Iterator[list[str]]:
    """Give the list of attempts; each raises `NetworkRefused`, in whatever thread it is made."""
    if not _installed:
        sys.addaudithook(_hook)  # cannot be taken out again, so it looks whether it is wanted
        _installed.append(True)
    attempts: list[str] = []
    _active.append(attempts)
    try:
        yield attempts
    finally:
        _active.remove(attempts)
