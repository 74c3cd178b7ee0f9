"""Bombs that `tests/dicom/test_limits.py` does not have: archives, volumes, pictures, a DICOMDIR.

python tests/robustness/bombs.py FILE ...      what reading each ends in, in this process: one JSON object
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAD = b"\0" * 128 + b"DICM"


def nifti(shape: tuple[int, int, int]) -> bytes:
    """Return the header of a NIfTI of 16-bit voxels."""
    data = bytearray(352)
    struct.pack_into("<i", data, 0, 348)
    struct.pack_into("<8h", data, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<2h", data, 70, 4, 16)
    struct.pack_into("<8f", data, 76, 1, 1, 1, 1, 1, 1, 1, 1)
    struct.pack_into("<f", data, 108, 352)
    struct.pack_into("<2h12f", data, 252, 0, 1, *[0] * 6, *[0] * 6)
    struct.pack_into("<12f", data, 280, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
    data[344:348] = b"n+1\0"
    return bytes(data)


def nrrd(fields: str, body: bytes = b"") -> bytes:
    where = "space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n"
    return f"NRRD0004\ntype: short\ndimension: 3\nendian: little\n{where}{fields}\n\n".encode() + body


def zeros(mebibytes: int) -> bytes:
    """Return a raw deflate stream of zeros: one packed block, repeated."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(b"\0" * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * mebibytes + packer.flush()


def member(name: bytes, packed: bytes, size: int, crc: int = 0) -> tuple[bytes, bytes]:
    """Return a deflated member of a zip and its entry in the list."""
    facts = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, crc, len(packed), size, len(name), 0)
    local = b"PK\3\4" + facts + name + packed
    return local, b"PK\1\2" + struct.pack("<H", 20) + facts + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name


def archive(locals_: bytes, entries: bytes, count: int) -> bytes:
    low = min(count, 0xFFFF)
    return locals_ + entries + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, low, low, len(entries), len(locals_), 0)


def zip_of_zeros() -> bytes:
    packed = zlib.compressobj(9, wbits=-15)
    start = packed.compress(HEAD) + packed.flush(zlib.Z_FULL_FLUSH)
    local, entry = member(b"x.dcm", start + zeros(700), len(HEAD) + (700 << 20))
    return archive(local, entry, 1)


def zip_overlapping() -> bytes:
    """Return an archive whose thousand entries are one member."""
    packed = zlib.compressobj(9, wbits=-15)
    start = packed.compress(HEAD) + packed.flush(zlib.Z_FULL_FLUSH)
    local, entry = member(b"x.dcm", start + zeros(10), len(HEAD) + (10 << 20), zlib.crc32(HEAD + bytes(10 << 20)))
    return archive(local, entry * 1000, 1000)


def zip_of_many(count: int) -> bytes:
    local, entry = member(b"x", b"\3\0", 0)
    return archive(local, entry * count, count)


def zip_in_zip() -> bytes:
    """Return an archive of archives of zeros: what is inside is not unpacked again, and is no image."""
    inner = zip_of_zeros()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(20):
            file.writestr(f"{number}.zip", inner)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(kind: bytes, start: bytes) -> bytes:
    """Return an 8 x 8 PNG with a chunk that unpacks to 200 MiB."""
    packer = zlib.compressobj(9)
    packed = packer.compress(bytes(200 << 20)) + packer.flush()
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    image = chunk(b"IDAT", zlib.compress(bytes(9 * 8)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(kind, start + packed) + image + chunk(b"IEND", b"")


def jpeg_of_scans(scans: int) -> bytes:
    """Return a progressive JPEG of 4000 x 4000 whose last scan is there many times."""
    import numpy as np
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.zeros((4000, 4000), np.uint8)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


def dicomdir(records: int) -> bytes:
    """Return a DICOMDIR of many images, in explicit VR."""
    uid = b"1.2.840.10008.1.2.1\0"
    meta = struct.pack("<HH2sH", 2, 0x10, b"UI", len(uid)) + uid
    elements = struct.pack("<HH2sH", 4, 0x1430, b"CS", 6) + b"IMAGE "
    elements += struct.pack("<HH2sH", 4, 0x1500, b"CS", 2) + b"A "
    item = struct.pack("<HHI", 0xFFFE, 0xE000, len(elements)) + elements
    sequence = struct.pack("<HH2sHI", 4, 0x1220, b"SQ", 0, len(item) * records) + item * records
    return HEAD + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta + sequence


def dicomdir_nested(levels: int) -> bytes:
    opened = struct.pack("<HH2sHIHHI", 4, 0x1220, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    return dicomdir(0)[:-12] + opened * levels


BOMBS: dict[str, Callable[[], bytes]] = {
    "gz/1000 to 1.nii.gz": lambda: gzip.compress(nifti((2048, 2048, 300)) + bytes(8 << 20), mtime=0),
    "gz/slices of 1 GP.nii.gz": lambda: gzip.compress(nifti((32767, 32767, 2)), mtime=0),
    "gz/1 TB.nii": lambda: nifti((6000, 6000, 32767)),
    "nrrd/1000 to 1.nrrd": lambda: nrrd("sizes: 2048 2048 300\nencoding: gzip", gzip.compress(bytes(8 << 20), mtime=0)),
    "nrrd/10^18 voxels.nrrd": lambda: nrrd("sizes: 1000000 1000000 1000000\nencoding: raw"),
    "nrrd/endless header.nrrd": lambda: b"NRRD0004\n" + b"# a comment\n" * 1_000_000,
    "nrrd/endless line.nrrd": lambda: b"NRRD0004\n" + b"x" * (8 << 20),
    "zip/zeros.zip": zip_of_zeros,
    "zip/one member, 1000 entries.zip": zip_overlapping,
    "zip/150000 members.zip": lambda: zip_of_many(150_000),
    "zip/1000000 members.zip": lambda: zip_of_many(1_000_000),
    "png/text.png": lambda: png_with(b"zTXt", b"Comment\0\0"),
    "png/profile.png": lambda: png_with(b"iCCP", b"icc\0\0"),
    "png/international text.png": lambda: png_with(b"iTXt", b"Comment\0\1\0\0\0"),
    "jpeg/20000 scans.jpg": lambda: jpeg_of_scans(20_000),
    "dir/DICOMDIR": lambda: dicomdir(120_000),
    "just too many/DICOMDIR": lambda: dicomdir(30_001),
    "nested/DICOMDIR": lambda: dicomdir_nested(20_000),
}
"""Place in a folder -> the bytes. Each has to end in exit 86."""

HARMLESS: dict[str, Callable[[], bytes]] = {"zip/of zips.zip": zip_in_zip}
"""What looks like a bomb and holds no image: NoInput."""


def write(folder: Path) -> list[Path]:
    """Return the files of all bombs, written below `folder`."""
    paths = []
    for name, make in {**BOMBS, **HARMLESS}.items():
        paths.append(folder / name)
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(make())
    return paths


def read(path: str) -> None:
    """Read a file as `edgemed infer` does: a series, a volume or an image."""
    from edgemed.dicom import read_scan
    from edgemed.dicom.series import find_series, is_source, open_source
    from edgemed.dicom.volume_file import is_volume_file, open_volume

    if is_volume_file(path):
        with open_volume(path) as volume:
            volume.read(0)
    elif is_source(path):
        with open_source(path) as source:
            find_series(source.paths)
    else:
        read_scan(path)


def main(paths: list[str]) -> int:
    """Print what reading each file ended in, and the peak memory of this process and of its children."""
    import resource

    from edgemed.errors import EdgemedError

    def cpu() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    found: dict[str, Any] = {}
    for path in paths:
        start, clock = cpu(), time.perf_counter()
        try:
            read(path)
            code, text = 0, ""
        except EdgemedError as error:
            code, text = error.exit_code, str(error)
        found[path] = {"code": code, "text": text, "cpu_s": cpu() - start, "wall_s": time.perf_counter() - clock}
    # ru_maxrss of this process would include the peak of the one it was started from; VmHWM starts anew with exec.
    with open("/proc/self/status") as status:
        own = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(json.dumps({"found": found, "peak_mib": max(own, children)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
