"""The child process that decodes: `python -P -m edgemed.dicom.worker`, started by `reader`.

Requests come as JSON lines on stdin; each reply is one JSON line, then the raw pixel bytes it announces. Nothing is
pickled. Before the first request the child limits its own memory and, per request, its CPU time; Python and C libraries
that print are pointed at the null device. Where the platform has no `resource` module (Windows) the parent's clock and
the header budgets hold.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from edgemed.core import Scan, Window
from edgemed.dicom.limits import Limits
from edgemed.dicom.read import read_here
from edgemed.errors import CannotRead, EdgemedError, InvalidInput, ResourceLimit


def main() -> int:
    """Serve requests until stdin ends; return 0."""
    return serve_requests(_serve)


def serve_requests(serve: Callable[[dict[str, Any], Limits, BinaryIO], None]) -> int:
    """Call `serve` with each request, the limits, and where its reply goes, within the limits; return 0."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    limits = Limits(**json.loads(requests.readline()))
    _quiet()
    _limit_memory(limits.memory_bytes)
    for line in requests:
        request = json.loads(line)
        _limit_cpu(limits.cpu_seconds)
        serve(request, limits, replies)
        replies.flush()
    return 0


def _serve(request: dict[str, Any], limits: Limits, replies: BinaryIO) -> None:
    window = Window(**request["window"]) if request["window"] else None
    try:
        scan = read_here(request["path"], request["frame"], window, limits)
    except EdgemedError as error:
        _fail(replies, error)
    except (MemoryError, RecursionError):
        _fail(replies, ResourceLimit(f"reading it needs more than {limits.memory_bytes >> 20} MiB"))
    except OSError as error:
        # The system's errors have a number; pydicom raises OSError without one for damaged sequences.
        kind = CannotRead if error.errno else InvalidInput
        _fail(replies, kind(f"it cannot be read: {error.strerror or 'the file is damaged'}"))
    except Exception as error:  # noqa: BLE001  the last resort of a parser of hostile files: its class, never its text
        _fail(replies, InvalidInput(f"the file is damaged ({type(error).__name__})"))
    else:
        _send(replies, scan)


def _fail(replies: BinaryIO, error: EdgemedError) -> None:
    replies.write(json.dumps({"error": type(error).__name__, "message": str(error)}).encode() + b"\n")


def _send(replies: BinaryIO, scan: Scan) -> None:
    window = scan.window
    facts = {
        "dtype": str(scan.pixels.dtype),
        "shape": list(scan.pixels.shape),
        "modality": scan.modality,
        "window": {"center": window.center, "width": window.width, "exact": window.exact} if window else None,
        "pixel_spacing_mm": scan.pixel_spacing_mm,
        "sop_instance_uid": scan.sop_instance_uid,
        "series_instance_uid": scan.series_instance_uid,
        "study_instance_uid": scan.study_instance_uid,
        "frame_of_reference_uid": scan.frame_of_reference_uid,
        "first_frame": scan.first_frame,
        "total_frames": scan.total_frames,
    }
    replies.write(json.dumps(facts).encode() + b"\n")
    replies.write(scan.pixels.data if scan.pixels.flags.c_contiguous else scan.pixels.tobytes())


def _quiet() -> None:
    """Silence warnings: truncation is found by comparing declared with present bytes, the rest is not for the user."""
    import warnings

    warnings.simplefilter("ignore")


def _limit_memory(more: int) -> None:
    """Allow this process `more` bytes of address space on top of what it has mapped so far, and no core dumps."""
    try:
        import resource
    except ImportError:
        return
    import numpy.random  # noqa: F401  (mapped now, not charged to the first file)
    import pydicom.pixels  # noqa: F401

    try:
        with open("/proc/self/statm", "rb") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        mapped = 2 << 30
    _set(resource, resource.RLIMIT_CORE, 0)
    _set(resource, resource.RLIMIT_AS, mapped + more)


def _limit_cpu(seconds: int) -> None:
    """Allow this process `seconds` more of CPU time; past that the system ends it."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _set(resource, resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)


def _set(resource: Any, which: int, value: int) -> None:
    """Lower the soft limit (the hard one too where it is not needed again); a stricter limit of the system stays."""
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, hard))


if __name__ == "__main__":
    sys.exit(main())
