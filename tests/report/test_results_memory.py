"""A slice more takes little more memory, whatever is written: none of its pixels stay."""

from __future__ import annotations

import importlib.util
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread, dcmwrite

from edgemed.core import Scan, Window
from edgemed.report.packed import packed
from edgemed.report.results import Analysed, write_results

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "result_inputs.py"
_spec = importlib.util.spec_from_file_location("result_inputs", HELPER)
inputs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(inputs)

SIDE = 512
FEW, MANY = 6, 26


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """Headers of slices of 512 x 512, and five masks on each; pixels are not in the files."""
    labels = ("liver", "spleen", "left kidney", "right kidney", "stomach")
    masks = [inputs.ellipse(SIDE, SIDE, 0.1 + 0.2 * k, 0.5, 0.09, 0.09) for k in range(5)]
    found = []
    for path in inputs.write_series(tmp_path_factory.mktemp("series"), MANY):
        ds = dcmread(path)
        ds.Rows = ds.Columns = SIDE
        del ds.PixelData
        dcmwrite(path, ds)
        regions = [inputs.masked(label, mask) for label, mask in zip(labels, masks, strict=True)]
        found.append(Analysed(path, 0, packed(inputs.answer("x", regions))))
    return found


def read(file, frame):
    return Scan(np.zeros((1, SIDE, SIDE), np.float32), "CT", Window(40, 400), (0.8, 0.5))


# KiB; masks of a slice are 1,280 as bytes, 160 as bits. Measured: 22 and 15.
@pytest.mark.parametrize(("kind", "limit"), [("seg", 40), ("nifti", 25), ("json", 25), ("sr", 45), ("gsps", 60)])
@pytest.mark.parametrize("changes", [{}, {"labelmap": True, "nrrd": True}, {"seg_full_frames": True}], ids=str)
def test_a_slice_more_takes_little_more(analysed, tmp_path, kind, limit, changes) -> None:
    def peak(count):
        tracemalloc.start()
        write_results(analysed[:count], tmp_path, (kind,), language="en", options=inputs.options(read=read, **changes))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)  # what is loaded once
    assert (peak(MANY) - peak(FEW)) / (MANY - FEW) / 1024 < limit
