"""Writes integer weights into a program that is being quantized. Part of ``pt2e.py``."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from torch import Tensor, fx

from featherweight.errors import TargetError
from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup, TensorFormat

_QD = torch.ops.quantized_decomposed
_ATEN = torch.ops.aten
_LAYERS = frozenset(
    {
        _ATEN.conv1d.default,
        _ATEN.conv2d.default,
        _ATEN.conv3d.default,
        _ATEN.conv_transpose1d.default,
        _ATEN.conv_transpose2d.input,
        _ATEN.linear.default,
    }
)
_BIAS = 2  # where it is among the arguments of each of them
_BIAS_LIMIT = 2**30  # int32, with room for what is added to it
_SMALLEST_RATIO = 2.0**-30  # of a product's scale to the output's, that integer kernels can multiply by


class Tensors:
    """What the program will hold.

    Attributes:
        stored: By name, which is an identifier.
        parameters: Name -> the parameter or buffer that it holds.
    """

    def __init__(self) -> None:
        self.stored: dict[str, Any] = {}
        self.parameters: dict[str, str] = {}

    def add(self, name: str, value: Tensor, *, listed: bool = True, shared: bool = True) -> str:
        """Keep a tensor under a name that nobody has, or find an equal one that was kept for the same."""
        stem = "t_" + re.sub(r"\W", "_", name)
        free, count = stem, 0
        while free in self.stored:
            other = self.stored[free]
            equal = isinstance(other, Tensor) and other.dtype == value.dtype and torch.equal(other, value)
            if equal and shared:
                break
            count += 1
            free = f"{stem}_{count}"
        self.stored[free] = value
        if listed:
            self.parameters[free] = name
        return free


def limits(node: fx.Node) -> tuple[float, float] | None:
    """Between what an operator clamps; None: it does something else."""
    given: tuple[Any, ...] = (*node.args[1:], *(None,) * 2)
    if node.target is _ATEN.relu.default:
        return 0.0, float("inf")
    if node.target is _ATEN.relu6.default:
        return 0.0, 6.0
    if node.target is _ATEN.hardtanh.default:
        return (-1.0 if given[0] is None else given[0]), (1.0 if given[1] is None else given[1])
    if node.target is _ATEN.clamp.default:
        low, high = given[0], given[1]
        return (-float("inf") if low is None else low), (float("inf") if high is None else high)
    return None


def is_dequantized(node: Any) -> bool:
    """Whether a value was integers, with a scale that is known."""
    return isinstance(node, fx.Node) and node.target is _QD.dequantize_per_tensor.default


def write_weight(
    graph: fx.Graph, tensors: Tensors, node: fx.Node, fmt: TensorFormat, reader: fx.Node, dynamic: bool
) -> None:
    """Put integers and a ``dequantize`` between a parameter and one of its readers.

    Args:
        graph: Edited in place.
        tensors: Holds the parameter; takes integers and scales.
        node: That reads the parameter.
        fmt: The grid that is stored.
        reader: An operator that reads ``node``.
        dynamic: A layer that does not read and make integers has its input quantized when it runs.
    """
    _Weight(graph, tensors, node, reader).write(fmt, dynamic)


class _Weight:
    def __init__(self, graph: fx.Graph, tensors: Tensors, node: fx.Node, reader: fx.Node) -> None:
        self.graph, self.tensors, self.node, self.reader = graph, tensors, node, reader
        self.name = tensors.parameters[str(node.target)]
        self.value: Tensor = tensors.stored[str(node.target)]

    def write(self, fmt: TensorFormat, dynamic: bool) -> None:
        if isinstance(fmt, FloatCast):
            half = self._tensor(self.name, self.value.to(fmt.torch_dtype))
            self.reader.replace_input_with(self.node, self._call(_ATEN.to.dtype, (half, torch.float32)))
            return
        if not isinstance(fmt, IntQuant):
            raise TargetError(
                f"'{self.name}' cannot be {type(fmt).__name__} in an exported program",
                fix="store it as integers",
            )
        self._own_bias()
        static = self._is_static() and (fmt.width == 8 or not dynamic)
        anew = dynamic and not static and self.reader.target in _LAYERS
        real = (
            self._grouped(fmt, anew)
            if isinstance(fmt.granularity, PerGroup)
            else self._plain(fmt, static, anew)
        )
        self.reader.replace_input_with(self.node, real)
        if anew:
            self._quantize_anew()

    def _plain(self, fmt: IntQuant, static: bool, anew: bool) -> fx.Node:
        """One scale, or one per channel; dynamic layers want one per channel."""
        scale, zero_point = fmt.grid()
        integers, as_asked = fmt.quantize(self.value), scale
        if static:
            integers, scale = _widened(integers, scale, fmt, self._smallest())
        key = self.tensors.add(self.name, integers.to(_kind(fmt)), shared=scale is as_asked)
        stored = self._read(key)
        if isinstance(fmt.granularity, PerChannel):
            axis = fmt.granularity.axis
        elif anew:
            axis = 0
            scale, zero_point = (x.expand(len(self.value)).contiguous() for x in (scale, zero_point))
        else:
            arguments = (stored, float(scale), int(zero_point), *_steps(fmt))
            return self._call(_QD.dequantize_per_tensor.default, arguments)
        scales, zeros = self._scales(scale, zero_point)
        return self._call(_QD.dequantize_per_channel.default, (stored, scales, zeros, axis, *_steps(fmt)))

    def _grouped(self, fmt: IntQuant, anew: bool) -> fx.Node:
        """One scale per group; where they leave a rest, a dynamic layer reads zeros beside its inputs."""
        size = fmt.granularity.size  # type: ignore[union-attr]
        scale, zero_point = fmt.grid()
        integers = fmt.quantize(self.value)
        rest = -integers.shape[1] % size
        if scale.shape[1] == 1:  # a group longer than the matrix is a channel
            scales, zeros = self._scales(scale[:, 0].contiguous(), zero_point[:, 0].contiguous())
            stored = self._tensor(self.name, integers.to(_kind(fmt)))
            return self._call(_QD.dequantize_per_channel.default, (stored, scales, zeros, 0, *_steps(fmt)))
        if rest and anew:
            integers = torch.nn.functional.pad(integers, (0, rest))
            filled = self._call(_ATEN.constant_pad_nd.default, (self.reader.args[0], [0, rest], 0.0))
            self.reader.args = (filled, *self.reader.args[1:])
        scales, zeros = self._scales(scale, zero_point)
        stored = self._tensor(self.name, integers.to(_kind(fmt)))
        arguments = (stored, scales, zeros, *_steps(fmt), size, torch.float32)
        return self._call(_QD.dequantize_per_channel_group.default, arguments)

    def _scales(self, scale: Tensor, zero_point: Tensor) -> tuple[fx.Node, fx.Node]:
        zeros = self._tensor(f"{self.name}.zero_point", zero_point.to(torch.int64), listed=False)
        return self._tensor(f"{self.name}.scale", scale, listed=False), zeros

    def _tensor(self, name: str, value: Tensor, *, listed: bool = True) -> fx.Node:
        return self._read(self.tensors.add(name, value, listed=listed))

    def _read(self, key: str) -> fx.Node:
        with self.graph.inserting_before(self.reader):
            return self.graph.get_attr(key)

    def _call(self, target: Any, arguments: tuple[Any, ...]) -> fx.Node:
        with self.graph.inserting_before(self.reader):
            return self.graph.call_function(target, arguments)

    # ---- what is around the layer

    def _own_bias(self) -> None:
        """Layers that share a bias get one each, since it becomes integers by the scale of their input."""
        bias = self.reader.args[_BIAS] if len(self.reader.args) > _BIAS else None
        if self.reader.target not in _LAYERS or not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return
        if len(bias.users) > 1 or self._reads(str(bias.target)) > 1:
            key = str(bias.target)
            value: Tensor = self.tensors.stored[key]
            own = self.tensors.add(self.tensors.parameters[key], value.clone(), shared=False)
            self.reader.args = (*self.reader.args[:_BIAS], self._read(own), *self.reader.args[_BIAS + 1 :])

    def _reads(self, key: str) -> int:
        """How many nodes read a tensor."""
        return sum(node.op == "get_attr" and node.target == key for node in self.graph.nodes)

    def _is_static(self) -> bool:
        """Whether a layer reads integers, and its only reader makes integers of what it says."""
        if self.reader.target not in _LAYERS or not is_dequantized(self.reader.args[0]):
            return False
        return self._quantized() is not None

    def _quantized(self) -> fx.Node | None:
        """The integers that the layer's result becomes, at most behind one clamp."""
        if len(self.reader.users) != 1:
            return None
        (after,) = self.reader.users
        if limits(after) is not None and len(after.users) == 1:
            (after,) = after.users
        return after if after.target is _QD.quantize_per_tensor.default else None

    def _smallest(self) -> Tensor:
        """Least scale of a weight, so that a bias fits int32 and outputs can be scaled."""
        source: Any = self.reader.args[0]
        quantized: Any = self._quantized()
        step = torch.tensor(float(source.args[1]), dtype=torch.float64)
        least = float(quantized.args[1]) * _SMALLEST_RATIO / step
        bias = self.reader.args[_BIAS] if len(self.reader.args) > _BIAS else None
        if not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return least
        values: Tensor = self.tensors.stored[str(bias.target)]
        return torch.maximum(values.abs().double() / (step * _BIAS_LIMIT), least)

    def _quantize_anew(self) -> None:
        """Integers of a layer's input whose scale is found when it runs."""
        source: Any = self.reader.args[0]
        chosen = self._call(_QD.choose_qparams.tensor, (source, -128, 127, 2.0**-12, torch.int8))
        found = (self._call(operator.getitem, (chosen, 0)), self._call(operator.getitem, (chosen, 1)))
        scheme = (*found, -128, 127, torch.int8)
        integers = self._call(_QD.quantize_per_tensor.tensor, (source, *scheme))
        real = self._call(_QD.dequantize_per_tensor.tensor, (integers, *scheme))
        self.reader.args = (real, *self.reader.args[1:])


def _kind(fmt: IntQuant) -> torch.dtype:
    return torch.int8 if fmt.signed else torch.uint8


def _steps(fmt: IntQuant) -> tuple[int, int, torch.dtype]:
    """Smallest and largest integer and their type, as converters tell 4 bits from 8."""
    return (-8, 7, torch.int8) if fmt.width == 4 else (fmt.quant_min, fmt.quant_max, _kind(fmt))


def _widened(integers: Tensor, scale: Tensor, fmt: IntQuant, smallest: Tensor) -> tuple[Tensor, Tensor]:
    """Give each channel at least this scale; the integers follow (channels that are all but zero)."""
    least = smallest if isinstance(fmt.granularity, PerChannel) else smallest.max()
    new = torch.maximum(scale.double(), least).float()
    if torch.equal(new, scale):
        return integers, scale
    shape = [1] * integers.dim()
    if isinstance(fmt.granularity, PerChannel):
        shape[fmt.granularity.axis] = -1
    return torch.round(integers * (scale.double() / new).reshape(shape)).int(), new
