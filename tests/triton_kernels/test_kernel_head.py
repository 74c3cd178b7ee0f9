"""Choosing tokens from hidden states, on a launcher of NumPy and under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from reference_launcher import ReferenceLauncher, choices

from edgemed import kernel_head
from edgemed.backends.cuda_device import Gpu
from edgemed.errors import BundleError, InvalidInput
from edgemed.kernel_head import FEW, KernelHead, open_head
from edgemed.token_choice import Logits, Numbers
from edgemed.triton_kernels.head_file import write_head
from edgemed.triton_kernels.weights import pack

VOCABULARY, WIDTH, FIRST, BINS = 2100, 32, 64, 100
COORDINATES = {FIRST + k: float(k) for k in range(BINS)}
DIGITS = {7: 0.0, 1500: 1.0, 9: 2.0, 30: 0.0}  # a token each, and one as a byte, too

Mask = npt.NDArray[np.bool_]


def allow(*ids: int) -> Mask:
    mask = np.zeros(VOCABULARY, bool)
    mask[list(ids)] = True
    return mask


def masks(numbers: dict[int, float]) -> list[Mask | None]:
    """Every kind of position: text, some numbers, a few tokens with numbers among them, nothing to choose."""
    text = np.ones(VOCABULARY, bool)
    text[:5] = False
    few = allow(*list(numbers)[1:], 3, 40, 2099)
    return [text, allow(*list(numbers)[:3]), few, None, allow(*numbers), text.copy(), allow(0, 1)]


def state(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, (count, WIDTH)).astype(np.float32)


HEAD = np.random.default_rng(1).normal(0, 0.5, (VOCABULARY, WIDTH)).astype(np.float32)


def from_logits(head: Any, hidden: npt.NDArray[np.float32], asked: list[Mask | None], numbers: dict[int, float]) -> Any:
    """What the loop over whole rows of logits finds."""
    known, rng = Numbers(numbers), np.random.default_rng(0)
    found: list[Any] = []
    for row, allowed in zip(hidden.astype(np.float16).astype(np.float32) @ head.to_float32().T, asked, strict=True):
        if allowed is None:
            found.append(None)
            continue
        token, log_prob = Logits(row).pick(allowed, 0.0, rng)
        found.append((token, log_prob, Logits(row).spread(allowed, known) if token in known else None))
    return found


def check(found: Any, expected: Any) -> None:
    assert [f and f[0] for f in found] == [e and e[0] for e in expected]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert ours[1] == pytest.approx(theirs[1], abs=1e-4)
        assert (ours[2] is None) == (theirs[2] is None)
        assert theirs[2] is None or ours[2] == pytest.approx(theirs[2], abs=2e-3)


@pytest.mark.parametrize("numbers", [COORDINATES, DIGITS], ids=["coordinates", "digits"])
@pytest.mark.parametrize("form", ["fp16", "int8", "fp8"])
def test_the_same_tokens_as_from_logits(form: str, numbers: dict[int, float]) -> None:
    head, asked = pack(HEAD, form), masks(numbers) * 4  # more positions than one launch takes
    hidden = state(len(asked))
    check(choices(ReferenceLauncher(), head, hidden, asked, numbers), from_logits(head, hidden, asked, numbers))


@pytest.mark.parametrize("form", ["fp16", "int8", "fp8"])
def test_the_kernels_themselves_choose_the_same(interpret: Callable[..., Any], form: str) -> None:
    head, asked = pack(HEAD, form), masks(COORDINATES)
    hidden = state(len(asked), 5)
    found = interpret(choices, head, hidden, asked, COORDINATES)
    check(found, from_logits(head, hidden, asked, COORDINATES))


def test_inside_a_box_only_the_rows_of_the_coordinates_are_read() -> None:
    launcher = ReferenceLauncher()
    head, numbers = KernelHead(launcher, pack(HEAD, "int8")), Numbers(COORDINATES)
    head.rows(state(10), [allow(*COORDINATES)] * 10, numbers)
    assert launcher.launched == [("box_head.int8", 8, BINS), ("box_head.int8", 2, BINS)]
    launcher.launched.clear()
    many = allow(*range(FEW + 1))
    head.rows(state(3), [allow(2, 9), allow(9, 11), many], numbers)
    assert launcher.launched == [("box_head.int8", 2, 3), ("masked_argmax.int8", 1, VOCABULARY)]
    launcher.launched.clear()
    head.rows(state(2), [None, None], numbers)
    assert launcher.launched == []


def test_a_position_can_be_asked_again_under_another_mask() -> None:
    head, numbers = KernelHead(ReferenceLauncher(), pack(HEAD, "fp16")), Numbers(COORDINATES)
    everything = np.ones(VOCABULARY, bool)
    (after,) = head.rows(state(1), [everything], numbers)
    assert after is not None
    rng = np.random.default_rng(0)
    best, _ = after.pick(everything, 0.0, rng)
    without = everything.copy()
    without[best] = False
    second, log_prob = after.kept().pick(without, 0.0, rng)
    logits = state(1)[0].astype(np.float16).astype(np.float32) @ pack(HEAD, "fp16").to_float32().T
    assert second == int(np.where(without, logits, -np.inf).argmax()) != best
    assert log_prob < 0


def test_a_logit_that_is_no_number_is_refused() -> None:
    head = KernelHead(ReferenceLauncher(), pack(HEAD, "fp16"))
    with pytest.raises(InvalidInput, match="not finite"):
        head.rows(np.full((1, WIDTH), np.nan, np.float32), [np.ones(VOCABULARY, bool)], Numbers({}))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`gpu(86)`: sessions find a GPU of that compute capability."""

    def there(capability: int) -> None:
        monkeypatch.setattr(kernel_head, "find_gpu", lambda index: Gpu(index, "GPU", capability))
        monkeypatch.setattr(kernel_head, "CubinLauncher", lambda folder, index: ReferenceLauncher())

    return there


def test_a_head_is_opened_for_the_gpu(tmp_path: Path, gpu: Callable[[int], None]) -> None:
    told: list[str] = []
    (tmp_path / "sm_80").mkdir()
    (tmp_path / "sm_89").mkdir()
    gpu(86)
    assert open_head(tmp_path, 0, told.append) is None
    write_head(tmp_path, pack(HEAD, "fp8"))
    opened = open_head(tmp_path, 1, told.append)
    assert opened is not None
    assert opened.format == "int8"
    assert told == ["GPU 1 does not compute in fp8: the LM head is rounded to int8"]
    gpu(89)
    opened = open_head(tmp_path, 1, told.append)
    assert opened is not None
    assert opened.format == "fp8"
    assert len(told) == 1


def test_without_a_kernel_for_this_gpu_the_engine_s_head_is_used(tmp_path: Path, gpu: Callable[[int], None]) -> None:
    gpu(120)
    (tmp_path / "sm_80").mkdir()
    write_head(tmp_path, pack(HEAD, "int8"))
    told: list[str] = []
    assert open_head(tmp_path, 0, told.append) is None
    assert told == [
        "GPU 0: no kernels for compute capability 12.0; compiled are [80]. Run edgemed compile; until then the "
        "engine's own head is used"
    ]
    (tmp_path / "head.int8.scales.npy").unlink()
    with pytest.raises(BundleError):
        open_head(tmp_path, 0, told.append)
