"""Networks side by side made one with a shared trunk, as edits, with a proof that each head reads the trunk.

The code becomes data (``unrolled.py``) in which the value where a network parts is one of the trunk's, or
what a 1x1 adapter makes of it. Layers and tensors that nobody calls or reads then go. An adapter stands
where the last layer was that went, and begins as the least-squares map between the values on examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import RecipeError
from featherweight.graph import trace
from featherweight.model import Edit, Layer, Model, Remove, Replace, SetAttr, Unroll, make_edit
from featherweight.side_by_side import WHOLE
from featherweight.tools.cut_literals import MisfitError
from featherweight.tools.cut_program import unrolling
from featherweight.tools.merging import Beside, Parting
from featherweight.tools.merging_similarity import observed
from featherweight.tools.programs import called, named, rewired
from featherweight.tools.simulate import Replay

_CLOSE = 1e-4  # of the largest output
_RIDGE = 1e-3  # of the mean square of the features
_MAP_AXES = 4
_CHANNELS = 1


def merged(
    model: Model, beside: Beside, picked: Sequence[Parting], batches: Sequence[tuple[Tensor, ...]]
) -> Model:
    """The model in which each network goes on from where it parts from the trunk, with the weights it had.

    Args:
        model: The networks side by side.
        beside: The same, traced.
        picked: One for each network but the trunk's.
        batches: Flat inputs, for adapters.

    Raises:
        RecipeError: Its code cannot follow.
    """
    try:
        unroll = unrolling(
            model, {name: trace(model, name) for name in model.entries}, {name: {} for name in model.entries}
        )
    except MisfitError as error:
        raise RecipeError(
            f"the networks cannot be merged: {error}", fix="write their forward with tensor operators alone"
        ) from error
    values = beside.graph.values
    program = unroll.programs[WHOLE]
    fx = {name: values[name].fx_name for one in picked for name in (one.source.value, one.point.value)}
    swaps, adapted = _through_adapters(model, picked, program, fx)
    whole = rewired(program, swaps, calls=list(adapted.values()))
    programs = {WHOLE: whole} | _of_entries(model, beside, whole, unroll.programs)
    read = {name for one in programs.values() for name in named(one, "tensor")}
    constants = {name: what for name, what in unroll.constants.items() if name in read}
    edit = Unroll(programs, constants)
    adapters = {place: _adapter(one) for one, place in _places(adapted, picked)}
    edits: tuple[Edit, ...] = (edit, *_unused(model, programs, set(adapters)))
    edits += tuple(Replace(place, layer) for place, layer in adapters.items())
    module = _made(model, edits, beside)
    features = observed(model, fx, batches) if adapters else {}
    for one, place in _places(adapted, picked):
        _fill(module.get_submodule(place), one, features)
    made = model.evolve(module=module, edits=edits)
    _prove(model, made, beside, picked, {one.point.value: place for one, place in _places(adapted, picked)})
    return made


def _through_adapters(
    model: Model, picked: Sequence[Parting], program: Mapping[str, Any], fx: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """What stands for the values where networks part, and the calls of adapters by task."""
    swaps: dict[str, str] = {}
    calls: dict[str, dict[str, Any]] = {}
    for one in picked:
        source, result = fx[one.source.value], fx[one.point.value]
        if one.adapts is None:
            swaps[result] = source
            continue
        kept = rewired(program, {result: source})
        idle = [edit.path for edit in _unused(model, {WHOLE: kept}, set()) if isinstance(edit, Remove)]
        own = [path for path in idle if path.startswith(f"tasks.{one.point.task}.")]
        if not own:
            raise RecipeError(
                f"no layer of '{one.point.task}' goes at '{one.point.name}', where an adapter could stand",
                fix="at: another place",
            )
        made = f"adapter_{one.point.task}"
        swaps[result] = made
        calls[one.point.task] = {"name": made, "call": own[-1], "args": [{"value": source}]}
    return swaps, calls


def _places(adapted: Mapping[str, Mapping[str, Any]], picked: Sequence[Parting]) -> list[tuple[Parting, str]]:
    return [(one, adapted[one.point.task]["call"]) for one in picked if one.point.task in adapted]


def _of_entries(
    model: Model, beside: Beside, whole: Mapping[str, Any], before: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The programs of the entries that call one network: the whole's, as far as its outputs need it."""
    returned = dict(zip(beside.graph.outputs, whole["outputs"], strict=True))
    found = {}
    for name, entry in model.entries.items():
        if name == WHOLE:
            continue
        outputs = [returned[value] for value in beside.outputs(name)]
        own = rewired(whole, {}, outputs=outputs)
        found[entry.method] = {**own, "tree": before[entry.method]["tree"]}
    return found


def _unused(
    model: Model, programs: Mapping[str, Mapping[str, Any]], kept: set[str]
) -> Iterator[Remove | SetAttr]:
    """Edits that take away what no program calls or reads: whole sub-modules, else single tensors."""
    calls = {path for program in programs.values() for path in called(program)} | kept
    scopes = {chunk["layer"] for program in programs.values() for chunk in program["runs"]}
    tensors = {name for program in programs.values() for name in named(program, "tensor")}

    def visit(path: str, layer: nn.Module) -> Iterator[Remove | SetAttr]:
        inside = f"{path}."
        used = any(one == path or one.startswith(inside) for one in calls | scopes)
        if not used and not any(name.startswith(inside) for name in tensors):
            yield Remove(path)
            return
        if path in calls:
            return
        for name in (*layer._parameters, *layer._buffers):
            if f"{inside}{name}" not in tensors:
                yield SetAttr(path, name, None)
        for name, child in layer.named_children():
            yield from visit(f"{inside}{name}", child)

    for name, network in model.module.get_submodule("tasks").named_children():
        yield from visit(f"tasks.{name}", network)


def _made(model: Model, edits: tuple[Edit, ...], beside: Beside) -> nn.Module:
    module = model.copy_module()
    for edit in edits:
        module = make_edit(module, edit)
        if isinstance(edit, Unroll):
            for entry in model.entries:
                constants = trace(model, entry).program.constants
                for name in edit.constants:
                    if name in constants:
                        module.get_buffer(name).copy_(constants[name].detach())
    return module


# ---- adapters


def _adapter(parting: Parting) -> Layer:
    axis = parting.adapts
    assert axis is not None
    before, after = parting.source.shape[axis], parting.point.shape[axis]
    if len(parting.point.shape) == _MAP_AXES:
        return Layer("Conv2d", {"in_channels": before, "out_channels": after, "kernel_size": 1})
    return Layer("Linear", {"in_features": before, "out_features": after})


@torch.no_grad()
def _fill(layer: nn.Module, parting: Parting, features: Mapping[str, Tensor]) -> None:
    """The least-squares map of the trunk's features to the network's own."""
    axis = parting.adapts
    assert axis is not None
    x, y = (
        features[point.value].movedim(axis, -1).flatten(0, -2).double()
        for point in (parting.source, parting.point)
    )
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    gram = x.T @ x
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype)
    found = torch.linalg.solve(gram + ridge, x.T @ y).T.float()
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    weight.copy_(found[:, :-1].reshape(weight.shape))
    bias.copy_(found[:, -1])


# ---- proof


def _prove(
    model: Model, made: Model, beside: Beside, picked: Sequence[Parting], adapters: Mapping[str, str]
) -> None:
    """See that the merged network gives what the traced calls give with the trunk's values put in.

    Raises:
        RecipeError: It gives something else.
    """
    inputs = model.entries[WHOLE].example_inputs
    seen: dict[str, Tensor] = {}
    sources = {one.point.value: one.source.value for one in picked}

    def first(name: str, value: Tensor) -> Tensor:
        if name in sources.values():
            seen[name] = value
        return value

    def second(name: str, value: Tensor) -> Tensor:
        if name not in sources:
            return value
        own = seen[sources[name]]
        return made.module.get_submodule(adapters[name])(own) if name in adapters else own

    entry = made.entries[WHOLE]
    modes = [(layer, layer.training) for layer in made.module.modules()]
    made.module.eval()
    try:
        with torch.no_grad():
            replay = Replay(model, WHOLE)
            replay(inputs, first)
            wanted = replay(inputs, second)
            found = getattr(made.module, entry.method)(*entry.arguments(inputs))
    finally:
        for layer, training in modes:
            layer.training = training
    for one, other in zip(found, wanted, strict=True):
        scale = max(float(other.abs().max()), 1e-6)
        if one.shape != other.shape or not torch.allclose(one, other, rtol=_CLOSE, atol=_CLOSE * scale):
            raise RecipeError(
                "the merged network computes something else than was traced", fix="at: another place"
            )
