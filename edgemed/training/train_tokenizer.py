"""Trains the native family's tokenizer: a byte-level BPE over English and Chinese questions and answers.

    python -m edgemed.training.train_tokenizer OUT.json [--seed 0]

The file is a pure function of the code and the seed. Covers the split rules, the corpus and the numbering: special
tokens first (`native_text.SPECIAL_TOKENS`), then the 256 bytes, then merges. Special tokens are plain entries of the
vocabulary that no merge reaches, so no text encodes to one.

Splits before any merge: a Chinese word of `_words()`, any other Chinese character, a digit, then the usual English
words with their leading space. So a Chinese structure name is one token wherever it stands, and a name the model does
not know falls into characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgemed.core import Language, RegionKind
from edgemed.families.native_lexicon import BODY_PARTS, GROUPS, MODALITIES, STRUCTURES, UNKNOWN_NAMES, Group, Term
from edgemed.families.native_text import SPECIAL_TOKENS, STRUCTURE_TOKENS, SUFFIX, Bins, normal_form
from edgemed.training.answers import SENTENCES
from edgemed.training.facts import ImageFacts, RegionFact
from edgemed.training.questions import around, templates, tokenizer_words
from edgemed.training.tasks import make_turns

VOCABULARY = 3968
"""Entries with the 1,011 special tokens and the 256 bytes."""
IMAGES = 1500
TURNS_PER_IMAGE = 12

TERMS: tuple[Term | Group, ...] = (*STRUCTURES, *GROUPS, *MODALITIES, *BODY_PARTS)
"""Everything the model can name."""


def _words() -> list[str]:
    """Return the Chinese words that are one token each, longest first."""
    names = {name for term in TERMS for name in term.zh}
    words = {w for w in (*names, *tokenizer_words()["whole_zh"]) if len(w) > 1 and re.fullmatch(r"[\u4e00-\u9fff]+", w)}
    return sorted(words, key=lambda w: (-len(w), w))


def own_characters() -> list[str]:
    """Return every Chinese character of the templates, answers and names; each becomes one token."""
    texts = [name for term in (*TERMS, *UNKNOWN_NAMES) for name in term.zh] + [
        sentence["zh"] for sentence in SENTENCES.values()
    ]
    texts += [template for kinds in templates("zh").values() for several in kinds.values() for template in several]
    texts += [*tokenizer_words()["whole_zh"], *(word for words in around("zh").values() for word in words)]
    return sorted(set(re.findall(r"[\u4e00-\u9fff]", "".join(texts))))


def _facts(rng: np.random.Generator) -> ImageFacts:
    """Return an image with random structures; only its wording matters here."""
    order = [int(i) for i in rng.permutation(len(STRUCTURES))]
    seen = int(rng.integers(1, 9))

    def box() -> Bins:
        x0, y0 = (int(v) for v in rng.integers(0, 800, 2))
        width, height = (int(v) for v in rng.integers(20, 199, 2))
        return (x0, y0, x0 + width, y0 + height)

    visible = {s: box() for s in order[:seen]}
    kinds: tuple[RegionKind, ...] = ("box", "point", "mask")
    regions = tuple(RegionFact(kind, order[0], visible[order[0]], visible[order[0]]) for kind in kinds)
    modality, part = int(rng.integers(len(MODALITIES))), int(rng.integers(len(BODY_PARTS)))
    return ImageFacts(modality, part, visible, tuple(order[seen:]), regions)


def corpus(seed: int, images: int = IMAGES) -> Iterator[str]:
    """Yield the lines the merges are learnt from: turns, every template once, names, general words."""
    rng, words = np.random.default_rng(seed), tokenizer_words()
    special = re.compile("|".join(re.escape(t) for t in STRUCTURE_TOKENS) + r"|<c\d+>")
    for _ in range(images):
        for turn in make_turns(_facts(rng), rng, TURNS_PER_IMAGE):
            yield " " + normal_form(turn.prompt.replace("<region>", " "))
            yield from (piece for piece in special.split(turn.answer) if piece)
    languages: tuple[Language, ...] = ("en", "zh")
    for language in languages:
        for kinds in templates(language).values():
            for template in (*kinds["do"], *kinds["ask"]):
                yield from [" " + normal_form(re.sub(r"\{\w+\}", " ", template))] * 5
    for sentences in SENTENCES.values():
        yield from [*sentences.values()] * 20
    yield from [*SUFFIX.values()] * 20
    for term in TERMS:
        for name in term.en:
            yield from [f" {name.lower()}"] * 60
        yield from [*term.zh] * 60
    for unknown in UNKNOWN_NAMES:
        for name in unknown.en:
            yield from [f" {name.lower()}"] * 4
        yield from [*unknown.zh] * 4
    for word in words["general_en"]:
        yield from [f" {word}"] * 12
    yield from [*words["whole_zh"]] * 40
    yield from sorted(set(words["general_zh"])) * 20
    yield from own_characters() * 60


def build(seed: int = 0, vocabulary: int = VOCABULARY, images: int = IMAGES) -> str:
    """Return the tokenizer as the text of a tokenizer.json; `images` made-up images give the turns it learns from."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = "|".join(_words())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"{words}|[\u3400-\u4dbf\u4e00-\u9fff]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, images), trainer)
    data = json.loads(tokenizer.to_str())
    learnt = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    data["model"]["vocab"] = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *learnt))}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n"


def main() -> None:
    """Write the tokenizer to the path given on the command line."""
    import argparse

    parser = argparse.ArgumentParser(description="Train the native family's tokenizer.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(build(arguments.seed), encoding="utf-8")


if __name__ == "__main__":
    main()
