"""The text of MedPLIB: prompt to ids with pseudo-ids for image and region, ids to text, sources of `<SEG>` vectors.

Covers the LLaVA-style template in its two wordings, the image and region placeholders, where a prompt is cut, training
targets, and which positions of an answer feed the mask decoder. Does not cover the tokenizer (`published_tokens`),
pixels and masks (`medplib_view`).

    <s>SYSTEM USER: <im_start>[image]<im_end> question ASSISTANT: answer</s>

The image is one pseudo-id, -200, replaced by 576 rows; a region is `<region>`, pseudo-id -300, `</region>`. White space
beside added tokens is lost on encoding, so the newline after `<im_end>` never reaches the model.

What the modes of compatibility mean here:

    reference     training's and the web demo's wording ("human"); the prompt ends after `ASSISTANT:`; the vector of the
                  first `<SEG>` comes from the position that predicts it
    corrected     as reference, and every `<SEG>` of an answer has its own mask
    release-cli   the command line's wording ("user"); the sample is encoded whole and cut after the last ":" id, which
                  is the wrong place if the answer has a colon; with exactly one `<SEG>` the vector comes from the
                  second to last position

Examples come before the image, each as an image with its mask drawn in, or as two images, the mask second:

    Example 1: <im_start>[image]<im_end> The blue overlay ... mask. Query: <im_start>[image]<im_end> question
    Example 1 image: <im_start>[image]<im_end> Example 1 mask: <im_start>[mask]<im_end> Query: ...

The lines are those that the authors' code writes for samples without a conversation of their own; every image stays
where its line has it. No published weights were trained with them.

Source: github ShawnHuang497/MedPLIB at 5ab54bc; tests/reference/medplib-tiny.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from edgemed.errors import BundleError, InvalidInput
from edgemed.families.published_tokens import PublishedTokens

__all__ = ["IMAGE_ID", "REGION_ID", "Compat", "Icl", "MedplibText", "Wording", "example_lines"]

Compat = Literal["reference", "corrected", "release-cli"]
Wording = Literal["human", "user"]
Icl = Literal["overlay", "separate"]

IMAGE_ID = -200
"""Stands for the image's rows in a list of ids."""
REGION_ID = -300
"""Stands for a region's row in a list of ids."""
IGNORED = -100
"""The training label of a position without a target."""

IMAGE = "<image>"
_PICTURE = f"<im_start>{IMAGE}<im_end>\n"
REGION = "<region></region>"
_REGION_TAG = re.compile(r"<region>[^<]*</region>|<region>|</region>")
_MASK_TAG = re.compile(r"<mask>[^<]*</mask>")


def system_message(wording: Wording) -> str:
    """Return the published system message, which calls the one who asks "human" (training, web) or "user" (CLI)."""
    return (
        f"A chat between a curious {wording} and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the {wording}'s questions."
    )


def with_regions(question: str, regions: int) -> str:
    """Return the question with as many `<region></region>` as there are regions.

    A path between the tags, as in the published data, is taken out. Missing ones go to the end, as the web demo puts
    them; surplus ones are dropped.

    >>> with_regions("What is <region>a/b.png</region>?", 1), with_regions("What is it?", 1)
    ('What is <region></region>?', 'What is it? <region></region>')
    >>> with_regions("What is <region> here?", 0)
    'What is  here?'
    """
    left = regions

    def keep(match: re.Match[str]) -> str:
        nonlocal left
        if left == 0 or match[0] == "</region>":
            return ""
        left -= 1
        return REGION

    return _REGION_TAG.sub(keep, question) + f" {REGION}" * left


def example_lines(count: int, mode: Icl) -> str:
    """Return what comes before the image that is asked about: "" without examples.

    >>> print(example_lines(1, "overlay") + "?")
    Example 1: <im_start><image><im_end>
    The blue overlay is the reference segmentation mask.
    Query: ?
    """
    if count == 0:
        return ""
    lines = {
        "overlay": f"Example {{0}}: {_PICTURE}The blue overlay is the reference segmentation mask.\n",
        "separate": f"Example {{0}} image: {_PICTURE}Example {{0}} mask: {_PICTURE}",
    }[mode]
    return "".join(lines.format(i + 1) for i in range(count)) + "Query: "


class MedplibText:
    """Prompts and answers over one tokenizer. Holds no state; safe to share.

    Raises BundleError if the tokenizer lacks a token of the family or a begin- or end-of-sequence token.
    """

    def __init__(self, tokens: PublishedTokens) -> None:
        self.tokens = tokens
        self.seg_id = tokens.id_of("<SEG>")
        self.region_start_id, self.region_end_id = tokens.id_of("<region>"), tokens.id_of("</region>")
        for name in ("<im_start>", "<im_end>"):
            tokens.id_of(name)
        begin, end = tokens.role("bos_token"), tokens.role("eos_token")
        if begin is None or end is None:
            raise BundleError("the tokenizer has no begin- or end-of-sequence token; both were expected")
        self.begin_id, self.stop_id = begin, end

    def prompt_text(
        self,
        question: str,
        *,
        regions: int = 0,
        image: bool = True,
        before: str = "",
        wording: Wording = "human",
        answer: str | None = None,
    ) -> str:
        """Return the template's text, open after `ASSISTANT:` or closed with an answer and `</s>`.

        before: what comes before the image (`example_lines`). An answer's `<mask>path</mask>`, as in the published
        data, is taken out.
        """
        turn = with_regions(question.replace(IMAGE, ""), regions).strip()
        if image:
            turn = before + _PICTURE + turn
        text = f"{system_message(wording)} USER: {turn} ASSISTANT:"
        return text if answer is None else f"{text} {_MASK_TAG.sub('', answer).strip()}</s>"

    def encode(self, text: str) -> list[int]:
        """Return the ids of a template's text: BOS, IMAGE_ID for `<image>`, REGION_ID inside each region's tags."""
        ids = [self.begin_id]
        for i, part in enumerate(text.split(IMAGE)):
            ids += [IMAGE_ID] * (i > 0) + self.tokens.encode(part, bos=False)
        out: list[int] = []
        for index in ids:
            if index == self.region_end_id and out[-1] == self.region_start_id:
                out.append(REGION_ID)
            out.append(index)
        return out

    def encode_prompt(
        self,
        question: str,
        *,
        regions: int = 0,
        image: bool = True,
        before: str = "",
        compat: Compat = "reference",
        answer: str | None = None,
    ) -> list[int]:
        """Return the ids to prefill with.

        question: the user's words; `<region>` marks where a region goes. before: as in `prompt_text`. answer: of the
        sample, for compat "release-cli" alone, whose cut depends on it.

        Raises InvalidInput if there are regions without an image: a region's row comes from the image's features.
        """
        if regions and not image:
            raise InvalidInput(f"{regions} regions were given without an image; an image was expected")
        if compat == "release-cli":
            text = self.prompt_text(
                question, regions=regions, image=image, before=before, wording="user", answer=answer or ""
            )
            return self._cut_at_last_colon(self.encode(text))
        return self.encode(self.prompt_text(question, regions=regions, image=image, before=before))

    def _cut_at_last_colon(self, ids: list[int]) -> list[int]:
        colon = self.tokens.encode("ASSISTANT:", bos=False)[-1]
        return ids[: len(ids) - ids[::-1].index(colon)]

    def encode_training(self, question: str, answer: str, *, regions: int = 0) -> tuple[list[int], list[int]]:
        """Return (ids, labels) of one turn; labels are IGNORED but for the answer and its `</s>`."""
        prompt = self.encode(self.prompt_text(question, regions=regions))
        ids = self.encode(self.prompt_text(question, regions=regions, answer=answer))
        return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]

    def positions(self, ids: Sequence[int], image_rows: int) -> tuple[int | None, tuple[int, ...]]:
        """Return (row of the image's first token or None, rows of the regions) once the image takes `image_rows` rows.

        Raises InvalidInput if there is more than one image, or a region before it.
        """
        start: int | None = None
        rows: list[int] = []
        at = 0
        for index in ids:
            if index == IMAGE_ID:
                if start is not None or rows:
                    raise InvalidInput("a prompt holds one image, before every region; this one does not")
                start = at
            elif index == REGION_ID:
                rows.append(at)
            at += image_rows if index == IMAGE_ID else 1
        return start, tuple(rows)

    # --- answers ---

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Return generated ids up to the first `</s>`."""
        out = [int(i) for i in ids]
        return out[: out.index(self.stop_id)] if self.stop_id in out else out

    def shown(self, ids: Sequence[int]) -> str:
        """Return the answer as the published code shows it: `<SEG>` stays, `</s>` does not."""
        return self.tokens.decode(self.cut(ids), skip_special=True).strip()

    def untagged(self, shown: str) -> str:
        """Return what `shown` returned without the family's tokens, as it is read."""
        for token in self.tokens.added:
            shown = shown.replace(token.content, " ")
        return re.sub(r"\s+([.,;:!?])", r"\1", re.sub(r"\s+", " ", shown)).strip()

    def seg_steps(self, ids: Sequence[int], compat: Compat = "reference") -> tuple[int, ...]:
        """Return the steps whose final hidden state makes a mask, one for each mask; none without `<SEG>`.

        ids: the generated ids as they came, `</s>` included if it did. Step s is the position that predicted ids[s]: 0
        is the last of the prompt. release-cli with one `<SEG>` takes the second to last position that was run: the
        published loop runs every generated id but the last, so that position predicts ids[-2].

        >>> text = MedplibText.__new__(MedplibText)
        >>> text.seg_id, text.stop_id = 9, 2
        >>> answer = [5, 9, 6, 9, 7, 2]
        >>> text.seg_steps(answer), text.seg_steps(answer, "corrected"), text.seg_steps([5, 9, 7, 2], "release-cli")
        ((1,), (1, 3), (2,))
        """
        steps = tuple(step for step, index in enumerate(ids) if index == self.seg_id)
        if compat == "corrected":
            return steps
        if compat == "release-cli" and len(steps) == 1:
            return (max(len(ids) - 2, 0),)
        return steps[:1]
