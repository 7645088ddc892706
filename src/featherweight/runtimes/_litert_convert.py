"""What runs in the converter's child: an exported program -> a float ``.tflite`` -> formats written into it.

Part of ``litert.py``. The converter folds and fuses what it likes, so a traced value that must be found
again passes through a marked identity, which it leaves alone (as a StableHLO custom call, in whatever
layout it chose); the marks are taken out at the end. A value without a mark is found by what it holds.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import TargetError
from featherweight.runtimes._litert_graph import FlatGraph
from featherweight.runtimes._litert_store import Parameter, store_formats
from featherweight.runtimes._litert_tidy import tidy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, fx

_MARK = "featherweight.mark "
_CALL = "STABLEHLO_CUSTOM_CALL"
_PROBE_BATCH = 3


def convert(program: str, plan: str, out: str) -> dict[str, Any]:
    """Convert one entry.

    Args:
        program: File of ``torch.export.save``, of one example.
        plan: File of JSON: what ``litert.py`` knows of names and formats.
        out: The ``.tflite`` to write.

    Returns:
        ``values``: traced value -> tensor; ``channels_last``: which of them are stored so;
        ``batches``: the file takes any batch size at once; ``types`` of its inputs.
    """
    import torch

    from featherweight.formats import decode

    asked = json.loads(Path(plan).read_text())
    exported = torch.export.load(program)
    module = _flat(exported.module(check_guards=False))
    examples = tuple(torch.utils._pytree.tree_leaves(exported.example_inputs[0]))
    graph, found = _lower(module, examples, asked["marks"])
    found = tidy(graph, found)
    _name_signature(graph, asked["inputs"], asked["outputs"])
    seen = _traced_values(module, examples, asked["values"])
    found, channels_last = _match(graph, examples, seen, found)
    names = _name_tensors(graph, found)
    formats = {name: decode(one) for name, one in asked["formats"].items()}
    parameters = {
        name: Parameter(exported.state_dict[key].detach().numpy(), formats.get(name))
        for key, name in asked["parameters"].items()
        if key in exported.state_dict
    }
    grids = {found[name]: fmt for name, fmt in formats.items() if name in found}
    lost = sorted(set(formats) - set(found) - set(parameters))
    if lost:
        raise TargetError(f"litert's converter lost '{lost[0]}'", fix="exclude its layer under where")
    twins = store_formats(graph, parameters, grids, dynamic=asked["dynamic"])
    batches = asked["batched"] != [] and _open_batch(graph)
    content = graph.finish()
    alive = {graph.name(tensor) for tensor in range(len(graph.graph.tensors))}
    Path(out).write_bytes(content)
    batches = batches and _takes_batches(content, examples, asked["batched"])
    return {
        "values": {value: name for value, name in names.items() if name in alive},
        "channels_last": sorted(channels_last),
        "batches": batches,
        "twins": twins,
        "types": [graph.dtype(tensor) for tensor in graph.inputs],
    }


# ---- lowering


def _flat(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same module on flat tensors, whatever its inputs and outputs are nested in."""
    import copy

    import torch

    graph = copy.deepcopy(module.graph)
    graph.set_codegen(torch.fx.graph.CodeGen())
    returned = next(node for node in graph.nodes if node.op == "output")
    returned.args = (tuple(torch.utils._pytree.tree_leaves(returned.args[0])),)
    return torch.fx.GraphModule(module, graph)


def _lower(
    module: torch.fx.GraphModule, examples: tuple[Tensor, ...], marks: Mapping[str, str]
) -> tuple[FlatGraph, dict[str, int]]:
    """The float graph without its marks, and the tensors that they stood at, by traced value."""
    os.environ["LITERT_TORCH_SHOW_PROGRESS"] = "n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import litert_torch

        _register_mark()
        marked = _marked(module, marks)
        logging.disable(logging.WARNING)
        try:
            content = litert_torch.convert(marked.eval(), examples).model_content()
        finally:
            logging.disable(logging.NOTSET)
    graph = FlatGraph(content)
    return graph, _unmark(graph)


_registered: list[bool] = []


def _register_mark() -> None:
    """Teach the converter our identity: it is lowered to a call that nothing folds, and has no layout."""
    import torch
    from litert_converter.mlir.dialects import stablehlo
    from litert_torch._convert.fx_passes.optimize_layout_transposes_pass import layout_rewrite
    from litert_torch.backend import lowerings

    from featherweight.exchange import export  # noqa: F401 - registers featherweight::mark

    if _registered:
        return
    mark = torch.ops.featherweight.mark.default

    def lowering(context: Any, x: Any, name: str) -> Any:
        return stablehlo.custom_call([x.type], inputs=[x], call_target_name=_MARK + name)

    def keep(node: fx.Node) -> None:
        """Nothing depends on the layout."""

    lowerings.lower(mark)(lowering)
    layout_rewrite.rewriters.register(mark)(keep)
    _registered.append(True)


def _marked(module: torch.fx.GraphModule, marks: Mapping[str, str]) -> torch.fx.GraphModule:
    """A copy of the module in which the nodes that are asked for are marked with their traced names."""
    import copy

    import torch

    copied = torch.fx.GraphModule(module, copy.deepcopy(module.graph))
    for own, place in _places(copied.graph).items():
        if place not in marks:
            continue
        with copied.graph.inserting_after(_last_input(copied.graph) if own.op == "placeholder" else own):
            mark = copied.graph.call_function(torch.ops.featherweight.mark.default, (own, marks[place]))
        mark.meta = dict(own.meta)
        own.replace_all_uses_with(mark)
        mark.args = (own, marks[place])
    copied.recompile()
    return copied


def _places(graph: fx.Graph) -> dict[fx.Node, str]:
    """Each input and call, as ``litert.py`` tells them."""
    found: dict[fx.Node, str] = {}
    for kind, word in (("placeholder", "input"), ("call_function", "call")):
        nodes = [node for node in graph.nodes if node.op == kind]
        found |= {node: f"{word} {index}" for index, node in enumerate(nodes)}
    return found


def _last_input(graph: fx.Graph) -> fx.Node:
    last: fx.Node = [node for node in graph.nodes if node.op == "placeholder"][-1]
    return last


def _unmark(graph: FlatGraph) -> dict[str, int]:
    found: dict[str, int] = {}
    for operator in list(graph.operators):
        if graph.kind(operator) != _CALL:
            continue
        name = operator.builtinOptions2.callTargetName.decode()
        if not name.startswith(_MARK):
            continue
        source, made = int(operator.inputs[0]), int(operator.outputs[0])
        graph.read_instead(made, source, graph.operators)
        graph.return_instead(made, source)
        graph.remove(operator)
        found = {key: source if tensor == made else tensor for key, tensor in found.items()}
        found[name.removeprefix(_MARK)] = source
    graph.prune()
    return found


def _name_signature(graph: FlatGraph, inputs: list[str], outputs: list[str]) -> None:
    """Inputs and outputs are called, and come in the order, as in the entry."""
    signature = graph.model.signatureDefs[0]
    signature.inputs = _in_order(signature.inputs, inputs, "args")
    signature.outputs = _in_order(signature.outputs, outputs, "output")
    graph.graph.inputs = [entry.tensorIndex for entry in signature.inputs]
    graph.graph.outputs = [entry.tensorIndex for entry in signature.outputs]


def _in_order(entries: list[Any], names: list[str], prefix: str) -> list[Any]:
    by_name = {entry.name.decode(): entry for entry in entries}
    order = [by_name[f"{prefix}_{index}"] for index in range(len(names))]
    for entry, name in zip(order, names, strict=True):
        entry.name = name.encode()
    return order


# ---- names by what tensors hold


def _traced_values(
    module: torch.fx.GraphModule, examples: tuple[Tensor, ...], names: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """What the program computes for its examples, by traced value."""
    import torch

    seen: dict[str, np.ndarray] = {}
    places = _places(module.graph)

    class Watched(torch.fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if places.get(n) in names and isinstance(result, torch.Tensor):
                seen[names[places[n]]] = result.detach().numpy()
            return result

    with torch.no_grad():
        Watched(module).run(*examples)
    return seen


def _match(
    graph: FlatGraph, examples: tuple[Tensor, ...], seen: Mapping[str, np.ndarray], found: Mapping[str, int]
) -> tuple[dict[str, int], set[str]]:
    """Traced value -> tensor, of those found already and of those that hold the same; and which lie
    with their channels last."""
    held = _all_tensors(graph, examples)
    places: dict[str, int] = {}
    last: set[str] = set()
    free = {index: values for index, values in held.items() if values.dtype == np.float32}
    for name, values in seen.items():
        candidates = [found[name]] if name in found else free
        for index in candidates:
            layout = _layout(values, held[index]) if index in held else None
            if layout is not None or name in found:
                places[name] = index
                last |= {name} if layout == "last" else set()
                break
    return places, last


def _name_tensors(graph: FlatGraph, found: Mapping[str, int]) -> dict[str, str]:
    """Call tensors as the first traced value that they hold; returns what each value's is called."""
    names: dict[int, str] = {}
    for name, tensor in found.items():
        names.setdefault(tensor, name)
    for tensor in range(len(graph.graph.tensors)):
        graph.rename(tensor, names.get(tensor, f"t{tensor}"))
    return {name: names[tensor] for name, tensor in found.items()}


def _layout(traced: np.ndarray, stored: np.ndarray) -> str | None:
    """Whether a tensor holds a value: as it is, with its channels ``last``, or not at all."""
    if traced.size != stored.size or traced.dtype != stored.dtype or traced.size == 0:
        return None
    flat = stored.reshape(traced.shape)
    tolerance = 1e-4 * float(np.abs(traced).max()) + 1e-9
    if np.abs(flat - traced).max() <= tolerance:
        return "same"
    if traced.ndim > 2:
        moved = np.moveaxis(traced, 1, -1)
        if np.abs(stored.reshape(moved.shape) - moved).max() <= tolerance:
            return "last"
    return None


def _all_tensors(graph: FlatGraph, examples: tuple[Tensor, ...]) -> dict[int, np.ndarray]:
    """Every activation of the float graph for the examples."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType
    from ai_edge_litert.tools import flatbuffer_utils

    content = bytes(flatbuffer_utils.convert_object_to_bytearray(graph.model))
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    runner = Interpreter(
        model_content=content, experimental_op_resolver_type=plain, experimental_preserve_all_tensors=True
    )
    runner.allocate_tensors()
    feed(runner, [example.numpy() for example in examples])
    runner.invoke()
    made = {*graph.producers(), *graph.inputs}
    return {index: runner.get_tensor(index) for index in sorted(made)}


def feed(runner: Any, arrays: list[np.ndarray]) -> None:
    """Set the inputs, in their own types."""
    for detail, array in zip(runner.get_input_details(), arrays, strict=True):
        runner.set_tensor(detail["index"], np.ascontiguousarray(array, detail["dtype"]))


# ---- batches


def _open_batch(graph: FlatGraph) -> bool:
    """Let reshapes that keep one example per row take any number of them."""
    for operator in graph.operators:
        if graph.kind(operator) != "RESHAPE":
            continue
        shape = (
            graph.constant(int(operator.inputs[1])) if graph.is_constant(int(operator.inputs[1])) else None
        )
        if shape is None or not shape.size or shape[0] < 1 or (shape < 0).any():
            return False
        opened = shape.copy()
        opened[0] = -1
        operator.inputs = [operator.inputs[0], graph.add_constant("shape", opened)]
        if operator.builtinOptions is not None:
            operator.builtinOptions.newShape = None
    return True


def _takes_batches(content: bytes, examples: tuple[Tensor, ...], batched: list[int]) -> bool:
    """Whether several examples at once give what they give one by one."""
    from ai_edge_litert.interpreter import Interpreter

    random = np.random.default_rng(0)
    arrays = [example.numpy() for example in examples]
    many = [
        random.permuted(np.repeat(x, _PROBE_BATCH, 0), axis=-1) if i in batched else x
        for i, x in enumerate(arrays)
    ]
    try:
        together = Interpreter(model_content=content)
        for detail, array in zip(together.get_input_details(), many, strict=True):
            together.resize_tensor_input(detail["index"], array.shape)
        together.allocate_tensors()
        seen = _outputs(together, many)
    except (RuntimeError, ValueError):
        return False
    alone = Interpreter(model_content=content)
    alone.allocate_tensors()
    for row in range(_PROBE_BATCH):
        one = [x[row : row + 1] if i in batched else x for i, x in enumerate(many)]
        for got, wanted in zip(seen, _outputs(alone, one), strict=True):
            if got.shape != (_PROBE_BATCH, *wanted.shape[1:]):
                return False
            if not np.allclose(got[row : row + 1], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max()):
                return False
    return True


def _outputs(runner: Any, arrays: list[np.ndarray]) -> list[np.ndarray]:
    feed(runner, arrays)
    runner.invoke()
    return [runner.get_tensor(detail["index"]) for detail in runner.get_output_details()]
