"""Decoder calls of answers whose boxes are text (MedRegA): plain, with forced tokens, with drafts of known places.

    python tests/bench/bench_text_boxes.py

The model is a script that says grounded answers; tokenizer and grammar are those of tests/reference/medrega-tiny, which
spells a digit as a token, as the published one does. Prints a Markdown table of tokens and calls; no time is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.decoding import DecodeOptions, decode
from edgemed.drafts import Drafter, PhraseDrafts
from edgemed.families.medrega import Drafts
from edgemed.families.medrega_text import MedRegaText, parse, place_text
from edgemed.families.published_tokenizer import convert
from edgemed.families.published_tokens import PublishedTokens
from edgemed.text_box_grammar import KnownPlace, TextBoxGrammar, TextBoxTokens, text_bytes

TINY = Path(__file__).resolve().parents[1] / "reference" / "medrega-tiny"
KIDNEY, LIVER = (612, 333, 745, 498), (98, 201, 530, 777)
ANSWERS = {
    "one object, one box": place_text("left kidney", [KIDNEY]),
    "three objects": ", ".join(place_text(n, [b]) for n, b in (("liver", LIVER), ("spleen", KIDNEY), ("left", LIVER))),
    "one object, three boxes": place_text("object", [KIDNEY, LIVER, (5, 40, 17, 62)]),
    "a grounded report": f"{place_text('liver', [LIVER])}: Normal. {place_text('left kidney', [KIDNEY])}: normal.",
}


class Scripted:
    """A Runner without a model that says one answer."""

    backend, device = "script", "none"

    def __init__(self, answer: Sequence[int], prompt: int, vocabulary: int) -> None:
        self.answer, self.prompt, self.vocabulary = answer, prompt, vocabulary

    def run(self, feeds: Any) -> dict[str, Any]:
        past, length = int(feeds["past_length"][0]), feeds["input_ids"].shape[1]
        ends = range(past + int(feeds["logits_from"][0]) + 1, past + length + 1)
        logits = np.zeros((len(ends), self.vocabulary), np.float32)
        for row, end in enumerate(ends):
            logits[row, self.answer[min(end - self.prompt, len(self.answer) - 1)]] = 9
        return {"logits": logits[None], "hidden": np.zeros((1, len(ends), 1), np.float32)}


def main() -> None:
    """Print the table."""
    tokens = PublishedTokens(convert(TINY, "4.37"))
    text = MedRegaText(tokens)
    texts = text_bytes(tokens.decode_verbatim, tokens.vocabulary, {t.id for t in tokens.added})
    marks = TextBoxTokens(*map(tokens.id_of, ("<ref>", "</ref>", "<box>", "</box>")), text.stop_id)
    grammar = TextBoxGrammar(marks, tokens.encode, texts, tokens.vocabulary)
    known = grammar.knowing([KnownPlace(tuple(tokens.encode("liver")), LIVER)])
    prompt = [1, 2, 3]
    print("| answer | tokens | plain | forced tokens | and phrases | one box known from the prompt |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, tagged in ANSWERS.items():
        ids = [*tokens.encode(tagged), text.stop_id]
        calls = []
        ways: list[tuple[TextBoxGrammar, Drafter | None]] = [
            (grammar, None), (grammar, PhraseDrafts([], longest=0)), (grammar, Drafts(grammar, PhraseDrafts([]))),
            (known, Drafts(known, PhraseDrafts([]))),
        ]  # fmt: skip
        for way, drafter in ways:
            runner = Scripted(ids, len(prompt), tokens.vocabulary)
            done = decode(runner, prompt, {}, way, DecodeOptions(eos_id=text.stop_id), drafter)
            assert list(done.ids) == ids[:-1], f"{name}: {parse(tokens.decode_verbatim(done.ids))}"
            calls.append(done.decoder_calls)
        shown = " | ".join(f"{n} ({calls[0] / n:.1f} x)" for n in calls[1:])
        print(f"| {name} | {len(ids) - 1} | {calls[0]} | {shown} |")


if __name__ == "__main__":
    main()
