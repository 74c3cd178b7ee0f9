"""The LM head beside the cubins of a bundle: two NumPy files, `kernels/head.FORMAT.values.npy` and `.scales.npy`.

Values are mapped from the file, not read. Does not cover what a format means (`weights`), or where a head comes from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgemed.errors import BundleError, InvalidInput
from edgemed.triton_kernels.variants import ALIGNMENT
from edgemed.triton_kernels.weights import Matrix

KERNELS = "kernels"
"""The folder of a bundle with cubins and the head."""

FORMATS = ("fp16", "int8", "fp8")
"""Formats of the head that both kernels read it in."""


def check_head(head: Matrix) -> None:
    """Raise InvalidInput where the kernels do not read a matrix."""
    if head.format not in FORMATS:
        raise InvalidInput(f"the head is {head.format}; one of {', '.join(FORMATS)} was expected")
    if head.width % ALIGNMENT:
        raise InvalidInput(f"the head has rows of {head.width} values; kernels read multiples of {ALIGNMENT}")


def is_head(name: str) -> bool:
    """Return whether a file of a bundle, by its name in the manifest, is of the head."""
    return name.startswith(f"{KERNELS}/head.")


def write_head(folder: Path, head: Matrix) -> None:
    """Write `head` into the folder: `head.FORMAT.values.npy` and `head.FORMAT.scales.npy`."""
    np.save(folder / f"head.{head.format}.values.npy", head.values, allow_pickle=False)
    np.save(folder / f"head.{head.format}.scales.npy", head.scales, allow_pickle=False)


def read_head(folder: Path) -> Matrix | None:
    """Return the head in a folder, its values mapped from the file; None where there is none.

    Raises BundleError where a file cannot be read or the two do not fit.
    """
    names = sorted(path.name for path in folder.glob("head.*.values.npy"))
    if not names:
        return None
    form = names[0].split(".")[1]
    try:
        values = np.load(folder / names[0], mmap_mode="r", allow_pickle=False)
        scales = np.load(folder / f"head.{form}.scales.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BundleError(f"{names[0]} of the bundle cannot be read. Run edgemed compile again") from error
    wanted = np.float16 if form == "fp16" else np.uint8
    count = 1 if form == "fp16" else len(values)
    if form not in FORMATS or values.ndim != 2 or values.dtype != wanted or scales.shape != (count,):
        raise BundleError(f"{names[0]} is no head that the kernels read. Run edgemed compile again")
    return Matrix(form, values.shape[1], values, scales.astype(np.float32, copy=False))
