"""VOI windows: presets, what a user types, and what a DICOM header holds, as one `Window`.

Order, first that exists: the user's window; the header's first window (the frame's own functional group before the
shared one before the top level); the header's first VOI LUT; the modality's default.

    function in the header   becomes
    LINEAR (or none)         Window(center, width, exact=False): PS3.3 C.11.2.1.2.1, with its half-value shifts
    LINEAR_EXACT             Window(center, width): PS3.3 C.11.2.1.3.2
    SIGMOID                  Window(center, width): the straight line with the sigmoid's slope at its center
    (C.11.2.1.3.1) VOI LUT                  Window over the inputs between which the table rises from 1 % to 99 % of its
    range

Pure NumPy; header access is duck-typed so that nothing imports pydicom.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.core import Window
from edgemed.errors import EdgemedError

PRESETS: dict[str, tuple[float, float]] = {
    "abdomen": (40, 400),
    "angio": (300, 600),
    "bone": (400, 1800),
    "brain": (40, 80),
    "liver": (80, 150),
    "lung": (-600, 1500),
    "mediastinum": (40, 350),
    "pelvis": (40, 400),
    "soft-tissue": (40, 400),
    "spine": (50, 250),
    "stroke": (32, 8),
    "subdural": (75, 215),
    "temporal-bone": (600, 2800),
}
"""(center, width) in HU; common reading-room values."""

_SAME = {
    "soft": "soft-tissue",
    "softtissue": "soft-tissue",
    "lungs": "lung",
    "bones": "bone",
    "mediastinal": "mediastinum",
}


def parse_window(text: str) -> Window:
    """Return the window a user asked for: a preset's name or "center,width".

    Both mean LINEAR as in a DICOM header, so `--window 40,400` shows what a header with 40 and 400 shows.
    Raises EdgemedError (usage) for anything else.

    >>> parse_window("Soft Tissue") == parse_window("40,400")
    True
    """
    name = "-".join(text.lower().replace("_", " ").replace("-", " ").split())
    name = _SAME.get(name, name)
    if name in PRESETS:
        return linear(*PRESETS[name])
    try:
        center, width = (float(part) for part in text.split(","))
        if math.isfinite(center) and math.isfinite(width) and width > 0:
            return linear(center, width)
    except ValueError:
        pass
    raise EdgemedError(
        f"window {text[:40]!r} is neither a preset nor CENTER,WIDTH with a width above 0; presets: {', '.join(PRESETS)}"
    )


def linear(center: float, width: float) -> Window:
    """Return the LINEAR window; below width 1, which LINEAR does not allow, the exact one."""
    return Window(center, width, exact=width < 1)


def header_window(datasets: list[Any]) -> Window | None:
    """Return the first usable window of `datasets` (most specific first), else the first VOI LUT's range, else None."""
    for ds in datasets:
        found = _window_of(ds)
        if found is not None:
            return found
    for ds in datasets:
        found = _lut_window_of(ds)
        if found is not None:
            return found
    return None


def _first(value: Any) -> Any:
    if value is None or isinstance(value, str | bytes):
        return value
    try:
        return value[0] if len(value) else None
    except TypeError:
        return value


def _number(value: Any) -> float | None:
    try:
        number = float(_first(value))
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _window_of(ds: Any) -> Window | None:
    center, width = _number(ds.get("WindowCenter")), _number(ds.get("WindowWidth"))
    if center is None or width is None or width <= 0:
        return None
    function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
    return linear(center, width) if function == "LINEAR" else Window(center, width)


def _lut_window_of(ds: Any) -> Window | None:
    lut = _first(ds.get("VOILUTSequence"))
    if lut is None:
        return None
    descriptor, data = lut.get("LUTDescriptor"), lut.get("LUTData")
    if not descriptor or data is None or len(descriptor) != 3:
        return None
    entries = int(descriptor[0]) or 65536
    first = int(descriptor[1])
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if len(data) >= 2 * entries else "u1")
    return lut_window(np.asarray(data, np.float64)[:entries], first)


def lut_window(table: npt.NDArray[np.float64], first: int) -> Window | None:
    """Return the window over the inputs where `table` (entry 0 is input `first`) crosses 1 % and 99 % of its range.

    None if the table is constant or has no entries. A falling table gives the same window; the inversion is not kept.

    >>> lut_window(np.array([0, 0, 0, 50, 100, 100.0]), -2)
    Window(center=1.0, width=2.0, exact=True)
    """
    if table.size < 2 or table.max() <= table.min():
        return None
    share = (table - table.min()) / (table.max() - table.min())
    if share[0] > share[-1]:
        share = 1 - share
    high = max(int(np.flatnonzero(share >= 0.99)[0]), 1)
    low = min(max(int(np.flatnonzero(share > 0.01)[0]) - 1, 0), high - 1)
    return Window(first + (low + high) / 2, float(high - low))


def default_window(values: npt.NDArray[np.float32], modality: str, padding: npt.NDArray[np.bool_] | None) -> Window:
    """Return the window for a scan without one: CT soft tissue, else percentiles 1 to 99 of what is not padding."""
    if modality == "CT":
        return linear(*PRESETS["soft-tissue"])
    kept = values if padding is None or padding.all() else values[~padding]
    # At most about a million samples: a percentile over 50 million values takes seconds and a second copy.
    kept = kept.ravel()[:: max(1, kept.size // 1_000_000)]
    low, high = (float(v) for v in np.percentile(kept, (1, 99)))
    if not high > low:
        low, high = float(kept.min()), float(kept.max())
    if not high > low:
        low, high = low - 0.5, low + 0.5
    # A float32 image of huge values cannot resolve a width below its own spacing.
    return Window((low + high) / 2, max(high - low, float(np.spacing(np.float32(abs(high))))))
