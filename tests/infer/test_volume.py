"""The slice loop: which slices are asked, what becomes one structure, going on after a stop, what it costs."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemed.core import Answer, Mask, Prompt, PromptRegion, Provenance, Region, Scan, Window
from edgemed.dicom.geometry_verdict import Place, Verdict, judge
from edgemed.errors import BackendUnavailable, CannotRead, EdgemedError, InvalidInput
from edgemed.geometry import box_of
from edgemed.infer import InferOptions
from edgemed.report import to_json
from edgemed.report.rle import from_rle
from edgemed.volume import Journal, SliceRun, chosen_slices, question_key, series_to_json, to_answer

ROWS, COLUMNS = 12, 16
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
PROVENANCE = Provenance("0", "f", "b", "0" * 64, "onnxruntime", "CPU", {}, "auto", {}, {})

Truth = dict[int, dict[str, Mask]]


def block(top: int = 2, left: int = 3, height: int = 5, width: int = 6) -> Mask:
    mask = np.zeros((ROWS, COLUMNS), bool)
    mask[top : top + height, left : left + width] = True
    return mask


@dataclass
class Stack:
    """Slices whose pixels hold their number, and what is asked and read of them."""

    count: int
    spacing: float = 2.0
    changed: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    depths: Sequence[float] | None = None
    reads: list[int] = field(default_factory=list)

    @property
    def places(self) -> list[Place]:
        depths = self.depths or [k * self.spacing for k in range(self.count)]
        return [Place(ROWS, COLUMNS, (0.5, 0.5), AXIAL, (0, 0, z)) for z in depths]

    def read(self, index: int) -> Scan:
        self.reads.append(index)
        if index in self.broken:
            raise CannotRead("the file is truncated")
        return Scan(np.full((1, ROWS, COLUMNS), index, np.float32), "CT", Window(40, 400), (0.5, 0.5))

    def path(self, index: int) -> str:
        return f"{index}.dcm"

    def digest(self, index: int) -> str:
        return f"{index}{'*' if index in self.changed else ''}"


@dataclass
class Model:
    """Answers with what `truth` has of a slice; asked about a box, with what `pointed` has of it."""

    truth: Truth
    pointed: Callable[[int, PromptRegion], dict[str, Mask]] = lambda index, region: {}
    asked: list[int] = field(default_factory=list)

    def __call__(self, scan: Scan, prompt: Prompt) -> Answer:
        index = int(scan.pixels[0, 0, 0])
        self.asked.append(index)
        shown = self.pointed(index, prompt.regions[0]) if prompt.regions else self.truth.get(index, {})
        regions = [Region(label, box_of(mask) or (0, 0, 1, 1), 0, mask, 0.9, 0.8) for label, mask in shown.items()]
        return Answer("text", "text", tuple(regions), PROVENANCE)


OPENED = ExitStack()


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    OPENED.close()


def start(stack: Stack, ask: Callable[[Scan, Prompt], Answer], **prompt: Any) -> SliceRun:
    journal = OPENED.enter_context(Journal())
    return OPENED.enter_context(SliceRun(stack, ask, Prompt("Where is the liver?", **prompt), journal))


def run_of(stack: Stack, model: Model, which: str = "all", **prompt: Any) -> SliceRun:
    run = start(stack, model, **prompt)
    run.ask_slices(which)
    return run


def labels(run: SliceRun) -> dict[int, list[str]]:
    return {index: [r["label"] for r in record["regions"]] for index, record in run.answers()}


LIVER = {"liver": block()}


# --- which slices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("middle", [5]),
        ("all", list(range(10))),
        ("every:4", [0, 4, 8]),
        ("every:99", [0]),
        ("0,3,7-9,8", [0, 3, 7, 8, 9]),
        ("auto", None),
    ],
)
def test_slices_are_chosen_by_name_step_or_list(text: str, chosen: list[int] | None) -> None:
    assert chosen_slices(text, 10) == chosen


@pytest.mark.parametrize("text", ["", "every:0", "every:", "first", "3-", "5-3", "10", "-1", "1.5"])
def test_slices_that_are_none_are_wrong_usage(text: str) -> None:
    with pytest.raises(EdgemedError, match="--slices") as caught:
        chosen_slices(text, 10)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(("first", "last"), [(40, 59), (0, 9), (93, 99), (31, 35), (0, 99)])
def test_auto_finds_the_slices_that_show_the_structure(first: int, last: int) -> None:
    model = Model(dict.fromkeys(range(first, last + 1), LIVER))
    run = run_of(Stack(100), model, "auto")
    (found,) = run.structures(judge(Stack(100).places))
    assert found.slices == tuple(range(first, last + 1))
    assert len(model.asked) <= 20 + 8 + (last - first + 1)
    assert len(model.asked) == len(set(model.asked))


def test_auto_finds_both_of_two_and_does_not_ask_all_between() -> None:
    model = Model(dict.fromkeys((*range(10, 17), *range(60, 66)), LIVER))
    run = run_of(Stack(90), model, "auto")
    assert run.structures(judge(Stack(90).places))[0].slices == (*range(10, 17), *range(60, 66))
    assert len(model.asked) <= 18 + 13 + 16


def test_auto_closes_a_hole_on_one_of_the_first_slices_that_it_asks() -> None:
    truth = dict.fromkeys((*range(20, 30), *range(31, 40)), LIVER)
    assert Stack(60).count // 2 not in truth
    run = run_of(Stack(60), Model(truth, lambda index, region: LIVER), "auto")
    assert run.structures(judge(Stack(60).places))[0].slices == tuple(range(20, 40))


def test_auto_says_how_far_it_looked_where_nothing_is() -> None:
    model = Model({})
    run = run_of(Stack(100), model, "auto")
    assert len(model.asked) <= 40
    assert run.notes == [f"nothing was named in {len(model.asked)} of 100 slices; --slices all asks every one"]
    assert run.structures(judge(Stack(100).places)) == []


def test_auto_looks_closer_when_slices_are_far_apart() -> None:
    model = Model({3: LIVER, 4: LIVER})
    assert run_of(Stack(8, spacing=8), model, "auto").asked == list(range(8))


# --- one structure ----------------------------------------------------------------------------------------------------


def test_volume_is_area_times_spacing() -> None:
    run = run_of(Stack(9), Model(dict.fromkeys(range(2, 7), LIVER)))
    (found,) = run.structures(judge(Stack(9).places))
    assert (found.label, found.slices, found.pixels) == ("liver", (2, 3, 4, 5, 6), 150)
    assert found.volume_ml == pytest.approx(150 * 0.25 * 2 / 1000)


def test_a_hole_is_asked_again_with_the_box_between_its_neighbours() -> None:
    boxes: list[tuple[float, ...]] = []

    def pointed(index: int, region: PromptRegion) -> dict[str, Mask]:
        assert region.box is not None
        boxes.append(region.box)
        return {"this region": block(2, 4)}

    truth: Truth = dict.fromkeys(range(8), LIVER) | {3: {}, 4: {"liver": block(2, 5)}}
    run = run_of(Stack(8), Model(truth, pointed))
    assert boxes == [(4.0, 2.0, 10.0, 7.0)]
    record = dict(run.answers())[3]
    assert [r["label"] for r in record["regions"]] == ["liver"]
    assert from_rle(record["regions"][0]["mask"]["rle"]).tolist() == block(2, 4).tolist()
    assert record["notes"] == ["liver: outlined at its place in the neighbouring slices"]


def test_what_comes_back_for_a_hole_must_look_like_its_neighbours() -> None:
    truth: Truth = dict.fromkeys(range(8), LIVER) | {3: {}}
    run = run_of(Stack(8), Model(truth, lambda index, region: {"liver": block(8, 10, 3, 3)}))
    assert labels(run)[3] == []


def test_a_hole_of_three_slices_is_none() -> None:
    model = Model(dict.fromkeys((0, 1, 2, 6, 7, 8), LIVER), lambda index, region: LIVER)
    assert labels(run_of(Stack(9), model))[4] == []


def test_a_family_without_region_prompts_leaves_the_hole() -> None:
    def refuse(index: int, region: PromptRegion) -> dict[str, Mask]:
        raise InvalidInput("regions are not for this family")

    run = run_of(Stack(5), Model(dict.fromkeys((0, 1, 3, 4), LIVER), refuse))
    assert labels(run)[2] == []
    assert run.failed == {}


def test_what_is_seen_in_one_slice_alone_is_left_out() -> None:
    truth: Truth = dict.fromkeys(range(8), LIVER)
    truth[4] = {**LIVER, "spleen": block(8, 11, 3, 3)}
    run = run_of(Stack(8), Model(truth))
    assert labels(run)[4] == ["liver"]
    assert dict(run.answers())[4]["notes"] == ["spleen: left out, seen in this slice alone"]


def test_what_is_seen_in_one_thick_slice_stays() -> None:
    run = run_of(Stack(8, spacing=5.0), Model({4: LIVER}))
    assert labels(run)[4] == ["liver"]


def test_what_is_seen_in_the_outermost_slice_stays() -> None:
    assert labels(run_of(Stack(8), Model({0: LIVER})))[0] == ["liver"]


def test_a_tiny_piece_away_from_the_rest_is_left_out_and_the_rest_stays() -> None:
    with_stray = block()
    with_stray[11, 15] = True
    truth: Truth = dict.fromkeys(range(8), LIVER) | {4: {"liver": with_stray}}
    run = run_of(Stack(8), Model(truth))
    (region,) = dict(run.answers())[4]["regions"]
    assert (region["mask"]["area_px"], region["mask"]["area_mm2"], region["box_px"]) == (30, 7.5, [3, 2, 9, 7])
    assert from_rle(region["mask"]["rle"]).tolist() == block().tolist()


def test_a_small_piece_that_touches_in_the_next_slice_belongs_to_the_rest() -> None:
    corner = block(7, 9, 1, 1)  # touches the block of the slice below over its corner
    truth: Truth = dict.fromkeys(range(8), LIVER) | {8: {"liver": corner}, 9: {"liver": corner}}
    assert labels(run_of(Stack(12), Model(truth)))[9] == ["liver"]


def test_findings_follow_the_regions_that_stay() -> None:
    from edgemed.core import Finding

    model = Model(dict.fromkeys(range(6), LIVER) | {3: {"spleen": block(8, 11, 3, 3), **LIVER}})

    def ask(scan: Scan, prompt: Prompt) -> Answer:
        answer = model(scan, prompt)
        return replace(answer, findings=(Finding("all", tuple(range(len(answer.regions)))),))

    run = start(Stack(6), ask)
    run.ask_slices("all")
    record = dict(run.answers())[3]
    assert ([r["label"] for r in record["regions"]], record["findings"][0]["regions"]) == (["liver"], [0])


def test_nothing_is_left_out_where_slices_were_skipped() -> None:
    assert labels(run_of(Stack(20), Model({8: LIVER}), "every:4"))[8] == ["liver"]


# --- volumes that mean something --------------------------------------------------------------------------------------


def summary(run: SliceRun, stack: Stack, verdict: Verdict | None = None, **more: Any) -> dict[str, Any]:
    return series_to_json(run, verdict or judge(stack.places), Prompt("Where is the liver?"), **more)


def test_slices_that_are_not_even_have_no_volume_unless_asked_for() -> None:
    stack = Stack(5, depths=[0, 2, 4, 10, 12])
    run = run_of(stack, Model(dict.fromkeys(range(5), LIVER)))
    refused = summary(run, stack)
    assert refused["verdict"]["kind"] == "gaps"
    assert refused["structures"][0]["volume_ml"] is None
    assert "--resample" in refused["notes"][0]
    given = summary(run, stack, resample=True)
    slabs = 2 + 2 + 4 + 4 + 2
    assert given["structures"][0]["volume_ml"] == pytest.approx(30 * 0.25 * slabs / 1000, abs=1e-3)
    assert "linearly" in given["notes"][0]


@pytest.mark.parametrize("which", ["every:2", "0-4", "middle"])
def test_some_slices_have_no_volume(which: str) -> None:
    stack = Stack(9)
    told = summary(run_of(stack, Model(dict.fromkeys(range(9), LIVER)), which), stack)
    assert told["structures"][0]["volume_ml"] is None
    assert told["notes"] == ["no volumes: not every slice was asked; pass --slices all or auto"]


def test_one_slice_has_no_volume() -> None:
    stack = Stack(1)
    told = summary(run_of(stack, Model({0: LIVER})), stack)
    assert (told["verdict"]["kind"], told["structures"][0]["volume_ml"]) == ("single", None)
    assert told["notes"] == ["no volumes: single"]


def test_boxes_without_masks_have_no_volume() -> None:
    def ask(scan: Scan, prompt: Prompt) -> Answer:
        return Answer("", "", (Region("liver", (1, 1, 5, 5)),), PROVENANCE)

    stack = Stack(4)
    run = start(stack, ask)
    run.ask_slices("all")
    assert summary(run, stack)["structures"][0] == {
        "label": "liver",
        "slices": [0, 1, 2, 3],
        "pixels": 0,
        "volume_ml": None,
    }


def test_a_slice_that_failed_is_told_and_leaves_no_volume() -> None:
    stack = Stack(6, broken={3})
    run = run_of(stack, Model(dict.fromkeys(range(6), LIVER)))
    told = summary(run, stack)
    assert told["failed"] == [{"slice": 3, "name": "CannotRead", "code": 20, "message": "the file is truncated"}]
    assert (told["asked"], told["structures"][0]["volume_ml"]) == ([0, 1, 2, 4, 5], None)


def test_the_first_error_is_raised_if_every_slice_failed() -> None:
    with pytest.raises(CannotRead, match="truncated"):
        run_of(Stack(3, broken={0, 1, 2}), Model({}))


def test_what_the_next_slice_would_end_in_too_ends_the_run() -> None:
    def ask(scan: Scan, prompt: Prompt) -> Answer:
        raise BackendUnavailable("no onnxruntime")

    with pytest.raises(BackendUnavailable):
        start(Stack(3), ask).ask_slices("all")


# --- regions that are carried -----------------------------------------------------------------------------------------


def drifting(index: int, region: PromptRegion) -> dict[str, Mask]:
    """Slices 3 to 8 show the liver, one pixel further each; the ones beyond something else."""
    return {"liver" if 3 <= index <= 8 else "stomach": block(2, index)}


def test_a_region_is_carried_both_ways_until_the_name_changes() -> None:
    model = Model({}, drifting)
    stack = Stack(12)
    box = PromptRegion("box", box=(5, 2, 11, 7))
    run = run_of(stack, model, "auto", regions=(box,), frame=5)
    (found,) = run.structures(judge(stack.places))
    assert (found.label, found.slices) == ("liver", (3, 4, 5, 6, 7, 8))
    assert sorted(model.asked) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert found.volume_ml is not None


def test_a_region_is_carried_only_over_the_slices_that_were_chosen() -> None:
    box = PromptRegion("box", box=(5, 2, 11, 7))
    assert run_of(Stack(12), Model({}, drifting), "4-6", regions=(box,), frame=5).asked == [4, 5, 6]


def test_a_region_on_a_slice_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match="slices 0 to 3"):
        run_of(Stack(4), Model({}), "auto", regions=(PromptRegion("point", point=(1, 1)),), frame=7)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_run_that_was_left_goes_on(tmp_path: Path) -> None:
    truth: Truth = dict.fromkeys(range(6), LIVER)
    path = tmp_path / "s.jsonl"

    class Stopped(Model):
        def __call__(self, scan: Scan, prompt: Prompt) -> Answer:
            if len(self.asked) == 3:
                raise KeyboardInterrupt
            return super().__call__(scan, prompt)

    with (
        Journal(path, "k") as journal,
        SliceRun(Stack(6), Stopped(truth), Prompt("?"), journal) as run,
        pytest.raises(KeyboardInterrupt),
    ):
        run.ask_slices("all")
    with path.open("ab") as file:
        file.write(b'{"slice":3,"sha25')  # a line that was not finished
    model, stack = Model(truth), Stack(6)
    with Journal(path, "k") as journal, SliceRun(stack, model, Prompt("?"), journal) as run:
        run.ask_slices("all")
        assert (model.asked, stack.reads, run.asked_now) == ([3, 4, 5], [3, 4, 5], 3)
        assert run.structures(judge(stack.places))[0].slices == tuple(range(6))
    assert [json.loads(line).get("slice") for line in path.read_bytes().splitlines()] == [None, 0, 1, 2, 3, 4, 5]


def test_another_question_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    for key, expected in (("a", 4), ("a", 0), ("b", 4)):
        model = Model({})
        with Journal(path, key) as journal, SliceRun(Stack(4), model, Prompt("?"), journal) as run:
            run.ask_slices("all")
        assert len(model.asked) == expected


def test_a_slice_whose_file_changed_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    for changed, expected in ((set[int](), [0, 1, 2]), ({1}, [1])):
        model = Model({})
        stack = Stack(3, changed=changed)
        with Journal(path, "k") as journal, SliceRun(stack, model, Prompt("?"), journal) as run:
            run.ask_slices("all")
        assert model.asked == expected


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text("notes of mine\n")
    with pytest.raises(InvalidInput, match="no journal"):
        Journal(path, "k")
    assert path.read_text() == "notes of mine\n"


def test_the_key_tells_questions_apart() -> None:
    prompt, options = Prompt("Where is the liver?"), InferOptions()
    keys = {
        question_key(prompt, options, {"bundle": "1"}),
        question_key(prompt, options, {"bundle": "2"}),
        question_key(replace(prompt, text="Where is the spleen?"), options, {"bundle": "1"}),
        question_key(replace(prompt, language="zh"), options, {"bundle": "1"}),
        question_key(replace(prompt, regions=(PromptRegion("mask", mask=block()),)), options, {"bundle": "1"}),
        question_key(prompt, InferOptions(seed=1), {"bundle": "1"}),
    }
    assert len(keys) == 6
    assert question_key(prompt, options, {"bundle": "1"}) in keys


def test_progress_is_told_after_each_slice() -> None:
    told: list[tuple[int, int]] = []
    run = start(Stack(4), Model({}))
    run.ask_slices("all", lambda done, total: told.append((done, total)))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


# --- results ----------------------------------------------------------------------------------------------------------


def test_an_answer_comes_back_from_its_record() -> None:
    run = run_of(Stack(3), Model({1: LIVER}), "1")
    ((_, record),) = run.answers()
    answer = to_answer(record)
    assert answer.provenance == PROVENANCE
    (region,) = answer.regions
    assert (region.label, region.box, region.score, region.iou_estimate) == ("liver", (3, 2, 9, 7), 0.9, 0.8)
    assert region.mask is not None
    assert region.mask.tolist() == block().tolist()
    scan = Stack(3).read(1)
    assert to_json(answer, scan, Prompt("Where is the liver?"), path="1.dcm") == record


def test_the_summary_names_its_schema_and_what_is_known_of_the_series() -> None:
    stack = Stack(3)
    told = summary(run_of(stack, Model(dict.fromkeys(range(3), LIVER))), stack, series_instance_uid="1.2", slices=3)
    assert (told["schema"], told["series_instance_uid"], told["slices"]) == ("edgemed.series/1", "1.2", 3)
    assert told["verdict"] == {"kind": "uniform", "reasons": [], "spacing_mm": [2.0, 0.5, 0.5]}
    json.dumps(told)


def test_memory_stays_flat_over_a_thousand_slices() -> None:
    """What is kept of a slice is under 2 kB, 64 times less than its mask: no mask, no scan."""
    rows = columns = 256
    mask = np.zeros((rows, columns), bool)
    mask[40:200, 40:200] = True

    class Large(Stack):
        def read(self, index: int) -> Scan:
            return Scan(np.full((1, rows, columns), index, np.float32), "CT", Window(40, 400), (0.5, 0.5))

    held: list[int] = []

    def progress(done: int, total: int) -> None:
        if done in (100, 1000):
            held.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    run = start(Large(1000), Model({k: {"liver": mask} for k in range(1000)}))
    run.ask_slices("all", progress)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (held[-1] - held[0]) / 900 < 2000
    assert peak < 40 << 20
    assert len(run.asked) == 1000
