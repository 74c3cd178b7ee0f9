"""The medrega family at run time: pictures and boxes as text in, text with boxes out, English and Chinese.

Covers the order of a question's parts, tiles, several images, history, regional chain of thought, and the way from
written numbers back to scan pixels. The pieces lie beside it: `medrega_view` (pixels), `medrega_text` (template and
boxes as text), `medrega_prompts` (what says the task), `published_tokens`. Does not cover running graphs or decoding.

Source of the behaviour: github xmed-lab/MedRegA at dfdb0db; tests/reference/medrega-tiny.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast, get_args

import numpy as np
import numpy.typing as npt

from edgemed.box_confidence import raw_score
from edgemed.box_grammar import FreeGrammar
from edgemed.bundle import Bundle
from edgemed.core import Answer, Box, Finding, Language, Prompt, PromptRegion, Region, Scan, Side, Sides
from edgemed.drafts import Guess, PhraseDrafts
from edgemed.errors import BundleError, InvalidInput
from edgemed.families import Prepared, Question, Reading, Written, check_settings, chosen, mean_direction
from edgemed.families.medrega_labels import LabelList, classify, label_lists, read_labels
from edgemed.families.medrega_prompts import Task, default_prompt, read_prompts, regional_question, with_findings
from edgemed.families.medrega_text import (
    IMAGE,
    Found,
    MedRegaText,
    Order,
    grounded_items,
    label_images,
    order,
    parse,
    place_text,
    plain,
)
from edgemed.families.medrega_view import MedRegaView, box_to_numbers, number_px, numbers_to_box
from edgemed.families.published_family import PublishedFamily, setting
from edgemed.families.text_box_sides import WrittenNumber, digits_of, sides_of, written_numbers
from edgemed.geometry import box_of, check_region
from edgemed.graphs import Feeds
from edgemed.text_box_grammar import KnownPlace, TextBoxGrammar, TextBoxState, TextBoxTokens, text_bytes
from edgemed.token_choice import Numbers

COMPAT = ("reference", "corrected")
"""What the shown text is: as the published code shows it (tags gone, numbers left), or without numbers."""

_MAY_BE_TYPED = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
_REGION = "<region>"
_ROLES = ("vision_encoder", "projector", "decoder")
_NAMING_PLACES = ("text2region", "grounded_report", "none")
"""Tasks whose answers have places; in those of the others they would be made up."""
_ASKS_WHERE = re.compile(
    r"<ref>|\b(where|locate|localise|localize|detect|find|outline|segment|point out|bounding box)\b"
    r"|哪里|哪儿|在哪|什么位置|定位|检测|找出|标出|圈出",
    re.IGNORECASE,
)
"""A question for places: it gets the base prompt of that task, and its answer may hold boxes."""
_TASK_SETTINGS = {"task", "prompts", "dataset", "labels"}
SETTINGS: Mapping[str, str] = {
    "compat": "reference (default): text as the published code shows it; corrected: without the numbers of boxes",
    "task": f"auto (default), none, or whose base prompt goes with the question: {', '.join(get_args(Task))}",
    "prompts": "a meta file of the owner's: its base prompt of the task, or of the data set, is used in place of ours",
    "dataset": "which entry of that file",
    "labels": "of a classification: the name of a public data set, or a file with one label a line",
    "order": "demo (default): base prompt, image, question; training: image, base prompt, question",
    "tiles": "the most tiles that an image is cut into; 1: none. Default: as the checkpoint says",
    "cot": "on: ask for the regions first, then the question with what was found (regional chain of thought)",
}


@dataclass(frozen=True)
class _Asked:
    """What `prepare` saw: tiles of each image in order, (rows, columns) of the first."""

    tiles: tuple[int, ...]
    frame: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Drafts:
    """Guesses at an answer: known boxes inside a box, phrases of the conversation elsewhere; see `drafts.Drafter`."""

    grammar: TextBoxGrammar
    phrases: PhraseDrafts

    def propose(self, ids: Sequence[int], state: TextBoxState, guesses: Mapping[int, Guess]) -> Guess:
        """Return tokens that may follow; () where there is no guess."""
        return self.grammar.draft(state) if state.in_box else self.phrases.propose(ids)


class MedRega(PublishedFamily):
    """The medrega family over one bundle; see `families.Family`."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, _ROLES, SETTINGS)
        self._compat: str = setting(bundle, "compat", str)
        try:
            self._view = MedRegaView(**setting(bundle, "view", dict))
        except TypeError as error:
            raise BundleError(f"bundle {bundle.manifest.name}: its setting 'view' is of another version") from error
        self._text = MedRegaText(self._tokens, setting(bundle, "image_tokens", int))
        self._free = FreeGrammar(self._vocabulary, not_first=self._text.stop_id)

    @cached_property
    def _grammar(self) -> TextBoxGrammar:
        """The grammar of every answer: 0.1 s to learn how the tokenizer spells boxes."""
        ref, ref_end, box, box_end = map(self._tokens.id_of, ("<ref>", "</ref>", "<box>", "</box>"))
        tokens = TextBoxTokens(ref, ref_end, box, box_end, self._text.stop_id)
        return TextBoxGrammar(tokens, self._tokens.encode, self._texts, self._vocabulary)

    @cached_property
    def _texts(self) -> tuple[bytes, ...]:
        """The text of each token."""
        reserved = {token.id for token in self._tokens.added}
        return text_bytes(self._tokens.decode_verbatim, self._tokens.vocabulary, reserved)

    @cached_property
    def _digits(self) -> Numbers:
        """The tokens of one digit."""
        return Numbers(digits_of(self._texts))

    def lead_in(self, prompt: Prompt) -> Prompt | None:
        """Return the question for the regions that matter, if the chain of thought is on."""
        if chosen(prompt, "cot", ("on", "off"), "off") == "off":
            return None
        kept = {k: v for k, v in prompt.settings.items() if k in ("compat", "order", "tiles", "prompts")}
        question = regional_question(prompt.text.replace(IMAGE, "").strip(), prompt.language)
        return replace(prompt, text=question, settings={**kept, "task": "text2region"})

    def follow_up(self, prompt: Prompt, first: Answer) -> Prompt:
        """Return the prompt with the regions that the first answer names; its task is that of the prompt as it was."""
        places = [piece for piece in parse(first.tagged_text) if isinstance(piece, Found)]
        settings = {k: v for k, v in prompt.settings.items() if k != "cot"} | {"task": self._task(prompt, images=1)}
        return replace(prompt, text=with_findings(prompt.text, places, prompt.language), settings=settings)

    def prepare(self, scans: Sequence[Scan], prompt: Prompt) -> Prepared:
        """Return the feeds of vision_encoder: every tile of every image; nothing where there is no image.

        Raises InvalidInput if a setting is unknown, a region has no image, is a point or lies outside it, or the tiles
        are too many.
        """
        check_settings(prompt, SETTINGS, "medrega")
        if prompt.regions and len(scans) != 1:
            raise InvalidInput(f"{len(prompt.regions)} regions were given with {len(scans)} images; one was expected")
        if not scans:
            return Prepared({}, {}, _Asked(()))
        for region in prompt.regions:
            _box(region)
            check_region(region, scans[0].rows, scans[0].columns)
        view = self._view_of(prompt)
        images = [
            view.model_image(scan.shown(prompt.frame if i == 0 else scan.first_frame)) for i, scan in enumerate(scans)
        ]
        most = self._graphs["vision_encoder"].dims["tiles"].max
        tiles = tuple(len(image) for image in images)
        if sum(tiles) > most:
            raise InvalidInput(
                f"the images have {sum(tiles)} tiles; at most {most} fit: set fewer tiles or ask about fewer"
            )
        return Prepared({"image": np.concatenate(images)}, {}, _Asked(tiles, (scans[0].rows, scans[0].columns)))

    def _view_of(self, prompt: Prompt) -> MedRegaView:
        if "tiles" not in prompt.settings:
            return self._view
        value = prompt.settings["tiles"]
        if not value.isdecimal() or not 1 <= int(value) <= self._graphs["vision_encoder"].dims["tiles"].max:
            raise InvalidInput(f"tiles is {value!r}; a whole number from 1 on was expected")
        most = int(value)
        return replace(self._view, tiled=most > 1, thumbnail=most > 1, min_tiles=1, max_tiles=most)

    def ask(self, prompt: Prompt, prepared: Prepared, projected: Feeds, *, constrained: bool = True) -> Question:
        """Return the prompt's ids over the images' rows; the grammar has places only where the task does."""
        asked: _Asked = prepared.state
        history = [
            (
                self._with_regions(self._typed(turn.question), turn.regions, prompt.language, asked),
                self._answered(turn.text, turn.tagged_text, prompt),
            )
            for turn in prompt.history
        ]
        question = self._turn(prompt, asked, bool(history))
        if asked.tiles and IMAGE not in question and not any(IMAGE in user for user, _ in history):
            # The images, and what says the task, belong to the turn that they were first asked about in.
            turn = prompt.history[0]
            first = replace(prompt, text=turn.question, regions=turn.regions, history=())
            history[0] = (self._turn(first, asked, False), history[0][1])
        ids = self._text.encode_prompt(question, tiles=asked.tiles, history=history)
        rows = projected.get("image_tokens", self._no_rows)
        written, row = tuple(ids), 0
        for at, index in enumerate(ids):
            if index == self._text.context_id:
                ids[at] = self._vocabulary + row
                row += 1
        if not constrained:
            free = self._free
            return Question(
                ids, {"image_tokens": rows}, free, self._text.stop_id, written_ids=written, numbers=self._digits
            )
        said = [question]
        for (user, _), turn in zip(reversed(history), reversed(prompt.history), strict=True):
            said += [turn.tagged_text, user]
        named = self._may_name_places(prompt, len(asked.tiles))
        grammar = self._grammar.knowing(self._known_places(said)) if named else self._grammar.without_places()
        drafter = Drafts(grammar, PhraseDrafts([self._tokens.encode(text, bos=False) for text in said]))
        stop = self._text.stop_id
        return Question(
            ids, {"image_tokens": rows}, grammar, stop, drafter=drafter, written_ids=written, numbers=self._digits
        )

    def _may_name_places(self, prompt: Prompt, images: int) -> bool:
        """Return whether the task lets an answer have places; where only the owner's words say the task, it does."""
        said = prompt.settings.keys() & _TASK_SETTINGS
        if "task" not in said and ("dataset" in said or (IMAGE in prompt.text and not said)):
            return True
        return self._task(prompt, images) in _NAMING_PLACES

    def _known_places(self, texts: Iterable[str]) -> list[KnownPlace]:
        """Return the places with boxes in texts, which an answer may repeat."""
        found = [piece for text in texts for piece in parse(text) if isinstance(piece, Found) and piece.boxes]
        return [
            KnownPlace(
                tuple(self._tokens.encode(f"<ref>{place.name}</ref>", bos=False)[1:-1]),
                tuple(number for box in place.boxes for number in box),
            )
            for place in found
        ]

    def _typed(self, text: str) -> str:
        """Return what a user wrote: region tags are theirs to use, what steers the conversation is not."""
        return self._text.tokens.plain(text, _MAY_BE_TYPED)

    def _answered(self, text: str, tagged: str, prompt: Prompt) -> str:
        """Return an earlier answer as it is repeated: the published code repeats it without its tags."""
        return self._typed(text if self._is_reference(prompt) else tagged)

    def _is_reference(self, prompt: Prompt) -> bool:
        return chosen(prompt, "compat", COMPAT, self._compat) == "reference"

    def _turn(self, prompt: Prompt, asked: _Asked, later: bool) -> str:
        """Return the user's turn: regions put in, base prompt and images in their places.

        later: there are earlier turns, which the images go with. A turn that says itself where its images go is left
        as it is, unless the prompt's settings say the task.
        """
        images = len(asked.tiles)
        question = self._with_regions(self._typed(prompt.text), prompt.regions, prompt.language, asked)
        base = self._base_prompt(prompt, images)[0]
        if IMAGE in question:
            if not base or not prompt.settings.keys() & _TASK_SETTINGS:
                return question
            question = question.replace(IMAGE, "").strip()
        which = cast("Order", chosen(prompt, "order", get_args(Order), "demo"))
        if later or not images:
            return f"{base} {question}" if base else question
        if images > 1:
            return label_images(f"{base} {question}" if base else question, images)
        return order(base, question, which) if base else f"{IMAGE}\n{question}"

    def _base_prompt(self, prompt: Prompt, images: int) -> tuple[str, str | None]:
        """Return (what says the task, a note whose it is). Raises InvalidInput, and what reading a file raises."""
        task, labels = self._task(prompt, images), self._labels(prompt)
        wanted = prompt.settings.get("dataset", task)
        if "prompts" in prompt.settings and wanted != "none":
            prompts = read_prompts(prompt.settings["prompts"])
            return self._typed(prompts.base_prompt(wanted, prompt.language)), prompts.note(wanted, prompt.language)
        if task == "none":
            return "", None
        return default_prompt(cast("Task", task), prompt.language, labels.labels if labels else ()), None

    def _task(self, prompt: Prompt, images: int) -> str:
        """Return the task as it was set, or as the question tells it."""
        task = chosen(prompt, "task", ("auto", "none", *get_args(Task)), "auto")
        if task != "auto":
            return task
        if labels := self._labels(prompt):
            return "classification_multi" if labels.multi else "classification"
        if prompt.history or not images:
            return "none"
        if prompt.regions:
            return "region2text"
        return "text2region" if _ASKS_WHERE.search(prompt.text) else "vqa"

    def _labels(self, prompt: Prompt) -> LabelList | None:
        """Return the labels of a classification, or None. Raises what reading a file raises."""
        wanted = prompt.settings.get("labels")
        if wanted is None:
            return None
        multi = prompt.settings.get("task") == "classification_multi"
        known = label_lists()
        if wanted not in known and not Path(wanted).exists():
            raise InvalidInput(f"labels is {wanted!r}: no file, and no data set of {', '.join(sorted(known))}")
        return known.get(wanted) or read_labels(wanted, multi=multi)

    def _with_regions(self, question: str, regions: Sequence[PromptRegion], language: Language, asked: _Asked) -> str:
        """Return the question with the regions' boxes as text, at each `<region>`, the rest at the end."""
        named = "该区域" if language == "zh" else "this"
        question = question.replace(f"{_REGION}</region>", _REGION)
        for region in regions:
            text = place_text(named, [box_to_numbers(_box(region), *asked.frame, padded=self._view.pad_to_square)])
            question = question.replace(_REGION, text, 1) if _REGION in question else f"{question} {text}"
        return question

    def embedding(self, features: Feeds) -> npt.NDArray[np.float32]:
        """Return the mean of the encoder's features over all patches of all tiles, [width], at length 1."""
        return mean_direction(features["image_features"])

    def mask_feeds(self, prompt: Prompt, prepared: Prepared, projected: Feeds, written: Written) -> tuple[Feeds, ...]:
        """Return nothing: the family has no mask decoder."""
        return ()

    def read_answer(
        self,
        scans: Sequence[Scan],
        prompt: Prompt,
        prepared: Prepared,
        projected: Feeds,
        written: Written,
        masks: Sequence[Feeds],
    ) -> Reading:
        """Return text and boxes in scan pixels; what is no box stays in the text and is noted, nothing is guessed."""
        tagged = self._text.tagged(written.ids)
        shown = self._text.stripped(written.ids) if self._is_reference(prompt) else plain(tagged)
        notes = [] if written.ended else ["the answer was cut at the token limit"]
        if whose := self._base_prompt(prompt, len(scans))[1]:
            notes.append(whose)
        labels = self._labels(prompt)
        meant = () if labels is None else classify(shown, labels.labels, labels.multi)
        places = [piece for piece in parse(tagged) if isinstance(piece, Found)]
        dropped = [numbers for place in places for numbers in place.dropped]
        notes += [f"{numbers} is no box (four numbers 0 to 999, in order); it stays in the text" for numbers in dropped]
        if len(scans) != 1:
            if any(place.boxes for place in places):
                notes.append(f"of {len(scans)} images, none is named for the boxes; they stay in the text")
            return Reading(shown, tagged, (), tuple(notes), meant)
        unnamed = "区域" if prompt.language == "zh" else "region"
        regions: list[Region] = []
        findings: list[Finding] = []
        tags = (self._tokens.id_of("<box>"), self._tokens.id_of("</box>"))
        said, next_number = written_numbers(written, self._texts, *tags), 0
        for item in grounded_items(tagged):
            first = len(regions)
            for place in item.places:
                for numbers in place.boxes:
                    sides, next_number = sides_of(numbers, said, next_number)
                    try:
                        box = numbers_to_box(numbers, scans[0].rows, scans[0].columns, padded=self._view.pad_to_square)
                    except InvalidInput:  # wholly in the padding
                        notes.append(f"{list(numbers)} lies outside the scan; it stays in the text")
                        continue
                    sure = None if sides is None else self._sides(sides, scans[0])
                    score = None if sure is None else raw_score(sure)
                    regions.append(Region(place.name or unnamed, box, prompt.frame, score=score, sides=sure))
            if item.text and len(regions) > first:
                findings.append(Finding(item.text, tuple(range(first, len(regions)))))
        return Reading(shown, tagged, tuple(regions), tuple(notes), meant, tuple(findings))

    def _sides(self, numbers: Sequence[WrittenNumber], scan: Scan) -> Sides:
        """Return four numbers as the sides of a box of a scan."""
        width, height = number_px(scan.rows, scan.columns, padded=self._view.pad_to_square)
        x0, y0, x1, y1 = (
            Side(n.probability, None if n.spread is None else n.spread * px)
            for n, px in zip(numbers, (width, height, width, height), strict=True)
        )
        return (x0, y0, x1, y1)


def _box(region: PromptRegion) -> Box:
    """Return the region's box in scan pixels, a mask's being the tightest around it. Raises InvalidInput at a point."""
    box = region.box if region.mask is None else box_of(region.mask)
    if box is None:
        what = "a point" if region.point is not None else "an empty mask"
        raise InvalidInput(f"the region is {what}; the family medrega asks about boxes: pass --region box:x0,y0,x1,y1")
    return box
