"""Stores formats in ncnn's layers: int8 convolutions and linear layers, weights in blocks, half precision.

Symmetric signed integers; a scale in ncnn is what a real value is *multiplied* by (127 / largest)::

    q = clamp(round(x * scale), -127, 127)

A convolution whose readers are all integer convolutions hands over integers (``int8_scale_term`` above 100);
what several integer layers read is quantized once. Weights alone become integers in ``Gemm``, in blocks
of 32, 64 or 128 along the inputs (``quantize_term`` = 100 * bits + code of the block size).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from featherweight.errors import TargetError
from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup, PerTensor, TensorFormat
from featherweight.runtimes._ncnn_file import Layer, array, listed
from featherweight.runtimes._ncnn_linear import as_block_gemm, as_convolution
from featherweight.runtimes._ncnn_match import Match
from featherweight.tools.simulate import project

STATIC = frozenset({"conv2d", "linear"})  # operators with kernels for integer activations
BLOCKS = {32: 0, 64: 1, 128: 2}
_CONVOLUTIONS = ("Convolution", "ConvolutionDepthWise")
_SEVERAL = 0.0  # no step that all readers want
_LINEAR = ("InnerProduct", "Gemm")


@dataclass(frozen=True)
class Network:
    """Layers that are being rewritten, and all that is known of them.

    Attributes:
        layers: In the order of the file.
        found: Names of their tensors and blobs.
        formats: Realised, by parameter or traced value.
        parameters: The model's own tensors.
        shapes: Blob -> its shape for one example.
        outputs: Blobs that the network returns.
    """

    layers: list[Layer]
    found: Match
    formats: Mapping[str, tuple[TensorFormat, ...]]
    parameters: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    outputs: Sequence[str]


def store(network: Network) -> dict[str, float]:
    """Rewrite the layers in place; returns blob -> the size of one step, for blobs that hold integers.

    Raises:
        TargetError: A format is on a tensor that ncnn cannot hold in it.
    """
    done: set[str] = set()
    steps: dict[str, float] = {}  # blob -> step that its integer readers want
    for layer in list(network.layers):
        for role, name in network.found.parameters.get(layer.name, {}).items():
            chain = network.formats.get(name)
            if chain is None:
                continue
            done.add(name)
            if isinstance(chain[-1], FloatCast):
                _half(layer, role, name, chain, network)
            elif role == "weight" and layer.name in network.found.nodes:
                _integers(layer, name, network, steps)
            else:
                raise _refusal(name, layer)
    lost = [name for name in network.formats if name in network.parameters and name not in done]
    if lost:
        raise TargetError(
            f"ncnn has no layer that holds '{lost[0]}' as integers or half floats",
            fix="exclude its layer under where",
        )
    return {**_hand_over(network, steps), **_quantize_once(network, steps)}


def _refusal(name: str, layer: Layer) -> TargetError:
    return TargetError(
        f"ncnn's {layer.type} cannot store '{name}' as asked", fix="exclude its layer under where"
    )


def _half(layer: Layer, role: str, name: str, chain: tuple[TensorFormat, ...], network: Network) -> None:
    from featherweight.runtimes._ncnn_file import slots

    if not any(slot.role == role and slot.tagged for slot in slots(layer)):
        raise TargetError(
            f"ncnn stores '{name}' as float32 alone", fix="cast only the weights of layers that multiply"
        )
    held = torch.from_numpy(np.array(layer.tensors[role]))
    layer.tensors[role] = project(held, chain).numpy().astype(np.float16)


# ---- integers


def _integers(layer: Layer, name: str, network: Network, steps: dict[str, float]) -> None:
    chain = network.formats[name]
    fmt = chain[-1]
    if not isinstance(fmt, IntQuant):
        raise _refusal(name, layer)
    weight = project(network.parameters[name].detach(), chain[:-1])
    node = network.found.nodes[layer.name]
    read = network.formats.get(node.inputs[0], ())
    if not read:
        _weight_only(layer, name, weight, fmt, network)
        return
    asked = read[-1]
    if not isinstance(asked, IntQuant) or isinstance(fmt.granularity, PerGroup) or fmt.width != 8:
        raise _refusal(name, layer)
    step = float(asked.grid()[0])
    _static(layer, fmt, weight, step, network)
    blob = layer.inputs[0]  # as the integer layer reads it
    steps[blob] = step if steps.get(blob, step) == step else _SEVERAL


def _static(layer: Layer, fmt: IntQuant, weight: torch.Tensor, step: float, network: Network) -> None:
    outputs = len(weight)
    scale = fmt.grid()[0].expand(outputs).double().numpy() * network.found.factors[layer.name]
    integers = fmt.quantize(weight).numpy().astype(np.int8).reshape(-1)
    if layer.type == "ConvolutionDepthWise" and layer.integer(7) != outputs:
        _split_groups(layer, integers, 1 / scale, 1 / step, network)
        return
    if layer.type in _LINEAR:
        as_convolution(layer, outputs, weight.numel() // outputs, network.layers, network.shapes)
    layer.params[8] = "1" if layer.type == "ConvolutionDepthWise" else "2"
    layer.tensors |= {
        "weight": integers,
        "weight_scale": (1 / scale).astype(np.float32),
        "input_scale": np.array([1 / step], np.float32),
    }


def _split_groups(
    layer: Layer, integers: np.ndarray, scales: np.ndarray, input_scale: float, network: Network
) -> None:
    """ncnn has one weight scale a group: a convolution per group has one a channel."""
    groups, outputs = layer.integer(7), layer.integer(0)
    each = outputs // groups
    own = {key: value for key, value in layer.params.items() if key != 7}
    own |= {0: str(each), 6: str(layer.integer(6) // groups), 8: "2"}
    parts = [f"{layer.outputs[0]}.in{g}" for g in range(groups)]
    made = [f"{layer.outputs[0]}.out{g}" for g in range(groups)]
    cut = Layer(
        "Slice", f"{layer.name}.slice", layer.inputs, parts, {listed(0): array([-233] * groups), 1: "0"}
    )
    new = [cut]
    named = network.found.parameters.pop(layer.name)
    for g in range(groups):
        rows = slice(g * each, (g + 1) * each)
        tensors = {
            "weight": integers.reshape(groups, -1)[g],
            **({"bias": layer.tensors["bias"][rows]} if "bias" in layer.tensors else {}),
            "weight_scale": scales[rows].astype(np.float32),
            "input_scale": np.array([input_scale], np.float32),
        }
        new.append(Layer("Convolution", f"{layer.name}.{g}", [parts[g]], [made[g]], own, tensors))
        network.found.parameters[f"{layer.name}.{g}"] = dict(named)
    new.append(Layer("Concat", f"{layer.name}.concat", made, layer.outputs, {0: "0"}))
    place = network.layers.index(layer)
    network.layers[place : place + 1] = new


def _weight_only(layer: Layer, name: str, weight: torch.Tensor, fmt: IntQuant, network: Network) -> None:
    if layer.type not in _LINEAR or weight.dim() != 2 or fmt.width not in (4, 6, 8):
        raise TargetError(
            f"ncnn stores '{name}' as integers only if its input is an integer too",
            fix="quantize activations as well, or exclude its layer under where",
        )
    outputs, width = weight.shape
    block = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else max(BLOCKS)
    blocks = -(-width // block)
    scale = fmt.grid()[0]
    if not isinstance(fmt.granularity, PerGroup):
        scale = scale.reshape(-1, 1).expand(outputs, blocks)
    factor = network.found.factors[layer.name].reshape(-1, 1)
    integers = fmt.quantize(weight).numpy()
    term = 100 * fmt.width + BLOCKS[block]
    as_block_gemm(layer, outputs, width, term, network.layers, network.shapes)
    layer.tensors |= {
        "weight": packed(integers, fmt.width),
        "weight_scale": (1 / (scale.double().numpy() * factor)).astype(np.float32).reshape(-1),
    }


def packed(integers: np.ndarray, width: int) -> np.ndarray:
    """Rows of integers, each row's lowest bits first, in whole bytes."""
    bits = (integers[..., None] >> np.arange(width)) & 1
    rows = bits.reshape(len(integers), -1).astype(np.uint8)
    whole: np.ndarray = np.packbits(rows, axis=1, bitorder="little")
    return whole.reshape(-1).view(np.int8)


# ---- where integers travel


def _hand_over(network: Network, steps: Mapping[str, float]) -> dict[str, float]:
    """Let a convolution make the integers that all of its readers want."""
    found: dict[str, float] = {}
    for layer in network.layers:
        blob = layer.outputs[0] if layer.outputs else ""
        readers = [other for other in network.layers if blob in other.inputs]
        integer = layer.type in _CONVOLUTIONS and layer.integer(8) in (1, 2)
        if not integer or not readers or blob in network.outputs:
            continue
        every = all(other.type in _CONVOLUTIONS and other.integer(8) for other in readers)
        if every and steps.get(blob, _SEVERAL) != _SEVERAL:
            layer.params[8] = str(layer.integer(8) + 100)
            layer.tensors["output_scale"] = np.array([1 / steps[blob]], np.float32)
            found[blob] = steps[blob]
    return found


def _quantize_once(network: Network, steps: Mapping[str, float]) -> dict[str, float]:
    """Quantize what several integer layers read in a layer of its own."""
    found: dict[str, float] = {}
    for blob, step in steps.items():
        maker = next((layer for layer in network.layers if blob in layer.outputs), None)
        readers = [
            other for other in network.layers
            if blob in other.inputs and other.integer(8) and other.type in (*_CONVOLUTIONS, "InnerProduct")
        ]  # fmt: skip
        if maker is None or step == _SEVERAL or len(readers) < 2 or "output_scale" in maker.tensors:
            continue
        integers = f"{blob}.int8"
        scale = {"scale": np.array([1 / step], np.float32)}
        layer = Layer("Quantize", integers, [blob], [integers], {0: "1"}, scale)
        network.layers.insert(network.layers.index(maker) + 1, layer)
        for other in readers:
            other.inputs = [integers]
        found[integers] = step
    return found


# ---- what can be stored


def realise(fmt: TensorFormat, role: str) -> TensorFormat:
    """The grid that is stored, or the error that says what can be."""
    if isinstance(fmt, FloatCast):
        if fmt.dtype == "float16" and role == "weight":
            return fmt
        raise TargetError(f"ncnn stores no {role}s as {fmt.dtype}", fix="cast weights to float16")
    if not isinstance(fmt, IntQuant):
        raise TargetError(f"ncnn cannot store {type(fmt).__name__}", fix="use int8, or float16 for weights")
    if role == "activation":
        if fmt.width != 8 or not isinstance(fmt.granularity, PerTensor):
            raise TargetError(
                f"ncnn has no kernels for {fmt.width}-bit activations {_shared(fmt)}",
                fix="use int8 per tensor for activations",
            )
        return replace(fmt, signed=True, symmetric=True, readers=STATIC)
    if fmt.width not in (4, 6, 8):
        raise TargetError(
            f"ncnn stores no {fmt.width}-bit weights", fix="use int8, or int4 for weights alone"
        )
    if not fmt.symmetric:
        raise TargetError(
            "ncnn has no zero points: asymmetric weights cannot be stored", fix="use symmetric weights"
        )
    if isinstance(fmt.granularity, PerChannel) and fmt.granularity.axis != 0:
        raise TargetError("ncnn's weights have scales on axis 0 alone", fix="exclude transposed convolutions")
    group = fmt.granularity
    if isinstance(group, PerGroup) and (group.axis != 1 or group.size not in BLOCKS):
        raise TargetError(
            f"ncnn has no weights in groups of {group.size} along axis {group.axis}",
            fix="use groups of 32, 64 or 128 along axis 1",
        )
    return replace(fmt, signed=True)


def _shared(fmt: IntQuant) -> str:
    return {PerTensor: "per tensor", PerChannel: "per channel", PerGroup: "per group"}[type(fmt.granularity)]
