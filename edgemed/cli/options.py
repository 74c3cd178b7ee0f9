"""Options that verbs which ask a model share: what is asked, by which words, how it is written, how scans are shown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgemed.errors import EdgemedError

if TYPE_CHECKING:
    from edgemed.core import Language
    from edgemed.infer import DecodeMode, InferOptions, Session

C = TypeVar("C", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Asking:
    """The shared options, under the names they have on the command line."""

    bundle: str = "nano"
    backend: str = "auto"
    device: str = "auto"
    allow_cpu: bool = False
    lang: str = "auto"
    frame: int = 0
    window: str | None = None
    decode: DecodeMode = "auto"
    no_grammar: bool = False
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    beams: int = 1
    min_score: float = 0.0
    settings: tuple[str, ...] = ()
    compat: str | None = None
    task: str | None = None
    prompts_file: str | None = None
    labels: str | None = None
    quiet: bool = False

    def open_session(self) -> Session:
        """Return the session over the bundle; raises what `edgemed.infer.open_session` raises."""
        from edgemed import infer

        return infer.open_session(
            bundle=self.bundle, backend=self.backend, device=self.device, allow_cpu=self.allow_cpu, tell=self.tell
        )

    def tell(self, line: str) -> None:
        """Print a note on stderr, unless notes are not wanted."""
        if not self.quiet:
            print(f"note: {line}", file=sys.stderr)

    def family_settings(self) -> dict[str, str]:
        """Return the settings for the family: those of --set, and those that have an option of their own.

        Raises EdgemedError (usage) if a --set has another form than NAME=VALUE.
        """
        settings: dict[str, str] = {}
        for text in self.settings:
            name, equals, value = text.partition("=")
            if not (name and equals):
                raise EdgemedError(f"--set {text!r} has another form than NAME=VALUE")
            settings[name] = value
        own = {"compat": self.compat, "task": self.task, "prompts": self.prompts_file, "labels": self.labels}
        return {**settings, **{name: value for name, value in own.items() if value is not None}}

    def infer_options(self, *, router: bool = False) -> InferOptions:
        """Return how an answer is written. Raises InvalidInput if the numbers do not fit each other."""
        from edgemed.infer import InferOptions

        return InferOptions(
            decode=self.decode,
            grammar=not self.no_grammar,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            beams=self.beams,
            router=router,
            min_score=self.min_score,
        )

    def language(self, text: str) -> Language:
        """Return the language of the answer to `text`: the one that was set, else the text's own."""
        from edgemed.language import answer_language

        chosen: dict[str, Language] = {"en": "en", "zh": "zh"}
        return chosen.get(self.lang) or answer_language(text)


def check_device(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    """Return `value` if it is auto, cpu, gpu or gpu:N; raises click.BadParameter."""
    kind, colon, number = value.partition(":")
    if value in ("auto", "cpu", "gpu") or (kind == "gpu" and colon and number.isdecimal()):
        return value
    raise click.BadParameter(f"{value!r} is not auto, cpu, gpu or gpu:N.")


def check_kinds(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Return the kinds of results in lists with commas, each once; raises click.BadParameter for an unknown one."""
    asked = [kind.strip() for text in value for kind in text.split(",")]
    if not asked:
        return ()
    from edgemed.report.results import KINDS  # here, for it needs numpy

    unknown = [kind for kind in asked if kind not in KINDS]
    if unknown:
        raise click.BadParameter(f"{', '.join(map(repr, unknown))} is no kind of result; {', '.join(KINDS)} are.")
    return tuple(kind for kind in KINDS if kind in asked)


def _together(*options: Callable[[Any], Any]) -> Callable[[C], C]:
    """Return a decorator that adds `options` in this order."""

    def add(function: C) -> C:
        for option in reversed(options):
            function = option(function)
        return function

    return add


family_options = _together(
    click.option("--task", metavar="NAME", help="Whose base prompt goes with the question (families that have one)."),
    click.option("--prompts", "prompts_file", metavar="FILE", help="Base prompts from the owner's meta file."),
    click.option("--labels", metavar="NAME|FILE", help="Labels of a classification."),
    click.option("--compat", metavar="NAME", help="Whose quirks are kept: reference, corrected or release-cli."),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="A setting of the model's family; repeatable. 'edgemed models show BUNDLE' lists them.",
    ),
)

series_options = _together(
    click.option("--series", metavar="UID", help="The series of a folder; UID#2 is the second stack of one."),
    click.option("--select", metavar="FILE", help="Selection rules, the JSON of MONAI Deploy's series selector."),
    click.option(
        "--slices",
        metavar="auto|middle|all|every:N|LIST",
        help="Which slices are asked, from 0; a LIST as 3,5,10-20. Of a series, auto (those that show what is asked "
        "for) is the default; a single file becomes a series of its frames.",
    ),
    click.option("--resample", is_flag=True, help="Volumes of unevenly spaced or leaning slices too."),
)

model_options = _together(
    click.option("--bundle", default="nano", show_default=True, metavar="NAME|FOLDER", help="The model to ask."),
    click.option(
        "--backend",
        type=click.Choice(["auto", "onnxruntime", "tensorrt", "torch"]),
        default="auto",
        show_default=True,
        help="The engine that runs the graphs.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|gpu|gpu:N",
        callback=check_device,
        help="Where.",
    ),
    click.option("--allow-cpu", is_flag=True, help="Use the CPU if the GPU that was asked for is not there."),
)

shown_options = _together(
    click.option(
        "--lang",
        type=click.Choice(["auto", "en", "zh"]),
        default="auto",
        show_default=True,
        help="Language of the answer; auto: that of the question.",
    ),
    click.option(
        "--frame", type=click.IntRange(min=0), default=0, show_default=True, help="Frame of a multi-frame file."
    ),
    click.option(
        "--window",
        metavar="PRESET|CENTER,WIDTH",
        help="Grey levels to show: a preset (lung, bone, brain ...) or numbers.",
    ),
)

writing_options = _together(
    click.option(
        "--decode",
        type=click.Choice(["auto", "plain"]),
        default="auto",
        show_default=True,
        help="plain: one token a step, the reference for every faster way.",
    ),
    click.option("--no-grammar", is_flag=True, help="Let the model write what it likes."),
    click.option(
        "--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer."
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="0: always the likeliest token.",
    ),
    click.option(
        "--beams",
        type=click.IntRange(1, 16),
        default=1,
        show_default=True,
        help="Above 1: beam search, at temperature 0.",
    ),
    click.option(
        "--min-score",
        type=click.FloatRange(0, 1),
        default=0.0,
        help="Mark regions whose score is lower as uncertain.",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For a temperature above 0."),
)


result_options = _together(
    click.option(
        "--to",
        multiple=True,
        callback=check_kinds,
        metavar="KIND,...",
        help="Which files are written into FOLDER: json, seg, sr, gsps, sc, pdf (DICOM), nifti, fhir, png. A list, "
        "repeatable; json if it is not given.",
    ),
    click.option("--labelmap", is_flag=True, help="The SEG as LABELMAP instead of BINARY."),
    click.option("--seg-full-frames", is_flag=True, help="The SEG with its empty frames too; some viewers need them."),
    click.option("--nrrd", is_flag=True, help="NRRD as 3D Slicer reads it (.seg.nrrd) instead of NIfTI."),
)


def keep_libraries_quiet() -> None:
    """Silence warnings and log lines of libraries: they may quote values of a file."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())
