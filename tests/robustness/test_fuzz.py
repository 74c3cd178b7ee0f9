"""2,000 inputs to everything that parses what others wrote: each ends in a value or in a documented error.

Half of them are mutations of the kept corpus; the rest, where the form allows it, is built from values. The same inputs
in every run. packaging/nightly.sh has 100,000.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("resource", reason="the limits of the decoding child need a POSIX system")

TARGETS = ("header", "pixel", "volume", "manifest", "config", "prompt")
EXAMPLES = 334
MAX_CORPUS_BYTES = 200_000

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
"""Anything that JSON can say, and NaN."""


@pytest.fixture(scope="module")
def targets(harness: ModuleType) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(harness.TARGETS[name]()) for name in TARGETS}


def test_the_kept_corpus_is_small_and_ends_as_documented(harness: ModuleType, targets: dict[str, Any]) -> None:
    assert set(harness.SHARES) == set(TARGETS)
    files = [(name, path) for name in TARGETS for path in sorted((harness.CORPUS / name).iterdir())]
    assert sum(path.stat().st_size for _, path in files) < MAX_CORPUS_BYTES
    ends = {targets[name].run(path.read_bytes()) for name, path in files}
    assert {"read", "InvalidInput", "CannotRead", "UnsupportedDicom", "BundleError", "EdgemedError"} <= ends


@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(number=st.integers(0, 1 << 32), place=st.integers(0, 999), value=values)
def test_no_input_ends_otherwise(
    harness: ModuleType, targets: dict[str, Any], name: str, number: int, place: int, value: Any
) -> None:
    data = built(harness, name, place, value) if number % 2 else None
    if data is None:
        data = harness.mutated(harness.seeds_of(name), random.Random(number))
    targets[name].run(data)


def built(harness: ModuleType, name: str, place: int, value: Any) -> bytes | None:
    """Return an input of a sound form with another value somewhere; None where the form has no values."""
    if name == "config":
        known = ("require_signature", "trusted_keys", "root_keys", "required_roles", "other")
        return f"[bundles]\n{known[place % 5]} = {json.dumps(value)}\n".encode("utf-8", "surrogatepass")
    if name == "prompt" and isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if name not in ("manifest", "prompt"):
        return None
    texts = [seed for seed in harness.seeds_of(name) if seed[:1] == b"{"]
    try:
        whole = json.loads(texts[place % len(texts)])
    except ValueError:
        return None
    here = whole
    for step in range(4):
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = keys[place // 7 % len(keys)]
        if not isinstance(here[key], dict | list) or not here[key] or place % 4 == step:
            here[key] = value
            break
        here = here[key]
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"
