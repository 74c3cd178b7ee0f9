"""Runs a command in a network of its own that has loopback alone, and tells what it wanted of any other network.

    unshare -rnm python tests/offline/namespace.py REPORT.json COMMAND...

Brings lo up, makes this process the only name server (127.0.0.1), runs COMMAND, and writes {"exit", "names",
"no_route"}: every name that was asked for, by Python or by native code, and how many packets the kernel had no route
for. Standard library, no tracing, no root. The exit code is the command's.
"""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
NO_SUCH_NAME = b"\x81\x83"  # flags of an answer, RFC 1035 section 4.1.1


def bring_loopback_up() -> None:
    """Do what `ip link set lo up` does, where there is no ip."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack("16xH14x", fcntl.ioctl(sock, SIOCGIFFLAGS, request))
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))


def answer_names(names: list[str]) -> None:
    """Be the name server: note every question and answer that there is no such name."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 53))

    def serve() -> None:
        while True:
            asked, sender = sock.recvfrom(4096)
            parts, at = [], 12
            while length := asked[at]:
                parts.append(asked[at + 1 : at + 1 + length].decode("ascii", "replace"))
                at += 1 + length
            names.append(".".join(parts))
            sock.sendto(asked[:2] + NO_SUCH_NAME + asked[4:6] + bytes(6) + asked[12 : at + 5], sender)

    threading.Thread(target=serve, daemon=True).start()


def no_route() -> int:
    """Return how many packets of this network had nowhere to go."""
    rows = [line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines() if line.startswith("Ip:")]
    count = int(dict(zip(*rows, strict=True))["OutNoRoutes"])
    v6 = [line.split() for line in Path("/proc/self/net/snmp6").read_text().splitlines()]
    return count + sum(int(value) for name, value in v6 if name == "Ip6OutNoRoutes")


def main(report: str, *command: str) -> int:
    """Return the exit code of `command`."""
    bring_loopback_up()
    names: list[str] = []
    answer_names(names)
    with tempfile.NamedTemporaryFile("w") as resolver:
        resolver.write("nameserver 127.0.0.1\noptions attempts:1 timeout:1\n")
        resolver.flush()
        subprocess.run(["mount", "--bind", resolver.name, str(Path("/etc/resolv.conf").resolve())], check=True)
        code = subprocess.run(command, check=False).returncode
    Path(report).write_text(json.dumps({"exit": code, "names": names, "no_route": no_route()}), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
