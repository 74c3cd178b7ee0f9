"""`--decode auto` writes what `--decode plain` writes, token for token, in fewer calls: the embedded model on a real CT
slice. The published families are in tests/families."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from reference_launcher import ReferenceLauncher

from edgemed.backends import Outputs, Runner
from edgemed.core import Prompt, Scan
from edgemed.decoder_calls import PromptCache
from edgemed.decoding import Decoded, DecodeOptions, decode
from edgemed.dicom import read_scan
from edgemed.drafts import PhraseDrafts
from edgemed.export.head_matrix import head_matrix
from edgemed.families.native_lexicon import STRUCTURES
from edgemed.graphs import Feeds
from edgemed.infer import Session, open_session
from edgemed.kernel_head import KernelHead
from edgemed.language import answer_language
from edgemed.triton_kernels.weights import pack

EN = ("Where is the {}?", "Segment the {}.", "Is the {} visible?", "Show me the {} and the liver.")
ZH = ("{}在哪里？", "请分割{}", "能看到{}吗？", "{}和肝脏在哪里？")
WHOLE = (
    "List the structures.", "请列出可见的结构", "Describe the image.", "请描述这幅图像", "Which modality is this?",
    "这是什么检查？", "What is the largest structure?", "Is this normal?", "hello", "谁是你", "Where is the tumour?",
    "Where are the liver, the spleen and the aorta?",
)  # fmt: skip
QUESTIONS = (
    *(t.format(term.en[0]) for term in STRUCTURES for t in EN),
    *(t.format(term.zh[0]) for term in STRUCTURES for t in ZH),
    *WHOLE,
)


@pytest.fixture(scope="module")
def nano() -> Iterator[Session]:
    with open_session("nano") as session:
        yield session


class Decoding:
    """One question of a session, decoded as often as one likes without encoder and masks."""

    def __init__(self, session: Session, scan: Scan) -> None:
        self.family = session.family
        self.runner = session._runners["decoder"].result()
        graphs = {role: session._runners[role].result() for role in ("vision_encoder", "projector")}
        self.prompts = PromptCache()
        self.prepared = self.family.prepare([scan], Prompt("?", frame=scan.first_frame))
        features = graphs["vision_encoder"].run(self.prepared.vision)
        self.projected = graphs["projector"].run(
            {**self.prepared.projector, "image_features": features["image_features"]}
        )

    def ask(
        self,
        text: str,
        plain: bool = False,
        prompts: PromptCache | None = None,
        head: KernelHead | None = None,
        any_box: bool = False,
    ) -> Decoded:
        """Return what is written, plainly or with every shortcut. any_box: not only boxes that the projector found."""
        question = self.family.ask(Prompt(text, language=answer_language(text)), self.prepared, self.projected)
        options = DecodeOptions(
            eos_id=question.eos_id,
            keep_hidden=question.keep_hidden,
            numbers=question.numbers,
            split_head=head is not None,
        )
        drafter = None if plain else question.drafter or PhraseDrafts([])
        return decode(
            self.runner,
            question.prompt_ids,
            question.fixed,
            self.family._grammars["en"] if any_box else question.grammar,
            options,
            drafter,
            prompts or self.prompts,
            head,
        )


def test_three_hundred_questions_are_answered_the_same(nano: Session, sample_scan: str) -> None:
    assert len(QUESTIONS) >= 300
    decoding = Decoding(nano, read_scan(sample_scan))
    plain_calls = auto_calls = 0
    for text in QUESTIONS:
        plain, auto = decoding.ask(text, plain=True), decoding.ask(text)
        assert (auto.ids, auto.ended) == (plain.ids, plain.ended), text
        assert auto.log_probs == pytest.approx(plain.log_probs, abs=0.05)  # int8 products of one row and of several
        assert [i for i, _ in auto.hidden] == [i for i, _ in plain.hidden]
        for (_, fast), (_, slow) in zip(auto.hidden, plain.hidden, strict=True):
            np.testing.assert_allclose(fast, slow, atol=0.1)  # round differently
        plain_calls, auto_calls = plain_calls + plain.decoder_calls, auto_calls + auto.decoder_calls
    assert plain_calls > 3.5 * auto_calls


class Headless:
    """nano's decoder as one that ends in the hidden state: what it is asked for is taken away from its logits."""

    backend, device = "onnxruntime", "CPU"

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def run(self, feeds: Feeds) -> Outputs:
        asked = {**feeds}
        assert len(asked.pop("text_at")) == 0
        out = self._runner.run(asked)
        return {name: values for name, values in out.items() if name != "logits"}


@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_kernels_beside_the_decoder_write_the_same(nano: Session, sample_scan: str, form: str) -> None:
    whole, ended = Decoding(nano, read_scan(sample_scan)), Decoding(nano, read_scan(sample_scan))
    launcher = ReferenceLauncher()
    head = KernelHead(launcher, pack(head_matrix(nano.bundle.graph_path("decoder")), form))
    ended.runner = Headless(whole.runner)
    as_from_logits = 0
    questions = [*QUESTIONS[:: len(QUESTIONS) // 40], *WHOLE]
    for text in questions:
        logits = whole.ask(text)
        plain, auto = (ended.ask(text, plain=plain, head=head) for plain in (True, False))
        assert (auto.ids, auto.ended) == (plain.ids, plain.ended), text
        assert auto.log_probs == pytest.approx(plain.log_probs, abs=0.05)
        for found, expected in zip(auto.spreads, plain.spreads, strict=True):
            assert found == (expected if expected is None else pytest.approx(expected, rel=0.05))
        as_from_logits += auto.ids == logits.ids
    assert as_from_logits >= 0.9 * len(questions)  # the graph rounds activations to 8 bits, the kernels do not
    assert {name for name, _, _ in launcher.launched} == {f"masked_argmax.{form}"}  # nano's boxes are the projector's
    launcher.launched.clear()
    found, expected = (
        of.ask("Where is the liver?", plain=True, head=kernels, any_box=True)
        for of, kernels in ((ended, head), (whole, None))
    )
    coordinates = [(name, rows) for name, _, rows in launcher.launched if name == f"box_head.{form}"]
    assert coordinates == [(f"box_head.{form}", 1000)] * 4
    assert len(found.ids) == len(expected.ids)
    assert max(abs(a - b) for a, b in zip(found.ids, expected.ids, strict=True)) <= 20  # bins as likely as each other


def test_an_answer_is_the_same_bit_for_bit_whatever_was_asked_before(nano: Session, sample_scan: str) -> None:
    decoding = Decoding(nano, read_scan(sample_scan))
    for text in (QUESTIONS[0], QUESTIONS[-1], *WHOLE[:3]):
        first = decoding.ask(text, prompts=PromptCache())
        decoding.ask("Segment the spleen.")
        again = decoding.ask(text)
        assert (first.held, again.held) == (0, 187)  # the beginning and 186 rows of the image
        assert again.ids == first.ids
        assert again.log_probs == first.log_probs
        for (_, fresh), (_, held) in zip(first.hidden, again.hidden, strict=True):
            np.testing.assert_array_equal(held, fresh)
