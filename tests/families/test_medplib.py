"""MedPLIB at run time, asked through a Session over an exported bundle: what goes in, and which masks come out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgemed.core import Mask, Prompt, PromptRegion, Scan, Turn
from edgemed.errors import EdgemedError, InvalidInput
from edgemed.families import Family, Reading, Written
from edgemed.families.medplib_text import IMAGE_ID, REGION_ID, Compat, MedplibText
from edgemed.families.medplib_view import placed, postprocess, region_mask, to_mask
from edgemed.families.published_tokens import TOKENIZER, PublishedTokens
from edgemed.geometry import box_of
from edgemed.infer import InferOptions, Session

Array = npt.NDArray[Any]

SHORT = InferOptions(max_new_tokens=1)
PATCHES = 576
POINT = PromptRegion("point", point=(90.0, 60.0))
BOX = PromptRegion("box", box=(18.0, 36.0, 90.0, 170.0))


class Model:
    """The tiny model and what the tests ask it in short."""

    def __init__(self, tiny: Any) -> None:
        self.tiny = tiny
        self.session: Session = tiny.session
        self.family: Family = self.session.family
        self.text = MedplibText(PublishedTokens.open(tiny.bundle.file(TOKENIZER)))
        self.square: Scan = tiny.scan("square")
        self.wide: Scan = tiny.scan("two_one")
        self.width: int = tiny.bundle.spec("decoder").inputs[1].shape[-1]

    def ids(self, prompt: Prompt, *scans: Scan) -> list[int]:
        """Return the ids of a prompt with the placeholders of image and regions, whose rows must be all there."""
        answer = self.session.ask(scans, prompt, SHORT)
        assert answer.vocabulary is not None
        rows = [i - answer.vocabulary for i in answer.prompt_ids if i >= answer.vocabulary]
        assert rows == list(range(len(rows)))
        ids: list[int] = []
        for i in answer.prompt_ids:
            row = i - answer.vocabulary
            if row <= 0 or row >= PATCHES:
                ids.append(i if row < 0 else IMAGE_ID if row == 0 else REGION_ID)
        return ids

    def written(self, answer: str, *, ended: bool = True) -> Written:
        """Return an answer as if the model had written it, each state being the number of its step."""
        ids = self.text.tokens.encode(answer, bos=False)
        hidden = {i: np.full(self.width, i + 1, np.float32) for i in range(-1, len(ids))}
        return Written(ids, (), hidden, ended)

    def steps(self, answer: str, compat: Compat, *, ended: bool = True) -> list[int]:
        """Return the steps whose states go to the mask decoder."""
        prompt = Prompt("Where?", settings={"compat": compat})
        prepared = self.family.prepare((self.square,), prompt)
        fed = self.family.mask_feeds(prompt, prepared, {}, self.written(answer, ended=ended))
        return [int(state[0]) for feeds in fed for state in feeds["seg_hidden"]]

    def read(self, scan: Scan, logits: Array, prompt: Prompt) -> Reading:
        """Return what is made of the mask decoder's logits [masks, 4, 64, 64], all of one batch."""
        masks = [{"mask_logits": logits, "iou": np.full((len(logits), 4), 1.5, np.float32)}]
        prepared = self.family.prepare((scan,), prompt)
        return self.family.read_answer((scan,), prompt, prepared, {}, self.written("It is <SEG>"), masks)


@pytest.fixture(scope="module")
def model(medplib: Any) -> Model:
    return Model(medplib)


def free_form(scan: Scan) -> PromptRegion:
    y, x = np.mgrid[: scan.rows, : scan.columns]
    return PromptRegion("mask", mask=(x - 50) ** 2 + (y - 70) ** 2 < 30**2)


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["reference", "corrected", "release-cli"])
def test_question_has_the_wording_of_its_mode(model: Model, compat: Compat) -> None:
    ids = model.ids(Prompt("What is it?", settings={"compat": compat}), model.square)
    assert ids == model.text.encode_prompt("What is it?", compat=compat)
    human = model.text.tokens.encode("curious human", bos=False)[-1]
    assert (human in ids) == (compat != "release-cli")


@pytest.mark.parametrize("region", [POINT, BOX, free_form], ids=["point", "box", "mask"])
def test_each_kind_of_region_is_one_row_of_its_own(model: Model, region: Any) -> None:
    region = region if isinstance(region, PromptRegion) else region(model.square)
    prompt = Prompt("What is at <region>?", (region,))
    assert model.ids(prompt, model.square) == model.text.encode_prompt("What is at <region>?", regions=1)
    mask = PromptRegion("mask", mask=region_mask(region, 180, 180))
    given, as_mask = (model.family.prepare((model.square,), Prompt("x", (r,))).projector for r in (region, mask))
    np.testing.assert_array_equal(given["region_weights"], as_mask["region_weights"])


@pytest.mark.parametrize("question", ["Compare <region> and <region></region>.", "Compare these.", "<region>?"])
def test_regions_go_where_they_are_marked_and_the_rest_to_the_end(model: Model, question: str) -> None:
    prompt = Prompt(question, (POINT, BOX))
    ids = model.ids(prompt, model.square)
    assert ids == model.text.encode_prompt(question, regions=2)
    assert ids.count(REGION_ID) == 2


def test_a_mark_without_a_region_is_no_region(model: Model) -> None:
    ids = model.ids(Prompt("What is <region> here?"), model.square)
    assert REGION_ID not in ids
    assert not {model.text.region_start_id, model.text.region_end_id} & set(ids)


def test_order_of_regions_is_that_of_their_rows(model: Model) -> None:
    prompts = [Prompt("Compare.", regions) for regions in ((POINT, BOX), (BOX, POINT))]
    first, second = (model.family.prepare((model.square,), p).projector["region_weights"] for p in prompts)
    np.testing.assert_array_equal(first, second[::-1])


def test_a_question_without_an_image_is_asked_alone(model: Model) -> None:
    answer = model.session.ask((), Prompt("What is a cyst?"), InferOptions(max_new_tokens=4))
    assert list(answer.prompt_ids) == model.text.encode_prompt("What is a cyst?", image=False)
    assert answer.regions == ()


def test_the_place_of_the_image_is_always_the_start(model: Model) -> None:
    ids = model.ids(Prompt("What <image> is it?"), model.square)
    assert ids == model.text.encode_prompt("What  is it?")


@pytest.mark.parametrize("token", ["<SEG>", "</s>", "<s>", "<im_start>", "<im_end>", "<mask>", "<gen_7>", "<SE<SEG>G>"])
def test_what_is_typed_steers_nothing(model: Model, token: str) -> None:
    plain, typed = (model.ids(Prompt(words), model.square) for words in ("Hello", f"Hello {token}"))
    reserved = {added.content for added in model.text.tokens.added}
    assert "<SEG>" in reserved
    for name in reserved:
        index = model.text.tokens.id_of(name)
        assert typed.count(index) == plain.count(index), f"{token} typed, {name} counted"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (Prompt("What?", settings={"tiles": "2"}), "no setting 'tiles'; it has compat.*task"),
        (Prompt("What?", settings={"compat": "exact"}), "compat is 'exact'; one of reference, corrected, release-cli"),
        (Prompt("What?", settings={"task": "vqa"}), "task is 'vqa'; one of answer, outline"),
        (Prompt("What?", settings={"task": "outline"}), "needs something to outline"),
        (Prompt("What?", history=(Turn("a", "b", "b"),)), "single questions"),
        (Prompt("What?", (BOX,) * 17), "17 regions; at most 16"),
        (Prompt("What?", (PromptRegion("box", box=(300.0, 0.0, 320.0, 9.0)),)), "outside the frame"),
        (Prompt("What?", (PromptRegion("mask", mask=np.ones((9, 9), np.bool_)),)), r"\[9, 9\], the frame's"),
        (Prompt("What?", (PromptRegion("mask", mask=np.zeros((180, 180), np.bool_)),)), "empty"),
    ],
    ids=["setting", "compat", "task", "no outline", "history", "regions", "outside", "size", "empty"],
)
def test_what_cannot_be_asked_is_refused(model: Model, prompt: Prompt, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        model.ids(prompt, model.square)


def test_regions_need_an_image_and_there_is_one(model: Model) -> None:
    with pytest.raises(InvalidInput, match="without an image"):
        model.ids(Prompt("What?", (BOX,)))
    with pytest.raises(EdgemedError, match="one image at a time"):
        model.ids(Prompt("What?"), model.square, model.wide)


# --- which state makes a mask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "compat", "steps"),
    [
        ("It is <SEG> here", "reference", "first"),
        ("<SEG> and <SEG>", "reference", "first"),
        ("<SEG> and <SEG>", "corrected", "all"),
        ("<SEG> and <SEG>", "release-cli", "first"),
        ("It is <SEG> here", "release-cli", "last but one"),
        ("Nothing", "reference", "none"),
        ("Nothing", "release-cli", "none"),
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_a_mask_is_made_of_the_state_that_its_mode_says(
    model: Model, answer: str, compat: Compat, steps: str, ended: bool
) -> None:
    ids = [*model.written(answer).ids, *([model.text.stop_id] if ended else [])]
    segs = [step for step, index in enumerate(ids) if index == model.text.seg_id]
    expected = {"first": segs[:1], "all": segs, "last but one": [len(ids) - 2], "none": []}[steps]
    assert model.steps(answer, compat, ended=ended) == expected


def test_more_masks_than_fit_into_one_run_are_drawn_in_several(model: Model) -> None:
    steps = model.steps("<SEG>" * 20, "corrected")
    assert steps == list(range(20))


def test_an_answer_without_seg_has_no_mask(model: Model) -> None:
    answer = model.session.ask(
        model.square, Prompt(asked(model, "vqa_demo")), InferOptions(max_new_tokens=24, grammar=False)
    )
    assert "<SEG>" not in answer.tagged_text
    assert answer.regions == ()


def test_an_answer_with_seg_has_a_mask_with_its_box_and_estimate(model: Model) -> None:
    options = InferOptions(max_new_tokens=24, grammar=False)
    answer = model.session.ask(model.wide, Prompt(asked(model, "ground_two_one_demo")), options)
    (region,) = answer.regions
    assert region.mask is not None
    assert (region.label, region.mask.shape) == ("liver", (150, 300))
    assert region.box == box_of(region.mask)
    expected = float(model.tiny.arrays.expected("iou_pred_ground_two_one_demo")[0, 0])
    assert region.iou_estimate == pytest.approx(min(max(expected, 0), 1), abs=5e-4)


def asked(model: Model, case: str) -> str:
    prompt: str = model.tiny.arrays.prompts[case]["prompt"]
    return prompt.split("<im_end>\n")[1].split(" ASSISTANT:")[0]


@pytest.mark.parametrize("case", ["vqa_demo", "ground_square_demo", "ground_two_one_demo"])
def test_text_keeps_seg_only_where_it_is_tagged(model: Model, case: str) -> None:
    stored = model.tiny.arrays.prompts[case]
    scan = model.tiny.scan(stored["image"])
    answer = model.session.ask(scan, Prompt(asked(model, case)), InferOptions(max_new_tokens=24, grammar=False))
    assert answer.tagged_text == stored["response"]
    assert not any(token.content in answer.text for token in model.text.tokens.added)


@pytest.mark.parametrize("region", [(), (BOX,)], ids=["question", "region"])
def test_an_answer_is_text_and_seg(model: Model, region: tuple[PromptRegion, ...]) -> None:
    prompt = Prompt("Where?", region)
    prepared = model.family.prepare((model.square,), prompt)
    rows = {"image_tokens": np.zeros((PATCHES, model.width)), "region_tokens": np.zeros((16, model.width))}
    grammar = model.family.ask(prompt, prepared, rows).grammar
    state = grammar.start()
    ends = [model.text.stop_id]
    assert not grammar.allowed(state)[ends]
    for token in (model.text.seg_id, *model.text.tokens.encode("It is", bos=False), model.text.seg_id):
        state = grammar.advance(state, token)
    tokens = model.text.tokens
    named = {token.id for token in tokens.added}
    allowed = set(np.flatnonzero(grammar.allowed(state)).tolist())
    assert allowed & named == {model.text.seg_id, model.text.stop_id}
    assert set(range(tokens.pieces)) - named <= allowed
    free = model.family.ask(prompt, prepared, rows, constrained=False).grammar
    assert free.allowed(free.start()).all()


# --- masks in scan pixels ---------------------------------------------------------------------------------------------


def blob() -> Array:
    """Logits [1, 4, 64, 64] with a blob on the left of mask 0; what the others hold is not looked at."""
    y, x = np.mgrid[:64, :64]
    logits = np.random.default_rng(0).normal(size=(1, 4, 64, 64)).astype(np.float32)
    logits[0, 0] = 30 - np.hypot(y - 32, x - 16) * 4
    return logits


def test_corrected_undoes_the_padding_that_reference_stretches(model: Model) -> None:
    prompt = Prompt("Where?")
    reference = model.read(model.wide, blob(), prompt).regions[0]
    corrected = model.read(model.wide, blob(), replace(prompt, settings={"compat": "corrected"})).regions[0]
    for region, mode in ((reference, "reference"), (corrected, "corrected")):
        expected = to_mask(postprocess(blob()[0, 0], 150, 300, mode=mode))  # type: ignore[arg-type]
        np.testing.assert_array_equal(region.mask, expected)
    x0, y0, x1, y1 = corrected.box  # the blob's centre is at a half of the rows and a quarter of the columns
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((77, 77), abs=3)
    assert x1 - x0 == pytest.approx(y1 - y0, abs=2)
    x0, y0, x1, y1 = reference.box
    assert x1 - x0 != pytest.approx(y1 - y0, abs=20)


def test_an_empty_mask_is_noted_and_nothing_is_drawn(model: Model) -> None:
    logits = np.concatenate([np.full((1, 4, 64, 64), -9, np.float32), blob()])
    reading = model.read(model.square, logits, Prompt("Where?"))
    assert len(reading.regions) == 1
    assert reading.notes == ("a mask was asked for and came out empty; there is nothing to outline",)


def test_an_estimate_stays_within_its_limits(model: Model) -> None:
    assert model.read(model.square, blob(), Prompt("Where?")).regions[0].iou_estimate == 1


@pytest.mark.parametrize(
    ("question", "label"),
    [("Segment the spleen.", "spleen"), ("Segment it.", "region"), ("Segment the liver and the spleen.", "region")],
)
def test_a_mask_is_named_after_the_only_structure_of_the_question(model: Model, question: str, label: str) -> None:
    assert model.read(model.square, blob(), Prompt(question)).regions[0].label == label


# --- task outline: the mask decoder alone -----------------------------------------------------------------------------


def outlined(model: Model, scan: Scan, *regions: PromptRegion) -> list[Mask | None]:
    answer = model.session.ask(scan, Prompt("Outline it.", regions, settings={"task": "outline"}))
    assert (answer.text, answer.prompt_ids, answer.generated_ids) == ("", (), ())
    return [region.mask for region in answer.regions]


def test_a_box_is_outlined_as_the_authors_mask_decoder_does(model: Model) -> None:
    box = model.tiny.arrays.input("sam_box")[0] * (180 / 256)
    (mask,) = outlined(model, model.square, PromptRegion("box", box=tuple(map(float, box))))  # type: ignore[arg-type]
    name = "sam_box_low_res_all4"
    if name in model.tiny.arrays.steps:
        pytest.skip(f"the compact copy has not all of {name}; the full folder has")
    expected = postprocess(model.tiny.arrays.expected(name)[0, 0], 180, 180)
    certain = np.abs(expected - np.log(1 / 9)) >= 1e-3
    assert mask is not None
    np.testing.assert_array_equal(mask[certain], to_mask(expected)[certain])


@pytest.mark.parametrize("kind", ["point", "box", "mask"])
def test_a_native_prompt_lies_where_the_region_is_on_sams_square(model: Model, kind: str) -> None:
    regions = {"point": POINT, "box": BOX, "mask": free_form(model.wide)}
    region = regions[kind] if kind != "box" else PromptRegion("box", box=(30.0, 15.0, 90.0, 150.0))
    prompt = Prompt("x", (region,), settings={"task": "outline"})
    prepared = model.family.prepare((model.wide,), prompt)
    (feeds,) = model.family.mask_feeds(prompt, prepared, {}, Written((), ()))
    assert placed(150, 300, 256).top == 64
    given = {"box": feeds["has_box"][0], "mask": feeds["has_mask"][0], "point": feeds["point_labels"][0, 0]}
    assert given == {"box": kind != "point", "mask": kind == "mask", "point": 1 if kind == "point" else -1}
    assert feeds["has_seg"].tolist() == [0]
    if kind == "point":
        np.testing.assert_allclose(feeds["points"][0, 0], (90 * 256 / 300, 64 + 60 * 256 / 300), rtol=1e-6)
    elif kind == "box":
        np.testing.assert_allclose(feeds["boxes"][0], np.array((30, 90, 90, 225)) * 256 / 300, 1e-6)
    else:
        rows, columns = np.nonzero(feeds["mask_prompts"][0] > 0)
        assert (columns.mean(), rows.mean()) == pytest.approx((50 * 64 / 300, 16 + 70 * 64 / 300), abs=0.6)


def test_an_outline_lies_where_the_region_is_whatever_the_mode(model: Model) -> None:
    prompt = Prompt("x", (BOX,), settings={"task": "outline"})
    (region,) = model.read(model.wide, blob(), prompt).regions
    np.testing.assert_array_equal(region.mask, to_mask(postprocess(blob()[0, 0], 150, 300, mode="corrected")))


def test_each_region_gets_its_own_outline(model: Model) -> None:
    regions = (POINT, BOX, free_form(model.square))
    together = outlined(model, model.square, *regions)
    assert len(together) == 3
    for mask, region in zip(together, regions, strict=True):
        (alone,) = outlined(model, model.square, region)
        assert mask is not None
        assert alone is not None
        assert (mask != alone).sum() <= 1  # a run with more prompts rounds otherwise
