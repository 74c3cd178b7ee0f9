"""Questions and answers about one image, in English and Chinese, made from what is known to be in it.

Covers which question is asked about which image, and what answers it. Does not cover the wording (`questions`,
`answers`), images, features or tokens.

Kinds of turns (`Turn.task`):

    modality      which modality, which body part                       an image with either known
    list          all visible structures, largest box first             at most LIST_LENGTH places
    where         where is X                                            X visible, absent, a pair (kidneys), or several
    segment       the same, asking for the outline
    visible       is X visible                                          yes with its place, or no
    unknown       where / segment / visible of a name not in STRUCTURES
    largest       the largest visible structure
    describe      modality, body part, the DESCRIBE_LENGTH largest structures
    region        what is in this region                                box, point or mask; known or not
    segment_region, check_region, no_region
    judge         is it normal, what is the diagnosis                   place if a structure is named, then an honest no
    two           two of the above in one question
    about         greeting, who are you
    outside       anything else
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgemed.core import Language, RegionKind
from edgemed.families.native_lexicon import (
    BODY_PARTS,
    GROUPS,
    MODALITIES,
    STRUCTURES,
    UNKNOWN_NAMES,
    Group,
    Term,
)
from edgemed.training.answers import (
    SENTENCES,
    by_size,
    joined,
    say_description,
    say_image,
    say_list,
    say_outline,
    say_place,
    say_region,
    say_region_outline,
)
from edgemed.training.facts import ImageFacts, RegionFact
from edgemed.training.questions import around, templates


@dataclass(frozen=True)
class Turn:
    """A question, its tagged answer, the answer's language, the regions it is about (indices into facts.regions)."""

    prompt: str
    answer: str
    language: Language
    regions: tuple[int, ...] = ()
    task: str = ""


_SYLLABLES = (
    "ba",
    "cor",
    "del",
    "fi",
    "gan",
    "hol",
    "il",
    "jar",
    "kel",
    "lum",
    "mo",
    "nex",
    "or",
    "pla",
    "qui",
    "ral",
    "sto",
    "tri",
    "ul",
    "ven",
    "wex",
    "yor",
    "zin",
    "phys",
    "the",
    "mus",
    "tis",
    "vis",
    "gor",
    "ane",
    "oid",
    "ula",
    "ium",
)
_ZH_BITS = tuple("海马甲状子宫卵巢睾丸阑尾食管气喉咽舌牙腮颌颅骨小桥延丘垂体松果额颞枕视黄斑晶角膜内耳鼻颈锁胸乳膝踝腕")
_GENERIC_TUMOUR: dict[Language, tuple[str, ...]] = {
    "en": ("a tumour", "a tumor", "the tumour", "the tumor", "tumor"),
    "zh": ("肿瘤", "瘤"),
}

_BRAIN_TUMOUR = next(i for i, t in enumerate(STRUCTURES) if t.key == "brain_tumour")
_COUNTED = frozenset({"polyp", "colon polyp", "brain tumour", "brain tumor", "white blood cell", "leukocyte"})
_CT = next(i for i, t in enumerate(MODALITIES) if t.key == "ct")
_HEAD = next(i for i, t in enumerate(BODY_PARTS) if t.key == "head")
_GROUPS_BY_MEMBER: dict[int, Group] = {member: group for group in GROUPS for member in group.members}


_Draft = tuple[str, Callable[[Language], str], tuple[int, ...]]
"""A question, what answers it in a given language, the regions it is about."""


class _Writer:
    """Makes turns about one image with one random generator."""

    def __init__(self, facts: ImageFacts, rng: np.random.Generator) -> None:
        self.facts, self.rng = facts, rng
        self.visible = sorted(facts.visible)
        self.absent = sorted(set(facts.absent) - set(facts.visible))
        word = "image_ct" if facts.modality == _CT else "image"
        self.image_word: dict[Language, str] = {
            "en": self.pick(around("en")[word]),
            "zh": self.pick(around("zh")[word]),
        }

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def some(self, options: Sequence[int], count: int) -> list[int]:
        return [int(options[i]) for i in self.rng.permutation(len(options))[:count]]

    # --- names in a question

    def noun(self, name: str, language: Language) -> str:
        if language == "zh":
            return name
        if name in _COUNTED and self.chance(0.3):
            return f"a {name}"
        return name if self.chance(0.15) else f"the {name}"

    def asked_name(self, term: Term, language: Language) -> str:
        names = term.en if language == "en" else term.zh
        return names[0] if self.chance(0.6) else self.pick(names)

    def subject(self, structures: Sequence[int], language: Language) -> tuple[str, str]:
        """Return how several structures are asked for in one question, and is or are."""
        parts = [self.noun(self.asked_name(STRUCTURES[s], language), language) for s in structures]
        if self.chance(MIXED_SHARE):  # a word of the other language among those of this one
            other: Language = "en" if language == "zh" else "zh"
            parts = [self.asked_name(STRUCTURES[s], other) for s in structures]
        are = "are" if len(parts) > 1 or _plural(parts[0]) else "is"
        return self.conjunction(parts, language), are

    def conjunction(self, parts: Sequence[str], language: Language) -> str:
        if len(parts) == 1:
            return parts[0]
        if language == "zh":
            return "、".join(parts[:-1]) + self.pick(("和", "和", "、", "与", "以及", "及", "，")) + parts[-1]
        last = self.pick((" and ", " and ", " and ", ", ", " & ", " as well as ", " plus "))
        both = "both " if len(parts) == 2 and last == " and " and self.chance(0.1) else ""
        return both + ", ".join(parts[:-1]) + last + parts[-1]

    # --- the wording of a question

    def question(
        self, task: str, language: Language, x: str = "", are: str = "is", region: str = "", at: str = ""
    ) -> str:
        """Return one wording of `task`; the fields of its template are filled from the arguments."""
        kinds, frames = templates(language)[task], around(language)
        orders, questions = len(kinds["do"]), len(kinds["ask"])
        order = self.chance(orders / (orders + questions))
        text = self.pick(kinds["do"] if order else kinds["ask"])
        simple = self.chance(0.45)
        if language == "en":
            if not simple and "{img}" not in text and not region and task in ("where", "segment", "visible", "list"):
                text += self.pick(frames["extra"])
        else:
            if not simple and "图" not in text and "{img}" not in text and not region and text.startswith("{x}"):
                text = self.pick(frames["extra"]) + text
        frame = "{}" if simple else self.pick(frames["order" if order else "question"])
        text = frame.replace("{}", text)
        if language == "en" and order and frame in ("can you {}", "could you {}", "would you {}"):
            order = False
        bare = re.sub(r"\b(the|a) ", "", x)
        indefinite = bare if are == "are" else f"{'an' if bare[:1].lower() in 'aeiou' else 'a'} {bare}"
        fields = {
            "{x}": x,
            "{a}": indefinite,
            "{bare}": bare,
            "{is}": are,
            "{img}": self.image_word[language],
            "{reg}": region,
            "{at}": at,
        }
        for field, value in fields.items():
            text = text.replace(field, value)
        if region == "<region>":
            for article in ("this ", "the ", "这个", "该", "所示", "标出的", "标记的"):
                text = text.replace(f"{article}<region>", "<region>")
        return self.finish(text, language, asked=not order)

    def finish(self, text: str, language: Language, *, asked: bool) -> str:
        """Return the text with a closing mark, letter case and, rarely, a typing slip."""
        if language == "zh":
            marks = ("？", "?", "", "？", "?") if asked or text.endswith("吗") else ("。", "", "", "！", ".")
            return text + self.pick(marks)
        if self.chance(0.05):
            text = self.slip(text)
        text += self.pick(("?", "?", "?", "?", "") if asked else (".", ".", ".", "", "!"))
        style = self.rng.random()
        if style < 0.75:
            return text[:1].upper() + text[1:]
        return text.upper() if style > 0.98 and "<" not in text else text

    def slip(self, text: str) -> str:
        """Return the text with two letters swapped, one dropped or one doubled inside a word of six letters or more."""
        words = text.split(" ")
        long = [i for i, w in enumerate(words) if w.isalpha() and len(w) >= 6]
        if not long:
            return text
        i = long[int(self.rng.integers(len(long)))]
        word = words[i]
        at = int(self.rng.integers(1, len(word) - 2))
        words[i] = (
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
        )[int(self.rng.integers(3))]
        return " ".join(words)

    def region_word(self, kind: RegionKind, language: Language) -> tuple[str, str]:
        """Return the word for a region of that kind, or the placeholder, and the preposition before it."""
        word = "<region>" if self.chance(0.15) else self.pick(around(language)[kind])
        return word, "at this" if kind == "point" else "in this"

    # --- tasks: each returns (prompt, answer, regions) or None where the image does not allow it

    def targets(self) -> list[int] | None:
        """Return one structure to ask for (visible in about two cases of three), or a few."""
        known = self.visible + self.absent
        if not known:
            return None
        if self.chance(0.25) and len(known) > 1:
            count = 2 if self.chance(0.75) else min(3, len(known))
            seen = int(self.rng.integers(0, count + 1)) if self.chance(0.5) else count
            chosen = self.some(self.visible, seen)
            chosen += self.some(self.absent, count - len(chosen))
            chosen = chosen or self.some(known, count)
            return [chosen[i] for i in self.rng.permutation(len(chosen))]
        pool = self.visible if self.visible and (not self.absent or self.chance(0.66)) else self.absent
        return self.some(pool, 1)

    def asked(self, language: Language) -> tuple[str, str, list[int]] | None:
        """Return (how it is asked for, is or are, the structures in the order of the answer)."""
        structures = self.targets()
        if structures is None:
            return None
        if len(structures) == 1:
            group = _GROUPS_BY_MEMBER.get(structures[0])
            known = {*self.visible, *self.absent}
            if group and known.issuperset(group.members) and self.chance(0.3):
                name = self.pick(group.en if language == "en" else group.zh)
                return self.noun(name, language), ("are" if _plural(name) else "is"), list(group.members)
            if structures[0] == _BRAIN_TUMOUR and self.facts.body_part == _HEAD and self.chance(0.3):
                return self.pick(_GENERIC_TUMOUR[language]), "is", structures
        text, are = self.subject(structures, language)
        return text, are, structures

    def find(self, task: str, say: Callable[[int, ImageFacts, Language], str], language: Language) -> _Draft | None:
        target = self.asked(language)
        if target is None:
            return None
        x, are, structures = target
        prompt = self.question(task, language, x, are)
        return prompt, lambda answer: joined([say(s, self.facts, answer) for s in structures], answer), ()

    def where(self, language: Language) -> _Draft | None:
        return self.find("where", say_place, language)

    def segment(self, language: Language) -> _Draft | None:
        return self.find("segment", say_outline, language)

    def visible_(self, language: Language) -> _Draft | None:
        target = self.asked(language)
        if target is None:
            return None
        x, are, structures = target

        def say(answer: Language) -> str:
            sentences = [say_place(s, self.facts, answer) for s in structures]
            if len(structures) == 1:
                return yes_or_no(structures[0] in self.facts.visible, sentences[0], answer)
            return joined(sentences, answer)

        return self.question("visible", language, x, are), say, ()

    def unknown(self, language: Language) -> _Draft | None:
        name = self.unknown_name(language)
        parts: list[str] = [name]
        structures: list[int | None] = [None]
        known = self.visible + self.absent
        if known and self.chance(0.15):  # one that is known beside one that is not
            beside = self.some(known, 1)[0]
            parts.append(self.noun(self.asked_name(STRUCTURES[beside], language), language))
            structures.append(beside)
            if self.chance(0.5):
                parts.reverse()
                structures.reverse()
        task = "where" if len(parts) > 1 else self.pick(("where", "where", "segment", "visible"))
        are = "are" if len(parts) > 1 or _plural(name) else "is"
        prompt = self.question(task, language, self.conjunction(parts, language), are)

        def say(answer: Language) -> str:
            unknown = SENTENCES["unknown"][answer]
            return joined([unknown if s is None else say_place(s, self.facts, answer) for s in structures], answer)

        return prompt, say, ()

    def unknown_name(self, language: Language) -> str:
        """Return a name that is not known: from the table, or, so that the table is not learnt by heart, made up."""
        if self.chance(0.2):
            if language == "zh":
                return "".join(self.pick(_ZH_BITS) for _ in range(2 + int(self.rng.integers(2))))
            return f"the {''.join(self.pick(_SYLLABLES) for _ in range(2 + int(self.rng.integers(2))))}"
        term = UNKNOWN_NAMES[int(self.rng.integers(len(UNKNOWN_NAMES)))]
        return self.noun(self.asked_name(term, language), language)

    def list_(self, language: Language) -> _Draft | None:
        return self.question("list", language), lambda answer: say_list(self.facts, answer), ()

    def largest(self, language: Language) -> _Draft | None:
        order = by_size(self.facts.visible)
        prompt = self.question("largest", language)
        if not order:
            return prompt, SENTENCES["none"].__getitem__, ()
        return prompt, lambda answer: say_place(order[0], self.facts, answer), ()

    def modality(self, language: Language) -> _Draft | None:
        if not say_image(self.facts, language):
            return None
        return self.question("modality", language), lambda answer: say_image(self.facts, answer), ()

    def describe(self, language: Language) -> _Draft | None:
        return self.question("describe", language), lambda answer: say_description(self.facts, answer), ()

    def any_region(self) -> tuple[int, RegionFact] | None:
        if not self.facts.regions:
            return None
        index = int(self.rng.integers(len(self.facts.regions)))
        return index, self.facts.regions[index]

    def region(self, language: Language) -> _Draft | None:
        chosen = self.any_region()
        if chosen is None:
            return None
        index, region = chosen
        indices: tuple[int, ...] = (index,)
        if len(self.facts.regions) > 1 and self.chance(0.1):
            indices += tuple(self.some([i for i in range(len(self.facts.regions)) if i != index], 1))
            prompt = self.pick(around(language)["regions"])
        else:
            word, at = self.region_word(region.kind, language)
            prompt = self.question("region", language, region=word, at=at)
        regions = [self.facts.regions[i] for i in indices]
        return prompt, lambda answer: joined([say_region(r, answer) for r in regions], answer), indices

    def segment_region(self, language: Language) -> _Draft | None:
        chosen = self.any_region()
        if chosen is None:
            return None
        index, region = chosen
        word, at = self.region_word(region.kind, language)
        prompt = self.question("segment_region", language, region=word, at=at)
        return prompt, lambda answer: say_region_outline(region, answer), (index,)

    def check_region(self, language: Language) -> _Draft | None:
        chosen = self.any_region()
        if chosen is None:
            return None
        index, region = chosen
        same = _GROUPS_BY_MEMBER.get(region.structure) if region.structure is not None else None
        right = region.structure is not None and self.chance(0.5)
        if right and region.structure is not None:
            structure = region.structure
        else:
            wrong = [s for s in range(len(STRUCTURES)) if s != region.structure and not (same and s in same.members)]
            structure = self.some(wrong, 1)[0]
        word, at = self.region_word(region.kind, language)
        group = _GROUPS_BY_MEMBER.get(structure)
        if group and self.chance(0.3):
            x = self.noun(self.pick(group.en if language == "en" else group.zh), language)
            are = "are" if _plural(x) else "is"
        else:
            x, are = self.subject([structure], language)
        prompt = self.question("check_region", language, x, are, region=word, at=at)
        return prompt, lambda answer: yes_or_no(right, say_region(region, answer), answer), (index,)

    def no_region(self, language: Language) -> _Draft | None:
        word, at = self.region_word("box", language)
        if word == "<region>":
            word = "region" if language == "en" else "区域"
        kinds = templates(language)["region" if self.chance(0.6) else "segment_region"]
        text = self.pick([t for t in (*kinds["do"], *kinds["ask"]) if "{reg}" in t])
        text = text.replace("{reg}", word).replace("{at}", at)
        return self.finish(text, language, asked=self.chance(0.6)), SENTENCES["no_region"].__getitem__, ()

    def judge(self, language: Language) -> _Draft | None:
        structures = self.targets() if self.chance(0.6) else None
        if structures is None:
            prompt = self.question("judge", language)
            while self.facts.body_part == _HEAD and re.search("tumo|瘤", prompt.lower()):  # there a structure is meant
                prompt = self.question("judge", language)
            return prompt, SENTENCES["judge"].__getitem__, ()
        structure = structures[0]
        x, are = self.subject([structure], language)
        prompt = self.question("judge_of", language, x, are)

        def say(answer: Language) -> str:
            return joined([say_place(structure, self.facts, answer), SENTENCES["judge"][answer]], answer)

        return prompt, say, ()

    def two(self, language: Language) -> _Draft | None:
        """Return two questions in one."""
        names = ("where", "segment", "modality", "visible", "list", "judge")
        first, second = self.some(range(len(names)), 2)
        one, two = _TASKS[names[first]][1](self, language), _TASKS[names[second]][1](self, language)
        if one is None or two is None:
            return None
        start = one[0].rstrip("?.!？。！")
        prompt = (
            start
            + self.pick(around(language)["between"])
            + (two[0][:1].lower() + two[0][1:] if self.chance(0.7) else two[0])
        )
        return prompt, lambda answer: joined([one[1](answer), two[1](answer)], answer), ()

    def about(self, language: Language) -> _Draft | None:
        return self.question("about", language), SENTENCES["about"].__getitem__, ()

    def outside(self, language: Language) -> _Draft | None:
        return self.question("outside", language), SENTENCES["outside"].__getitem__, ()


def _plural(name: str) -> bool:
    return name.endswith(("s", "vertebrae", "bronchi", "teeth")) and not name.endswith(
        ("ss", "us", "pancreas", "iliopsoas", "is", "pons", "lens", "biceps", "erector spinae", "radius", "quadriceps")
    )


def yes_or_no(yes: bool, sentence: str, language: Language) -> str:
    """Return the sentence with yes or no before it.

    >>> yes_or_no(False, "The heart is not visible in this image.", "en")
    'No, the heart is not visible in this image.'
    """
    if language == "zh":
        return ("是，" if yes else "否，") + sentence
    return ("Yes, " if yes else "No, ") + sentence[:1].lower() + sentence[1:]


_TASKS: dict[str, tuple[float, Callable[[_Writer, Language], _Draft | None]]] = {
    "where": (24.0, _Writer.where),
    "segment": (18.0, _Writer.segment),
    "visible": (9.0, _Writer.visible_),
    "unknown": (6.0, _Writer.unknown),
    "modality": (6.0, _Writer.modality),
    "list": (9.0, _Writer.list_),
    "largest": (1.0, _Writer.largest),
    "describe": (6.0, _Writer.describe),
    "region": (18.0, _Writer.region),
    "segment_region": (6.0, _Writer.segment_region),
    "check_region": (3.0, _Writer.check_region),
    "no_region": (0.7, _Writer.no_region),
    "judge": (6.0, _Writer.judge),
    "two": (3.0, _Writer.two),
    "about": (1.0, _Writer.about),
    "outside": (1.0, _Writer.outside),
}
TASKS = tuple(_TASKS)
"""The kinds of turns, in the order of this file's opening."""

_NO_REGION = frozenset({"where", "segment", "visible", "unknown", "modality", "list", "two"})

CHINESE_SHARE = 0.45
"""Share of turns that are asked in Chinese."""
MIXED_SHARE = 0.03
"""Share of questions about structures that name them in the other language than the rest of the question."""
REGION_BESIDE_SHARE = 0.03
"""Share of questions about no region that are asked with one all the same."""
CROSSED_SHARE = 0.06
"""Share of turns whose answer is asked for in the other language than the question's."""


def make_turns(facts: ImageFacts, rng: np.random.Generator, count: int) -> list[Turn]:
    """Return `count` turns about one image: a weighted mix of the tasks it allows, in both languages.

    The same facts and generator state give the same turns. In about CROSSED_SHARE of them question and answer differ in
    language; `native_text.NativeText.encode_prompt` then adds the suffix that asks for it.
    """
    writer = _Writer(facts, rng)
    names = list(_TASKS)
    weights = np.array([_TASKS[name][0] for name in names])
    weights /= weights.sum()
    turns: list[Turn] = []
    while len(turns) < count:
        task = names[int(rng.choice(len(names), p=weights))]
        asked: Language = "zh" if writer.chance(CHINESE_SHARE) else "en"
        turn = make_turn(writer, task, asked)
        if turn is not None:
            turns.append(turn)
    return turns


def turn_of(task: str, facts: ImageFacts, rng: np.random.Generator, language: Language) -> Turn | None:
    """Return one turn of the given task, asked in the given language, or None if the image does not allow it."""
    return make_turn(_Writer(facts, rng), task, language)


def make_turn(writer: _Writer, task: str, asked: Language) -> Turn | None:
    """Return one turn of `writer`'s image, or None if the image does not allow the task."""
    write = _TASKS[task][1]
    answered = asked
    if writer.chance(CROSSED_SHARE):
        answered = "en" if asked == "zh" else "zh"
    draft = write(writer, asked)
    if draft is None:
        return None
    prompt, say, regions = draft
    if task in _NO_REGION and writer.facts.regions and writer.chance(REGION_BESIDE_SHARE):
        regions = (int(writer.rng.integers(len(writer.facts.regions))),)
    return Turn(prompt, say(answered), answered, regions, task)
