"""Programs of ``unrolled.py`` changed as data: values that become others, and what is then needed no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Program = Mapping[str, Any]
Step = dict[str, Any]


def rewired(
    program: Program,
    swaps: Mapping[str, str],
    *,
    calls: Sequence[Step] = (),
    outputs: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """A program in which values are other ones, without the steps that nobody needs then.

    Args:
        program: Untouched.
        swaps: Name of a value -> the one that stands for it from then on.
        calls: Steps that make values to swap in; each runs as soon as what it reads is there.
        outputs: What is returned; by default what was.

    Returns:
        Steps in an order in which every value is made before it is read, else as they were.
    """

    def swapped(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {"value": swaps[item["value"]]} if item.get("value") in swaps else item
        return [swapped(one) for one in item] if isinstance(item, (list, tuple)) else item

    steps: dict[str, tuple[str, int, Step]] = {}  # name -> layer, place of its run, step
    for place, chunk in enumerate(program["runs"]):
        for step in chunk["steps"]:
            changed = {**step, "args": swapped(step["args"])}
            if "kwargs" in step:
                changed["kwargs"] = {key: swapped(item) for key, item in step["kwargs"].items()}
            steps[step["name"]] = chunk["layer"], place, changed
    steps |= {step["name"]: ("", -1 - place, dict(step)) for place, step in enumerate(calls)}
    returned = swapped(program["outputs"] if outputs is None else list(outputs))
    order = _ordered(steps, returned)
    _mark_last(order, steps, returned)
    runs: list[dict[str, Any]] = []
    at: tuple[str, int] | None = None
    for name in order:
        layer, place, step = steps[name]
        if (layer, place) != at:
            runs.append({"layer": layer, "steps": []})
        runs[-1]["steps"].append(step)
        at = layer, place
    return {**program, "outputs": returned, "runs": runs}


def _ordered(steps: Mapping[str, tuple[str, int, Step]], returned: Any) -> list[str]:
    """Names of the steps that are needed, each behind those whose values it reads, else as they come."""
    needed: set[str] = set()
    waiting = list(named(returned, "value"))
    while waiting:
        name = waiting.pop()
        if name in steps and name not in needed:
            needed.add(name)
            waiting += read_by(steps[name][2])
    done: dict[str, None] = {}
    for first in (name for name in steps if name in needed):
        stack = [first]
        while stack:
            name = stack[-1]
            missing = [one for one in read_by(steps[name][2]) if one in needed and one not in done]
            if name in done or not missing:
                done.setdefault(name)
                stack.pop()
            else:
                stack += missing[::-1]
    return list(done)


def _mark_last(order: Sequence[str], steps: Mapping[str, tuple[str, int, Step]], returned: Any) -> None:
    """After which step a value is no longer needed."""
    alive = set(named(returned, "value"))
    for name in reversed(order):
        step = steps[name][2]
        read = set(read_by(step))
        step["last"] = sorted((read | {name}) - alive)
        alive |= read


def read_by(step: Step) -> list[str]:
    """Names of the values that a step reads, once each."""
    return list(dict.fromkeys(named([step["args"], step.get("kwargs")], "value")))


def named(item: Any, kind: str) -> Iterator[str]:
    """Names of all values (``value``) or tensors (``tensor``) in JSON data of a program."""
    if isinstance(item, Mapping):
        if set(item) == {kind}:
            yield item[kind]
        else:
            for one in item.values():
                yield from named(one, kind)
    elif isinstance(item, (list, tuple)):
        for one in item:
            yield from named(one, kind)


def called(program: Program) -> Iterator[str]:
    """Paths of the layers that a program calls as they are."""
    for chunk in program["runs"]:
        yield from (step["call"] for step in chunk["steps"] if "call" in step)
