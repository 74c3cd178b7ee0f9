"""GraphSpec: consistent when made, checks what a caller feeds, survives the manifest."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from edgemed.errors import InvalidInput
from edgemed.graphs import DimRange, GraphSpec, TensorSpec, from_json, to_json

SPEC = GraphSpec(
    "decoder",
    (
        TensorSpec("ids", "int64", (1, "sequence")),
        TensorSpec("rows", "float32", ("sequence", 4)),
        TensorSpec("past", "float32", (1, "cache")),
    ),
    (TensorSpec("logits", "float32", (1, "sequence")), TensorSpec("present", "float32", (1, "cache"))),
    {"sequence": DimRange(1, 8, 16), "cache": DimRange(32, 32, 32)},
    (("present", "past"),),
)


def feeds(sequence: int = 3, **changes: Any) -> dict[str, Any]:
    base = {"ids": np.zeros((1, sequence), np.int64), "rows": np.zeros((sequence, 4), np.float32)}
    return {**base, **changes}


def test_the_state_is_neither_fed_nor_returned() -> None:
    assert [t.name for t in SPEC.fed_inputs] == ["ids", "rows"]
    assert [t.name for t in SPEC.returned_outputs] == ["logits"]
    SPEC.check(feeds())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (feeds(17), "size 17"),
        (feeds(0), "size 0"),
        (feeds(3, rows=np.zeros((4, 4), np.float32)), "sequence = 3"),
        (feeds(3, rows=np.zeros((3, 5), np.float32)), "expected 4"),
        (feeds(3, rows=np.zeros((3, 4))), "float64"),
        (feeds(3, rows=np.zeros(3, np.float32)), r"float32 \[3\]"),
        (feeds(3, past=np.zeros((1, 32), np.float32)), "got inputs"),
        ({"ids": np.zeros((1, 3), np.int64)}, "got inputs"),
    ],
)
def test_what_does_not_fit_is_named(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput, match=f"graph decoder.*{told}"):
        SPEC.check(wrong)


def test_a_spec_that_contradicts_itself_is_refused() -> None:
    tensor = TensorSpec("x", "float32", ("n",))
    with pytest.raises(InvalidInput, match="one of vision_encoder"):
        GraphSpec("encoder", (), ())
    with pytest.raises(InvalidInput, match="dims n that it does not declare"):
        GraphSpec("decoder", (tensor,), ())
    with pytest.raises(InvalidInput, match="state y -> x"):
        GraphSpec("decoder", (tensor,), (), {"n": DimRange(1, 1, 1)}, (("y", "x"),))
    with pytest.raises(InvalidInput, match="not in order"):
        DimRange(2, 1, 3)


def test_a_spec_survives_the_manifest() -> None:
    assert from_json(json.loads(json.dumps(to_json(SPEC)))) == SPEC
