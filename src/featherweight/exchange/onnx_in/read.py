"""ONNX file -> nodes in order, constants, inputs and outputs. Nothing that the file says is trusted.

Sizes are compared with the bytes that are there, external data stays inside the model's folder, and
cycles, values that nothing makes and functions that call themselves are refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import NodeProto, TensorProto, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from featherweight.errors import LoadError
from featherweight.exchange.onnx_in import host
from featherweight.exchange.opaque import all_nodes, subgraphs

OLDEST_OPSET = 7  # broadcasting as in NumPy begins here
_NO_SYMBOL = ("", "?", "-1")  # what exporters write for a size that has no name
_FIX = "check it with onnx.checker.check_model, or export it again"


@dataclass(frozen=True)
class InputInfo:
    """One input as the file declares it; a dimension is a size, a symbol, or None."""

    name: str
    dtype: np.dtype
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Source:
    """What was read.

    Attributes:
        name: The file, for messages.
        proto: The model with local functions inlined; external data is still outside.
        nodes: Those that the outputs need, each after what it reads.
        constants: Initializers by name.
        opsets: Domain -> version.
        folder: Where external data lie; None: there may be none.
        digest: SHA-256 of the file and its external data.
    """

    name: str
    proto: onnx.ModelProto
    nodes: tuple[NodeProto, ...]
    constants: Mapping[str, np.ndarray]
    inputs: tuple[InputInfo, ...]
    outputs: tuple[str, ...]
    opsets: Mapping[str, int]
    folder: Path | None
    digest: str


def read_model(content: bytes, name: str, folder: Path | None = None) -> Source:
    """Parse a serialized model.

    Args:
        content: The bytes of the .onnx file.
        name: What messages call it.
        folder: Where its external data may lie.

    Raises:
        LoadError: Truncated, malformed, hostile, or of a kind that is not read.
    """
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise LoadError(f"'{name}' is no ONNX model, or it is cut off: {error}", fix=_FIX) from error
    if not proto.HasField("graph") or not proto.graph.output:
        raise LoadError(f"'{name}' is no ONNX model: it holds no graph", fix=_FIX)
    proto = _inline(proto, name)
    opsets = _opsets(proto, name)
    digest = hashlib.sha256(content)
    _check_graph(proto.graph, name)
    constants = {tensor.name: _array(tensor, name, folder, digest) for tensor in proto.graph.initializer}
    inputs = tuple(_input(value, name) for value in proto.graph.input if value.name not in constants)
    outputs = tuple(value.name for value in proto.graph.output)
    known = {item.name for item in inputs} | set(constants)
    nodes = ordered(proto.graph.node, known, outputs, name)
    return Source(name, proto, nodes, constants, inputs, outputs, opsets, folder, digest.hexdigest())


def array_of(tensor: TensorProto, name: str) -> np.ndarray:
    """A tensor that is inside the file (an attribute's), with its sizes checked."""
    return _array(tensor, name, None, None)


def reads(node: NodeProto) -> list[str]:
    """Values that a node reads, those that its subgraphs take from outside among them."""
    names = [value for value in node.input if value]
    for graph in subgraphs(node):
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        own |= {output for inner in graph.node for output in inner.output}
        inside = [value for inner in graph.node for value in reads(inner)]
        names += [value for value in (*inside, *(output.name for output in graph.output)) if value not in own]
    return list(dict.fromkeys(name for name in names if name))


def _check_graph(graph: onnx.GraphProto, name: str) -> None:
    """Refuse what nobody looks at again: tensors of subgraphs and attributes."""
    graphs = [graph, *(inner for node in all_nodes(graph.node) for inner in subgraphs(node))]
    if any(item.sparse_initializer for item in graphs):
        raise LoadError(
            f"'{name}' has sparse initializers, which are not read", fix="store them as dense tensors"
        )
    for item in graphs:
        _check_texts(item, name)
    tensors = [tensor for item in graphs[1:] for tensor in item.initializer]
    for node in all_nodes(graph.node):
        for attribute in node.attribute:
            tensors += [attribute.t] if attribute.type == onnx.AttributeProto.TENSOR else attribute.tensors
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL:
            raise LoadError(
                f"tensor '{tensor.name}' inside a node of '{name}' lies in a file",
                fix="store it inside the model",
            )


def _check_texts(graph: onnx.GraphProto, name: str) -> None:
    """Names must be texts: protobuf hands over bytes where they are no UTF-8."""
    texts = [value.name for value in (*graph.input, *graph.output, *graph.initializer)]
    for node in graph.node:
        texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
        texts += [attribute.name for attribute in node.attribute]
    if not all(isinstance(text, str) for text in texts):
        raise LoadError(f"'{name}' has names that are no text", fix=_FIX)


def _inline(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Replace calls of the model's own functions by their bodies."""
    if not proto.functions:
        return proto
    calls = {
        (item.domain, item.name): {(node.domain, node.op_type) for node in item.node}
        for item in proto.functions
    }
    while calls:  # take away functions that call no other, until none is left
        leaves = [key for key, callees in calls.items() if not callees & set(calls)]
        if not leaves:
            raise LoadError(f"'{name}' has a function that calls itself", fix=_FIX)
        for key in leaves:
            del calls[key]
    try:
        return onnx.inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError, DecodeError) as error:
        raise LoadError(f"'{name}' has functions that cannot be inlined: {error}", fix=_FIX) from error


def _opsets(proto: onnx.ModelProto, name: str) -> dict[str, int]:
    opsets = {"" if item.domain == "ai.onnx" else item.domain: item.version for item in proto.opset_import}
    version = opsets.setdefault("", 1)
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= version <= newest:
        raise LoadError(
            f"'{name}' is of opset {version}; {OLDEST_OPSET} to {newest} are read",
            fix="onnx.version_converter.convert_version(model, 18)",
        )
    return opsets


def _input(value: onnx.ValueInfoProto, name: str) -> InputInfo:
    if not value.type.HasField("tensor_type"):
        raise LoadError(f"input '{value.name}' of '{name}' is no tensor", fix="export with tensors as inputs")
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        raise LoadError(f"input '{value.name}' of '{name}' has no shape, not even a rank", fix=_FIX)
    dims: list[int | str | None] = []
    for dim in kind.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value > 0:
            dims.append(dim.dim_value)
        else:
            dims.append(None if dim.dim_param in _NO_SYMBOL else dim.dim_param)
    return InputInfo(value.name, _dtype(kind.elem_type, f"input '{value.name}' of '{name}'"), tuple(dims))


def _dtype(elem_type: int, what: str) -> np.dtype:
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    except KeyError:
        dtype = np.dtype(object)
    if not host.is_number(dtype):
        kinds = {number: text for text, number in TensorProto.DataType.items()}
        raise LoadError(
            f"{what} is of type {kinds.get(elem_type, elem_type)}, which is not read",
            fix="export it as float32 or int64",
        )
    return dtype


def _array(tensor: TensorProto, name: str, folder: Path | None, digest: hashlib._Hash | None) -> np.ndarray:
    what = f"tensor '{tensor.name}' of '{name}'"
    dims = tuple(tensor.dims)
    dtype = _dtype(tensor.data_type, what)
    if any(size < 0 for size in dims):
        raise LoadError(f"{what} has the shape {dims}", fix=_FIX)
    if tensor.data_location == TensorProto.EXTERNAL:
        return _external(tensor, what, dtype, folder, digest)
    if tensor.HasField("raw_data") and len(tensor.raw_data) != host.bytes_of(dtype, math.prod(dims)):
        raise LoadError(
            f"{what} says {dims} of {dtype}, but {len(tensor.raw_data)} bytes are there", fix=_FIX
        )
    try:
        return np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(dims)
    except (ValueError, TypeError) as error:
        raise LoadError(f"{what} is malformed: {error}", fix=_FIX) from error


def _external(
    tensor: TensorProto, what: str, dtype: np.dtype, folder: Path | None, digest: hashlib._Hash | None
) -> np.ndarray:
    """A tensor in a file beside the model, mapped and not copied."""
    try:
        info = ExternalDataInfo(tensor)
        location, offset = Path(str(info.location).replace("\\", "/")), int(info.offset or 0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"{what} names its external data wrongly: {error}", fix=_FIX) from error
    if folder is None:
        raise LoadError(f"{what} lies in a file, which is not allowed here", fix="store it inside the model")
    path = (folder / location).resolve()
    if location.is_absolute() or not path.is_relative_to(folder.resolve()):
        raise LoadError(
            f"{what} points outside the model's folder: '{info.location}'",
            fix="external data must lie beside the model; do not open files from people you do not trust",
        )
    if not path.is_file():
        raise LoadError(
            f"{what} should lie in '{path.name}', which is not there", fix="copy it beside the model"
        )
    dims = tuple(tensor.dims)
    needed = math.prod(dims) * dtype.itemsize
    if offset < 0 or offset + needed > path.stat().st_size:
        raise LoadError(
            f"{what} needs {needed} bytes at {offset} of '{path.name}', which has {path.stat().st_size}",
            fix=_FIX,
        )
    if needed == 0:
        return np.zeros(dims, dtype)
    array = np.memmap(path, dtype, "r", offset, dims)
    if digest is not None:
        digest.update(array.reshape(-1).view(np.uint8).data)
    return array


def ordered(
    nodes: Sequence[NodeProto], known: Collection[str], outputs: Sequence[str], name: str
) -> tuple[NodeProto, ...]:
    """Nodes that the outputs need, each after what it reads (depth first, without recursion)."""
    maker: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for output in node.output:
            if output and (output in maker or output in known):
                raise LoadError(
                    f"'{name}' makes the value '{output}' twice", where=f"node '{node.name}'", fix=_FIX
                )
            maker[output] = index
    maker.pop("", None)
    order: list[int] = []
    done: set[int] = set()
    open_: set[int] = set()
    for output in outputs:
        if output not in known and output not in maker:
            raise LoadError(f"nothing in '{name}' makes its output '{output}'", fix=_FIX)
    stack = [(maker[output], False) for output in reversed(outputs) if output in maker]
    while stack:
        index, left = stack.pop()
        if left:
            open_.discard(index)
            done.add(index)
            order.append(index)
            continue
        if index in done:
            continue
        open_.add(index)
        stack.append((index, True))
        for value in reversed(reads(nodes[index])):
            if value in maker:
                if maker[value] in open_:
                    raise LoadError(f"'{name}' has a cycle through the value '{value}'", fix=_FIX)
                if maker[value] not in done:
                    stack.append((maker[value], False))
            elif value not in known:
                raise LoadError(
                    f"'{name}' reads the value '{value}', which nothing makes",
                    where=f"node '{nodes[index].name}'",
                    fix=_FIX,
                )
    return tuple(nodes[index] for index in order)
