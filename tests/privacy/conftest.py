"""A scan full of things that name a patient, and a way to run edgemed that notes everything it puts anywhere.

Planted are: every element of PS3.6 whose value is text or a date and that edgemed does not need to read the pixels,
private elements, bytes of the pixels, letters drawn into them, and the file's name. A run is a process of its own; each
Python process that it starts notes the names of all files that it makes or moves, and all that it executes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pydicom import config as pydicom_config
from pydicom import dcmread, dcmwrite
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_dict
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian

MARK = "ZQ7PLANT"
BIRTH = "19330207"
TIME = "031415.926535"
HAN = "\u6b27\u9633\u5f20\u4e09"  # a Chinese name
FILE_MARK = "Quentin-Zappelphilipp"
PIXEL_MARK = "ZQ7PIXELS"
STUDY, SERIES, INSTANCE = (f"1.2.826.0.1.3680043.8.498.7319.{n}" for n in (1, 2, 3))
HEADER_MARKS = (MARK, BIRTH, "1933-02-07", TIME, "031415", HAN, PIXEL_MARK)
UIDS = (STUDY, SERIES, INSTANCE)

VALUES = {
    "AE": f"{MARK}AE", "AS": "093Y", "CS": f"{MARK}CS", "DA": BIRTH, "DT": BIRTH + TIME, "LO": f"{MARK} LO",
    "LT": f"{MARK} LT {HAN}", "PN": f"{MARK}^{HAN}={HAN}={HAN}", "SH": f"{MARK}SH", "ST": f"{MARK} ST {HAN}",
    "TM": TIME, "UC": f"{MARK} UC", "UR": f"http://{MARK}.example/", "UT": f"{MARK} UT {HAN}",
}  # fmt: skip
"""VR -> what is planted in elements of it. 093Y is an age that anything may hold, so it is not looked for."""

NEEDED = frozenset((
    "Modality", "PhotometricInterpretation", "ImageType", "SpecificCharacterSet", "VOILUTFunction",
    "PresentationLUTShape",
    "RescaleType", "RescaleSlope", "TransferSyntaxUID", "PatientPosition", "LossyImageCompression", "PixelPresentation",
    "VolumetricProperties", "BodyPartExamined", "ModalityLUTType", "LUTExplanation", "ComplexImageComponent",
))  # fmt: skip
"""Keywords that decide how a scan is read; the tests of failures plant there, too."""


def planted(sample: Path, target: Path) -> Path:
    """Write the sample scan with something planted wherever there is room."""
    ds = dcmread(sample)
    before = pydicom_config.settings.writing_validation_mode
    pydicom_config.settings.writing_validation_mode = pydicom_config.IGNORE
    try:
        ds.decompress()
        for keyword, tag in keyword_dict.items():
            group = tag >> 16
            if not 8 <= group <= 0x4010 or keyword in NEEDED or not dictionary_has_tag(tag):
                continue
            if (vr := dictionary_VR(tag)) in VALUES:
                ds.add_new(tag, vr, VALUES[vr])
        inner = Dataset()
        inner.PatientName, inner.TextValue, inner.Date = VALUES["PN"], VALUES["UT"], BIRTH
        ds.ReferencedPatientSequence = Sequence([inner])
        block = ds.private_block(0x0011, f"{MARK} CREATOR", create=True)
        block.add_new(1, "LO", VALUES["LO"])
        block.add_new(2, "UN", f"{MARK} UN".encode())
        block.add_new(3, "OB", f"{MARK} OB ".encode())
        ds.SpecificCharacterSet, ds.SOPClassUID = "ISO_IR 192", ds.file_meta.MediaStorageSOPClassUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = UIDS
        ds.file_meta.MediaStorageSOPInstanceUID = UID(INSTANCE)
        ds.PixelData = _drawn(ds)
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dcmwrite(target, ds, implicit_vr=False, little_endian=True)
    finally:
        pydicom_config.settings.writing_validation_mode = before
    return target


def _drawn(ds: Dataset) -> bytes:
    """Return the pixels with the mark drawn into them, and as bytes in their last rows."""
    pixels = np.frombuffer(ds.PixelData, np.dtype(f"<i{ds.BitsAllocated // 8}")).reshape(ds.Rows, ds.Columns).copy()
    layer = Image.new("L", (ds.Columns, ds.Rows))
    ImageDraw.Draw(layer).text((10, 10), f"{MARK} {BIRTH}", fill=255)
    pixels[np.asarray(layer) > 128] = pixels.max()
    text = (PIXEL_MARK * 200).encode()[: pixels[-2:].nbytes // 2 * 2]
    flat = np.frombuffer(text, pixels.dtype)
    pixels[-2:].reshape(-1)[: len(flat)] = flat
    return pixels.tobytes()


@pytest.fixture(scope="session")
def plant() -> Any:
    """This module, for the tests."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def whole(sample_scan: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted scan."""
    return planted(Path(sample_scan), tmp_path_factory.mktemp("planted") / "a.dcm")


@pytest.fixture(scope="session")
def small(whole: Path) -> Path:
    """The planted scan, 16 x 16 pixels of it."""
    ds = dcmread(whole)
    ds.Rows = ds.Columns = 16
    ds.PixelData = ds.PixelData[:512]
    dcmwrite(whole.with_name("small.dcm"), ds)
    return whole.with_name("small.dcm")


@pytest.fixture
def scan(whole: Path, tmp_path: Path) -> Path:
    """The planted scan under a file name that is one of a patient."""
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / f"{FILE_MARK}.dcm"
    file.write_bytes(whole.read_bytes())
    return file


# --- what a run leaves behind -----------------------------------------------------------------------------------------

HOOK = """
import json, os, sys
_NAMES = {"open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate",
          "tempfile.mkstemp", "tempfile.mkdtemp", "shutil.copyfile", "shutil.move", "subprocess.Popen", "os.exec",
          "socket.connect", "socket.bind", "syslog.syslog", "os.putenv"}
_log = os.open(os.environ["NOTED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
def _note(event, args):
    if event in _NAMES:
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        os.write(_log, (json.dumps([event, repr(args)]) + "\\n").encode())
sys.addaudithook(_note)
"""


@dataclass(frozen=True)
class Run:
    """What a run wrote and did. names: files made or moved, commands executed. places: file -> content, of each file
    that it left behind."""

    code: int
    out: str
    err: str
    names: str
    places: dict[str, bytes]

    def all_but_stdout(self) -> str:
        return "\n".join([self.err, self.names, *self.places, *(d.decode("latin-1") for d in self.places.values())])


RunEdgemed = Callable[..., Run]


@pytest.fixture
def run(tmp_path: Path) -> RunEdgemed:
    """`run("infer", scan, ...)`: edgemed in a process of its own, with an audit trail, watched."""

    def watched(*arguments: object, **more: str) -> Run:
        process, noted = start(*arguments, **more)
        out, err = process.communicate(timeout=120)
        return left(process.returncode, out, err, noted)

    def start(*arguments: object, **more: str) -> tuple[subprocess.Popen[str], Path]:
        hooks = tmp_path / "hooks"
        hooks.mkdir(exist_ok=True)
        (hooks / "sitecustomize.py").write_text(HOOK)
        temporary = tmp_path / "tmp"
        temporary.mkdir(exist_ok=True)
        noted = tmp_path / "noted"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("EDGEMED_", "PYTHON"))},
            "PYTHONPATH": str(hooks), "NOTED": str(noted), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1",
            "EDGEMED_HOME": str(tmp_path / "home"), "EDGEMED_AUDIT_FOLDER": str(tmp_path / "audit"), **more,
        }  # fmt: skip
        code = "import sys; from edgemed.cli import main; from edgemed import audit; sys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment, cwd=tmp_path,
        )  # fmt: skip
        return process, noted

    def left(code: int, out: str, err: str, noted: Path) -> Run:
        names = [json.loads(line) for line in noted.read_text().splitlines()]
        told = "\n".join(f"{event} {args}" for event, args in names if "sitecustomize" not in args)
        places = {
            str(file.relative_to(tmp_path)): file.read_bytes()
            for folder in ("tmp", "audit", "home")
            for file in (tmp_path / folder).rglob("*")
            if file.is_file()
        }
        return Run(code, out, err, told, places)

    watched.start, watched.left = start, left  # type: ignore[attr-defined]
    return watched


def found(text: str, marks: tuple[str, ...]) -> list[str]:
    """Return the marks that are in a text, as they are, in UTF-16, in base 64 or as escapes, with what is around.

    Not in UIDs that are made of random numbers (PS3.5 B.2): 39 digits have any six of them once in 30,000 times.
    """
    import base64

    text = re.sub(r"\b2\.25\.\d{30,39}\b", "2.25.N", text)
    hits = []
    for mark in marks:
        forms = {mark, json.dumps(mark)[1:-1], mark.encode().decode("latin-1"), repr(mark.encode())[2:-1]}
        forms |= {mark.encode("utf-16-le").decode("latin-1")}
        forms |= {base64.b64encode(b" " * n + mark.encode()).decode()[4 * bool(n) : -4] for n in range(3)}
        for form in forms:
            hits += [text[max(m.start() - 60, 0) : m.end() + 60] for m in re.finditer(re.escape(form), text)]
    return hits
