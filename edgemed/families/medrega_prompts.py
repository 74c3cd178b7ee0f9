"""What MedRegA is asked: base prompts by task and language, questions about places, the two calls of regional thought.

Covers our own default wording, a site's own meta file of base prompts with a check whether they are the authors', and
names of modalities. Does not cover where the image stands (`medrega_text.order`), templates, or reading answers. The
authors' task prompts are not shipped: `AUTHORS_PROMPTS` holds hashes to recognise them by.

Source: github xmed-lab/MedRegA at dfdb0db; what is asked in which words is ours, but for the shape of a place
(`<ref>name</ref><box>[[x1, y1, x2, y2]]</box>`) and of the short questions about one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgemed.core import Language
from edgemed.errors import InvalidInput
from edgemed.families.medrega_labels import LabelList, read_text
from edgemed.families.medrega_text import Found, place_text
from edgemed.families.medrega_view import NormBox

__all__ = [
    "AUTHORS_PROMPTS",
    "BASE_PROMPTS",
    "Prompts",
    "Task",
    "default_prompt",
    "describe",
    "identify",
    "locate",
    "modality_name",
    "prompt_source",
    "read_prompts",
    "regional_question",
    "with_findings",
    "with_options",
]

Task = Literal[
    "vqa",
    "vqa_multiple_choice",
    "report",
    "classification",
    "classification_multi",
    "text2region",
    "region2text",
    "grounded_report",
]

MAX_META_BYTES = 16 << 20

_BOX = {
    "en": "A box is [x1, y1, x2, y2]: its left, top, right and bottom edge, 0 to 999 across the image.",
    "zh": "检测框为[x1, y1, x2, y2]，依次为左、上、右、下边界，取值从0到999。",
}

BASE_PROMPTS: Mapping[tuple[Task, Language], str] = {
    ("vqa", "en"): "You are a medical assistant. Answer the question about the image.",
    ("vqa", "zh"): "你是一名医疗助手。请根据医学图像回答问题。",
    ("vqa_multiple_choice", "en"): "You are a medical assistant. Answer the question about the image with one of the "
    "options, word for word.",
    ("vqa_multiple_choice", "zh"): "你是一名医疗助手。请根据医学图像，从所给选项中选择一项回答问题。",
    ("report", "en"): "You are a radiologist. Write the report of the image: findings first, then the impression.",
    ("report", "zh"): "你是一名放射科医生。请为图像撰写报告，包括影像诊断和影像结论两部分。",
    ("classification", "en"): "You are a medical assistant. Name the one diagnosis or class that fits the image best.",
    ("classification", "zh"): "你是一名医疗助手。请判断最符合图像的一个诊断或类别。",
    ("classification_multi", "en"): "You are a medical assistant. Name every diagnosis or finding that the "
    "image shows, separated by commas.",
    ("classification_multi", "zh"): "你是一名医疗助手。请列出图像所示的全部诊断或征象，用逗号分隔。",
    (
        "text2region",
        "en",
    ): "You are a medical assistant. Find each named object in the image and give a box around every "
    f"region of it. {_BOX['en']}",
    ("text2region", "zh"): f"你是一名医疗助手。请在图像中定位所指的每个目标，给出其全部区域的检测框。{_BOX['zh']}",
    ("region2text", "en"): f"You are a medical assistant. Name what is inside the box. {_BOX['en']}",
    ("region2text", "zh"): f"你是一名医疗助手。请识别框中的内容。{_BOX['zh']}",
    ("grounded_report", "en"): "You are a radiologist. Give a box around each named object, a colon, and what is to be "
    f"said about it. {_BOX['en']}",
    ("grounded_report", "zh"): f"你是一名放射科医生。请定位每个目标并给出检测框，在冒号后描述其情况。{_BOX['zh']}",
}
"""Our default for the part of a prompt that says what the task is; `default_prompt` adds labels to it."""

AUTHORS_PROMPTS: Mapping[str, tuple[Language, int, str]] = {
    "vqa": ("en", 104, "db4d64e1c303a18d"),
    "vqa_multiple_choice": ("en", 155, "84b8b3e4f9e25905"),
    "report_iuxray": ("en", 209, "2f160414c38b2813"),
    "report_mimiccxr": ("en", 292, "babfbe653d4d54b3"),
    "text2region": ("en", 619, "258bd9f65ca76cf9"),
    "text2region_demo": ("en", 473, "2fcb4adb52f68bc0"),
    "region2text": ("en", 332, "cc3de5488ef92c48"),
    "grounded_report": ("en", 536, "757992935a91740f"),
    "vqa_zh": ("zh", 23, "7ff3c7ed38af0e10"),
    "report_zh": ("zh", 77, "f51318a8fd4798ed"),
    "grounded_report_zh": ("zh", 166, "666f5fc85906c50b"),
    "classification_brset": ("en", 407, "59f2b4167fec3a4a"),
    "classification_chexpert": ("en", 363, "5d5cdec2d11faa1e"),
    "classification_cxr14": ("en", 434, "8efc7f4be529c8fc"),
    "classification_isic2016": ("en", 149, "e7502e2b1645403c"),
    "classification_isic2017": ("en", 169, "435a3816a318596e"),
    "classification_isic2018": ("en", 244, "224b5b0decb2abf1"),
    "classification_isic2019": ("en", 270, "bbed4a87ea921175"),
    "classification_isic2020": ("en", 148, "8a7b2d2b88e99be4"),
    "classification_kathercolon": ("en", 271, "7fa9e48f8d66c44a"),
    "classification_mura": ("en", 146, "e8af1bc12c5873e7"),
    "classification_oct2017": ("en", 191, "df2d6a73ea10c5b7"),
    "classification_octid": ("en", 193, "cd91d93ae6dc2108"),
    "classification_organmnist": ("en", 228, "1fbe6ef5b4306ebc"),
    "classification_padufes": ("en", 231, "208ed34bfac6c34d"),
    "classification_pannuke": ("en", 287, "e3a996521ea0a158"),
    "classification_rfmid": ("en", 756, "f46e57a2bc8df0a3"),
    "classification_vindrcxr": ("en", 538, "f70a7427fc43702a"),
    "classification_vindrmammo": ("en", 357, "0cda80c0dc8d464a"),
    "classification_vindrpcxr": ("en", 399, "8eff55c2f9bf8c0c"),
    "classification_vindrspinexr": ("en", 307, "96a26dbe4b27fa7e"),
}
"""Task, then what tells variants apart -> language, characters, first 16 hex digits of the SHA-256 (UTF-8) of a base
prompt of the authors. A site that has their files passes the text itself (`read_prompts`).
"""

UNKNOWN = "unknown"
"""The source of a base prompt that is none of the authors'."""


def prompt_source(base_prompt: str) -> str | None:
    """Return the name of the authors' base prompt that this text is, byte for byte, or None."""
    digest = hashlib.sha256(base_prompt.encode()).hexdigest()[:16]
    return next((name for name, (_, _, known) in AUTHORS_PROMPTS.items() if known == digest), None)


# --- a site's meta file -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """The base prompts of a meta file: name of a data set -> text, in the file's order, unchanged."""

    texts: Mapping[str, str]

    def name_of(self, wanted: str, language: Language = "en") -> str:
        """Return the entry that is meant by its name, by the first part of its name, or by a task.

        A task means the entries that hold the authors' prompt of that task and language.

        Raises InvalidInput if nothing fits, or entries with different texts do.

        >>> Prompts({"slake_train_vqa": "Answer."}).name_of("slake")
        'slake_train_vqa'
        """
        if wanted in self.texts:
            return wanted
        if wanted in get_args(Task):
            fitting = [name for name, text in self.texts.items() if _is_of_task(prompt_source(text), wanted, language)]
        else:
            fitting = [name for name in self.texts if name.split("_")[0] == wanted]
        if len({self.texts[name] for name in fitting}) == 1:
            return fitting[0]
        if fitting:
            raise InvalidInput(f"{wanted!r} fits prompts that differ: {_listed(fitting)}; name one of them")
        raise InvalidInput(f"no prompt for {wanted!r} ({language}); the file has {_listed(list(self.texts))}")

    def base_prompt(self, wanted: str, language: Language = "en") -> str:
        """Return the base prompt of a data set or task, as it is in the file. Raises InvalidInput as `name_of`."""
        return self.texts[self.name_of(wanted, language)]

    def source(self, wanted: str, language: Language = "en") -> str:
        """Return the name of the authors' prompt that it is byte for byte, or "unknown"."""
        return prompt_source(self.base_prompt(wanted, language)) or UNKNOWN

    def note(self, wanted: str, language: Language = "en") -> str:
        """Return one line that tells whose prompt it is.

        >>> Prompts({"slake": "Answer."}).note("slake")
        "slake: not one of the authors' published prompts; used as it is"
        """
        name, source = self.name_of(wanted, language), self.source(wanted, language)
        if source == UNKNOWN:
            return f"{name}: not one of the authors' published prompts; used as it is"
        return f"{name}: the authors' prompt {source} ({AUTHORS_PROMPTS[source][2]})"


def read_prompts(path: str | Path) -> Prompts:
    """Return the base prompts of a meta file: a JSON object, data set -> object with `base_prompt`.

    Other keys of an entry (root, annotation, length, repeat_time, data_augment) are not looked at.

    Raises CannotRead, ResourceLimit above 16 MiB, InvalidInput if it is not of this form.
    """
    text = read_text(path, MAX_META_BYTES, "prompt file")
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"prompt file {path} is not JSON: line {error.lineno}, {error.msg}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidInput(f"prompt file {path} cannot be used: {reason}") from error
    if not isinstance(data, dict) or not data:
        raise InvalidInput(
            f"prompt file {path} is no JSON object with entries; name -> {{'base_prompt': ...}} expected"
        )
    texts: dict[str, str] = {}
    for name, entry in data.items():
        prompt = entry.get("base_prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise InvalidInput(f"prompt file {path}: entry {name!r} has no text in 'base_prompt'; one was expected")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"prompt file {path}: entry {name!r} has half a surrogate pair; write it whole"
            ) from error
        texts[name] = prompt
    return Prompts(texts)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _is_of_task(source: str | None, task: str, language: Language) -> bool:
    """Tell whether the authors' prompt of this name is of the task; the longest task a name starts with is its own."""
    if source is None or AUTHORS_PROMPTS[source][0] != language:
        return False
    tasks: tuple[str, ...] = get_args(Task)
    return task == max((t for t in tasks if f"{source}_".startswith(f"{t}_")), key=len)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# --- our base prompts -------------------------------------------------------------------------------------------------

_NOTHING = frozenset({"no finding", "no findings", "normal", "none", "正常", "无", "未见异常"})
"""Labels that say that none of the others applies."""


def default_prompt(task: Task, language: Language = "en", labels: Sequence[str] = ()) -> str:
    """Return our base prompt; a classification with its labels, one a line, as `medrega_labels.labels_in` reads them.

    Raises InvalidInput if the task takes no labels, or two are the same.

    >>> print(default_prompt("classification", "en", ["Edema", "No Finding"]))
    You are a medical assistant. Name the one diagnosis or class that fits the image best. Use these labels:
    Edema
    No Finding
    "No Finding" means that none of the others applies.
    """
    base = BASE_PROMPTS[task, language]
    if not labels:
        return base
    if not task.startswith("classification"):
        raise InvalidInput(f"labels were given for the task {task!r}; only a classification takes them")
    listed = LabelList(tuple(labels), task == "classification_multi").labels
    nothing = next((label for label in listed if label.casefold() in _NOTHING), None)
    if language == "zh":
        lines = [f"{base}可用的标签：", *listed, "" if nothing is None else f"“{nothing}”表示其他标签均不适用。"]
    else:
        rest = "" if nothing is None else f'"{nothing}" means that none of the others applies.'
        lines = [f"{base} Use these labels:", *listed, rest]
    return "\n".join(lines)


def with_options(question: str, options: Sequence[str]) -> str:
    """Return a multiple-choice question with its lettered options, one a line.

    Raises InvalidInput unless there are 2 to 26 options.

    >>> with_options("Which organ is this?", ["liver", "spleen"])
    'Which organ is this?\\nA. liver\\nB. spleen'
    """
    if not 2 <= len(options) <= 26:
        raise InvalidInput(f"the question has {len(options)} options; 2 to 26 were expected")
    return "\n".join([question, *(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))])


# --- questions about places -------------------------------------------------------------------------------------------

_NAMES: Mapping[tuple[str, ...], tuple[str, str]] = {
    ("CR", "DX", "XR", "X-RAY", "XRAY", "RG", "RF", "XA", "MG", "PX", "IO", "RTIMAGE"): ("X-ray", "X线"),
    ("CT",): ("CT", "CT"),
    ("MR", "MRI"): ("MRI", "磁共振"),
    ("US", "IVUS", "ULTRASOUND"): ("ultrasound", "超声"),
    ("OP", "FUNDUS"): ("fundus", "眼底"),
    ("OPT", "OCT", "IVOCT"): ("OCT", "OCT"),
    ("DMS", "DERMOSCOPY"): ("dermoscopy", "皮肤镜"),
    ("SM", "GM", "PATHOLOGY"): ("pathology", "病理"),
}
"""The eight modalities of the training data, by DICOM's defined terms (PS3.3 C.7.3.1.1.1) or the word itself."""


def modality_name(dicom_code: str, language: Language = "en") -> str | None:
    """Return a modality as a question names it, from the DICOM code or the word, or None.

    None for all that may show something else: XC is any photograph, ES any endoscope, OT anything.

    >>> modality_name("MG"), modality_name("mr", "zh"), modality_name("OT")
    ('X-ray', '磁共振', None)
    """
    code = dicom_code.strip().upper()
    return next((names[language == "zh"] for codes, names in _NAMES.items() if code in codes), None)


def locate(objects: Sequence[str], modality: str | None = None, language: Language = "en") -> str:
    """Return the question where the objects are; modality: as `modality_name` gives it.

    Raises InvalidInput if there are none, or a name is empty or holds a tag of the model.

    >>> locate(["left kidney", "liver"], "CT"), locate(["肝脏"], "CT", "zh")
    ('Please locate <ref>left kidney</ref>, <ref>liver</ref> in this CT scan.', '请在这张CT图像中定位<ref>肝脏</ref>。')
    """
    if language == "zh":
        return f"请在{_image(modality, language)}中定位{_names(objects)}。"
    return f"Please locate {_names(objects)} in {_image(modality, language)}."


def identify(box_norm: NormBox, modality: str | None = None, language: Language = "en") -> str:
    """Return the question what is in a box of 0..999. Raises InvalidInput if the box is none.

    >>> identify((1, 2, 3, 4))
    'What is <ref>this</ref><box>[[1, 2, 3, 4]]</box> in this image?'
    """
    if language == "zh":
        return f"{_image(modality, language)}中{place_text('该区域', [box_norm])}是什么？"
    return f"What is {place_text('this', [box_norm])} in {_image(modality, language)}?"


def describe(objects: Sequence[str], language: Language = "en") -> str:
    """Return the question of a grounded report about the objects. Raises InvalidInput as `locate`.

    >>> describe(["heart", "left lung"])
    'Please locate <ref>heart</ref>, <ref>left lung</ref> and describe the condition of each.'
    """
    if language == "zh":
        return f"请定位{_names(objects)}，并描述其情况。"
    return f"Please locate {_names(objects)} and describe the condition of {'each' if len(objects) > 1 else 'it'}."


_TAG = re.compile(r"</?(?:ref|box|quad|img|image|IMG_CONTEXT)>|<\|im_\w+\|>")


def _names(objects: Sequence[str]) -> str:
    names = [name.strip() for name in objects]
    for name in names:
        if not name or _TAG.search(name):
            raise InvalidInput(f"object name {name!r} is empty or holds a tag of the model; plain words were expected")
    if not names:
        raise InvalidInput("no object is named; at least one was expected")
    return ", ".join(map(place_text, names))


def _image(modality: str | None, language: Language) -> str:
    if language == "zh":
        return f"这张{modality or ''}图像"
    return f"this {modality} scan" if modality else "this image"


# --- regional thought: first the places, then the question ------------------------------------------------------------

_SOUGHT = {"en": "regions that are abnormal or that the question is about", "zh": "与问题相关的区域或异常区域"}


def regional_question(question: str, language: Language = "en") -> str:
    """Return the first call's question: where is what `question` is about? Its base prompt is that of text2region.

    question: the one to be answered in the second call; may be empty (a report). The wording is ours; none is known.

    >>> regional_question("Is it large?")
    'Question: Is it large?\\nPlease locate the <ref>regions that are abnormal or that the question is about</ref>.'
    >>> regional_question("")
    'Please locate the <ref>abnormal regions</ref>.'
    """
    question = question.strip()
    if language == "zh":
        sought = place_text(_SOUGHT["zh"] if question else "异常区域")
        return (f"问题：{question}\n" if question else "") + f"请定位{sought}。"
    sought = place_text(_SOUGHT["en"] if question else "abnormal regions")
    return (f"Question: {question}\n" if question else "") + f"Please locate the {sought}."


def with_findings(question: str, places: Iterable[Found], language: Language = "en") -> str:
    """Return the second call's question: the places found, each with its boxes, and the question.

    places: of the first answer (`medrega_text.parse`). A place without a box was not found and is left out; one that
    comes twice is put once; one without a name is called "region"; tags in a name are dropped. If none is left, the
    question is unchanged.

    >>> with_findings("Is it large?", [Found("heart", ((1, 2, 3, 4),)), Found("spine", ())])
    'Regions found: <ref>heart</ref><box>[[1, 2, 3, 4]]</box>.\\nIs it large?'
    >>> with_findings("Is it large?", [])
    'Is it large?'
    """
    unnamed = "区域" if language == "zh" else "region"
    found = list(
        dict.fromkeys(
            place_text(_TAG.sub("", place.name).strip() or unnamed, place.boxes) for place in places if place.boxes
        )
    )
    if not found:
        return question
    head = f"已找到的区域：{', '.join(found)}。" if language == "zh" else f"Regions found: {', '.join(found)}."
    return f"{head}\n{question}"
