"""ONNX -> a module of ordinary layers, checked against ONNX Runtime.

``read`` parses and distrusts, ``build`` makes layers by the table in ``operators``, ``check`` compares,
``axes`` finds out which sizes are really open.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from featherweight.errors import LoadError
from featherweight.exchange.key import root_key
from featherweight.exchange.onnx_in.axes import traceable, verified_axes
from featherweight.exchange.onnx_in.build import FAILURES, Built, build_module, told
from featherweight.exchange.onnx_in.check import TOLERANCE, Reference, check_import, tolerance
from featherweight.exchange.onnx_in.examples import example_inputs
from featherweight.exchange.onnx_in.grids import with_formats
from featherweight.exchange.onnx_in.operators import OPERATORS
from featherweight.exchange.onnx_in.quantized import floated
from featherweight.exchange.onnx_in.read import InputInfo, Source, read_model
from featherweight.exchange.opaque import EndlessError, opaque_layers
from featherweight.exchange.weights import check_finite
from featherweight.model import Entry, Model, Origin

__all__ = ["import_onnx", "import_onnx_bytes", "supported_operators"]


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
    return _read_in(read_model(content, str(path), path.parent), content, str(path), examples, None)


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
    return _read_in(read_model(content, source), content, None, examples, origin)


def _read_in(
    source: Source, content: bytes, path: str | None, examples: Sequence[Tensor] | None, origin: str | None
) -> Model:
    """A quantized graph is imported as the float one that it approximates, with formats."""
    try:
        found = floated(source)
        if found is None:
            return _import(source, content, path, examples, origin)
        plain = found.proto.SerializeToString()
        model = _import(read_model(plain, source.name), plain, None, examples, origin or source.digest)
        return with_formats(model, found)
    except FAILURES as error:  # a malformed graph, where no node is at fault alone
        raise LoadError(
            f"'{source.name}' cannot be imported: {told(error)}",
            fix="check it with onnx.checker.check_model, or export it again",
        ) from error


def _import(
    source: Source, content: bytes, path: str | None, examples: Sequence[Tensor] | None, origin: str | None
) -> Model:
    reference = Reference(source, content, path)
    inputs, built = _first_that_builds(source, reference, examples)
    axes, notes = verified_axes(source, reference, built, inputs, _dynamic_axes(source))
    for layer in opaque_layers(built.module).values():
        layer.program.learning = False
    entries = {
        "forward": Entry(
            example_inputs=tuple(inputs),
            input_names=tuple(item.name for item in source.inputs),
            output_names=source.outputs,
            dynamic_axes={name: symbols for name, symbols in axes.items() if symbols},
        )
    }
    model = Model(
        module=built.module,
        entries=entries,
        key=root_key(built.module, entries, origin=("onnx", origin or source.digest)),
        origin=Origin(
            opset=source.opsets[""],
            metadata={item.key: item.value for item in source.proto.metadata_props},
            notes=(*_assumed(source), *built.notes, *notes),
        ),
    )
    return traceable(model)


def _first_that_builds(
    source: Source, reference: Reference, given: Sequence[Tensor] | None
) -> tuple[list[Tensor], Built]:
    first: LoadError | None = None
    for inputs in example_inputs(source, reference, given):
        try:
            built = build_module(source, inputs)
            check_finite(built.module, source.name)
            check_import(built.module, source, reference, inputs)
        except EndlessError:
            raise
        except LoadError as error:
            first = first or error
            continue
        return inputs, built
    raise first or LoadError(f"'{source.name}' has inputs that nothing is known of", fix="give --data")


def _assumed(source: Source) -> list[str]:
    """Notes on inputs that have a value in the file, and on a comparison that is coarse."""
    limit = tolerance(source)
    notes = [f"the graph rounds to few bits: compared within {limit:.0%}"] if limit > TOLERANCE else []
    if source.proto.ir_version < 4:  # there every initializer is an input
        return notes
    return notes + [
        f"input '{value.name}' has a value in the file, which is taken: it is no input any more"
        for value in source.proto.graph.input
        if value.name in source.constants
    ]


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
