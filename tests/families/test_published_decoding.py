"""The published families write the same with every shortcut as token by token, drawn tokens too."""

from __future__ import annotations

from typing import Any

import pytest

from edgemed.core import Prompt
from edgemed.infer import InferOptions
from edgemed.language import answer_language

QUESTIONS = (
    "Where is the liver?", "Please locate <ref>left kidney</ref>.", "Is it normal?", "图像里有什么？", "Why?",
)  # fmt: skip


@pytest.mark.parametrize("name", ["medrega", "medplib"])
@pytest.mark.parametrize("grammar", [True, False])
def test_published_families_write_the_same(name: str, grammar: bool, medrega: Any, medplib: Any) -> None:
    tiny = {"medrega": medrega, "medplib": medplib}[name]
    session, scan = tiny.session, tiny.scan("square")
    for text in QUESTIONS:
        prompt = Prompt(text, language=answer_language(text))
        for temperature in (0.0, 1.0):
            answers = [
                session.ask(
                    scan,
                    prompt,
                    InferOptions(decode=mode, grammar=grammar, max_new_tokens=48, temperature=temperature, seed=7),
                )
                for mode in ("plain", "auto")
            ]
            plain, auto = answers
            assert auto.generated_ids == plain.generated_ids, (text, temperature)
            assert auto.provenance.tokens["decoder_calls"] <= plain.provenance.tokens["decoder_calls"]
