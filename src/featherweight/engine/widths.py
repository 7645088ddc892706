"""What layers cost when they keep some of their channels: measured on the target at a few widths.

A layer's time is no straight line of its channels: kernels work on blocks of them, so that 17 cost as much as
32. Every layer shape of the original is therefore built again at a grid of widths, all of them side by side
in one network that is profiled once, kernel by kernel. Each stands between two thin layers, so that what the
runtime moves to feed it (changes of layout) is seen and counted too. Between measured widths, both rounded up
to whole blocks, time is interpolated along both axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.graph import trace
from featherweight.model import Entry, Model

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FRACTIONS = (0.25, 0.5, 1.0)
_MOST = 48  # shapes that are measured, the costliest; others cost as their multiply-accumulates
_REST = 16  # channels of the thin layer behind
Size = tuple[int, int]  # input and output channels


@dataclass(frozen=True)
class Shape:
    """What a layer's time depends on.

    Attributes:
        kind: Class in ``torch.nn``.
        inputs: Channels read.
        outputs: Channels made.
        groups: Of a convolution.
        spatial: Of one example's input, without channels.
        arguments: The other arguments of its constructor.
    """

    kind: str
    inputs: int
    outputs: int
    groups: int
    spatial: tuple[int, ...]
    arguments: tuple[tuple[str, Any], ...]

    @property
    def depthwise(self) -> bool:
        """Whether each channel is filtered alone, so that both widths are one."""
        return self.groups > 1 and self.groups == self.inputs == self.outputs

    def build(self, size: Size) -> nn.Module:
        """A fresh layer of this shape with these widths."""
        arguments = dict(self.arguments)
        if self.kind != "Linear":
            arguments["groups"] = size[0] if self.depthwise else self.groups
        made: nn.Module = getattr(nn, self.kind)(*size, **arguments)
        return made


def shapes(model: Model) -> dict[str, Shape]:
    """Layer with weights -> its shape; of several calls the first."""
    found: dict[str, Shape] = {}
    for entry in model.entries:
        graph = trace(model, entry)
        for node in graph:
            layer = model.module.get_submodule(node.layer) if node.parameters else None
            if node.layer in found or not node.inputs or "weight" not in node.parameters:
                continue
            read = graph.values[node.inputs[0]].shape
            if isinstance(layer, nn.Linear) and node.op == "linear":
                how: dict[str, Any] = {"bias": layer.bias is not None}
                widths = (layer.in_features, layer.out_features)
                found[node.layer] = Shape("Linear", *widths, 1, tuple(read[1:-1]), _frozen(how))
            elif isinstance(layer, _CONVS) and node.op.startswith("conv"):
                found[node.layer] = _convolution(layer, tuple(read[2:]))
    return found


def _convolution(layer: Any, spatial: tuple[int, ...]) -> Shape:
    names = ("kernel_size", "stride", "padding", "dilation")
    how = {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}
    kind = next(kind.__name__ for kind in _CONVS if isinstance(layer, kind))
    if "Transpose" in kind:
        how["output_padding"] = layer.output_padding
    return Shape(kind, layer.in_channels, layer.out_channels, layer.groups, spatial, _frozen(how))


def _frozen(how: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, tuple(v) if isinstance(v, list) else v) for key, v in how.items()))


def grid(shape: Shape, multiple: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths at which a shape is measured: of its inputs, of its outputs."""
    whole = shape.groups if not shape.depthwise else 1
    sides = [_points(width, multiple, whole) for width in (shape.inputs, shape.outputs)]
    return sides[0], sides[1]


def _points(width: int, multiple: int, whole: int) -> tuple[int, ...]:
    found = {_blocks(max(1, round(width * f)), multiple, width) for f in _FRACTIONS}
    return tuple(sorted({math.ceil(point / whole) * whole for point in found}))


def _blocks(channels: int, multiple: int, width: int) -> int:
    """Channels as kernels see them: below one block as they are, else whole blocks."""
    return channels if channels < multiple else min(width, math.ceil(channels / multiple) * multiple)


@dataclass(frozen=True)
class Widths:
    """Measured times of one shape.

    Attributes:
        inputs: Widths of its inputs, rising.
        outputs: Widths of its outputs, rising.
        seconds: A row for each of ``inputs``, a column for each of ``outputs``.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def ratio(self, inputs: float, outputs: float, multiple: int) -> float:
        """Time at these fractions of the channels in units of that of the whole layer."""
        whole = self.seconds[-1][-1]
        return self._at(inputs, outputs, multiple) / whole if whole > 0 else 1.0

    def _at(self, inputs: float, outputs: float, multiple: int) -> float:
        sizes = [
            _blocks(max(1, round(fraction * points[-1])), multiple, points[-1])
            for fraction, points in ((inputs, self.inputs), (outputs, self.outputs))
        ]
        rows = [_between(sizes[1], self.outputs, row) for row in self.seconds]
        return _between(sizes[0], self.inputs, rows)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Widths:
        return cls(tuple(data["inputs"]), tuple(data["outputs"]), tuple(map(tuple, data["seconds"])))


def _between(width: int, points: Sequence[int], seconds: Sequence[float]) -> float:
    """Interpolated; below the smallest measured width in proportion to it, but at least a third."""
    if len(points) == 1:  # an axis that goes with the other one, or that nothing can be taken from
        return seconds[0]
    if width < points[0]:
        return seconds[0] * max(width / points[0], 1 / 3)
    return float(np.interp(width, points, seconds))


class _Case(nn.Module):
    """A layer between two thin ones."""

    def __init__(self, shape: Shape, size: Size) -> None:
        super().__init__()
        self.layer = shape.build(size)
        self.behind: nn.Module = nn.Identity()
        if shape.kind == "Linear":
            self.ahead: nn.Module = nn.Linear(1, size[0])
        else:
            conv = getattr(nn, f"Conv{len(shape.spatial)}d")
            self.ahead, self.behind = conv(1, size[0], 1), conv(size[1], _REST, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.behind(self.layer(self.ahead(x)))
        return y


class _Cases(nn.Module):
    """All of them side by side: (1, N) -> (1, cases)."""

    def __init__(self, cases: Sequence[tuple[Shape, Size]]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(_Case(*case) for case in cases)
        self.read = [
            (*shape.spatial, 1) if shape.kind == "Linear" else (1, *shape.spatial) for shape, _ in cases
        ]

    def forward(self, x: Tensor) -> Tensor:
        views = {shape: x[:, : math.prod(shape)].reshape(1, *shape) for shape in dict.fromkeys(self.read)}
        made = (case(views[shape]) for case, shape in zip(self.cases, self.read, strict=True))
        return torch.stack([y.mean() for y in made]).reshape(1, -1)


def network(cases: Sequence[tuple[Shape, Size]], seed: int) -> Model:
    """The network in which all cases stand side by side; ``cases.<index>.layer`` is one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _Cases(cases).eval()
        example = torch.randn(1, max(math.prod(shape) for shape in module.read))
    return Model(module, {"forward": Entry((example,), ("x",), ("y",))})


Profiler = Callable[[Model], Mapping[str, float]]  # a network -> seconds of each of its layers


def measure(
    wanted: Mapping[str, Shape], weight: Mapping[str, float], multiple: int, seed: int, profiler: Profiler
) -> dict[str, Widths]:
    """Times of the layers at their grids of widths.

    Args:
        wanted: Layer -> shape.
        weight: Layer -> seconds as it is, which says which shapes matter most.
        multiple: Channels of a block.
        seed: Of the weights.
        profiler: Measures a network.
    """
    spent: dict[Shape, float] = {}
    for layer, shape in wanted.items():
        spent[shape] = spent.get(shape, 0.0) + weight.get(layer, 0.0)
    chosen = sorted(spent, key=lambda shape: -spent[shape])[:_MOST]
    cases: list[tuple[Shape, Size]] = []
    for shape in chosen:
        sides = grid(shape, multiple)
        pairs = zip(*sides, strict=True) if shape.depthwise else product(*sides)
        cases += [(shape, pair) for pair in pairs]
    if not cases:
        return {}
    seconds = profiler(network(cases, seed))
    times = {case: seconds.get(f"cases.{index}.layer", 0.0) for index, case in enumerate(cases)}
    return {layer: _table(shape, multiple, times) for layer, shape in wanted.items()}


def _table(shape: Shape, multiple: int, times: Mapping[tuple[Shape, Size], float]) -> Widths:
    """What was measured of a shape; its multiply-accumulates where nothing was."""
    inputs, outputs = grid(shape, multiple)

    def time(i: int, o: int) -> float:
        return times.get((shape, (i, o)), float(o if shape.depthwise else i * o))

    if shape.depthwise:  # one axis: both widths are the same
        return Widths((inputs[-1],), outputs, (tuple(time(n, n) for n in outputs),))
    return Widths(inputs, outputs, tuple(tuple(time(i, o) for o in outputs) for i in inputs))
