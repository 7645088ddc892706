"""A smaller picture at the front: the network's input is averaged down, and all behind works on fewer pixels.

Who calls the network gives what it gave before; making it smaller is part of the artifact. A whole factor is
an average over k x k pixels, another one bilinear. The code becomes data (``unrolled.py``) with one call
more. It suits networks that pool over all positions before their head; where code or a matrix fixes the
number of pixels, it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from featherweight.errors import LoadError, RecipeError
from featherweight.graph import Graph, trace
from featherweight.model import Model, make_edit
from featherweight.tools.cut_literals import MisfitError
from featherweight.tools.cut_program import unrolling
from featherweight.tools.output_error import outputs

_PICTURE = 4  # axes: examples, channels, height, width
_FIX = "leave input out; it suits networks that pool over all positions before their head"


def with_smaller_input(model: Model, share: float) -> Model:
    """The model whose pictures keep this fraction of each side.

    Raises:
        RecipeError: It has no pictures as input, its code is no data, or it needs as many pixels as it had.
    """
    graphs = {entry: trace(model, entry) for entry in model.entries}
    try:
        unroll = unrolling(model, graphs, {entry: {} for entry in graphs})
    except MisfitError as error:
        raise RecipeError(f"the input cannot become smaller: {error.why}", fix=_FIX) from error
    programs = dict(unroll.programs)
    count = 0
    for entry, graph in graphs.items():
        for value, shape in _pictures(graph).items():
            method = model.entries[entry].method
            programs[method] = _with_first(programs[method], value, _call(value, shape, share))
            count += 1
    if not count:
        raise RecipeError("the network has no pictures (N, C, H, W) as input", fix=_FIX)
    edit = type(unroll)(programs, unroll.constants)
    module = make_edit(model.copy_module(), edit)
    for graph in graphs.values():
        for name, held in graph.program.constants.items():
            if name in unroll.constants and isinstance(held, Tensor):
                module.get_buffer(name).copy_(held.detach())
    made = model.evolve(module=module, edits=(edit,))
    _check(model, made)
    return made


def _pictures(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Name in the program -> shape of each input that is a picture."""
    values = (graph.values[name] for name in graph.inputs)
    return {v.fx_name: v.shape for v in values if len(v.shape) == _PICTURE and v.dtype.is_floating_point}


def _call(value: str, shape: tuple[int, ...], share: float) -> dict[str, Any]:
    sides = [max(1, round(side * share)) for side in shape[2:]]
    factor = round(1 / share)
    given = {"value": value}
    if all(side == small * factor for side, small in zip(shape[2:], sides, strict=True)):
        return {"target": "aten.avg_pool2d.default", "args": [given, [factor, factor]], "kwargs": {}}
    return {"target": "aten.upsample_bilinear2d.vec", "args": [given, sides, False, None], "kwargs": {}}


def _with_first(program: Mapping[str, Any], value: str, call: dict[str, Any]) -> dict[str, Any]:
    """A program whose first step makes what everybody reads instead of an input."""
    small = f"{value}_smaller"

    def swapped(item: Any) -> Any:
        if isinstance(item, Mapping):
            if item == {"value": value}:
                return {"value": small}
            return {key: swapped(one) for key, one in item.items()}
        if isinstance(item, (list, tuple)):
            return [swapped(one) for one in item]
        return item

    runs = [
        {
            **chunk,
            "steps": [{**swapped(s), "last": _renamed(s["last"], value, small)} for s in chunk["steps"]],
        }
        for chunk in program["runs"]
    ]
    first = {"layer": "", "steps": [{"name": small, **call, "last": [value]}]}
    return {**program, "outputs": swapped(program["outputs"]), "runs": [first, *runs]}


def _renamed(names: list[str], old: str, new: str) -> list[str]:
    return [new if name == old else name for name in names]


def _check(model: Model, made: Model) -> None:
    for entry in model.entries:
        inputs = model.entries[entry].example_inputs
        wanted = outputs(model, [inputs], entry)
        try:
            found = outputs(made, [inputs], entry)
            trace(made, entry)
        except (LoadError, RuntimeError, ValueError) as error:
            raise RecipeError(
                f"the network needs its input as large as it is: {str(error).strip().splitlines()[0]}",
                fix=_FIX,
            ) from error
        if [y.shape for y in wanted[0]] != [y.shape for y in found[0]]:
            raise RecipeError("an output of the network would change its shape", fix=_FIX)
