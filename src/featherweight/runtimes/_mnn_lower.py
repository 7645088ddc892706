"""One entry of a model -> a ``.mnn`` file: exported, converted in a child, its formats put in.

Part of ``mnn.py``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import TargetError
from featherweight.runtimes import _child
from featherweight.runtimes._mnn_file import MOVES, File
from featherweight.runtimes._mnn_names import contents, holders
from featherweight.runtimes._mnn_shape import shape
from featherweight.runtimes._mnn_store import Weight, settle, store

if TYPE_CHECKING:
    import onnx_ir as ir

    from featherweight.exchange.export import OnnxExport
    from featherweight.formats import IntQuant, TensorFormat
    from featherweight.graph import Graph
    from featherweight.model import Entry, Model
    from featherweight.runtime import Role

Realise = Callable[["TensorFormat", "Role"], "TensorFormat"]


@dataclass(frozen=True)
class Lowered:
    """A file's bytes, and for the artifact's details what is whose in it."""

    file: bytes
    details: Mapping[str, Any]


def lower_entry(model: Model, entry: str, scratch: Path, realise: Realise) -> Lowered:
    """Export, convert, store formats.

    Args:
        model: What is lowered.
        entry: Which way of calling it.
        scratch: An empty folder.
        realise: The grid that will be stored for a format.
    """
    from featherweight.exchange.export import to_onnx, write
    from featherweight.graph import trace

    graph = trace(model, entry)
    formats = {name: chain[-1] for name, chain in model.formats.items()}
    read = {name for node in graph for name in node.parameters.values()}
    export = to_onnx(model, entry, keep={name for name in formats if name in graph.values})
    shape(export.model.graph)
    named = dict(holders(export.model.graph, _first_names(model)))
    source = scratch / "model.onnx"
    write(export.model, source)
    file, aside = _converted(source, bool(formats))
    net = File(file)
    parameters = {op.name: named[op.name] for op in net.ops if op.name in named}
    held = contents(export.model.graph, net)
    if formats:
        weights = {
            op: Weight(
                parts["weight"],
                model.parameters[parts["weight"]].detach().float().numpy(),
                realise(formats[parts["weight"]], "weight"),
            )
            for op, parts in parameters.items()
            if parts["weight"] in formats
        }
        _all_found(weights, formats, read)
        file = store(file, aside, weights, _grids(export, net, formats, held, realise))
    file = settle(file)
    how = model.entries[entry]
    outputs = [
        [str(value.name), str(graph.values[name].dtype).removeprefix("torch.")]
        for value, name in zip(export.model.graph.outputs, graph.outputs, strict=True)
    ]
    return Lowered(
        file,
        {
            "parameters": parameters,
            "values": dict(_values(net, graph, held, how)),
            "shapes": {name: list(value.shape) for name, value in graph.values.items()},
            "signatures": {"inputs": list(how.input_names), "outputs": outputs},
        },
    )


def _all_found(weights: Mapping[str, Weight], formats: Mapping[str, Any], read: set[str]) -> None:
    lost = [
        name for name in formats if name in read and name not in {weight.name for weight in weights.values()}
    ]
    if lost:
        raise TargetError(
            f"mnn has no kernel that reads '{lost[0]}' in its format", fix="exclude its layer under where"
        )


def _grids(
    export: OnnxExport,
    net: File,
    formats: Mapping[str, TensorFormat],
    held: Mapping[int, str],
    realise: Realise,
) -> dict[int, IntQuant]:
    """Tensor of the file -> its format, or that of what it was moved from or is moved to."""
    named = {str(value.name): name for name, value in export.values.items()}
    here = set(held.values())
    lost = sorted(name for name in named if name not in here and _is_missed(export.values[named[name]], here))
    if lost:
        raise TargetError(
            f"mnn's converter merged '{named[lost[0]]}' into its neighbours",
            fix="put fold before quantize, or exclude the layer under where",
        )
    grids = {name: realise(formats[name], "activation") for name in named.values()}
    known = {number: grids[named[value]] for number, value in held.items() if value in named}
    moves = [(op.inputs[0], op.outputs[0]) for op in net.ops if op.type in MOVES and op.inputs]
    readers = Counter(number for op in net.ops for number in op.inputs)
    for before, after in moves:
        if before in known:
            known.setdefault(after, known[before])
    for before, after in reversed(moves):
        if after in known and readers[before] == 1:
            known.setdefault(before, known[after])
    return known  # type: ignore[return-value]


def _is_missed(value: ir.Value, here: set[str]) -> bool:
    """Whether a layer loses its integer kernel with a value that is no tensor of the file any more.

    What goes into one kernel with its neighbours is not rounded between them: a SiLU, a sum and its clamp.
    """
    readers = [use.node for use in value.uses()]
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip") and readers[0].outputs[0].name in here:
        return False
    producer = value.producer()
    if producer is not None and producer.op_type == "Add":
        producer = next(
            (one.producer() for one in producer.inputs if one is not None and one.producer()), None
        )
    return producer is None or producer.op_type in ("Conv", "Gemm", "MatMul")


def _values(net: File, graph: Graph, held: Mapping[int, str], how: Entry) -> Iterator[tuple[str, str]]:
    """Traced names -> the first tensor of the file that holds the value, made by more than a move."""
    outputs = dict(zip(graph.outputs, how.output_names, strict=True))
    makers = [op.outputs[0] for op in net.ops if len(op.outputs) == 1 and op.type not in MOVES]
    tensors = {held[number]: net.tensors[number] for number in reversed(makers) if number in held}
    for name, value in graph.values.items():
        tensor = tensors.get(outputs.get(name, value.fx_name))
        if tensor is not None:
            yield name, tensor


def _first_names(model: Model) -> dict[str, str]:
    """Every name of a parameter -> its first one: tied ones have several, other entries put 'module.' on."""
    known: dict[int, str] = {}
    every = model.module.named_parameters(remove_duplicate=False)
    first = {name: known.setdefault(id(parameter), name) for name, parameter in every}
    return {**{f"module.{name}": one for name, one in first.items()}, **first}


def _converted(source: Path, aside: bool) -> tuple[bytes, bytes]:
    """The converter's file, and the weights that it left beside it."""
    made = source.with_suffix(".mnn")
    arguments = {"source": os.fspath(source), "out": os.fspath(made), "aside": aside}
    _child.convert("mnn", f"{__name__}:convert", arguments)
    weights = made.with_name(f"{made.name}.weight")
    return made.read_bytes(), weights.read_bytes() if weights.exists() else b""


def convert(source: str, out: str, aside: bool) -> None:
    """ONNX to ``.mnn``, floats; runs in the converter's child.

    Raises:
        TargetError: The converter made nothing.
    """
    import _tools  # never the command 'mnnconvert': that one installs a package and calls home

    command = ["mnnconvert", "-f", "ONNX", "--modelFile", source, "--MNNModel", out]
    command += ["--bizCode", "featherweight", "--useOriginRNNImpl", "--groupConvNative"]
    command += ["--useGeluApproximation", "0"]
    _tools.mnnconvert([*command, "--saveExternalData"] if aside else command)
    if not Path(out).is_file():
        raise TargetError(
            "mnn's converter made no file: it has no form of an operator of the model",
            fix="take another runtime, or write the model with other operators",
        )
