"""Names, orientation, splits, and that the test series stays out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edgemed.families.native_lexicon import STRUCTURES
from edgemed.training.slices import INDEX
from edgemed.training.sources import (
    BODY_PART,
    MODALITY,
    _merged_name,
    cut,
    merge_labels,
    read_volume,
    record_split,
    records,
)
from edgemed.training.stages import read_sources


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("liver", "liver"),
        ("Inferior Vena Cava", "inferior_vena_cava"),
        ("lung_upper_lobe_left", "lung_left"),
        ("lung_right", "lung_right"),
        ("left lung", "lung_left"),
        ("vertebrae_T12", "vertebra"),
        ("spine", "vertebra"),
        ("rib_left_7", "ribs"),
        ("portal_vein_and_splenic_vein", "portal_vein"),
        ("gluteus_maximus_right", "gluteal_muscle_right"),
        ("autochthon_left", "back_muscle_left"),
        ("iliac_artery_left", "iliac_vessels"),
        ("iliac_vena_right", "iliac_vessels"),
        ("heart_atrium_left", "heart"),
        ("colon polyp", "polyp"),
        ("retinal blood vessels", "retinal_vessels"),
        ("intervertebral_discs", None),
        ("red blood cell", None),
        ("lung", None),
    ],
)
def test_label_names_of_the_sources_become_structures(name: str, key: str | None) -> None:
    assert _merged_name(name) == key
    assert key is None or key in INDEX


def test_labels_take_the_index_of_their_structure_and_unknown_ones_vanish() -> None:
    voxels = np.array([[[0, 1, 2, 7]]])
    merged = merge_labels(voxels, {1: "spleen", 2: "intervertebral_discs", 7: "rib_left_1", 90: "liver"})
    assert merged.tolist() == [[[0, INDEX["spleen"] + 1, 0, INDEX["ribs"] + 1]]]


def ras_volume() -> npt.NDArray[np.float32]:
    """A volume in right, anterior, superior order whose value says where it is: 100 x + 10 y + z."""
    x, y, z = np.meshgrid(np.arange(4), np.arange(5), np.arange(6), indexing="ij")
    return np.asarray(100 * x + 10 * y + z, np.float32)


FACTS: dict[str, Any] = dict(
    known=np.ones(len(STRUCTURES), bool), modality=0, body_part=0, source="s", patient="p", windows=()
)


@pytest.mark.parametrize(
    ("orientation", "spacing", "top_left", "top_right", "bottom_left"),
    [
        # rightmost and most anterior voxel at the top left: the patient's right is at the viewer's left
        ("axial", (2.0, 1.0), (3, 4, 1), (0, 4, 1), (3, 0, 1)),
        ("coronal", (3.0, 1.0), (3, 1, 5), (0, 1, 5), (3, 1, 0)),
        ("sagittal", (3.0, 2.0), (1, 4, 5), (1, 0, 5), (1, 4, 0)),
    ],
)
def test_slices_are_shown_as_a_radiologist_sees_them(
    orientation: str,
    spacing: tuple[float, float],
    top_left: tuple[int, int, int],
    top_right: tuple[int, int, int],
    bottom_left: tuple[int, int, int],
) -> None:
    volume = ras_volume()
    labels = np.full(volume.shape, INDEX["liver"] + 1, np.uint8)  # labelled, so no slice is left out
    picture = cut(volume, labels, (1.0, 2.0, 3.0), orientation, **FACTS)[1]
    corners = [float(picture.image[at]) for at in ((0, 0), (0, -1), (-1, 0))]
    assert corners == [100 * x + 10 * y + z for x, y, z in (top_left, top_right, bottom_left)]
    assert picture.spacing == spacing


def test_slices_of_air_are_left_out() -> None:
    volume = np.full((20, 20, 4), -1000, np.float32)
    volume[5:15, 5:15, 2] = 50
    pieces = cut(volume, np.zeros(volume.shape, np.uint8), (1, 1, 1), "axial", **FACTS)
    assert len(pieces) == 1
    assert pieces[0].image.max() == 50


def write_nifti(path: Path, voxels: npt.NDArray[Any], names: dict[int, str] | None = None, flip: bool = False) -> None:
    """Write a volume, its voxels stored from right to left and front to back where `flip`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-2.0, -2.0, 2.0, 1.0]) if flip else np.diag([2.0, 2.0, 2.0, 1.0])
    image = nibabel.Nifti1Image(voxels[::-1, ::-1] if flip else voxels, affine)
    if names:
        labels = "".join(f'<Label Key="{k}"><![CDATA[{n}]]></Label>' for k, n in names.items())
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", labels.encode()))
    nibabel.save(image, path)


def test_a_volume_is_read_in_right_anterior_superior_order_with_its_names(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", ras_volume(), {1: "liver", 2: "rib_left_1"}, flip=True)
    voxels, spacing, names = read_volume(tmp_path / "a.nii.gz")
    assert np.array_equal(voxels, ras_volume())
    assert spacing == (2.0, 2.0, 2.0)
    assert names == {1: "liver", 2: "rib_left_1"}


def record(**changes: Any) -> dict[str, Any]:
    base = {"licence_flag": "clear", "source": "isic2017", "path": "isic2017/a.jpg", "split_hint": "train"}
    return {**base, "patient": "p1", "view": "photograph", "labels": [], **changes}


def test_what_has_no_clear_licence_is_never_trained_on() -> None:
    for source in ("isic2017", "busi", "brain-tumour-mr", "pyradiomics-brain", "bccd"):
        for patient in (f"p{i}" for i in range(40)):
            path = f"{source}/brain1/{patient}.jpg"
            assert record_split(record(licence_flag="check", source=source, patient=patient, path=path)) == "test"


def test_the_split_follows_the_patient() -> None:
    sides = {}
    for patient in (f"p{i}" for i in range(200)):
        sides[patient] = {record_split(record(patient=patient, path=f"isic2017/{k}.jpg")) for k in range(3)}
    assert all(len(side) == 1 for side in sides.values())
    held_out = sum(side == {"test"} for side in sides.values())
    assert 20 < held_out < 60  # one in five


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({"source": "dcmqi-ct"}, "test"),
        ({"source": "sam-med2d-demo"}, "test"),
        ({"source": "pyradiomics-brain", "path": "pyradiomics-brain/brain1_1.jpg"}, "train"),
        ({"source": "pyradiomics-brain", "path": "pyradiomics-brain/brain2_1.jpg"}, "test"),
        ({"split_hint": "test"}, "test"),
        ({"split_hint": "val"}, "test"),
        # a patient with one slide on each side of the publisher's split: trained on, so not tested on
        ({"source": "brca-m2c", "patient": "TCGA-A7-A0DB", "split_hint": "train"}, "train"),
        ({"source": "brca-m2c", "patient": "TCGA-A7-A0DB", "split_hint": "val"}, "neither"),
    ],
)
def test_the_split_of_a_record(changes: dict[str, Any], side: str) -> None:
    assert record_split(record(**changes)) == side


def write_records(folder: Path) -> None:
    """Write pictures of four sources and their records.jsonl."""
    pink = np.full((40, 60, 3), (255, 190, 200), np.uint8)
    grey = np.repeat(np.tile(np.arange(60, dtype=np.uint8), (40, 1))[..., None], 3, axis=2)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 30:50] = 255
    for name, pixels in (("a.png", pink), ("b.png", pink), ("c.png", grey), ("m.png", mask)):
        Image.fromarray(pixels).save(folder / name)
    cell = {"name_en": "white blood cell", "mask": None, "box": [3, 4, 30, 20]}
    polyp = {"name_en": "polyp", "mask": "m.png", "mask_value": 255, "box": [30, 10, 50, 20]}
    train = next(f"p{i}" for i in range(9) if record_split(record(patient=f"p{i}")) == "train")
    rows = [
        record(source="bccd", path="a.png", patient=train, labels=[cell]),
        record(source="bccd", path="a.png", patient=train, labels=[cell, cell]),
        record(source="hyperkvasir-polyp", path="b.png", patient=train, labels=[polyp]),
        record(source="tcga-chest-ct", path="c.png", patient=train, body_part="pelvis", pixel_mm=[0.5, 0.7]),
        record(source="busi", path="a.png", patient=train, licence_flag="check"),
        record(source="pyradiomics-brain", path="brain1.nii.gz", view="volume"),
    ]
    (folder / "records.jsonl").write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")


def test_records_become_labelled_pictures(tmp_path: Path) -> None:
    write_records(tmp_path)
    groups = dict(records(tmp_path, "train"))
    assert sorted(groups) == ["bccd", "hyperkvasir-polyp", "tcga-chest-ct"]
    one, two = groups["bccd"]
    cell = INDEX["white_blood_cell"]
    assert one.boxes == ((cell, (3.0, 4.0, 30.0, 20.0)),)
    assert one.known[cell]
    assert two.boxes == ()  # of several cells, "where is the white blood cell" has no one answer
    assert not two.known[cell]
    polyp = groups["hyperkvasir-polyp"][0]
    assert (polyp.labels == INDEX["polyp"] + 1).sum() == 200
    assert polyp.image.shape == (40, 60, 3)
    chest = groups["tcga-chest-ct"][0]
    assert (chest.image.dtype, chest.image.shape, chest.spacing) == (np.float32, (40, 60), (0.5, 0.7))
    assert chest.body_part == BODY_PART["pelvis"]
    assert chest.known[INDEX["liver"]]  # nothing of the upper abdomen in a pelvis
    assert not chest.known[INDEX["urinary_bladder"]]
    assert [name for name, _ in records(tmp_path, "test")] == ["busi"]


def fake_packages(folder: Path) -> Path:
    """Write a small file for every one that the recipe reads, and broken ones in place of the test series."""
    reference = folder / "TotalSegmentator/tests/reference_files"
    rng = np.random.default_rng(0)
    ct = rng.normal(0, 300, (12, 10, 8)).astype(np.float32)
    label = np.zeros(ct.shape, np.uint8)
    label[2:6, 2:6, :4], label[6:9, 2:6, 4:] = 1, 2
    write_nifti(reference / "example_ct.nii.gz", ct)
    write_nifti(reference / "example_seg_fast_force_split.nii.gz", label, {1: "hip_left", 2: "liver"})
    write_nifti(reference / "example_mr_sm.nii.gz", np.abs(ct))
    write_nifti(reference / "example_seg_mr.nii.gz", label, {1: "kidney_left", 2: "intervertebral_discs"})
    write_nifti(reference / "aorta_report/example_ct.nii.gz", ct)
    write_nifti(reference / "pulmonary_report/models/heart.nii.gz", label)
    write_nifti(reference / "pulmonary_report/models/pulmonary_artery.nii.gz", label)
    write_nifti(reference / "aorta_report/test_result/models/aorta.nii.gz", np.ones((2, 2, 2), np.uint8))
    write_nifti(folder / "TotalSegmentator/totalsegmentator/resources/ct_brain_atlas_1mm.nii.gz", np.abs(ct))
    for kind in ("t1", "gm", "wm"):
        name = f"nilearn/nilearn/datasets/data/mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
        write_nifti(folder / name, np.abs(ct))
    skimage, stardist = "scikit-image/skimage/data", "stardist/stardist/data/images"
    for path in (f"{skimage}/retina.jpg", f"{skimage}/ihc.png", f"{stardist}/histo.jpg"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 99, np.uint8)).save(folder / path)
    series = reference / "example_ct_dicom"
    series.mkdir()
    for i in range(20):
        (series / f"{i}.dcm").write_bytes(b"not to be read")
    (reference / "example_seg_dicom.nii.gz").write_bytes(b"not to be read")
    return folder


def test_the_test_series_is_not_among_the_sources(tmp_path: Path) -> None:
    groups = read_sources(fake_packages(tmp_path), None)  # reading one broken file would raise
    assert sorted(groups) == [
        "abdomen-ct-axial", "abdomen-ct-coronal", "abdomen-ct-sagittal", "abdomen-ct-upper", "abdomen-mr",
        "brain-t1-average", "chest-cta", "head-ct", "histo", "ihc", "retina", "ultrasound",
    ]  # fmt: skip
    patients = {p.patient for pieces in groups.values() for p in pieces}
    assert patients == {
        "totalsegmentator-ct", "totalsegmentator-mr", "totalsegmentator-cta", "icbm152", "head-ct-atlas",
        "retina", "histo", "ihc",
    }  # fmt: skip
    upper = {int(v) for p in groups["abdomen-ct-upper"] for v in np.unique(p.labels)}
    assert upper == {0, INDEX["liver"] + 1}
    assert {p.body_part for p in groups["abdomen-ct-axial"]} == {BODY_PART["pelvis"]}  # hips, no liver
    aorta = [p for p in groups["chest-cta"] if (p.labels == INDEX["aorta"] + 1).any()]
    assert aorta
    assert not aorta[0].known[INDEX["liver"]]
    assert {p.modality for p in groups["head-ct"]} == {MODALITY["ct"]}
