"""Which language a text is in, and which one it asks to be answered in.

Covers English and Chinese. What is appended to a prompt to settle the language of the answer is a family's affair.
"""

from __future__ import annotations

import re
import unicodedata

from edgemed.core import Language

_REQUESTS: tuple[tuple[Language, str], ...] = (
    ("zh", r"(?:please )?(?:answer|reply|respond|write|say it)(?: me)? in (?:simplified )?chinese(?: please)?[.!,;]?"),
    ("en", r"(?:please )?(?:answer|reply|respond|write|say it)(?: me)? in english(?: please)?[.!,;]?"),
    ("zh", r"[,，]?(?:请)?(?:用|以)?(?:中文|汉语)(?:来)?(?:回答|回复|作答|答复)[。.!,]?"),
    ("en", r"[,，]?(?:请)?(?:用|以)?(?:英文|英语)(?:来)?(?:回答|回复|作答|答复)[。.!,]?"),
    ("zh", r"[,;]? ?in chinese(?: please)?[.!?]?$"),
    ("en", r"[,;]? ?in english(?: please)?[.!?]?$"),
)


def language_of(text: str) -> Language:
    """Return "zh" if `text` holds a CJK ideograph, else "en".

    >>> language_of("肝脏在哪里?"), language_of("Where is the liver?")
    ('zh', 'en')
    """
    return "zh" if any("\u4e00" <= c <= "\u9fff" or "\u3400" <= c <= "\u4dbf" for c in text) else "en"


def answer_language(text: str) -> Language:
    """Return the language an answer to `text` is due in: the one it asks for, else the one it is written in.

    >>> answer_language("Where is the liver? Answer in Chinese."), answer_language("肝脏在哪里?")
    ('zh', 'zh')
    """
    return request_in(folded_text(text))[0] or language_of(text)


def folded_text(text: str) -> str:
    """Return `text` in NFKC and lower case, without control characters, with single spaces."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    return re.sub(r" +", " ", text).strip()


def request_in(folded: str) -> tuple[Language | None, str]:
    """Return the language that folded text explicitly asks for, or None, and the text without that request."""
    for language, pattern in _REQUESTS:
        rest, count = re.subn(pattern, "", folded)
        if count and rest.strip(" ,.;"):
            return language, rest.strip()
    return None, folded
