"""The native family between graphs: feeds, mask prompts and answers, with what was decoded made by the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgemed.box_grammar import BoxGrammar, FreeGrammar
from edgemed.bundle import Bundle, write_bundle
from edgemed.core import Language, Prompt, PromptRegion, Scan, Window
from edgemed.errors import BundleError, InvalidInput
from edgemed.families import Family, Prepared, Written, open_family
from edgemed.families.native import NOTICE, Native
from edgemed.families.native_lexicon import STRUCTURES, structure_of
from edgemed.families.native_text import NativeText
from edgemed.geometry import bins_to_box, box_of
from edgemed.graphs import Feeds

Bins = tuple[int, int, int, int]

TWO = (
    "A <ref>liver</ref><box><c100><c200><c500><c600></box><seg> and "
    "<ref>spleen</ref><box><c10><c20><c30><c40></box><seg>"
)
ONE = "It is <ref>liver</ref><box><c100><c200><c500><c600></box><seg>."


@pytest.fixture(scope="module")
def bundle(tiny_native: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made: Bundle = tiny_native.make(tmp_path_factory.mktemp("native") / "b", ONE)
    return made


@pytest.fixture(scope="module")
def family(bundle: Bundle) -> Family:
    return open_family(bundle)


@pytest.fixture(scope="module")
def text(bundle: Bundle) -> NativeText:
    return NativeText(bundle.file("tokenizer/tokenizer.json"))


def scan(modality: str = "DX") -> Scan:
    """A scan of 512 x 512: a whole-frame view of scale 0.5, so that bin b is scan pixel 0.512 b."""
    pixels = np.full((1, 512, 512), -1000, np.float32)
    pixels[:, 100:300, 150:350] = 80
    return Scan(pixels, modality, Window(40, 400))


def projected(seen: Mapping[str, Bins] | None = None, presence: float = 0.9) -> Feeds:
    """What the projector gives: every structure is there with an empty box, those in `seen` with theirs."""
    boxes = np.zeros((len(STRUCTURES), 4), np.float32)
    for name, bins in (seen or {}).items():
        boxes[structure_of(name)] = bins_to_box(bins, 256)
    return {
        "image_tokens": np.ones((6, 8), np.float32),
        "region_tokens": np.full((1, 8), 2, np.float32),
        "presence": np.full(len(STRUCTURES), presence, np.float32),
        "boxes": boxes,
        "structure_maps": np.zeros((len(STRUCTURES), 64, 64), np.float32),
    }


def choices(grammar: Any, text: NativeText, name: str) -> set[Bins] | None:
    """The boxes that may stand after a name; None where the choice is free."""
    assert isinstance(grammar, BoxGrammar)
    t = text.tokens()
    state = grammar.start()
    for token in (t.ref, *text.encode_name(name), t.ref_end, t.box):
        state = grammar.advance(state, token)
    if grammar.allowed(state).sum() == t.bins - 1:
        return None
    open_boxes: list[tuple[tuple[int, ...], Any]] = [((), state)]
    for _ in range(4):
        open_boxes = [
            ((*bins, int(token) - t.first_coordinate), grammar.advance(state, int(token)))
            for bins, state in open_boxes
            for token in np.flatnonzero(grammar.allowed(state))
        ]
    return {(bins[0], bins[1], bins[2], bins[3]) for bins, _ in open_boxes}


def written(text: NativeText, tagged: str, log_prob: float = -0.1, **changes: Any) -> Written:
    ids = text.encode_answer(tagged)[:-1]
    seg = text.tokens().seg
    hidden = {i: np.full(8, i, np.float32) for i, token in enumerate(ids) if token == seg}
    return Written(**{"ids": ids, "log_probs": [log_prob] * len(ids), "hidden": hidden, **changes})


def ask(family: Family, prompt: Prompt, on: Scan | None = None) -> Prepared:
    return family.prepare([on or scan()], prompt)


def masks_of(feeds: tuple[Feeds, ...]) -> list[Feeds]:
    """The mask decoder of the test: inside is the box it was given, or nothing."""
    outputs = []
    for batch in feeds:
        centres = np.arange(256) + 0.5
        logits = np.full((len(batch["boxes"]), 256, 256), -3, np.float32)
        for row, (x0, y0, x1, y1) in zip(logits, batch["boxes"], strict=True):
            row[np.ix_((centres > y0) & (centres < y1), (centres > x0) & (centres < x1))] = 3
        outputs.append({"mask_logits": logits, "iou": np.full(len(logits), 0.7, np.float32)})
    return outputs


def read(
    family: Family, prompt: Prompt, answer: Written, on: Scan | None = None, proposals: Feeds | None = None
) -> Any:
    on = on or scan()
    prepared = family.prepare([on], prompt)
    seen = projected() if proposals is None else proposals
    feeds = family.mask_feeds(prompt, prepared, seen, answer)
    return family.read_answer([on], prompt, prepared, seen, answer, masks_of(feeds))


def sure(proposals: Feeds, name: str, probability: float, spread: float) -> Feeds:
    """The projector's outputs with how sure it is of the sides of one box."""
    sides = np.zeros((2, len(STRUCTURES), 4), np.float32)
    sides[0, structure_of(name)], sides[1, structure_of(name)] = probability, spread
    return {**proposals, "side_probability": sides[0], "side_spread": sides[1]}


def test_prepare_gives_the_feeds_of_the_first_graphs(family: Family) -> None:
    prepared = ask(family, Prompt("hello"))
    assert {n: a.shape for n, a in prepared.vision.items()} == {"image": (1, 3, 256, 256)}
    assert prepared.projector["region_maps"].shape == (1, 64, 64)
    family.graphs()["vision_encoder"].check(prepared.vision)


def test_region_outside_the_body_makes_the_model_look_at_the_whole_frame(family: Family) -> None:
    inside = PromptRegion("point", point=(250, 200))
    outside = PromptRegion("box", box=(5, 5, 40, 40))
    assert ask(family, Prompt("x", (inside,)), scan("CT")).state.left > 100
    assert ask(family, Prompt("x", (inside, outside)), scan("CT")).state.left == 0


def test_too_many_regions_or_a_frame_that_was_not_read_are_refused(family: Family) -> None:
    region = PromptRegion("point", point=(5, 5))
    with pytest.raises(InvalidInput, match="5 regions; at most 4"):
        ask(family, Prompt("x", (region,) * 5))
    with pytest.raises(InvalidInput, match="frame 3"):
        ask(family, Prompt("x", frame=3))
    with pytest.raises(InvalidInput, match="outside the scan"):
        ask(family, Prompt("x", (PromptRegion("point", point=(5, 900)),)))


def test_question_has_image_rows_region_rows_and_the_region_as_bins(family: Family, text: NativeText) -> None:
    prompt = Prompt("what is <region>?", (PromptRegion("box", box=(0, 51.2, 256, 512)),))
    question = family.ask(prompt, ask(family, prompt), projected())
    ids, first = list(question.prompt_ids), text.tokens().first_coordinate
    assert ids[:8] == [text.tokens().bos, *range(text.vocabulary, text.vocabulary + 6), text.tokens().user]
    at = ids.index(text.vocabulary + 6)
    assert ids[at + 1 : at + 7] == [
        text.tokens().box, first, first + 100, first + 500, first + 999, text.tokens().box_end,
    ]  # fmt: skip
    assert question.fixed["image_tokens"].shape == (7, 8)
    assert question.eos_id == text.tokens().eos
    assert question.keep_hidden == {text.tokens().seg}
    plain = family.ask(Prompt("hi"), ask(family, Prompt("hi")), projected(), constrained=False)
    assert plain.fixed["image_tokens"].shape == (6, 8)
    assert isinstance(plain.grammar, FreeGrammar)


@pytest.mark.parametrize(("language", "name"), [("en", "liver"), ("zh", "肝脏")])
def test_visible_structure_has_the_proposed_box_or_the_users(
    family: Family, text: NativeText, language: Language, name: str
) -> None:
    seen = projected({"liver": (100, 200, 500, 600)}, presence=0.5)
    alone = Prompt("where", language=language)
    question = family.ask(alone, ask(family, alone), seen)
    assert choices(question.grammar, text, name) == {(100, 200, 500, 600)}
    pointed = Prompt("what is <region>?", (PromptRegion("box", box=(0, 51.2, 256, 512)),), language)
    question = family.ask(pointed, ask(family, pointed), seen)
    assert choices(question.grammar, text, name) == {(100, 200, 500, 600), (0, 100, 500, 999)}


def test_structure_that_is_not_proposed_has_the_users_box_and_an_unknown_name_a_free_one(
    family: Family, text: NativeText
) -> None:
    prompt = Prompt("what is <region>?", (PromptRegion("box", box=(0, 51.2, 256, 512)),))
    seen = projected({"liver": (100, 200, 500, 600)})
    seen["presence"][structure_of("spleen")] = 0.49
    grammar = family.ask(prompt, ask(family, prompt), seen).grammar
    assert choices(grammar, text, "liver") is not None
    assert choices(grammar, text, "spleen") == {(0, 100, 500, 999)}
    assert choices(grammar, text, "marked region") is None


def test_boxes_of_one_image_do_not_stay_for_the_next(family: Family, text: NativeText) -> None:
    prompt = Prompt("where")
    for bins in ((100, 200, 500, 600), (10, 20, 30, 40)):
        grammar = family.ask(prompt, ask(family, prompt), projected({"liver": bins})).grammar
        assert choices(grammar, text, "liver") == {bins}


@pytest.mark.parametrize(("language", "name"), [("en", "liver"), ("zh", "肝脏")])
def test_structure_that_is_not_proposed_is_refused_unless_a_region_was_drawn(
    family: Family, text: NativeText, language: Language, name: str
) -> None:
    def refuses(prompt: Prompt, presence: float) -> bool:
        grammar = family.ask(prompt, ask(family, prompt), projected(presence=presence)).grammar
        state = grammar.start()
        for token in (text.tokens().ref, *text.encode_name(name), text.tokens().ref_end):
            state = grammar.advance(state, token)
        return grammar.refuses(state)

    assert refuses(Prompt("where", language=language), 0.49)
    assert not refuses(Prompt("where", language=language), 0.5)
    assert not refuses(Prompt("this", (PromptRegion("point", point=(250, 200)),), language), 0.49)


@pytest.mark.parametrize(
    ("question", "language", "allowed"),
    [
        ("Is the liver visible?", "en", "Yes"),
        ("Are the liver and the spleen visible?", "en", "YesNo"),
        ("Is the spleen visible?", "en", "No"),
        ("能看到肝脏吗？", "zh", "是"),
        ("能看到脾脏吗？", "zh", "否"),
        ("Which modality is this?", "en", "YesNo"),
    ],
)
def test_an_answer_does_not_begin_against_what_is_seen(
    family: Family, text: NativeText, question: str, language: Language, allowed: str
) -> None:
    seen = projected()
    seen["presence"][structure_of("spleen")] = 0.49
    words = {word: text.encode_answer(word)[0] for word in (("Yes", "No") if language == "en" else ("是", "否"))}
    prompt = Prompt(question, language=language)
    grammar = family.ask(prompt, ask(family, prompt), seen).grammar
    may = grammar.allowed(grammar.start())
    assert "".join(word for word, token in words.items() if may[token]) == allowed
    pointed = Prompt(question, (PromptRegion("point", point=(250, 200)),), language)
    grammar = family.ask(pointed, ask(family, pointed), seen).grammar
    assert grammar.allowed(grammar.start())[list(words.values())].all()


@pytest.mark.parametrize(
    ("question", "language", "chinese"),
    [
        ("hello", "en", False),
        ("hello", "zh", True),
        ("Where is the liver? Answer in Chinese.", "en", True),
        ("肝脏在哪里？请用英文回答。", "zh", False),
    ],
)
def test_only_a_chinese_answer_holds_chinese(
    family: Family, text: NativeText, question: str, language: Language, chinese: bool
) -> None:
    prompt = Prompt(question, language=language)
    grammar = family.ask(prompt, ask(family, prompt), projected()).grammar
    state = grammar.advance(grammar.start(), text.encode_answer("a")[0])
    assert grammar.allowed(state)[text.encode_answer("肝")[0]] == chinese
    assert grammar.allowed(state)[text.encode_answer("l")[0]]


def test_every_seg_becomes_a_mask_prompt_in_batches_of_the_graph(family: Family, text: NativeText) -> None:
    prompt = Prompt("segment")
    answer = written(text, TWO + " and <ref>aorta</ref><box><c1><c2><c3><c4></box><seg>")
    feeds = family.mask_feeds(prompt, ask(family, prompt), projected(), answer)
    assert [len(f["boxes"]) for f in feeds] == [2, 1]
    np.testing.assert_allclose(feeds[0]["boxes"][0], [25.6, 51.2, 128, 153.6], rtol=1e-6)
    assert feeds[0]["has_box"].tolist() == feeds[0]["has_seg"].tolist() == [1, 1]
    assert feeds[0]["point_labels"].tolist() == [[-1], [-1]]
    assert feeds[0]["seg_hidden"][:, 0].tolist() == [i for i, t in enumerate(answer.ids) if t == text.tokens().seg][:2]
    full = {**feeds[0], "image_features": np.zeros((1, 3, 64, 64), np.float32)}
    family.graphs()["mask_decoder"].check(full)


def test_answer_without_seg_asks_for_no_mask(family: Family, text: NativeText) -> None:
    prompt = Prompt("where")
    answer = written(text, "<ref>liver</ref><box><c100><c200><c500><c600></box>")
    assert family.mask_feeds(prompt, ask(family, prompt), projected(), answer) == ()
    reading = read(family, prompt, answer)
    assert reading.regions[0].mask is None
    assert reading.regions[0].iou_estimate is None


def test_users_point_goes_to_the_mask_decoder_alone(family: Family, text: NativeText) -> None:
    inside = Prompt("this", (PromptRegion("point", point=(100, 200)),))
    (feeds,) = family.mask_feeds(inside, ask(family, inside), projected(), written(text, ONE))
    assert feeds["points"].tolist() == [[[50, 100]]]
    assert feeds["point_labels"].tolist() == [[1]]
    assert feeds["has_box"].tolist() == [0]
    assert feeds["has_seg"].tolist() == [0]
    outside = Prompt("this", (PromptRegion("point", point=(500, 500)),))
    (feeds,) = family.mask_feeds(outside, ask(family, outside), projected(), written(text, ONE))
    assert feeds["has_box"].tolist() == [0]
    assert feeds["point_labels"].tolist() == [[1]]


def test_point_brings_the_map_of_what_is_seen_there(family: Family, text: NativeText) -> None:
    seen = projected()
    seen["structure_maps"][3, 20:30, 10:20] = 0.9  # model pixels 40..80 across, 80..120 down
    inside = Prompt("this", (PromptRegion("point", point=(100, 200)),))
    (feeds,) = family.mask_feeds(inside, ask(family, inside), seen, written(text, ONE))
    assert feeds["has_mask"].tolist() == [1]
    assert feeds["mask_prompts"][0, 100, 60] == pytest.approx(np.log(0.9 / 0.1), abs=1e-3)
    assert feeds["mask_prompts"][0, 100, 100] == -10
    outside = Prompt("this", (PromptRegion("point", point=(300, 200)),))
    (feeds,) = family.mask_feeds(outside, ask(family, outside), seen, written(text, ONE))
    assert feeds["has_mask"].tolist() == [0]


def test_written_structure_brings_its_map_where_it_shows(family: Family, text: NativeText) -> None:
    seen = projected()
    seen["structure_maps"][structure_of("liver"), 20:30, 10:20] = 0.9
    seen["structure_maps"][structure_of("spleen"), 20:30, 10:20] = 0.4
    prompt = Prompt("segment")
    (feeds,) = family.mask_feeds(prompt, ask(family, prompt), seen, written(text, TWO))
    assert feeds["has_mask"].tolist() == [1, 0]
    assert feeds["mask_prompts"][0, 100, 60] > 2
    assert feeds["has_box"].tolist() == feeds["has_seg"].tolist() == [1, 1]


def test_users_box_replaces_the_written_one(family: Family, text: NativeText) -> None:
    same = Prompt("this", (PromptRegion("box", box=(50, 100, 260, 300)),))
    (feeds,) = family.mask_feeds(same, ask(family, same), projected(), written(text, ONE))
    np.testing.assert_allclose(feeds["boxes"][0], [25, 50, 130, 150])
    other = Prompt("this", (PromptRegion("box", box=(400, 400, 500, 500)),))
    (feeds,) = family.mask_feeds(other, ask(family, other), projected(), written(text, ONE))
    np.testing.assert_allclose(feeds["boxes"][0], [200, 200, 250, 250])
    (feeds,) = family.mask_feeds(same, ask(family, same), projected(), written(text, TWO))
    np.testing.assert_allclose(feeds["boxes"][0], [25.6, 51.2, 128, 153.6], rtol=1e-6)


def test_users_mask_goes_in_as_logits(family: Family, text: NativeText) -> None:
    mask = np.zeros((512, 512), np.bool_)
    mask[110:300, 60:250] = True
    prompt = Prompt("this", (PromptRegion("mask", mask=mask),))
    (feeds,) = family.mask_feeds(prompt, ask(family, prompt), projected(), written(text, ONE))
    assert feeds["has_mask"].tolist() == [1]
    assert feeds["mask_prompts"][0, 100, 100] == 10
    assert feeds["mask_prompts"][0, 0, 0] == -10
    np.testing.assert_allclose(feeds["boxes"][0], [30, 55, 125, 150])


def test_places_come_back_in_scan_pixels(family: Family, text: NativeText) -> None:
    reading = read(family, Prompt("where"), written(text, TWO))
    assert reading.text == "A liver and spleen"
    assert reading.tagged_text == TWO
    assert reading.notes == ()
    liver, spleen = reading.regions
    assert (liver.label, spleen.label) == ("liver", "spleen")
    assert liver.box == pytest.approx((51.2, 102.4, 256, 307.2))
    assert box_of(liver.mask) == pytest.approx((51.2, 102.4, 256, 307.2), abs=1.5)
    assert liver.mask.shape == (512, 512)
    assert liver.iou_estimate == pytest.approx(0.7)


def test_crop_moves_boxes_and_masks_back(family: Family, text: NativeText) -> None:
    prompt = Prompt("where")
    view = family.prepare([scan("CT")], prompt).state
    reading = read(family, prompt, written(text, ONE), scan("CT"))
    expected = view.box_to_scan((25.6, 51.2, 128.0, 153.6))
    assert view.left > 100
    assert reading.regions[0].box == pytest.approx(expected)
    assert box_of(reading.regions[0].mask) == pytest.approx(expected, abs=1.5)


def test_mask_pixels_far_from_the_box_are_strays(family: Family, text: NativeText) -> None:
    prompt, answer = Prompt("where"), written(text, ONE)
    everything = [{"mask_logits": np.ones((1, 256, 256), np.float32), "iou": np.ones(1, np.float32)}]
    reading = family.read_answer([scan()], prompt, ask(family, prompt), projected(), answer, everything)
    x0, y0, x1, y1 = box_of(reading.regions[0].mask) or (0, 0, 0, 0)
    assert (x0, y0, x1, y1) == pytest.approx((51.2 - 30.7, 102.4 - 30.7, 256 + 30.7, 307.2 + 30.7), abs=1)


def test_point_outside_the_written_box_keeps_its_mask(family: Family, text: NativeText) -> None:
    logits = np.full((1, 256, 256), -3, np.float32)
    logits[0, 240:256, 236:252] = 3  # far from the written box, around the point
    out = [{"mask_logits": logits, "iou": np.full(1, 0.7, np.float32)}]
    pointed, alone = Prompt("this", (PromptRegion("point", point=(490, 500)),)), Prompt("where")
    answer = written(text, ONE)
    (region,) = family.read_answer([scan()], pointed, ask(family, pointed), projected(), answer, out).regions
    assert region.mask is not None
    assert box_of(region.mask) == pytest.approx((472, 480, 504, 512), abs=1)
    assert region.iou_estimate == pytest.approx(0.7)
    (region,) = family.read_answer([scan()], alone, ask(family, alone), projected(), answer, out).regions
    assert region.mask is None  # what nobody pointed at is cut to the written box


def test_empty_mask_leaves_the_box(family: Family, text: NativeText) -> None:
    prompt, answer = Prompt("where"), written(text, ONE)
    nothing = [{"mask_logits": -np.ones((1, 256, 256), np.float32), "iou": np.ones(1, np.float32)}]
    (region,) = family.read_answer([scan()], prompt, ask(family, prompt), projected(), answer, nothing).regions
    assert region.mask is None
    assert region.iou_estimate is None


def test_the_sides_of_a_box_of_its_own_are_as_sure_as_its_tokens(family: Family, text: NativeText) -> None:
    ids = text.encode_answer(ONE)[:-1]
    spreads = [float(i) if text.tokens().first_coordinate <= token else None for i, token in enumerate(ids)]
    answer = written(text, ONE, log_prob=np.log(0.5), spreads=spreads)
    (region,) = read(family, Prompt("where"), answer).regions
    assert region.score == pytest.approx(0.5, rel=1e-5)
    assert region.sides is not None
    at = ids.index(text.tokens().box) + 1
    for i, side in enumerate(region.sides):
        assert side.probability == pytest.approx(0.5)
        assert side.spread_px == pytest.approx((at + i) * 0.512)  # a bin is 0.512 pixels of the scan
    (odd,) = read(family, Prompt("where"), written(text, ONE, log_prob=float("nan"))).regions
    assert odd.score == pytest.approx(1e-4)


def test_the_sides_of_a_proposed_box_are_as_sure_as_the_projector(family: Family, text: NativeText) -> None:
    proposals = sure(projected({"liver": (100, 200, 500, 600)}), "liver", 0.81, 3.0)
    (region,) = read(family, Prompt("where"), written(text, ONE, log_prob=0.0), proposals=proposals).regions
    assert [s.probability for s in region.sides] == pytest.approx([0.81] * 4)
    assert [s.spread_px for s in region.sides] == pytest.approx([6.0] * 4)  # a model pixel is two of the scan
    assert region.score == pytest.approx(0.81)


def test_a_bundle_that_knows_how_sure_it_is_says_so(
    bundle: Bundle, text: NativeText, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**bundle.manifest.settings, "box_confidence": {"slope": 2.0, "offset": -0.5}}
    calibrated = open_family(replace(bundle, manifest=replace(bundle.manifest, settings=settings)))
    (region,) = read(calibrated, Prompt("where"), written(text, ONE, log_prob=np.log(0.5))).regions
    assert region.score == pytest.approx(1 / (1 + np.exp(0.5)))  # the odds are even: the offset alone counts


def test_the_score_of_a_region_that_the_user_drew_is_that_of_its_name(family: Family, text: NativeText) -> None:
    drawn = Prompt("what is this", (PromptRegion("box", box=(51.2, 102.4, 256.0, 307.2)),))
    (region,) = read(family, drawn, written(text, ONE, log_prob=np.log(0.7))).regions
    assert region.sides is None
    assert region.score == pytest.approx(0.7)


def test_answer_cut_short_says_so(family: Family, text: NativeText) -> None:
    reading = read(family, Prompt("where"), written(text, "The", ended=False))
    assert reading.notes == ("the answer was cut at the token limit",)


@pytest.mark.parametrize(
    "tagged",
    [
        "<ref>liver</ref><box><c500><c200><c100><c600></box><seg>",
        "<ref>liver</ref><box><c1><c2></box><seg>",
        "<box><c1>",
        "<seg><seg>",
        "</box></ref><ref>",
        "<ref></ref><box><c1><c2><c3><c4></box>",
        "<ref>liver</ref><seg>",
    ],
)
def test_malformed_places_never_raise(family: Family, text: NativeText, tagged: str) -> None:
    reading = read(family, Prompt("where"), written(text, tagged))
    for region in reading.regions:
        assert region.label
    assert "<" not in reading.text


def test_malformed_box_is_left_out_with_a_note_and_the_next_place_keeps_its_mask(
    family: Family, text: NativeText
) -> None:
    bad = "<ref>liver</ref><box><c500><c200><c100><c600></box> and " + ONE.replace("It is <ref>liver", "<ref>spleen")
    reading = read(family, Prompt("where"), written(text, bad))
    assert [r.label for r in reading.regions] == ["spleen"]
    assert reading.regions[0].mask is not None
    assert reading.regions[0].score is not None
    assert len(reading.notes) == 1
    assert "liver" in reading.notes[0]


def test_place_with_a_seg_and_no_box_takes_the_box_of_its_mask(family: Family, text: NativeText) -> None:
    prompt, answer = Prompt("where"), written(text, "<ref>liver</ref><seg>")
    logits = np.full((1, 256, 256), -1, np.float32)
    logits[0, 50:100, 20:60] = 1
    out = [{"mask_logits": logits, "iou": np.ones(1, np.float32)}]
    (feeds,) = family.mask_feeds(prompt, ask(family, prompt), projected(), answer)
    assert feeds["has_box"].tolist() == [0]
    (region,) = family.read_answer([scan()], prompt, ask(family, prompt), projected(), answer, out).regions
    assert region.box == pytest.approx((40, 100, 120, 200), abs=1)


def test_random_tokens_never_raise(family: Family, text: NativeText) -> None:
    rng = np.random.default_rng(0)
    t = text.tokens()
    special = np.array([t.ref, t.ref_end, t.box, t.box_end, t.seg, t.region, t.pad, t.user])
    for _ in range(150):
        coordinates = rng.integers(t.first_coordinate, t.first_coordinate + 1000, 30)
        letters = rng.integers(t.first_coordinate + 1000, text.vocabulary, 10)
        ids = rng.choice(np.concatenate([np.repeat(special, 5), coordinates, letters]), 40).tolist()
        hidden = {i: np.zeros(8, np.float32) for i, token in enumerate(ids) if token == t.seg}
        regions = (PromptRegion("box", box=(5, 5, 50, 50)),) if rng.random() < 0.5 else ()
        read(family, Prompt("x", regions), Written(ids, [-1.0] * len(ids), hidden, bool(rng.random() < 0.5)))


def test_notice_is_the_bundles_own_or_the_default(family: Family, tiny_native: ModuleType, tmp_path: Path) -> None:
    assert family.notice("zh") == NOTICE["zh"]
    own = open_family(tiny_native.make(tmp_path / "b", ONE, {"notice": {"en": "A demonstration."}}))
    assert own.notice("en") == "A demonstration."
    assert own.notice("zh") == NOTICE["zh"]


def test_bundle_of_another_family_or_with_other_graphs_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    def rewritten(name: str, **changes: Any) -> Bundle:
        m = bundle.manifest
        parts = {
            "name": m.name,
            "family": m.family,
            "graphs": m.graphs,
            "files": {file: bundle.file(file) for file in m.files},
            "precision": m.precision,
        }
        return write_bundle(tmp_path / name, **{**parts, **changes})

    with pytest.raises(BundleError, match="'other'; this version knows .*native"):
        open_family(rewritten("a", family="other"))
    fewer = {role: spec for role, spec in bundle.manifest.graphs.items() if role != "mask_decoder"}
    with pytest.raises(BundleError, match="has no mask_decoder"):
        Native(rewritten("b", graphs=fewer, precision=dict.fromkeys(fewer, "fp32")))
    files = {file: bundle.file(file) for file in bundle.manifest.files if "tokenizer" not in file}
    with pytest.raises(BundleError, match=r"no file tokenizer/tokenizer\.json"):
        Native(rewritten("c", files=files))
