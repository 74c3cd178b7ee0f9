"""The published families write the same with every shortcut as token by token, drawn tokens too; on random logits, an
answer that can be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgemed.core import Prompt
from edgemed.decoding import DecodeOptions, decode
from edgemed.families.native_lexicon import STRUCTURES
from edgemed.infer import InferOptions
from edgemed.language import answer_language

QUESTIONS = (
    "Where is the liver?", "Please locate <ref>left kidney</ref>.", "Is it normal?", "图像里有什么？", "Why?",
)  # fmt: skip
ASKED = {
    "en": ("Where is the {}?", "Please locate <ref>{}</ref>.", "Is the {} enlarged?", "Segment the {}."),
    "zh": ("{}在哪里？", "请定位<ref>{}</ref>。", "{}正常吗？", "请分割{}。"),
}
compact = pytest.mark.parametrize("reference", ["compact"], indirect=True)
families = pytest.mark.parametrize("name", ["medrega", "medplib"])


def check_same(tiny: Any, text: str, **options: Any) -> int:
    """Ask plainly and with every shortcut; return how many tokens both wrote."""
    prompt = Prompt(text, language=answer_language(text))
    plain, auto = (
        tiny.session.ask(tiny.scan("square"), prompt, InferOptions(decode=mode, **options))
        for mode in ("plain", "auto")
    )
    assert auto.generated_ids == plain.generated_ids, (text, options)
    assert (auto.text, auto.tagged_text) == (plain.text, plain.tagged_text)
    assert [region.box for region in auto.regions] == [region.box for region in plain.regions]
    assert auto.provenance.tokens["decoder_calls"] <= plain.provenance.tokens["decoder_calls"]
    return len(auto.generated_ids)


@families
@pytest.mark.parametrize("grammar", [True, False])
def test_published_families_write_the_same(name: str, grammar: bool, medrega: Any, medplib: Any) -> None:
    tiny = {"medrega": medrega, "medplib": medplib}[name]
    for text in QUESTIONS:
        for temperature in (0.0, 1.0):
            check_same(tiny, text, grammar=grammar, max_new_tokens=48, temperature=temperature, seed=7)


@compact
@families
@pytest.mark.slow
def test_three_hundred_questions_in_two_languages_are_answered_the_same(name: str, medrega: Any, medplib: Any) -> None:
    tiny = {"medrega": medrega, "medplib": medplib}[name]
    asked = [
        template.format((term.en if language == "en" else term.zh)[0])
        for term in STRUCTURES
        for language, templates in ASKED.items()
        for template in templates
    ]
    assert len(asked) >= 300
    assert sum(check_same(tiny, text, max_new_tokens=24) for text in asked) > 10 * len(asked)


class Noise:
    """A decoder of random logits, which depend on the position and on `seed`."""

    backend, device = "fake", "none"

    def __init__(self, table: npt.NDArray[np.float32]) -> None:
        self.table, self.seed = table, 0

    def run(self, feeds: Any) -> dict[str, npt.NDArray[Any]]:
        past, start = int(feeds["past_length"][0]), int(feeds["logits_from"][0])
        rows = (np.arange(past + start, past + feeds["input_ids"].shape[1]) * 31 + self.seed * 97) % len(self.table)
        return {"logits": self.table[rows][None], "hidden": np.zeros((1, len(rows), 1), np.float32)}


@compact
@pytest.mark.slow
def test_ten_thousand_answers_of_medplib_are_text_and_seg(medplib: Any) -> None:
    family, text = medplib.session.family, medplib.session.family._text
    grammar, pieces = family._grammar, text.tokens
    named = {token.id for token in pieces.added} - {text.seg_id}
    table = np.random.default_rng(5).normal(0, 3, (1499, family._vocabulary)).astype(np.float32)
    table[:, text.seg_id] += 6
    table[:, text.stop_id] += 4
    runner, masks = Noise(table), 0
    for seed in range(10_000):
        runner.seed = seed
        options = DecodeOptions(eos_id=text.stop_id, max_new_tokens=60, seed=seed, temperature=seed % 2)
        ids = decode(runner, [0], {}, grammar, options).ids  # type: ignore[arg-type]
        assert ids
        assert not named & set(ids)
        assert max(ids) < family._vocabulary
        written = pieces.decode_verbatim(ids)
        assert written.count("<SEG>") >= ids.count(text.seg_id)
        masks += ids.count(text.seg_id)
    assert masks > 5000
