"""The medplib family at run time: a picture and places as masks in, text and pixel masks out; English.

Covers prompt ids with image and region rows, examples that are shown before the picture (in context), which hidden
state makes a mask, native prompts of the mask decoder, and bringing masks back to the scan. The pieces lie beside it:
`medplib_view` (pixels, regions, masks), `medplib_text` (template), `published_tokens`. Does not cover running graphs or
decoding.

Source of the behaviour: github ShawnHuang497/MedPLIB at 5ab54bc, release-cli at 9c3efe9; tests/reference/medplib-tiny.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgemed.box_grammar import FreeGrammar, Grammar
from edgemed.bundle import Bundle
from edgemed.core import Example, Prompt, PromptRegion, Region, Scan
from edgemed.errors import BundleError, InvalidInput
from edgemed.families import (
    EXAMPLE,
    Prepared,
    Question,
    Reading,
    Written,
    check_settings,
    chosen,
    mean_direction,
    one_scan,
)
from edgemed.families.medplib_config import COMPAT, MAX_EXAMPLES
from edgemed.families.medplib_text import IMAGE_ID, REGION_ID, Compat, Icl, MedplibText, example_lines
from edgemed.families.medplib_view import (
    MaskMode,
    MedplibView,
    mask_picture,
    overlaid,
    placed,
    postprocess,
    region_mask,
    region_weights,
    to_mask,
)
from edgemed.families.native_lexicon import STRUCTURES, structures_in
from edgemed.families.published_family import PublishedFamily, setting
from edgemed.geometry import box_of
from edgemed.graphs import Feeds
from edgemed.text_box_grammar import TextGrammar, text_bytes

_ROLES = ("vision_encoder", "projector", "decoder", "mask_decoder")
_MAY_BE_TYPED = ("<region>", "</region>")
SETTINGS: Mapping[str, str] = {
    "compat": "reference (default): as training and the web demo; corrected: masks without the published stretching, "
    "one for each <SEG>; release-cli: the first release's template and <SEG> rule",
    "task": "answer (default), or outline: the mask decoder alone outlines each region, nothing is written",
    "icl": "overlay (default): the mask of an example is drawn into its image; separate: it comes as an image of its "
    "own, or through the mask encoder where the model has one",
}


class Medplib(PublishedFamily):
    """The medplib family over one bundle; see `families.Family`."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, _ROLES, SETTINGS)
        self._compat: str = setting(bundle, "compat", str)
        stored = setting(bundle, "view", dict)
        view: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        try:
            self._view = MedplibView(**view)
        except TypeError as error:
            raise BundleError(f"bundle {bundle.manifest.name}: its setting 'view' is of another version") from error
        self._text = MedplibText(self._tokens)
        self._rows = {t.name: cast("int", t.shape[0]) for t in self._graphs["projector"].outputs}
        self._free = FreeGrammar(self._vocabulary)

    @cached_property
    def _grammar(self) -> TextGrammar:
        """Text and `<SEG>`; what belongs to prompts, other models and images is never written, nothing is no answer."""
        tokens = self._tokens
        texts = text_bytes(tokens.decode_verbatim, tokens.vocabulary, {token.id for token in tokens.added})
        words = [i for i, text in enumerate(texts) if text]
        end = self._text.stop_id
        return TextGrammar(self._vocabulary, [*words, self._text.seg_id, end], not_first=[end])

    def prepare(self, scans: Sequence[Scan], prompt: Prompt) -> Prepared:
        """Return the feeds of vision_encoder and projector; nothing where there is no image. State: rows and columns.

        Raises InvalidInput if there is more than one image, a region has none or is empty, the prompt has a history, a
        setting is unknown, or the examples are too many or come with regions.
        """
        check_settings(prompt, SETTINGS, "medplib", examples=True)
        if prompt.history:
            raise InvalidInput("the family medplib answers single questions; ask without the earlier ones")
        if not scans:
            if prompt.regions or self._outlines(prompt):
                raise InvalidInput("a region was asked about without an image; an image was expected")
            if prompt.examples:
                raise InvalidInput("examples were given without an image to ask about; an image was expected")
            return Prepared({}, {}, None)
        scan = one_scan(scans, "medplib")
        if self._outlines(prompt) and not prompt.regions:
            raise InvalidInput("task outline needs something to outline; pass --region")
        shown = scan.shown(prompt.frame)
        masks = [region_mask(region, scan.rows, scan.columns) for region in prompt.regions]
        most = self._graphs["projector"].dims["regions"].max
        if len(masks) > most:
            raise InvalidInput(f"the prompt has {len(masks)} regions; at most {most} fit")
        weights = [region_weights(self._view.region_map(mask)) for mask in masks]
        self._check_examples(prompt)
        return Prepared(
            {"clip_image": self._view.clip_image(shown), "sam_image": self._view.sam_image(shown)},
            {**self._no_places(), **({"region_weights": np.stack(weights)} if weights else {})},
            (scan.rows, scan.columns),
            tuple(picture for example in prompt.examples for picture in self._shown_first(example, self._icl(prompt))),
        )

    def _no_places(self) -> dict[str, npt.NDArray[Any]]:
        """Return feeds of the projector for a picture without a region or a mask."""
        inputs = [t for t in self._graphs["projector"].inputs if t.name != "image_features"]
        return {t.name: np.zeros([d if isinstance(d, int) else 1 for d in t.shape], t.dtype) for t in inputs}

    def _shown_first(self, example: Example, mode: Icl) -> tuple[Prepared, ...]:
        """Return an example as one picture or two. Only CLIP looks at them: what goes to SAM is blank."""
        shown, places = example.scan.shown(example.frame), self._no_places()
        if mode == "overlay":
            pictures = [overlaid(shown, example.mask)]
        elif self._encodes_masks:
            pictures = [shown]
            places["mask_image"] = self._view.mask_image(example.mask)
        else:
            pictures = [shown, mask_picture(example.mask)]
        blank = np.zeros((1, 3, self._view.sam_side, self._view.sam_side), np.float32)
        return tuple(
            Prepared({"clip_image": self._view.clip_image(p), "sam_image": blank}, places, None) for p in pictures
        )

    def _check_examples(self, prompt: Prompt) -> None:
        """Raise InvalidInput if there are too many examples for the authors' code or for the context, or regions."""
        mode, count = self._icl(prompt), len(prompt.examples)
        if not count:
            return
        if count > MAX_EXAMPLES:
            raise InvalidInput(f"the prompt has {count} examples; 1 to {MAX_EXAMPLES} were expected")
        if prompt.regions:
            raise InvalidInput("the prompt has examples and regions; only one of the two was expected")
        image = self._rows["image_tokens"]
        of_mask = 0 if mode == "overlay" else self._rows.get("mask_tokens", image)
        written = sum(index != IMAGE_ID for index in self._written(prompt, image=True))
        total, room = written + image + count * (image + of_mask), self._graphs["decoder"].dims["cache"].max
        if total >= room:
            raise InvalidInput(
                f"the prompt has {total} tokens with its {count} examples ({mode}); at most {room - 1} fit. Give fewer "
                f"examples{', or use icl=overlay' if mode == 'separate' else ''}"
            )

    @property
    def _encodes_masks(self) -> bool:
        return "mask_tokens" in self._rows

    def _icl(self, prompt: Prompt) -> Icl:
        return cast("Icl", chosen(prompt, "icl", get_args(Icl), "overlay"))

    def _outlines(self, prompt: Prompt) -> bool:
        return chosen(prompt, "task", ("answer", "outline"), "answer") == "outline"

    def _compat_of(self, prompt: Prompt) -> Compat:
        return cast("Compat", chosen(prompt, "compat", COMPAT, self._compat))

    def ask(self, prompt: Prompt, prepared: Prepared, projected: Feeds, *, constrained: bool = True) -> Question:
        """Return the prompt's ids over the rows of all images, then of the regions."""
        grammar: Grammar[int] = self._grammar if constrained else self._free
        if self._outlines(prompt):
            return Question([], {}, grammar, self._text.stop_id)
        images = self._image_rows(prompt, projected) if prepared.vision else []
        sizes = [len(rows) for rows in images]
        ids: list[int] = []
        row = self._vocabulary
        written = self._written(prompt, image=bool(images))
        for index in written:
            if index in (IMAGE_ID, REGION_ID):
                count = sizes.pop(0) if index == IMAGE_ID else 1
                ids += range(row, row + count)
                row += count
            else:
                ids.append(index)
        rows: npt.NDArray[Any] = self._no_rows
        if images:
            rows = np.concatenate([*images, projected["region_tokens"][: len(prompt.regions)]])
        return Question(ids, {"image_tokens": rows}, grammar, self._text.stop_id, None, written_ids=written)

    def _written(self, prompt: Prompt, *, image: bool) -> list[int]:
        """Return the prompt's ids; each image, mask of an example, and region is one pseudo-id."""
        before = example_lines(len(prompt.examples), self._icl(prompt))
        question = self._text.tokens.plain(prompt.text, _MAY_BE_TYPED)
        written = self._text.encode_prompt(
            question, regions=len(prompt.regions), image=image, before=before, compat=self._compat_of(prompt)
        )
        if not prompt.examples:
            self._text.positions(written, self._rows["image_tokens"])
        return written

    def _image_rows(self, prompt: Prompt, projected: Feeds) -> list[npt.NDArray[Any]]:
        """Return the rows of each image in order; those of a mask that was encoded come after its image's."""
        shown = [*projected[EXAMPLE + "image_tokens"]] if prompt.examples else []
        if prompt.examples and self._encodes_masks and self._icl(prompt) == "separate":
            shown = [rows for pair in zip(shown, projected[EXAMPLE + "mask_tokens"], strict=True) for rows in pair]
        return [*shown, projected["image_tokens"]]

    def embedding(self, features: Feeds) -> npt.NDArray[np.float32]:
        """Return the mean of the last layer's patches of the CLIP tower, [width], at length 1, as published."""
        return mean_direction(features["last_features"])

    def mask_feeds(self, prompt: Prompt, prepared: Prepared, projected: Feeds, written: Written) -> tuple[Feeds, ...]:
        """Return one batch for the `<SEG>` vectors that make a mask, or for the regions of task outline; else none."""
        if not prepared.vision:
            return ()
        if self._outlines(prompt):
            return (self._native_prompts(prompt.regions, *prepared.state),)
        steps = self._text.seg_steps(self._ids(written), self._compat_of(prompt))
        if not steps:
            return ()
        most = self._graphs["mask_decoder"].dims["prompts"].max
        feeds = self._no_prompts(len(steps))
        feeds["seg_hidden"] = np.stack([written.hidden[step - 1] for step in steps])
        feeds["has_seg"][:] = 1
        return tuple({k: v[i : i + most] for k, v in feeds.items()} for i in range(0, len(steps), most))

    def _ids(self, written: Written) -> list[int]:
        """Return the ids as the published code has them: with the end token where the model ended the answer."""
        return [*written.ids, *([self._text.stop_id] if written.ended else [])]

    def _no_prompts(self, count: int) -> dict[str, npt.NDArray[Any]]:
        """Return feeds of the mask decoder of `count` prompts that are all absent."""
        feeds = {}
        for tensor in self._graphs["mask_decoder"].inputs:
            if tensor.name != "mask_features":
                shape = [d if isinstance(d, int) else count if d == "prompts" else 1 for d in tensor.shape]
                feeds[tensor.name] = np.zeros(shape, tensor.dtype)
        feeds["point_labels"][:] = -1
        return feeds

    def _native_prompts(self, regions: Sequence[PromptRegion], rows: int, columns: int) -> dict[str, npt.NDArray[Any]]:
        """Return one prompt for each region, as SAM takes them: a box, a point inside, or a mask and its box."""
        feeds = self._no_prompts(len(regions))
        place = placed(rows, columns, self._view.sam_side)
        scale = np.array([place.columns / columns, place.rows / rows], np.float32)
        corner = np.array([place.left, place.top], np.float32)
        for i, region in enumerate(regions):
            box = region.box if region.mask is None else box_of(region.mask)
            if box is not None:
                feeds["boxes"][i] = (np.array(box, np.float32).reshape(2, 2) * scale + corner).reshape(4)
                feeds["has_box"][i] = 1
            if region.point is not None:
                feeds["points"][i, 0] = np.array(region.point, np.float32) * scale + corner
                feeds["point_labels"][i, 0] = 1
            if region.mask is not None:
                feeds["mask_prompts"][i] = self._rough_logits(region.mask, feeds["mask_prompts"].shape[-1])
                feeds["has_mask"][i] = 1
        return feeds

    def _rough_logits(self, mask: npt.NDArray[np.bool_], side: int) -> npt.NDArray[np.float32]:
        """Return a mask as the logits of an earlier mask on SAM's square, [side, side]: -10 outside to 10 inside."""
        rows, columns = mask.shape
        place = placed(rows, columns, self._view.sam_side)
        square = np.zeros((self._view.sam_side, self._view.sam_side), np.float32)
        resized = Image.fromarray(mask.astype(np.float32)).resize((place.columns, place.rows), Image.Resampling.BOX)
        square[place.top : place.top + place.rows, place.left : place.left + place.columns] = np.asarray(resized)
        cell = self._view.sam_side // side
        share = square.reshape(side, cell, side, cell).mean(axis=(1, 3))
        return np.asarray(20 * share - 10, np.float32)

    def read_answer(
        self,
        scans: Sequence[Scan],
        prompt: Prompt,
        prepared: Prepared,
        projected: Feeds,
        written: Written,
        masks: Sequence[Feeds],
    ) -> Reading:
        """Return text and masks in scan pixels; a `<SEG>` whose mask is empty is noted, nothing is drawn for it."""
        tagged = self._text.shown(self._ids(written)) if not self._outlines(prompt) else ""
        notes = [] if written.ended else ["the answer was cut at the token limit"]
        named = sorted(structures_in(prompt.text))
        label = STRUCTURES[named[0]].en[0] if len(named) == 1 else "region"
        # Stretching is what <SEG> was trained with; an outline has to lie where the region is.
        exact = self._outlines(prompt) or self._compat_of(prompt) == "corrected"
        mode: MaskMode = "corrected" if exact else "reference"
        regions = []
        for out in masks:
            for logits, iou in zip(out["mask_logits"], out["iou"], strict=True):
                scan = scans[0]
                whole = postprocess(logits[0], scan.rows, scan.columns, sam_side=self._view.sam_side, mode=mode)
                mask = to_mask(whole)
                box = box_of(mask)
                if box is None:
                    notes.append("a mask was asked for and came out empty; there is nothing to outline")
                    continue
                regions.append(Region(label, box, prompt.frame, mask, None, float(min(max(iou[0], 0.0), 1.0))))
        return Reading(self._text.untagged(tagged), tagged, tuple(regions), tuple(notes))
