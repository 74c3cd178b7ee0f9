"""The measures themselves: on answers whose quality is known, the numbers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemed.core import Answer, Prompt, Provenance, Region, Scan
from edgemed.errors import InvalidInput, NoInput
from edgemed.evaluation import (
    ABSENT,
    Evaluation,
    Sample,
    deepest_point,
    estimate,
    evaluate_records,
    evaluate_test_series,
    meets,
    named_modalities,
    summary,
    to_markdown,
    write_evaluation,
)
from edgemed.geometry import box_of
from edgemed.infer import InferOptions

PROVENANCE = Provenance("0", "native", "b", "0" * 64, "none", "CPU", {}, "auto", {}, {})


class Oracle:
    """Answers from the truth: the structure asked for, the region pointed at; `spoil` makes it worse."""

    def __init__(self, truth: dict[str, np.ndarray[Any, Any]], modality: str, spoil: str = "") -> None:
        self.truth, self.modality, self.spoil = truth, modality, spoil
        self.prompts: list[Prompt] = []

    def ask(self, scan: Scan, prompt: Prompt, options: InferOptions | None = None) -> Answer:
        self.prompts.append(prompt)
        if "modality" in prompt.text or "成像方式" in prompt.text:
            return self.answer(self.modality)
        found = []
        for name, mask in self.truth.items():
            if not mask.any():
                continue
            pointed = False
            for region in prompt.regions:
                if region.point is not None:
                    pointed = bool(mask[int(region.point[1]), int(region.point[0])])
                elif region.mask is not None:
                    pointed = np.array_equal(region.mask, mask)
                else:
                    pointed = region.box == box_of(mask)
            if pointed or any(n in prompt.text for n in name.split("|")):
                box = box_of(mask)
                assert box is not None
                found.append(Region(name.split("|")[prompt.language == "zh"], box, mask=mask))
        if self.spoil == "finds everything" and not found:
            found = [Region("liver", (0, 0, 5, 5))]
        if self.spoil == "says spleen":
            found = [Region("spleen", r.box, mask=r.mask) for r in found]
        return self.answer("", tuple(found))

    def answer(self, text: str, regions: tuple[Region, ...] = ()) -> Answer:
        return Answer(text, text, regions, PROVENANCE)


def disc(cy: int, cx: int, radius: int, shape: tuple[int, int] = (64, 64)) -> np.ndarray[Any, Any]:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.asarray((y - cy) ** 2 + (x - cx) ** 2 <= radius**2)


def test_mean_and_interval_are_over_clusters() -> None:
    samples = [Sample("m", "liver", "CT", f"slice {i}", "en", value) for i, value in enumerate([0.0, 1.0] * 50)]
    found = estimate(samples)
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.4, abs=0.03)
    assert found.high == pytest.approx(0.6, abs=0.03)
    assert (found.count, found.clusters) == (100, 100)
    one = estimate([Sample("m", "liver", "CT", "slice 0", "en", v) for v in (0.0, 1.0)])
    assert (one.low, one.mean, one.high) == (0.5, 0.5, 0.5)
    assert estimate(samples) == estimate(samples)
    with pytest.raises(InvalidInput, match="nothing to estimate"):
        estimate([])


def test_deepest_point_of_a_disc_is_its_middle_and_of_a_ring_lies_in_it() -> None:
    assert deepest_point(disc(30, 20, 9)) == (20.5, 30.5)
    ring = disc(30, 30, 20) & ~disc(30, 30, 12)
    x, y = deepest_point(ring)
    assert ring[int(y), int(x)]
    assert np.hypot(x - 30.5, y - 30.5) == pytest.approx(16, abs=1.1)
    corner = np.zeros((8, 8), bool)
    corner[:5, :5] = True
    assert deepest_point(corner) == (2.5, 2.5)
    line = np.zeros((8, 8), bool)
    line[2, 1:8] = True
    assert deepest_point(line) == (4.5, 2.5)
    with pytest.raises(InvalidInput, match="empty"):
        deepest_point(np.zeros((4, 4), bool))


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("This is an axial CT of the abdomen.", "en", {"ct"}),
        ("An ultrasound picture of a structure.", "en", {"ultrasound"}),
        ("This is a chest X-ray.", "en", {"xray"}),
        ("It is a fundus photograph.", "en", {"fundus"}),
        ("Either CT or MRI.", "en", {"ct", "mr"}),
        ("这是一幅超声图像。", "zh", {"ultrasound"}),
        ("这是一幅腹部CT图像。", "zh", {"ct"}),
        ("The object is octagonal.", "en", set()),
    ],
)
def test_modalities_are_found_as_whole_words(text: str, language: Any, expected: set[str]) -> None:
    assert named_modalities(text, language) == expected


@pytest.fixture
def series(tmp_path: Path) -> tuple[Path, Path, dict[str, np.ndarray[Any, Any]]]:
    """Three DICOM slices, stored in falling order of position, with a NIfTI label map: liver in two, spleen in one."""
    nibabel = pytest.importorskip("nibabel")
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    liver, spleen = disc(20, 20, 10), disc(45, 45, 9)
    labels = np.zeros((64, 64, 3), np.uint8)  # [x, y, slice], y upwards
    for k, mask, value in ((1, liver, 5), (2, liver, 5), (2, spleen, 1)):
        labels[:, :, k][mask[::-1].T] = value
    image = nibabel.Nifti1Image(labels, np.eye(4))
    xml = '<Label Key="5"><![CDATA[liver]]></Label><Label Key="1"><![CDATA[spleen]]></Label>'
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", xml.encode()))
    nibabel.save(image, tmp_path / "labels.nii.gz")
    folder = tmp_path / "dicom"
    folder.mkdir()
    for k in range(3):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        d = pydicom.Dataset()
        d.file_meta = meta
        d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        d.Modality, d.PhotometricInterpretation = "CT", "MONOCHROME2"
        d.ImagePositionPatient, d.ImageOrientationPatient = [0, 0, 10 - 5 * k], [1, 0, 0, 0, 1, 0]
        d.PixelSpacing = [1, 1]
        d.Rows = d.Columns = 64
        d.SamplesPerPixel, d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 1, 16, 12, 11, 0
        d.RescaleIntercept, d.RescaleSlope = -1024, 1
        d.WindowCenter, d.WindowWidth = 40, 400
        d.PixelData = np.full((64, 64), 1000 + k, np.uint16).tobytes()
        d.save_as(folder / f"{k}.dcm", enforce_file_format=True)
    return folder, tmp_path / "labels.nii.gz", {"liver|肝脏": liver, "spleen|脾脏": spleen}


def means(evaluation: Evaluation) -> dict[str, float]:
    return {metric: found["mean"] for metric, found in summary(evaluation)["metrics"].items()}


def counts(evaluation: Evaluation) -> dict[str, int]:
    return {metric: found["count"] for metric, found in summary(evaluation)["metrics"].items()}


def test_answers_from_the_truth_are_perfect(series: Any) -> None:
    folder, labels, truth = series
    seen: list[tuple[int, int]] = []
    oracle = Oracle(truth, "CT")
    evaluation = evaluate_test_series(oracle, folder, labels, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    found = means(evaluation)
    for metric in (
        "box IoU",
        "text->mask Dice",
        "box->mask Dice",
        "point->mask Dice",
        "region->name",
        "modality named",
    ):
        assert found[metric] == 1, metric
    assert found["English and Chinese box agree"] == 1
    assert found["absent: falsely found"] == 0
    n = counts(evaluation)
    assert n["box IoU"] == 3 * 2  # liver twice, spleen once; two languages
    assert n["absent: falsely found"] == 3 * 2 * len(ABSENT)
    assert n["absent in this slice: falsely found"] == (1 + 2) * 2  # liver in slice 0, spleen in 0 and 1
    assert "Where is the liver?" in {p.text for p in oracle.prompts}
    assert "肝脏在哪里？" in {p.text for p in oracle.prompts}


def test_wrong_answers_cost(series: Any) -> None:
    folder, labels, truth = series
    everything = means(evaluate_test_series(Oracle(truth, "MRI", "finds everything"), folder, labels))
    assert everything["absent: falsely found"] == 1
    assert everything["modality named"] == 0
    spleen = means(evaluate_test_series(Oracle(truth, "CT", "says spleen"), folder, labels))
    assert spleen["box IoU"] == pytest.approx(1 / 3)
    assert spleen["region->name"] == pytest.approx(1 / 3)
    assert spleen["box->mask Dice"] == 1
    nothing = means(evaluate_test_series(Oracle({}, ""), folder, labels))
    assert nothing["box IoU"] == nothing["text->mask Dice"] == nothing["box->mask Dice"] == 0


def test_series_and_labels_of_different_length_are_refused(series: Any) -> None:
    folder, labels, truth = series
    (folder / "0.dcm").unlink()
    with pytest.raises(InvalidInput, match="2 slices and 3 label slices"):
        evaluate_test_series(Oracle(truth, "CT"), folder, labels)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(NoInput):
        evaluate_test_series(Oracle(truth, "CT"), folder, labels)


def test_records_give_modality_masks_and_boxes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    polyp = disc(30, 30, 12)
    image.fromarray(np.full((64, 64, 3), (200, 90, 80), np.uint8)).save(tmp_path / "a.png")
    image.fromarray((polyp * np.uint8(7)).astype(np.uint8)).save(tmp_path / "mask.png")
    base = {"path": "a.png", "modality": "endoscopy", "view": "colonoscopy", "source": "s", "width": 64, "height": 64}
    mask = {"name_en": "colon polyp", "mask": "mask.png", "mask_value": 7, "box": [18, 18, 43, 43], "kind": "manual"}
    cell = {"name_en": "white blood cell", "mask": None, "box": [18, 18, 43, 43], "kind": "manual"}
    level = {"name_en": "polyp", "mask": None, "box": None, "kind": "image-level"}
    lines = [
        {**base, "patient": "1", "labels": [mask, level]},
        {**base, "patient": "2", "labels": [cell], "modality": "microscopy"},
        {**base, "patient": "3", "labels": [cell, cell, {**cell, "name_en": "nothing known"}]},
        {**base, "patient": "4", "labels": [mask], "view": "volume"},
        {**base, "patient": "5", "labels": [mask]},
    ]
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    oracle = Oracle({"polyp|息肉": polyp}, "endoscopy 内镜")
    evaluation = evaluate_records(oracle, records, tmp_path, lambda r: r["patient"] != "5")
    found, n = means(evaluation), counts(evaluation)
    assert n["modality named"] == 6
    assert found["modality named"] == pytest.approx(2 / 3)
    assert n["box IoU"] == 4
    assert found["box IoU"] == 0.5
    assert n["text->mask Dice"] == 2
    assert found["text->mask Dice"] == 1
    assert summary(evaluation)["by_structure"]["box IoU"]["white_blood_cell"]["mean"] == 0
    assert evaluation.facts["pictures"] == 3
    with pytest.raises(NoInput):
        evaluate_records(oracle, records, tmp_path, lambda r: False)


def test_tables_say_mean_interval_target_and_verdict(tmp_path: Path) -> None:
    samples = tuple(
        Sample(metric, structure, "CT", f"slice {i}", "en", value)
        for metric, value in (("box IoU", 0.8), ("region->name", 0.5), ("region->name (point)", 0.1))
        for structure in ("liver", "aorta")
        for i in range(4)
    )
    evaluation = Evaluation("Test", samples, {"slices": 4, "languages": ["en", "zh"]})
    text = to_markdown(evaluation)
    assert "| box IoU | 0.800 (0.800 to 0.800) | 8 | >= 0.72 | met |" in text
    assert "| region->name | 0.500 (0.500 to 0.500) | 8 | >= 0.75 | missed |" in text
    assert "| region->name (point) | 0.100 (0.100 to 0.100) | 8 |  |  |" in text
    assert "| liver | 0.80 (4) | 0.50 (4) | 0.10 (4) |" in text
    assert "slices 4, languages en and zh." in text
    as_json, as_markdown = write_evaluation(evaluation, tmp_path / "quality.v1")
    assert as_json.name == "quality.v1.json"
    assert json.loads(as_json.read_text("utf-8"))["metrics"]["box IoU"]["mean"] == pytest.approx(0.8)
    assert as_markdown.read_text("utf-8") == text
    assert meets("absent: falsely found", 0.1)
    assert not meets("absent: falsely found", 0.11)
    assert meets("region->name (mask)", 0.0)
