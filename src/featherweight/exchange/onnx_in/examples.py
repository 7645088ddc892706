"""Example inputs for an ONNX file: given ones made to fit, else seeded ones that ONNX Runtime takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from onnx import numpy_helper
from torch import Tensor

from featherweight.errors import LoadError
from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.check import Reference
from featherweight.exchange.onnx_in.read import InputInfo, Source

_LARGEST = 1 << 26  # elements of an example input
_PLANES: tuple[tuple[int, ...], ...] = ((224, 224), (64, 64), (48, 320), (32, 128), (48, 192), (320, 320))
_LENGTHS = (64, 512, 128, 256, 1024, 16, 4096, 16000)
_COMPARED = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_FORWARDED = ("Cast", "Reshape", "Gather", "Squeeze", "Unsqueeze", "Identity", "Slice", "Flatten")


def example_inputs(
    source: Source, reference: Reference, given: Sequence[Tensor] | None
) -> Iterator[list[Tensor]]:
    """One tensor per input, the likely ones first; the importer takes the first that it can build with.

    Args:
        source: What the file declares.
        reference: The file in ONNX Runtime, which is asked only about sizes that the file leaves open.
        given: Tensors with a leading batch of two, or None.

    Raises:
        LoadError: They do not fit, or no usual size for what the file leaves open runs.
    """
    if given is not None:
        fitted = _all_fitted(source, given)
        yield fitted
        single = [_first_only(value, item) for value, item in zip(fitted, source.inputs, strict=True)]
        if any(a.shape != b.shape for a, b in zip(fitted, single, strict=True)):
            yield single  # the file takes one example at a time
        return
    open_ = next((item for item in source.inputs if _open(item, batch=False)), None)
    highs = (100, 2) if any(item.dtype.kind in "iu" for item in source.inputs) else (2,)
    refusal: LoadError | None = None
    found = False
    for sizes in _sizes(source):
        for high in highs:
            made = [_made(item, source, sizes, high, seed) for seed, item in enumerate(source.inputs)]
            refusal = reference.refusal(made) if open_ is not None else None
            if refusal is None:
                found = True
                yield made
    if open_ is not None and not found:
        sizes_text = "x".join(["SIZE"] * len(open_.dims[1:]))
        raise LoadError(
            f"input '{open_.name}' of '{source.name}' leaves its axes {_open(open_, batch=False)} open, "
            "and no usual size runs",
            fix=f"give --data, or the shape without the batch: --input {sizes_text}",
        ) from refusal


def other_inputs(
    inputs: Sequence[Tensor], axes: Mapping[str, Mapping[int, str]], sizes: Mapping[str, int], keep: set[str]
) -> list[Tensor]:
    """Other inputs: open axes of other sizes, the same values in another order.

    Args:
        inputs: The examples.
        axes: Open axes and their symbols by input, in the order of the inputs.
        sizes: New sizes by symbol; the others keep theirs.
        keep: Inputs whose values decide something.
    """
    generator = torch.Generator().manual_seed(0)
    others = []
    for value, (name, symbols) in zip(inputs, axes.items(), strict=True):
        shape = [
            sizes.get(symbols[axis], size) if axis in symbols else size
            for axis, size in enumerate(value.shape)
        ]
        if name in keep:
            others.append(value)
            continue
        if not value.numel():  # such as a past without steps
            others.append(value.new_zeros(shape))
            continue
        picks = torch.randint(0, max(value.numel(), 1), (math.prod(shape),), generator=generator)
        others.append(value.reshape(-1)[picks].reshape(shape))
    return others


def _open(item: InputInfo, *, batch: bool = True) -> list[int]:
    return [axis for axis, size in enumerate(item.dims) if not isinstance(size, int) and (batch or axis)]


def _symbol(item: InputInfo, axis: int) -> str:
    """The file's symbol; an axis without one has a name of its own."""
    return str(item.dims[axis] or f"{item.name}_{axis}")


def _sizes(source: Source) -> Iterator[dict[str, int]]:
    """Sizes by symbol, the likely ones first; the first axis is two examples, or one."""
    batches = {_symbol(item, 0) for item in source.inputs if item.dims and not isinstance(item.dims[0], int)}
    open_ = list(
        dict.fromkeys(
            _symbol(item, axis)
            for item in source.inputs
            for axis in _open(item, batch=False)
            if _symbol(item, axis) not in batches
        )
    )
    own = _open(source.inputs[0]) if source.inputs else []
    for batch in (2, 1):
        first = dict.fromkeys(batches, batch)
        if not open_:
            yield first
        elif any(len(_open(item, batch=False)) == 2 and len(item.dims) == 4 for item in source.inputs):
            for plane in _PLANES:
                yield {**first, **{name: plane[index % 2] for index, name in enumerate(open_)}}
        else:
            further = [name for name in open_ if name not in {_symbol(source.inputs[0], a) for a in own}]
            for length in _LENGTHS:
                yield {**first, **dict.fromkeys(open_, length)}
                if further:  # a state beside the examples has their batch in the middle
                    yield {**first, **dict.fromkeys(open_, length), **dict.fromkeys(further, batch)}


def _made(item: InputInfo, source: Source, sizes: Mapping[str, int], high: int, seed: int) -> Tensor:
    """Seeded values: normal for floats, below ``high`` for integers, 0 or 1 for masks."""
    shape = tuple(
        size if isinstance(size, int) else sizes[_symbol(item, axis)] for axis, size in enumerate(item.dims)
    )
    if math.prod(shape) * len(source.inputs) > _LARGEST:
        raise LoadError(
            f"input '{item.name}' of '{source.name}' has the absurd shape {shape}", fix="export it again"
        )
    random = np.random.default_rng(seed)
    if item.dtype.kind == "f":
        return host.tensor_of(np.asarray(random.standard_normal(shape), dtype=item.dtype))
    if math.prod(shape) == 1 and (switch := _compared_with(source, item.name)) is not None:
        return host.tensor_of(np.full(shape, switch).astype(item.dtype))
    lowered = item.name.lower()
    small = item.dtype.kind == "b" or "mask" in lowered or "type" in lowered
    return host.tensor_of(np.asarray(random.integers(0, 2 if small else high, shape), dtype=item.dtype))


def _compared_with(source: Source, name: str) -> int | None:
    """The number that the graph compares a switch with: 16000 of ``sample_rate == 16000``."""
    same = {name}
    constants = dict(source.constants)
    for node in source.nodes:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type in _FORWARDED and node.input and node.input[0] in same:
            same.add(node.output[0])
        elif node.op_type in _COMPARED and same & set(node.input):
            other = next((constants[value] for value in node.input if value in constants), None)
            if other is not None and other.size == 1 and other.dtype.kind in "iu":
                return int(other.reshape(-1)[0])
    return None


def _all_fitted(source: Source, given: Sequence[Tensor]) -> list[Tensor]:
    if len(given) != len(source.inputs):
        names = ", ".join(item.name for item in source.inputs)
        raise LoadError(
            f"'{source.name}' takes {len(source.inputs)} inputs ({names}), not {len(given)}",
            fix="give one array per input, in this order",
        )
    return [_fitted(value, item, source.name) for value, item in zip(given, source.inputs, strict=True)]


def _first_only(value: Tensor, item: InputInfo) -> Tensor:
    return value[:1] if item.dims and not isinstance(item.dims[0], int) else value


def _fitted(value: Tensor, item: InputInfo, source: str) -> Tensor:
    """An example in the declared dtype and batch."""
    declared = tuple(size if isinstance(size, int) else "any" for size in item.dims)
    if value.dim() == len(item.dims) + 1 and value.shape[0] and bool((value == value[:1]).all()):
        value = value[0]  # an input without a batch: every example says the same
    if item.dims and isinstance(item.dims[0], int) and value.dim() and value.shape[0] != item.dims[0]:
        rows = [index % value.shape[0] for index in range(item.dims[0])]  # a fixed batch
        value = value[rows] if item.dims[0] <= _LARGEST // max(value[0].numel(), 1) else value
    fits = value.dim() == len(item.dims) and all(
        not isinstance(size, int) or size == own for size, own in zip(item.dims, value.shape, strict=True)
    )
    if not fits:
        raise LoadError(
            f"input '{item.name}' of '{source}' takes {item.dtype} {declared}, not {tuple(value.shape)}",
            fix="give data (or --input) of this shape; the first axis is the batch",
        )
    wanted = host.torch_dtype(item.dtype)
    if value.dtype != wanted and value.is_floating_point() != wanted.is_floating_point:
        given = str(value.dtype).removeprefix("torch.")
        raise LoadError(
            f"input '{item.name}' of '{source}' takes {item.dtype}, not {given}",
            fix="give data (or --input) of this dtype",
        )
    return value.to(wanted)
