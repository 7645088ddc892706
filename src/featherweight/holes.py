"""What stands in a recipe where a value would stand: a choice or a range, found and filled by its address."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from featherweight.errors import nearest

ValuePath = tuple[str | int, ...]
_PLAIN = "write text, a finite number, true, false, or a list or mapping of them"
_LARGEST_INT = 2**63 - 1
HOLE_KEYS = {"choice": {"choice"}, "range": {"range", "log", "step", "default"}}


class MalformedError(ValueError):
    """A value that a recipe cannot hold; ``path`` leads to it. The recipe adds file and line."""

    def __init__(self, path: ValuePath, what: str, fix: str | None = None) -> None:
        super().__init__(what)
        self.path, self.what, self.fix = path, what, fix


@dataclass(frozen=True)
class Choice:
    """One of several values; the first one is tried first.

    Attributes:
        options: Plain values (numbers, text, lists, mappings), all different.
    """

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        options = tuple(read_value(option, ()) for option in self.options)
        if not options:
            raise ValueError("a choice needs at least one option")
        if any(find_holes(option) for option in options):
            raise ValueError("an option of a choice cannot be a hole itself")
        if len({canonical(option) for option in options}) < len(options):
            raise ValueError("a choice names the same option twice")
        object.__setattr__(self, "options", options)

    @property
    def first(self) -> Any:
        """The value to try first."""
        return self.options[0]

    @property
    def size(self) -> int:
        """How many values there are."""
        return len(self.options)

    def at(self, index: int) -> Any:
        """The option of that number."""
        return self.options[index]

    def admits(self, value: Any) -> bool:
        """Whether the value may fill this hole."""
        return canonical(value) in {canonical(option) for option in self.options}

    def ends(self) -> tuple[Any, ...]:
        """The values that show whether the method takes this hole at all."""
        return self.options

    def to_data(self) -> dict[str, Any]:
        return {"choice": list(self.options)}


@dataclass(frozen=True)
class Range:
    """A number between two, both included; whole numbers when every number given is one.

    Attributes:
        low: Smallest value.
        high: Largest value.
        log: Spread trials evenly over the logarithm.
        step: Distance of neighbours, counted from ``low``.
        default: The value to try first; without it the middle.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    default: float | None = None

    def __post_init__(self) -> None:
        for number in (self.low, self.high, self.step, self.default):
            if number is not None and not _is_number(number):
                raise ValueError(f"a range is made of numbers, not {show(number)}")
        if not isinstance(self.log, bool):
            raise ValueError(f"log of a range is true or false, not {show(self.log)}")
        if self.low > self.high:
            raise ValueError(f"the range [{self.low}, {self.high}] is reversed")
        if self.low == self.high:
            raise ValueError(f"the range [{self.low}, {self.high}] holds one value only")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a range with log: true begins above zero and has no step")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError(f"the step {self.step} does not fit into the range [{self.low}, {self.high}]")
        if self.default is not None and not self.low <= self.default <= self.high:
            raise ValueError(f"the default {self.default} is outside the range [{self.low}, {self.high}]")
        if self.default is not None and self.step is not None:
            steps = (self.default - self.low) / self.step
            if abs(steps - round(steps)) > 1e-6:
                raise ValueError(f"no step of {self.step} from {self.low} meets the default {self.default}")

    @property
    def whole(self) -> bool:
        """Whether its values are integers."""
        numbers = (self.low, self.high, self.step, self.default)
        return all(isinstance(number, int) for number in numbers if number is not None)

    @property
    def grain(self) -> float | None:
        """Distance of neighbours; None: there is always one between."""
        return self.step or (1 if self.whole else None)

    @property
    def first(self) -> float:
        """The value to try first."""
        if self.default is not None:
            return (
                self.default if self.step is None else self.at(round((self.default - self.low) / self.step))
            )
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return middle if self.grain is None else self.at(round((middle - self.low) / self.grain))

    @property
    def size(self) -> int | None:
        """How many values there are; None: too many to count."""
        return None if self.grain is None else math.floor((self.high - self.low) / self.grain + 1e-9) + 1

    def at(self, index: int) -> float:
        """The value after so many steps."""
        if self.grain is None:
            raise ValueError("a range without steps has no numbered values")
        value = self.low + index * self.grain
        # 0.1 + 2 * 0.1 is to be 0.3 in the recipe.
        return value if self.whole else min(max(float(f"{value:.12g}"), self.low), self.high)

    def admits(self, value: Any) -> bool:
        """Whether the value may fill this hole."""
        fits = _is_number(value) and (isinstance(value, int) or not self.whole)
        return fits and bool(self.low <= value <= self.high)

    def ends(self) -> tuple[Any, ...]:
        """The values that show whether the method takes this hole at all."""
        return (self.low, self.high)

    def to_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {"range": [self.low, self.high]}
        if self.log:
            data["log"] = True
        return data | {
            name: value
            for name, value in (("step", self.step), ("default", self.default))
            if value is not None
        }


Hole = Choice | Range


def read_value(value: Any, path: ValuePath) -> Any:
    """A copy made of JSON's types and holes; mappings that spell a hole become it."""
    if value is None or isinstance(value, bool | Choice | Range):
        return value
    if isinstance(value, str):
        if value.encode(errors="replace").decode() != value:
            raise MalformedError(
                path, f"{ascii(value)[:60]} holds half a character, which is no text", _PLAIN
            )
        return value
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        raise MalformedError(path, "a number has more than 64 bits", _PLAIN)
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise MalformedError(path, f"{value} is not a finite number", _PLAIN)
        return value
    if isinstance(value, list | tuple):
        return [read_value(item, (*path, index)) for index, item in enumerate(value)]
    if not isinstance(value, Mapping) or any(not isinstance(key, str) for key in value):
        raise MalformedError(path, f"{repr(value)[:60]} is no number, text, list or mapping of names", _PLAIN)
    if "choice" in value or "range" in value:
        return _hole(value, path)
    return {read_value(key, path): read_value(item, (*path, key)) for key, item in value.items()}


def _hole(data: Mapping[str, Any], path: ValuePath) -> Hole:
    kind = "choice" if "choice" in data else "range"
    fix = "write {choice: [a, b]}" if kind == "choice" else "write {range: [low, high]}"
    for key in data:
        if key not in HOLE_KEYS[kind]:
            raise MalformedError(path, f"a {kind} has no key '{key}'", nearest(key, HOLE_KEYS[kind]))
    given = data[kind]
    if not isinstance(given, list | tuple) or (kind == "range" and len(given) != 2):
        what = "a list of options" if kind == "choice" else "a list of two numbers, low and high"
        raise MalformedError(path, f"a {kind} is {what}, not {show(given)}", fix)
    try:
        if kind == "choice":
            return Choice(tuple(given))
        return Range(
            given[0], given[1], data.get("log", False), data.get("step"), default=data.get("default")
        )
    except ValueError as error:
        raise MalformedError(path, str(error), fix) from error


def find_holes(value: Any, path: ValuePath = ()) -> list[tuple[ValuePath, Hole]]:
    """Every hole inside a value, with the path that leads to it."""
    return list(_walk(value, path))


def _walk(value: Any, path: ValuePath) -> Iterator[tuple[ValuePath, Hole]]:
    if isinstance(value, Choice | Range):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index))


def write_value(value: Any) -> Any:
    """Plain data of a value with holes."""
    if isinstance(value, Choice | Range):
        return value.to_data()
    if isinstance(value, Mapping):
        return {key: write_value(item) for key, item in value.items()}
    return [write_value(item) for item in value] if isinstance(value, list) else value


def replaced(value: Any, path: ValuePath, new: Any) -> Any:
    """A copy with another value at a path."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, list):
        return [replaced(item, rest, new) if index == key else item for index, item in enumerate(value)]
    return {name: replaced(item, rest, new) if name == key else item for name, item in value.items()}


def address_of(path: ValuePath) -> str:
    """A path as text, escaped as in JSON pointers (RFC 6901), since layer names hold dots."""
    return "/".join(str(part).replace("~", "~0").replace("/", "~1") for part in path)


def parameter_of(address: str) -> str:
    """The parameter's name in an address."""
    return address.partition("/")[0].replace("~1", "/").replace("~0", "~")


def canonical(value: Any) -> str:
    """The same text for the same plain value; unlike ``==`` it tells 1 from true and 1.0."""
    return json.dumps(value, sort_keys=True)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _LARGEST_INT if isinstance(value, int) else math.isfinite(value)


def show(value: Any) -> str:
    """A value as the user wrote it, short."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(write_value(value), default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
