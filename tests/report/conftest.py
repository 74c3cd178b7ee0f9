"""A small CT-like scan and an answer about it: a bright disc with its box and mask, and a box without a mask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgemed.core import Answer, Prompt, Provenance, Region, Scan, Window
from edgemed.geometry import box_of

ROWS, COLUMNS = 96, 128
NOTICES = {
    "en": "nano is a demonstration model. Not for diagnosis.",
    "zh": "nano 是演示模型, 不可用于诊断。",
}


@pytest.fixture
def disc() -> np.ndarray:
    y, x = np.mgrid[:ROWS, :COLUMNS]
    return np.asarray((x - 70) ** 2 + (y - 50) ** 2 <= 20**2)


@pytest.fixture
def make_scan(disc: np.ndarray) -> Callable[..., Scan]:
    def make(spacing: tuple[float, float] | None = (0.5, 0.5)) -> Scan:
        pixels = np.where(disc, 80.0, -100.0).astype(np.float32)[None]
        return Scan(pixels, "CT", Window(40, 400), spacing, sop_instance_uid="1.2.826.0.1.3680043.8.498.1")

    return make


@pytest.fixture
def provenance() -> Provenance:
    return Provenance(
        edgemed="0.1.0",
        family="native",
        bundle="nano",
        bundle_sha256="ab" * 32,
        backend="onnxruntime",
        device="CPU",
        precision={"vision_encoder": "fp32", "decoder": "int8"},
        decode="auto",
        tokens={"prompt": 301, "generated": 24, "decoder_calls": 13},
        timings_ms={"read": 41.0312, "total": 1250.0},
        versions={"onnxruntime": "1.31.1"},
    )


@pytest.fixture
def answer(disc: np.ndarray, provenance: Provenance) -> Answer:
    box = box_of(disc)
    assert box is not None
    return Answer(
        text="The liver is visible, and the spleen.",
        tagged_text="The <ref>liver</ref> ...",
        regions=(
            Region("liver", box, mask=disc, score=0.93218, iou_estimate=0.951234),
            Region("spleen", (8.0, 10.126, 30.5, 40.0)),
        ),
        provenance=provenance,
        prompt_ids=(1, 3, 500),
        generated_ids=(5, 12, 2),
    )


@pytest.fixture
def chinese(disc: np.ndarray, provenance: Provenance) -> Answer:
    box = box_of(disc)
    assert box is not None
    region = Region("肝脏", box, mask=disc, score=0.5)
    return Answer("可见肝脏。", "可见<ref>肝脏</ref>。", (region,), provenance)


@pytest.fixture
def english_prompt() -> Prompt:
    return Prompt("Where is the liver?")


@pytest.fixture
def chinese_prompt() -> Prompt:
    return Prompt("肝脏在哪里?", language="zh")


@pytest.fixture
def notices() -> dict[str, str]:
    return NOTICES
