"""The child process: serving, failing, recovering, and keeping to itself."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgemed.core import Scan
from edgemed.dicom import Limits, Reader, read_scan, read_scans
from edgemed.errors import EdgemedError, InvalidInput, NoInput, ResourceLimit

Write = Callable[..., Path]
IMAGE = np.arange(64, dtype=np.uint16).reshape(8, 8)


def test_files_are_answered_in_order_whatever_happens_between(write_dicom: Write, tmp_path: Path) -> None:
    good = write_dicom(IMAGE, name="good.dcm")
    huge = write_dicom(IMAGE, name="huge.dcm", Rows=60_000, Columns=60_000)
    empty = tmp_path / "empty.dcm"
    empty.touch()
    found = list(read_scans([good, huge, empty, str(good)]))
    assert [path for path, _ in found] == [str(good), str(huge), str(empty), str(good)]
    assert [type(result) for _, result in found] == [Scan, ResourceLimit, NoInput, Scan]


def test_child_that_was_killed_is_replaced(write_dicom: Write) -> None:
    path = write_dicom(IMAGE)
    with Reader() as reader:
        reader.read(path)
        first = reader._child
        assert first is not None
        first.kill()
        first.wait()
        np.testing.assert_array_equal(reader.read(path).pixels[0], IMAGE)
        assert reader._child is not first


def test_file_that_kills_the_child_does_not_touch_the_next(write_dicom: Write, tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="memory limits need a POSIX system")
    path = write_dicom(IMAGE, name="big.dcm", Rows=6000, Columns=6000)
    with open(path, "r+b") as file:
        data = file.read()
        at = data.rindex((128).to_bytes(4, "little"))
        file.seek(at)
        file.write((72_000_000).to_bytes(4, "little"))
        file.truncate(at + 4 + 72_000_000)
    with Reader(Limits(memory_bytes=40 << 20)) as reader:
        with pytest.raises(ResourceLimit):
            reader.read(path)
        np.testing.assert_array_equal(reader.read(write_dicom(IMAGE)).pixels[0], IMAGE)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals that tell why a process ended")
@pytest.mark.parametrize(
    ("name", "kind"), [("SIGABRT", InvalidInput), ("SIGSEGV", InvalidInput), ("SIGKILL", ResourceLimit)]
)
def test_how_the_child_ended_names_the_error(name: str, kind: type[EdgemedError]) -> None:
    child = subprocess.Popen([sys.executable, "-c", f"import os, signal; os.kill(os.getpid(), signal.{name})"])
    assert type(Reader()._ended(child, expired=False)) is kind


def test_panic_of_the_rle_decoder_does_not_end_the_child(reader: Reader, write_dicom: Write) -> None:
    # The segments unpack to more bytes than the frame has: pylibjpeg-rle panics, which is no Exception; pydicom's own
    # decoder, next in order, drops the excess.
    frame = struct.pack("<16I", 2, 64, 80, *[0] * 13) + b"\x81\0" * 8 + b"\x81\1" * 8
    scan = reader.read(write_dicom(IMAGE, syntax="1.2.840.10008.1.2.5", encoded=[frame]))
    np.testing.assert_array_equal(scan.pixels[0], np.ones((8, 8)))


def test_closing_ends_the_child_and_may_be_repeated(write_dicom: Write) -> None:
    reader = Reader()
    reader.close()
    reader.start()
    child = reader._child
    assert child is not None
    reader.close()
    reader.close()
    assert child.returncode is not None


def test_modules_beside_the_scan_are_never_imported(
    write_dicom: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # python-gdcm does a bare `import dl`; a folder of that name beside the scan must not break or run anything.
    for name in ("dl", "pydicom", "json", "edgemed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(99)\n")
    write_dicom(IMAGE)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(read_scan("phantom.dcm").pixels[0], IMAGE)


def test_odd_names_are_read(reader: Reader, write_dicom: Write) -> None:
    for name in ("with space.dcm", "肝.dcm", "new\nline.dcm"):
        assert reader.read(write_dicom(IMAGE, name=name)).rows == 8


def test_pixels_are_read_only(reader: Reader, write_dicom: Write) -> None:
    with pytest.raises(ValueError, match="read-only"):
        reader.read(write_dicom(IMAGE)).pixels[0, 0, 0] = 1
