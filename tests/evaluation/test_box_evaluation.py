"""How true scores are, measured through a session that answers as the test says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgemed.box_confidence import to_markdown
from edgemed.box_evaluation import BoxSample, boxes_of_records, judge, to_json, write_confidence
from edgemed.core import Prompt, Region, Scan, Side
from edgemed.errors import InvalidInput, NoInput


class Oracle:
    """Answers every question with one box, as sure of each side as it is told."""

    def __init__(self, label: str, box: tuple[float, float, float, float], probability: float) -> None:
        self.region = Region(label, box, sides=(Side(probability),) * 4)  # type: ignore[arg-type]
        self.asked: list[str] = []

    def ask(self, scan: Scan, prompt: Prompt, options: Any = None) -> Any:
        self.asked.append(prompt.text)
        return SimpleNamespace(regions=(self.region,))


def record(folder: Path, patient: str, name: str, box: list[int]) -> dict[str, Any]:
    Image.fromarray(np.zeros((100, 100), np.uint8)).save(folder / f"{patient}.png")
    label = {"name_en": name, "kind": "box", "box": box}
    return {
        "source": "s",
        "patient": patient,
        "modality": "CT",
        "view": "slice",
        "path": f"{patient}.png",
        "labels": [label],
    }


@pytest.fixture
def records(tmp_path: Path) -> Path:
    rows = [record(tmp_path, "1", "liver", [10, 10, 60, 60]), record(tmp_path, "2", "liver", [70, 70, 90, 90])]
    rows.append(record(tmp_path, "3", "a thing nobody knows", [1, 2, 30, 40]))
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_each_box_of_an_answer_is_compared_with_the_true_one(records: Path) -> None:
    oracle = Oracle("liver", (10, 10, 60, 60), 0.8)
    samples = boxes_of_records(oracle, records, records.parent, lambda r: True)
    assert [(s.structure, s.patient, s.iou) for s in samples] == [("liver", "s 1", 1.0), ("liver", "s 2", 0.0)]
    assert [s.raw for s in samples] == pytest.approx([0.8, 0.8])
    assert oracle.asked == ["Where is the liver?"] * 2


def test_an_answer_about_something_else_gives_no_sample(records: Path) -> None:
    assert boxes_of_records(Oracle("spleen", (1, 1, 2, 2), 0.8), records, records.parent, lambda r: True) == []
    with pytest.raises(NoInput, match="no record"):
        boxes_of_records(Oracle("liver", (1, 1, 2, 2), 0.8), records, records.parent, lambda r: False)


def samples(count: int = 200) -> list[BoxSample]:
    rng = np.random.default_rng(1)
    raw = rng.uniform(0.05, 1, count)
    return [
        BoxSample("liver", "CT", str(i % 5), float(r), 0.9 if rng.random() < r**3 else 0.1) for i, r in enumerate(raw)
    ]


def test_a_fit_on_other_patients_makes_scores_truer() -> None:
    report = judge(samples())
    assert (report.boxes, report.patients) == (200, 5)
    assert report.before.error > 0.15
    assert report.after.error < report.before.error / 2
    with pytest.raises(InvalidInput, match="some of both"):
        judge([s for s in samples() if s.iou > 0.5])


def test_the_report_is_written_with_its_plot(tmp_path: Path) -> None:
    report = judge(samples())
    as_json, as_plot = write_confidence(report, tmp_path / "confidence")
    found = json.loads(as_json.read_text())
    assert found == json.loads(json.dumps(to_json(report)))
    assert found["slope"] == report.fitted.slope
    with Image.open(as_plot) as image:
        assert image.size == (450, 405)
    assert "| fitted |" in to_markdown(found)
