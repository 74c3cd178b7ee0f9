"""What a prompt has in common with the one before is not read again, and the answer is the same, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from edgemed.decoder_calls import IMAGE_RUN, Calls, PromptCache
from edgemed.graphs import Feeds

VOCABULARY = 50
IMAGE = list(range(VOCABULARY, VOCABULARY + IMAGE_RUN))
OTHER = list(range(VOCABULARY + IMAGE_RUN, VOCABULARY + 2 * IMAGE_RUN))
ROWS = np.arange(2 * IMAGE_RUN * 3, dtype=np.float32).reshape(-1, 3)


class Recorder:
    """Remembers (past, ids) of each call; raises while `breaks`."""

    backend = device = "none"

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int]]] = []
        self.breaks = False

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        if self.breaks:
            raise RuntimeError("no memory")
        self.calls.append((int(feeds["past_length"][0]), feeds["input_ids"][0].tolist()))
        return {}

    def reset(self) -> None: ...

    def close(self) -> None: ...


def read(runner: Recorder, prompts: PromptCache, ids: list[int], rows: np.ndarray = ROWS) -> tuple[int, Calls]:
    runner.calls.clear()
    calls = Calls(runner, {"image_tokens": rows})
    return calls.read_images(ids, VOCABULARY, prompts), calls


def test_an_image_is_read_once_for_several_questions() -> None:
    runner, prompts = Recorder(), PromptCache()
    held, calls = read(runner, prompts, [1, *IMAGE, 2, 3])
    assert runner.calls == [(0, [1, *IMAGE])]
    assert (held, calls.past, calls.count) == (0, 1 + IMAGE_RUN, 0)
    held, calls = read(runner, prompts, [1, *IMAGE, 4])
    assert runner.calls == []
    assert (held, calls.past, calls.count) == (1 + IMAGE_RUN, 1 + IMAGE_RUN, 0)


def test_each_image_is_a_piece_and_the_first_ones_stay() -> None:
    runner, prompts = Recorder(), PromptCache()
    read(runner, prompts, [1, *IMAGE, 2, *OTHER, 3])
    assert runner.calls == [(0, [1, *IMAGE]), (1 + IMAGE_RUN, [2, *OTHER])]
    held, _ = read(runner, prompts, [1, *IMAGE, 5, *OTHER, 3])
    assert held == 1 + IMAGE_RUN
    assert runner.calls == [(1 + IMAGE_RUN, [5, *OTHER])]
    held, _ = read(runner, prompts, [1, *IMAGE, 5])
    assert (held, runner.calls) == (1 + IMAGE_RUN, [])
    held, _ = read(runner, prompts, [1, *IMAGE, 5, *OTHER, 3])
    assert held == 1 + IMAGE_RUN  # what was after it was written over
    assert len(runner.calls) == 1


@pytest.mark.parametrize("change", ["a row", "the text before", "the order of rows"])
def test_another_beginning_is_read_again(change: str) -> None:
    runner, prompts = Recorder(), PromptCache()
    read(runner, prompts, [1, *IMAGE, 2])
    rows = ROWS.copy()
    if change == "a row":
        rows[3, 1] += 1e-6
        assert rows[3, 1] != ROWS[3, 1]
    ids = [9 if change == "the text before" else 1, *(IMAGE[::-1] if "order" in change else IMAGE), 2]
    held, _ = read(runner, prompts, ids, rows)
    assert held == 0
    assert runner.calls == [(0, ids[:-1])]


def test_rows_of_another_image_do_not_matter() -> None:
    runner, prompts = Recorder(), PromptCache()
    read(runner, prompts, [1, *IMAGE, 2])
    held, _ = read(runner, prompts, [1, *IMAGE, 2], np.concatenate([ROWS[:IMAGE_RUN], ROWS[IMAGE_RUN:] + 1]))
    assert held == 1 + IMAGE_RUN


def test_the_last_token_is_never_read_ahead_and_a_region_is_no_image() -> None:
    runner, prompts = Recorder(), PromptCache()
    assert read(runner, prompts, [1, *IMAGE])[1].past == 0
    assert read(runner, prompts, [1, *IMAGE[1:], 2])[1].past == 0
    assert runner.calls == []


def test_a_call_that_fails_is_not_taken_as_read() -> None:
    runner, prompts = Recorder(), PromptCache()
    read(runner, prompts, [1, *IMAGE, 2])
    runner.breaks = True
    with pytest.raises(RuntimeError):
        read(runner, prompts, [7, *IMAGE, 2])
    runner.breaks = False
    assert read(runner, prompts, [1, *IMAGE, 2])[0] == 0
    prompts.forget()
    assert read(runner, prompts, [1, *IMAGE, 2])[0] == 0
