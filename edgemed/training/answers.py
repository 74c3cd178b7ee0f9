"""The wording of answers, in English and Chinese: few fixed ways, so that a small model is certain how to say a thing.

Places in words ("upper left") are of the image as it is shown, never the patient's sides. Does not cover questions
(`questions`), or which answer belongs to which question (`tasks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgemed.core import Language
from edgemed.families.native_lexicon import BODY_PARTS, EN_PLURAL, MODALITIES, STRUCTURES, position
from edgemed.families.native_text import Bins, tag
from edgemed.training.facts import ImageFacts, RegionFact

LIST_LENGTH = 10
"""Most structures in the answer to "list what is visible"."""
DESCRIBE_LENGTH = 4
"""Most structures in a description."""


MARKED_REGION: Mapping[Language, str] = {"en": "marked region", "zh": "标记区域"}
"""What a region without a known name is called where it is outlined."""

_MODALITY_EN = (
    "a CT image",
    "an MR image",
    "an X-ray image",
    "an ultrasound image",
    "a fundus photograph",
    "a dermoscopy image",
    "an endoscopy image",
    "a histopathology image",
    "a blood smear microscopy image",
)
_ARTICLE_EN = {"blood": "blood", "breast_tissue": "breast tissue", "limb": "a limb"}

SENTENCES: dict[str, dict[Language, str]] = {
    "unknown": {
        "en": "That structure is not among those that this model knows.",
        "zh": "该结构不在本模型认识的结构之列。",
    },
    "none": {
        "en": "None of the structures that this model knows is visible in this image.",
        "zh": "该图像中未见本模型认识的结构。",
    },
    "no_region": {"en": "No region was given with the question.", "zh": "问题中没有给出区域。"},
    "other_region": {
        "en": "This region is not one of the structures that this model knows.",
        "zh": "该区域不是本模型认识的结构。",
    },
    "judge": {
        "en": "This demonstration model can find and outline structures, but it cannot judge normality or make "
        "a diagnosis.",
        "zh": "本演示模型可以定位和勾画结构，但不能判断是否正常，也不能作出诊断。",
    },
    "about": {
        "en": "This is a demonstration model that finds, names and outlines structures in medical images. "
        "It is not for diagnosis.",
        "zh": "这是一个演示模型，可以在医学图像中定位、识别和勾画结构，不能用于诊断。",
    },
    "outside": {
        "en": "This demonstration model can only find, name and outline structures in medical images.",
        "zh": "本演示模型只能在医学图像中定位、识别和勾画结构。",
    },
}
"""The answers that hold no place and no name."""


def name_of(structure: int, language: Language) -> str:
    """Return the name of a structure that answers use."""
    term = STRUCTURES[structure]
    return (term.en if language == "en" else term.zh)[0]


def verb_of(structure: int) -> str:
    """Return "are" or "is", as the English name of a structure needs."""
    return "are" if STRUCTURES[structure].key in EN_PLURAL else "is"


def say_place(structure: int, facts: ImageFacts, language: Language) -> str:
    """Return the sentence that answers "where is it": its place, or that it is not visible."""
    if structure not in facts.visible:
        if language == "zh":
            return f"{name_of(structure, 'zh')}在该图像中不可见。"
        return f"The {name_of(structure, 'en')} {verb_of(structure)} not visible in this image."
    bins = facts.visible[structure]
    place, where = tag(name_of(structure, language), bins), position(bins, language, facts.extent)
    if language == "zh":
        return f"{place}位于图像{where}。"
    return f"The {place} {verb_of(structure)} in the {where} part of the image."


def say_outline(structure: int, facts: ImageFacts, language: Language) -> str:
    """Return the sentence that answers "segment it"."""
    if structure not in facts.visible:
        return say_place(structure, facts, language)
    place = tag(name_of(structure, language), facts.visible[structure])
    return f"{place}已勾画。" if language == "zh" else f"The {place} {verb_of(structure)} outlined."


def say_image(facts: ImageFacts, language: Language) -> str:
    """Return the sentence with modality and body part, as far as they are known; "" if neither is."""
    part = None if facts.body_part is None else BODY_PARTS[facts.body_part]
    if language == "zh":
        where = "" if part is None else part.zh[0]
        if facts.modality is None:
            return f"图像部位是{where}。" if where else ""
        return f"这是一幅{MODALITIES[facts.modality].zh[0]}图像{'，部位是' + where if where else ''}。"
    where = "" if part is None else _ARTICLE_EN.get(part.key, f"the {part.en[0]}")
    if facts.modality is None:
        return f"This image shows {where}." if where else ""
    return f"This is {_MODALITY_EN[facts.modality]}{' of ' + where if where else ''}."


def by_size(visible: Mapping[int, Bins]) -> list[int]:
    """Return the visible structures, largest box first, ties in index order."""
    return sorted(visible, key=lambda s: (-(visible[s][2] - visible[s][0]) * (visible[s][3] - visible[s][1]), s))


def say_list(facts: ImageFacts, language: Language) -> str:
    """Return the answer to "list the visible structures": at most LIST_LENGTH, largest box first."""
    places = [tag(name_of(s, language), facts.visible[s]) for s in by_size(facts.visible)[:LIST_LENGTH]]
    if not places:
        return SENTENCES["none"][language]
    return f"可见结构：{'、'.join(places)}。" if language == "zh" else f"Visible structures: {', '.join(places)}."


def say_region(region: RegionFact, language: Language) -> str:
    """Return the answer to "what is in this region"."""
    if region.structure is None or region.target_bins is None:
        return SENTENCES["other_region"][language]
    place = tag(name_of(region.structure, language), region.target_bins)
    return f"该区域是{place}。" if language == "zh" else f"This region shows the {place}."


def say_region_outline(region: RegionFact, language: Language) -> str:
    """Return the answer to "segment this region". What has no name is outlined too: the user pointed at it."""
    if region.structure is None or region.target_bins is None:
        place = tag(MARKED_REGION[language], region.box_bins)
        return (
            f"{place}已勾画，但不是本模型认识的结构。"
            if language == "zh"
            else (f"The {place} is outlined; it is not a structure that this model knows.")
        )
    place = tag(name_of(region.structure, language), region.target_bins)
    return f"{place}已勾画。" if language == "zh" else f"The {place} {verb_of(region.structure)} outlined."


def say_description(facts: ImageFacts, language: Language) -> str:
    """Return modality and body part, then the places of the DESCRIBE_LENGTH largest structures."""
    sentences = [say_place(s, facts, language) for s in by_size(facts.visible)[:DESCRIBE_LENGTH]]
    return joined([say_image(facts, language), *(sentences or [SENTENCES["none"][language]])], language)


def joined(sentences: Sequence[str], language: Language) -> str:
    """Return the sentences that are not empty as one text."""
    return ("" if language == "zh" else " ").join(s for s in sentences if s)
