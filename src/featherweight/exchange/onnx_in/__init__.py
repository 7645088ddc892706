"""ONNX -> a module of ordinary layers, checked against ONNX Runtime.

``read`` parses and distrusts, ``build`` makes layers by the table in ``operators``, ``check`` compares.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import LoadError
from featherweight.exchange.key import root_key
from featherweight.exchange.onnx_in.build import build_module
from featherweight.exchange.onnx_in.check import check_import, require_onnxruntime
from featherweight.exchange.onnx_in.operators import OPERATORS
from featherweight.exchange.onnx_in.read import InputInfo, Source, read_model
from featherweight.exchange.weights import check_finite
from featherweight.model import Entry, Model

__all__ = ["import_onnx", "import_onnx_bytes", "supported_operators"]

_LARGEST = 1 << 27  # elements of an example input


def supported_operators() -> list[str]:
    """Operators of the default domain that the table has, sorted."""
    return sorted(name for domain, name in OPERATORS if not domain)


def import_onnx(path: Path, *, examples: Sequence[Tensor] | None = None) -> Model:
    """The model in a file.

    Args:
        path: Its external data may lie in the same folder, and nowhere else.
        examples: One tensor per input with a leading batch of two; None: made from the declared shapes.

    Raises:
        LoadError: See ``import_onnx_bytes``.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LoadError(f"'{path}' cannot be read: {error.strerror}", fix="check its permissions") from error
    return _import(read_model(content, str(path), path.parent), content, str(path), examples, None)


def import_onnx_bytes(
    content: bytes, *, source: str, origin: str | None = None, examples: Sequence[Tensor] | None = None
) -> Model:
    """The model in a serialized ``ModelProto`` without external data.

    Args:
        content: The bytes.
        source: What messages call it.
        origin: Digest of the file that it was made of, when the bytes are a conversion.
        examples: See ``import_onnx``.

    Raises:
        LoadError: Malformed, hostile, an operator that is not supported, weights that are NaN, examples that
            do not fit, or a result that differs from ONNX Runtime's.
        MissingRuntime: onnxruntime is not installed, so that nothing can be checked.
    """
    return _import(read_model(content, source), content, None, examples, origin)


def _import(
    source: Source, content: bytes, path: str | None, examples: Sequence[Tensor] | None, origin: str | None
) -> Model:
    inputs = _inputs(source, examples)
    module = build_module(source, inputs)
    check_finite(module, source.name)
    require_onnxruntime()
    check_import(module, source, content, path, inputs)
    axes = _dynamic_axes(source)
    if any(axes.values()):
        check_import(module, source, content, path, _other(inputs, axes))
    entries = {
        "forward": Entry(
            example_inputs=tuple(inputs),
            input_names=tuple(item.name for item in source.inputs),
            output_names=source.outputs,
            dynamic_axes={name: symbols for name, symbols in axes.items() if symbols},
        )
    }
    return Model(
        module=module,
        entries=entries,
        key=root_key(module, entries, origin=("onnx", origin or source.digest)),
    )


def _dynamic_axes(source: Source) -> dict[str, dict[int, str]]:
    """Open axes by input; the number that torch.onnx gives the batch (s77) is called what it is."""
    axes = {item.name: _dynamic(item) for item in source.inputs}
    first = {symbols[0] for symbols in axes.values() if 0 in symbols}
    if len(first) != 1 or not re.fullmatch(r"s\d+", symbol := first.pop()):
        return axes
    return {
        name: {axis: "batch" if other == symbol else other for axis, other in symbols.items()}
        for name, symbols in axes.items()
    }


def _dynamic(item: InputInfo) -> dict[int, str]:
    """Open axes and their symbols; an unnamed first one is the batch."""
    return {
        axis: size or ("batch" if axis == 0 else f"{item.name}_{axis}")
        for axis, size in enumerate(item.dims)
        if not isinstance(size, int)
    }


def _inputs(source: Source, examples: Sequence[Tensor] | None) -> list[Tensor]:
    """Example inputs as the file declares them: given ones where they fit, else seeded ones."""
    if examples is None:
        return [_made(item, source.name, seed) for seed, item in enumerate(source.inputs)]
    if len(examples) != len(source.inputs):
        names = ", ".join(item.name for item in source.inputs)
        raise LoadError(
            f"'{source.name}' takes {len(source.inputs)} inputs ({names}), not {len(examples)}",
            fix="give one array per input, in this order",
        )
    return [_fitted(value, item, source.name) for value, item in zip(examples, source.inputs, strict=True)]


def _made(item: InputInfo, source: str, seed: int) -> Tensor:
    open_ = [axis for axis, size in enumerate(item.dims) if not isinstance(size, int) and axis]
    if open_:
        sizes = "x".join(["SIZE"] * len(item.dims[1:]))
        raise LoadError(
            f"input '{item.name}' of '{source}' leaves its axes {open_} open",
            fix=f"give --data, or the shape without the batch: --input {sizes}",
        )
    shape = tuple(size if isinstance(size, int) else 2 for size in item.dims)
    if np.prod(shape, dtype=np.float64) > _LARGEST:
        raise LoadError(
            f"input '{item.name}' of '{source}' has the absurd shape {shape}", fix="export it again"
        )
    random = np.random.default_rng(seed)
    if item.dtype.kind == "f":
        return torch.from_numpy(np.asarray(random.standard_normal(shape), dtype=item.dtype))
    return torch.from_numpy(np.asarray(random.integers(0, 2, shape), dtype=item.dtype))


def _fitted(value: Tensor, item: InputInfo, source: str) -> Tensor:
    """An example in the declared dtype and batch."""
    declared = tuple(size if isinstance(size, int) else "any" for size in item.dims)
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
    wanted = torch.from_numpy(np.zeros(0, item.dtype)).dtype
    if value.dtype != wanted and value.is_floating_point() != wanted.is_floating_point:
        given = str(value.dtype).removeprefix("torch.")
        raise LoadError(
            f"input '{item.name}' of '{source}' takes {item.dtype}, not {given}",
            fix="give data (or --input) of this dtype",
        )
    return value.to(wanted)


def _other(inputs: Sequence[Tensor], axes: dict[str, dict[int, str]]) -> list[Tensor]:
    """Other inputs: one example more where the batch is open, the same values in another order."""
    others = []
    generator = torch.Generator().manual_seed(0)
    for value, symbols in zip(inputs, axes.values(), strict=True):
        shape = list(value.shape)
        if 0 in symbols:
            shape[0] += 1
        count = int(np.prod(shape))
        picks = torch.randint(0, max(value.numel(), 1), (count,), generator=generator)
        others.append(value.reshape(-1)[picks].reshape(shape))
    return others
