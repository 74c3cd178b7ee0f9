"""Bombs: small files that ask for gigabytes end in ResourceLimit, fast and in little memory.

All run in one fresh process, so that its children's peak memory is theirs alone. CPU time is asserted, not wall time: a
busy machine must not fail the test.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemed.dicom import Limits, read_scan
from edgemed.errors import EdgemedError, ResourceLimit

pytest.importorskip("resource", reason="memory and CPU limits need a POSIX system")
Write = Callable[..., Path]
JPEG = "1.2.840.10008.1.2.4."
SMALL = np.zeros((64, 64), np.uint8)

RUN = """
import json, resource, sys, time
from edgemed.dicom import read_scan
from edgemed.errors import EdgemedError
def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
found = {}
for path in sys.argv[1:]:
    start, clock = cpu(), time.perf_counter()
    try:
        read_scan(path)
        code, text = 0, ""
    except EdgemedError as error:
        code, text = error.exit_code, str(error)
    found[path] = {"code": code, "text": text, "cpu_s": cpu() - start, "wall_s": time.perf_counter() - clock}
# ru_maxrss of this process would include pytest's own peak, from which it was started; VmHWM starts anew with exec.
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps({"found": found, "peak_mib": max(own, children)}))
"""


def j2k(side: int, tile: int) -> bytes:
    """Return a JPEG 2000 codestream of 64 x 64 whose SIZ says side x side."""
    import imagecodecs

    data = bytearray(imagecodecs.jpeg2k_encode(SMALL, level=0, codecformat="j2k", reversible=True))
    at = data.index(b"\xff\x51") + 6
    data[at : at + 8] = struct.pack(">2I", side, side)
    data[at + 16 : at + 24] = struct.pack(">2I", tile, tile)
    return bytes(data)


def jpeg(marker: int, rows: int, columns: int) -> bytes:
    """Return the start of a JPEG stream with one 8-bit component and nothing behind."""
    return b"\xff\xd8\xff" + struct.pack(">BHBHHBBBB", marker, 11, 8, rows, columns, 1, 1, 0x11, 0) + b"\0" * 64


def png(side: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(mebibytes: int) -> bytes:
    """Return a raw deflate stream of zeros. Full flushes make its blocks independent: one is packed, then repeated."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(b"\0" * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * mebibytes + packer.flush()


def head(path: Path) -> bytes:
    """Return preamble and file meta of a phantom."""
    data = path.read_bytes()
    return data[: 144 + int.from_bytes(data[140:144], "little")]


def nested(levels: int) -> bytes:
    """Return an explicit VR dataset of sequences of undefined length in each other."""
    opened = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    closed = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return opened * levels + closed * levels


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory, write_phantom: Write) -> dict[str, Any]:
    """Return {name: what reading it ended in} and the peak memory, from one process that read them all."""
    folder = tmp_path_factory.mktemp("bombs")
    made: dict[str, Path] = {}

    def write(name: str, content: bytes) -> None:
        made[name] = folder / name
        made[name].write_bytes(content)

    def dicom(name: str, frame: bytes, syntax: str, side: int = 64, **elements: Any) -> None:
        made[name] = write_phantom(
            folder, SMALL, name=name, syntax=syntax, encoded=[frame], Rows=side, Columns=side, **elements
        )

    dicom("j2k-20000", j2k(20000, 20000), JPEG + "90", 20000)
    dicom("j2k-20000-header-64", j2k(20000, 20000), JPEG + "90")
    dicom("j2k-tiles", j2k(4096, 1), JPEG + "90", 4096)
    dicom("j2k-5000", j2k(5000, 5000), JPEG + "90", 5000)
    dicom("htj2k-20000-header-64", j2k(20000, 20000), JPEG + "201")
    dicom("jpegls-30000", jpeg(0xF7, 30000, 30000), JPEG + "80", 30000)
    dicom("jpegls-30000-header-64", jpeg(0xF7, 30000, 30000), JPEG + "80")
    dicom("jpeg-65000-header-64", jpeg(0xC0, 65000, 65000), JPEG + "50")
    dicom("rle-20000", struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 512, "1.2.840.10008.1.2.5", 20000)
    dicom("rle-6000", struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 512, "1.2.840.10008.1.2.5", 6000)
    plain = write_phantom(folder, SMALL, name="plain")
    frames = write_phantom(folder, SMALL, name="frames", NumberOfFrames=100_000, Rows=4096, Columns=4096)
    made["100000-frames"] = frames
    deflated = write_phantom(folder, SMALL, name="deflated", syntax="1.2.840.10008.1.2.1.99")
    write("deflated-zeros", head(deflated) + zeros(700))
    write("deflated-bit-over-the-ratio", head(deflated) + zeros(60))
    write("nested-200", head(plain) + nested(200))
    write("nested-50000", head(plain) + nested(50_000))
    write("elements-500000", head(plain) + struct.pack("<HH2sH", 0x0009, 0x1001, b"LO", 0) * 500_000)
    write("png-50000", png(50_000))
    write("png-7000", png(7000, zlib.compress(b"\0" * 7001 * 7000)))
    write("jpeg-65000", jpeg(0xC0, 65000, 65000))
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, made.values())], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    return {"peak_mib": result["peak_mib"], **{name: result["found"][str(path)] for name, path in made.items()}}


BOMBS = (
    "j2k-20000", "j2k-20000-header-64", "j2k-tiles", "j2k-5000", "htj2k-20000-header-64", "jpegls-30000",
    "jpegls-30000-header-64", "jpeg-65000-header-64", "rle-20000", "rle-6000", "100000-frames", "deflated-zeros",
    "deflated-bit-over-the-ratio", "nested-200", "nested-50000", "elements-500000", "png-50000", "png-7000",
    "jpeg-65000",
)  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_ends_in_a_resource_limit_within_two_seconds(bombs: dict[str, Any], name: str) -> None:
    found = bombs[name]
    print(f"{name}: {found['text']} cpu {found['cpu_s']:.2f} s, wall {found['wall_s']:.2f} s")
    assert found["code"] == ResourceLimit.exit_code == 86, found["text"]
    assert found["cpu_s"] < 2


def test_no_bomb_takes_300_mib(bombs: dict[str, Any]) -> None:
    print(f"peak {bombs['peak_mib']:.0f} MiB")
    assert bombs["peak_mib"] < 300


def sparse(path: Path, phantom: Path, pixels: int) -> Path:
    """Return `phantom` with room for `pixels` zero bytes of Pixel Data, without writing them."""
    data = phantom.read_bytes()
    with open(path, "wb") as file:
        file.write(data[:-4100])
        file.write(pixels.to_bytes(4, "little"))
        file.truncate(len(data) - 4096 + pixels)
    return path


def test_memory_limit_of_the_child_is_the_net(write_dicom: Write, tmp_path: Path) -> None:
    path = sparse(tmp_path / "big.dcm", write_dicom(SMALL, Rows=20_000, Columns=20_000), 400_000_000)
    with pytest.raises(ResourceLimit, match="more than 100 MiB"):
        read_scan(path, limits=Limits(max_pixels=10**9, memory_bytes=100 << 20))


def test_cpu_limit_of_the_child_is_the_net(write_dicom: Write, tmp_path: Path) -> None:
    path = tmp_path / "slow.dcm"
    path.write_bytes(head(write_dicom(SMALL)) + struct.pack("<HH2sH", 0x0009, 0x1001, b"LO", 0) * 6_000_000)
    with pytest.raises(ResourceLimit, match="CPU time"):
        read_scan(path, limits=Limits(max_elements=10**9, max_header_reads=10**9, cpu_seconds=1))


def test_clock_limit_ends_the_child(write_dicom: Write) -> None:
    with pytest.raises(ResourceLimit, match="longer than 0.01 s"):
        read_scan(write_dicom(SMALL), limits=Limits(wall_seconds=0.01))


def test_large_honest_image_is_read(write_dicom: Write, tmp_path: Path) -> None:
    path = sparse(tmp_path / "mammogram.dcm", write_dicom(SMALL, Rows=5000, Columns=4000), 20_000_000)
    assert read_scan(path).pixels.shape == (1, 5000, 4000)


def test_limits_are_above_zero() -> None:
    with pytest.raises(EdgemedError):
        Limits(max_pixels=0)
