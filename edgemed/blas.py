"""NumPy's linear algebra: its threads go to sleep when they have nothing to do.

NumPy's wheels bring OpenBLAS, whose threads look for work without a pause, for 100 ms and more after the last product.
On two cores that took half the processor from onnxruntime: the second question about an image took 155 ms, 58 with the
threads asleep (2026-11-22, nano, two cores).

`edgemed/__init__.py` calls `let_threads_sleep`, before NumPy is loaded where edgemed is what is run. Where a program
has imported NumPy before edgemed it comes too late, and the program sets the variable itself.
"""

from __future__ import annotations

import os

VARIABLE = "OPENBLAS_THREAD_TIMEOUT"
CYCLES = 16
"""A thread waits actively for 2 to the power of this many cycles, some 20 us: products one after the other find it
awake. OpenBLAS takes 4 to 30; 26 unless told. 4, 10 and 16 took the same time here."""


def let_threads_sleep() -> None:
    """Set `VARIABLE` for this process and its children, unless the environment says something else."""
    os.environ.setdefault(VARIABLE, str(CYCLES))
