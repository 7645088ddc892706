"""Keras 3 (.keras) and legacy (.h5) files -> a module of ordinary layers, checked against Keras itself.

Layers keep their names; inputs and outputs look as they did in Keras, channels last, and the layers between
work with channels first. A layer that has nothing to stand for it sends the model through Keras' own ONNX
export and the ONNX importer, which loses names but nothing else.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.errors import FeatherweightError, LoadError
from featherweight.exchange.keras_in.build import Builder, Unmapped, Value
from featherweight.exchange.keras_in.module import KerasModel
from featherweight.exchange.keras_in.read import load_keras
from featherweight.exchange.keras_in.walk import emit_model, functional, layers_of
from featherweight.exchange.key import file_digest, root_key
from featherweight.exchange.weights import check_finite
from featherweight.model import Entry, Model

_TOLERANCE = 1e-4  # of the largest value


def import_keras(path: Path, *, examples: Sequence[Tensor] | None = None) -> Model:
    """The model of a Keras file.

    Args:
        path: .keras, .h5 or .hdf5.
        examples: One batch for each input; None: seeded ones, where only the batch is open.

    Raises:
        LoadError: The file cannot be read, would run code, holds a layer that cannot be taken over, or the
            import computes something else than Keras.
        MissingRuntime: Keras is not installed.
    """
    source = load_keras(path)
    graph = functional(source)
    if graph is None:
        raise LoadError(
            f"'{path}' holds a {type(source).__name__} that was never called, or a class of its own",
            fix="call the model once before it is saved, or write it as a functional model",
        )
    inputs = _inputs(source, graph, path, examples)
    try:
        module = _mapped(graph, inputs)
    except Unmapped as reason:
        return _through_onnx(source, path, inputs, reason)
    check_finite(module, str(path))
    others = tuple(_other(value) for value in inputs.values())
    for given in (tuple(inputs.values()), others):
        _check(module, source, given, path)
    entries = {"forward": _entry(graph, module, inputs)}
    return Model(module, entries, key=root_key(module, entries, [file_digest(path)]))


def _mapped(graph: Any, inputs: dict[str, Tensor]) -> KerasModel:
    builder = Builder()
    values = [
        Value(builder.new(), tuple(tensor.shape), integer=not given.is_floating_point())
        for tensor, given in zip(graph.inputs, inputs.values(), strict=True)
    ]
    outputs = emit_model(builder, graph, "", values)
    builder.module.results = [builder.plain(value).number for value in outputs]
    return builder.module.eval()


def _inputs(source: Any, graph: Any, path: Path, examples: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """Input names and a batch for each."""
    names = _names(graph._inputs_struct, [str(tensor.name) for tensor in graph.inputs])
    if examples is not None and len(examples) != len(names):
        raise LoadError(
            f"'{path}' takes {len(names)} inputs ({', '.join(names)}), not {len(examples)}",
            fix="give one array per input, in this order",
        )
    indices = _indices(source)
    made = {}
    for index, (name, tensor) in enumerate(zip(names, graph.inputs, strict=True)):
        kind = str(tensor.dtype)
        if kind == "string":
            raise LoadError(f"input '{name}' of '{path}' takes text", fix="cut the text layers off first")
        if examples is None:
            made[name] = _made(name, tuple(tensor.shape), kind, indices, path, index)
        else:
            made[name] = _fitted(examples[index], name, tuple(tensor.shape), kind, path)
    return made


def _indices(source: Any) -> int | None:
    """The smallest table of an embedding; None if there is none."""
    sizes = [layer.input_dim for layer in layers_of(source) if type(layer).__name__ == "Embedding"]
    return min(sizes) if sizes else None


def _made(
    name: str, shape: tuple[int | None, ...], kind: str, indices: int | None, path: Path, seed: int
) -> Tensor:
    open_axes = [axis for axis, size in enumerate(shape) if axis and size is None]
    if open_axes:
        sizes = "x".join("SIZE" if size is None else str(size) for size in shape[1:])
        raise LoadError(
            f"input '{name}' of '{path}' leaves its axes {open_axes} open",
            fix=f"give --data, or the shape without the batch: --input {sizes}",
        )
    random = np.random.default_rng(seed)
    sizes_ = (2, *(int(size or 1) for size in shape[1:]))
    if "int" in kind or indices is not None:
        values = random.integers(0, min(indices or 256, 256 if kind == "uint8" else 100), sizes_)
    elif kind == "bool":
        values = random.integers(0, 2, sizes_)
    else:
        return torch.from_numpy(random.standard_normal(sizes_).astype(kind))
    return torch.from_numpy(values.astype(kind))


def _fitted(value: Tensor, name: str, shape: tuple[int | None, ...], kind: str, path: Path) -> Tensor:
    fits = value.dim() == len(shape) and all(
        axis == 0 or size is None or size == own
        for axis, (size, own) in enumerate(zip(shape, value.shape, strict=False))
    )
    if not fits:
        wanted = tuple("any" if size is None else size for size in shape)
        raise LoadError(
            f"input '{name}' of '{path}' takes {kind} {wanted}, not {tuple(value.shape)}",
            fix="give data (or --input) of this shape, channels where Keras has them; the batch comes first",
        )
    return value.to(getattr(torch, kind))


def _other(value: Tensor) -> Tensor:
    """Another batch of one example more: the same values in another order."""
    shape = (value.shape[0] + 1, *value.shape[1:])
    picks = torch.randint(0, value.numel(), shape, generator=torch.Generator().manual_seed(0))
    return value.reshape(-1)[picks]


def _unique(names: list[str]) -> tuple[str, ...]:
    seen: list[str] = []
    for name in names:
        count, plain = 1, name
        while name in seen:
            name, count = f"{plain}_{count}", count + 1
        seen.append(name)
    return tuple(seen)


def _names(struct: Any, own: list[str]) -> tuple[str, ...]:
    """Keys where Keras takes (or gives) a dictionary, else the layers' names."""
    return tuple(sorted(struct)) if isinstance(struct, dict) and len(struct) == len(own) else _unique(own)


def _entry(graph: Any, module: KerasModel, inputs: dict[str, Tensor]) -> Entry:
    outputs = _output_names(graph)
    axes = {
        name: {
            axis: "batch" if axis == 0 else f"{name}_axis{axis}"
            for axis, size in enumerate(tensor.shape)
            if size is None
        }
        for name, tensor in zip(inputs, graph.inputs, strict=True)
    }
    return Entry(tuple(inputs.values()), tuple(inputs), outputs, axes)


def _output_names(graph: Any) -> tuple[str, ...]:
    return _names(graph._outputs_struct, [str(name) for name in graph.output_names])


def _keras_outputs(source: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What Keras computes."""
    given: Any = list(inputs) if len(inputs) > 1 else inputs[0]
    graph = functional(source)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.utils._pytree.tree_leaves(graph(given, training=False))
    return [item.detach().cpu() for item in packed]


def _check(module: nn.Module, source: Any, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Compare with Keras on these inputs.

    Raises:
        LoadError: They differ by more than 1e-4 of the largest value.
    """
    from featherweight.exchange.onnx_in.check import difference

    with torch.no_grad():
        found = module(*inputs)
    ours = found if isinstance(found, tuple) else (found,)
    for index, (one, other) in enumerate(zip(ours, _keras_outputs(source, inputs), strict=True)):
        off = difference(one.numpy(), other.numpy())
        if not off <= _TOLERANCE:
            raise LoadError(
                f"the import of '{path}' computes something else than Keras: output {index} is off by "
                f"{off:.2g} of its largest value",
                where=_first_difference(source, inputs),
                fix="report the layer; meanwhile model.export('model.onnx', format='onnx') in Keras",
            )


def _first_difference(source: Any, inputs: tuple[Tensor, ...]) -> str | None:
    """The first Keras layer at which a smaller import of the model goes wrong."""
    from keras import Model as Functional

    from featherweight.exchange.onnx_in.check import difference

    graph = functional(source)
    names = [str(tensor.name) for tensor in graph.inputs]
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if type(node.operation).__name__ == "InputLayer":
                continue
            try:
                part = Functional(graph.inputs, node.output_tensors[0])
                cut = _mapped(part, dict(zip(_unique(names), inputs, strict=True)))
                with torch.no_grad():
                    ours = cut(*inputs)
                (theirs,) = _keras_outputs(part, inputs)[:1]
            except (Unmapped, ValueError):
                continue
            if not difference(ours.numpy(), theirs.numpy()) <= _TOLERANCE:
                return f"layer '{node.operation.name}' ({type(node.operation).__name__})"
    return None


def _through_onnx(source: Any, path: Path, inputs: dict[str, Tensor], reason: Unmapped) -> Model:
    """Keras' own ONNX export, and the ONNX importer.

    Raises:
        LoadError: That fails too; names the layer that could not be taken over.
    """
    from featherweight.exchange.onnx_in import import_onnx

    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        file = Path(folder) / f"{path.stem}.onnx"
        try:
            with _quiet():
                source(next(iter(inputs.values())) if len(inputs) == 1 else list(inputs.values()))
                source.export(str(file), format="onnx", verbose=False)
            model = import_onnx(file, examples=tuple(inputs.values()))
        except FeatherweightError as error:
            said = error.what
        except Exception as error:  # noqa: BLE001 - Keras and the exporter raise what they like
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        else:
            for given in (tuple(inputs.values()), tuple(_other(value) for value in inputs.values())):
                _check(model.module, source, given, path)
            entry = replace(model.entries["forward"], output_names=_output_names(functional(source)))
            entries = {"forward": entry}
            return replace(model, entries=entries, key=root_key(model.module, entries, [file_digest(path)]))
    raise LoadError(
        f"{reason}, in '{path}'; and its export to ONNX cannot be read either: {said[:300]}",
        fix="put an ordinary layer in its place",
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """torch's exporter prints whole graphs from C++ when it fails: away with both streams of the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with Path(os.devnull).open("wb") as nowhere:
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
        try:
            yield
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print and warn of their own internals."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _silent():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
