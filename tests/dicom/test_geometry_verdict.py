"""The verdict over a stack, its affine against two other libraries, slabs and resampling."""

from __future__ import annotations

import importlib.util
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgemed.dicom.geometry_verdict import (
    Place,
    affine_of,
    centroid_mm,
    depth_of,
    judge,
    plane_of,
    resampled,
    slabs_mm,
)
from edgemed.dicom.series import find_series
from edgemed.errors import InvalidInput

_HELPER = Path(__file__).resolve().parents[1] / "helpers" / "made_series.py"
_SPEC = importlib.util.spec_from_file_location("made_series", _HELPER)
assert _SPEC is not None and _SPEC.loader is not None
made = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def stack(depths: list[float], lean: tuple[float, float] = (0, 0), **more: object) -> list[Place]:
    return [
        Place(6, 8, (0.8, 0.5), AXIAL, (lean[0] * k, lean[1] * k, z), **more)  # type: ignore[arg-type]
        for k, z in enumerate(depths)
    ]


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depths", "kind"),
    [
        ([0, 2, 4, 6], "uniform"),
        ([5], "single"),
        ([0, 2, 4, 8, 10], "gaps"),
        ([0, 2, 2, 4], "duplicates"),
        ([0, 2, 3.1, 6, 8], "irregular"),
        ([0, 0.6, 1.3, 1.9, 2.5, 3.1], "irregular"),  # 0.625 mm in tenths: a tenth of a slice off
        ([0, 0.62, 1.25, 1.88, 2.5, 3.12], "uniform"),  # in hundredths
        ([k * 1.0 + (k == 500) * 0.04 for k in range(1000)], "uniform"),
        ([float(k) for k in range(1000) if k != 998], "gaps"),
        ([float(k) for k in range(1000) if k != 500], "gaps"),
    ],
)
def test_the_verdict_follows_the_positions(depths: list[float], kind: str) -> None:
    assert judge(stack(depths)).kind == kind


def test_only_uniform_and_single_are_volumes() -> None:
    kinds = {judge(stack(d)).is_volume for d in ([0, 2, 4], [1])}
    assert kinds == {True}
    assert not judge(stack([0, 2, 6])).is_volume
    assert not judge(stack([0, 2, 4], lean=(0, 1))).is_volume


def test_the_verdict_tells_how_many_slices_are_missing_and_where() -> None:
    assert judge(stack([0, 2, 4, 10, 12])).reasons == (
        "2 missing between its 5 slices, the first after slice 2 (from 0)",
    )


def test_a_tilted_gantry_is_told_with_its_angle() -> None:
    verdict = judge(stack([0, 4, 8, 12], lean=(0, 4 * math.tan(math.radians(15)))))
    assert verdict.kind == "tilt"
    assert "15.0 degrees" in verdict.reasons[0]
    assert verdict.spacing_mm == pytest.approx((4.0, 0.8, 0.5))


def test_slices_shifted_to_and_fro_are_irregular() -> None:
    places = [Place(6, 8, (0.8, 0.5), AXIAL, (3.0 * (k % 2), 0, 2.0 * k)) for k in range(6)]
    assert judge(places).kind == "irregular"


@pytest.mark.parametrize("change", [{"columns": 9}, {"spacing_mm": (0.8, 0.6)}, {"orientation": made.CORONAL}])
def test_slices_of_other_size_or_plane_are_mixed(change: dict[str, object]) -> None:
    first = {"rows": 6, "columns": 8, "spacing_mm": (0.8, 0.5), "orientation": AXIAL, "position": (0, 0, 0)}
    places = [Place(**first), Place(**{**first, "position": (0, 0, 2), **change})]  # type: ignore[arg-type]
    assert judge(places).kind == "mixed orientation"


def test_no_slices_are_refused() -> None:
    with pytest.raises(InvalidInput, match="without slices"):
        judge([])


def test_the_nearest_plane_is_named() -> None:
    assert plane_of(Place(1, 1, orientation=AXIAL)) == "axial"
    assert plane_of(Place(1, 1, orientation=made.CORONAL)) == "coronal"
    assert plane_of(Place(1, 1, orientation=(0, 1, 0, 0, 0, -1))) == "sagittal"


# --- millimetres ------------------------------------------------------------------------------------------------------


def test_row_spacing_goes_down_a_column() -> None:
    affine = affine_of(Place(6, 8, (0.8, 0.5), AXIAL, (10, 20, 30)))
    assert (affine @ (3, 2, 0, 1))[:3].tolist() == [10 + 3 * 0.5, 20 + 2 * 0.8, 30]


@st.composite
def geometries(draw: st.DrawFn) -> tuple[list[Place], float]:
    """Return (places in order along the normal, share of lean): flips, obliqueness, anisotropy, tilt, single slices."""
    angles = [draw(st.floats(-math.pi, math.pi)) for _ in range(3)]
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        rotation = rotation @ turn
    if draw(st.booleans()):  # a mirrored series: the columns run the other way
        rotation[:, 1] *= -1
    if draw(st.booleans()):  # upright, flips only
        rotation = np.diag([draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)])
    row, column = rotation[:, 0], rotation[:, 1]
    normal = np.cross(row, column)
    spacing = (draw(st.floats(0.2, 3)), draw(st.floats(0.2, 3)))
    step = draw(st.floats(0.3, 8))
    lean = draw(st.sampled_from([0.0, 0.0, 0.3]))
    origin = np.array([draw(st.floats(-300, 300)) for _ in range(3)])
    count = draw(st.sampled_from([1, 2, 5]))
    places = [
        Place(
            7,
            5,
            spacing,
            tuple(float(v) for v in (*row, *column)),  # type: ignore[arg-type]
            tuple(float(v) for v in origin + k * step * (normal + lean * column)),  # type: ignore[arg-type]
        )
        for k in range(count)
    ]
    return places, lean


def masks_of(count: int) -> list[np.ndarray[tuple[int, int], np.dtype[np.bool_]]]:
    """Return masks without any symmetry, none in the first slice of several."""
    masks = [np.zeros((7, 5), bool) for _ in range(count)]
    for k, mask in enumerate(masks):
        mask[1 : 3 + k % 3, 2:4] = count == 1 or k > 0
        mask[6, 4] = k == count - 1
    return masks


@settings(max_examples=200, deadline=None)
@given(geometries())
def test_the_affine_agrees_with_simpleitks_images(case: tuple[list[Place], float]) -> None:
    sitk = pytest.importorskip("SimpleITK")
    places, lean = case
    verdict = judge(places)
    row, column = np.array(places[0].orientation).reshape(2, 3)
    image = sitk.Image(5, 7, len(places), sitk.sitkUInt8)
    image.SetOrigin(places[0].position)
    down, across = places[0].spacing_mm or (0, 0)
    image.SetSpacing((across, down, (verdict.spacing_mm or (None,))[0] or 1.0))
    image.SetDirection(np.column_stack((row, column, np.cross(row, column))).ravel().tolist())
    last = (4, 6, len(places) - 1)
    ours = np.array(verdict.affine) @ (*last, 1)
    expected = np.array(image.TransformIndexToPhysicalPoint(last))
    if lean and len(places) > 1:
        expected = expected + np.array(places[-1].position) - image.TransformIndexToPhysicalPoint((0, 0, last[2]))
    assert ours[:3] == pytest.approx(expected, abs=0.01)


LITTLE_LEAN = [Place(7, 5, (1.0, 1.0), (1, 0, 0, 0, 1, 0), (0.0, 0.3 * k, 1.0 * k)) for k in range(2)]


@settings(max_examples=10, deadline=None)
@given(geometries())
@example((LITTLE_LEAN, 0.3))
def test_centroids_agree_with_simpleitk_and_nibabel(case: tuple[list[Place], float]) -> None:
    """Files are written and read by all three; each library turns pixels into millimetres by its own code."""
    sitk = pytest.importorskip("SimpleITK")
    nibabel = pytest.importorskip("nibabel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nibabel calls its DICOM readers experimental
        from nibabel.nicom.dicomwrappers import wrapper_from_file

    places, lean = case
    masks = masks_of(len(places))
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            made.write_slice(
                Path(folder) / f"{k}.dcm",
                mask.astype(np.uint16),
                position=place.position,
                orientation=place.orientation,
                spacing=place.spacing_mm,
                SOPInstanceUID=f"1.2.{k}",
            )
            for k, (place, mask) in enumerate(zip(places, masks, strict=True))
        ]
        (series,) = find_series([str(p) for p in reversed(paths)]).series
        order = [int(Path(s.path).stem) for s in series.slices]
        assert order == list(range(len(places)))
        ours = centroid_mm(zip(series.places, masks, strict=True))
        theirs: list[list[float]] = []
        nibs: list[list[float]] = []
        for path, mask in zip(paths, masks, strict=True):
            image, nib_affine = sitk.ReadImage(str(path)), wrapper_from_file(str(path)).affine
            for row, column in np.argwhere(mask).tolist():
                theirs.append(image.TransformIndexToPhysicalPoint((column, row, 0)))
                nibs.append((nib_affine @ (row, column, 0, 1))[:3])
        assert ours == pytest.approx(np.mean(theirs, axis=0), abs=0.01)
        assert ours == pytest.approx(np.mean(nibs, axis=0), abs=0.01)
        verdict = series.verdict
        way = np.subtract(places[-1].position, places[0].position)  # type: ignore[arg-type]
        drift = abs(way @ np.array(places[0].orientation)[3:])
        leans = drift > min(places[0].spacing_mm or (1,)) / 2  # what drifts less stays on its pixels
        assert verdict.kind == ("tilt" if leans else "uniform" if len(places) > 1 else "single")
        index = np.array([(c, r, k, 1) for k, m in enumerate(masks) for r, c in np.argwhere(m).tolist()])
        by_affine = (np.array(verdict.affine) @ index.T)[:3].mean(axis=1)
        assert by_affine == pytest.approx(ours, abs=0.01)
        if verdict.kind == "uniform" and not lean:
            whole = sitk.ReadImage([str(p) for p in paths])
            points = [whole.TransformIndexToPhysicalPoint(tuple(int(v) for v in i[:3])) for i in index]
            assert ours == pytest.approx(np.mean(points, axis=0), abs=0.01)
        ras = np.diag((-1, -1, 1, 1)) @ np.array(verdict.affine)
        nibabel.save(
            nibabel.Nifti1Image(np.stack(masks, -1).transpose(1, 0, 2).astype(np.uint8), ras), f"{folder}/m.nii"
        )
        again = nibabel.load(f"{folder}/m.nii")
        back = (again.affine @ np.c_[np.argwhere(np.asarray(again.dataobj)), np.ones(len(index))].T)[:3].mean(axis=1)
        assert back * (-1, -1, 1) == pytest.approx(ours, abs=0.01)


# --- volumes ----------------------------------------------------------------------------------------------------------


def test_slabs_of_even_slices_are_their_distance() -> None:
    assert slabs_mm(stack([0, 2, 4, 6])) == [2, 2, 2, 2]


def test_slabs_of_uneven_slices_reach_half_way() -> None:
    assert slabs_mm(stack([0, 2, 6])) == [2, 3, 4]


def test_a_slice_that_repeats_a_place_stands_for_nothing() -> None:
    assert slabs_mm(stack([0, 2, 2, 4])) == [2, 2, 0, 2]


def test_slabs_are_measured_along_the_normal() -> None:
    assert slabs_mm(stack([0, 2, 4], lean=(0, 3))) == [2, 2, 2]


def test_one_slice_has_no_slab() -> None:
    with pytest.raises(InvalidInput, match="at least two"):
        slabs_mm(stack([0]))


def test_resampling_closes_a_gap() -> None:
    masks = [np.zeros((6, 8), bool) for _ in range(4)]
    for mask in masks[1:]:
        mask[2:4, 2:6] = True
    places = stack([0, 2, 6, 8])
    result = list(resampled(masks, places))
    assert [depth_of(p) for p, _ in result] == pytest.approx([0, 2, 4, 6, 8])
    assert judge([p for p, _ in result]).kind == "uniform"
    assert [int(m.sum()) for _, m in result] == [0, 8, 8, 8, 8]


def test_resampling_straightens_a_leaning_stack() -> None:
    masks = [np.zeros((6, 8), bool) for _ in range(3)]
    for k, mask in enumerate(masks):
        mask[4 - k, 3] = True  # a rod along the normal, seen by slices that lean 0.8 mm, one pixel, each
    result = list(resampled(masks, stack([0, 2, 4], lean=(0, 0.8))))
    assert [np.argwhere(m).tolist() for _, m in result] == [[[4, 3]]] * 3
    assert judge([p for p, _ in result]).kind == "uniform"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.5, 6), min_size=1, max_size=12))
def test_slabs_of_any_spacing_add_up_to_the_whole_length(gaps: list[float]) -> None:
    depths = np.concatenate(([0.0], np.cumsum(gaps))).tolist()
    expected = depths[-1] + (gaps[0] + gaps[-1]) / 2
    assert sum(slabs_mm(stack(depths))) == pytest.approx(expected)
