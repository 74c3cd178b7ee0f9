"""What the runtime halves of both published families share: graphs, tokenizer, notice, settings of the bundle.

Does not cover what differs: pixels, texts, regions and answers (`medrega`, `medplib`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgemed.bundle import Bundle
from edgemed.core import Language
from edgemed.errors import BundleError
from edgemed.families import SingleQuestions
from edgemed.families.published_tokens import TOKENIZER, PublishedTokens
from edgemed.graphs import GraphSpec

NOTICE: Mapping[Language, str] = {
    "en": "Research model, not a medical device: not for diagnosis.",
    "zh": "研究模型，非医疗器械，不得用于诊断。",
}
"""What goes with an answer where the bundle's settings bring no `notice` of their own."""


class PublishedFamily(SingleQuestions):
    """A published family over one bundle, but for prompts and answers; see `families.Family`."""

    def __init__(self, bundle: Bundle, roles: Sequence[str], settings: Mapping[str, str]) -> None:
        self._graphs = {role: bundle.spec(role) for role in roles}
        self._settings = settings
        self._tokens = PublishedTokens.open(bundle.file(TOKENIZER))
        decoder = {t.name: t.shape[-1] for t in (*self._graphs["decoder"].inputs, *self._graphs["decoder"].outputs)}
        vocabulary, width = decoder.get("logits"), decoder.get("image_tokens")
        if not (isinstance(vocabulary, int) and isinstance(width, int) and self._tokens.vocabulary <= vocabulary):
            raise BundleError(f"the decoder has {vocabulary} logits, the tokenizer {self._tokens.vocabulary} tokens")
        self._vocabulary = vocabulary
        self._no_rows = np.zeros((1, width), np.float32)  # what a decoder is fed without an image
        self._notice: Mapping[Language, str] = {**NOTICE, **bundle.manifest.settings.get("notice", {})}

    def graphs(self) -> Mapping[str, GraphSpec]:
        """Return the GraphSpec of each graph, by role."""
        return self._graphs

    def notice(self, language: Language) -> str:
        """Return the sentence that goes with every answer."""
        return self._notice[language]

    def settings(self) -> Mapping[str, str]:
        """Return the settings of a prompt, each with what it may be."""
        return self._settings


def setting(bundle: Bundle, name: str, kind: type) -> Any:
    """Return a setting of the bundle's manifest. Raises BundleError if it is missing or of another kind."""
    value = bundle.manifest.settings.get(name)
    if not isinstance(value, kind):
        raise BundleError(f"bundle {bundle.manifest.name} lacks the setting {name!r}; export it again")
    return value
