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
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, BinaryIO

from edgemed.core import Scan, Window
from edgemed.dicom.limits import Limits
from edgemed.dicom.read import read_here
from edgemed.errors import CannotRead, EdgemedError, InvalidInput, ResourceLimit


def main() -> int:
    """Serve requests until stdin ends; return 0."""
    return serve_requests(_serve, "reading it needs more than {mib} MiB")


TOO_LARGE = "its header is too large or nested too deeply"
"""What is said where memory did not suffice for a header."""
Reply = Callable[[BinaryIO], None]
"""Writes what a request asked for."""


def serve_requests(serve: Callable[[dict[str, Any], Limits], Reply], too_large: str) -> int:
    """Answer each request with what `serve` makes of it, or with its error, within the limits; return 0.

    too_large: what is said where the memory did not suffice; {mib} in it is how much there was.
    """
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
        _answered(partial(serve, request, limits), too_large.format(mib=limits.memory_bytes >> 20))(replies)
        replies.flush()
    return 0


def _answered(serve: Callable[[], Reply], too_large: str) -> Reply:
    """Return the reply of a request, or the one that tells its error."""
    try:
        return serve()
    except EdgemedError as error:
        return partial(_fail, error)
    except (MemoryError, RecursionError):
        return partial(_fail, ResourceLimit(too_large))
    except OSError as error:
        # The system's errors have a number; pydicom raises OSError without one for damaged sequences.
        kind = CannotRead if error.errno else InvalidInput
        return partial(_fail, kind(f"it cannot be read: {error.strerror or 'the file is damaged'}"))
    except Exception as error:  # noqa: BLE001  the last resort of a parser of hostile files: its class, never its text
        return partial(_fail, InvalidInput(f"the file is damaged ({type(error).__name__})"))


def json_reply(values: Mapping[str, Any]) -> Reply:
    """Return the reply that is one JSON line. Raises ValueError for what is no JSON (infinity, NaN)."""
    line = json.dumps(values, allow_nan=False).encode() + b"\n"

    def write(replies: BinaryIO) -> None:
        replies.write(line)

    return write


def _serve(request: dict[str, Any], limits: Limits) -> Reply:
    window = Window(**request["window"]) if request["window"] else None
    return partial(_send, read_here(request["path"], request["frame"], window, limits, request["skip"]))


def _fail(error: EdgemedError, replies: BinaryIO) -> None:
    replies.write(json.dumps({"error": type(error).__name__, "message": str(error)}).encode() + b"\n")


def _send(scan: Scan, replies: BinaryIO) -> None:
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
        "warnings": scan.warnings,
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
