"""Time, memory and volumes of a series; and how memory grows with the slices, for each kind of result.

    python tests/bench/bench_series.py SERIES --labels LABELS.nii.gz > series.md
    python tests/bench/bench_series.py --slices 60 180 540 1000 --kinds seg sr

SERIES is asked with the embedded model, `edgemed infer` as a user calls it; its peak is that of the process and its
reader together (resident, sampled every 5 ms). Its liver and spleen stand beside those of LABELS, a label map of the
same grid in TotalSegmentator's numbers.

The growth is measured with a stand-in for the model, which finds five discs on slices of 512 x 512 that are made for
it: `edgemed infer --to KIND`, a process for each number of slices, its own peak (VmHWM) after a series of three has
loaded what is loaded once. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from bench_infer import resident_mib
from machine import processor

PROMPT = "Segment the liver and the spleen."
LABELS = {"liver": 5, "spleen": 1}
KINDS = ("json", "seg", "seg --labelmap", "seg --seg-full-frames", "sr", "gsps", "sc", "pdf", "nifti", "fhir", "png")
SIDE = 512
NAMES = ("liver", "spleen", "left kidney", "right kidney", "stomach")


# --- the real series --------------------------------------------------------------------------------------------------


def ask(series: str, folder: str, which: str) -> tuple[float, float, dict[str, Any]]:
    """Return (wall seconds, peak MiB of all processes, the summary) of one run."""
    command = ["infer", series, "--slices", which, "--prompt", PROMPT, "--to", "json,seg,sr", "-o", folder, "--json"]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, "-m", "edgemed", *command, "-q"], stdout=out)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, resident_mib(process.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        if process.returncode:
            sys.exit(f"edgemed {' '.join(command)} ended with {process.returncode}")
        out.seek(0)
        return seconds, peak, json.loads(out.read().splitlines()[-1])


def ask_series(series: str, labels: str | None) -> None:
    """Print what the series cost, and its volumes."""
    with tempfile.TemporaryDirectory(prefix="edgemed-bench-") as folder:
        first, _, _ = ask(series, f"{folder}/one", "middle")
        seconds, peak, told = ask(series, f"{folder}/all", "all")
    asked = len(told["asked"])
    print(f"`edgemed infer SERIES --slices all --prompt {PROMPT!r} --to json,seg,sr`, {asked} slices\n")
    print("| | |\n|---|--:|")
    print(f"| process start to the last file | {seconds:.1f} s |")
    print(f"| a slice, all of that | {seconds / asked:.2f} s |")
    print(f"| a slice more | {(seconds - first) / (asked - 1):.2f} s |")
    print(f"| peak memory, reader process included | {peak:.0f} MiB |")
    found = {s["label"]: s["volume_ml"] for s in told["structures"]}
    for name, true in (true_volumes(labels) if labels else {}).items():
        ml = found.get(name)
        told_ml = "not found" if ml is None else f"{ml:.1f} ml, labels {true:.1f} ml ({ml / true - 1:+.1%})"
        print(f"| {name} | {told_ml} |")
    print(flush=True)


def true_volumes(labels: str) -> dict[str, float]:
    """Return the volumes in ml of a label map."""
    import nibabel

    image = nibabel.load(labels)
    voxels = np.asarray(image.dataobj)
    voxel_ml = abs(float(np.linalg.det(image.affine))) / 1000
    return {name: int((voxels == value).sum()) * voxel_ml for name, value in LABELS.items()}


# --- growth -----------------------------------------------------------------------------------------------------------


def write_slices(folder: Path, count: int) -> None:
    """Write a CT series of empty slices."""
    from pydicom import dcmwrite
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    for index in range(count):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", f"1.2.3.4.{index + 1}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.5", "1.2.3.6"
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Doe^Jane", "42", "19700101", "F"
        ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.StudyID = "20260101", "120000", "A1", "S1"
        ds.Modality, ds.InstanceNumber = "CT", index + 1
        ds.Rows = ds.Columns = SIDE
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = 1, -1024, 40, 400
        ds.PixelSpacing, ds.SliceThickness = [0.8, 0.8], 1
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-200, -200, index]
        ds.PixelData = np.full((SIDE, SIDE), 1000 + index % 7, "<u2").tobytes()
        dcmwrite(folder / f"{index:05d}.dcm", ds, enforce_file_format=True)


class StandIn:
    """Finds five discs on every slice."""

    def __init__(self) -> None:
        from edgemed.core import Region

        self.bundle = SimpleNamespace(digest="0" * 64)
        down, across = np.mgrid[:SIDE, :SIDE]
        self.regions = []
        for index, name in enumerate(NAMES):
            x, y, radius = SIDE * (0.15 + 0.17 * index), SIDE * (0.3 + 0.1 * index), SIDE * 0.09
            mask = (across - x) ** 2 + (down - y) ** 2 < radius**2
            box = (x - radius, y - radius, x + radius, y + radius)
            self.regions.append(Region(name, box, 0, mask, 0.9, 0.9))

    def ask(self, scans: Sequence[Any], prompt: Any, options: Any) -> Any:
        from edgemed.core import Answer, Provenance

        used = Provenance("0", "stand-in", "stand-in", "0" * 64, "none", "CPU", {}, "auto", {}, {})
        text = "The liver, the spleen, both kidneys and the stomach are visible."
        return Answer(text, text, tuple(self.regions), used)

    def notice(self, language: str) -> str:
        return "not for diagnosis"


def linked(files: Path, count: int) -> tempfile.TemporaryDirectory[str]:
    """Return a folder with the first `count` of the files."""
    folder = tempfile.TemporaryDirectory(prefix="series-", dir=files.parent)
    for file in sorted(files.iterdir())[:count]:
        os.link(file, Path(folder.name) / file.name)
    return folder


def grow(kind: str, files: Path, count: int) -> None:
    """Print [MiB beyond what three slices leave, seconds] of one run, as JSON: what the process of a point does."""
    import edgemed.infer
    from edgemed.cli import main as edgemed_main

    stand_in = StandIn()
    edgemed.infer.open_session = lambda *_, **__: stand_in  # type: ignore[assignment]

    def status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))

    def run(slices: int) -> None:
        with linked(files, slices) as series, tempfile.TemporaryDirectory(dir=files.parent) as out:
            given = ["infer", series, "--slices", "all", "--prompt", PROMPT, "--to", *kind.split(), "-o", out, "-q"]
            with contextlib.redirect_stdout(io.StringIO()):
                code = edgemed_main(given)
            if code:
                sys.exit(f"edgemed {' '.join(given)} ended with {code}")

    run(3)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = status("VmRSS"), time.perf_counter()
    run(count)
    print(json.dumps([status("VmHWM") - before, time.perf_counter() - started]))


def print_growth(kinds: Sequence[str], counts: Sequence[int]) -> None:
    """Print the table of memory over slices."""
    print(f"Peak memory beyond that of three slices, five masks of {SIDE} x {SIDE} each, stand-in model\n")
    print("| `--to` | " + " | ".join(f"{c} slices, MiB" for c in counts) + " | KiB a slice more | ms a slice more |")
    print("|---|" + "--:|" * (len(counts) + 2))
    with tempfile.TemporaryDirectory(prefix="edgemed-bench-") as folder:
        files = Path(folder) / "files"
        files.mkdir()
        write_slices(files, max(counts))
        for kind in kinds:
            points = []
            for count in counts:
                command = [sys.executable, __file__, "--grow", kind, str(files), str(count)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                points.append(json.loads(done.stdout))
            more = counts[-1] - counts[0]
            each = [(points[-1][i] - points[0][i]) / more for i in (0, 1)]
            mib = " | ".join(f"{p[0]:.0f}" for p in points)
            print(f"| {kind} | {mib} | {each[0] * 1024:.0f} | {each[1] * 1000:.0f} |", flush=True)


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", nargs="?", metavar="SERIES")
    parser.add_argument("--labels", metavar="FILE")
    parser.add_argument("--slices", type=int, nargs="*", default=[60, 180, 540], metavar="N", help="none: no growth")
    parser.add_argument("--kinds", nargs="+", default=KINDS, metavar="KIND")
    parser.add_argument("--grow", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grow:
        kind, files, count = options.grow
        grow(kind, Path(files), int(count))
        return
    cores = os.cpu_count()
    print(
        f"{datetime.date.today()}, {processor()}, {cores} cores, a thread each, load {os.getloadavg()[0]:.1f}, ", end=""
    )
    print(f"Python {platform.python_version()}\n")
    if options.series:
        ask_series(options.series, options.labels)
    if options.slices:
        print_growth(options.kinds, sorted(options.slices))


if __name__ == "__main__":
    main()
