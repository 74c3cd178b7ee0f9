"""NumPy's threads do nothing where there is nothing to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from edgemed import blas

MEASURE = """
import time
{first}
import numpy as np
a = np.ones((512, 512))
a @ a
start, own = time.process_time(), time.thread_time()
while time.thread_time() < own + 0.2:
    pass
print(time.process_time() - start - (time.thread_time() - own))
"""


def others(first: str, **environment: str) -> float:
    """Return the seconds that other threads worked in the 0.2 s of the main thread's work after a product."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("OPENBLAS_", "OMP_"))}
    bare |= {"OPENBLAS_NUM_THREADS": "2", **environment}
    told = MEASURE.format(first=first)
    return float(subprocess.run([sys.executable, "-c", told], env=bare, capture_output=True, check=True).stdout)


def test_threads_sleep_once_a_product_is_done() -> None:
    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    if "openblas" not in built or others("") < 0.05:
        pytest.skip(f"the threads of this NumPy ({built}) do not wait actively")
    assert others("import edgemed") < 0.02


def test_what_the_environment_says_stays() -> None:
    told = f"import json, os, edgemed; print(json.dumps(os.environ[{blas.VARIABLE!r}]))"
    done = subprocess.run([sys.executable, "-c", told], env={**os.environ, blas.VARIABLE: "20"}, stdout=subprocess.PIPE)
    assert json.loads(done.stdout) == "20"
