"""The decoding loop over a Runner of ten lines that has no model behind it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemed.box_grammar import BoxGrammar, BoxTokens, FreeGrammar
from edgemed.decoding import Decoded, DecodeOptions, decode
from edgemed.drafts import PhraseDrafts
from edgemed.errors import InvalidInput
from edgemed.token_choice import Numbers

BOS, EOS, REF, REF_END, BOX, BOX_END, SEG, FIRST = range(8)
BINS, VOCABULARY, WIDTH = 12, 30, 4
TOKENS = BoxTokens(
    box=BOX,
    box_end=BOX_END,
    ref=REF,
    ref_end=REF_END,
    seg=SEG,
    eos=EOS,
    first_coordinate=FIRST,
    bins=BINS,
    never=(BOS,),
)
NUMBERS = {FIRST + k: float(k) for k in range(BINS)}
PROMPT = [BOS, 25, 26]
FIXED = {"image_tokens": np.zeros((2, WIDTH), np.float32)}


class FakeRunner:
    """Logits from a function of everything that went in so far; hidden states that tell which token went in where."""

    backend, device = "fake", "none"
    may_go_back = False

    def __init__(self, logits: Callable[[list[int]], np.ndarray]) -> None:
        self.logits, self.seen, self.calls = logits, [], []

    def run(self, feeds):
        past, ids = int(feeds["past_length"][0]), feeds["input_ids"][0].tolist()
        assert past == len(self.seen) or (self.may_go_back and 0 < past < len(self.seen))
        self.seen[past:] = ids
        self.calls.append(len(ids))
        ends = range(past + int(feeds["logits_from"][0]) + 1, len(self.seen) + 1)
        hidden = [np.full(WIDTH, self.seen[end - 1] * 1000 + end - 1, np.float32) for end in ends]
        logits = [self.logits(self.seen[:end]).astype(np.float32) for end in ends]
        return {"logits": np.stack(logits)[None], "hidden": np.stack(hidden)[None]}


class SplitRunner(FakeRunner):
    """The same of a decoder with a split head: it computes what is asked for; `asked` counts positions."""

    asked = (0, 0)

    def run(self, feeds):
        out = super().run(feeds)
        text_at, box_at = feeds["text_at"], feeds["box_at"]
        assert not set(text_at) & set(box_at)
        self.asked = (self.asked[0] + len(text_at), self.asked[1] + len(box_at))
        logits = out["logits"]
        return {**out, "logits": logits[:, text_at], "box_logits": logits[:, box_at, FIRST : FIRST + BINS]}


def script(*answer: int) -> FakeRunner:
    """A model that wants to say `answer` and then end."""

    def logits(seen: list[int]) -> np.ndarray:
        said = len(seen) - len(PROMPT)
        return np.eye(VOCABULARY)[answer[said] if said < len(answer) else EOS] * 5

    return FakeRunner(logits)


def noise(seed: int, scale: float = 3.0) -> FakeRunner:
    rng = np.random.default_rng(seed)
    return FakeRunner(lambda seen: rng.normal(0, scale, VOCABULARY))


def run(runner: FakeRunner, grammar=None, drafter=None, numbers=None, **options) -> Decoded:
    runner.may_go_back = runner.may_go_back or drafter is not None
    asked = DecodeOptions(eos_id=EOS, numbers=Numbers(numbers or {}), **options)
    return decode(runner, PROMPT, FIXED, grammar or FreeGrammar(VOCABULARY), asked, drafter)


def as_text(ids: tuple[int, ...]) -> str:
    names = {REF: "<ref>", REF_END: "</ref>", BOX: "<box>", BOX_END: "</box>", SEG: "<seg>", BOS: "<bos>", EOS: "<eos>"}
    return "".join(
        names.get(i) or (f"<c{i - FIRST}>" if i < FIRST + BINS else chr(ord("a") + i - FIRST - BINS)) for i in ids
    )


PLACE = re.compile(r"<ref>([a-z]+)</ref><box><c(\d+)><c(\d+)><c(\d+)><c(\d+)></box>(<seg>)?")


def check_parses(ids: tuple[int, ...]) -> int:
    """Return the number of places; fail if a tag or a coordinate is left outside of them or a box is not in order."""
    text = as_text(ids)
    for _, x0, y0, x1, y1, _ in PLACE.findall(text):
        assert int(x0) < int(x1) < BINS
        assert int(y0) < int(y1) < BINS
    assert "<" not in PLACE.sub("", text), text
    return len(PLACE.findall(text))


def test_greedy_says_what_the_model_wants_and_ends() -> None:
    runner = script(25, REF, 26, REF_END)
    decoded = run(runner)
    assert (decoded.ids, decoded.ended) == ((25, REF, 26, REF_END), True)
    assert (decoded.prompt_tokens, decoded.decoder_calls, runner.calls) == (3, 5, [3, 1, 1, 1, 1])
    assert decoded.log_probs == pytest.approx([5 - np.log(np.exp(5) + VOCABULARY - 1)] * 4, abs=1e-5)
    assert decoded.prefill_ms > 0
    assert decoded.step_ms > 0


def test_numbers_have_the_spread_of_what_the_grammar_allows() -> None:
    # Bins 2 and 5 are as likely as each other, every other coordinate is as good as impossible.
    likely = np.full(VOCABULARY, -50.0)
    likely[[FIRST + 2, FIRST + 5]] = 0.0
    script_of = {0: np.eye(VOCABULARY)[25] * 5, 1: likely, 2: np.eye(VOCABULARY)[EOS] * 5}
    decoded = run(
        FakeRunner(lambda seen: script_of[len(seen) - len(PROMPT)]), numbers={FIRST + k: k for k in range(BINS)}
    )
    assert decoded.ids == (25, FIRST + 2)
    assert decoded.spreads[0] is None
    assert decoded.spreads[1] == pytest.approx(1.5)


def test_spreads_follow_the_ids_whatever_is_forced_drafted_or_taken_back() -> None:
    for seed in range(40):
        decoded = run(noise(seed), BoxGrammar(TOKENS, VOCABULARY), numbers={FIRST + k: k for k in range(BINS)})
        assert len(decoded.spreads) == len(decoded.ids) == len(decoded.log_probs)
        for token, spread in zip(decoded.ids, decoded.spreads, strict=True):
            assert (spread is not None) == (FIRST <= token < FIRST + BINS)
            assert spread is None or 0 <= spread <= BINS / 2


def test_log_probabilities_count_only_what_the_grammar_allows() -> None:
    runner = FakeRunner(lambda seen: np.zeros(VOCABULARY) if len(seen) == len(PROMPT) else np.eye(VOCABULARY)[EOS])
    decoded = run(runner, BoxGrammar(TOKENS, VOCABULARY))
    assert decoded.ids == (EOS,) or decoded.ids == ()  # the tie goes to the smallest allowed id, the end
    grammar = BoxGrammar(TOKENS, VOCABULARY)
    decoded = run(script(REF, 25, REF_END, BOX, FIRST, FIRST, FIRST + 11, FIRST + 11, BOX_END), grammar)
    assert decoded.log_probs[3] == 0.0  # after </ref> only <box> may follow
    assert decoded.log_probs[8] == 0.0


def test_hidden_states_are_those_where_the_token_went_in() -> None:
    decoded = run(script(25, SEG, 26, SEG), keep_hidden=frozenset({SEG}))
    assert [i for i, _ in decoded.hidden] == [1, 3]
    assert [int(h[0]) for _, h in decoded.hidden] == [SEG * 1000 + 4, SEG * 1000 + 6]


def test_a_hidden_state_wanted_at_the_limit_costs_one_more_call() -> None:
    runner = script(25, SEG, 26)
    decoded = run(runner, keep_hidden=frozenset({SEG}), max_new_tokens=2)
    assert (decoded.ids, decoded.ended, len(runner.calls)) == ((25, SEG), False, 3)
    assert int(decoded.hidden[0][1][0]) == SEG * 1000 + 4


def test_the_limit_ends_an_answer_where_it_can_be_read() -> None:
    said = (25, REF, 26, REF_END, BOX, *(FIRST + v for v in (1, 2, 3, 4)), BOX_END, 25, REF, 26, REF_END)
    for limit in range(1, len(said) + 1):
        decoded = run(script(*said), BoxGrammar(TOKENS, VOCABULARY), max_new_tokens=limit)
        check_parses(decoded.ids)
        assert not decoded.ended or limit == len(said)
        assert decoded.ids == said[: 1 if limit < 10 else min(limit, 11)]
        assert len(decoded.log_probs) == len(decoded.ids)


def test_the_cache_is_never_asked_for_more_than_it_holds() -> None:
    runner = script(*[25] * 50)
    decoded = run(runner, cache=8, keep_hidden=frozenset({25}))
    assert len(decoded.ids) == 5
    assert len(runner.seen) == 8
    with pytest.raises(InvalidInput, match="1 to 2 fit"):
        run(script(), cache=3)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 3.0]), st.integers(1, 120))
def test_whatever_the_logits_everything_decoded_can_be_read(seed: int, temperature: float, limit: int) -> None:
    decoded = run(noise(seed), BoxGrammar(TOKENS, VOCABULARY), temperature=temperature, max_new_tokens=limit)
    check_parses(decoded.ids)
    assert len(decoded.ids) <= limit
    assert all(p <= 0 for p in decoded.log_probs)


@pytest.mark.slow
def test_ten_thousand_random_answers_can_be_read() -> None:
    boxes = BoxGrammar(TOKENS, VOCABULARY)
    known = boxes.knowing({(n,): ((1, 2, 5, 6), (0, 0, 3, 9)) for n in range(FIRST + BINS, VOCABULARY, 2)})
    drafter = PhraseDrafts([(REF, 25, REF_END, BOX, FIRST + 1, FIRST + 2, FIRST + 5, FIRST + 6, BOX_END, SEG)])
    places = 0
    for seed in range(10_000):
        rng = np.random.default_rng(seed)
        table = rng.normal(0, 2, (64, VOCABULARY))
        table[:, [REF, REF_END]] += 2
        runner = FakeRunner(lambda seen, table=table: table[(len(seen) * 7 + seen[-1]) % 64])
        runner.may_go_back = True
        options = {"max_new_tokens": 30, "temperature": float(seed % 5 == 0)}
        decoded = run(runner, known if seed % 2 else boxes, drafter if seed % 3 else None, **options)
        places += check_parses(decoded.ids)
    assert places > 1000


def test_random_logits_do_write_boxes() -> None:
    grammar = BoxGrammar(TOKENS, VOCABULARY)
    assert sum(check_parses(run(noise(seed), grammar, temperature=1.0).ids) for seed in range(60)) > 20


def test_a_place_that_the_grammar_refuses_is_taken_back() -> None:
    grammar = BoxGrammar(TOKENS, VOCABULARY).knowing({(20,): (), (21,): ((1, 2, 3, 4),)})
    place = (REF, 21, REF_END, BOX, FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 4, BOX_END, SEG)

    def logits(seen: list[int]) -> np.ndarray:
        said = tuple(seen[len(PROMPT) :])
        wishes = {(): 25, (25,): REF, (25, REF): 20, (25, REF, 20): REF_END, (25, 26): REF, (25, 26, REF): 21}
        for start in ((25, 26), (25, 26, *place)):  # the same place twice
            wishes |= {(*start, *place[:i]): token for i, token in enumerate(place)}
        out = np.eye(VOCABULARY)[wishes.get(said, EOS)] * 5
        if said == (25,):
            out[26] = 4  # the second wish, where the first led to a refusal
        return out

    runner = FakeRunner(logits)
    runner.may_go_back = True
    decoded = run(runner, grammar, keep_hidden=frozenset({SEG}))
    assert decoded.ids == (25, 26, *place)
    assert decoded.ended
    assert len(decoded.log_probs) == len(decoded.ids)
    assert [(i, h[0]) for i, h in decoded.hidden] == [(11, SEG * 1000 + len(PROMPT) + 11)]
    assert runner.seen == [*PROMPT, *decoded.ids, REF, 21]  # the last try stays in the cache; nothing reads it
    assert decoded.decoder_calls == len(runner.calls)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0]), st.integers(1, 80))
def test_no_answer_holds_what_the_grammar_refuses(seed: int, temperature: float, limit: int) -> None:
    first = FIRST + BINS
    boxes = {(n,): ((n - first, 0, n - first + 1, 5),) if n % 2 else () for n in range(first, VOCABULARY)}
    rng = np.random.default_rng(seed)
    bonus = np.zeros(VOCABULARY)
    bonus[[REF, REF_END]] = 2
    runner = FakeRunner(lambda seen: rng.normal(0, 1, VOCABULARY) + bonus)
    runner.may_go_back = True
    grammar = BoxGrammar(TOKENS, VOCABULARY).knowing(boxes)
    decoded = run(runner, grammar, temperature=temperature, seed=seed, max_new_tokens=limit)
    check_parses(decoded.ids)
    named = []
    for name, *corners, _ in PLACE.findall(as_text(decoded.ids)):
        if len(name) == 1:
            named.append(name)
            assert tuple(map(int, corners)) in boxes[(first + ord(name) - ord("a"),)]
    assert len(set(named)) == len(named)


class Oracle:
    """Proposes what plain decoding would write, with some tokens spoiled."""

    def __init__(self, answer: tuple[int, ...], wrong: float, seed: int) -> None:
        self.answer, self.wrong, self.rng = answer, wrong, np.random.default_rng(seed)

    def propose(self, ids, state, guesses):
        rest = list(self.answer[len(ids) : len(ids) + int(self.rng.integers(0, 7))])
        return [int(self.rng.integers(VOCABULARY)) if self.rng.random() < self.wrong else token for token in rest]


def context(seed: int, bonus: float = 1.5) -> FakeRunner:
    """Logits that follow from what went in alone, so that the order of calls does not matter; tags are likely."""
    liked = np.zeros(VOCABULARY)
    liked[[REF, REF_END, BOX_END, SEG]] = bonus

    def logits(seen: list[int]) -> np.ndarray:
        return np.random.default_rng([seed, *seen]).normal(0, 2, VOCABULARY) + liked

    return FakeRunner(logits)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**20), st.sampled_from([0.0, 0.0, 1.0]), st.integers(1, 60), st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from(["free", "boxes", "known"]), st.sampled_from([frozenset(), frozenset({SEG, 25}), None]),
)  # fmt: skip
def test_drafts_and_forced_tokens_change_nothing_but_the_number_of_calls(
    seed: int, temperature: float, limit: int, wrong: float, kind: str, keep: frozenset[int] | None
) -> None:
    first = FIRST + BINS
    known = {(n,): ((n - first, 0, n - first + 1, 5),) if n % 2 else () for n in range(first, VOCABULARY)}
    boxes = BoxGrammar(TOKENS, VOCABULARY)
    grammar = {"free": FreeGrammar(VOCABULARY), "boxes": boxes, "known": boxes.knowing(known)}[kind]
    options = {"temperature": temperature, "seed": seed, "max_new_tokens": limit, "keep_hidden": keep}
    plain_runner = context(seed)
    plain_runner.may_go_back = True
    plain = run(plain_runner, grammar, **options)
    fast = run(context(seed), grammar, Oracle(plain.ids, wrong, seed), **options)
    assert (fast.ids, fast.ended) == (plain.ids, plain.ended)
    assert fast.log_probs == pytest.approx(plain.log_probs, abs=1e-6)
    assert [(i, float(h[0])) for i, h in fast.hidden] == [(i, float(h[0])) for i, h in plain.hidden]
    assert fast.decoder_calls <= plain.decoder_calls
    assert (plain.drafted, plain.forced) == (0, 0)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**20), st.sampled_from([0.0, 1.0]), st.integers(1, 60), st.sampled_from([0.0, 0.3]),
    st.sampled_from(["free", "boxes", "known"]), st.sampled_from([frozenset({SEG, 25}), None]), st.booleans(),
)  # fmt: skip
def test_a_split_head_gives_the_same_and_multiplies_the_vocabulary_for_text_alone(
    seed: int, temperature: float, limit: int, wrong: float, kind: str, keep: frozenset[int] | None, drafts: bool
) -> None:
    first = FIRST + BINS
    known = {(n,): ((n - first, 0, n - first + 1, 5),) if n % 2 else () for n in range(first, VOCABULARY)}
    boxes = BoxGrammar(TOKENS, VOCABULARY)
    grammar = {"free": FreeGrammar(VOCABULARY), "boxes": boxes, "known": boxes.knowing(known)}[kind]
    options: dict[str, Any] = {
        "temperature": temperature, "seed": seed, "max_new_tokens": limit, "keep_hidden": keep,
        "numbers": NUMBERS,
    }  # fmt: skip
    whole_runner = context(seed)
    whole_runner.may_go_back = True
    whole = run(whole_runner, grammar, **options)
    split_runner = SplitRunner(whole_runner.logits)
    split_runner.may_go_back = True
    drafter = Oracle(whole.ids, wrong, seed) if drafts else None
    split = run(split_runner, grammar, drafter, split_head=True, box_head=True, **options)
    assert (split.ids, split.ended) == (whole.ids, whole.ended)
    assert split.log_probs == pytest.approx(whole.log_probs, abs=1e-6)
    for found, expected in zip(split.spreads, whole.spreads, strict=True):
        assert found == (expected if expected is None else pytest.approx(expected, abs=1e-6))
    assert [(i, float(h[0])) for i, h in split.hidden] == [(i, float(h[0])) for i, h in whole.hidden]


def test_a_box_costs_no_product_with_the_whole_vocabulary() -> None:
    grammar = BoxGrammar(TOKENS, VOCABULARY)
    place = (REF, 25, REF_END, BOX, FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 4, BOX_END, SEG)
    runner = SplitRunner(script(*place).logits)
    decoded = run(runner, grammar, numbers=NUMBERS, split_head=True, box_head=True)
    assert decoded.ids == place
    # Text: <ref>, the name, </ref>, <seg>, the end. Coordinates: four. <box> and </box> are without a choice.
    assert runner.asked == (5, 4)


def test_a_known_place_costs_one_call_once_its_name_is_there() -> None:
    grammar = BoxGrammar(TOKENS, VOCABULARY).knowing({(25,): ((1, 2, 3, 4),)})
    place = (REF, 25, REF_END, BOX, FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 4, BOX_END, SEG)
    decoded = run(script(*place), grammar, PhraseDrafts([]))
    assert decoded.ids == place
    assert (decoded.forced, decoded.decoder_calls) == (6, 5)
    drafted = run(script(*place), grammar, PhraseDrafts([place]))
    assert drafted.ids == place
    assert drafted.decoder_calls == 2
    assert drafted.accepted == drafted.drafted == 9


def test_sampling_is_reproducible_and_follows_the_probabilities() -> None:
    logits = np.full(VOCABULARY, -20.0)
    logits[[EOS, 25, 26]] = np.log([0.5, 0.3, 0.2])

    def first_token(seed: int, temperature: float) -> int:
        decoded = run(FakeRunner(lambda seen: logits), temperature=temperature, seed=seed, max_new_tokens=1)
        return decoded.ids[0] if decoded.ids else EOS

    drawn = [first_token(seed, 1.0) for seed in range(2000)]
    assert drawn == [first_token(seed, 1.0) for seed in range(2000)]
    assert np.bincount(drawn, minlength=27)[[EOS, 25, 26]] / 2000 == pytest.approx([0.5, 0.3, 0.2], abs=0.04)
    assert {first_token(seed, 1e-300) for seed in range(20)} == {EOS}


@pytest.mark.parametrize(
    "option", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": np.nan}, {"seed": -1}]
)
def test_options_that_make_no_sense_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(InvalidInput):
        DecodeOptions(eos_id=EOS, **option)
