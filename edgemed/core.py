"""The nouns: Scan, Region, Prompt, Answer, Provenance. Plain frozen values, checked when made.

Covers what passes between reading a file and reporting an answer. Does not cover graphs (`graphs`), frames of
reference (`geometry`) or bundles (`bundle`).

Coordinates: a box is (x0, y0, x1, y1), x to the right, y down, origin at the outer corner of the first pixel, x1 and y1
exclusive. Unless a name says otherwise it is in pixels of the scan as shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgemed.errors import InvalidInput

Box = tuple[float, float, float, float]
Point = tuple[float, float]
Mask = npt.NDArray[np.bool_]
Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Window:
    """A linear VOI window: values from `low` (black) to `high` (white) are shown, what lies outside is clipped.

    center, width: as a DICOM header writes them. exact: LINEAR_EXACT, [center - width / 2, center + width / 2];
    False: LINEAR, whose upper end is one value lower (a width of 256 shows 0..255).
    Source: DICOM PS3.3 C.11.2.1.2.1 and C.11.2.1.3.2.

    >>> Window(128, 256, exact=False).low, Window(128, 256, exact=False).high
    (0.0, 255.0)
    """

    center: float
    width: float
    exact: bool = True

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise InvalidInput(f"window width is {self.width:g}, a number above 0 was expected")

    @property
    def low(self) -> float:
        return self.center - self.width / 2

    @property
    def high(self) -> float:
        """Always above `low`: LINEAR with width 1 is a step (1e-6 of a value)."""
        return self.low + (self.width if self.exact else max(self.width - 1, 1e-6))


SCAN_WARNINGS: Mapping[str, str] = {
    "overlay": "an overlay of the file is not part of the pixels; the model does not see what is drawn there",
    "burned in": "the file says that text is burned into the pixels; the model may take it for part of the picture",
    "shutter": "a display shutter of the file is not applied; the model sees what it would hide",
}
"""What may mislead about the pixels of a file -> what is said of it with every answer."""


@dataclass(frozen=True, eq=False)
class Scan:
    """The pixels of one file after rescale, with the few facts about them that a model or a report needs.

    pixels: float32 [frames, rows, columns] in real-world values (HU for CT; larger is brighter: MONOCHROME1 is already
    inverted), or uint8 [frames, rows, columns, 3] RGB. Read-only.
    pixel_spacing_mm: (row spacing, column spacing), or None where the file has none. Never invented.
    window: the VOI window to show float pixels with; None for RGB.
    first_frame, total_frames: `pixels` holds frames first_frame, first_frame + 1, ... of a file with total_frames
    frames (None: as many as `pixels` holds). Frame numbers are 0-based and always those of the file.
    warnings: keys of `SCAN_WARNINGS`.
    No patient name, id or date ever enters.
    """

    pixels: npt.NDArray[Any]
    modality: str
    window: Window | None = None
    pixel_spacing_mm: tuple[float, float] | None = None
    sop_instance_uid: str | None = None
    series_instance_uid: str | None = None
    study_instance_uid: str | None = None
    frame_of_reference_uid: str | None = None
    first_frame: int = 0
    total_frames: int | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        p = self.pixels
        grey = p.ndim == 3 and p.dtype == np.float32
        colour = p.ndim == 4 and p.shape[-1] == 3 and p.dtype == np.uint8
        if not (grey or colour) or 0 in p.shape:
            raise InvalidInput(
                f"scan pixels are {p.dtype} {list(p.shape)}; float32 [frames, rows, columns] or "
                "uint8 [frames, rows, columns, 3] was expected"
            )
        if grey and self.window is None:
            raise InvalidInput("grey scan pixels need a window")
        if self.pixel_spacing_mm is not None and not all(s > 0 for s in self.pixel_spacing_mm):
            raise InvalidInput(f"pixel spacing is {self.pixel_spacing_mm} mm, two numbers above 0 were expected")
        p.flags.writeable = False

    @property
    def frames(self) -> int:
        return self.total_frames if self.total_frames is not None else self.first_frame + int(self.pixels.shape[0])

    @property
    def rows(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def columns(self) -> int:
        return int(self.pixels.shape[2])

    @property
    def is_colour(self) -> bool:
        return self.pixels.ndim == 4

    def shown(self, frame: int) -> npt.NDArray[np.uint8]:
        """Return frame `frame` as it is shown: uint8 RGB [rows, columns, 3], windowed where it is grey."""
        index = frame - self.first_frame
        if not 0 <= index < self.pixels.shape[0]:
            last = self.first_frame + self.pixels.shape[0] - 1
            raise InvalidInput(f"frame {frame} was asked for; frames {self.first_frame} to {last} were read")
        image = self.pixels[index]
        if self.is_colour:
            return np.ascontiguousarray(image)
        assert self.window is not None
        low, high = self.window.low, self.window.high
        grey = np.clip((image - low) * (255.0 / (high - low)), 0, 255)
        return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)


@dataclass(frozen=True)
class Side:
    """How sure one side of a box is.

    probability: of the side as it was written, 0..1. spread_px: standard deviation of where it may be, in scan pixels,
    or None where that is not known.
    """

    probability: float
    spread_px: float | None = None


Sides = tuple[Side, Side, Side, Side]
"""Of x0, y0, x1, y1."""


@dataclass(frozen=True, eq=False)
class Region:
    """One place in a scan: box and mask in scan pixels of frame `frame`, score and iou_estimate in 0..1 or None.

    sides: how sure each side of the box is, where the model says. uncertain: the score is below what was asked for.
    """

    label: str
    box: Box
    frame: int = 0
    mask: Mask | None = None
    score: float | None = None
    iou_estimate: float | None = None
    sides: Sides | None = None
    uncertain: bool = False

    def __post_init__(self) -> None:
        x0, y0, x1, y1 = self.box
        if not (0 <= x0 < x1 and 0 <= y0 < y1):
            raise InvalidInput(
                f"box {self.box} is empty or outside the scan; 0 <= x0 < x1 and 0 <= y0 < y1 was expected"
            )
        if self.mask is not None and (self.mask.ndim != 2 or self.mask.dtype != np.bool_):
            raise InvalidInput(f"mask is {self.mask.dtype} {list(self.mask.shape)}, bool [rows, columns] was expected")


RegionKind = Literal["box", "point", "mask"]


@dataclass(frozen=True, eq=False)
class PromptRegion:
    """A place the user points at, in scan pixels of the shown frame: box, point (x, y) or bool [rows, columns] mask."""

    kind: RegionKind
    box: Box | None = None
    point: Point | None = None
    mask: Mask | None = None

    def __post_init__(self) -> None:
        given = {"box": self.box, "point": self.point, "mask": self.mask}
        if given[self.kind] is None or sum(v is not None for v in given.values()) != 1:
            raise InvalidInput(f"a {self.kind} region needs exactly its {self.kind}")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise InvalidInput(f"box {self.box} is empty; x0 < x1 and y0 < y1 was expected")


@dataclass(frozen=True, eq=False)
class Example:
    """Another picture with what is to be outlined in it: `mask` bool [rows, columns] on frame `frame` of `scan`."""

    scan: Scan
    mask: Mask
    frame: int = 0

    def __post_init__(self) -> None:
        expected = (self.scan.rows, self.scan.columns)
        if self.mask.dtype != np.bool_ or self.mask.shape != expected:
            raise InvalidInput(
                f"the mask of an example is {self.mask.dtype} {list(self.mask.shape)}, bool {list(expected)} as its "
                "image was expected"
            )
        if not self.mask.any():
            raise InvalidInput("the mask of an example is empty; at least one pixel of its image was expected")


@dataclass(frozen=True, eq=False)
class Turn:
    """An earlier question of a conversation as it was asked, and its answer as shown and with tags as written.

    regions: those that the question was about.
    """

    question: str
    text: str
    tagged_text: str
    regions: tuple[PromptRegion, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What is asked: text (never empty), the regions it is about, the language of the answer, the frame (0-based).

    history: earlier turns about the same scans. examples: what is to be outlined, shown on other images first, for a
    family that takes examples. settings: how the family is to ask, by name; each family tells which
    it has (`Family.settings`), and one that it does not have is an error.
    """

    text: str
    regions: tuple[PromptRegion, ...] = ()
    language: Language = "en"
    frame: int = 0
    history: tuple[Turn, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InvalidInput("the prompt is empty; pass --prompt with a question or an instruction")


@dataclass(frozen=True)
class Provenance:
    """What made an answer: bundle, back end and device really used, precision by graph role, counts, timings in ms."""

    edgemed: str
    family: str
    bundle: str
    bundle_sha256: str
    backend: str
    device: str
    precision: Mapping[str, str]
    decode: str
    tokens: Mapping[str, int]
    timings_ms: Mapping[str, float]
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One item of a grounded report: what is said, and which of the answer's regions it is about (their indices)."""

    text: str
    regions: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Answer:
    """The reply. `text` has no region tags, `tagged_text` has them as the model wrote them; regions in scan pixels.

    notes: what was left out of the answer and why (a malformed box, the token limit), one line each.
    labels: of a classification, those of the given list that the answer means. findings: of a grounded report.
    router: what the routers said, if it was asked for: probabilities [prompt and answer tokens, layers, experts].
    vocabulary: ids from this one on stand for rows of images and regions. written_ids: the prompt's ids as the family's
    own code writes them, where it has others for images and regions.
    """

    text: str
    tagged_text: str
    regions: tuple[Region, ...]
    provenance: Provenance
    prompt_ids: tuple[int, ...] = ()
    generated_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    router: npt.NDArray[np.float32] | None = None
    vocabulary: int | None = None
    written_ids: tuple[int, ...] | None = None
