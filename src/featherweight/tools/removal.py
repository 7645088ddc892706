"""Residual blocks removed from a model, as edits, with a proof that nothing else changed.

In this order: the sub-module becomes ``nn.Identity``; it becomes a layer that passes one of its arguments on,
in the form in which its result came; the code becomes data (``unrolled.py``) in which the block's result is
its source. The first whose outputs on the example inputs equal those of the traced calls with the result
replaced by the source is taken. Layers that are then called by nobody are removed too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.errors import RecipeError
from featherweight.graph import trace
from featherweight.model import Edit, Layer, Model, Remove, Replace, Unroll, make_edit
from featherweight.tools.cut_literals import MisfitError
from featherweight.tools.cut_program import unrolling
from featherweight.tools.programs import called, named, rewired
from featherweight.tools.residuals import ResidualBlock
from featherweight.tools.simulate import Replay

_CLOSE = 1e-4  # of the largest output


def removed(model: Model, block: ResidualBlock) -> Model:
    """The model without a block.

    Raises:
        RecipeError: The module's code cannot follow.
    """
    wanted = _wanted(model, block)
    faults = []
    for edits in _ways(model, block):
        made, fault = _made(model, edits, block, wanted)
        if made is not None:
            return made
        faults.append(fault)
    raise RecipeError(
        f"the block '{block.name}' cannot be removed: {faults[-1] if faults else 'its code is no data'}",
        where=f"'{block.name}'",
        fix=f"exclude '{block.path or block.layers[0]}' under where",
    )


def _wanted(model: Model, block: ResidualBlock) -> tuple[Tensor, ...]:
    """Outputs of the traced calls on the example inputs, with the result replaced by the source."""
    kept: dict[str, Tensor] = {}

    def observe(name: str, value: Tensor) -> Tensor:
        if name == block.source:
            kept[name] = value
        return kept[block.source] if name == block.result else value

    with torch.no_grad():
        replay = Replay(model, block.entry)
        inputs = model.entries[block.entry].example_inputs
        if block.source.startswith("input:"):
            kept[block.source] = inputs[replay.graph.inputs.index(block.source)]
        return replay(inputs, observe)


def _ways(model: Model, block: ResidualBlock) -> Iterator[tuple[Edit, ...]]:
    if block.path:
        yield (Remove(block.path),)
        for passed in _passing(model, block):
            yield (Replace(block.path, passed),)
    graphs = {entry: trace(model, entry) for entry in model.entries}
    try:
        unroll = unrolling(model, graphs, {entry: {} for entry in graphs})
    except MisfitError:
        return
    values = graphs[block.entry].values
    method = model.entries[block.entry].method
    source, result = values[block.source].fx_name, values[block.result].fx_name
    program = rewired(unroll.programs[method], {result: source})
    programs = {**unroll.programs, method: program}
    read = {name for one in programs.values() for name in named(one, "tensor")}
    constants = {name: what for name, what in unroll.constants.items() if name in read}
    yield (Unroll(programs, constants),)


def _passing(model: Model, block: ResidualBlock) -> list[Layer]:
    """Layers that return an argument which may be the block's source, as the block returned its result."""
    seen: list[Layer] = []

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        made = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else None
        if not isinstance(made, Tensor) or seen:
            return
        given = [*enumerate(args), *kwargs.items()]
        alike = [key for key, x in given if isinstance(x, Tensor) and x.shape == made.shape]
        rest = 0 if isinstance(output, Tensor) else len(output)
        if not any(isinstance(x, Tensor) for x in pytree.tree_leaves(output)[1:]):
            seen.extend(Layer("Bypass", {"argument": key, "items": rest}) for key in alike)

    module = model.copy_module().eval()
    entry = model.entries[block.entry]
    module.get_submodule(block.path).register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        getattr(module, entry.method)(*entry.arguments(entry.example_inputs))
    return seen


def _made(
    model: Model, edits: tuple[Edit, ...], block: ResidualBlock, wanted: tuple[Tensor, ...]
) -> tuple[Model | None, str]:
    """The edited model if it computes what is wanted, else why not."""
    module = model.copy_module()
    entry = model.entries[block.entry]
    for edit in edits:
        module = make_edit(module, edit)
        if isinstance(edit, Unroll):
            _fill(module, model, edit)
            idle = tuple(Remove(path) for path in _idle(module, edit, block))
            edits = (*edits, *idle)
            for one in idle:
                make_edit(module, one)
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            found = getattr(module, entry.method)(*entry.arguments(entry.example_inputs))
    except Exception as error:  # noqa: BLE001 - the user's code raises whatever it likes
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    finally:
        for layer, training in modes:
            layer.training = training
    flat = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    if len(flat) != len(wanted) or not all(map(_close, flat, wanted)):
        return None, "the network without it computes something else than was traced"
    return model.evolve(module=module, edits=edits), ""


def _close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    scale = float(wanted.abs().max()) if wanted.numel() else 1.0
    return bool(torch.allclose(found, wanted, rtol=_CLOSE, atol=_CLOSE * max(scale, 1e-6)))


def _fill(module: nn.Module, model: Model, unroll: Unroll) -> None:
    for entry in model.entries:
        constants = trace(model, entry).program.constants
        for name in unroll.constants:
            if name in constants:
                module.get_buffer(name).copy_(constants[name].detach())


def _idle(module: nn.Module, unroll: Unroll, block: ResidualBlock) -> list[str]:
    """Layers of the block that no program calls or reads any more."""
    used = {name for program in unroll.programs.values() for name in called(program)}
    read = {name for program in unroll.programs.values() for name in named(program, "tensor")}
    found = []
    for path in block.layers:
        owns = any(True for _ in module.get_submodule(path).children())
        if path and not owns and path not in used and not any(n.startswith(f"{path}.") for n in read):
            found.append(path)
    return found
