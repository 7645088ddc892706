"""Which layers a step may touch: ordered rules over paths and types, the last one that matches wins."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from featherweight.errors import nearest

Pattern = Annotated[str, Field(min_length=1)]


class Rule(BaseModel):
    """Layers to take in or leave out; what is in both is left out.

    A pattern is a layer's dotted path with ``*``, ``?`` and ``[]``, or the name of
    its type. A path also stands for all that lies below it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    include: tuple[Pattern, ...] = ()
    exclude: tuple[Pattern, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if isinstance(data, Rule):
            return data
        if not isinstance(data, Mapping):
            raise ValueError("a rule of where is a mapping with include or exclude")
        for key in data:
            if key not in cls.model_fields:
                raise ValueError(f"where has no key '{key}': {nearest(str(key), cls.model_fields)}")
        lists = {key: (value,) if isinstance(value, str) else value for key, value in data.items()}
        if not any(lists.values()):
            raise ValueError("a rule of where names no layer under include or exclude")
        return lists

    @model_serializer
    def _data(self) -> dict[str, list[str]]:
        both = (("include", self.include), ("exclude", self.exclude))
        return {name: list(patterns) for name, patterns in both if patterns}


class Where(BaseModel):
    """Which layers a step may touch: ordered rules, the last one that matches wins.

    Everything, without rules; when the first rule includes, nothing but what rules include.
    YAML forms: ``{exclude: [head]}``, ``{include: ['layer1.*']}``, or a list of such mappings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[Rule, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "rules" not in data:
            return {"rules": (data,)} if data else {}
        if isinstance(data, list | tuple):
            return {"rules": data}
        if not isinstance(data, Mapping | Where):
            raise ValueError("where is a mapping with include or exclude, or a list of them")
        return data

    @model_serializer
    def _data(self) -> Any:
        rules = [rule.model_dump() for rule in self.rules]
        return rules if len(rules) > 1 else (rules or [{}])[0]

    def selects(self, path: str, type_name: str) -> bool:
        """Whether the layer at a dotted path, of a class of that name, may be touched."""
        selected = not (self.rules and self.rules[0].include)
        for rule in self.rules:
            if _matches(rule.include, path, type_name):
                selected = True
            if _matches(rule.exclude, path, type_name):
                selected = False
        return selected

    def unmatched(self, layers: Mapping[str, str]) -> tuple[str, ...]:
        """Patterns that match none of these layers (path -> type name): most likely misspelt."""
        patterns = [pattern for rule in self.rules for pattern in (*rule.include, *rule.exclude)]
        return tuple(
            pattern
            for pattern in patterns
            if not any(_matches((pattern,), path, type_name) for path, type_name in layers.items())
        )


def _matches(patterns: tuple[str, ...], path: str, type_name: str) -> bool:
    parts = path.split(".")
    prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(
        pattern == type_name or any(fnmatchcase(prefix, pattern) for prefix in prefixes)
        for pattern in patterns
    )
