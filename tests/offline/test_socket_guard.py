"""The guard refuses and records what leaves the machine, and nothing else."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("socket_guard", Path(__file__).resolve().parent / "socket_guard.py")
assert _SPEC is not None and _SPEC.loader is not None
socket_guard = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(socket_guard)


def refused(call: str) -> list[str]:
    """Return what the guard recorded of a call that it must refuse."""
    with socket_guard.guarded() as attempts:
        if call in ("connect", "connect_ex"):
            with socket.socket() as sock, pytest.raises(socket_guard.NetworkRefused):
                getattr(sock, call)(("192.0.2.1", 443))
        elif call == "sendto":
            with socket.socket(type=socket.SOCK_DGRAM) as sock, pytest.raises(socket_guard.NetworkRefused):
                sock.sendto(b"x", ("192.0.2.1", 53))
        else:
            arguments = ("example.invalid", 443) if call == "getaddrinfo" else ("example.invalid",)
            with pytest.raises(socket_guard.NetworkRefused):
                getattr(socket, call)(*arguments)
        return list(attempts)


@pytest.mark.parametrize("call", ["connect", "connect_ex", "sendto", "getaddrinfo", "gethostbyname"])
def test_every_way_out_is_refused_and_recorded(call: str) -> None:
    (told,) = refused(call)
    assert "192.0.2.1" in told or "example.invalid" in told


def test_loopback_and_unix_sockets_are_left_alone(tmp_path: Path) -> None:
    with socket_guard.guarded() as attempts:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()[:2]).close()
            socket.create_connection(("localhost", server.getsockname()[1])).close()
        if hasattr(socket, "AF_UNIX"):
            with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as calling:
                listening.bind(str(tmp_path / "s"))
                listening.listen()
                calling.connect(str(tmp_path / "s"))
    assert attempts == []


def test_it_is_off_outside_of_its_block() -> None:
    with socket_guard.guarded() as attempts:
        pass
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", 9))
    assert attempts == []
    assert socket_guard.is_local("::1")
    assert not socket_guard.is_local("10.0.0.1")
