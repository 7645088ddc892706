"""Which open axes of a file are really open: in ONNX Runtime, in the import, and in torch.export.

An axis that is not becomes the example's size, with a note; nothing fails for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from featherweight.errors import LoadError
from featherweight.exchange.onnx_in.build import Built
from featherweight.exchange.onnx_in.check import Reference, check_import
from featherweight.exchange.onnx_in.examples import other_inputs
from featherweight.exchange.onnx_in.read import Source
from featherweight.graph import trace
from featherweight.model import Model

Axes = Mapping[str, Mapping[int, str]]


def verified_axes(
    source: Source, reference: Reference, built: Built, inputs: Sequence[Tensor], axes: Axes
) -> tuple[Axes, list[str]]:
    """The axes that other sizes were tried on, and notes on those that turned out to be fixed.

    The import is compared with ONNX Runtime on other values, another batch, and another size of every axis.

    Raises:
        LoadError: The import computes something else with other values or another batch.
    """
    keep = set(built.decided)

    def other(sizes: Mapping[str, int], of: Axes = axes) -> list[Tensor]:
        return other_inputs(inputs, of, sizes, keep)

    check_import(built.module, source, reference, other({}))
    sizes = _sizes(inputs, axes)
    if not sizes:
        return axes, []
    batch = {symbols[0] for symbols in axes.values() if 0 in symbols}
    notes: list[str] = []
    working: dict[str, int] = {}
    same: dict[str, str] = {}  # a symbol that moves only together with another one -> that one
    for symbol, size in sizes.items():
        if symbol in same:
            continue
        twins = [name for name, own in sizes.items() if own == size and name not in (*working, *same)]
        moved, told = _move(symbol, twins, size, symbol in batch, built, source, reference, other)
        for name, another in moved.items():
            working[name] = another
            same[name] = symbol
        if moved:
            continue
        if told and symbol in batch:
            raise told
        why = "the import does not follow it" if told else "ONNX Runtime took no other one that was tried"
        notes.append(f"the size '{symbol}' is fixed to {size}: {why}")
    left = {
        name: {axis: symbol for axis, symbol in symbols.items() if symbol in working}
        for name, symbols in axes.items()
    }
    together = other(working, left)
    if len(set(same.values())) > 1 and reference.refusal(together) is None:
        check_import(built.module, source, reference, together)
    return {name: {axis: same[symbol] for axis, symbol in s.items()} for name, s in left.items()}, notes


def _move(
    symbol: str,
    twins: Sequence[str],
    size: int,
    batch: bool,
    built: Built,
    source: Source,
    reference: Reference,
    other: Callable[[Mapping[str, int]], list[Tensor]],
) -> tuple[dict[str, int], LoadError | None]:
    """Another size of a symbol, alone or with those of the same size, that both take and agree on."""
    told: LoadError | None = None
    for names in ([symbol], list(twins)) if len(twins) > 1 else ([symbol],):
        for another in _others(size, batch=batch):
            sizes = dict.fromkeys(names, another)
            inputs = other(sizes)
            if reference.refusal(inputs) is not None:
                continue
            told = _difference(built, source, reference, inputs)
            if told is None:
                return sizes, None
    return {}, told


def _difference(
    built: Built, source: Source, reference: Reference, inputs: Sequence[Tensor]
) -> LoadError | None:
    try:
        check_import(built.module, source, reference, inputs)
    except LoadError as error:
        return error
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # a size of the examples is built in
        return LoadError(f"the import of '{source.name}' takes no other size: {error}", fix="give its size")
    return None


def _sizes(inputs: Sequence[Tensor], axes: Axes) -> dict[str, int]:
    """The examples' size of each symbol, in the order of the inputs."""
    sizes: dict[str, int] = {}
    for value, symbols in zip(inputs, axes.values(), strict=True):
        for axis, symbol in symbols.items():
            sizes.setdefault(symbol, int(value.shape[axis]))
    return sizes


def _others(size: int, *, batch: bool) -> Iterator[int]:
    """Sizes to try instead."""
    if batch:
        yield size + 1
        return
    yield from dict.fromkeys((size + 32, size * 2, size + 1, max(size // 2, 1)))


def traceable(model: Model) -> Model:
    """The model with only those axes open that stay open in torch.export.

    A graph with nothing open but the batch is not traced here: nothing can be learned.
    """
    entry = model.entries["forward"]
    if not any(axis for symbols in entry.dynamic_axes.values() for axis in symbols):
        return model
    try:
        program = trace(model).program
    except LoadError:
        batch_only = _with_axes(
            model,
            {
                name: {a: s for a, s in symbols.items() if a == 0}
                for name, symbols in entry.dynamic_axes.items()
            },
        )
        try:
            trace(batch_only)
        except LoadError:
            return model  # not for its sizes: whoever traces it is told
        return _noted(batch_only, sorted({s for v in entry.dynamic_axes.values() for a, s in v.items() if a}))
    users = dict(zip(program.graph_signature.user_inputs, entry.input_names, strict=True))
    fixed: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in users:
            symbols = entry.dynamic_axes.get(users[node.name], {})
            shape = node.meta["val"].shape
            fixed |= {symbol for axis, symbol in symbols.items() if isinstance(shape[axis], int)}
    if not fixed:
        return model
    left = {
        name: {axis: symbol for axis, symbol in symbols.items() if symbol not in fixed}
        for name, symbols in entry.dynamic_axes.items()
    }
    return _noted(_with_axes(model, left), sorted(fixed))


def _with_axes(model: Model, axes: Axes) -> Model:
    entry = replace(
        model.entries["forward"], dynamic_axes={name: symbols for name, symbols in axes.items() if symbols}
    )
    return replace(model, entries={**model.entries, "forward": entry}, traced={})


def _noted(model: Model, symbols: Sequence[str]) -> Model:
    notes = [
        f"the size '{symbol}' is fixed: torch.export cannot leave it open in this graph" for symbol in symbols
    ]
    return replace(model, origin=replace(model.origin, notes=(*model.origin.notes, *notes)))
