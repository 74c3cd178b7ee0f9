"""What a quantized bundle must still do: outputs of every graph, and whole answers, against full precision.

Covers thresholds, rows for the report, and the comparison of two bundles' answers to the same questions. Does not cover
quality against labels (`edgemed.evaluation`) or which nodes are to blame (`sensitivity`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgemed.core import Answer, Prompt, PromptRegion, Region, Scan
from edgemed.errors import BundleError, InvalidInput
from edgemed.geometry import box_iou, dice
from edgemed.infer import InferOptions, Session, open_session


@dataclass(frozen=True)
class Gates:
    """Thresholds. cosine: of each output of a graph in int8 or fp8. The others are means over questions.

    same_text None: what the bundle's family promises (`Family.steady_text`).
    """

    cosine: float = 0.999
    box_iou: float = 0.90
    mask_dice: float = 0.97
    same_text: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not -1 <= value <= 1:
                raise InvalidInput(f"the threshold {name} is {value:g}; a number up to 1 was expected")


@dataclass(frozen=True)
class GraphRow:
    """One output of a quantized graph against full precision, over all held-out calls; smallest: cosine of a call."""

    graph: str
    precision: str
    output: str
    cosine: float
    smallest: float
    relative_error: float
    passed: bool


@dataclass(frozen=True)
class Agreement:
    """How far the answers of two bundles agree: questions asked, share of same texts, mean box IoU, mean mask Dice.

    boxes, masks: pairs behind the means; one that only one bundle gives counts 0. None: there was no pair.
    """

    prompts: int
    same_text: float
    boxes: int
    box_iou: float | None
    masks: int
    mask_dice: float | None


def compare_answers(
    reference: Path,
    candidate: Path,
    scans: Sequence[Scan],
    questions: Sequence[Prompt],
    *,
    max_new_tokens: int = 96,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Agreement:
    """Return how far the bundle in folder `candidate` answers as that in `reference` does, on the CPU.

    Each question is asked about every scan, and again about a box in its middle; what the family refuses is left out.

    Raises InvalidInput if it refuses all of them.
    """
    options = InferOptions(max_new_tokens=max_new_tokens)
    same, ious, overlaps = [], [], []
    with _open(reference, threads) as exact, _open(candidate, threads) as small:
        asked = [(scan, prompt) for scan in scans for prompt in _about(scan, questions)]
        for done, (scan, prompt) in enumerate(asked, 1):
            try:
                expected = exact.ask(scan, prompt, options)
            except InvalidInput:
                continue  # a setting or a region that this family does not have
            found = small.ask(scan, prompt, options)
            same.append(expected.text == found.text)
            for a, b in _pairs(expected, found):
                ious.append(box_iou(a.box, b.box) if a and b else 0.0)
                if (a and a.mask is not None) or (b and b.mask is not None):
                    both = a and b and a.mask is not None and b.mask is not None
                    overlaps.append(dice(a.mask, b.mask) if both else 0.0)  # type: ignore[union-attr,arg-type]
            if progress:
                progress(done, len(asked))
    if not same:
        raise InvalidInput(f"the family takes none of the {len(questions)} questions; there is nothing to judge")
    return Agreement(
        len(same), sum(same) / len(same), len(ious), _mean(ious), len(overlaps), _mean(overlaps)
    )  # fmt: skip


def missed(agreement: Agreement, gates: Gates, same_text: float) -> list[str]:
    """Return a text for each threshold of whole answers that was missed. same_text: where `gates` has none."""
    wanted = same_text if gates.same_text is None else gates.same_text
    rows = (
        ("same text in", agreement.same_text, wanted),
        ("mean box IoU", agreement.box_iou, gates.box_iou),
        ("mean mask Dice", agreement.mask_dice, gates.mask_dice),
    )
    return [f"{name} {value:.3f}, at least {least:g} was expected" for name, value, least in rows
            if value is not None and value < least]  # fmt: skip


def check_graphs(rows: Sequence[GraphRow], gates: Gates, worst: Callable[[str], str]) -> None:
    """Raise BundleError naming the first output that misses the gate; worst(role) says which layers cost most."""
    for row in rows:
        if not row.passed:
            raise BundleError(
                f"the quantized bundle is refused: {row.graph} in {row.precision}: cosine of {row.output} is "
                f"{row.cosine:.5f}, at least {gates.cosine:g} was expected; {worst(row.graph)}; nothing was written"
            )


def _open(folder: Path, threads: int | None) -> Session:
    return open_session(folder, backend="onnxruntime", device="cpu", threads=threads)


def _about(scan: Scan, questions: Sequence[Prompt]) -> Iterator[Prompt]:
    middle = PromptRegion("box", box=(scan.columns * 0.25, scan.rows * 0.25, scan.columns * 0.75, scan.rows * 0.75))
    for question in questions:
        for regions in ((), (middle,)):
            yield replace(question, frame=scan.first_frame, regions=regions)


def _pairs(expected: Answer, found: Answer) -> Iterator[tuple[Region | None, Region | None]]:
    """Yield regions that belong together: of the same label, in the order they were given; None where one is alone."""
    labels = dict.fromkeys(region.label for answer in (expected, found) for region in answer.regions)
    for label in labels:
        ours, theirs = ([r for r in answer.regions if r.label == label] for answer in (expected, found))
        for i in range(max(len(ours), len(theirs))):
            yield (ours[i] if i < len(ours) else None), (theirs[i] if i < len(theirs) else None)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
