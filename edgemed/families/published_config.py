"""The keys of a published `config.json`: typed, with the published value where one is missing, and errors that name it.

Covers looking up and checking single keys. Does not cover which keys there are (`medrega_config`, `medplib_config`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from edgemed.errors import InvalidInput

T = TypeVar("T", bool, int, float, str)
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Keys:
    """Looks keys up by their dotted names and remembers which were missing; notes: what else the export must say."""

    config: Mapping[str, Any]
    fell_back: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def get(self, key: str, published: T) -> T:
        """Return the value of `key`, which must be of the kind of `published`, or `published` if it is missing."""
        value = self._find(key)
        if value is None:
            self.fell_back.append(key)
            return published
        wanted: type = type(published)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:  # an exact match: True is an int to isinstance
            raise wrong(key, value, f"a value of type {wanted.__name__}")
        return cast("T", value)

    def positive(self, key: str, published: N) -> N:
        """Return the value of `key`, a number above 0."""
        value = self.get(key, published)
        if not value > 0:
            raise wrong(key, value, "a number above 0")
        return value

    def optional(self, key: str, rule: int) -> int:
        """Return the value of a key that the published file leaves out, or what follows by rule."""
        return rule if self._find(key) is None else self.positive(key, rule)

    def numbers(self, key: str, published: Sequence[int]) -> list[int]:
        """Return the value of `key`, a list of whole numbers."""
        value = self._find(key)
        if value is None:
            self.fell_back.append(key)
            return list(published)
        if not isinstance(value, list) or any(type(v) is not int for v in value):
            raise wrong(key, value, "a list of whole numbers")
        return list(value)

    def must_be(self, key: str, *allowed: object) -> None:
        """Raise InvalidInput if `key` holds anything but what is allowed; a missing key is allowed."""
        value = self._find(key)
        if value is not None and value not in allowed:
            raise wrong(key, value, f"{' or '.join(map(repr, allowed))}; nothing else is computed by this version")

    def divides(self, key: str, value: int, whole_key: str, whole: int) -> None:
        """Raise InvalidInput if the value of one key does not divide that of the other."""
        if whole % value:
            raise wrong(key, value, f"a divisor of {whole_key}, {whole}")

    def _find(self, key: str) -> Any:
        part: Any = self.config
        for name in key.split("."):
            if not isinstance(part, Mapping):
                raise wrong(key.rpartition(".")[0], part, "an object with keys")
            part = part.get(name)
            if part is None:
                return None
        return part


def check_family(config: Mapping[str, Any], model_type: str, architecture: str, name: str) -> None:
    """Raise InvalidInput unless `model_type`, or `architectures` where that is missing, is that of family `name`."""
    found = config.get("model_type")
    if found == model_type or (found is None and architecture in (config.get("architectures") or [])):
        return
    raise InvalidInput(
        f"config.json: model_type is {found!r}, {model_type!r} was expected; this is no {name} checkpoint"
    )


def wrong(key: str, found: object, expected: str) -> InvalidInput:
    """Return the error of a key whose value is not what was expected."""
    return InvalidInput(f"config.json: {key} is {found!r}, expected {expected}")
