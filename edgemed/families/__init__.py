"""The family seam: how one kind of model turns a question into feeds and what was decoded into an answer.

A family is one file pair: the runtime half here (NumPy and a tokenizer, no torch), the build half `*_torch` beside it.
`infer.Session` runs the graphs between the calls of `Family` and knows no family by name:

    prepare         scans, prompt       -> Prepared      feeds of vision_encoder and projector; none without a scan
    ask             features, tokens    -> Question      prompt ids, grammar, what the decoder is fed with each call
    mask_feeds      what was written    -> feeds         of mask_decoder, one batch after another; none without one
    read_answer     text and masks      -> Reading       text, places in scan pixels, notes

A graph input that has the name of an earlier graph's output is fed with that output; a family gives only the others.
Covers the protocol, its values and the table. Does not cover running graphs or decoding.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgemed.box_grammar import Grammar
from edgemed.bundle import Bundle
from edgemed.core import Answer, Finding, Language, Prompt, Region, Scan
from edgemed.drafts import Drafter
from edgemed.errors import BundleError, EdgemedError, InvalidInput
from edgemed.graphs import Feeds, GraphSpec
from edgemed.token_choice import NO_NUMBERS, Numbers

Array = npt.NDArray[Any]

EXAMPLE = "example_"
"""How the names of the projector's outputs for examples begin."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """The feeds of the first two graphs for one scan and prompt, and `state`: what the family wants back (views ...).

    vision: feeds of vision_encoder; equal bytes mean equal features, so they are also the key under which features are
    kept. projector: feeds of projector beside the features. examples: of other pictures that are shown before the
    question, in order, without examples of their own.
    """

    vision: Feeds
    projector: Feeds
    state: Any
    examples: tuple[Prepared, ...] = ()


@dataclass(frozen=True, eq=False)
class Question:
    """What the decoder starts from: ids, feeds that every call repeats, the grammar, the ids decoding must know.

    keep_hidden: where one of these ids goes in, the decoder's hidden state is kept for the mask decoder; None: at every
    position. Without prompt ids nothing is decoded: the mask decoder alone answers. drafter: guesses at the answer,
    which make it faster and change nothing else. written_ids: the prompt as the family's own code writes it, where
    that has other ids for images and regions. numbers: the tokens of coordinates, and the number each writes.
    """

    prompt_ids: Sequence[int]
    fixed: Feeds
    grammar: Grammar[Any]
    eos_id: int
    keep_hidden: frozenset[int] | None = frozenset()
    drafter: Drafter | None = None
    written_ids: Sequence[int] | None = None
    numbers: Numbers = NO_NUMBERS


@dataclass(frozen=True, eq=False)
class Written:
    """What the decoder wrote: ids without the end token, their log-probabilities, hidden states, spreads of numbers.

    hidden[i] is the state where ids[i] went in, so that it predicts ids[i + 1]; hidden[-1] is that of the prompt's last
    token.
    """

    ids: Sequence[int]
    log_probs: Sequence[float]
    hidden: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    ended: bool = True
    spreads: Sequence[float | None] = ()


@dataclass(frozen=True, eq=False)
class Reading:
    """An answer in scan pixels, before provenance; fields as in `core.Answer`."""

    text: str
    tagged_text: str
    regions: tuple[Region, ...]
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


class Family(Protocol):
    """The runtime half of a family over one opened bundle. Holds no state between questions; safe to share.

    steady_text: the share of answers whose text smaller weights must not change; 0 where texts are written freely, so
    that one word in another order says nothing.
    """

    steady_text: float

    def graphs(self) -> Mapping[str, GraphSpec]:
        """Return the GraphSpec of each graph the family runs, by role."""

    def settings(self) -> Mapping[str, str]:
        """Return the settings a Prompt may hold: name -> what it may be and what it does, for a help text."""

    def lead_in(self, prompt: Prompt) -> Prompt | None:
        """Return a question to ask before `prompt` about the same scans, or None: the usual case."""

    def follow_up(self, prompt: Prompt, first: Answer) -> Prompt:
        """Return `prompt` with what the answer to its `lead_in` tells."""

    def prepare(self, scans: Sequence[Scan], prompt: Prompt) -> Prepared:
        """Return the first feeds.

        Raises InvalidInput if the number of scans, the prompt's frame, its regions or its settings do not fit.
        """

    def ask(self, prompt: Prompt, prepared: Prepared, projected: Feeds, *, constrained: bool = True) -> Question:
        """Return the question. Unless `constrained`, any token may follow any.

        projected: the projector's outputs; where there are examples, those of all examples are there too, one after the
        other along a new first axis, under the names with `EXAMPLE` before them.
        """

    def mask_feeds(self, prompt: Prompt, prepared: Prepared, projected: Feeds, written: Written) -> tuple[Feeds, ...]:
        """Return the feeds of mask_decoder beside the features, batch by batch; () if nothing is to be outlined."""

    def read_answer(
        self,
        scans: Sequence[Scan],
        prompt: Prompt,
        prepared: Prepared,
        projected: Feeds,
        written: Written,
        masks: Sequence[Feeds],
    ) -> Reading:
        """Return the answer; masks: the mask decoder's outputs for each of `mask_feeds`. Never raises on odd text."""

    def embedding(self, features: Feeds) -> npt.NDArray[np.float32]:
        """Return what an image is like, [width], of length 1; features: the outputs of vision_encoder."""

    def notice(self, language: Language) -> str:
        """Return the sentence that goes with every answer of this bundle (what it must not be used for), or ""."""


FAMILIES: Mapping[str, str] = {
    "native": "edgemed.families.native:Native",
    "medrega": "edgemed.families.medrega:MedRega",
    "medplib": "edgemed.families.medplib:Medplib",
}
"""Name in a manifest -> "module:class" of the runtime half, imported on use."""


def open_family(bundle: Bundle) -> Family:
    """Return the runtime half for `bundle`. Raises BundleError if its family is not known or its graphs do not fit."""
    name = bundle.manifest.family
    if name not in FAMILIES:
        raise BundleError(f"the bundle is of family {name!r}; this version knows {', '.join(sorted(FAMILIES))}")
    module, _, attribute = FAMILIES[name].partition(":")
    family: Family = getattr(importlib.import_module(module), attribute)(bundle)
    return family


def settings_of(name: str) -> Mapping[str, str]:
    """Return the settings that a prompt to a family may hold, each with what it may be; {} for an unknown family."""
    if name not in FAMILIES:
        return {}
    settings: Mapping[str, str] = getattr(importlib.import_module(FAMILIES[name].partition(":")[0]), "SETTINGS", {})
    return settings


class SingleQuestions:
    """What most families do before a question: nothing."""

    steady_text = 0.0

    def lead_in(self, prompt: Prompt) -> Prompt | None:
        """Return None."""
        return None

    def follow_up(self, prompt: Prompt, first: Answer) -> Prompt:
        """Return `prompt` as it is."""
        return prompt


def check_settings(prompt: Prompt, known: Mapping[str, str], family: str, *, examples: bool = False) -> None:
    """Raise InvalidInput naming the first setting of `prompt` that the family does not have.

    examples: whether the family takes any; a prompt with some is refused where it does not.
    """
    if prompt.examples and not examples:
        raise InvalidInput(f"the family {family} takes no examples; ask without them")
    for name in prompt.settings:
        if name not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise InvalidInput(f"the family {family} has no setting {name!r}; {has}")


def chosen(prompt: Prompt, name: str, allowed: Sequence[str], default: str) -> str:
    """Return the setting `name` of `prompt`, or `default`. Raises InvalidInput if it is none of `allowed`."""
    value = prompt.settings.get(name, default)
    if value not in allowed:
        raise InvalidInput(f"{name} is {value!r}; one of {', '.join(allowed)} was expected")
    return value


def mean_direction(rows: Array) -> npt.NDArray[np.float32]:
    """Return the mean of all rows of [..., width] at length 1.

    Raises InvalidInput if it has no direction: all zero, or not finite.

    >>> mean_direction(np.array([[[3.0, 0.0], [3.0, 8.0]]]))
    array([0.6, 0.8], dtype=float32)
    """
    mean = rows.reshape(-1, rows.shape[-1]).mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(mean))
    if not 0 < length < np.inf:
        raise InvalidInput(f"the image's features have a mean of length {length:g}; there is nothing to compare")
    return np.asarray(mean / length, np.float32)


def one_scan(scans: Sequence[Scan], family: str) -> Scan:
    """Return the only scan. Raises InvalidInput if there are more, EdgemedError (usage) if there is none."""
    if not scans:
        raise EdgemedError(f"an INPUT is missing: the family {family} answers about an image")
    if len(scans) != 1:
        raise InvalidInput(f"{len(scans)} images were given; the family {family} answers about one image at a time")
    return scans[0]
