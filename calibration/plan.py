"""What is quantized and how, as data: a precision for each graph, other ones for nodes, and what stays with its reason.

Covers checks and TOML both ways. Does not cover which nodes a graph has (`sites`) or how one is chosen (`search`).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from edgemed.calibration.ranges import Method
from edgemed.errors import InvalidInput
from edgemed.graphs import ROLES

Precision = Literal["fp32", "int8", "fp8", "int8-weights", "int4-weights"]
"""int8, fp8: weights and activations. int8-weights, int4-weights: activations stay as they are."""

Cache = Literal["fp32", "int8"]


@dataclass(frozen=True)
class QuantPlan:
    """What is quantized, and how.

    precision: role -> of its nodes; a role that is missing stays as it is. nodes: role -> node -> another precision.
    excluded: role -> node -> why it stays as it is. method: where activations are clipped. block: weights with one
    scale in int4-weights, along the input dimension; a power of two from 16 on. cache: of the decoder's keys and
    values; fp32: they stay as they are.
    """

    precision: Mapping[str, Precision] = field(default_factory=dict)
    nodes: Mapping[str, Mapping[str, Precision]] = field(default_factory=dict)
    excluded: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    method: Method = "minmax"
    block: int = 64
    cache: Cache = "fp32"

    def __post_init__(self) -> None:
        named = {*self.precision, *self.nodes, *self.excluded}
        if unknown := sorted(named - set(ROLES)):
            raise InvalidInput(f"the plan names graph {unknown[0]!r}; one of {', '.join(ROLES)} was expected")
        for value in (*self.precision.values(), *(p for found in self.nodes.values() for p in found.values())):
            if value not in get_args(Precision):
                raise InvalidInput(f"precision is {value!r}; one of {', '.join(get_args(Precision))} was expected")
        if self.method not in get_args(Method):
            raise InvalidInput(f"method is {self.method!r}; one of {', '.join(get_args(Method))} was expected")
        if self.cache not in get_args(Cache):
            raise InvalidInput(f"cache is {self.cache!r}; one of {', '.join(get_args(Cache))} was expected")
        if self.block < 16 or self.block & (self.block - 1):
            raise InvalidInput(f"block is {self.block}; a power of two from 16 on was expected")
        for role, found in self.excluded.items():
            if bare := [node for node, reason in found.items() if not reason.strip()]:
                raise InvalidInput(f"the plan excludes {bare[0]} of the {role} without a reason; say why")

    def of(self, role: str, node: str) -> Precision:
        """Return the precision of one node."""
        if node in self.excluded.get(role, {}):
            return "fp32"
        return self.nodes.get(role, {}).get(node, self.precision.get(role, "fp32"))


def plan_to_toml(plan: QuantPlan) -> str:
    """Return the plan as TOML, tables in the order of the roles.

    >>> print(plan_to_toml(QuantPlan({"decoder": "int4-weights"}, excluded={"decoder": {"logits": "most sensitive"}})))
    method = "minmax"
    block = 64
    cache = "fp32"
    <BLANKLINE>
    [precision]
    "decoder" = "int4-weights"
    <BLANKLINE>
    [excluded.decoder]
    "logits" = "most sensitive"
    <BLANKLINE>
    """
    lines = [f'method = "{plan.method}"', f"block = {plan.block}", f'cache = "{plan.cache}"']
    tables: list[tuple[str, Mapping[str, str]]] = [("precision", plan.precision)]
    for name, by_role in (("nodes", plan.nodes), ("excluded", plan.excluded)):
        tables += [(f"{name}.{role}", by_role[role]) for role in ROLES if role in by_role]
    for title, values in tables:
        lines += ["", f"[{title}]", *(f"{_quoted(key)} = {_quoted(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a TOML basic string; JSON's escapes are TOML's, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def plan_from_toml(text: str) -> QuantPlan:
    """Return the plan that `plan_to_toml` wrote. Raises InvalidInput where it is none."""
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"the plan is not TOML: {error}") from error
    if unknown := sorted(set(values) - {f.name for f in fields(QuantPlan)}):
        raise InvalidInput(f"the plan has {', '.join(unknown)}, which no plan has")
    if not isinstance(values.get("block", 64), int) or isinstance(values.get("block"), bool):
        raise InvalidInput(f"the plan's block is {values['block']!r}; a whole number was expected")
    tables = [values.get("precision", {}), values.get("nodes", {}), values.get("excluded", {})]
    for table in [*tables, *(inner for t in tables[1:] if isinstance(t, dict) for inner in t.values())]:
        if not isinstance(table, dict):
            raise InvalidInput(f"the plan has {table!r} where a table was expected")
    texts = [*tables[0].values(), *(v for table in tables[1:] for inner in table.values() for v in inner.values())]
    if wrong := [value for value in texts if not isinstance(value, str)]:
        raise InvalidInput(f"the plan has {wrong[0]!r} where a text was expected")
    return QuantPlan(**values)
