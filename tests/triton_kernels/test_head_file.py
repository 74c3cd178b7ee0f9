"""The LM head beside the cubins: written, read back, and refused where it is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgemed.errors import BundleError, InvalidInput
from edgemed.triton_kernels.head_file import FORMATS, check_head, is_head, read_head, write_head
from edgemed.triton_kernels.weights import pack

ROWS = np.random.default_rng(3).normal(0, 1, (40, 32)).astype(np.float32)


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_written_is_read(form: str, tmp_path: Path) -> None:
    head = pack(ROWS, form)
    write_head(tmp_path, head)
    found = read_head(tmp_path)
    assert found is not None
    assert (found.format, found.width, found.rows) == (form, 32, 40)
    np.testing.assert_array_equal(found.to_float32(), head.to_float32())
    assert isinstance(found.values, np.memmap)
    assert all(is_head(f"kernels/{path.name}") for path in tmp_path.iterdir())


def test_a_folder_without_a_head_has_none(tmp_path: Path) -> None:
    (tmp_path / "box_head.int8.cubin").write_bytes(b"x")
    assert read_head(tmp_path) is None
    assert not is_head("kernels/sm_80/box_head.int8.cubin")


@pytest.mark.parametrize("damage", ["no scales", "cut", "objects", "other type", "other length"])
def test_a_damaged_head_is_refused(damage: str, tmp_path: Path) -> None:
    write_head(tmp_path, pack(ROWS, "int8"))
    values, scales = tmp_path / "head.int8.values.npy", tmp_path / "head.int8.scales.npy"
    if damage == "no scales":
        scales.unlink()
    elif damage == "cut":
        values.write_bytes(values.read_bytes()[:-1])
    elif damage == "objects":
        np.save(values, np.array([{}], object), allow_pickle=True)
    elif damage == "other type":
        np.save(values, ROWS)
    else:
        np.save(scales, np.ones(39, np.float32))
    with pytest.raises(BundleError, match=r"head\.int8\.values\.npy .*Run edgemed compile again"):
        read_head(tmp_path)


def test_kernels_read_rows_of_sixteens_in_three_formats() -> None:
    with pytest.raises(InvalidInput, match="multiples of 16"):
        check_head(pack(ROWS[:, :24], "fp16"))
    with pytest.raises(InvalidInput, match="the head is fp32"):
        check_head(pack(ROWS, "fp32"))
