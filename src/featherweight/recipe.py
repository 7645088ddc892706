"""A recipe is plain data: which methods, in which order, with which parameters.

A hole stands where a value would stand, and makes a recipe a search space. Filled,
the recipe is a result; both are the same YAML::

    version: 1
    steps:
      - fold: {}
      - quantize: {activations: {choice: [int8, none]}, where: {exclude: [head]}}

One ordering rule replaces all compatibility lists: no structure step after a
format step. docs/recipes.md describes the format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from featherweight import plugins
from featherweight.errors import PluginError, RecipeError, nearest
from featherweight.holes import (
    HOLE_KEYS,
    Choice,
    Hole,
    MalformedError,
    Range,
    ValuePath,
    address_of,
    find_holes,
    parameter_of,
    read_value,
    replaced,
    show,
    write_value,
)
from featherweight.where import Rule, Where
from featherweight.yaml_lines import LARGEST, place_of, read_yaml, too_large, write_yaml

if TYPE_CHECKING:
    from featherweight.method import Method

__all__ = ["Choice", "Hole", "Range", "Recipe", "Rule", "Step", "Where"]

VERSION = 1


@dataclass(frozen=True)
class Step:
    """One method and its parameters, as given.

    Attributes:
        method: Name of a file under ``methods/`` or of an entry point.
        parameters: Plain values and holes, by parameter name; only those that were given.
        line: Line of the recipe's file.
        lines: Path of a value below ``parameters`` -> its line.
        source: The recipe's file.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    line: int | None = field(default=None, compare=False)
    lines: Mapping[ValuePath, int] = field(default_factory=dict, compare=False, repr=False)
    source: str = field(default="recipe", compare=False, repr=False)

    def __post_init__(self) -> None:
        try:
            if any(not isinstance(name, str) for name in self.parameters):
                raise MalformedError((), "a parameter's name is text")
            parameters = {name: read_value(value, (name,)) for name, value in self.parameters.items()}
        except MalformedError as bad:
            raise self.error(bad.what, bad.path, fix=bad.fix) from bad
        object.__setattr__(self, "parameters", parameters)

    def error(self, what: str, path: ValuePath = (), *, fix: str | None = None) -> RecipeError:
        """An error at a value of this step, with its line."""
        lines = [self.lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.lines]
        place = place_of(self.source, lines[0] if lines else self.line)
        return RecipeError(what, where=f"{place}, step {self.method}", fix=fix)

    def holes(self) -> dict[str, Hole]:
        """Holes by address: the parameter's name, with '/' and the key for what is inside of it."""
        return {address_of(path): hole for path, hole in find_holes(self.parameters)}

    def filled(self, values: Mapping[str, Any]) -> Step:
        """The same step with values, by address, in its holes; a new name is a new parameter.

        Raises:
            RecipeError: A value does not fit its hole, or would replace a fixed value.
        """
        paths = {address_of(path): path for path, _ in find_holes(self.parameters)}
        holes, parameters = self.holes(), dict(self.parameters)
        for address, value in values.items():
            if address in holes:
                if not holes[address].admits(value):
                    raise self.error(f"{show(value)} does not fit the hole '{address}'", paths[address])
                parameters = replaced(parameters, paths[address], value)
            elif address in parameters or "/" in address:
                raise self.error(f"'{address}' is no hole of {self.method}")
            else:
                parameters[address] = value
        return replace(self, parameters=parameters)

    def method_type(self) -> type[Method]:
        """The method's class.

        Raises:
            RecipeError: There is none of that name; names the nearest one.
        """
        try:
            return plugins.find_method(self.method)
        except PluginError as error:
            raise RecipeError(error.what, where=place_of(self.source, self.line), fix=error.fix) from error

    def build(self) -> Method:
        """The method's instance; every hole must be filled.

        Raises:
            RecipeError: The method is unknown, or a parameter's name or value is not valid.
        """
        method = self.method_type()
        self._check_names(method)
        for path, _ in find_holes(self.parameters)[:1]:
            raise self.error(f"the hole '{address_of(path)}' of {self.method} is not filled", path)
        try:
            return method.model_validate(self.parameters)
        except ValidationError as error:
            raise self._value_error(method, error.errors()[0]) from error

    def checked(self) -> Step:
        """This step, its names and values held against the method, holes by their options or ends.

        Raises:
            RecipeError: The method is unknown, or a parameter's name or value is not valid.
        """
        method = self.method_type()
        self._check_names(method)
        step = self._with_float_ranges(method)
        holes = step.holes()
        if not holes:
            step.build()
            return step
        first = {address: hole.first for address, hole in holes.items()}
        # With holes open only single parameters can be judged: a rule across several may hold once filled.
        step._probe(method, first, None)
        for address, hole in holes.items():
            for value in hole.ends():
                step._probe(method, first | {address: value}, address)
        return step

    def _probe(self, method: type[Method], values: Mapping[str, Any], address: str | None) -> None:
        try:
            method.model_validate(self.filled(values).parameters)
        except ValidationError as error:
            for details in error.errors():
                loc = details["loc"]
                if loc and (address is None or loc[0] == parameter_of(address)):
                    raise self._value_error(method, details) from error

    def _check_names(self, method: type[Method]) -> None:
        for name in self.parameters:
            if name in method.model_fields:
                continue
            if name in HOLE_KEYS:
                raise self.error(
                    f"a hole stands where the parameters of {self.method} are needed",
                    (name,),
                    fix=f"put it at one parameter: {', '.join(sorted(method.model_fields))}",
                )
            raise self.error(
                f"{self.method} has no parameter '{name}'", (name,), fix=nearest(name, method.model_fields)
            )

    def _with_float_ranges(self, method: type[Method]) -> Step:
        """A float parameter's range written [0, 1] means the numbers between, not the two whole ones."""
        parameters = dict(self.parameters)
        for name, value in self.parameters.items():
            kinds = _types(method.model_fields[name].annotation)
            if isinstance(value, Range) and float in kinds and int not in kinds:
                parameters[name] = replace(value, low=float(value.low), high=float(value.high))
        return replace(self, parameters=parameters)

    def _value_error(self, method: type[Method], details: ErrorDetails) -> RecipeError:
        """Pydantic's finding as one sentence with the line of the value."""
        loc = tuple(part for part in details["loc"] if part != "rules")
        if not loc:
            return self.error(f"{self.method}: {_reason(details)}")
        name = str(loc[0])
        if details["type"] == "missing" and len(loc) == 1:
            return self.error(f"{self.method} needs the parameter '{name}'", fix=f"add {name} to the step")
        known = [loc[:end] for end in range(len(loc), 0, -1) if loc[:end] in self.lines]
        said = ".".join(str(part) for part in (known or [(name,)])[0])
        fix = None
        options = re.findall(r"'([^']*)'", str(details.get("ctx", {}).get("expected", "")))
        if details["type"] == "literal_error" and options and isinstance(details["input"], str):
            fix = nearest(details["input"], options)
        elif name == "where":
            fix = "write for example where: {exclude: [head]}"
        elif name in method.model_fields and _is_simple(method.model_fields[name].default):
            fix = f"the default is {name}: {show(method.model_fields[name].default)}"
        return self.error(f"'{said}' of {self.method} {_reason(details)}", loc, fix=fix)


@dataclass(frozen=True)
class Recipe:
    """Steps in order.

    Attributes:
        steps: Oldest first; none: the model as it is.
        version: Of the format.
        source: The file, for messages.
    """

    steps: tuple[Step, ...]
    version: int = VERSION
    source: str = field(default="recipe", compare=False, repr=False)

    @classmethod
    def parse(cls, text: str, source: str = "recipe.yaml") -> Recipe:
        """Read YAML and hold it against the methods.

        Raises:
            RecipeError: It is no valid recipe; says what, at which line, and what to write.
        """
        data, lines = read_yaml(text, source)
        return _recipe(data, lines, source)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file.

        Raises:
            RecipeError: The file cannot be read or is no valid recipe.
        """
        try:
            with Path(path).open("rb") as file:
                content = file.read(LARGEST + 1)
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise RecipeError(
                f"recipe '{path}' cannot be read: {why.lower()}", fix="check the path after --recipe"
            ) from error
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if len(content) > LARGEST:
                raise too_large(str(path)) from error
            raise RecipeError(f"recipe '{path}' is not text", fix="save it as UTF-8") from error
        return cls.parse(text, str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """What :meth:`to_dict` wrote, held against the methods.

        Raises:
            RecipeError: It is no valid recipe.
        """
        return _recipe(data, {}, source)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with only the parameters that were given; holes as in YAML."""
        return {
            "version": self.version,
            "steps": [{step.method: write_value(step.parameters)} for step in self.steps],
        }

    def to_yaml(self) -> str:
        """The text that :meth:`parse` reads back as an equal recipe."""
        return write_yaml(self.to_dict())

    def holes(self) -> dict[int, dict[str, Hole]]:
        """Holes by address, for every step (counted from 0) that has some."""
        return {index: step.holes() for index, step in enumerate(self.steps) if step.holes()}

    @property
    def has_holes(self) -> bool:
        """Whether it is a search space rather than a result."""
        return bool(self.holes())

    def filled(self, values: Mapping[int, Mapping[str, Any]]) -> Recipe:
        """The same recipe with values in holes: step (counted from 0) -> address -> value.

        Raises:
            RecipeError: A value does not fit its hole, or would replace a fixed value.
        """
        steps = tuple(step.filled(values.get(index, {})) for index, step in enumerate(self.steps))
        return replace(self, steps=steps)

    def methods(self) -> list[Method]:
        """An instance of every step's method; every hole must be filled.

        Raises:
            RecipeError: A step is not valid, or the order is not.
        """
        methods = [step.build() for step in self.steps]
        self.check_order()
        return methods

    def check_order(self) -> None:
        """No structure step after a format step; values steps stand anywhere.

        Raises:
            RecipeError: Names both steps and their lines.
        """
        before: Step | None = None
        for number, step in enumerate(self.steps, 1):
            kind = step.method_type().kind
            if kind == "structure" and before is not None:
                there = f" ({before.method} is at line {before.line})" if before.line else f", step {number}"
                raise RecipeError(
                    f"{step.method} is a structure step after {before.method}, a format step",
                    where=place_of(step.source, step.line) + there,
                    fix=f"move {step.method} before {before.method}",
                )
            if kind == "format" and before is None:
                before = step


def _recipe(data: Any, lines: Mapping[ValuePath, int], source: str) -> Recipe:
    """A recipe from plain data, checked."""
    example = "write 'version: 1', then 'steps:' and below it one '- method: {parameters}' a line"
    top = place_of(source, lines.get(()))
    if not isinstance(data, Mapping):
        raise RecipeError(f"a recipe is a mapping, not {_kind(data)}", where=top, fix=example)
    for key in data:
        if key not in ("version", "steps"):
            raise RecipeError(
                f"a recipe has no key '{key}'",
                where=place_of(source, lines.get((key,))),
                fix=nearest(str(key), ("version", "steps")),
            )
    if "version" not in data:
        raise RecipeError("the recipe has no version", where=top, fix="begin it with 'version: 1'")
    version = data["version"]
    if version is True or version != VERSION or not isinstance(version, int):
        raise RecipeError(
            f"recipe version {show(version)} is not known",
            where=place_of(source, lines.get(("version",))),
            fix=f"write 'version: {VERSION}', or install the featherweight that wrote it",
        )
    if "steps" not in data:
        raise RecipeError("the recipe has no steps", where=top, fix=example)
    if not isinstance(data["steps"], list | tuple):
        raise RecipeError(
            f"steps is a list, not {_kind(data['steps'])}",
            where=place_of(source, lines.get(("steps",))),
            fix="begin each step with '- '",
        )
    steps = tuple(_step(item, index, lines, source) for index, item in enumerate(data["steps"]))
    recipe = Recipe(tuple(step.checked() for step in steps), version=VERSION, source=source)
    recipe.check_order()
    return recipe


def _step(item: Any, index: int, lines: Mapping[ValuePath, int], source: str) -> Step:
    line = lines.get(("steps", index))
    place = f"{place_of(source, line)}, step {index + 1}"
    if isinstance(item, str):
        raise RecipeError(
            f"a step is a mapping, not the text '{item}'", where=place, fix=f"write '- {item}: {{}}'"
        )
    if not isinstance(item, Mapping) or len(item) != 1:
        found = f"{len(item)} keys" if isinstance(item, Mapping) else _kind(item)
        raise RecipeError(
            f"a step is a mapping with one key, its method, not {found}",
            where=place,
            fix="write '- method: {parameter: value}', parameters indented below the method",
        )
    ((method, parameters),) = item.items()
    parameters = {} if parameters is None else parameters
    if method in HOLE_KEYS:
        raise RecipeError(
            "a hole stands where a method's name is needed",
            where=place,
            fix="put it at a parameter, and write one recipe for each method",
        )
    if not isinstance(method, str):
        raise RecipeError(f"{show(method)} is no method's name", where=place, fix="write a method's name")
    if not isinstance(parameters, Mapping):
        raise RecipeError(
            f"the parameters of {method} are a mapping, not {_kind(parameters)}",
            where=place,
            fix=f"write '- {method}: {{parameter: value}}'",
        )
    root: ValuePath = ("steps", index, method)
    below = {path[len(root) :]: number for path, number in lines.items() if path[: len(root)] == root}
    return Step(method, parameters, below.get((), line), below, source)


def _types(annotation: Any) -> set[Any]:
    """A type and the types it is made of."""
    return {annotation}.union(*(_types(argument) for argument in get_args(annotation)))


def _is_simple(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"the value {show(value)}"


def _reason(details: ErrorDetails) -> str:
    """Pydantic's message as the end of a sentence about a value."""
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] in ("value_error", "assertion_error"):
        return f"is not valid: {message}"
    if message.startswith("Input should be "):
        expected = message.removeprefix("Input should be ").partition(", unable to parse")[0]
        expected = expected.replace("valid tuple", "list").replace("valid dictionary", "mapping")
        return f"should be {expected}, not {show(details['input'])}"
    return f"is not valid: {message[:1].lower()}{message[1:]}, not {show(details['input'])}"
