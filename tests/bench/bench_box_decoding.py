"""Decoder calls and time of grounded answers: `--decode auto` against `plain`, both of which give the same tokens.

    python tests/bench/bench_box_decoding.py [--bundle nano] [--repeat 5] [SCAN...]

Prints a Markdown table: for each kind of question the tokens, calls and decoder time, least of the repetitions, one
question after the other on a warm session. Times are given twice: as they are where a question about the image was
asked before, so that the decoder's cache holds the image, and where it is the first one, so that the image is read too.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

from edgemed.core import Prompt, Scan
from edgemed.dicom import read_scan
from edgemed.families.native_lexicon import STRUCTURES
from edgemed.infer import DecodeMode, InferOptions, Session, open_session
from edgemed.language import answer_language

SAMPLE = Path(__file__).resolve().parents[1] / "files" / "sample_ct.dcm"
QUESTIONS = {
    "where is, English": [f"Where is the {STRUCTURES[s].en[0]}?" for s in range(0, len(STRUCTURES), 3)],
    "where is, Chinese": [f"{STRUCTURES[s].zh[0]}在哪里？" for s in range(0, len(STRUCTURES), 3)],
    "list, English": ["List the structures.", "Which structures are visible?", "Name everything you can see."],
    "list, Chinese": ["请列出可见的结构", "图中有哪些结构？", "列出所有结构"],
    "segment": ["Segment the liver.", "Outline the spleen.", "分割主动脉", "请勾画胃"],
    "describe": ["Describe the image.", "请描述这幅图像"],
}


@dataclass
class Sum:
    """Over the questions of one kind: tokens written, calls, milliseconds of the decoder."""

    tokens: int = 0
    calls: int = 0
    ms: float = 0.0
    first_ms: float = 0.0

    def add(self, other: Sum) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def ask(session: Session, scan: Scan, text: str, mode: DecodeMode, repeat: int) -> tuple[tuple[int, ...], Sum]:
    """Return (generated ids, what they took) of one question."""
    prompt = Prompt(text, language=answer_language(text), frame=scan.first_frame)
    best = {True: float("inf"), False: float("inf")}  # whether the image is read -> ms
    for turn in range(2 * repeat):
        first = turn % 2 == 0
        if first:
            session._prompts.forget()
        answer = session.ask(scan, prompt, InferOptions(decode=mode))
        best[first] = min(best[first], answer.provenance.timings_ms["decoder"])
    calls = answer.provenance.tokens["decoder_calls"]
    return answer.generated_ids, Sum(len(answer.generated_ids), calls, best[False], best[True])


def main() -> None:
    """Ask everything both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scans", nargs="*", type=Path, default=[SAMPLE])
    parser.add_argument("--bundle", default="nano")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    print("| question | tokens | calls plain | calls auto | fewer | ms plain, auto | less | first question | less |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    with open_session(options.bundle) as session:
        for kind, questions in QUESTIONS.items():
            sums: dict[str, Sum] = defaultdict(Sum)
            for scan in map(read_scan, options.scans):
                for text in questions:
                    written = {}
                    for mode in ("plain", "auto"):
                        written[mode], took = ask(session, scan, text, mode, options.repeat)
                        sums[mode].add(took)
                    assert written["plain"] == written["auto"], f"{text}: the answers differ"
            plain, auto = sums["plain"], sums["auto"]
            print(
                f"| {kind} ({len(questions)}) | {plain.tokens} | {plain.calls} | {auto.calls} "
                f"| {plain.calls / auto.calls:.1f} x | {plain.ms:.0f}, {auto.ms:.0f} | {plain.ms / auto.ms:.1f} x "
                f"| {plain.first_ms:.0f}, {auto.first_ms:.0f} | {plain.first_ms / auto.first_ms:.1f} x |"
            )


if __name__ == "__main__":
    main()
