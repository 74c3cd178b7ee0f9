"""Label volumes: values, table, places; NIfTI and NRRD agree, and SimpleITK reads what nibabel reads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from edgemed.report.results import Analysed, write_results

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "result_inputs.py"
_spec = importlib.util.spec_from_file_location("result_inputs", HELPER)
inputs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(inputs)

nibabel = pytest.importorskip("nibabel")
ROWS, COLUMNS = 16, 12
LIVER = inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.4, 0.4)
CYST = inputs.ellipse(ROWS, COLUMNS, 0.5, 0.5, 0.2, 0.2)


def write(paths, regions_of, folder, **changes):
    asked = inputs.options(**changes)
    analysed = [Analysed(path, 0, inputs.answer("x", regions_of(k))) for k, path in enumerate(paths)]
    return write_results(analysed, folder, ("nifti",), language="en", options=asked), asked.tell.__self__


def both(k):
    return [inputs.masked("liver", LIVER), inputs.masked("肝囊肿", CYST)]


def test_values_and_their_table(tmp_path) -> None:
    (volume, table), notes = write(inputs.write_series(tmp_path, 3), both, tmp_path)

    image = nibabel.load(volume)
    assert image.shape == (COLUMNS, ROWS, 3)
    np.testing.assert_array_equal(image.get_fdata()[..., 1].T, np.where(CYST, 2, LIVER))
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert [(row["value"], row["en"], row["zh"], row["type"]) for row in rows] == [
        (1, "liver", "肝脏", "10200004"), (2, "liver cyst", "肝囊肿", "367643001")
    ]  # fmt: skip
    assert json.loads(image.header.extensions[0].get_content())["labels"] == rows
    assert b"not for diagnosis" in bytes(image.header["descrip"])
    assert any("overlap" in note for note in notes)


def test_sform_and_qform_agree(tmp_path) -> None:
    (volume, _), _ = write(inputs.write_series(tmp_path, 3), both, tmp_path)

    image = nibabel.load(volume)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(image.get_sform(), image.get_qform(), atol=1e-5)
    np.testing.assert_allclose(image.affine @ (0, 0, 2, 1), (30.0, -12.5, 12.0, 1), atol=1e-5)


def test_a_tilted_gantry_has_the_sform_alone(tmp_path) -> None:
    (volume, _), _ = write(inputs.write_series(tmp_path, 3, step=(0, 0.5, 2.5)), both, tmp_path)

    image = nibabel.load(volume)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 0)
    np.testing.assert_allclose(image.affine[:3, 2], (0, -0.5, 2.5), atol=1e-5)


def test_simpleitk_finds_the_same_places(tmp_path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    turned = (0.8, 0.6, 0, 0, 0, -1)
    step = tuple(2.5 * np.cross(turned[:3], turned[3:]))
    paths = inputs.write_series(tmp_path, 3, orientation=turned, step=step)
    (volume, _), _ = write(paths, both, tmp_path)

    label, source = sitk.ReadImage(str(volume)), sitk.ReadImage([str(path) for path in paths])
    ours, theirs = sitk.LabelShapeStatisticsImageFilter(), sitk.LabelShapeStatisticsImageFilter()
    ours.Execute(label)
    mask = sitk.GetImageFromArray(np.stack([np.where(CYST, 2, LIVER)] * 3).astype(np.uint8))
    mask.CopyInformation(source)
    theirs.Execute(mask)

    for value in (1, 2):
        np.testing.assert_allclose(ours.GetCentroid(value), theirs.GetCentroid(value), atol=0.01)


def test_nrrd_has_the_same_voxels_and_slicer_s_segments(tmp_path) -> None:
    nrrd = pytest.importorskip("nrrd")
    paths = inputs.write_series(tmp_path, 3)
    (volume, _), _ = write(paths, both, tmp_path)
    (other, _), _ = write(paths, both, tmp_path, nrrd=True)

    data, header = nrrd.read(str(other))

    np.testing.assert_array_equal(data, nibabel.load(volume).get_fdata())
    affine = np.diag((-1.0, -1, 1, 1)) @ nibabel.load(volume).affine
    np.testing.assert_allclose(header["space directions"], affine[:3, :3].T, atol=1e-5)
    np.testing.assert_allclose(header["space origin"], affine[:3, 3], atol=1e-5)
    assert (header["Segment1_Name"], header["Segment1_LabelValue"]) == ("liver cyst", "2")


@pytest.mark.parametrize("elements", [{"ImagePositionPatient": None}, {"SliceThickness": "1"}])
def test_images_that_are_no_even_stack_are_one_file_each(tmp_path, elements) -> None:
    paths = inputs.write_series(tmp_path, 4, **elements)

    written, _ = write([paths[0], paths[1], paths[3]], both, tmp_path)

    assert [path.name for path in written] == [
        "slice0.labels-1.nii.gz", "slice0.labels-2.nii.gz", "slice0.labels-3.nii.gz", "slice0.labels.json"
    ]  # fmt: skip


def test_without_a_place_the_space_is_unknown(tmp_path) -> None:
    (volume, _), _ = write(inputs.write_series(tmp_path, 1, ImagePositionPatient=None), both, tmp_path)

    header = nibabel.load(volume).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (0, 0)
    np.testing.assert_allclose(header.get_zooms(), (0.5, 0.8, 2.5), atol=1e-6)


def test_nothing_found_is_a_volume_of_zeros(tmp_path) -> None:
    (volume, table), _ = write(inputs.write_series(tmp_path, 2), lambda k: [], tmp_path)

    assert not nibabel.load(volume).get_fdata().any()
    assert json.loads(table.read_text(encoding="utf-8")) == []


def test_a_repeated_run_writes_the_same_bytes(tmp_path) -> None:
    paths = inputs.write_series(tmp_path, 2)

    first = [path.read_bytes() for path in write(paths, both, tmp_path)[0]]

    assert first == [path.read_bytes() for path in write(paths, both, tmp_path)[0]]
