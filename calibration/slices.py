"""Medical slices for calibration: which were chosen, and what every graph of a bundle is fed when asked about them.

Covers DICOM, PNG and JPEG files of a folder, or public files that come with pydicom; a choice that is balanced over
modalities; feeds of all four graphs from real prompts and real decoding. A slice is recorded by its SHA-256 alone.
Does not cover ranges (`ranges`) or what is done with them (`qdq`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.backends import Outputs, Runner, open_runner
from edgemed.bundle import Bundle
from edgemed.core import Prompt, PromptRegion, Scan
from edgemed.decoding import DecodeOptions, decode
from edgemed.dicom import read_scans
from edgemed.errors import CannotRead, InvalidInput, NoInput
from edgemed.families import Family, Prepared, Written, open_family
from edgemed.families.specs import every_logit
from edgemed.files import sha256_of
from edgemed.graphs import Feeds, GraphSpec

PUBLIC_SLICES = (
    "693_J2KI.dcm",  # CT, head
    "examples_overlay.dcm",  # MR, abdomen
    "examples_jpeg2k.dcm",  # US
    "CT_small.dcm",
    "MR_small.dcm",
    "examples_palette.dcm",  # US
    "JPEG-lossy.dcm",  # NM, whole body
    "J2K_pixelrep_mismatch.dcm",  # CT, head
    "examples_ybr_color.dcm",  # US
    "RG1_J2KI.dcm",  # CR, chest
    "MR2_J2KI.dcm",  # shoulder
    "US1_J2KR.dcm",
)
"""Files of the packages pydicom and pydicom-data, used where no folder is given; what is not installed is left out."""

EXPECTED_MODALITIES = ("CT", "MR", "US", "CR")
"""What a set of slices should have at least one of; the public set has all four where pydicom-data is installed."""

_READ_AT_MOST = 20
"""Files read for each slice that is wanted: a large archive is sampled, not read to its end."""

QUESTIONS = (
    Prompt("Please segment the organ in this image."),
    Prompt("请列出可见的结构", language="zh"),
    Prompt("Where is the liver?"),
    Prompt("图像中是什么器官？", language="zh"),
    Prompt("outline", settings={"task": "outline"}),
)
"""What is asked about every slice, and again about a box in its middle; a family leaves out what it does not take."""


@dataclass(frozen=True, eq=False)
class Slices:
    """Scans with the SHA-256 of the file that each came from, and what is to be said about the choice.

    No name, path, identifier or date of a file is kept.
    """

    scans: tuple[Scan, ...]
    digests: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The SHA-256 that stands for the whole set, whatever its order: a manifest's `calibration_digest`."""
        return hashlib.sha256("\n".join(sorted(self.digests)).encode()).hexdigest()

    @property
    def modalities(self) -> dict[str, int]:
        """How many slices there are of each modality."""
        found = [scan.modality for scan in self.scans]
        return {name: found.count(name) for name in sorted(set(found))}

    def split(self, held_out: int) -> tuple[Slices, Slices]:
        """Return (the slices to calibrate with, the last `held_out` to judge with). Raises NoInput if one is empty."""
        at = len(self.scans) - held_out
        if not 0 < at < len(self.scans):
            raise NoInput(
                f"{len(self.scans)} slices cannot be split with {held_out} held out; at least one of each was expected"
            )
        return (
            Slices(self.scans[:at], self.digests[:at], self.warnings),
            Slices(self.scans[at:], self.digests[at:], self.warnings),
        )


def read_slices(
    folder: Path | None = None,
    most: int = 16,
    *,
    seed: int = 0,
    expected: Collection[str] = EXPECTED_MODALITIES,
) -> Slices:
    """Return up to `most` slices of `folder` and its folders (None: the public set), modality after modality in turn.

    Which ones is decided by `seed` and the files' places in the folder. Files that are no scans, show nothing but one
    grey, or are there twice are left out. A modality of `expected` that is missing is told in `warnings`.

    Raises CannotRead where there is no such folder, NoInput where it has no image.
    """
    if most < 1:
        raise InvalidInput(f"{most} slices were asked for; a number above 0 was expected")
    paths = _public_files() if folder is None else _files_of(folder, seed)
    found: dict[str, list[tuple[Scan, str]]] = {}
    seen: set[str] = set()
    for path, scan in read_scans(paths[: most * _READ_AT_MOST]):
        if isinstance(scan, Scan) and scan.shown(scan.first_frame).std() > 0:
            digest = sha256_of(Path(path))
            of_kind = found.setdefault(scan.modality, [])
            if digest not in seen and len(of_kind) < most:
                of_kind.append((scan, digest))
            seen.add(digest)
    if not found:
        where = "the pydicom package" if folder is None else str(folder)
        raise NoInput(f"no image among {len(paths)} files in {where}; a folder with DICOM, PNG or JPEG was expected")
    chosen = _in_turn([found[name] for name in sorted(found)])[:most]
    missing = sorted(set(expected) - {scan.modality for scan, _ in chosen})
    warnings = [f"no slice of modality {name}: ranges and gates say nothing about it" for name in missing]
    return Slices(tuple(s for s, _ in chosen), tuple(d for _, d in chosen), tuple(warnings))


def _files_of(folder: Path, seed: int) -> list[Path]:
    """Return the folder's files, mixed. Raises CannotRead where there is no such folder."""
    if not folder.is_dir():
        raise CannotRead(f"{folder} is not a folder; a folder with DICOM, PNG or JPEG was expected")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    random.Random(seed).shuffle(paths)  # noqa: S311 - a repeatable choice, nothing to keep secret
    return paths


def _public_files() -> list[Path]:
    from pydicom.data import get_testdata_file

    found = [get_testdata_file(name, download=False) for name in PUBLIC_SLICES]
    return [Path(str(path)) for path in found if path is not None]


def _in_turn(groups: Sequence[Sequence[tuple[Scan, str]]]) -> list[tuple[Scan, str]]:
    """Return the first of every group, then the second of every group, and so on."""
    return [group[i] for i in range(max(map(len, groups))) for group in groups if i < len(group)]


Sequences = tuple[tuple[Feeds, ...], ...]
"""Calls of one graph; its state is zero at the start of each inner tuple and carried on inside it."""


@dataclass(frozen=True)
class Recording:
    """What the graphs were fed: role -> sequences of calls. An image's features are one object, held once.

    warnings: graphs that no prompt led to.
    """

    calls: Mapping[str, Sequences]
    warnings: tuple[str, ...] = ()


@dataclass(eq=False)
class _Tape:
    """A Runner that notes what goes in. A decoder with a split head gives all its logits: none goes unjudged."""

    inner: Runner
    spec: GraphSpec
    calls: list[list[Feeds]] = field(default_factory=list)

    @property
    def backend(self) -> str:
        return self.inner.backend

    @property
    def device(self) -> str:
        return self.inner.device

    def run(self, feeds: Feeds) -> Outputs:
        if self.spec.role == "decoder":
            kept = feeds["input_ids"].shape[1] - int(feeds["logits_from"][0])
            feeds = {**feeds, **every_logit(self.spec, kept)}
        self.calls[-1].append(dict(feeds))
        return self.inner.run(feeds)

    def start(self) -> None:
        """Begin a sequence: the state is zero."""
        self.inner.reset()
        self.calls.append([])

    def reset(self) -> None:
        self.inner.reset()

    def close(self) -> None:
        self.inner.close()


def record_feeds(
    bundle: Bundle,
    scans: Sequence[Scan],
    *,
    questions: Sequence[Prompt] = QUESTIONS,
    max_new_tokens: int = 16,
    threads: int | None = None,
) -> Recording:
    """Return what every graph of a full-precision bundle is fed when `questions` are asked about each of `scans`.

    The decoder gets prefill and every step of up to `max_new_tokens` tokens, with the image's own rows; the mask
    decoder gets what the answers and the boxes lead to. A question that the family does not take is left out.

    Raises InvalidInput if none is taken, and what opening or running a graph raises.
    """
    family = open_family(bundle)
    tapes: dict[str, _Tape] = {}
    try:
        for role, spec in family.graphs().items():
            tapes[role] = _Tape(
                open_runner("onnxruntime", bundle.graph_path(role), spec, device="cpu", threads=threads), spec
            )
        asked = sum(_ask_all(family, scan, tapes, questions, max_new_tokens) for scan in scans)
    finally:
        for tape in tapes.values():
            tape.close()
    if not asked:
        raise InvalidInput(f"the family {bundle.manifest.family} took none of the {len(questions)} questions")
    calls = {role: tuple(tuple(sequence) for sequence in tape.calls) for role, tape in tapes.items()}
    warnings = tuple(f"no question led to the {role}: it has no feeds" for role in calls if not calls[role])
    return Recording(calls, warnings)


def _ask_all(
    family: Family, scan: Scan, tapes: Mapping[str, _Tape], questions: Sequence[Prompt], max_new_tokens: int
) -> int:
    """Ask every question about a scan; return how many the family took."""
    images: dict[bytes, Outputs] = {}
    middle = PromptRegion("box", box=(scan.columns * 0.25, scan.rows * 0.25, scan.columns * 0.75, scan.rows * 0.75))
    asked = 0
    for question in (replace(q, frame=scan.first_frame, regions=r) for q in questions for r in ((), (middle,))):
        try:
            prepared = family.prepare([scan], question)
        except InvalidInput:
            continue  # a setting or a region that this family does not have
        asked += _ask(family, question, prepared, tapes, images, max_new_tokens)
    return asked


def _ask(
    family: Family,
    prompt: Prompt,
    prepared: Prepared,
    tapes: Mapping[str, _Tape],
    images: dict[bytes, Outputs],
    max_new_tokens: int,
) -> bool:
    """Run one question through the graphs; return whether the family took it."""
    specs = family.graphs()
    key = b"".join(np.ascontiguousarray(prepared.vision[name]).tobytes() for name in sorted(prepared.vision))
    if key not in images:
        images[key] = _run(tapes, specs, "vision_encoder", prepared.vision)
    features = images[key]
    projected = _run(tapes, specs, "projector", prepared.projector, features)
    try:
        question = family.ask(prompt, prepared, projected)
    except InvalidInput:
        return False  # a task that this family does not have
    written = Written([], [])
    if question.prompt_ids:
        dims = specs["decoder"].dims
        options = DecodeOptions(
            eos_id=question.eos_id,
            max_new_tokens=max_new_tokens,
            keep_hidden=question.keep_hidden,
            cache=dims["cache"].max if "cache" in dims else DecodeOptions.cache,
        )
        tapes["decoder"].start()
        decoded = decode(tapes["decoder"], question.prompt_ids, question.fixed, question.grammar, options)
        written = Written(decoded.ids, decoded.log_probs, dict(decoded.hidden), decoded.ended)
    for batch in family.mask_feeds(prompt, prepared, projected, written):
        _run(tapes, specs, "mask_decoder", batch, features, projected)
    return True


def _run(
    tapes: Mapping[str, _Tape], specs: Mapping[str, GraphSpec], role: str, feeds: Feeds, *earlier: Feeds
) -> Outputs:
    """Return a graph's outputs; inputs that `feeds` lacks are those of earlier graphs' outputs."""
    known: dict[str, npt.NDArray[Any]] = {n: a for outputs in earlier for n, a in outputs.items()}
    tapes[role].start()
    return tapes[role].run(
        {t.name: feeds[t.name] if t.name in feeds else known[t.name] for t in specs[role].fed_inputs}
    )
