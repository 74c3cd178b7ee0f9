"""The wording of questions, in English and Chinese, from questions.toml: many ways, one meaning."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from edgemed.core import Language

Templates = dict[str, dict[str, tuple[str, ...]]]


@cache
def _questions() -> dict[str, Any]:
    return tomllib.loads(files("edgemed.training").joinpath("questions.toml").read_text(encoding="utf-8"))


@cache
def templates(language: Language) -> Templates:
    """Return task -> "do" (an order, may be made polite) or "ask" (as it stands) -> templates, from questions.toml."""
    return {task: {kind: tuple(v) for kind, v in kinds.items()} for task, kinds in _questions()[language].items()}


@cache
def around(language: Language) -> dict[str, tuple[str, ...]]:
    """Return what may stand around a question, and the words for image and region, from questions.toml."""
    return {name: tuple(v) for name, v in _questions()["around"][language].items()}


@cache
def tokenizer_words() -> dict[str, tuple[str, ...]]:
    """Return the words the tokenizer learns beside turns: whole_zh, general_en (words), general_zh (characters)."""
    words = _questions()["words"]
    return {
        "whole_zh": tuple(words["whole_zh"]),
        "general_en": tuple(words["general_en"].split()),
        "general_zh": tuple("".join(words["general_zh"].split())),
    }
