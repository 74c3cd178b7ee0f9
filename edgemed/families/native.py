"""The native family at run time: one picture, regions as boxes, points or masks, answers with box tokens and masks.

Covers feeds, prompt ids, grammar, mask prompts and the way from tokens and mask logits back to scan pixels. The pieces
lie beside it: `native_view` (crop and picture), `native_regions` (region maps), `native_text` (tokens and tagged text),
`native_lexicon` (names). Does not cover running graphs or the decoding loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.box_confidence import confidence_of, raw_score
from edgemed.box_grammar import BoxGrammar, BoxTokens, FreeGrammar, Grammar
from edgemed.bundle import Bundle
from edgemed.core import Box, Language, Prompt, PromptRegion, Region, Scan, Side, Sides
from edgemed.errors import BundleError, InvalidInput
from edgemed.families import (
    Prepared,
    Question,
    Reading,
    SingleQuestions,
    Written,
    check_settings,
    mean_direction,
    one_scan,
)
from edgemed.families.native_drafts import Absent, KnownPlace, NativeDrafts
from edgemed.families.native_lexicon import EN_PLURAL, STRUCTURES, structure_of, structures_in
from edgemed.families.native_masks import prompt_of_answer, prompt_of_region, stacked
from edgemed.families.native_regions import (
    is_seen,
    region_bins,
    region_map,
    uniform_map,
)
from edgemed.families.native_text import NativeText, Place, parse, plain
from edgemed.families.native_view import SIDE, model_image, model_view
from edgemed.families.specs import SPLIT_HEAD
from edgemed.geometry import BINS, View, bins_to_box, box_of, box_to_bins, check_region, fit
from edgemed.graphs import Feeds, GraphSpec
from edgemed.language import folded_text, request_in
from edgemed.token_choice import Numbers

TOKENIZER = "tokenizer/tokenizer.json"

NOTICE: Mapping[Language, str] = {
    "en": "Research software, not a medical device: not for diagnosis.",
    "zh": "研究软件，非医疗器械，不得用于诊断。",
}
"""What goes with an answer where the bundle's settings bring no `notice` of their own."""

_VISIBLE = 0.5
"""From this presence on the projector's proposal counts as found; the language model is trained with the same."""
_SEEN, _BEGUN = 2, 0.003
"""Of a structure that is not visible a place is begun, and taken back, mostly where so many others are visible and its
presence is at least this: 157 of 206 questions; 119 of 232 below, 56 of 782 where fewer are visible (15 images)."""
_MASK_MARGIN = 0.15
_MASK_MARGIN_PX = 4.0
"""A mask is kept within its box grown by this share and at least this many model pixels: strays fall away."""

_NEEDED = {
    "vision_encoder": ({"image"}, {"image_features"}),
    "projector": (
        {"image_features", "region_maps"},
        {"image_tokens", "region_tokens", "presence", "boxes", "structure_maps"},
    ),
    "decoder": ({"input_ids", "image_tokens", "past_length", "logits_from"}, {"logits", "hidden"}),
    "mask_decoder": (
        {
            "image_features", "boxes", "has_box", "points", "point_labels",
            "mask_prompts", "has_mask", "seg_hidden", "has_seg",
        },
        {"mask_logits", "iou"},
    ),
}  # fmt: skip
"""Role -> the inputs and outputs this code uses; a graph may give more."""

Bins = tuple[int, int, int, int]
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Spot:
    """A place as it was written, with where its tokens lie in the answer's ids; None where there is none of it."""

    place: Place
    box_at: int | None
    seg_at: int | None

    def outlined(self, written: Written) -> bool:
        """Return whether a mask is wanted and there is something to ask the mask decoder with."""
        return self.place.seg and (self.place.bins is not None or self.seg_at in written.hidden)

    def written(self, written: Written) -> tuple[Box | None, Vector | None, int | None]:
        """Return what the answer gives to outline it with: box (model pixels), state at `<seg>`, structure."""
        box = None if self.place.bins is None else bins_to_box(self.place.bins, SIDE)
        seg = None if self.seg_at is None else written.hidden.get(self.seg_at)
        return box, seg, structure_of(self.place.name)


class Native(SingleQuestions):
    """The native family over one bundle; see `families.Family`."""

    steady_text = 0.95

    def __init__(self, bundle: Bundle) -> None:
        self._graphs = {role: bundle.spec(role) for role in _NEEDED}
        for role, (inputs, outputs) in _NEEDED.items():
            spec = self._graphs[role]
            fed = {t.name for t in spec.fed_inputs} - (set(SPLIT_HEAD) if role == "decoder" else set())
            if fed != inputs or not outputs <= {t.name for t in spec.returned_outputs}:
                raise BundleError(f"graph {role} is not one of the native family: it has {_named(spec)}")
        (structures,) = next(t.shape for t in self._graphs["projector"].outputs if t.name == "presence")
        if not isinstance(structures, int) or structures > len(STRUCTURES):
            raise BundleError(
                f"the bundle knows {structures} structures, this version {len(STRUCTURES)}; update edgemed"
            )
        self._text = NativeText(bundle.file(TOKENIZER))
        logits = next(t for t in self._graphs["decoder"].outputs if t.name == "logits")
        if logits.shape[-1] != self._text.vocabulary:
            raise BundleError(
                f"the decoder has {logits.shape[-1]} logits, the tokenizer {self._text.vocabulary} tokens"
            )
        self._ids = self._text.tokens()
        self._numbers = Numbers({self._ids.first_coordinate + k: k for k in range(self._ids.bins)})
        self._grammars: Mapping[Language, BoxGrammar] = {
            "en": BoxGrammar(_box_tokens(self._text, self._text.beyond_ascii()), self._text.vocabulary),
            "zh": BoxGrammar(_box_tokens(self._text), self._text.vocabulary),
        }
        self._free = FreeGrammar(self._text.vocabulary)
        self._names = [
            tuple(self._text.encode_name(name) for name in (term.en[0], term.zh[0])) for term in STRUCTURES[:structures]
        ]
        self._confidence = confidence_of(bundle.manifest.settings)
        self._notice: Mapping[Language, str] = {**NOTICE, **bundle.manifest.settings.get("notice", {})}

    def graphs(self) -> Mapping[str, GraphSpec]:
        """Return the GraphSpec of each of the four graphs, by role."""
        return self._graphs

    def notice(self, language: Language) -> str:
        """Return the sentence that goes with every answer: the bundle's own, else NOTICE."""
        return self._notice[language]

    def settings(self) -> Mapping[str, str]:
        """Return nothing: there is one way to ask."""
        return {}

    def prepare(self, scans: Sequence[Scan], prompt: Prompt) -> Prepared:
        """Return the feeds of vision_encoder and projector; the state is the View.

        Where a region reaches out of the crop the model looks at, the model looks at the whole frame.

        Raises InvalidInput if there is not exactly one scan, the frame was not read, a region is empty or outside the
        scan, or the prompt has a history or settings.
        """
        scan = one_scan(scans, "native")
        check_settings(prompt, self.settings(), "native")
        if prompt.history:
            raise InvalidInput("the family native answers single questions; ask without the earlier ones")
        shown = scan.shown(prompt.frame)
        for region in prompt.regions:
            check_region(region, scan.rows, scan.columns)
        view = model_view(shown, scan.modality, scan.pixel_spacing_mm)
        if not all(is_seen(region, view) for region in prompt.regions):
            view = fit(scan.rows, scan.columns, SIDE, None, scan.pixel_spacing_mm)
        maps = [region_map(region, view) for region in prompt.regions] or [uniform_map()]
        largest = self._graphs["projector"].dims["regions"].max
        if len(maps) > largest:
            raise InvalidInput(f"the prompt has {len(maps)} regions; at most {largest} fit")
        return Prepared({"image": model_image(shown, view)[None]}, {"region_maps": np.stack(maps)}, view)

    def ask(self, prompt: Prompt, prepared: Prepared, projected: Feeds, *, constrained: bool = True) -> Question:
        """Return the prompt's ids over the image's and the regions' rows, and the grammar of grounded answers."""
        rows = projected["image_tokens"]  # [tokens, width]
        bins = [region_bins(region, prepared.state) for region in prompt.regions]
        ids = self._text.encode_prompt(prompt.text, image_rows=len(rows), region_bins=bins, language=prompt.language)
        if bins:
            rows = np.concatenate([rows, projected["region_tokens"]])  # [tokens + regions, width]
        grammar: Grammar[Any] = self._free
        if constrained:
            language = request_in(folded_text(prompt.text))[0] or prompt.language
            known = self._boxes(projected, bins)
            grammar = self._grammars[language].knowing(known, self._contradicted(prompt, projected))
        drafter = self._drafts(prompt, prepared.state, projected)
        return Question(
            ids, {"image_tokens": rows}, grammar, self._ids.eos, frozenset({self._ids.seg}), drafter,
            numbers=self._numbers,
        )  # fmt: skip

    def _drafts(self, prompt: Prompt, view: View, projected: Feeds) -> NativeDrafts:
        """Return guesses at the answer: what the question names first, then what is visible, largest first."""
        language = request_in(folded_text(prompt.text))[0] or prompt.language
        named = structures_in(prompt.text)
        visible = [s for s in range(len(self._names)) if projected["presence"][s] >= _VISIBLE]
        boxes = {s: box_to_bins(_box_of(projected["boxes"][s]), SIDE) for s in visible}
        order = sorted(visible, key=lambda s: (s not in named, -_area(boxes[s])))
        places = [
            KnownPlace(self._names[s][language == "zh"], boxes[s], STRUCTURES[s].key in EN_PLURAL, s in named)
            for s in order
        ]
        width, height = view.box_to_model((0.0, 0.0, float(view.columns), float(view.rows)))[2:]
        extent = (_bins_up_to(width), _bins_up_to(height))
        tokens = self._grammars[language].tokens
        others_seen = len(visible) >= _SEEN
        absent = [
            Absent(
                (STRUCTURES[s].zh if language == "zh" else STRUCTURES[s].en)[0],
                self._names[s][language == "zh"],
                STRUCTURES[s].key in EN_PLURAL,
                begun=others_seen and float(projected["presence"][s]) >= _BEGUN,
            )
            for s in sorted(named)
            if s not in visible
        ]
        return NativeDrafts(tokens, self._text.encode_text, language, prompt.text, places, extent, absent)

    def _boxes(self, projected: Feeds, regions: Sequence[Bins]) -> dict[tuple[int, ...], tuple[Bins, ...]]:
        """Return the boxes an answer may give to each name: what the projector proposes there, what the user drew.

        A structure with neither has none, and the grammar refuses it: it is not in the image.
        """
        places: dict[tuple[int, ...], tuple[Bins, ...]] = {}
        for names, presence, box in zip(self._names, projected["presence"], projected["boxes"], strict=True):
            proposed = box_to_bins(_box_of(box), SIDE)
            found = (proposed,) if presence >= _VISIBLE else ()
            for name in names:
                places[name] = (*found, *regions)
        return places

    def _contradicted(self, prompt: Prompt, projected: Feeds) -> tuple[int, ...]:
        """Return the yes or the no of both languages where every structure the question names speaks against it.

        Of what is not there the language model wrote "Yes, the brain is not visible"; which of the two it must be is
        known before it writes. With a region the question is about that.
        """
        named = [s for s in structures_in(prompt.text) if s < len(projected["presence"])]
        seen = [s for s in named if projected["presence"][s] >= _VISIBLE]
        if not named or prompt.regions or 0 < len(seen) < len(named):
            return ()
        return tuple(self._text.encode_answer(word)[0] for word in (("No", "否") if seen else ("Yes", "是")))

    def embedding(self, features: Feeds) -> Vector:
        """Return the mean of the encoder's features over all places, [channels], at length 1."""
        return mean_direction(np.moveaxis(features["image_features"], 1, -1))

    def mask_feeds(self, prompt: Prompt, prepared: Prepared, projected: Feeds, written: Written) -> tuple[Feeds, ...]:
        """Return the mask prompts of every `<seg>` with a place: its box, its hidden state, the user's own region."""
        spots = [spot for spot in self._spots(written) if spot.outlined(written)]
        view, maps = prepared.state, projected["structure_maps"]
        prompts = [
            prompt_of_region(region, view, maps) if region else prompt_of_answer(*spot.written(written), maps)
            for spot, region in zip(spots, _users_regions(prompt.regions, spots), strict=True)
        ]
        spec = self._graphs["mask_decoder"]
        width = next(t.shape[1] for t in spec.inputs if t.name == "seg_hidden")
        assert isinstance(width, int)
        batch = spec.dims["prompts"].max
        return tuple(stacked(prompts[i : i + batch], width) for i in range(0, len(prompts), batch))

    def read_answer(
        self,
        scans: Sequence[Scan],
        prompt: Prompt,
        prepared: Prepared,
        projected: Feeds,
        written: Written,
        masks: Sequence[Feeds],
    ) -> Reading:
        """Return text and places in scan pixels; one that is malformed or outside the scan is left out, with a note."""
        logits = [row for out in masks for row in out["mask_logits"]]  # each [SIDE, SIDE]
        ious = [float(value) for out in masks for value in out["iou"]]
        tagged = self._text.decode(written.ids)
        regions: list[Region] = []
        notes = [] if written.ended else ["the answer was cut at the token limit"]
        spots = self._spots(written)
        asked = [spot for spot in spots if spot.outlined(written)]
        mine = _users_regions(prompt.regions, asked)
        outlined = 0
        for spot in spots:
            mask = iou = users = None
            if spot.outlined(written) and outlined < len(logits):
                mask, iou, users = logits[outlined], ious[outlined], mine[outlined]
                outlined += 1
            region = self._region(spot, mask, iou, users, prompt, prepared.state, projected, written)
            if isinstance(region, Region):
                regions.append(region)
            else:
                notes.append(region)
        return Reading(plain(tagged), tagged, tuple(regions), tuple(notes))

    def _spots(self, written: Written) -> list[_Spot]:
        """Return the places of the answer in order, with where their `<box>` and `<seg>` are in the ids."""
        ids = list(written.ids)
        boxes = [i for i, token in enumerate(ids) if token == self._ids.box]
        segs = [i for i, token in enumerate(ids) if token == self._ids.seg]
        spots: list[_Spot] = []
        next_box = 0
        for place in parse(self._text.decode(ids)):
            if isinstance(place, str):
                continue
            box_at = None
            if place.bins is not None:
                wanted = [self._ids.first_coordinate + b for b in place.bins]
                while next_box < len(boxes) and ids[boxes[next_box] + 1 : boxes[next_box] + 5] != wanted:
                    next_box += 1
                if next_box < len(boxes):
                    box_at, next_box = boxes[next_box], next_box + 1
            number = place.seg_index
            spots.append(_Spot(place, box_at, segs[number] if number is not None and number < len(segs) else None))
        return spots

    def _region(
        self,
        spot: _Spot,
        logits: Vector | None,
        iou: float | None,
        users: PromptRegion | None,
        prompt: Prompt,
        view: View,
        projected: Feeds,
        written: Written,
    ) -> Region | str:
        """Return the place as a Region, or the note why it is left out."""
        name = spot.place.name or ("区域" if prompt.language == "zh" else "region")
        box = _scan_box(spot.place.bins, view)
        mask = None
        if logits is not None:
            mask = (view.map_to_scan(logits) > 0) & view.inside()
            if spot.place.bins is not None and users is None:  # what the user points at is not cut to a written box
                mask &= _within(_grown(bins_to_box(spot.place.bins, SIDE)), view)
            if not mask.any():
                mask, iou = None, None
        if box is None and mask is not None:
            box = box_of(mask)
        if box is None:
            return f"{name!r} is left out: its box is missing, malformed or outside the scan"
        mine = users is not None or spot.place.bins in {region_bins(region, view) for region in prompt.regions}
        sides = None if mine else self._sides(spot, view, projected, written)
        score = self._name_score(spot, written) if mine else self._score(sides)
        return Region(name, box, prompt.frame, mask, score, _share(iou), sides)

    def _sides(self, spot: _Spot, view: View, projected: Feeds, written: Written) -> Sides | None:
        """Return how sure each side of a written box is, or None without a box.

        Where the box is the one that the projector proposes for that structure, its distributions say it: the grammar
        left the language model no choice. Else the language model's own do.
        """
        bins, structure = spot.place.bins, structure_of(spot.place.name)
        if bins is None or spot.box_at is None:
            return None
        across, down = 1 / view.scale_x, 1 / view.scale_y  # scan pixels of a model pixel
        scales = (across, down, across, down)
        known = structure is not None and structure < len(projected["presence"]) and "side_spread" in projected
        if known and box_to_bins(_box_of(projected["boxes"][structure]), SIDE) == bins:
            sure = zip(projected["side_probability"][structure], projected["side_spread"][structure], strict=True)
            return _four(Side(_clipped(p), float(s) * px) for (p, s), px in zip(sure, scales, strict=True))
        at = range(spot.box_at + 1, spot.box_at + 5)
        spreads = [written.spreads[i] if i < len(written.spreads) else None for i in at]
        return _four(
            Side(_mean_probability(written.log_probs[i : i + 1]), None if s is None else s * (SIDE / BINS) * px)
            for i, s, px in zip(at, spreads, scales, strict=True)
        )

    def _score(self, sides: Sides | None) -> float | None:
        """Return the probability that a box is right if the bundle can tell, else what its sides say by themselves."""
        if sides is None:
            return None
        raw = raw_score(sides)
        return raw if self._confidence is None else self._confidence.of(raw)

    def _name_score(self, spot: _Spot, written: Written) -> float | None:
        """Return the mean probability of the tokens that name a place the user pointed at, or None without a name."""
        at = spot.box_at
        if not at or written.ids[at - 1] != self._ids.ref_end:
            return None
        start = max((i for i in range(at) if written.ids[i] == self._ids.ref), default=at - 1)
        return _share(_mean_probability(written.log_probs[start + 1 : at - 1]))


def _named(spec: GraphSpec) -> str:
    inputs, outputs = (", ".join(t.name for t in tensors) for tensors in (spec.fed_inputs, spec.returned_outputs))
    return f"inputs {inputs}; outputs {outputs}"


def _box_tokens(text: NativeText, barred: tuple[int, ...] = ()) -> BoxTokens:
    t = text.tokens()
    return BoxTokens(
        box=t.box,
        box_end=t.box_end,
        ref=t.ref,
        ref_end=t.ref_end,
        seg=t.seg,
        eos=t.eos,
        first_coordinate=t.first_coordinate,
        bins=t.bins,
        never=(*t.never, *barred),
    )


def _box_of(values: Vector) -> Box:
    return (float(values[0]), float(values[1]), float(values[2]), float(values[3]))


def _four(sides: Iterable[Side]) -> Sides:
    x0, y0, x1, y1 = sides
    return (x0, y0, x1, y1)


def _clipped(value: float) -> float:
    """Return a probability as the graph gave it, 0 where it is not a number."""
    return min(max(float(value), 0.0), 1.0) if value == value else 0.0


def _area(bins: Bins) -> int:
    return (bins[2] - bins[0]) * (bins[3] - bins[1])


def _bins_up_to(model_px: float) -> int:
    """Return how many bins of a side lie before `model_px`, at least 1."""
    return max(1, min(BINS, round(model_px / SIDE * BINS)))


def _users_regions(regions: Sequence[PromptRegion], spots: Sequence[_Spot]) -> list[PromptRegion | None]:
    """Return for each outlined place the user's region that it is, or None.

    They are matched in order where there are as many of both: the user pointed there, whatever box was written.
    """
    return list(regions) if len(regions) == len(spots) else [None] * len(spots)


def _scan_box(bins: Bins | None, view: View) -> Box | None:
    if bins is None:
        return None
    try:
        return view.box_to_scan(bins_to_box(bins, SIDE))
    except InvalidInput:  # wholly in the padding
        return None


def _grown(box_model_px: Box) -> Box:
    x0, y0, x1, y1 = box_model_px
    dx = max(_MASK_MARGIN * (x1 - x0), _MASK_MARGIN_PX)
    dy = max(_MASK_MARGIN * (y1 - y0), _MASK_MARGIN_PX)
    return (x0 - dx, y0 - dy, x1 + dx, y1 + dy)


def _within(box_model_px: Box, view: View) -> npt.NDArray[np.bool_]:
    """Return bool [rows, columns]: which scan pixels have their centre in the box."""
    x = (np.arange(view.columns) + 0.5 - view.left) * view.scale_x
    y = (np.arange(view.rows) + 0.5 - view.top) * view.scale_y
    x0, y0, x1, y1 = box_model_px
    return ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None, :]


def _mean_probability(log_probs: Sequence[float]) -> float:
    """Return the geometric mean of probabilities given as logs; 0 where there are none or one is not a number."""
    mean = math.fsum(log_probs) / len(log_probs) if log_probs else -math.inf
    return math.exp(min(mean, 0.0)) if mean == mean else 0.0


def _share(value: float | None) -> float | None:
    """Return `value` clipped to 0..1; None where it is none or not a number."""
    return None if value is None or math.isnan(value) else min(max(value, 0.0), 1.0)
