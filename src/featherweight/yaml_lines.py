"""YAML as plain values with the line of each, and back; hostile files are refused early."""

from __future__ import annotations

import re
from typing import Any

import yaml

from featherweight.errors import RecipeError
from featherweight.holes import ValuePath

LARGEST = 1_000_000  # characters; with the two below far above any recipe
_NODES, _DEPTH = 5_000, 32

# YAML 1.2's core schema: 1e-3 is a number, and 'no', 'on' and dates are text. PyYAML's own is 1.1.
_CORE = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
)
_TAG = "tag:yaml.org,2002:"
_Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]


def _with_core(base: _Resolvers) -> _Resolvers:
    table = {start: list(rules) for start, rules in base.items()}
    for name, pattern, starts in _CORE:
        for start in starts:
            table.setdefault(start, []).append((_TAG + name, re.compile(pattern)))
    return table


class _Loader(yaml.SafeLoader):
    """Plain values only: no anchors, no tags of other types, bounded depth and size."""

    yaml_implicit_resolvers = _with_core({})

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _RefusedError("anchors and aliases (& and *) are not read", line, "write the value out")
        self.depth += 1
        self.nodes += 1
        if self.depth > _DEPTH:
            raise _RefusedError(f"it is nested deeper than {_DEPTH} levels", line, "write it flat")
        if self.nodes > _NODES:
            raise _RefusedError(f"it holds more than {_NODES} values", line, "split it")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as anything but text; never writes anchors."""

    yaml_implicit_resolvers = _with_core(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes U+0085 and U+2028 as line breaks, which do not come back; escapes do.
        style = None if data.isprintable() else '"'
        return self.represent_scalar(_TAG + "str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


class _RefusedError(Exception):
    """YAML that is not read, though it may be valid."""

    def __init__(self, what: str, line: int, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.line, self.fix = what, line, fix


def too_large(source: str) -> RecipeError:
    """The error for a file beyond ``LARGEST``."""
    return RecipeError(f"recipe '{source}' is larger than 1 MB", fix="give the recipe's own file")


def place_of(source: str, line: int | None) -> str:
    """Where an error is, for its message."""
    return source if line is None else f"{source}, line {line}"


def write_yaml(data: Any) -> str:
    """The text that :func:`read_yaml` reads back as the same data; innermost collections on one line."""
    text: str = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    return text


def read_yaml(text: str, source: str) -> tuple[Any, dict[ValuePath, int]]:
    """Plain data and the line of every value, by its path."""
    if len(text) > LARGEST:
        raise too_large(source)
    lines: dict[ValuePath, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise _RefusedError("it is empty", 1, "begin it with 'version: 1'")
        return _plain_node(node, (), lines), lines
    except _RefusedError as refused:
        raise RecipeError(
            f"the recipe cannot be read: {refused.what}",
            where=place_of(source, refused.line),
            fix=refused.fix,
        ) from refused
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "unknown"
        problem = f"{error.context} {problem}" if problem.startswith("but ") else problem
        raise RecipeError(
            f"the recipe is not YAML: {problem}",
            where=place_of(source, None if mark is None else mark.line + 1),
            fix="check indentation, brackets and quotes at this line",
        ) from error
    except yaml.YAMLError as error:  # characters that YAML does not allow carry no line
        raise RecipeError(
            f"the recipe is not YAML: {str(error).splitlines()[0]}", where=source, fix="save it as plain text"
        ) from error


def _plain_node(node: yaml.Node, path: ValuePath, lines: dict[ValuePath, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_plain_node(item, (*path, index), lines) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        result: dict[str, Any] = {}
        for key, value in node.value:
            at = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _RefusedError("a key is a list or a mapping", at, "write a name before the ':'")
            name = str(key.value)  # as written: a layer may be called 0
            if name in result:
                first = lines[(*path, name)]
                raise _RefusedError(f"the key '{name}' stands twice, first at line {first}", at, "remove one")
            lines[(*path, name)] = at
            result[name] = _plain_node(value, (*path, name), lines)
        return result
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.tag.removeprefix(_TAG), str(node.value), line)
    raise _RefusedError(f"the tag '{node.tag.replace(_TAG, '!!')}' is not read", line, "remove it")


def _scalar(tag: str, text: str, line: int) -> Any:
    if tag == "str":
        return text
    if tag == "null":
        return None
    try:
        if tag == "bool":
            return {"true": True, "false": False}[text.lower()]
        if tag == "int":
            return int(text, 0 if text[:2] in ("0o", "0x") else 10)
        if tag == "float":
            return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    except (ValueError, KeyError) as error:
        raise _RefusedError(f"'{text[:40]}' is no {tag}", line, "write a plain value") from error
    raise _RefusedError(f"the tag '!!{tag}' is not read", line, "remove it")
